"""What only one of the two ways into the kernel could get wrong, and the choice between them.

Every other end-to-end test runs with both: SPANLOOM_TEST_BACKEND, see the Makefile.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from agent.errors import KernelUnsupportedError
from agent.kernel import backends
from agent.kernel.capture import Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import Exchange
from tests.collector import Collector
from tests.e2e import servers
from tests.e2e.edge import Edge, seen
from tests.e2e.harness import AgentFailedError, AgentProcess, free_port, wait_until
from tests.e2e.scripted import (
    accept,
    close_with_reset,
    connect,
    listen,
    receive_head,
    receive_to_end,
    request,
    send_all,
)
from tests.e2e.scripted import response as make_response


def _backends() -> tuple[str, ...]:
    """Those that this kernel has; a kernel without any lets probes_attach fail every test here."""
    try:
        return "syscalls", backends.ways("sockets")[0][0].backend
    except KernelUnsupportedError:
        return ("syscalls",)


BACKENDS = _backends()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attaching_under_load(backend: str, tmp_path: Path, collector: Collector, start, serve, public_path: Path):
    """The programs are attached one after the other; none of them acts on what the others have not seen the half of."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    load = start(["wrk", "-t1", "-c64", "-d60s", f"http://127.0.0.1:{port}/status/200"])
    for _ in range(3):
        settings = {"kernel.backend": backend, "kernel.ring_buffer_bytes": 64 << 20}
        with AgentProcess(tmp_path, collector, [port], settings) as tracing:
            wait_until(
                lambda tracing=tracing: tracing.metrics()["spanloom_exchanges_begun_total"] > 5000, "there is load", 30
            )
            metrics = tracing.metrics()
        # An exchange whose response was missed would look like pipelining at the next request.
        assert metrics["spanloom_kernel_events_total{event=streamed}"] == 0
        assert metrics["spanloom_kernel_events_total{event=dropped_not_http}"] == 0
    load.check_alive()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_names_the_backend(backend: str, tmp_path: Path, collector: Collector):
    """Which way is taken can be seen, and asked for."""
    with AgentProcess(tmp_path, collector, [free_port()], {"kernel.backend": backend}) as tracing:
        tracing.stop()
    events = [json.loads(line) for line in tracing.stderr().splitlines()]
    assert [event["backend"] for event in events if event["event"] == "probes_attached"] == [backend]


def test_a_missing_tracepoint(monkeypatch: pytest.MonkeyPatch):
    """Auto falls back; what was asked for by name is refused, with what to do."""
    monkeypatch.setattr(backends, "SOCKET_TRACEPOINTS", ("sched_switch", "no_such_tracepoint"))
    found, reasons = backends.ways("auto")
    assert found == [backends.SYSCALLS]
    assert reasons == ["this kernel has no tracepoint no_such_tracepoint (Linux 6.16)"]
    assert backends.ways("syscalls") == ([backends.SYSCALLS], [])
    with pytest.raises(KernelUnsupportedError, match=r"no_such_tracepoint .*set kernel.backend to auto"):
        backends.ways("sockets")


def test_what_auto_falls_back_to_captures(monkeypatch: pytest.MonkeyPatch, start, serve, public_path: Path):
    """Where a tracepoint is missing the probes sit on system calls, and it is said why."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    monkeypatch.setattr(backends, "SOCKET_TRACEPOINTS", ("no_such_tracepoint",))
    with Capture(CaptureSettings()) as capture:
        assert "no_such_tracepoint" in capture.reasons[0]
        assert (capture.backend, capture.hooks) == ("syscalls", "system calls")
        capture.attach()
        with connect(port) as connection:
            send_all(connection, request("/status/200"))
            receive_head(connection)
        capture.hasten()
        wait_until(lambda: {1, 2} <= _roles(capture), "both ends are seen", 10)


def _roles(capture: Capture) -> set[int]:
    capture.sweep()
    records = Decoder(capture.layout).decode(*capture.drain())
    return {one.role for one in records if type(one) is Exchange and one.request.startswith(b"GET /status/200 ")}


def test_an_unknown_backend(tmp_path: Path, collector: Collector):
    """A misspelt name is a configuration error that names the choices."""
    with pytest.raises(AgentFailedError, match="syscalls"):
        AgentProcess(tmp_path, collector, [free_port()], {"kernel.backend": "socket"}).start()


def test_a_write_after_the_peer_is_gone(edge: Edge) -> None:
    """A write that fails at once takes nothing back of the one before, which was taken whole."""
    edge.server.start(_answer_and_write_again, edge.port)
    edge.client.call(_read_and_reset, edge.port)
    assert edge.server.result()
    server, _ = edge.spans(1).one()
    assert seen(server)[:2] == ("/twice", 200)
    assert server.attributes["http.response.body.size"] == 2
    assert server.end_time_ns - server.start_time_ns < 150_000_000
    edge.assert_forgotten()
    assert edge.agent.books().in_flight == 0


def _answer_and_write_again(port: int) -> bool:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, make_response(200, body=b"ok"))
        time.sleep(0.3)
        failed = False
        for _ in range(3):  # the first may still be told of the reset itself
            try:
                connection.send(b"more")
            except OSError:
                failed = True
        return failed


def _read_and_reset(port: int) -> None:
    with connect(port) as connection:
        send_all(connection, request("/twice"))
        receive_head(connection)
        time.sleep(0.1)
        close_with_reset(connection)


def test_blocking_write_of_many_packets(edge: Edge) -> None:
    """One call that fills many packets and sleeps for room in between is counted once, and ends when it returns."""
    size = 24 << 20
    edge.server.start(_answer_with_one_call, edge.port, size)
    assert edge.client.call(_read_in_pauses, edge.port) >= size
    edge.server.result()
    for span in edge.expect([("/large", 200)]).one():
        assert "http.response.body.size" not in span.attributes  # the close is its end, and chunks have no size
        assert span.end_time_ns - span.start_time_ns > 90_000_000
    edge.assert_forgotten()
    assert edge.agent.books().in_flight == 0


def _answer_with_one_call(port: int, size: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        receive_head(connection)
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        data = head + b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"z" * size)
        connection.setblocking(True)
        assert os.write(connection.fileno(), data) == len(data)


def _read_in_pauses(port: int) -> int:
    total = 0
    with connect(port) as connection:
        send_all(connection, request("/large"))
        for _ in range(10):
            time.sleep(0.01)
            total += len(connection.recv(65536))
        connection.setblocking(True)
        return total + receive_to_end(connection)
