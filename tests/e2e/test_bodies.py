"""Bodies of every kind: each response ends where its last byte ends, and sizes are what was really sent."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.edge import Edge, Seen, duration_ns, seen
from tests.e2e.harness import Process, curl, wait_until
from tests.e2e.scripted import (
    LOOPBACK,
    Peer,
    PeerError,
    Turn,
    accept,
    chunked,
    connect,
    listen,
    receive,
    receive_head,
    receive_to_end,
    request,
    response,
    run_turns,
    send_all,
)
from tests.e2e.servers import nginx
from tests.unit.http2_traffic import PREFACE, RESPONSE, Raw, raw

MEGABYTE = 1 << 20


# -- chunked


_CHUNKED = ["Transfer-Encoding: chunked"]
_TRAILERS = ["X-Checksum: 123", "X-More: 4"]


def _chunked_head(status: int, trailers: Sequence[str]) -> bytes:
    fields = _CHUNKED + (["Trailer: X-Checksum, X-More"] if trailers else [])
    return response(status, fields=fields, body=None)


@pytest.mark.parametrize("trailers", [[], _TRAILERS], ids=["plain", "trailers"])
def test_chunked_response_split_anywhere(edge: Edge, trailers: list[str]) -> None:
    """Wherever a chunked response is cut in two writes, it ends with its last byte, without an error."""
    head = _chunked_head(200, trailers)
    body = chunked([b"one", b"\r\n0\r\n\r\n", b"z" * 20], trailers=trailers)
    turns = [Turn([request("/chunked")], [head + body[:at], body[at:]]) for at in range(1, len(body))]
    turns += [Turn([request("/chunked")], [head, body[:at], body[at:]]) for at in range(1, len(body))]
    run_turns(edge.server, edge.client, edge.port, turns)
    edge.expect([("/chunked", 200)] * len(turns))


@pytest.mark.parametrize("trailers", [[], _TRAILERS], ids=["plain", "trailers"])
def test_chunked_response_then_close(edge: Edge, trailers: list[str]) -> None:
    """The last response of a connection is whole by its last chunk, not by the next request."""
    pieces = [_chunked_head(404, trailers), chunked([b"abc"] * 100, trailers=trailers)]
    run_turns(edge.server, edge.client, edge.port, [Turn([request("/last")], pieces)])
    edge.expect([("/last", 404)])


@pytest.mark.parametrize("trailers", [[], _TRAILERS], ids=["plain", "trailers"])
def test_chunked_request_split_anywhere(edge: Edge, trailers: list[str]) -> None:
    """Wherever a chunked request is cut, it stays one exchange, and its framing is not taken for a size."""
    head = request("/upload", method="POST", fields=_CHUNKED)
    body = chunked([b"one", b"\r\n0\r\n\r\n", b"z" * 20], trailers=trailers)
    turns = [Turn([head + body[:at], body[at:]], [response(201)]) for at in range(1, len(body))]
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.expect([("/upload", 201)] * len(turns))
    assert not any("http.request.body.size" in span.attributes for side in spans for span in side)


def test_large_chunked_both_ways(edge: Edge) -> None:
    """Megabytes in chunks of odd sizes, in both directions."""
    body = chunked([b"c" * size for size in (1, 4095, 65537, MEGABYTE, 3)])
    turn = Turn([request("/big", method="PUT", fields=_CHUNKED), body], [_chunked_head(200, []), body])
    run_turns(edge.server, edge.client, edge.port, [turn] * 3)
    edge.expect([("/big", 200)] * 3)


# -- interim responses


_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload; as=style\r\nX-Fill: %s\r\n\r\n"


def test_continue(edge: Edge) -> None:
    """curl's `Expect: 100-continue` with two megabytes: one exchange with the final status, from request to the end."""
    size = 2 * MEGABYTE
    edge.server.call(_open_listener, edge.port)
    edge.server.start(_serve_continue, [_CONTINUE], size)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        url = f"http://{LOOPBACK}:{edge.port}/upload"
        expect = ("-H", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", f"@{file.name}")
        ran = curl(*expect, "-w", "%{http_code}", "-o", os.devnull, url)
    assert ran.stdout == b"201", ran.stderr
    waited_ns = edge.server.result()
    for span in edge.expect([("/upload", 201)]).one():
        assert span.attributes["http.request.body.size"] == size
        assert span.attributes["http.response.body.size"] == 2
        assert duration_ns(span) > waited_ns


@pytest.mark.parametrize(
    "interim",
    [
        [b"HTTP/1.1 102 Processing\r\n\r\n", _CONTINUE],
        [_EARLY_HINTS % b""],
        [_CONTINUE + _EARLY_HINTS % (b"f" * 20)],
    ],
    ids=["short", "hints", "together"],
)
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "with_the_final_one"])
def test_interim_responses(edge: Edge, interim: list[bytes], joined: bool) -> None:
    """However many interim responses come, in whatever writes: the final one's status counts, on both sides."""
    _assert_final_counts(edge, interim, joined)


