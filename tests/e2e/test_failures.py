"""Exchanges that fail or come late: the right error.type on each side, the right times, and nothing stays behind."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.collector import CollectedSpan, Collector
from tests.e2e.edge import Edge, Seen, duration_ns, seen
from tests.e2e.harness import AgentProcess, clean_environment, free_port, wait_until
from tests.e2e.scripted import (
    Peer,
    PeerError,
    Turn,
    accept,
    close_with_reset,
    connect,
    listen,
    make_turns,
    receive,
    receive_head,
    receive_to_end,
    request,
    response,
    send_all,
    serve_turns,
)


@pytest.fixture
def edge(edge: Edge) -> Iterator[Edge]:
    """Nothing stays in flight either."""
    yield edge
    edge.assert_forgotten()
    assert edge.agent.books().in_flight == 0


_PATH = "/fails"
_REQUEST = request(_PATH)
_PART = response(fields=["Content-Length: 1000"], body=None) + b"p" * 100
"""A response of which 900 bytes are missing."""


_CLOCK_SLACK_NS = 20_000_000
"""How far the times of a span may be off against those of a peer: the agent reads the clocks on a busy machine."""
_APART_SECONDS = 0.15
"""Between the event that a span begins or ends with and the next one, which would be the wrong one."""


class _Times(NamedTuple):
    """Unix times before and after the system calls that a span begins and ends with."""

    start: tuple[int, int]
    end: tuple[int, int]


def _outcomes(
    edge: Edge,
    server: tuple[int | None, str | None],
    client: tuple[int | None, str | None],
    server_times: _Times,
    client_times: _Times,
) -> None:
    """One exchange, linked, with these (status, error.type) and these times of the server's and the client's span."""
    server_span, client_span = spans = edge.spans(1).one()
    assert seen(server_span) == Seen(_PATH, *server), edge.agent.state()
    assert seen(client_span) == Seen(_PATH, *client), edge.agent.state()
    for span, (_, error) in zip(spans, (server, client), strict=True):
        assert span.status == ("ERROR" if error else "UNSET")
    assert client_span.start_time_ns <= server_span.start_time_ns
    _assert_times(server_span, server_times)
    _assert_times(client_span, client_times)
    assert not edge.dropped()


def _assert_times(span: CollectedSpan, times: _Times) -> None:
    for name, time_ns, (before_ns, after_ns) in (
        ("start", span.start_time_ns, times.start),
        ("end", span.end_time_ns, times.end),
    ):
        assert before_ns <= after_ns
        assert before_ns - _CLOCK_SLACK_NS <= time_ns <= after_ns + _CLOCK_SLACK_NS, (
            f"{span.kind}: {name} {(time_ns - before_ns) / 1e6:.1f} ms behind the beginning and "
            f"{(time_ns - after_ns) / 1e6:.1f} ms behind the end of its system call"
        )


def _timed(call: Callable[..., object], *args: object) -> tuple[int, int]:
    """Call, apart from what was done before, and return the times around it."""
    time.sleep(_APART_SECONDS)
    before_ns = time.time_ns()
    call(*args)
    return before_ns, time.time_ns()


def _run(edge: Edge, serve: Callable, request: Callable, *args: object) -> tuple[Any, Any]:
    edge.server.start(serve, edge.port, *args)
    client = edge.client.call(request, edge.port, *args)
    return edge.server.result(), client


# -- the client goes


def test_client_leaves_before_the_response(edge: Edge) -> None:
    """A client that closes without waiting: both sides name the client, and end with their own close."""
    _outcomes(
        edge,
        (None, "client_disconnect"),
        (None, "client_disconnect"),
        *_run(edge, _serve_nothing, _request_and_leave, False),
    )


def test_client_resets(edge: Edge) -> None:
    """A client that resets the connection before the response ends the exchange for both."""
    server, client = _run(edge, _serve_nothing, _request_and_leave, True)
    _outcomes(
        edge,
        (None, "client_disconnect"),
        (None, "client_disconnect"),
        server._replace(end=client.end),
        client,
    )


def _serve_nothing(port: int, reset: bool) -> _Times:
    """Take a request, wait for the client to go, close."""
    with listen(port) as listener, accept(listener) as connection:
        start = _timed(receive_head, connection)
        try:
            receive_to_end(connection)
        except ConnectionResetError:
            if not reset:
                raise
        return _Times(start, _timed(connection.close))


def _request_and_leave(port: int, reset: bool) -> _Times:
    with connect(port) as connection:
        start = _timed(send_all, connection, _REQUEST)
        time.sleep(2 * _APART_SECONDS)  # the server takes the request in the meantime
        return _Times(start, _timed(close_with_reset if reset else socket.socket.close, connection))


def test_client_leaves_during_the_response(edge: Edge) -> None:
    """A client that closes in the middle of a large response: the server's status stays, with the reason."""
    _outcomes(
        edge,
        (200, "client_disconnect"),
        (200, "client_disconnect"),
        *_run(edge, _serve_until_refused, _read_a_little),
    )


