"""A service of each kind between callers and a slow server, at a concurrency of 50: no wrong parent anywhere.

Every request has a number in its path, which every span of it shows: so the truth of each edge is known. Without
headers a call's parent is the request that caused it or nothing; with headers it is always found.
"""

from __future__ import annotations

import http.client
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.harness import AgentProcess, free_port, show

REQUESTS = 400
CONCURRENCY = 50
PLACES = ("caller", "between", "call", "behind")

Start = partial[servers.Server]
"""Of a port, the next port and a directory."""


def python(mode: str, behaviour: str = "none") -> Start:
    return partial(servers.python_between, mode, behaviour)


# The least share of calls whose parent is found by thread: of all where one thread reads a request, makes its calls and
# answers it. The JDK's server lets a worker begin before its selector has let go of the connection, and a connection
# that is watched by a selector is not believed to be served by a thread.
WITHOUT_HEADERS: dict[str, tuple[Start, float]] = {
    "threads": (python("threads"), 1),
    "event-loop-on-select": (python("select"), 0),
    "one-reader": (python("reader"), 0),
    "takers": (python("takers"), 0),
    "nginx": (partial(servers.nginx_between), 0),
    "node": (partial(servers.node_between), 0),
    "java-pool": (partial(servers.java_between, "pool", "blocking"), 0.5),
    "java-pool-selecting-client": (partial(servers.java_between, "pool", "selecting"), 0),
    **({"java-virtual": (partial(servers.java_between, "virtual", "blocking"), 0)} if servers.NEWER_JAVA else {}),
    **({"go": (partial(servers.go_between), 0)} if servers.HAS_GO else {}),
}
WITH_HEADERS: dict[str, Start] = {
    name: python(start.args[0], "copy") if start.func is servers.python_between else start
    for name, (start, _) in WITHOUT_HEADERS.items()
    if name != "threads"
}


def run(
    start: Start, agent, serve, directory: Path, headers: Callable[[int], dict[str, str]], requests: int = REQUESTS
) -> list[dict[str, CollectedSpan]]:
    """Send the requests; the four spans of each, by place."""
    port, behind = free_port(), free_port()
    arguments = [sys.executable, servers.APPS / "tier.py", "threads", "slow", str(behind)]
    serve(servers.Server(arguments=arguments, executable="python", language="python"), behind)
    serve(start(port, behind, directory), port)
    tracing: AgentProcess = agent([port, behind])

    def caller(numbers: range) -> None:
        """Requests one after the other on one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in numbers:
            connection.request("GET", f"/r/{number}", headers=headers(number))
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"end")
        connection.close()

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(caller, [range(first, requests, CONCURRENCY) for first in range(CONCURRENCY)]))
    tracing.wait_for_spans(len(PLACES) * requests)
    chains: list[dict[str, CollectedSpan]] = [{} for _ in range(requests)]
    for span in tracing.exact_spans(len(PLACES) * requests):
        place = PLACES[2 * (span.attributes["server.port"] == behind) + (span.kind == "SERVER")]
        url = span.attributes["url.path" if span.kind == "SERVER" else "url.full"]
        chain = chains[int(url.rpartition("/")[2])]
        assert place not in chain, show([span, chain[place]])
        chain[place] = span
    assert tracing.books().dropped == {}
    return chains


def parent_places(chains: list[dict[str, CollectedSpan]]) -> Counter[tuple[str, str]]:
    """How many spans of each place have which parent: a place of the same request, ``none``, ``outside`` or, which is
    always wrong, ``another request's``.
    """
    own = {span.span_id for chain in chains for span in chain.values()}
    found: Counter[tuple[str, str]] = Counter()
    for chain in chains:
        places = {span.span_id: place for place, span in chain.items()}
        for place, span in chain.items():
            parent = span.parent_span_id
            outside = "another request's" if parent in own else "outside"
            found[place, places.get(parent, outside) if parent else "none"] += 1
    return found


def assert_none_wrong(chains: list[dict[str, CollectedSpan]], least: float) -> None:
    """Each edge is right or, that of a call only, absent; the trace ids say the same; the least share is there."""
    found = parent_places(chains)
    linked = found.pop(("call", "between"), 0)
    unlinked = found.pop(("call", "none"), 0)
    assert found == dict.fromkeys((("caller", "none"), ("between", "caller"), ("behind", "call")), len(chains))
    assert linked + unlinked == len(chains)
    assert linked >= least * len(chains)
    for chain in chains:
        for above, below in pairwise(PLACES):
            is_linked = chain[below].parent_span_id == chain[above].span_id
            assert (chain[below].trace_id == chain[above].trace_id) == is_linked, show(chain.values())


@pytest.mark.parametrize("name", WITHOUT_HEADERS)
def test_without_headers_no_parent_is_wrong(name: str, agent, serve, public_path: Path):
    """A call's parent is the request that caused it, or unknown; where one thread serves a request it is known."""
    start, least = WITHOUT_HEADERS[name]
    assert_none_wrong(run(start, agent, serve, public_path, lambda number: {}), least)


@pytest.mark.parametrize(("mode", "least"), [("threads", 1), ("reader", 0), ("takers", 0)])
def test_a_call_that_ends_long_before_the_answer(mode: str, least: float, agent, serve, public_path: Path):
    """A request that is slow after its call is announced, and by whom it will be answered is not known yet."""
    start = python(mode, "late")
    assert_none_wrong(run(start, agent, serve, public_path, lambda number: {}, 2 * CONCURRENCY), least)


@pytest.mark.parametrize("name", WITH_HEADERS)
def test_a_forwarded_header_finds_every_parent(name: str, agent, serve, public_path: Path):
    """Rule 1 through servers of all kinds: one trace per request, every parent right."""
    traceparent = "00-{0:032x}-{1:016x}-01".format
    chains = run(
        WITH_HEADERS[name],
        agent,
        serve,
        public_path,
        lambda number: {"traceparent": traceparent(0xA000_0000 + number, 0xB000_0000 + number)},
    )
    right = (("caller", "outside"), ("between", "caller"), ("call", "between"), ("behind", "call"))
    assert parent_places(chains) == dict.fromkeys(right, REQUESTS)
    for number, chain in enumerate(chains):
        assert {span.trace_id for span in chain.values()} == {f"{0xA000_0000 + number:032x}"}, show(chain.values())
        assert chain["caller"].parent_span_id == f"{0xB000_0000 + number:016x}"
        assert chain["call"].attributes["spanloom.link.method"] == "forwarded"
