"""agent.protocols.http2: what streams are as spans, HTTP and gRPC; the traffic is made by h2."""

from __future__ import annotations

import base64

import pytest

from agent.errors import ConfigError
from agent.model import AttributeGroup, End, Flag
from agent.propagation import FORMATS, Extractor
from agent.protocols import http1_memo, http2, http_semantics
from agent.protocols.http1_stream import StreamLosses
from agent.protocols.http2 import Http2
from agent.protocols.http2_stream import Http2Connection
from tests.unit.http2_traffic import (
    CLIENT,
    GRPC_OK,
    OK,
    PREFACE,
    REQUEST,
    RESPONSE,
    SERVER,
    Conversation,
    Observed,
    Raw,
    get,
    grpc,
    message,
    raw,
)

TRACE, SPAN = "0123456789abcdef0123456789abcdef", "0123456789abcdef"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{SPAN}-01")
PEER = {"network.peer.address": "10.0.0.9", "network.peer.port": 40000}


def seen(asked, answered=OK, role=SERVER, *, body=b"", answer_body=b"", trailers=None, **settings) -> Observed:
    """One exchange of a conversation of its own."""
    conversation = Conversation()
    stream = conversation.ask(asked, body)
    conversation.answer(stream, answered, answer_body, trailers)
    observed = conversation.show(Observed(role, **settings))
    assert observed.losses.reasons == {}
    assert observed.connection.lost == observed.connection.outstanding == 0
    return observed


# ---- HTTP


def test_a_server_span() -> None:
    """Everything that the conventions ask for, and nothing else."""
    exchange, call, values = seen(
        get("/items/7?q=1&sig=abc", "POST", ("user-agent", "curl/8"), TRACEPARENT), body=b"12345", answer_body=b"abc"
    ).only()
    assert values == {
        "http.request.method": "POST",
        "url.path": "/items/7",
        "url.scheme": "http",
        "url.query": "q=1&sig=REDACTED",
        "network.protocol.version": "2",
        "server.address": "a.example",
        "server.port": 8080,
        "user_agent.original": "curl/8",
        "client.address": "10.0.0.9",
        **PEER,
        "http.response.status_code": 200,
        "http.response.body.size": 3,
        "http.request.body.size": 5,
    }
    assert (call.name, call.error, call.complete) == ("POST", False, True)
    assert call.context is not None
    assert (call.context.trace_id.hex(), call.context.span_id.hex(), call.context.sampled) == (TRACE, SPAN, True)
    assert (exchange.role, exchange.end, exchange.flags) == (SERVER, End.NEXT, Flag.FIRST)
    assert (exchange.request_bytes, exchange.response_bytes) == (5, 3)
    assert (exchange.parent_id, exchange.peer_id, exchange.request, exchange.response) == (0, 0, b"", b"")
    assert (exchange.tgid, exchange.process_start_ns, exchange.connection_id) == (10, 5, 7)
    assert (exchange.request_tid, exchange.response_tid) == (11, 0)
    assert exchange.remote_port == 40000
    assert exchange.request_start_ns <= exchange.request_end_ns < exchange.response_start_ns <= exchange.end_ns


def test_a_client_span() -> None:
    """url.full with the scheme of the request, redacted; the peer's names."""
    names = (("service.peer.name", "items"),)
    _, call, values = seen(
        get("/x?token=1", scheme="https"), [(":status", "404")], CLIENT, names_of_peer=lambda address, port: names
    ).only()
    assert values == {
        "http.request.method": "GET",
        "server.address": "a.example",
        "server.port": 8080,
        "url.full": "https://a.example:8080/x?token=REDACTED",
        "network.protocol.version": "2",
        **PEER,
        "service.peer.name": "items",
        "http.response.status_code": 404,
        "error.type": "404",
        "http.response.body.size": 0,
    }
    assert call.error


@pytest.mark.parametrize(("role", "status", "error"), [(SERVER, 404, False), (SERVER, 503, True), (CLIENT, 404, True)])
def test_the_status_decides_about_the_error(role, status, error) -> None:
    """Of a server 5xx, of a client 4xx as well."""
    _, call, values = seen(get(), [(":status", str(status))], role).only()
    assert call.error is error
    assert values.get("error.type") == (str(status) if error else None)


