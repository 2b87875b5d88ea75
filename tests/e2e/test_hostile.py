"""Odd, broken and foreign bytes on traced ports: no span is invented, nothing breaks, and the counters say why."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.edge import Edge, seen
from tests.e2e.harness import free_port
from tests.e2e.scripted import (
    Turn,
    accept,
    connect,
    listen,
    receive,
    receive_head,
    request,
    response,
    run_turns,
    send_all,
)

_TRACE_ID, _PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_TRACEPARENT = f"traceparent: 00-{_TRACE_ID}-{_PARENT_ID}-01"
_KERNEL = "spanloom_kernel_events_total{event=%s}"


@pytest.fixture
def edge(module_edge: Edge) -> Iterator[Edge]:
    """After each hostile test the agent still traces what is well-formed."""
    module_edge.begin()
    yield module_edge
    module_edge.assert_forgotten()
    module_edge.begin()
    run_turns(module_edge.server, module_edge.client, module_edge.port, [Turn([request("/alive")], [response()])])
    module_edge.expect([("/alive", 200)])


def _one_turn(edge: Edge, data: bytes, answer: bytes = b"") -> None:
    run_turns(edge.server, edge.client, edge.port, [Turn([data], [answer or response()])])


# -- large heads


@pytest.mark.parametrize("fill_bytes", [2_000, 65_536])
@pytest.mark.parametrize("context_first", [True, False], ids=["context_within", "context_beyond"])
def test_head_beyond_the_cap(edge: Edge, fill_bytes: int, context_first: bool) -> None:
    """A longer head is flagged; a traceparent within the captured bytes is the parent, one beyond invents nothing."""
    fill = [f"X-Fill-{index}: {'f' * 900}" for index in range(fill_bytes // 900)]
    fields = [_TRACEPARENT, *fill] if context_first else [*fill, _TRACEPARENT]
    turns = [Turn([request("/large", fields=fields)], [response()]), Turn([request("/next")], [response(404)])]
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.spans(2)
    for side in spans:
        assert [seen(span)[:2] for span in side] == [("/large", 200), ("/next", 404)]
        assert side[0].attributes["spanloom.request.head_truncated"] is True
        assert "spanloom.request.head_truncated" not in side[1].attributes
        assert "http.request.body.size" not in side[0].attributes
    server, client = (side[0] for side in spans)
    assert server.parent_span_id == client.span_id
    assert server.trace_id == client.trace_id
    if context_first:
        assert (client.trace_id, client.parent_span_id) == (_TRACE_ID, _PARENT_ID)
    else:
        assert client.trace_id != _TRACE_ID
        assert not client.parent_span_id


def test_traceparent_cut_by_the_cap(edge: Edge) -> None:
    """A traceparent that the cap cuts anywhere is as if absent: no part of it is used."""
    line = request("/cut", fields=["X-Fill: ", _TRACEPARENT]).index(b"traceparent")
    turns = []
    for kept in range(len(_TRACEPARENT) + 3):  # of the line and its end
        fill = f"X-Fill: {'f' * (1024 - line - kept)}"
        turns.append(Turn([request("/cut", fields=[fill, _TRACEPARENT])], [response()]))
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.spans(len(turns))
    assert [span.trace_id == _TRACE_ID for span in spans.clients] == [False] * (len(turns) - 1) + [True]
    assert [span.parent_span_id for span in spans.clients] == [""] * (len(turns) - 1) + [_PARENT_ID]


def test_large_response_head(edge: Edge) -> None:
    """A response head beyond the captured bytes: its status counts, and its end is found."""
    answer = response(503, fields=[f"X-Fill: {'f' * 5000}"], body=b"x" * 3000)
    turns = [Turn([request("/large")], [answer]), Turn([request("/next")], [response()])]
    run_turns(edge.server, edge.client, edge.port, turns)
    edge.expect([("/large", 503), ("/next", 200)])


# -- odd bytes that are still HTTP


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (request("/nul", fields=["X-Bytes: a\0b"]), "/nul"),
        (request("/bytes", fields=["X-Bytes: \xff\xfe\x80"]), "/bytes"),
        (request("/caf\xe9"), "/caf\ufffd"),
        ("GET /ŭnicode HTTP/1.1\r\nHost: test.example\r\n\r\n".encode(), "/ŭnicode"),
        (b"\r\n" + request("/blank/line/first"), "/blank/line/first"),
        (b"\r\n\r\n" + request("/blank/lines/first"), "/blank/lines/first"),
        (request("/bare/lf").replace(b"\r\n", b"\n"), "/bare/lf"),
        (b"GET http://test.example/absolute?x=1 HTTP/1.1\r\nHost: other.example\r\n\r\n", "/absolute"),
        (request("*", method="OPTIONS"), "*"),
        (b"GET / HTTP/1.1\r\n\r\n", "/"),
        (request("/" + "p" * 900), "/" + "p" * 900),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:24]),
)
def test_unusual_requests(edge: Edge, data: bytes, path: str) -> None:
    """What a server accepts is a span, with text that every backend takes."""
    _one_turn(edge, data)
    server, client = edge.spans(1).one()
    assert server.attributes["url.path"] == path
    assert server.attributes["http.response.status_code"] == client.attributes["http.response.status_code"] == 200
    if path == "/absolute":
        assert server.attributes["server.address"] == client.attributes["server.address"] == "test.example"
        assert server.attributes["url.query"] == "x=1"
    if path == "/nul":
        assert "\0" not in repr(server)


@pytest.mark.parametrize("method", ["PROPFIND", "M-SEARCH", "VERSION-CONTROL", "LOCK"])
def test_unknown_method(edge: Edge, method: str) -> None:
    """A method that the conventions do not know is _OTHER, the name HTTP, and what was sent is kept."""
    _one_turn(edge, request("/dav", method=method), response(207))
    for span in edge.expect([("/dav", 207)]).one():
        assert span.name == "HTTP"
        assert span.attributes["http.request.method"] == "_OTHER"
        assert span.attributes["http.request.method_original"] == method


# -- what is not HTTP


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET /\0\1\2 HTTP/1.1\r\nHost: x\r\n\r\n", "binary_head"),
        (b"GET / and more HTTP/1.1\r\nHost: x\r\n\r\n", "bad_request_line"),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", "bad_request_line"),
        (b"GET /\r\n\r\n", "bad_request_line"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", "bad_header"),
        (b"GARBAGEGARBAGEGARBAGE\r\n\r\n", "bad_request_line"),
        (b"GET / HTTP/1.1\r\n\0\1\2\3: x\r\n\r\n", "binary_head"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:24]),
)
def test_broken_requests(edge: Edge, data: bytes, reason: str) -> None:
    """What begins like a request and is none makes no span, even when it is answered in HTTP; the reason is counted."""
    _one_turn(edge, data, response(400))
    edge.spans(0)
    assert edge.dropped() == {reason: 2}


@pytest.mark.parametrize(
    ("conversation", "dropped"),
    [
        ([b"get / http/1.1\r\n\r\n", b"what?\r\n"], 0),
        ([bytes(range(256)) * 8, bytes(range(255, -1, -1)) * 8], 0),
        ([b"GET \0\1\2\3\4\5\6", b"\0"], 0),
        ([b"GARBAGEGARBAGEGARBAGE\n", b"no\n", b"GARBAGE AGAIN\n", b"no\n"], 2),
        # PostgreSQL: startup, authentication, simple queries.
        (
            [
                b"\0\0\0\x1d\0\3\0\0user\0me\0database\0x\0\0\0",
                b"R\0\0\0\x08\0\0\0\0Z\0\0\0\5I",
                b"Q\0\0\0\x0dSELECT 1\0",
                b"T\0\0\0\x04C\0\0\0\x0dSELECT 1\0Z\0\0\0\5I",
                b"Q\0\0\0\x14GET /x HTTP/1.1\0",
                b"E\0\0\0\x04",
            ],
            0,
        ),
        # Redis: RESP and inline commands, one of which looks like a request.
        ([b"*2\r\n$3\r\nGET\r\n$1\r\nx\r\n", b"$-1\r\n"], 0),
        ([b"PING\r\n", b"+PONG\r\n", b"GET hello\r\n", b"$-1\r\n", b"GET /path\r\n", b"$-1\r\n"], 2),
        # SMTP and FTP: the greeting is the server's, so the roles are found by who sends what looks like a request.
        ([b"", b"220 mail ready\r\n", b"EHLO host\r\n", b"250 ok\r\n", b"MAIL FROM:<a@b>\r\n", b"250 ok\r\n"], 2),
        ([b"", b"220 ftp ready\r\n", b"USER me\r\n", b"331 password\r\n", b"RETR /x\r\n", b"150 here\r\n"], 2),
        # Echo servers, of bytes and of what would be a request.
        ([b"\1\2\3\4\5\6\7\x08", b"\1\2\3\4\5\6\7\x08"], 0),
        ([b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"] * 3, 2),
    ],
    ids=[
        "lower_case",
        "binary",
        "method_then_binary",
        "garbage",
        "postgresql",
        "redis",
        "redis_inline",
        "smtp",
        "ftp",
        "echo",
        "http_echo",
    ],
)
def test_other_protocols(edge: Edge, conversation: Sequence[bytes], dropped: int) -> None:
    """Protocols that are not HTTP make no span; exchanges that were begun in error are dropped as not_http."""
    edge.server.start(_serve_conversation, edge.port, conversation)
    edge.client.call(_have_conversation, edge.port, conversation)
    edge.server.result()
    edge.spans(0)
    assert edge.dropped() == ({"not_http": dropped} if dropped else {})
    if not dropped:
        assert edge.grown(_KERNEL % "ignored_other") >= len(conversation)


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@pytest.mark.parametrize(
    "conversation",
    [
        [_PREFACE + _SETTINGS, _SETTINGS],
        [_PREFACE + b"\xff" * 5000, b"\xff" * 5000, b"\0" * 5000, b"\0" * 5000],
        [_PREFACE + b"\0\0\x10\1\4\0\0\0\1" + b"\xff" * 16, b"\0\0\x10\1\4\0\0\0\1" + b"\xff" * 16],
        [_PREFACE + _SETTINGS + b"\xff\xff\xff\1\0\0\0\0\1" + b"x" * 9000, b"\xff\xff\xff\0\0\0\0\0\1"],
        [_PREFACE + b"GET / HTTP/1.1\r\n\r\n" * 300, b"HTTP/1.1 200 OK\r\n\r\n" * 300],
    ],
    ids=["no_request", "no_frames", "no_header_block", "endless_frames", "http1"],
)
def test_hostile_frames(edge: Edge, conversation: Sequence[bytes]) -> None:
    """A connection of HTTP/2 whose requests cannot be read makes no span; it is counted on either side."""
    edge.server.start(_serve_conversation, edge.port, conversation)
    edge.client.call(_have_conversation, edge.port, conversation)
    edge.server.result()
    edge.spans(0)
    dropped = edge.dropped()
    assert sum(dropped.values()) >= 2, dropped
    assert set(dropped) <= {"no_request", "stream_lost"}


def _serve_conversation(port: int, conversation: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        for asked, said in zip(conversation[::2], conversation[1::2], strict=True):
            receive(connection, len(asked))
            send_all(connection, said)
        connection.recv(1)


def _have_conversation(port: int, conversation: Sequence[bytes]) -> None:
    with connect(port) as connection:
        for asked, said in zip(conversation[::2], conversation[1::2], strict=True):
            send_all(connection, asked)
            receive(connection, len(said))


def test_garbage_without_an_answer(edge: Edge) -> None:
    """What only looked like a request until the connection closed is dropped, with the parser's reason."""
    edge.server.start(_serve_silence, edge.port)
    edge.client.call(_send_and_close, edge.port, b"GARBAGEGARBAGEGARBAGE")
    edge.server.result()
    edge.spans(0)
    assert edge.dropped() == {"bad_request_line": 2}


