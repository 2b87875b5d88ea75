"""agent.protocols.grpc_web: exchanges of HTTP/1 that are calls of gRPC-Web, wholly and partly captured."""

from __future__ import annotations

import random
from base64 import b64encode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import rpc_attributes as names

from agent.model import Call, End, Exchange, Flag, Role
from agent.protocols import grpc
from tests.unit.http2_traffic import message
from tests.unit.test_http1 import exchange, parse, parser
from tests.unit.test_http1_stream import Wire

OK_TRAILERS = b"grpc-status:0\r\n"


def trailers(block: bytes = OK_TRAILERS) -> bytes:
    return b"\x80" + len(block).to_bytes(4, "big") + block


def asking(
    body: bytes | None = None,
    path: str = "/pkg.Echo/Unary",
    content_type: str = "application/grpc-web+proto",
    *more: str,
) -> bytes:
    """A request; its body is a message of ten bytes unless given."""
    body = message(10) if body is None else body
    lines = [f"POST {path} HTTP/1.1", "Host: a:8080", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


def answering(
    body: bytes, content_type: str = "application/grpc-web+proto", *more: str, status: str = "200 OK"
) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


def chunked(pieces: list[bytes], content_type: str = "application/grpc-web+proto") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def cut(request: bytes, response: bytes, captured: int, **fields: object) -> Exchange:
    """The record of an exchange of which so many bytes of the response's body were captured, and its last eight."""
    head_bytes = response.index(b"\r\n\r\n") + 4
    return exchange(
        request,
        response[: head_bytes + captured],
        response_bytes=len(response),
        tail=response[-8:],
        flags=Flag.FIRST | Flag.TAIL_VALID | Flag.RESPONSE_TRUNCATED,
        end=End.NEXT,
        **fields,
    )


def status_of(call: Call) -> str:
    values = dict(call.all_attributes())
    assert values["rpc.system.name"] == "grpc"
    return str(values.get("rpc.response.status_code", ""))


COMMON = {
    "rpc.system.name": "grpc",
    "rpc.method": "pkg.Echo/Unary",
    "rpc.response.status_code": "OK",
    "server.address": "a",
    "server.port": 8080,
    "network.peer.address": "10.0.0.9",
    "network.peer.port": 40000,
    "spanloom.rpc.request.messages": 1,
    "spanloom.rpc.response.messages": 2,
}


@pytest.mark.parametrize(
    ("role", "more"),
    [(Role.SERVER, {"client.address": "10.0.0.9"}), (Role.CLIENT, {})],
    ids=["server", "client"],
)
def test_a_call_has_what_it_has_over_http2(role, more):
    """The attributes of gRPC and none of HTTP; the names are those of the semantic conventions."""
    call = parse(asking(), answering(message(3) + message(0) + trailers()), role=role, end=End.NEXT)
    assert dict(call.all_attributes()) == COMMON | more
    assert (call.name, call.error, call.complete) == ("pkg.Echo/Unary", False, True)
    own = {name for name in dict(call.all_attributes()) if name.startswith("rpc.")}
    assert own <= {getattr(names, name) for name in dir(names) if name.startswith("RPC_")}


@pytest.mark.parametrize(
    ("content_type", "is_web"),
    [
        ("application/grpc-web", True),
        ("application/grpc-web+proto", True),
        ("application/grpc-web-text", True),
        ("application/grpc-web-text+proto", True),
        ("Application/Grpc-Web; charset=utf-8", False),  # nobody writes it so: one look for the usual case is enough
        ("application/grpc-web; charset=utf-8", True),
        ("application/grpc-webs", False),
        ("application/grpc", False),
        ("application/json", False),
    ],
)
def test_content_types(content_type, is_web):
    """The request's decides; the rest stays what it is."""
    call = parse(asking(b"", content_type=content_type), answering(b"", content_type, "grpc-status: 0"))
    values = dict(call.all_attributes())
    assert ("rpc.method" in values, "http.request.method" in values) == (is_web, not is_web)


def test_other_requests_that_speak_of_it_are_not_it():
    """The text in another field, in the body, or as the answer's type is nothing."""
    plain = b"application/grpc-web"
    for request in (
        b"GET / HTTP/1.1\r\nHost: a\r\nAccept: application/grpc-web+proto\r\n\r\n",
        asking(b"\r\nContent-Type: application/grpc-web\r\n", "/", "text/plain"),
        b"GET /?application/grpc-web HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        assert plain in request
        call = parse(request, answering(trailers()))
        assert "http.request.method" in dict(call.all_attributes())


@pytest.mark.parametrize("code", [*range(17), 17, 99])
@pytest.mark.parametrize("space", ["", " "])
def test_every_status_in_every_place(code, space):
    """In the headers of a response without a body, in the trailers, and in the last bytes of trailers not captured."""
    expected = grpc.read_status(b"%d" % code)
    line = f"grpc-status:{space}{code}"
    body = message(500) + trailers(f"{line}\r\n".encode())
    for role in (Role.SERVER, Role.CLIENT):
        calls = [
            parse(asking(), answering(b"", "application/grpc-web", line), role=role),
            parse(asking(), answering(body), role=role),
            parse(asking(), chunked([body]), role=role),
            *(parser().parse(cut(asking(), answering(body), captured, role=role)) for captured in (5, 300, 505, 510)),
        ]
        is_bad = expected in grpc.SERVER_ERRORS if role == Role.SERVER else code != 0
        for number, call in enumerate(calls):
            values = dict(call.all_attributes())
            assert status_of(call) == expected
            assert (call.error, values.get("error.type")) == (is_bad, expected if is_bad else None)
            assert values["spanloom.rpc.response.messages"] == (number > 0)
            is_unknown = expected == "UNIMPLEMENTED" and role == Role.SERVER
            assert call.name == ("grpc" if is_unknown else "pkg.Echo/Unary")
            assert values["rpc.method"] == ("_OTHER" if is_unknown else "pkg.Echo/Unary")
            assert values.get("rpc.method_original") == ("pkg.Echo/Unary" if is_unknown else None)


@pytest.mark.parametrize(
    "block",
    [
        b"grpc-status:0\r\nx-status:1\r\n",
        b"x-status:1\r\ngrpc-status:0\r\n",
        b"grpc-status:0\r\natus:1\r\n",
        b"grpc-status: 0\r\nus:1\r\n",
        b"grpc-status:0\r\ngrpc-message:\r\n",
        b"grpc-status:0",
        b"grpc-status:0\n",
    ],
)
def test_a_tail_that_could_be_another_line_says_nothing(block):
    """Captured whole the trailers are read; of the last eight bytes alone nothing is believed that could be else."""
    body = message(3) + trailers(block)
    assert status_of(parse(asking(), answering(body))) == "OK"
    assert status_of(parser().parse(cut(asking(), answering(body), 8))) == ""
    assert status_of(parser().parse(cut(asking(), answering(body), 13))) == ""
    call = parser().parse(cut(asking(), answering(body), 8))
    assert not call.error
    assert "spanloom.rpc.response.messages" not in dict(call.all_attributes())


def test_a_tail_of_trailers_without_a_status_says_nothing():
    """Malformed ones: their only line has another name."""
    for block in (b"x-grpc-state:0\r\n", b"x-grpc-statues: 0\r\n", b"grpc-status=\r\n:0\r\n", b"grpc-status:000\r\n"):
        assert status_of(parser().parse(cut(asking(), answering(message(3) + trailers(block)), 8))) == ""


LINES = st.sampled_from(
    [b"x-status:1\r\n", b"atus:3\r\n", b"tus: 4\r\n", b"a:\r\n", b"b:12\r\n", b"grpc-message:no\r\n", b"us:14\r\n"]
)


@given(
    st.lists(st.integers(0, 60), max_size=4),
    st.lists(LINES, max_size=2),
    st.lists(LINES, max_size=2),
    st.sampled_from([b"grpc-status:0\r\n", b"grpc-status: 5\r\n", b"grpc-status:14\r\n", b"Grpc-Status: 16\r\n"]),
    st.integers(0, 300),
)
@settings(max_examples=500, deadline=None)
def test_what_is_told_is_right(sizes, before, behind, line, captured):
    """Whatever is captured of a response: its status and its messages are right, or not told."""
    body = b"".join(map(message, sizes)) + trailers(b"".join((*before, line, *behind)))
    response = answering(body)
    call = parser().parse(cut(asking(), response, min(captured, len(body))))
    expected = grpc.read_status(line.partition(b":")[2].strip())
    assert status_of(call) in ("", expected)
    assert dict(call.all_attributes()).get("spanloom.rpc.response.messages") in (None, len(sizes))
    if captured >= len(body):
        assert status_of(call) == expected
        assert ("spanloom.rpc.response.messages", len(sizes)) in call.attributes


@given(st.lists(st.integers(0, 60), max_size=4), st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_of_any_size(sizes, seed, is_text, is_chunked):
    """Chunks begin and end anywhere, and each piece of text is padded by itself."""
    choice = random.Random(seed)
    body = b"".join(map(message, sizes)) + trailers(b"grpc-status:7\r\ngrpc-message:no\r\n")
    pieces = []
    while body:
        step = choice.randint(1, len(body))
        pieces.append(body[:step])
        body = body[step:]
    content_type = "application/grpc-web-text" if is_text else "application/grpc-web"
    if is_text:
        pieces = [b64encode(piece) for piece in pieces]
    response = chunked(pieces, content_type) if is_chunked else answering(b"".join(pieces), content_type)
    call = parse(asking(), response)
    assert status_of(call) == "PERMISSION_DENIED"
    assert ("spanloom.rpc.response.messages", len(sizes)) in call.attributes


@pytest.mark.parametrize(
    "response",
    [
        answering(b"\x1f\x8b" + bytes(40), "application/grpc-web", "Content-Encoding: gzip"),
        answering(message(2) + trailers(), "application/grpc-web", "Content-Encoding: br"),  # frames by chance
        answering(message(2) + b"\x81" + trailers()[1:]),
        answering(message(2) + trailers() + message(1)),
        answering(message(2) + b"\x80\0\0\0\xff" + OK_TRAILERS),
        answering(message(2) + trailers(b"x:y\r\n")),
        answering(b"\7" + bytes(30)),
        answering(trailers(), "*/*"),
        answering(b"AAA", "application/grpc-web-text"),
        answering(b"A===", "application/grpc-web-text"),
        answering(b64encode(message(2) + trailers())[:-3] + b"\xff==", "application/grpc-web-text"),
        chunked([message(2)]),
        chunked([trailers()]).replace(b"\r\n0\r\n", b"\r\nz\r\n"),
        answering(trailers()).replace(b"Content-Length: 20", b"Transfer-Encoding: gzip, chunked"),
    ],
)
def test_bodies_that_say_nothing(response):
    """Compressed, malformed, of another length, or without a status: none is made up, and nothing is an error."""
    call = parser().parse(exchange(asking(), response, end=End.NEXT))
    assert status_of(call) == ""
    assert not call.error


def test_pipelined_calls():
    """Of a connection that is read as a stream only heads are kept, and the last bytes."""
    wire = Wire().ask(asking() + asking(b"", "/pkg.Echo/Two") + asking())
    short, headed, long = answering(trailers()), answering(b"", "application/grpc-web", "grpc-status: 5"), message(90)
    wire.answer(short + headed + answering(long + trailers()))
    calls = [parser().parse(one) for one in wire.exchanges]
    assert [(call.name, status_of(call)) for call in calls] == [
        ("pkg.Echo/Unary", "OK"),
        ("pkg.Echo/Two", "NOT_FOUND"),
        ("pkg.Echo/Unary", ""),
    ]


def test_the_same_head_again():
    """Nothing is remembered of a response but what its head says: the next one has a status of its own."""
    http = parser()
    for code in (0, 5, 0, 13):
        call = http.parse(exchange(asking(), answering(trailers(b"grpc-status:%02d\r\n" % code))))
        assert status_of(call) == grpc.read_status(b"%02d" % code)
        call = http.parse(exchange(asking(), answering(trailers(b"grpc-status: %d\r\n" % code))))
        assert status_of(call) == grpc.read_status(b"%d" % code)
    assert not http._repeats


@pytest.mark.parametrize(
    ("status", "expected"), [("503 No", "UNAVAILABLE"), ("404 No", "UNIMPLEMENTED"), ("418 No", "UNKNOWN")]
)
def test_an_answer_of_a_proxy(status, expected):
    """One that is no gRPC at all: the status is what the client makes of it."""
    call = parse(asking(), answering(b"<html>", "text/html", status=status), role=Role.CLIENT, end=End.NEXT)
    values = dict(call.all_attributes())
    assert (status_of(call), values["error.type"]) == (expected, expected)
    assert values["http.response.status_code"] == int(status[:3])


def test_an_http_error_without_a_known_status():
    """It is an error all the same."""
    call = parse(asking(), answering(b"\7" * 90, status="500 No"), end=End.NEXT)
    values = dict(call.all_attributes())
    assert (status_of(call), values["error.type"], values["http.response.status_code"]) == ("", "500", 500)
    assert call.error


@pytest.mark.parametrize(
    ("fields", "timeout", "expected", "error"),
    [
        ({"end": End.RESET}, "", "CANCELLED", None),
        ({"end": End.RESET, "end_ns": 1_000_000_000}, "1S", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ({"end": End.RESET, "end_ns": 500_000_000}, "1S", "CANCELLED", None),
        ({"end": End.RESET, "role": Role.CLIENT}, "", "", "connection_reset"),
        (
            {"end": End.CLOSED, "role": Role.CLIENT, "flags": Flag.FIRST | Flag.PEER_CLOSED},
            "",
            "",
            "incomplete_response",
        ),
        ({"end": End.CLOSED, "role": Role.CLIENT}, "", "CANCELLED", "CANCELLED"),
        ({"end": End.TIMED_OUT}, "", "", "timeout"),
    ],
)
def test_a_call_that_was_cut_short(fields, timeout, expected, error):
    """A client that went away cancelled it, or its deadline did; of anything else the status is not known."""
    request = asking(
        None, "/pkg.Echo/Unary", "application/grpc-web", *([f"grpc-timeout: {timeout}"] if timeout else [])
    )
    call = parse(request, b"", **fields)
    assert (status_of(call), dict(call.all_attributes()).get("error.type")) == (expected, error)
    assert call.error == (error is not None)


def test_a_response_that_said_its_status_and_was_cut_short():
    """Both are told; the status is the error when it is one."""
    for code, end, role, error in (
        (0, End.RESET, Role.SERVER, "client_disconnect"),
        (0, End.RESET, Role.CLIENT, "connection_reset"),
        (14, End.RESET, Role.SERVER, "UNAVAILABLE"),
        (5, End.RESET, Role.SERVER, "client_disconnect"),
    ):
        response = answering(bytes(99), "application/grpc-web", f"grpc-status: {code}")[:-50]
        call = parse(asking(), response, end=end, role=role)
        values = dict(call.all_attributes())
        assert (status_of(call), values["error.type"]) == (grpc.read_status(b"%d" % code), error)
        assert (call.error, call.complete) == (True, False)


def test_a_call_that_goes_on_has_no_status():
    """As long as nothing of the response is known, or only a part of it."""
    for response in (b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/grpc-web\r\ngrpc-status: 1", chunked([])[:-7]):
        call = parse(asking(), response, end=End.QUIET, flags=Flag.FIRST)
        assert (status_of(call), call.complete, call.error) == ("", False, False)


def test_paths_and_metadata():
    """A path that is no method's name is shown as it is; captured headers are the call's metadata."""
    options = {"request_headers": ["x-tenant"], "response_headers": ["x-cost"]}
    request = asking(
        None, "/api/pkg.Echo/Unary?a=b", "application/grpc-web", "X-Tenant: t", "X-Forwarded-For: 10.1.1.1"
    )
    call = parse(request, answering(trailers(), "application/grpc-web", "X-Cost: 5"), options=options)
    values = dict(call.all_attributes())
    assert (call.name, values["rpc.method"], values["rpc.method_original"]) == ("grpc", "_OTHER", "api/pkg.Echo/Unary")
    assert (values["rpc.request.metadata.x-tenant"], values["rpc.response.metadata.x-cost"]) == (("t",), ("5",))
    assert values["client.address"] == "10.1.1.1"
    assert not {name for name in values if name.startswith(("http.", "url."))}


def test_contexts_are_read_as_ever():
    """What joins it into a trace is that of the HTTP request."""
    context = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    more = (f"traceparent: {context}", "x-request-id: r")
    call = parse(asking(None, "/pkg.Echo/Unary", "application/grpc-web", *more), answering(trailers()))
    assert call.context.span_id.hex() == "0123456789abcdef"
    assert call.request_id == "r"


@pytest.mark.parametrize(
    ("body", "extra", "count"),
    [(message(10), 0, 1), (message(400)[:100], 305, 1), (message(400)[:100], 300, None), (b"\5" * 20, 0, None)],
)
def test_messages_of_a_request(body, extra, count):
    """A message may be captured in part; what is no message, or less than one, is not counted."""
    whole = body + bytes(extra)
    request = asking(whole)
    record = exchange(request[: len(request) - extra], answering(trailers()), request_bytes=len(request))
    assert dict(parser().parse(record).attributes).get("spanloom.rpc.request.messages") == count