def test_host_stands_in_for_authority() -> None:
    """A proxy that translates HTTP/1 may send Host only (RFC 9113 section 8.3.1); authority wins."""
    without = [field for field in get("/", "GET", ("host", "h.example")) if field[0] != ":authority"]
    assert seen(without).only()[2]["server.address"] == "h.example"
    assert seen(get("/", "GET", ("host", "a.example:8080"))).only()[2]["server.address"] == "a.example"


def test_without_a_name_a_client_shows_the_address_that_it_called() -> None:
    """As for HTTP/1: what the kernel saw is left."""
    made = Raw()
    headers = [field for field in get("/x") if field[0] != ":authority"]
    observed = Observed(CLIENT).see(REQUEST, PREFACE + made.headers(REQUEST, 1, headers, "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["url.full"] == "http://10.0.0.9:40000/x"


def test_the_default_port_goes_with_the_scheme() -> None:
    """443 for https, 80 for http."""
    for scheme, port in (("https", 443), ("http", 80)):
        headers = [(name, "a" if name == ":authority" else value) for name, value in get(scheme=scheme)]
        assert seen(headers).only()[2]["server.port"] == port


def test_unknown_methods_and_routes() -> None:
    """_OTHER for the method; http.route only from patterns, a guess only in the name."""
    _, call, values = seen(get("/", "BREW")).only()
    assert (call.name, values["http.request.method"]) == ("HTTP", "_OTHER")
    assert values["http.request.method_original"] == "BREW"
    _, call, values = seen(get("/u/7"), route_patterns=["/u/{id}"]).only()
    assert (call.name, values["http.route"]) == ("GET /u/{id}", "/u/{id}")
    _, call, values = seen(get("/u/7"), guess_routes=True).only()
    assert (call.name, "http.route" in values) == ("GET /u/{id}", False)
    with pytest.raises(ConfigError):
        Http2(extractor=Extractor(FORMATS), route_patterns=["x"])


def test_captured_headers_and_refused_ones() -> None:
    """Only what is asked for, repeated fields as a list, secrets not even then, URLs redacted."""
    settings = {
        "request_headers": ["X-Tenant", "authorization"],
        "response_headers": ["location", "set-cookie"],
    }
    observed = seen(
        get("/", "GET", ("x-tenant", "a"), ("x-tenant", "b"), ("authorization", "s3cret"), ("x-other", "n")),
        [(":status", "302"), ("location", "http://u:p@b/?sig=1"), ("set-cookie", "s3cret")],
        **settings,
    )
    values = observed.only()[2]
    assert values["http.request.header.x-tenant"] == ("a", "b")
    assert values["http.response.header.location"] == ("http://REDACTED:REDACTED@b/?sig=REDACTED",)
    assert "s3cret" not in str(values)
    assert "x-other" not in str(values)
    assert observed.protocol.refused_headers == ("authorization", "set-cookie")


def test_the_clients_address_behind_a_proxy() -> None:
    """The first of Forwarded or X-Forwarded-For, for servers only."""
    headers = get("/", "GET", ("x-forwarded-for", "203.0.113.7, 10.1.1.1"))
    assert seen(headers).only()[2]["client.address"] == "203.0.113.7"
    assert "client.address" not in seen(headers, role=CLIENT).only()[2]


def test_request_ids_and_decisions() -> None:
    """x-request-id is for joining; a decision without ids is kept."""
    call = seen(get("/", "GET", ("x-request-id", "abc"), ("b3", "0"))).only()[1]
    assert (call.request_id, call.decision, call.context) == ("abc", False, None)


def test_contexts_that_disagree() -> None:
    """The first format wins, the other is kept, and tracestate goes with traceparent."""
    b3 = ("b3", f"{'a' * 32}-{SPAN}-1")
    call = seen(get("/", "GET", TRACEPARENT, ("tracestate", "k=v"), b3)).only()[1]
    assert call.context is not None
    assert (call.context.trace_id.hex(), call.context.trace_state) == (TRACE, "k=v")
    assert [other.format for other in call.other_contexts] == ["b3"]


def test_a_malformed_context_is_counted_and_ignored() -> None:
    """As if absent."""
    extractor = Extractor(FORMATS)
    observed = Conversation()
    observed.answer(observed.ask(get("/", "GET", ("traceparent", "00-" + "g" * 52))), OK)
    shown = observed.show(Observed(protocol=Http2(extractor=extractor)))
    assert shown.only()[1].context is None
    assert extractor.malformed["tracecontext"] == 1


@pytest.mark.parametrize(
    ("method", "status", "body_size"),
    [("HEAD", "200", None), ("GET", "204", None), ("GET", "304", None), ("GET", "200", 0)],
)
def test_responses_without_a_body(method, status, body_size) -> None:
    """HEAD, 204 and 304 have none, so no size either."""
    _, call, values = seen(get("/", method), [(":status", status), ("content-length", "77")]).only()
    assert values.get("http.response.body.size") == body_size
    assert call.complete


def test_informational_responses() -> None:
    """100 and 103 are no answer: the final status counts, and its time."""
    conversation = Conversation()
    stream = conversation.ask(get())
    for status in ("100", "103"):
        conversation.server.send_headers(stream, [(":status", status)])
        conversation.exchange()
    conversation.answer(stream, OK)
    exchange, _, values = conversation.show(Observed()).only()
    assert values["http.response.status_code"] == 200
    assert exchange.flags == Flag.FIRST | Flag.INTERIM
    assert exchange.response_start_ns == exchange.end_ns


def test_trailers() -> None:
    """They end the response; the fields of the header block stay what they were."""
    _, call, values = seen(get(), OK, answer_body=b"abc", trailers=[("x-sum", "1")], response_headers=["x-sum"]).only()
    assert call.complete
    assert values["http.response.body.size"] == 3
    assert "http.response.header.x-sum" not in values


@pytest.mark.parametrize(
    ("code", "error"), [(0x8, "cancelled"), (0x2, "INTERNAL_ERROR"), (0xB, "ENHANCE_YOUR_CALM"), (0x99, "_OTHER")]
)
@pytest.mark.parametrize("direction", [REQUEST, RESPONSE])
def test_a_reset_stream(code, error, direction) -> None:
    """error.type is the name of the code, which is of low cardinality; who reset does not matter."""
    conversation = Conversation()
    stream = conversation.ask(get())
    observed = conversation.show(Observed())
    observed.see(direction, raw(3, 0, stream, code.to_bytes(4, "big")))
    exchange, call, values = observed.only()
    assert (values["error.type"], call.error, call.complete) == (error, True, False)
    assert (exchange.end, exchange.response_start_ns, exchange.end_ns) == (End.RESET, 0, observed.time_ns)
    assert "http.response.status_code" not in values
    assert "http.response.body.size" not in values


def test_a_reset_behind_a_bad_status_does_not_change_the_error() -> None:
    """The status says more than the reset that follows it."""
    made = Raw()
    observed = Observed().see(REQUEST, PREFACE + made.headers(REQUEST, 1, get(), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [(":status", "503")]) + raw(3, 0, 1, bytes((0, 0, 0, 2))))
    assert observed.only()[2]["error.type"] == "503"


def test_an_early_answer_is_whole() -> None:
    """A server may answer, and reset with NO_ERROR, before the upload ends (RFC 9113 section 8.1)."""
    made = Raw()
    observed = Observed().see(REQUEST, PREFACE + made.headers(REQUEST, 1, get("/", "POST")) + raw(0, 0, 1, b"12"))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [(":status", "413")], "END_STREAM") + raw(3, 0, 1, bytes(4)))
    observed.see(REQUEST, raw(0, 1, 1, b"34"))
    _, call, values = observed.only()
    assert (call.complete, call.error, values["http.response.status_code"]) == (True, False, 413)
    assert "http.request.body.size" not in values