def test_interim_responses_longer_than_the_capture(edge: Edge) -> None:
    """Interim heads that fill the space for response bytes make room for the final response that follows them."""
    _assert_final_counts(edge, [_EARLY_HINTS % (b"f" * 400), _CONTINUE, _EARLY_HINTS % (b"f" * 1400)], False)


def _assert_final_counts(edge: Edge, interim: list[bytes], joined: bool) -> None:
    final = response(404)
    pieces = [b"".join(interim) + final] if joined else [*interim, final]
    body = b"b" * 100
    head = request("/expect", method="POST", fields=["Expect: 100-continue", f"Content-Length: {len(body)}"])
    run_turns(
        edge.server, edge.client, edge.port, [Turn([head + body], pieces), Turn([request("/next")], [response()])]
    )
    edge.expect([("/expect", 404), ("/next", 200)])


def test_refused_expectation(edge: Edge) -> None:
    """A server that answers 417 instead of 100, and a client that then sends no body."""
    head = request("/expect", method="POST", fields=["Expect: 100-continue", "Content-Length: 1000000"])
    run_turns(edge.server, edge.client, edge.port, [Turn([head], [response(417)])])
    edge.expect([("/expect", 417)])


_listeners: list[socket.socket] = []


def _open_listener(port: int) -> None:
    _listeners.append(listen(port))


def _serve_continue(interim: Sequence[bytes], size: int) -> int:
    """Answer 100 late, take the body, answer 201. Returns how long the client had to wait at least."""
    with _listeners.pop() as listener, accept(listener) as connection:
        head = receive_head(connection)
        begin_ns = time.monotonic_ns()
        if not head.endswith(b"\r\n\r\n"):
            raise PeerError("the body came before it was asked for")
        time.sleep(0.1)
        for one in interim:
            send_all(connection, one)
        receive(connection, size)
        waited_ns = time.monotonic_ns() - begin_ns
        send_all(connection, response(201))
        connection.recv(1)
    return waited_ns


# -- no body


@pytest.mark.parametrize(
    ("method", "status", "fields"),
    [
        ("HEAD", 200, ["Content-Length: 1000"]),
        ("HEAD", 404, ["Transfer-Encoding: chunked"]),
        ("HEAD", 200, []),
        ("GET", 204, []),
        ("GET", 304, ["Content-Length: 1000"]),
        ("GET", 304, ["ETag: x"]),
        ("OPTIONS", 204, []),
        ("DELETE", 200, ["Content-Length: 0"]),
    ],
)
def test_responses_without_body(edge: Edge, method: str, status: int, fields: list[str]) -> None:
    """Responses that have no body whatever their fields say are whole at once, even before a close."""
    turn = Turn([request("/none", method=method)], [response(status, fields=fields, body=None)])
    run_turns(edge.server, edge.client, edge.port, [turn, turn])
    spans = edge.expect([("/none", status)] * 2)
    for side in spans:
        for span in side:
            assert span.name == method
            assert span.attributes.get("http.response.body.size", 0) == 0


