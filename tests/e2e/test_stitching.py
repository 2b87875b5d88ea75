"""A three-tier application under load: one trace per request with the right parents, and never a wrong one."""

from __future__ import annotations

import http.client
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.apps.tier import made_ids
from tests.e2e.harness import AgentProcess, free_port, one, show

REQUESTS = 300
CONCURRENCY = 50


def trace_and_parent(number: int) -> tuple[int, int]:
    """Ids of the caller outside, all different, none zero; 64-bit trace ids for the formats that have no others."""
    return (0xA000_0000_0000_0000 + number, 0xB000_0000_0000_0000 + number)


FORMATS: dict[str, Callable[[int, int], dict[str, str]]] = {
    "tracecontext": lambda trace, parent: {"traceparent": f"00-{trace:032x}-{parent:016x}-01"},
    "b3": lambda trace, parent: {"b3": f"{trace:032x}-{parent:016x}-1"},
    "b3multi": lambda trace, parent: {
        "X-B3-TraceId": f"{trace:032x}",
        "X-B3-SpanId": f"{parent:016x}",
        "X-B3-Sampled": "1",
    },
    "jaeger": lambda trace, parent: {"uber-trace-id": f"{trace:x}:{parent:x}:0:1"},
    "xray": lambda trace, parent: {
        "X-Amzn-Trace-Id": f"Root=1-{trace >> 96:08x}-{trace & (1 << 96) - 1:024x};Parent={parent:016x};Sampled=1"
    },
    "datadog": lambda trace, parent: {
        "x-datadog-trace-id": str(trace),
        "x-datadog-parent-id": str(parent),
        "x-datadog-sampling-priority": "1",
    },
}


class Application:
    """Three tiers in a row and the agent that sees them; ``spans()`` sorts what came of each request by its place."""

    PLACES = ("caller", "front", "front calls", "middle", "middle calls", "back")

    def __init__(self, agent, start, modes: tuple[str, str, str], behaviour: str) -> None:
        self.ports = [free_port() for _ in range(3)]
        for mode, port, following in zip(modes, self.ports, [*self.ports[1:], 0], strict=True):
            arguments = [sys.executable, servers.APPS / "tier.py", mode, behaviour, str(port)]
            start([*arguments, str(following)] if following else arguments, port=port)
        self.tracing: AgentProcess = agent(self.ports)

    def load(self, headers: Callable[[int], dict[str, str]]) -> None:
        """Send REQUESTS requests from CONCURRENCY threads."""

        def request(number: int) -> bytes:
            connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=60)
            connection.request("GET", f"/r/{number}", headers=headers(number))
            body = connection.getresponse().read()
            connection.close()
            return body

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            assert set(pool.map(request, range(REQUESTS))) == {b"end"}

    def chains(self) -> Iterator[tuple[int, dict[str, CollectedSpan]]]:
        """For each request its six spans, by place; each must be there exactly once."""
        count = len(self.PLACES) * REQUESTS
        self.tracing.wait_for_spans(count)
        chains: dict[int, dict[str, CollectedSpan]] = {number: {} for number in range(REQUESTS)}
        spans = self.tracing.exact_spans(count)
        for span in spans:
            position = 2 * self.ports.index(span.attributes["server.port"]) + (span.kind == "SERVER")
            url = span.attributes["url.path" if span.kind == "SERVER" else "url.full"]
            chain = chains[int(url.rpartition("/")[2])]
            assert self.PLACES[position] not in chain, show([span, chain[self.PLACES[position]]])
            chain[self.PLACES[position]] = span
        assert self.tracing.books().dropped == {}
        metrics = self.tracing.metrics()
        lost = {name: value for name, value in metrics.items() if "stitching" in name and value and "ambig" not in name}
        assert lost == {}
        yield from chains.items()


def assert_parents(chain: dict[str, CollectedSpan], *edges: tuple[str, str, str]) -> None:
    """Check ``(child, parent, link method)`` edges."""
    for child, parent, method in edges:
        assert chain[child].parent_span_id == chain[parent].span_id, (child, parent, show(chain.values()))
        assert chain[child].attributes["spanloom.link.method"] == method, (child, show(chain.values()))