def test_goaway_refuses_what_the_server_will_not_look_at() -> None:
    """Streams above the last one end as refused, the others go on; a graceful GOAWAY ends nothing."""
    made = Raw()
    observed = Observed().see(REQUEST, PREFACE)
    for stream in (1, 3, 5):
        observed.see(REQUEST, made.headers(REQUEST, stream, get(f"/{stream}"), "END_STREAM"))
    observed.see(RESPONSE, raw(7, 0, 0, b"\x7f\xff\xff\xff" + bytes(4)))
    assert observed.results == []
    observed.see(RESPONSE, raw(7, 0, 0, bytes((0, 0, 0, 1)) + bytes(4) + b"debug"))
    assert [(value["url.path"], value["error.type"]) for value in observed.values] == [
        ("/3", "REFUSED_STREAM"),
        ("/5", "REFUSED_STREAM"),
    ]
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.values[2]["http.response.status_code"] == 200


@pytest.mark.parametrize(
    ("role", "end", "flags", "error"),
    [
        (SERVER, End.RESET, 0, "client_disconnect"),
        (CLIENT, End.RESET, 0, "connection_reset"),
        (CLIENT, End.CLOSED, Flag.PEER_CLOSED, "incomplete_response"),
        (SERVER, End.CLOSED, 0, "incomplete_response"),
        (CLIENT, End.TIMED_OUT, 0, "timeout"),
    ],
)
def test_what_is_open_when_the_connection_ends(role, end, flags, error) -> None:
    """Handed out with the close's end and the same reasons as for HTTP/1."""
    conversation = Conversation()
    conversation.ask(get())
    observed = conversation.show(Observed(role)).close(end, flags)
    exchange, call, values = observed.only()
    assert (exchange.end, values["error.type"], call.complete) == (end, error, False)
    assert exchange.end_ns == observed.time_ns + 5


