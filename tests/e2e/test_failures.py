"""Exchanges that fail or come late: the right error.type on each side, the right times, and nothing stays behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.collector import Collector
from tests.e2e.edge import Edge, Seen, duration_ns, seen
from tests.e2e.harness import AgentProcess, free_port
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


def _outcomes(edge: Edge, server: tuple[int | None, str | None], client: tuple[int | None, str | None]) -> None:
    """One exchange, linked, with these (status, error.type) of the server's and the client's span."""
    server_span, client_span = spans = edge.spans(1).one()
    assert seen(server_span) == Seen(_PATH, *server), edge.agent.state()
    assert seen(client_span) == Seen(_PATH, *client), edge.agent.state()
    for span, (_, error) in zip(spans, (server, client), strict=True):
        assert span.status == ("ERROR" if error else "UNSET")
    assert not edge.dropped()


def _run(edge: Edge, serve: Callable, request: Callable, *args: object) -> tuple[object, object]:
    edge.server.start(serve, edge.port, *args)
    client = edge.client.call(request, edge.port, *args)
    return edge.server.result(), client


# -- the client goes


def test_client_leaves_before_the_response(edge: Edge) -> None:
    """A client that closes without waiting: both sides name the client."""
    _run(edge, _serve_nothing, _request_and_leave)
    _outcomes(edge, (None, "client_disconnect"), (None, "client_disconnect"))


def _serve_nothing(port: int) -> None:
    """Take a request, wait for the client to go, close."""
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        try:
            receive_to_end(connection)
        except ConnectionResetError:
            return


def _request_and_leave(port: int) -> None:
    with connect(port) as connection:
        send_all(connection, _REQUEST)
        time.sleep(0.05)


def test_client_leaves_during_the_response(edge: Edge) -> None:
    """A client that closes in the middle of a large response: the server's status stays, with the reason."""
    _run(edge, _serve_until_refused, _read_a_little)
    _outcomes(edge, (200, "client_disconnect"), (200, "client_disconnect"))