def _serve_until_refused(port: int) -> _Times:
    with listen(port) as listener, accept(listener) as connection:
        start = _timed(receive_head, connection)
        send_all(connection, response(fields=[f"Content-Length: {1 << 30}"], body=None))
        block = bytes(65536)
        before_ns = time.time_ns()
        try:
            for _ in range((1 << 30) // len(block)):
                send_all(connection, block, "write")
        except (ConnectionResetError, BrokenPipeError):
            end = before_ns, time.time_ns()
            time.sleep(_APART_SECONDS)
            return _Times(start, end)
    raise PeerError("everything was taken")


def _read_a_little(port: int) -> _Times:
    with connect(port) as connection:
        start = _timed(send_all, connection, _REQUEST)
        time.sleep(2 * _APART_SECONDS)
        end = _timed(receive, connection, 100_000)
        time.sleep(_APART_SECONDS)
        return _Times(start, end)


def test_client_resets_during_the_response(edge: Edge) -> None:
    """A client that resets the connection when it has a part of the response: both end with the last byte."""
    _outcomes(
        edge,
        (200, "client_disconnect"),
        (200, "client_disconnect"),
        *_run(edge, _serve_part_and_wait, _take_part_and_reset),
    )


def _serve_part_and_wait(port: int) -> _Times:
    with listen(port) as listener, accept(listener) as connection:
        start = _timed(receive_head, connection)
        end = _timed(send_all, connection, _PART)
        try:
            connection.recv(1)
        except ConnectionResetError:
            return _Times(start, end)
    raise PeerError("no reset came")


def _take_part_and_reset(port: int) -> _Times:
    connection = connect(port)
    start = _timed(send_all, connection, _REQUEST)
    time.sleep(3 * _APART_SECONDS)
    end = _timed(receive, connection, len(_PART))
    time.sleep(_APART_SECONDS)
    close_with_reset(connection)
    return _Times(start, end)


def test_client_timeout(edge: Edge) -> None:
    """A client that gives up after a while: its span lasts as long as it waited; the server answers in vain."""
    # The answer goes into the socket before the reset comes back: to the server it is a success.
    _outcomes(edge, (200, None), (None, "client_disconnect"), *_run(edge, _answer_late, _give_up))


def _answer_late(port: int) -> _Times:
    with listen(port) as listener, accept(listener) as connection:
        start = _timed(receive_head, connection)
        if connection.recv(1):  # the client's FIN
            raise PeerError("unexpected bytes")
        end = _timed(send_all, connection, response())
        time.sleep(_APART_SECONDS)
        return _Times(start, end)


def _give_up(port: int) -> _Times:
    with connect(port) as connection:
        start = _timed(send_all, connection, _REQUEST)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        return _Times(start, _timed(connection.close))


# -- the server goes


@pytest.mark.parametrize("part", [b"", _PART[:10], _PART], ids=["no_response", "cut_head", "cut_body"])
def test_server_is_killed(edge: Edge, part: bytes) -> None:
    """SIGKILL in the middle of a response: it is incomplete on both sides. It ends with its last byte; without one, for
    the server with its death, and for the client when it closes the connection.
    """
    with Peer() as server:
        server.call(_serve_part_and_hold_later)
        server.start(_serve_part_and_hold, edge.port, part)
        start, received = edge.client.call(_take_part, edge.port, len(part))
        killed = _timed(server.kill)
        closed = edge.client.call(_take_end)
    status = 200 if part == _PART else None
    # The server's own times are lost with it: those of the client are later than what they are the answer to.
    sent = start[0], received[1]
    _outcomes(
        edge,
        (status, "incomplete_response"),
        (status, "incomplete_response"),
        _Times((start[0], received[1]), sent if part else killed),
        _Times(start, received if part else closed),
    )


_held: list[socket.socket] = []


def _serve_part_and_hold_later() -> None:
    """Nothing; the imports of this module are done when it returns."""


def _serve_part_and_hold(port: int, part: bytes) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if part:
            send_all(connection, part)
        time.sleep(30)  # until the end of this process


def _take_part(port: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    connection = connect(port)
    _held.append(connection)
    start = _timed(send_all, connection, _REQUEST)
    received = _timed(receive, connection, length)
    time.sleep(_APART_SECONDS)
    return start, received


def _take_end() -> tuple[int, int]:
    with _held.pop() as connection:
        receive_to_end(connection)
        return _timed(connection.close)


@pytest.mark.parametrize("part", [b"", _PART[:10], _PART], ids=["no_response", "cut_head", "cut_body"])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_server_closes(edge: Edge, part: bytes, reset: bool) -> None:
    """A server that closes or resets before the response is whole: incomplete; a reset is named by who suffers it. It
    ends with its last byte; without one, with the own close or the other's reset.
    """
    server, client = _run(edge, _serve_part_and_close, _take_all, part, reset)
    status = 200 if part == _PART else None
    client_error = "connection_reset" if reset else "incomplete_response"
    if reset and not part:
        client = client._replace(end=server.end)
    _outcomes(edge, (status, "incomplete_response"), (status, client_error), server, client)


def _serve_part_and_close(port: int, part: bytes, reset: bool) -> _Times:
    with listen(port) as listener, accept(listener) as connection:
        start = _timed(receive_head, connection)
        sent = _timed(send_all, connection, part)
        time.sleep(3 * _APART_SECONDS)  # the client reads what there is
        closed = _timed(close_with_reset if reset else socket.socket.close, connection)
        return _Times(start, sent if part else closed)


def _take_all(port: int, part: bytes, reset: bool) -> _Times:
    with connect(port) as connection:
        start = _timed(send_all, connection, _REQUEST)
        time.sleep(_APART_SECONDS)
        received = _timed(receive, connection, len(part))
        try:
            receive_to_end(connection)
        except ConnectionResetError:
            if not reset:
                raise
        closed = _timed(connection.close)
        return _Times(start, received if part else closed)


@pytest.mark.parametrize("pipelined", [False, True], ids=["one", "pipelined"])
@pytest.mark.parametrize("end", ["reset", "shutdown", "late_shutdown"])
def test_a_response_is_read_behind_the_end(edge: Edge, end: str, pipelined: bool) -> None:
    """A client that reads only when the server is gone, and itself will send no more, still has its responses."""
    edge.server.start(_serve_and_go, edge.port, end, pipelined)
    assert edge.client.call(_read_late, edge.port, end, pipelined) == (1 + pipelined) * len(response())
    edge.server.result()
    spans = edge.spans(1 + pipelined)
    for span in (*spans.servers, *spans.clients):
        assert seen(span) == Seen(_PATH, 200, None), edge.agent.state()
    assert not edge.dropped()


def _serve_and_go(port: int, end: str, pipelined: bool) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive(connection, (1 + pipelined) * len(_REQUEST))
        send_all(connection, (1 + pipelined) * response())
        if end == "reset":
            close_with_reset(connection)


def _read_late(port: int, end: str, pipelined: bool) -> int:
    with connect(port) as connection:
        send_all(connection, (1 + pipelined) * _REQUEST)
        if end == "late_shutdown":  # behind the server's FIN
            time.sleep(2 * _APART_SECONDS)
        if end != "reset":
            connection.shutdown(socket.SHUT_WR)
        time.sleep(2 * _APART_SECONDS)
        return len(receive(connection, (1 + pipelined) * len(response())))


def test_server_closes_a_kept_connection(edge: Edge) -> None:
    """A request that crosses the server's close of an idle connection fails; those before it do not."""
    edge.server.start(_serve_one_and_close, edge.port)
    second = edge.client.call(_request_twice, edge.port)
    edge.server.result()
    spans = edge.spans(1, 2)
    assert [seen(span) for span in spans.servers] == [Seen("/first", 200, None)]
    assert [seen(span) for span in spans.clients] == [
        Seen("/first", 200, None),
        Seen("/second", None, "connection_reset"),
    ]
    assert spans.servers[0].parent_span_id == spans.clients[0].span_id
    _assert_times(spans.clients[1], second)


def _serve_one_and_close(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        serve_turns(connection, [Turn([request("/first")], [response()])])


def _request_twice(port: int) -> _Times:
    with connect(port) as connection:
        make_turns(connection, [Turn([request("/first")], [response()])])
        if connection.recv(1, socket.MSG_PEEK):
            raise PeerError("unexpected bytes")
        start = _timed(send_all, connection, request("/second"))
        with suppress(ConnectionResetError):
            receive_to_end(connection)
        end = start[0], time.time_ns()
        time.sleep(_APART_SECONDS)
        return _Times(start, end)


# -- late


@pytest.mark.parametrize("delay_seconds", [0.5, 1.5])
def test_slow_server(edge: Edge, delay_seconds: float) -> None:
    """A slow answer is one span a side, as long as the programs themselves measured."""
    turns = [Turn([request("/before")], [response()])]
    edge.server.start(_serve_late, edge.port, turns, delay_seconds)
    before_ns, after_ns, answered_ns = edge.client.call(_request_late, edge.port, turns)
    server_least_ns, server_written_ns = edge.server.result()
    spans = edge.expect([("/before", 200), (_PATH, 200)])
    server, client = (side[1] for side in spans)
    assert server_least_ns <= duration_ns(client) <= answered_ns - before_ns
    assert server_least_ns <= duration_ns(server) <= server_written_ns - before_ns
    assert server.start_time_ns >= client.start_time_ns
    assert answered_ns - after_ns >= delay_seconds * 1e9


def _serve_late(port: int, turns: list[Turn], delay_seconds: float) -> tuple[int, int]:
    with listen(port) as listener, accept(listener) as connection:
        serve_turns(connection, turns)
        receive_head(connection)
        read_ns = time.monotonic_ns()
        time.sleep(delay_seconds)
        least_ns = time.monotonic_ns() - read_ns
        send_all(connection, response())
        written_ns = time.monotonic_ns()
        connection.recv(1)
    return least_ns, written_ns


def _request_late(port: int, turns: list[Turn]) -> tuple[int, int, int]:
    with connect(port) as connection:
        make_turns(connection, turns)
        before_ns = time.monotonic_ns()
        send_all(connection, _REQUEST)
        after_ns = time.monotonic_ns()
        receive(connection, len(response()))
        return before_ns, after_ns, time.monotonic_ns()


def test_slow_client(edge: Edge) -> None:
    """A request that arrives in pieces over a second begins with its first byte."""
    pieces = [_REQUEST[:1], _REQUEST[1:20], _REQUEST[20:-1], _REQUEST[-1:]]
    edge.server.start(_serve_turns_late, edge.port)
    least_ns = edge.client.call(_request_in_pieces, edge.port, pieces)
    edge.server.result()
    server, client = edge.expect([(_PATH, 200)]).one()
    assert duration_ns(client) >= least_ns
    assert duration_ns(server) >= least_ns * 0.6  # it read the first byte when it was scheduled


def _serve_turns_late(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, response())
        connection.recv(1)


def _request_in_pieces(port: int, pieces: list[bytes]) -> int:
    with connect(port) as connection:
        time.sleep(0.1)
        send_all(connection, pieces[0])
        sent_ns = time.monotonic_ns()
        for piece in pieces[1:]:
            time.sleep(0.3)
            send_all(connection, piece)
        least_ns = time.monotonic_ns() - sent_ns
        receive(connection, len(response()))
    return least_ns


def test_pause_between_requests(edge: Edge) -> None:
    """An idle connection adds nothing to the exchange before the pause, nor to the one behind it."""
    turns = [Turn([request(f"/{index}")], [response()]) for index in range(3)]
    edge.server.start(_serve_turns, edge.port, turns)
    lasted_ns = edge.client.call(_request_with_pauses, edge.port, turns)
    edge.server.result()
    spans = edge.expect([(f"/{index}", 200) for index in range(3)])
    for index in range(3):
        assert duration_ns(spans.clients[index]) <= lasted_ns[index]


def _serve_turns(port: int, turns: list[Turn]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        serve_turns(connection, turns)
        connection.recv(1)


def _request_with_pauses(port: int, turns: list[Turn]) -> list[int]:
    lasted_ns = []
    with connect(port) as connection:
        for turn in turns:
            begin_ns = time.monotonic_ns()
            make_turns(connection, [turn])
            lasted_ns.append(time.monotonic_ns() - begin_ns)
            time.sleep(0.4)
    return lasted_ns


# -- with an agent of their own


def test_exchange_timeout(tmp_path: Path, collector: Collector) -> None:
    """An exchange without traffic beyond the limit is reported as timed out, once; the connection goes on."""
    port = free_port()
    settings = {"limits.exchange_timeout_seconds": 1.0}
    with (
        Peer() as server,
        Peer() as client,
        AgentProcess(tmp_path, collector, [port], settings) as agent,
    ):
        edge = Edge(agent, collector, server, client)
        edge.begin()
        server.start(_serve_after, port, 3.5)
        sent = client.call(_hold, port)
        wait_until(lambda: len(collector.spans()) >= 2, "both ends timed out")
        # With the connection open, and nobody heard. The look-up that finds an exchange timed out is soon behind it.
        limit_ns = sent[0] + 1_000_000_000, time.time_ns()
        times = _Times(sent, limit_ns)
        _outcomes(edge, (None, "timeout"), (None, "timeout"), times._replace(start=(sent[0], limit_ns[1])), times)
        client.call(_receive_late)
        server.result()
        assert edge.grown("spanloom_kernel_events_total{event=response_alone}") == 2
        edge.begin()
        server.start(_serve_held, [Turn([request("/next")], [response(404)])])
        client.call(_request_held, [Turn([request("/next")], [response(404)])])
        server.result()
        edge.expect([("/next", 404)])
        edge.assert_forgotten()


def _serve_after(port: int, delay_seconds: float) -> None:
    with listen(port) as listener:
        connection = accept(listener)
    _held.append(connection)
    receive_head(connection)
    time.sleep(delay_seconds)
    send_all(connection, response())


def _hold(port: int) -> tuple[int, int]:
    _held.append(connect(port))
    return _timed(send_all, _held[0], _REQUEST)


def _receive_late() -> None:
    receive(_held[0], len(response()))


def _serve_held(turns: list[Turn]) -> None:
    with _held.pop() as connection:
        serve_turns(connection, turns)
        connection.recv(1)


def _request_held(turns: list[Turn]) -> None:
    with _held.pop() as connection:
        make_turns(connection, turns)


def test_pipelined_requests_time_out(tmp_path: Path, collector: Collector) -> None:
    """Pipelined requests that are never answered time out like others; late answers are theirs, the next one is not."""
    port = free_port()
    requests = [request(f"/{index}") for index in range(3)]
    with (
        Peer() as server,
        Peer() as client,
        AgentProcess(tmp_path, collector, [port], {"limits.exchange_timeout_seconds": 1.0}) as agent,
    ):
        edge = Edge(agent, collector, server, client)
        edge.begin()
        server.start(_answer_one_and_hold, port, sum(map(len, requests)))
        client.call(_pipeline_and_hold, port, requests)
        server.result()
        spans = edge.spans(3)  # with the connection open
        for side in spans:
            assert [seen(span) for span in side] == [
                Seen("/0", 200, None),
                Seen("/1", None, "timeout"),
                Seen("/2", None, "timeout"),
            ]
            for span in side[1:]:
                assert duration_ns(span) >= 1_000_000_000
        assert agent.books().in_flight == 0
        edge.begin()
        late = [Turn([], [response(500)]), Turn([], [response(500)]), Turn([request("/next")], [response(404)])]
        server.start(_serve_held, late)
        client.call(_request_held, late)
        server.result()
        spans = edge.spans(1)
        assert [seen(span) for side in spans for span in side] == [Seen("/next", 404, None), Seen("/next", 404, "404")]
        assert not edge.dropped()
        edge.assert_forgotten()
        assert agent.books().in_flight == 0


def _answer_one_and_hold(port: int, length: int) -> None:
    with listen(port) as listener:
        _held.append(accept(listener))
    receive(_held[0], length)
    send_all(_held[0], response())


def _pipeline_and_hold(port: int, requests: list[bytes]) -> None:
    _held.append(connect(port))
    send_all(_held[0], b"".join(requests))
    receive(_held[0], len(response()))


def test_response_without_a_request(tmp_path: Path, collector: Collector) -> None:
    """The agent starts between a request and its response: no span is invented; the next exchange is one."""
    port = free_port()
    body = [b"b" * 1000] * 3
    with Peer() as server, Peer() as client:
        server.start(_accept_and_hold, port)
        client.call(_hold, port)
        server.result()
        with AgentProcess(tmp_path, collector, [port]) as agent:
            edge = Edge(agent, collector, server, client)
            edge.begin()
            upload = [Turn(body, [response(500)])]
            server.start(_go_on_serving, upload)
            client.call(_go_on_requesting, upload)
            server.result()
            assert edge.grown("spanloom_kernel_events_total{event=ignored_other}") >= 8
            assert not edge.connections()
            turns = [Turn([request("/known")], [response(201)])]
            server.start(_serve_held, turns)
            client.call(_request_held, turns)
            server.result()
            edge.expect([("/known", 201)])
            edge.assert_forgotten()


def _accept_and_hold(port: int) -> None:
    with listen(port) as listener:
        connection = accept(listener)
    _held.append(connection)
    receive_head(connection)


def _go_on_serving(turns: list[Turn]) -> None:
    serve_turns(_held[0], turns)


def _go_on_requesting(turns: list[Turn]) -> None:
    make_turns(_held[0], turns)


def test_connections_opened_before(tmp_path: Path, collector: Collector) -> None:
    """Connections that are open, used and idle when the agent starts are traced from their next request on."""
    port = free_port()
    with Peer() as server, Peer() as client:
        first = [Turn([request("/before")], [response()])]
        server.start(_accept_and_serve, port, first)
        client.call(_connect_and_request, port, first)
        server.result()
        with AgentProcess(tmp_path, collector, [port]) as agent:
            edge = Edge(agent, collector, server, client)
            edge.begin()
            turns = [Turn([request(f"/{index}")], [response()]) for index in range(3)]
            server.start(_serve_held, turns)
            client.call(_request_held, turns)
            server.result()
            edge.expect([(f"/{index}", 200) for index in range(3)])


def _accept_and_serve(port: int, turns: list[Turn]) -> None:
    with listen(port) as listener:
        _held.append(accept(listener))
    serve_turns(_held[0], turns)


def _connect_and_request(port: int, turns: list[Turn]) -> None:
    _held.append(connect(port))
    make_turns(_held[0], turns)


def test_books_close_with_everything_open(tmp_path: Path, collector: Collector) -> None:
    """The agent ends while exchanges are going on: they are in flight, nothing is invented, and the books close."""
    port = free_port()
    with Peer() as server, Peer() as client, AgentProcess(tmp_path, collector, [port]) as agent:
        server.start(_accept_and_hold, port)
        client.call(_hold, port)
        server.result()
        time.sleep(0.5)  # long enough to be announced
        books = agent.books()
        assert books.closed
        assert (books.begun, books.in_flight, books.handed_over) == (2, 2, 0)
        agent.stop()
        assert not collector.spans()
        assert '"begun":2,"handed_over":0,"sampled_out":0,"dropped":0,"in_flight":2' in agent.stderr()


def test_many_failures_leave_nothing(edge: Edge) -> None:
    """Two hundred connections that end in four bad ways leave no entry in the kernel and nothing in flight."""
    edge.server.start(_serve_badly, edge.port, 200)
    edge.client.call(_request_badly, edge.port, 200)
    edge.server.result()
    spans = edge.spans(200)
    spans.assert_linked()
    assert all(seen(span).error for side in spans for span in side)


def test_short_lived_processes_leave_nothing(edge: Edge) -> None:
    """Two hundred processes of one request each, most of them gone before the agent has looked at them."""
    count = 200
    edge.server.start(_serve_each, edge.port, count)
    script = f"for number in $(seq {count}); do curl -q -sS -o /dev/null http://127.0.0.1:{edge.port}/$number; done"
    subprocess.run(["sh", "-c", script], env=clean_environment(), check=True, timeout=60)
    edge.server.result()
    spans = edge.spans(count)
    assert len({span.resource["process.pid"] for span in spans.clients}) == count


def _serve_each(port: int, count: int) -> None:
    with listen(port) as listener:
        for _ in range(count):
            with accept(listener) as connection:
                receive_head(connection)
                send_all(connection, response())
                receive_to_end(connection)


def test_memory_does_not_grow(edge: Edge) -> None:
    """Thousands of connections, one in two of which fails, take no memory that is not used again for the next ones."""

    def rounds(count: int) -> int:
        for _ in range(count):
            edge.begin()
            edge.server.start(_serve_badly, edge.port, 1000)
            edge.client.call(_request_badly, edge.port, 1000)
            edge.server.result()
            edge.server.start(_serve_each, edge.port, 1000)
            edge.client.call(_request_each, edge.port, 1000)
            edge.server.result()
            edge.spans(2000)
            edge.assert_forgotten()
        status = Path(f"/proc/{edge.agent.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    before_kb = rounds(2)
    after_kb = rounds(5)
    # 20 000 exchanges: 400 bytes of each would be 8 MB.
    assert after_kb - before_kb < 6000, f"{before_kb} kB, {after_kb} kB"


def _request_each(port: int, count: int) -> None:
    for index in range(count):
        with connect(port) as connection:
            send_all(connection, request(f"/{index}"))
            receive(connection, len(response()))


def _serve_badly(port: int, count: int) -> None:
    with listen(port) as listener:
        for index in range(count):
            connection = accept(listener)
            receive_head(connection)
            if index % 4 == 0:
                close_with_reset(connection)
                continue
            if index % 4 in (1, 2):
                send_all(connection, _PART)
            if index % 4 == 2:
                with suppress(ConnectionResetError):
                    receive_to_end(connection)
            connection.close()


def _request_badly(port: int, count: int) -> None:
    for index in range(count):
        connection = connect(port)
        send_all(connection, request(f"/{index}"))
        if index % 4 == 2:
            receive(connection, len(_PART))
            close_with_reset(connection)
            continue
        with suppress(ConnectionResetError):
            receive_to_end(connection)
        connection.close()