def _serve_silence(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        while connection.recv(65536):
            pass


def _send_and_close(port: int, data: bytes) -> None:
    with connect(port) as connection:
        send_all(connection, data)


def test_late_answer_that_is_no_http(edge: Edge) -> None:
    """A request that is answered in another protocol (ICY) so late that it was announced is dropped all the same."""
    edge.server.start(_serve_late_answer, edge.port, b"ICY 200 OK\r\n\r\nmusic")
    edge.client.call(_have_conversation, edge.port, [request("/radio"), b"ICY 200 OK\r\n\r\nmusic"])
    edge.server.result()
    edge.spans(0)
    assert edge.dropped() == {"bad_status_line": 2}


def _serve_late_answer(port: int, answer: bytes) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        time.sleep(0.6)  # three times the age at which an exchange is announced
        send_all(connection, answer)
        connection.recv(1)


def test_tls_that_is_not_to_be_read(agent, edge: Edge, tmp_path: Path) -> None:
    """What the sockets carry is left alone, and counted as TLS."""
    port = free_port()
    tracing = agent([port], {"capture.tls": False})
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ("-subj", "/CN=test.example", "-days", "2")
    files = ("-keyout", key, "-out", certificate)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files],
        check=True,
        capture_output=True,
        timeout=60,
    )
    edge.server.start(_serve_tls, port, str(key), str(certificate))
    edge.client.call(_request_tls, port)
    edge.server.result()
    assert tracing.settle().begun == 0
    assert tracing.spans(port) == []
    assert tracing.metrics()[_KERNEL % "ignored_tls"] >= 4