# -- large


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_hundred_megabytes(edge: Edge, direction: str) -> None:
    """A hundred megabytes are one span a side, with the exact size."""
    size = 100 * MEGABYTE
    up, down = (size, 0) if direction == "upload" else (0, size)
    edge.server.start(_serve_large, edge.port, up, down)
    edge.client.call(_request_large, edge.port, up, down)
    edge.server.result()
    for span in edge.expect([("/large", 200)]).one():
        assert span.attributes.get("http.request.body.size", 0) == up
        assert span.attributes["http.response.body.size"] == down


def _serve_large(port: int, up: int, down: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        head = receive_head(connection)
        _discard(connection, up - (len(head) - head.index(b"\r\n\r\n") - 4))
        send_all(connection, response(body=None, fields=[f"Content-Length: {down}"]))
        _send_zeros(connection, down)
        connection.recv(1)


def _request_large(port: int, up: int, down: int) -> None:
    with connect(port) as connection:
        send_all(connection, request("/large", method="PUT", fields=[f"Content-Length: {up}"]))
        _send_zeros(connection, up)
        head = receive_head(connection)
        _discard(connection, down - (len(head) - head.index(b"\r\n\r\n") - 4))


def _send_zeros(connection: socket.socket, size: int) -> None:
    block = memoryview(bytes(MEGABYTE))
    while size:
        size -= os.write(connection.fileno(), block[:size])


def _discard(connection: socket.socket, size: int) -> None:
    block = bytearray(MEGABYTE)
    while size:
        count = connection.recv_into(block, min(size, MEGABYTE))
        if not count:
            raise EOFError
        size -= count


# -- slow


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_streaming_response(edge: Edge, framing: str) -> None:
    """A response that takes two seconds with pauses is one span that ends with the last byte, on both sides."""
    pieces = [b"piece %d " % index for index in range(8)]
    if framing == "length":
        fields = [f"Content-Length: {sum(map(len, pieces))}"]
    elif framing == "chunked":
        fields = _CHUNKED
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
        pieces[-1] += b"0\r\n\r\n"
    else:
        fields = ["Connection: close"]
    edge.server.start(_serve_slowly, edge.port, response(fields=fields, body=None), pieces)
    before_request_ns, after_request_ns, after_last_ns = edge.client.call(
        _request_slow, edge.port, sum(map(len, pieces))
    )
    _, before_last_ns, after_write_ns = edge.server.result()
    server, client = edge.expect([("/slow", 200)]).one()
    assert before_last_ns - after_request_ns <= duration_ns(client) <= after_last_ns - before_request_ns
    # The server may not have been scheduled when the request arrived: its span is at most the client's whole wait.
    assert 1_700_000_000 <= duration_ns(server) <= after_write_ns - before_request_ns


def _serve_slowly(port: int, head: bytes, pieces: Sequence[bytes]) -> tuple[int, int, int]:
    """Returns the time when the request is read, and before and after the last write."""
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        read_ns = time.monotonic_ns()
        send_all(connection, head)
        for piece in pieces:
            time.sleep(0.25)
            before_ns = time.monotonic_ns()
            send_all(connection, piece)
        after_ns = time.monotonic_ns()
        time.sleep(0.3)
    return read_ns, before_ns, after_ns


def _request_slow(port: int, size: int) -> tuple[int, int, int]:
    """Returns the time before and after the request, and after the last byte of a body of ``size`` bytes."""
    with connect(port) as connection:
        before_ns = time.monotonic_ns()
        send_all(connection, request("/slow"))
        after_ns = time.monotonic_ns()
        head = receive_head(connection)
        receive(connection, size - (len(head) - head.index(b"\r\n\r\n") - 4))
        last_ns = time.monotonic_ns()
        receive_to_end(connection)
    return before_ns, after_ns, last_ns


@pytest.mark.parametrize("proxy", ["nginx", "splice"])
def test_streaming_response_through_a_proxy(edge: Edge, proxy: str) -> None:
    """Two seconds of response through a proxy, one that hands on what it reads and one that never reads it: all four
    spans last from the request to the last byte, though every connection stays open behind it.
    """
    port = edge.other_ports[0]
    head, pieces = response(fields=["Content-Length: 800000"], body=None), [bytes(100_000)] * 8
    with ExitStack() as stack:
        if proxy == "nginx":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            directory.chmod(0o755)
            passes = f"location / {{ proxy_pass http://127.0.0.1:{edge.port}; proxy_buffering off; }}"
            server = nginx(port, directory, extra=passes)
            process = stack.enter_context(Process(server.arguments, log=directory / "output", cwd=server.cwd))
            process.wait_for_port(port)
        else:
            middle = stack.enter_context(Peer())
            middle.start(_pass_on_by_splice, port, edge.port, 800_000)
        edge.server.start(_serve_slowly, edge.port, head, pieces)
        # nginx asks once; what asks to find out would be the one that is served.
        wait_until(lambda: _listens(edge.port), lambda: f"the server listens on {edge.port}")
        before_request_ns, after_last_ns = edge.client.call(_request_and_stay, port, 800_000)
        after_request_ns, before_last_ns, _ = edge.server.result()
        spans = edge.spans(2)
        assert not edge.dropped()
        assert {seen(span) for side in spans for span in side} == {Seen("/slow", 200, None)}
        for side in spans:
            for span in side:
                assert span.attributes["http.response.body.size"] == 800_000
                assert before_last_ns - after_request_ns <= duration_ns(span) <= after_last_ns - before_request_ns
    edge.assert_forgotten(port)


def _listens(port: int) -> bool:
    return f":{port:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def _pass_on_by_splice(port: int, upstream_port: int, size: int) -> None:
    with listen(port) as listener, accept(listener) as front, connect(upstream_port) as back:
        send_all(back, receive_head(front))
        head = receive_head(back)
        send_all(front, head)
        size -= len(head) - head.index(b"\r\n\r\n") - 4
        reading, writing = os.pipe()
        while size:
            moved = os.splice(back.fileno(), writing, min(size, 65536))
            if not moved:
                raise EOFError
            size -= moved
            while moved:
                moved -= os.splice(reading, front.fileno(), moved)
        os.close(reading)
        os.close(writing)
        front.recv(1)


def _request_and_stay(port: int, size: int) -> tuple[int, int]:
    """Returns the time before the request and after the last byte."""
    with connect(port) as connection:
        before_ns = time.monotonic_ns()
        send_all(connection, request("/slow"))
        head = receive_head(connection)
        receive(connection, size - (len(head) - head.index(b"\r\n\r\n") - 4))
        last_ns = time.monotonic_ns()
        time.sleep(0.3)
    return before_ns, last_ns


# -- bytes that never are in the process's memory


@pytest.mark.parametrize("how", ["sendfile", "splice"])
def test_bodies_moved_by_the_kernel(edge: Edge, how: str) -> None:
    """sendfile and splice, upwards and downwards, on both ends: the sizes are exact."""
    size = 3 * MEGABYTE + 17
    edge.server.start(_serve_moved, edge.port, size, how)
    edge.client.call(_request_moved, edge.port, size, how)
    edge.server.result()
    for span in edge.expect([("/moved", 200)]).one():
        assert span.attributes["http.request.body.size"] == size
        assert span.attributes["http.response.body.size"] == size


def _serve_moved(port: int, size: int, how: str) -> None:
    with listen(port) as listener, accept(listener) as connection:
        while receive(connection, 1, "recv") != b"\n" or connection.recv(2, socket.MSG_PEEK) != b"\r\n":
            pass
        receive(connection, 2, "recv")
        _move_in(connection, size, how)
        send_all(connection, response(fields=[f"Content-Length: {size}"], body=None))
        _move_out(connection, size, how)
        connection.recv(1)


def _request_moved(port: int, size: int, how: str) -> None:
    head = response(fields=[f"Content-Length: {size}"], body=None)
    with connect(port) as connection:
        send_all(connection, request("/moved", method="PUT", fields=[f"Content-Length: {size}"]))
        _move_out(connection, size, how)
        receive(connection, len(head))
        _move_in(connection, size, how)


def _move_out(connection: socket.socket, size: int, how: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        if how == "sendfile":
            offset = 0
            while offset < size:
                offset += os.sendfile(connection.fileno(), file.fileno(), offset, size - offset)
            return
        reading, writing = os.pipe()
        while size:
            moved = os.splice(file.fileno(), writing, min(size, 65536))
            size -= moved
            while moved:
                moved -= os.splice(reading, connection.fileno(), moved)
        os.close(reading)
        os.close(writing)


def _move_in(connection: socket.socket, size: int, how: str) -> None:
    if how == "sendfile":  # which cannot read from a socket
        _discard(connection, size)
        return
    reading, writing = os.pipe()
    with open(os.devnull, "wb") as sink:
        while size:
            moved = os.splice(connection.fileno(), writing, min(size, 65536))
            if not moved:
                raise EOFError
            size -= moved
            while moved:
                moved -= os.splice(reading, sink.fileno(), moved)
    os.close(reading)
    os.close(writing)


# -- connections that become something else


def test_websocket(edge: Edge) -> None:
    """The handshake is one span a side with status 101; messages that look like requests create nothing."""
    edge.server.start(_serve_websocket, edge.port, 3)
    edge.client.call(_talk_websocket, edge.port, 3)
    edge.server.result()
    edge.expect([("/chat", 101)])


def _serve_websocket(port: int, count: int) -> None:
    from websockets.sync.server import ServerConnection, serve

    done = threading.Event()

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)
        done.set()

    with serve(echo, LOOPBACK, port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        if not done.wait(30):
            raise PeerError("no client came")
        server.shutdown()
        thread.join()


def _talk_websocket(port: int, count: int) -> None:
    from websockets.sync.client import connect as connect_websocket

    connect(port).close()  # waits for the server
    with connect_websocket(f"ws://{LOOPBACK}:{port}/chat", compression=None, proxy=None) as connection:
        for _ in range(count):
            message = request("/not-a-request").decode()
            connection.send(message)
            if connection.recv(timeout=30) != message:
                raise PeerError("another message came back")


_UPGRADE = ["Connection: Upgrade", "Upgrade: anything"]


@pytest.mark.parametrize(
    ("opening", "answer", "path", "name"),
    [
        (request("/switch", fields=_UPGRADE), response(101, fields=_UPGRADE, body=None), "/switch", "GET"),
        (
            b"CONNECT tunnel.example:443 HTTP/1.1\r\nHost: tunnel.example:443\r\n\r\n",
            b"HTTP/1.1 200 Connection established\r\n\r\n",
            "",
            "CONNECT",
        ),
    ],
    ids=["upgrade", "connect"],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["later", "with_the_response"])
def test_connection_is_left_alone(
    edge: Edge, opening: bytes, answer: bytes, path: str, name: str, at_once: bool
) -> None:
    """Behind 101 and behind CONNECT the bytes belong to another protocol, even when they look like HTTP."""
    inner = response(fields=["X-Inner: 1"])
    first = [answer + inner] if at_once else [answer, inner]
    turns = [Turn([opening], first), Turn([request("/inner")], [response(500)]), Turn([b"\0\1\2"], [b"\3\4"])]
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.expect([(path, 101 if name == "GET" else 200)])
    assert {span.name for span in spans.one()} == {name}


_H2C = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"]


@pytest.mark.parametrize("waits", [False, True], ids=["at_once", "announced"])
@pytest.mark.parametrize("answers", [False, True], ids=["unanswered", "answered"])
def test_connection_that_switches_to_http2(edge: Edge, answers: bool, waits: bool) -> None:
    """The exchange ends with the answer of stream 1, or with the connection; also when it had been told of before."""
    switch = response(101, fields=["Connection: Upgrade", "Upgrade: h2c"], body=None)
    answer = raw(4, 0, 0, b"") + Raw().headers(RESPONSE, 1, [(":status", "204")], "END_STREAM")
    pieces = [switch, answer] if answers else [switch]
    edge.server.start(_serve_switch, edge.port, 0.5 if waits else 0.0, pieces)
    edge.client.call(_request_switch, edge.port, request("/switch", fields=_H2C), sum(map(len, pieces)))
    edge.server.result()
    spans = edge.spans(1)
    spans.assert_linked()
    for span in spans.one():
        status, error = (204, None) if answers else (None, "client_disconnect")
        assert seen(span) == Seen("/switch", status, error)
        assert span.attributes["network.protocol.version"] == "2"
        assert (duration_ns(span) >= 500_000_000) >= waits
    assert not edge.dropped()
    assert edge.agent.books().in_flight == 0


def _serve_switch(port: int, wait_seconds: float, pieces: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        time.sleep(wait_seconds)
        for piece in pieces:
            send_all(connection, piece)
        receive_to_end(connection)


def _request_switch(port: int, opening: bytes, answer_bytes: int) -> None:
    with connect(port) as connection:
        send_all(connection, opening)
        received = len(receive_head(connection))
        send_all(connection, PREFACE + raw(4, 0, 0, b""))
        if received < answer_bytes:
            receive(connection, answer_bytes - received)


def test_refused_tunnel(edge: Edge) -> None:
    """CONNECT that is refused leaves an HTTP connection."""
    opening = b"CONNECT tunnel.example:443 HTTP/1.1\r\nHost: tunnel.example:443\r\n\r\n"
    turns = [Turn([opening], [response(407)]), Turn([request("/after")], [response(200)])]
    run_turns(edge.server, edge.client, edge.port, turns)
    edge.expect([("", 407), ("/after", 200)])


def test_half_closed_connection(edge: Edge) -> None:
    """A client that closes its sending side behind the request still gets, and shows, a whole response."""
    for pieces in ([response(body=b"x" * 100)], [b"HTTP/1.1 200 OK\r\n\r\n", b"until the close"]):
        edge.begin()
        edge.server.start(_serve_half_closed, edge.port, pieces)
        edge.client.call(_request_half_closed, edge.port)
        edge.server.result()
        edge.expect([("/half", 200)])


def _serve_half_closed(port: int, pieces: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if connection.recv(1):
            raise PeerError("unexpected bytes")
        for piece in pieces:
            time.sleep(0.1)
            send_all(connection, piece)
        # A FIN behind this client's own ends its socket in the kernel even before the client has read.
        time.sleep(0.3)


def _request_half_closed(port: int) -> None:
    with connect(port) as connection:
        send_all(connection, request("/half"))
        connection.shutdown(socket.SHUT_WR)
        receive_to_end(connection)


def test_half_closed_connections_one_after_the_other(edge: Edge) -> None:
    """The server's FIN ends the socket before the client has read; the next one may take its place in the kernel."""
    count = 50
    edge.server.start(_serve_half_closed_at_once, edge.port, count)
    edge.client.call(_request_half_closed_again, edge.port, count)
    edge.server.result()
    edge.expect([("/half", 200)] * count)


def _serve_half_closed_at_once(port: int, count: int) -> None:
    with listen(port) as listener:
        for _ in range(count):
            with accept(listener) as connection:
                receive_head(connection)
                receive_to_end(connection)
                send_all(connection, response())


def _request_half_closed_again(port: int, count: int) -> None:
    for _ in range(count):
        _request_half_closed(port)