def test_a_close_without_a_record_loses_and_counts() -> None:
    """Nothing is known of how it ended."""
    conversation = Conversation()
    conversation.ask(get())
    observed = conversation.show(Observed()).close(None)
    assert observed.results == []
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"forgotten": 1})


def test_expired_streams_are_handed_out_once() -> None:
    """What comes after all makes no exchange of its own."""
    conversation = Conversation()
    stream = conversation.ask(get())
    observed = conversation.show(Observed())
    assert observed.connection.outstanding == 1
    ((exchange, call),) = observed.connection.expire(99)
    assert (exchange.end, exchange.end_ns) == (End.TIMED_OUT, 99)
    assert dict(call.all_attributes())["error.type"] == "timeout"
    before = len(conversation.log)
    conversation.answer(stream, OK)
    for direction, data in conversation.log[before:]:
        observed.see(direction, data)
    assert observed.results == []
    assert observed.losses.unmatched_responses == observed.connection.lost == observed.connection.outstanding == 0


def test_websockets_end_with_their_handshake() -> None:
    """Extended CONNECT (RFC 8441): a path and a scheme; what follows 200 is no HTTP, and the stream may stay open."""
    made = Raw()
    headers = [
        (":method", "CONNECT"),
        (":protocol", "websocket"),
        (":scheme", "https"),
        (":path", "/chat?room=1"),
        (":authority", "a.example"),
    ]
    observed = Observed().see(REQUEST, PREFACE + made.headers(REQUEST, 1, headers))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK))
    observed.see(REQUEST, raw(0, 0, 1, b"frames")).see(RESPONSE, raw(0, 1, 1, b"frames"))
    exchange, call, values = observed.only()
    assert (exchange.end, call.complete, call.name) == (End.HANDED_OVER, True, "CONNECT")
    assert (values["url.path"], values["url.query"], values["url.scheme"]) == ("/chat", "room=1", "https")
    assert "http.response.body.size" not in values


def test_connect_to_an_authority() -> None:
    """The classic tunnel has neither a scheme nor a path; a refused one is an ordinary response."""
    made = Raw()
    headers = [(":method", "CONNECT"), (":authority", "b.example:443")]
    observed = Observed().see(REQUEST, PREFACE + made.headers(REQUEST, 1, headers))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [(":status", "407")], "END_STREAM"))
    exchange, _, values = observed.only()
    assert (exchange.end, values["server.address"], values["server.port"]) == (End.NEXT, "b.example", 443)


def test_memos_do_not_change_what_is_read() -> None:
    """Repeated requests read as the first did, whatever differs beside the path: peers, contexts, sizes, ends."""
    protocol = Http2(extractor=Extractor(FORMATS))
    for _ in range(3):
        conversation = Conversation()
        for number in range(6):
            context = ("traceparent", f"00-{number + 1:032x}-{number + 1:016x}-01")
            stream = conversation.ask(get(f"/{number % 2}", "GET", context))
            conversation.answer(stream, OK, b"x" * (number % 3))
        observed = conversation.show(Observed(protocol=protocol))
        assert [value["url.path"] for value in observed.values] == ["/0", "/1"] * 3
        assert [value["http.response.body.size"] for value in observed.values] == [0, 1, 2] * 2
        assert [int.from_bytes(call.context.trace_id) for call in observed.calls] == [1, 2, 3, 4, 5, 6]