def _serve_tls(port: int, key: str, certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with listen(port) as listener, accept(listener) as plain, context.wrap_socket(plain, server_side=True) as secure:
        for _ in range(3):
            if not secure.recv(65536).endswith(b"\r\n\r\n"):
                raise ValueError("a request was cut")
            secure.sendall(response())
        secure.recv(1)


def _request_tls(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with connect(port) as plain, context.wrap_socket(plain, server_hostname="test.example") as secure:
        for _ in range(3):
            secure.sendall(request("/secret"))
            secure.recv(65536)


def test_request_line_split_from_garbage(edge: Edge) -> None:
    """A single byte that could begin a method, then something else."""
    for data in (b"G", b"GE", b"P", b"A-", b"GET"):
        edge.begin()
        edge.server.start(_serve_conversation, edge.port, [data, b"", b"\0\1\2\3", b"\4"])
        edge.client.call(_have_conversation, edge.port, [data, b"", b"\0\1\2\3", b"\4"])
        edge.server.result()
        edge.spans(0)
        assert edge.dropped() == {"not_http": 2}


def test_memory_that_cannot_be_read(edge: Edge) -> None:
    """Iovecs that point nowhere: the system call fails, the agent does not."""
    edge.server.start(_serve_one_behind_faults, edge.port)
    edge.client.call(_write_from_nowhere, edge.port)
    edge.server.result()
    edge.expect([("/readable", 200)])


def _serve_one_behind_faults(port: int) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, response())
        connection.recv(1)


def _write_from_nowhere(port: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with connect(port) as connection:
        for address in (0, 1, 0xFFFF_FFFF_FFFF_F000, 0x7FFF_FFFF_F000):
            for number in (libc.write, libc.writev, libc.sendmsg):
                if number(connection.fileno(), ctypes.c_void_p(address), ctypes.c_size_t(100)) >= 0:
                    raise ValueError("memory from nowhere was sent")
        send_all(connection, request("/readable"))
        receive(connection, len(response()))