def _serve_until_refused(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, response(fields=[f"Content-Length: {1 << 30}"], body=None))
        block = bytes(65536)
        try:
            for _ in range((1 << 30) // len(block)):
                send_all(connection, block, "write")
        except (ConnectionResetError, BrokenPipeError):
            return
    raise PeerError("everything was taken")


def _read_a_little(port: int) -> None:
    with connect(port) as connection:
        send_all(connection, _REQUEST)
        receive(connection, 100_000)


def test_client_resets(edge: Edge) -> None:
    """A client that resets the connection before the response."""
    _run(edge, _serve_nothing, _request_and_reset)
    _outcomes(edge, (None, "client_disconnect"), (None, "client_disconnect"))


def _request_and_reset(port: int) -> None:
    connection = connect(port)
    send_all(connection, _REQUEST)
    time.sleep(0.05)
    close_with_reset(connection)


def test_client_resets_during_the_response(edge: Edge) -> None:
    """A client that resets the connection when it has a part of the response."""
    _run(edge, _serve_part_and_wait, _take_part_and_reset)
    _outcomes(edge, (200, "client_disconnect"), (200, "client_disconnect"))


def _serve_part_and_wait(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, _PART)
        try:
            connection.recv(1)
        except ConnectionResetError:
            return
    raise PeerError("no reset came")


def _take_part_and_reset(port: int) -> None:
    connection = connect(port)
    send_all(connection, _REQUEST)
    receive(connection, len(_PART))
    close_with_reset(connection)


def test_client_timeout(edge: Edge) -> None:
    """A client that gives up after a while: its span lasts as long as it waited; the server answers in vain."""
    _, (least_ns, most_ns) = _run(edge, _answer_late, _give_up)
    server, client = edge.spans(1).one()
    assert seen(client) == Seen(_PATH, None, "client_disconnect")
    assert least_ns <= duration_ns(client) <= most_ns
    # The answer went into the socket before the reset came back: to the server it was a success.
    assert seen(server) == Seen(_PATH, 200, None)
    assert duration_ns(server) >= least_ns


def _answer_late(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if connection.recv(1):  # the client's FIN
            raise PeerError("unexpected bytes")
        time.sleep(0.1)
        send_all(connection, response())


def _give_up(port: int) -> tuple[int, int]:
    with connect(port) as connection:
        before_ns = time.monotonic_ns()
        send_all(connection, _REQUEST)
        after_ns = time.monotonic_ns()
        connection.settimeout(0.3)
        try:
            connection.recv(1)
        except TimeoutError:
            gave_up_ns = time.monotonic_ns()
    return gave_up_ns - after_ns, time.monotonic_ns() - before_ns


# -- the server goes


@pytest.mark.parametrize("part", [b"", _PART[:10], _PART], ids=["no_response", "cut_head", "cut_body"])
def test_server_is_killed(edge: Edge, part: bytes) -> None:
    """SIGKILL in the middle of a response: it is incomplete on both sides."""
    with Peer() as server:
        server.call(_serve_part_and_hold_later)
        server.start(_serve_part_and_hold, edge.port, part)
        edge.client.call(_take_part, edge.port, len(part))
        server.kill()
        edge.client.call(_take_end)
    status = 200 if part == _PART else None
    _outcomes(edge, (status, "incomplete_response"), (status, "incomplete_response"))


_held: list[socket.socket] = []


def _serve_part_and_hold_later() -> None:
    """Nothing; the imports of this module are done when it returns."""


def _serve_part_and_hold(port: int, part: bytes) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if part:
            send_all(connection, part)
        time.sleep(30)  # until the end of this process


def _take_part(port: int, length: int) -> None:
    connection = connect(port)
    _held.append(connection)
    send_all(connection, _REQUEST)
    receive(connection, length)
    time.sleep(0.1)


def _take_end() -> None:
    with _held.pop() as connection:
        receive_to_end(connection)


@pytest.mark.parametrize("part", [b"", _PART[:10], _PART], ids=["no_response", "cut_head", "cut_body"])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_server_closes(edge: Edge, part: bytes, reset: bool) -> None:
    """A server that closes or resets before the response is whole: incomplete; a reset is named by who suffers it."""
    _run(edge, _serve_part_and_close, _take_all, part, reset)
    status = 200 if part == _PART else None
    client_error = "connection_reset" if reset else "incomplete_response"
    _outcomes(edge, (status, "incomplete_response"), (status, client_error))


def _serve_part_and_close(port: int, part: bytes, reset: bool) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if part:
            send_all(connection, part)
        time.sleep(0.1)  # the client reads what there is; a reset would discard it
        if reset:
            close_with_reset(connection)


def _take_all(port: int, part: bytes, reset: bool) -> None:
    with connect(port) as connection:
        send_all(connection, _REQUEST)
        try:
            receive_to_end(connection)
        except ConnectionResetError:
            if not reset:
                raise


def test_server_closes_a_kept_connection(edge: Edge) -> None:
    """A request that crosses the server's close of an idle connection fails; those before it do not."""
    edge.server.start(_serve_one_and_close, edge.port)
    edge.client.call(_request_twice, edge.port)
    edge.server.result()
    spans = edge.spans(1, 2)
    assert [seen(span) for span in spans.servers] == [Seen("/first", 200, None)]
    assert [seen(span) for span in spans.clients] == [
        Seen("/first", 200, None),
        Seen("/second", None, "connection_reset"),
    ]
    assert spans.servers[0].parent_span_id == spans.clients[0].span_id


def _serve_one_and_close(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        serve_turns(connection, [Turn([request("/first")], [response()])])


def _request_twice(port: int) -> None:
    with connect(port) as connection:
        make_turns(connection, [Turn([request("/first")], [response()])])
        if connection.recv(1, socket.MSG_PEEK):
            raise PeerError("unexpected bytes")
        try:
            send_all(connection, request("/second"))
            receive_to_end(connection)
        except ConnectionError:
            return


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
        server.start(_serve_after, port, 2.5)
        client.call(_hold, port)
        _outcomes(edge, (None, "timeout"), (None, "timeout"))  # with the connection open, and nobody heard
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


def _hold(port: int) -> None:
    _held.append(connect(port))
    send_all(_held[0], _REQUEST)


def _receive_late() -> None:
    receive(_held[0], len(response()))


def _serve_held(turns: list[Turn]) -> None:
    with _held.pop() as connection:
        serve_turns(connection, turns)
        connection.recv(1)


def _request_held(turns: list[Turn]) -> None:
    with _held.pop() as connection:
        make_turns(connection, turns)


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