def test_blocks_that_repeat_give_the_same_groups() -> None:
    """Encoders cache by group: a request that is sent again is made of the very same ones."""
    conversation = Conversation()
    for _ in range(4):
        conversation.answer(conversation.ask(get()), OK)
    calls = conversation.show(Observed()).calls
    assert len(calls) == 4
    assert len({id(group) for call in calls for group in call.groups}) == 3
    assert all(type(group) is AttributeGroup for group in calls[0].groups)


def test_memos_are_bounded(monkeypatch) -> None:
    """Hostile variety empties memos instead of growing them; answers stay right."""
    for module, name in (
        (http1_memo, "MEMO_LINES"),
        (http2, "MEMO_REQUESTS"),
        (http2, "MEMO_ANSWERS"),
        (http2, "MEMO_ENDINGS"),
        (http_semantics, "MEMO_HOSTS"),
        (http_semantics, "MEMO_PEERS"),
    ):
        monkeypatch.setattr(module, name, 8)
    protocol = Http2(extractor=Extractor(FORMATS), response_headers=["x-a"])
    conversation = Conversation()
    for number in range(60):
        stream = conversation.ask(get(f"/{number}", "GET", ("user-agent", f"u{number}")))
        conversation.answer(stream, [*OK, ("x-a", str(number))], b"x" * number)
    observed = conversation.show(Observed(protocol=protocol))
    assert [value["url.path"] for value in observed.values] == [f"/{number}" for number in range(60)]
    memos = [
        value for value in vars(protocol).values() if isinstance(value, dict) and value is not protocol._request_kinds
    ]
    memos += [*protocol._requests, *protocol._answers]
    assert all(len(memo) <= 8 for memo in memos)
    conversation = Conversation()
    conversation.answer(conversation.ask(get("/" + "p" * 3000)), OK)
    assert len(conversation.show(Observed(protocol=protocol)).only()[2]["url.path"]) == 3001
    assert not any(len(value) > http2.MEMO_FIELDS_BYTES for key in protocol._requests[1] for _, value in key)


def test_peers_are_asked_for_again() -> None:
    """forget_peers: the names may be others now."""
    names = [(("service.peer.name", "old"),)]
    protocol = Http2(extractor=Extractor(FORMATS), names_of_peer=lambda address, port: names[0])
    conversation = Conversation()
    conversation.answer(conversation.ask(get()), OK)
    first = conversation.show(Observed(CLIENT, protocol)).only()[2]
    names[0] = (("service.peer.name", "new"),)
    protocol.forget_peers()
    second = conversation.show(Observed(CLIENT, protocol)).only()[2]
    assert (first["service.peer.name"], second["service.peer.name"]) == ("old", "new")


# ---- gRPC


def rpc(role=SERVER, *, path="/pkg.Greeter/Hello", status="0", asked=1, answered=1, more=(), **settings) -> Observed:
    """One call with so many messages."""
    return seen(
        grpc(path, *more),
        GRPC_OK,
        role,
        body=message(5) * asked,
        answer_body=message(3) * answered,
        trailers=[("grpc-status", status), ("grpc-message", "why")],
        **settings,
    )


def test_a_unary_call() -> None:
    """The conventions of RPC, not those of HTTP; rpc.service is deprecated: the method's name is whole."""
    exchange, call, values = rpc(more=[TRACEPARENT, ("user-agent", "grpc-c/1")]).only()
    assert values == {
        "rpc.system.name": "grpc",
        "rpc.method": "pkg.Greeter/Hello",
        "server.address": "a.example",
        "server.port": 8080,
        "client.address": "10.0.0.9",
        **PEER,
        "rpc.response.status_code": "OK",
        "spanloom.rpc.request.messages": 1,
        "spanloom.rpc.response.messages": 1,
    }
    assert (call.name, call.error, call.complete) == ("pkg.Greeter/Hello", False, True)
    assert call.context is not None
    assert call.context.trace_id.hex() == TRACE
    assert (exchange.request_bytes, exchange.response_bytes) == (10, 8)


