"""Requests that stay open are told of before they end: a stream of gRPC, a long poll of HTTP/1."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.books import BooksWatcher
from tests.e2e.harness import AgentProcess, Process, clean_environment, free_port, show

GRPC = servers.APPS / "grpc_calls.py"
TRACE, CALLER = "0123456789abcdef0123456789abcdef", "0123456789abcdef"
CONTEXT = f"00-{TRACE}-{CALLER}-01"
POLLED = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        sys.stdin.readline()
        self.send_response(204)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("open", flush=True)
server.handle_request()
"""


@contextmanager
def until_told(arguments: list[str | object]) -> Iterator[subprocess.Popen[str]]:
    """A program that prints a line when it is ready, and goes on until its standard input ends."""
    program = subprocess.Popen(
        [str(argument) for argument in arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    try:
        assert program.stdout.readline() == "open\n"
        yield program
        program.stdin.close()
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.wait()


def openings(tracing: AgentProcess) -> list[CollectedSpan]:
    """The two spans that tell of what is open, the server's first; nothing else has come."""
    spans = tracing.wait_for_spans(2)
    assert [span.kind for span in spans] == ["INTERNAL"] * 2, show(spans)
    return sorted(spans, key=lambda span: span.attributes["spanloom.opened"], reverse=True)


def assert_below_their_own(tracing: AgentProcess, told: list[CollectedSpan]) -> list[CollectedSpan]:
    """Each is the child of what it told of, at its beginning. Returns the spans of the server and the client."""
    spans = tracing.exact_spans(4)
    finals = []
    for opening, kind in zip(told, ("SERVER", "CLIENT"), strict=True):
        [final] = [span for span in spans if span.span_id == opening.parent_span_id]
        assert (final.kind, f"{final.name} (opened)") == (kind, opening.name), show(spans)
        assert (final.trace_id, final.resource) == (opening.trace_id, opening.resource)
        # The clock of the host may have been adjusted meanwhile.
        assert abs(final.start_time_ns - opening.start_time_ns) < 50_000_000
        assert opening.start_time_ns == opening.end_time_ns < final.end_time_ns
        assert opening.attributes["spanloom.link.method"] == "opened"
        finals.append(final)
    assert len({span.span_id for span in spans}) == 4
    books = tracing.books()
    assert books.closed
    assert (books.begun, books.dropped) == (4, {})
    assert tracing.metrics()["spanloom_stitching_openings_total"] == 2
    return finals


def test_a_stream_of_grpc(agent, start: Callable[..., Process]):
    """While messages come, each end is told of, in the caller's trace; the status comes with the end of the stream."""
    port = free_port()
    start([sys.executable, GRPC, "serve", str(port)], port=port, env=clean_environment())
    tracing = agent([port], {"capture.announce_open_seconds": 1})
    with BooksWatcher(tracing, 4) as watcher:
        with until_told([sys.executable, GRPC, "watch", port, CONTEXT]):
            told = openings(tracing)
            assert tracing.books().in_flight == 2
        finals = assert_below_their_own(tracing, told)
    watcher.assert_right(readings=5)
    for opening, final in zip(told, finals, strict=True):
        assert opening.attributes["rpc.method"] == "pkg.Echo/Tick"
        assert "rpc.response.status_code" not in opening.attributes
        assert "spanloom.rpc.response.messages" not in opening.attributes
        assert final.attributes["rpc.response.status_code"] == "CANCELLED"
        assert opening.trace_id == TRACE
    assert finals[1].parent_span_id == CALLER
    assert finals[0].parent_span_id == finals[1].span_id


def test_a_long_poll(agent, start: Callable[..., Process]):
    """An answer that is not there yet: where it was asked for is known already."""
    port = free_port()
    with until_told([sys.executable, "-c", POLLED, port]):
        tracing = agent([port], {"capture.announce_open_seconds": 0.2})
        start(["curl", "-s", f"http://127.0.0.1:{port}/poll"], env=clean_environment())
        told = openings(tracing)
        assert told[0].attributes["url.path"] == "/poll"
        assert "http.response.status_code" not in told[0].attributes
        assert tracing.books().in_flight == 2
    finals = assert_below_their_own(tracing, told)
    assert [span.attributes["http.response.status_code"] for span in finals] == [204, 204]
