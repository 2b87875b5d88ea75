"""Real clients under real probes: each request is one client span, and the server's span is its child."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import servers
from tests.e2e.harness import clean_environment, curl, free_port, one, show
from tests.e2e.load import run_wrk

PYTHON = Path(sys.executable).resolve().name


def run(arguments: list[str | Path]) -> list[int]:
    """Run a client program to its end; it prints one status per line."""
    result = subprocess.run(
        [str(argument) for argument in arguments],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [int(line) for line in result.stdout.split()]


def with_python(name: str) -> Callable[[list[str], Path], list[int]]:
    return lambda urls, directory: run([sys.executable, servers.APPS / "python_client.py", name, *urls])


def with_curl(urls: list[str], directory: Path) -> list[int]:
    outputs = [argument for _ in urls for argument in ("-o", "/dev/null")]
    return [int(status) for status in curl("-w", "%{http_code}\n", *outputs, *urls).stdout.split()]


# Name -> how to request URLs in turn, executable, language, beginning of the user agent.
CLIENTS: dict[str, tuple[Callable[[list[str], Path], list[int]], str, str, str]] = {
    "curl": (with_curl, "curl", "", "curl/"),
    "urllib": (with_python("urllib"), PYTHON, "python", "Python-urllib/"),
    "http.client": (with_python("http.client"), PYTHON, "python", ""),
    "aiohttp": (with_python("aiohttp"), PYTHON, "python", "Python/3"),
    "httpx": (with_python("httpx"), PYTHON, "python", "python-httpx/"),
    "node-fetch": (
        lambda urls, directory: run(["node", servers.APPS / "node_client.mjs", *urls]),
        "node",
        "nodejs",
        "node",
    ),
    "java": (
        lambda urls, directory: run(["java", "-XX:TieredStopAtLevel=1", servers.APPS / "JavaClient.java", *urls]),
        "java",
        "java",
        "Java-http-client/",
    ),
}
if servers.HAS_GO:
    CLIENTS["go"] = (
        lambda urls, directory: run([servers.go_program(directory), "get", *urls]),
        "go_http",
        "go",
        "Go-http-client/",
    )


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_s_requests_are_spans(name: str, agent, serve, public_path: Path, tmp_path: Path):
    """Each request is one client span with URL, status and executable, and the parent of the server's span."""
    request, executable, language, user_agent = CLIENTS[name]
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port])
    urls = [f"http://127.0.0.1:{port}/status/{status}?for={name}" for status in servers.STATUSES]
    assert request(urls, tmp_path) == list(servers.STATUSES), "the client itself"
    spans = tracing.exact_spans(2 * len(urls), port=port)
    for status, url in zip(servers.STATUSES, urls, strict=True):
        client = one(span for span in spans if span.kind == "CLIENT" and span.attributes["url.full"] == url)
        attributes = client.attributes
        assert client.name == "GET"
        assert attributes["http.request.method"] == "GET"
        assert attributes["http.response.status_code"] == status
        assert attributes["server.address"] == "127.0.0.1"
        assert attributes["server.port"] == port
        assert attributes["network.peer.address"] == "127.0.0.1"
        assert attributes["network.peer.port"] == port
        assert attributes["network.protocol.version"] == "1.1"
        # To a client 4xx is an error too.
        assert client.status == ("ERROR" if status >= 400 else "UNSET"), show([client])
        assert attributes.get("error.type") == (str(status) if status >= 400 else None)
        assert client.resource["process.executable.name"] == executable
        assert client.parent_span_id == ""
        if name != "curl":  # it ends within milliseconds, before anything but its name can be looked up
            assert client.resource.get("telemetry.sdk.language", "") == language
        server = one(
            span for span in spans if span.kind == "SERVER" and span.attributes["url.path"] == f"/status/{status}"
        )
        assert server.attributes.get("user_agent.original", "").startswith(user_agent)
        assert server.trace_id == client.trace_id, show([client, server])
        assert server.parent_span_id == client.span_id, show([client, server])
        assert server.attributes["spanloom.link.method"] == "peer"
        assert client.start_time_ns <= server.start_time_ns
    assert len({span.trace_id for span in spans}) == len(urls), "requests of a client that serves nobody"
    books = tracing.books()
    assert books.dropped == {}


def test_wrk_over_many_connections(agent, serve, public_path: Path):
    """Every request of wrk has a client span that is the parent of exactly one server span, none shared or swapped."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    tracing = agent([port])
    run_wrk(port, ["/status/200"], 400, threads=4, connections=16)
    tracing.wait_for_spans(800, port=port)
    tracing.settle()
    spans = tracing.spans(port)
    clients = {str(s.attributes["url.full"]).partition("?")[2]: s for s in spans if s.kind == "CLIENT"}
    served = {str(s.attributes["url.query"]): s for s in spans if s.kind == "SERVER"}
    duplicates = [
        (key, count)
        for key, count in Counter(
            (s.kind, str(s.attributes.get("url.query") or s.attributes.get("url.full"))) for s in spans
        ).items()
        if count > 1
    ]
    assert not duplicates
    # wrk leaves requests under way when it stops: those may have no answer, or may never have been read.
    assert set(served) <= set(clients)
    assert len(served) >= 400
    for key, server in served.items():
        client = clients[key]
        assert (server.trace_id, server.parent_span_id) == (client.trace_id, client.span_id), show([client, server])
        assert server.attributes["spanloom.link.method"] == "peer"
    assert {s.resource["process.executable.name"] for s in clients.values()} == {"wrk"}
    assert tracing.books().dropped == {}


def test_a_client_s_own_context_is_kept(agent, serve, public_path: Path):
    """An SDK's traceparent on the wire decides the trace of both ends; the server is still the client's child."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    tracing = agent([port])
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    header = f"traceparent: 00-{trace}-{parent}-01"
    assert curl("-H", header, "-H", "tracestate: a=1,b=2", f"http://127.0.0.1:{port}/status/200").returncode == 0
    spans = tracing.exact_spans(2, port=port)
    client, server = (one(span for span in spans if span.kind == kind) for kind in ("CLIENT", "SERVER"))
    assert (client.trace_id, client.parent_span_id) == (trace, parent)
    assert (server.trace_id, server.parent_span_id) == (trace, client.span_id)
    assert client.attributes["spanloom.link.method"] == "header"
    assert client.trace_state == server.trace_state == "a=1,b=2"
    assert client.flags & 1
    assert server.flags & 1