def test_the_attribute_names_are_those_of_the_installed_conventions() -> None:
    """A name that the package does not have, or has deprecated, is a mistake."""
    from opentelemetry.semconv._incubating.attributes import rpc_attributes as names

    assert names.RPC_SYSTEM_NAME == "rpc.system.name"
    values = rpc(status="5", request_headers=["te"], response_headers=["content-type"]).only()[2]
    own = {name for name in values if name.startswith("rpc.")}
    assert own == {
        names.RPC_SYSTEM_NAME,
        names.RPC_METHOD,
        names.RPC_RESPONSE_STATUS_CODE,
        f"{names.RPC_REQUEST_METADATA_TEMPLATE}.te",
        f"{names.RPC_RESPONSE_METADATA_TEMPLATE}.content-type",
    }


CODES = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]


@pytest.mark.parametrize(("code", "name"), list(enumerate(CODES)), ids=CODES)
def test_status_codes(code, name) -> None:
    """A client's span is an error for all but OK, a server's for six of them."""
    _, call, values = rpc(CLIENT, status=str(code)).only()
    assert (values["rpc.response.status_code"], call.error) == (name, code != 0)
    assert values.get("error.type") == (name if code else None)
    _, call, values = rpc(SERVER, status=str(code)).only()
    assert (values["rpc.response.status_code"], call.error) == (name, code in (2, 4, 12, 13, 14, 15))
    assert call.complete


def test_trailers_only_responses() -> None:
    """One header block with END_STREAM has the HTTP status and the status of the call."""
    _, call, values = seen(grpc(), [*GRPC_OK, ("grpc-status", "7")], CLIENT, body=message(1)).only()
    assert (values["rpc.response.status_code"], values["spanloom.rpc.response.messages"]) == ("PERMISSION_DENIED", 0)
    assert call.error


def test_strange_statuses() -> None:
    """An unknown code counts as UNKNOWN; without one the HTTP status decides, as in clients."""
    assert rpc(status="99").only()[2]["rpc.response.status_code"] == "UNKNOWN"
    for http, name in (("200", "UNKNOWN"), ("503", "UNAVAILABLE"), ("401", "UNAUTHENTICATED"), ("500", "UNKNOWN")):
        _, call, values = seen(grpc(), [(":status", http)], CLIENT).only()
        assert (values["rpc.response.status_code"], call.error) == (name, True)
        assert values.get("http.response.status_code") == (None if http == "200" else int(http))


def test_methods_that_the_server_does_not_know() -> None:
    """Of a server that says UNIMPLEMENTED the name may be anything: _OTHER; the client's stub knows its methods."""
    _, call, values = rpc(SERVER, path="/scan.Me/Now", status="12").only()
    assert (call.name, values["rpc.method"], values["rpc.method_original"]) == ("grpc", "_OTHER", "scan.Me/Now")
    _, call, values = rpc(CLIENT, path="/scan.Me/Now", status="12").only()
    assert (call.name, values["rpc.method"]) == ("scan.Me/Now", "scan.Me/Now")
    _, call, values = rpc(path="/a/b/c?d").only()
    assert (call.name, values["rpc.method"], values["rpc.method_original"]) == ("grpc", "_OTHER", "a/b/c")


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+json", "application/grpc; x=1"])
def test_content_types_of_grpc(content_type) -> None:
    """With and without a format or a parameter."""
    assert seen(get("/a.B/C", "POST", ("content-type", content_type)), GRPC_OK).only()[1].name == "a.B/C"


@pytest.mark.parametrize("content_type", ["application/grpc-web+proto", "application/json", "application/grpcx"])
def test_content_types_of_something_else(content_type) -> None:
    """gRPC-Web has its status in the body, and is plain HTTP on the wire."""
    assert seen(get("/a.B/C", "POST", ("content-type", content_type))).only()[1].name == "POST"


@pytest.mark.parametrize(("asked", "answered"), [(0, 1), (1, 0), (3, 1), (1, 4), (20, 20)])
def test_messages_are_counted(asked, answered) -> None:
    """Both directions, each for itself."""
    values = rpc(asked=asked, answered=answered).only()[2]
    assert values["spanloom.rpc.request.messages"] == asked
    assert values["spanloom.rpc.response.messages"] == answered


