"""The books from the kernel to the collector: they close in every reading, whatever becomes of the spans."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from agent.kernel.capture import Capture, CaptureSettings
from tests.collector import Answer, Collector
from tests.e2e import servers
from tests.e2e.books import BooksWatcher
from tests.e2e.cluster import stopped
from tests.e2e.harness import AgentProcess, curl, free_port, wait_until
from tests.e2e.load import run_wrk
from tests.e2e.scripted import connect, request, send_all

REQUESTS = 3000
CONNECTIONS = 16
PIPELINED = 200
MOST_IN_FLIGHT = 3 * REQUESTS
"""Both ends of all of them, as wrk may be done before anything is read, and of those few that it sends beyond."""

SETTINGS = {"export.batch.max_spans": 100, "export.batch.max_delay_seconds": 0.2}


def _rejecting(collector: Collector) -> None:
    collector.answer(*[Answer(rejected_spans=7, delay_seconds=0.05), Answer()] * 20)


def _hanging(collector: Collector) -> None:
    collector.answer(*[Answer(hang=True), Answer(hang=True), Answer(), Answer()] * 2)


def _refusing(collector: Collector) -> None:
    import grpc

    collector.answer(*[Answer(code=grpc.StatusCode.INVALID_ARGUMENT, delay_seconds=0.05), Answer()] * 20)


@pytest.mark.parametrize("misbehave", [_rejecting, _hanging, _refusing])
def test_the_books_close_at_a_bad_collector(agent, serve, public_path: Path, collector: Collector, misbehave):
    """begun = exported + rejected + sampled out + dropped + in flight, and at the end nothing is in flight."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    misbehave(collector)
    patience = {"export.otlp.timeout_seconds": 2 if misbehave is _hanging else 30}
    tracing = agent([port], SETTINGS | patience | {"sampling.ratio": 0.5})
    tracing.expects_errors = True
    with BooksWatcher(tracing, MOST_IN_FLIGHT) as watcher:
        run_wrk(port, ["/status/200"], REQUESTS, connections=CONNECTIONS)
        wait_until(lambda: tracing.books().on_the_way == 0, lambda: tracing.state(), 60)
    watcher.assert_right(readings=10)
    books = tracing.books()
    assert books.closed
    assert books.sampled_out > 0
    if misbehave is _rejecting:
        assert books.rejected > 0
        assert books.exported + books.rejected == collector.span_count
        assert not books.undelivered
    elif misbehave is _hanging:
        assert books.exported <= collector.span_count  # an answer may be too late on a busy machine
        assert not books.undelivered
    else:
        assert books.undelivered.keys() == {"invalid_argument"}
        assert books.exported == collector.span_count
    assert any(reading.exporting for reading in watcher.readings)
    assert any(reading.waiting for reading in watcher.readings)


def test_the_books_close_without_a_collector(agent, serve, public_path: Path, tmp_path: Path):
    """What the queue cannot hold is dropped and counted; the rest is in flight until there is a collector."""
    port, collector_port = free_port(), free_port()
    serve(servers.nginx(port, public_path), port)
    settings = SETTINGS | {"export.queue_spans": 1000, "export.otlp.endpoint": f"http://127.0.0.1:{collector_port}"}
    tracing = AgentProcess(tmp_path, None, [port], settings)
    tracing.expects_errors = True
    with tracing, BooksWatcher(tracing, MOST_IN_FLIGHT) as watcher:
        run_wrk(port, ["/status/200"], REQUESTS, connections=CONNECTIONS)
        wait_until(lambda: tracing.books().undelivered.get("queue_full"), lambda: tracing.state())
        assert tracing.books().exporting > 0
        with Collector(port=collector_port) as collector:
            wait_until(lambda: tracing.books().on_the_way == 0, lambda: tracing.state(), 60)
            books = tracing.books()
            assert books.undelivered.keys() == {"queue_full"}
            assert books.exported == collector.span_count > 0
    watcher.assert_right(readings=20)
    assert f'"exported":{books.exported},"not_delivered":{books.undelivered["queue_full"]}' in tracing.stderr()


def test_the_books_close_on_the_console(serve, public_path: Path, tmp_path: Path):
    """Without an endpoint, what was handed over was printed."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    with AgentProcess(tmp_path, None, [port]) as tracing:
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-20]")
        wait_until(lambda: tracing.books().not_exported == 40, lambda: tracing.state())
        assert tracing.books().closed
        assert tracing.stdout().count("\n") == 40


def test_what_is_in_flight_is_what_is_open(agent, serve, public_path: Path):
    """At rest the number is that of the requests without an answer, at both ends, in every reading."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    tracing = agent([port])
    url = f"http://127.0.0.1:{port}/status/200"
    for count in (1, 5):
        callers = [threading.Thread(target=curl, args=("-o", "/dev/null", f"{url}?sleep=4")) for _ in range(count)]
        for caller in callers:
            caller.start()
        wait_until(lambda count=count: tracing.books().in_flight == 2 * count, lambda: tracing.state())
        for _ in range(10):
            books = tracing.books()
            if not all(caller.is_alive() for caller in callers):
                break  # a machine so slow that the answers came
            assert books.in_flight == 2 * count
            assert books.closed
        for caller in callers:
            caller.join(30)
        assert tracing.settle().in_flight == 0


def test_no_reading_of_the_kernel_has_more_ended_than_begun(serve, public_path: Path):
    """The counters are read one after the other while they grow: an exchange may not be missed that is seen to end."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    backend = os.environ.get("SPANLOOM_TEST_BACKEND", "auto")
    # Of two hundred ends of connections there is room for sixteen: most exchanges end in the moment they begin.
    with Capture(CaptureSettings(backend=backend, connections=16, ports_include=(port,))) as capture:
        capture.attach([os.getpid()])
        load = threading.Thread(target=run_wrk, args=(port, ["/status/200"], 30_000), kwargs={"connections": 100})
        load.start()
        worst, readings = 0, 0
        while load.is_alive():
            counters = capture.counters()
            ended = sum(counters[name] for name in ("emitted", "cancelled", "streamed"))
            ended += sum(count for name, count in counters.items() if name.startswith("dropped_"))
            worst = min(worst, counters["begun"] - ended)
            readings += 1
        load.join()
        assert worst == 0
        assert readings > 1000
        assert counters["dropped_state_full"] > 1000, "the test's own premise"


def test_pipelined_connections_that_came_and_went_unseen(agent, serve, public_path: Path):
    """Nearly all that was sent of them, their ends included, found the ring buffer full: none is in flight for ever."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port], {"kernel.ring_buffer_bytes": 16 * 1024, "limits.exchange_timeout_seconds": 3})
    pipelined = request("/status/200") * 2
    with stopped(tracing):
        for _ in range(PIPELINED):
            with connect(port) as connection:
                send_all(connection, pipelined)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    books = tracing.settle()
    assert books.in_flight == 0
    assert books.begun == books.handed_over + sum(books.dropped.values())
    unseen = books.dropped["stream_lost"] + books.dropped.get("ring_full", 0)
    assert 4 * PIPELINED >= books.begun >= 2 * PIPELINED
    assert unseen > PIPELINED, "the test's own premise: most was lost"
    assert tracing.metrics()["spanloom_kernel_events_total{event=segments_lost}"] > PIPELINED