PEERS = (("front", "caller", "peer"), ("middle", "front calls", "peer"), ("back", "middle calls", "peer"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_forwarded_headers_make_one_trace(format_name: str, agent, start):
    """Rule 1 in each format, through an event loop and threads: one trace per request, every parent right."""
    application = Application(agent, start, ("loop", "threads", "threads"), "copy")
    write = FORMATS[format_name]
    application.load(lambda number: write(*trace_and_parent(number)))
    for number, chain in application.chains():
        trace, parent = trace_and_parent(number)
        assert {span.trace_id for span in chain.values()} == {f"{trace:032x}"}, show(chain.values())
        assert chain["caller"].parent_span_id == f"{parent:016x}"
        assert_parents(chain, *PEERS, ("front calls", "front", "forwarded"), ("middle calls", "middle", "forwarded"))


@pytest.mark.parametrize("mode", ["loop", "threads"])
def test_spans_of_an_sdk_are_the_parents(mode: str, agent, start):
    """Rule 2: where the application makes a span of its own in the trace, the call is that span's child."""
    application = Application(agent, start, (mode, mode, mode), "sdk")
    application.load(lambda number: FORMATS["tracecontext"](*trace_and_parent(number)))
    for number, chain in application.chains():
        trace, _ = trace_and_parent(number)
        assert {span.trace_id for span in chain.values()} == {f"{trace:032x}"}, show(chain.values())
        assert_parents(chain, *PEERS)
        for place, port in (("front calls", application.ports[0]), ("middle calls", application.ports[1])):
            assert chain[place].parent_span_id == made_ids(port, f"/r/{number}")[1], show(chain.values())
            assert chain[place].attributes["spanloom.link.method"] == "header"


@pytest.mark.parametrize("mode", ["loop", "threads"])
def test_a_trace_of_its_own_wins(mode: str, agent, start):
    """Rule 3: a call that carries another trace belongs there; a thread's call also links to what caused it."""
    application = Application(agent, start, (mode, mode, mode), "foreign")
    application.load(lambda number: FORMATS["tracecontext"](*trace_and_parent(number)))
    for number, chain in application.chains():
        assert_parents(chain, *PEERS)
        for place, served, port in (
            ("front calls", "front", application.ports[0]),
            ("middle calls", "middle", application.ports[1]),
        ):
            trace_id, span_id = made_ids(port, f"/r/{number}")
            call = chain[place]
            assert (call.trace_id, call.parent_span_id) == (trace_id, span_id), show(chain.values())
            linked = [link.span_id for link in call.links]
            assert linked == ([chain[served].span_id] if mode == "threads" else []), show(chain.values())


def test_a_request_id_relates_what_an_event_loop_does(agent, start):
    """Rule 5: a forwarded x-request-id that one request in flight came with names the cause of a call."""
    application = Application(agent, start, ("loop", "loop", "loop"), "copy")
    application.load(lambda number: {"x-request-id": f"request-{number}"})
    traces = set()
    for _, chain in application.chains():
        assert len({span.trace_id for span in chain.values()}) == 1, show(chain.values())
        traces.add(chain["caller"].trace_id)
        assert chain["caller"].parent_span_id == ""
        assert_parents(chain, *PEERS, ("front calls", "front", "request_id"), ("middle calls", "middle", "request_id"))
    assert len(traces) == REQUESTS


def test_a_request_id_of_several_requests_relates_nothing(agent, start):
    """Rule 5: where several requests in flight may share an x-request-id, a call has the right parent or none."""
    application = Application(agent, start, ("loop", "loop", "loop"), "copy")
    application.load(lambda number: {"x-request-id": f"request-{number % 5}"})
    ambiguous = 0
    for _, chain in application.chains():
        assert_parents(chain, *PEERS)
        for call, served in (("front calls", "front"), ("middle calls", "middle")):
            assert chain[call].parent_span_id in ("", chain[served].span_id), show(chain.values())
            ambiguous += chain[call].attributes["spanloom.link.method"] == "ambiguous"
    assert ambiguous == application.tracing.metrics()["spanloom_stitching_ambiguous_total"] > 0


def test_a_trace_id_alone_relates_what_an_event_loop_does(agent, start):
    """Rule 5: X-Ray's header without Parent tells the trace only: the one request in flight of it is the cause. A
    request that came without Parent forwards it as it was.
    """
    application = Application(agent, start, ("loop", "loop", "loop"), "root")
    application.load(lambda number: FORMATS["xray"](*trace_and_parent(number)))
    for number, chain in application.chains():
        trace, parent = trace_and_parent(number)
        assert {span.trace_id for span in chain.values()} == {f"{trace:032x}"}, show(chain.values())
        assert chain["caller"].parent_span_id == f"{parent:016x}"
        assert_parents(chain, *PEERS, ("front calls", "front", "trace_id"), ("middle calls", "middle", "forwarded"))


def test_threads_need_no_header(agent, start):
    """Rule 4: between services that serve one request per thread, calls without any header are one trace."""
    application = Application(agent, start, ("threads", "threads", "threads"), "none")
    application.load(lambda number: {})
    traces = set()
    for _, chain in application.chains():
        assert len({span.trace_id for span in chain.values()}) == 1, show(chain.values())
        traces.add(chain["caller"].trace_id)
        assert chain["caller"].parent_span_id == ""
        assert_parents(chain, *PEERS, ("front calls", "front", "thread"), ("middle calls", "middle", "thread"))
    assert len(traces) == REQUESTS


def test_an_event_loop_that_forwards_nothing_gets_no_wrong_parent(agent, start):
    """Without a header an event loop's calls cannot be told apart: no parent, and never a wrong one."""
    application = Application(agent, start, ("loop", "loop", "loop"), "none")
    application.load(lambda number: {})
    for _, chain in application.chains():
        assert_parents(chain, *PEERS)
        for call, served in (("front calls", "front"), ("middle calls", "middle")):
            assert chain[call].parent_span_id in ("", chain[served].span_id), show(chain.values())


def test_connections_that_share_a_client_port(agent):
    """Two connections from one client port to two servers are told apart: each server's span has its own caller."""
    listeners = [socket.create_server(("127.0.0.1", free_port())) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    tracing = agent(ports)
    clients = []
    own_port = free_port()
    for port in ports:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("127.0.0.1", own_port))
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /r/0 HTTP/1.1\r\nHost: shared\r\n\r\n")
        clients.append(client)
    for listener, client in zip(listeners, clients, strict=True):  # both requests are on their way before one is read
        with listener, client, listener.accept()[0] as served:
            served.recv(4096)
            served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            client.recv(4096)
    spans = tracing.exact_spans(4)
    servers_by_start = sorted((span for span in spans if span.kind == "SERVER"), key=lambda span: span.start_time_ns)
    for port, server in zip(ports, servers_by_start, strict=True):
        caller = one(span for span in spans if span.attributes["network.peer.port"] == port)
        assert server.parent_span_id == caller.span_id, show(spans)
        assert server.attributes["spanloom.link.method"] == "peer"