@pytest.mark.parametrize(
    ("code", "role", "status", "error"),
    [
        (8, CLIENT, "CANCELLED", True),
        (8, SERVER, "CANCELLED", False),
        (7, CLIENT, "UNAVAILABLE", True),
        (11, SERVER, "RESOURCE_EXHAUSTED", False),
        (12, CLIENT, "PERMISSION_DENIED", True),
        (1, SERVER, "INTERNAL", True),
    ],
)
def test_reset_calls(code, role, status, error) -> None:
    """What an HTTP/2 error code means for a call (PROTOCOL-HTTP2.md)."""
    conversation = Conversation()
    stream = conversation.ask(grpc(), message(1))
    observed = conversation.show(Observed(role)).see(REQUEST, raw(3, 0, stream, code.to_bytes(4, "big")))
    _, call, values = observed.only()
    assert (values["rpc.response.status_code"], call.error, call.complete) == (status, error, False)
    assert values.get("error.type") == (status if error else None)


@pytest.mark.parametrize(
    ("timeout", "elapsed_ns", "status"),
    [
        ("100m", 100_000_000, "DEADLINE_EXCEEDED"),
        ("1S", 990_000_000, "DEADLINE_EXCEEDED"),
        ("1S", 900_000_000, "CANCELLED"),
        ("1H", 100_000_000, "CANCELLED"),
        ("xS", 10**12, "CANCELLED"),
    ],
)
def test_deadlines(timeout, elapsed_ns, status) -> None:
    """A client that cancels when its deadline has passed has exceeded it."""
    conversation = Conversation()
    stream = conversation.ask(grpc("/a.B/C", ("grpc-timeout", timeout)), message(1))
    observed = conversation.show(Observed(CLIENT))
    observed.time_ns += elapsed_ns
    observed.see(REQUEST, raw(3, 0, stream, bytes((0, 0, 0, 8))))
    assert observed.only()[2]["rpc.response.status_code"] == status


@pytest.mark.parametrize(
    ("role", "end", "flags", "status", "error"),
    [
        (CLIENT, End.RESET, 0, "UNAVAILABLE", "UNAVAILABLE"),
        (CLIENT, End.CLOSED, 0, "CANCELLED", "CANCELLED"),
        (SERVER, End.RESET, 0, "CANCELLED", None),
        (SERVER, End.CLOSED, 0, None, "incomplete_response"),
        (CLIENT, End.TIMED_OUT, 0, None, "timeout"),
    ],
)
def test_calls_whose_connection_ends(role, end, flags, status, error) -> None:
    """What the client makes of it, where that is certain."""
    conversation = Conversation()
    conversation.ask(grpc(), message(1))
    _, call, values = conversation.show(Observed(role)).close(end, flags).only()
    assert values.get("rpc.response.status_code") == status
    assert (values.get("error.type"), call.error) == (error, error is not None)


def binary_context(flags: int | None = 1) -> bytes:
    return b"\0\0" + bytes.fromhex(TRACE) + b"\1" + bytes.fromhex(SPAN) + (b"" if flags is None else bytes((2, flags)))


@pytest.mark.parametrize("padded", [True, False])
def test_grpc_trace_bin(padded) -> None:
    """OpenCensus's binary context in metadata, base64 with or without padding."""
    value = base64.b64encode(binary_context()).decode()
    call = rpc(more=[("grpc-trace-bin", value if padded else value.rstrip("="))]).only()[1]
    assert call.context is not None
    assert (call.context.format, call.context.trace_id.hex(), call.context.span_id.hex()) == ("grpc", TRACE, SPAN)
    assert call.context.sampled is True


def test_a_connection_shares_nothing_with_another() -> None:
    """Tables and streams belong to one connection, the protocol's memos to all."""
    protocol = Http2(extractor=Extractor(FORMATS))
    losses = StreamLosses()
    first, second = (Http2Connection(protocol, losses) for _ in range(2))
    made = Raw()
    block = PREFACE + made.headers(REQUEST, 1, get("/private"), "END_STREAM")
    observed = Observed(protocol=protocol)
    observed.connection = first
    observed.see(REQUEST, block)
    other = Observed(protocol=protocol)
    other.connection = second
    # The same table indices on a connection whose table does not have them.
    other.see(REQUEST, PREFACE + made.headers(REQUEST, 1, get("/private"), "END_STREAM"))
    assert (first.outstanding, second.outstanding, second.lost) == (1, 0, 1)
    assert losses.reasons == {"header_unknown": 1}
