"""agent.protocols.http1: one record -> one call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import http_attributes as incubating
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)

from agent.errors import ConfigError, ProtocolError
from agent.model import Call, End, Exchange, Flag, Role
from agent.propagation import FORMATS, Extractor
from agent.protocols import PROTOCOLS, http1, http1_memo, http_semantics
from agent.protocols.http1 import Http1

FUZZ_DIRECTORY = Path(__file__).resolve().parents[1] / "fuzz"

V4 = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 9))
V6 = bytes.fromhex("20010db8000000000000000000000007")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
FINAL = (End.NEXT, End.CLOSED, End.RESET, End.TIMED_OUT, End.HANDED_OVER)


def exchange(request: bytes = GET, response: bytes = OK, **fields: object) -> Exchange:
    """A record as the kernel would make it of these bytes, all captured; ``fields`` replace what is given."""
    values: dict[str, object] = dict.fromkeys(Exchange.__struct_fields__, 0)
    total = fields.get("response_bytes", len(response))
    values |= {
        "role": Role.SERVER,
        "end": End.QUIET,
        "flags": Flag.FIRST | (Flag.TAIL_VALID if response else 0),
        "exchange_id": 1,
        "request_bytes": len(request),
        "response_bytes": total,
        "remote_port": 40000,
        "request_captured": len(request),
        "response_captured": len(response),
        "remote_address": V4,
        "tail": response[-8:].rjust(8, b"\0") if total == len(response) else b"xxxxxxxx",
        "request": request,
        "response": response,
    }
    values |= fields
    for name in ("role", "end", "flags"):
        values[name] = int(values[name])
    return Exchange(**values)


def parser(**options: object) -> Http1:
    return Http1(extractor=Extractor(FORMATS), **options)


def plain(call: Call) -> Call:
    """The call with all its attributes one by one."""
    return msgspec.structs.replace(call, attributes=call.all_attributes(), groups=())


def parse(request: bytes = GET, response: bytes = OK, *, options: dict[str, object] | None = None, **fields) -> Call:
    """Parse twice: the second answer comes from the memos and has to be the same."""
    http = parser(**(options or {}))
    record = exchange(request, response, **fields)
    first = http.parse(record)
    second = http.parse(record)
    assert plain(second) == first
    return first


def attributes(*args, **kwargs) -> dict[str, object]:
    call = parse(*args, **kwargs)
    result = dict(call.attributes)
    assert len(result) == len(call.attributes), "a key came twice"
    return result


PEER = {"network.peer.address": "10.0.0.9", "network.peer.port": 40000}
ANSWERED = {"http.response.status_code": 200, "http.response.body.size": 2}
SERVER = {**PEER, **ANSWERED, "client.address": "10.0.0.9", "url.scheme": "http", "network.protocol.version": "1.1"}
CLIENT = {**PEER, **ANSWERED, "network.protocol.version": "1.1"}

GOLDEN = {
    "origin form": (
        Role.SERVER,
        b"GET /a/b?x=1&sig=abc HTTP/1.1\r\nHost: shop.example:8080\r\nUser-Agent: curl/8\r\n\r\n",
        "GET",
        {
            **SERVER,
            "http.request.method": "GET",
            "url.path": "/a/b",
            "url.query": "x=1&sig=REDACTED",
            "server.address": "shop.example",
            "server.port": 8080,
            "user_agent.original": "curl/8",
        },
    ),
    "origin form, client": (
        Role.CLIENT,
        b"GET /a/b?x=1&sig=abc HTTP/1.1\r\nHost: shop.example:8080\r\nUser-Agent: curl/8\r\n\r\n",
        "GET",
        {
            **CLIENT,
            "http.request.method": "GET",
            "url.full": "http://shop.example:8080/a/b?x=1&sig=REDACTED",
            "server.address": "shop.example",
            "server.port": 8080,
            "user_agent.original": "curl/8",
        },
    ),
    "no Host": (
        Role.SERVER,
        b"GET / HTTP/1.0\r\n\r\n",
        "GET",
        {**SERVER, "http.request.method": "GET", "url.path": "/", "network.protocol.version": "1.0"},
    ),
    "no Host, client": (
        Role.CLIENT,
        b"GET /x HTTP/1.0\r\n\r\n",
        "GET",
        {
            **CLIENT,
            "http.request.method": "GET",
            "url.full": "http://10.0.0.9:40000/x",
            "server.address": "10.0.0.9",
            "server.port": 40000,
            "network.protocol.version": "1.0",
        },
    ),
    "malformed Host is no Host": (
        Role.CLIENT,
        b"GET /x HTTP/1.1\r\nHost: user:pw@a\r\n\r\n",
        "GET",
        {
            **CLIENT,
            "http.request.method": "GET",
            "url.full": "http://10.0.0.9:40000/x",
            "server.address": "10.0.0.9",
            "server.port": 40000,
        },
    ),
    "IPv6 Host with port": (
        Role.SERVER,
        b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:9000\r\n\r\n",
        "GET",
        {
            **SERVER,
            "http.request.method": "GET",
            "url.path": "/",
            "server.address": "2001:db8::1",
            "server.port": 9000,
        },
    ),
    "IPv6 Host, client, default port": (
        Role.CLIENT,
        b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n",
        "GET",
        {
            **CLIENT,
            "http.request.method": "GET",
            "url.full": "http://[::1]/",
            "server.address": "::1",
            "server.port": 80,
        },
    ),
    "absolute form wins over Host": (
        Role.SERVER,
        b"GET http://u:p@origin.example/p?q=1 HTTP/1.1\r\nHost: proxy:3128\r\n\r\n",
        "GET",
        {
            **SERVER,
            "http.request.method": "GET",
            "url.path": "/p",
            "url.query": "q=1",
            "server.address": "origin.example",
            "server.port": 80,
        },
    ),
    "absolute form, client, credentials": (
        Role.CLIENT,
        b"GET HTTPS://u:p@origin.example/p?sig=1#f HTTP/1.1\r\nHost: proxy:3128\r\n\r\n",
        "GET",
        {
            **CLIENT,
            "http.request.method": "GET",
            "url.full": "https://REDACTED:REDACTED@origin.example/p?sig=REDACTED",
            "server.address": "origin.example",
            "server.port": 443,
        },
    ),
    "authority form": (
        Role.SERVER,
        b"CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example\r\n\r\n",
        "CONNECT",
        {
            **{key: value for key, value in SERVER.items() if key != "http.response.body.size"},
            "http.request.method": "CONNECT",
            "url.path": "",
            "server.address": "db.example",
            "server.port": 5432,
        },
    ),
    "authority form, client": (
        Role.CLIENT,
        b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n",
        "CONNECT",
        {
            **{key: value for key, value in CLIENT.items() if key != "http.response.body.size"},
            "http.request.method": "CONNECT",
            "url.full": "http://[::1]:443",
            "server.address": "::1",
            "server.port": 443,
        },
    ),
    "asterisk form": (
        Role.SERVER,
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        "OPTIONS",
        {**SERVER, "http.request.method": "OPTIONS", "url.path": "*", "server.address": "a", "server.port": 80},
    ),
    "asterisk form, client": (
        Role.CLIENT,
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        "OPTIONS",
        {
            **CLIENT,
            "http.request.method": "OPTIONS",
            "url.full": "http://a",
            "server.address": "a",
            "server.port": 80,
        },
    ),
    "unknown method": (
        Role.SERVER,
        b"get /x HTTP/1.1\r\n\r\n",
        "HTTP",
        {**SERVER, "http.request.method": "_OTHER", "http.request.method_original": "get", "url.path": "/x"},
    ),
    "request body": (
        Role.SERVER,
        b"POST /x HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        "POST",
        {**SERVER, "http.request.method": "POST", "url.path": "/x", "http.request.body.size": 5},
    ),
    "chunked request body": (
        Role.SERVER,
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "POST",
        {**SERVER, "http.request.method": "POST", "url.path": "/x"},
    ),
    "bare LF, blank lines in front, folded and odd white space": (
        Role.SERVER,
        b"\r\n\nGET /x HTTP/1.1\nHost:a\n\tfolded\r\nUser-Agent: \t me \t\n\nbody",
        "GET",
        {
            **SERVER,
            "http.request.method": "GET",
            "url.path": "/x",
            "server.address": "a",
            "server.port": 80,
            "user_agent.original": "me",
        },
    ),
    "bytes that are not text": (
        Role.SERVER,
        b"GET /\xff\xc3\xa9 HTTP/1.1\r\nCookie: \x00\xff\r\nUser-Agent: a\x00b\xffc\r\n\r\n",
        "GET",
        {
            **SERVER,
            "http.request.method": "GET",
            "url.path": "/\ufffdé",
            "user_agent.original": "a\ufffdb\ufffdc",
        },
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str) -> None:
    """Each form of a request gives exactly these attributes and this name."""
    role, request, name, expected = GOLDEN[case]
    call = parse(request, role=role)
    assert dict(call.attributes) == expected
    assert (call.name, call.error, call.complete) == (name, False, True)


def test_attribute_names_are_the_released_ones() -> None:
    """Every key of the golden table is a constant of the semantic-conventions package; so are the known methods."""
    modules = (
        http_attributes,
        incubating,
        url_attributes,
        server_attributes,
        client_attributes,
        network_attributes,
        user_agent_attributes,
        error_attributes,
    )
    known = {value for module in modules for key, value in vars(module).items() if key.isupper()}
    used = {key for _, _, _, expected in GOLDEN.values() for key in expected} | {"error.type", "http.route"}
    assert used <= known
    assert {value.value for value in incubating.HttpRequestMethodValues} == {
        *(method.decode() for method in http_semantics.KNOWN_METHODS),
        "_OTHER",
    }
    assert http_attributes.HTTP_REQUEST_HEADER_TEMPLATE == "http.request.header"
    assert http_attributes.HTTP_RESPONSE_HEADER_TEMPLATE == "http.response.header"


def test_the_peer_is_shown_in_its_own_family() -> None:
    """IPv4-mapped addresses are shown as IPv4, others as IPv6, an unknown one not at all."""
    assert attributes(remote_address=V6)["network.peer.address"] == "2001:db8::7"
    assert attributes(remote_address=V4)["client.address"] == "10.0.0.9"
    unknown = attributes(remote_address=bytes(16), remote_port=0)
    assert not {"network.peer.address", "network.peer.port", "client.address"} & unknown.keys()
    no_host = attributes(b"GET / HTTP/1.1\r\n\r\n", role=Role.CLIENT, remote_address=V6, remote_port=80)
    assert no_host["url.full"] == "http://[2001:db8::7]/"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"X-Forwarded-For: 192.0.2.1, 10.1.1.1", "192.0.2.1"),
        (b"X-Forwarded-For: 192.0.2.1:4711", "192.0.2.1"),
        (b"X-Forwarded-For: 2001:db8::1", "2001:db8::1"),
        (b"X-Forwarded-For: [2001:db8::1]:99", "2001:db8::1"),
        (b"X-Forwarded-For: unknown", "10.0.0.9"),
        (b"X-Forwarded-For: <script>", "10.0.0.9"),
        (b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: 192.0.2.2", "192.0.2.1"),
        (b"Forwarded: for=192.0.2.60;proto=http;by=203.0.113.43", "192.0.2.60"),
        (b'Forwarded: proto=http; For="[2001:db8:cafe::17]:4711", for=1.1.1.1', "2001:db8:cafe::17"),
        (b"Forwarded: for=_hidden", "_hidden"),
        (b"Forwarded: for=unknown\r\nX-Forwarded-For: 192.0.2.1", "192.0.2.1"),
        (b"Forwarded: by=1.2.3.4\r\nX-Forwarded-For: 192.0.2.1", "192.0.2.1"),
    ],
)
def test_client_address(fields: bytes, expected: str) -> None:
    """The first element of Forwarded, else of X-Forwarded-For, else the peer; never without the peer's own address."""
    request = b"GET / HTTP/1.1\r\n" + fields + b"\r\n\r\n"
    result = attributes(request)
    assert result["client.address"] == expected
    assert result["network.peer.address"] == "10.0.0.9"
    assert "client.address" not in attributes(request, role=Role.CLIENT)


@pytest.mark.parametrize(
    ("role", "status", "error"),
    [
        (Role.SERVER, 404, None),
        (Role.SERVER, 500, "500"),
        (Role.SERVER, 302, None),
        (Role.CLIENT, 404, "404"),
        (Role.CLIENT, 503, "503"),
        (Role.CLIENT, 304, None),
    ],
)
def test_status_decides_the_error(role: Role, status: int, error: str | None) -> None:
    """SERVER: 5xx is an error; CLIENT: 4xx too; error.type is the code."""
    call = parse(response=b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status, role=role)
    assert call.error is (error is not None)
    assert dict(call.attributes).get("error.type") == error
    assert dict(call.attributes)["http.response.status_code"] == status


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TRAILERS = b"HTTP/1.1 200 OK\r\nTrailer: X\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n"
WHOLE = {
    "length reached": (GET, OK, {}, True),
    "length missed by one": (GET, OK[:-1], {}, False),
    "length passed": (GET, OK + b"!", {}, True),
    "length beyond the capture": (GET, OK[:-1], {"response_bytes": len(OK)}, True),
    "length zero": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", {}, True),
    "length twice, equal": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\nContent-Length: 1\r\n\r\nx", {}, True),
    "length twice, unequal": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", {}, False),
    "length malformed": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nxx", {}, False),
    "HEAD": (b"HEAD / HTTP/1.1\r\n\r\n", OK[:-2], {}, True),
    "HEAD, unfinished head": (b"HEAD / HTTP/1.1\r\n\r\n", OK[:-4], {}, False),
    "204": (GET, b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", {}, True),
    "304": (GET, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", {}, True),
    "101": (GET, b"HTTP/1.1 101 Switching Protocols\r\n\r\n", {}, True),
    "CONNECT 200": (b"CONNECT a:1 HTTP/1.1\r\n\r\n", PLAIN, {}, True),
    "CONNECT 403": (b"CONNECT a:1 HTTP/1.1\r\n\r\n", PLAIN.replace(b"200", b"403"), {}, False),
    "handed over": (GET, PLAIN, {"end": End.HANDED_OVER}, True),
    "last chunk": (GET, CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", {}, True),
    "only the last chunk": (GET, CHUNKED + b"0\r\n\r\n", {}, True),
    "size that ends in 0": (GET, CHUNKED + b"10\r\n\r\n", {}, False),
    "no last chunk": (GET, CHUNKED + b"2\r\nhi\r\n", {}, False),
    "trailers": (GET, TRAILERS + b"0\r\nX: y\r\n\r\n", {}, False),
    "last chunk, captured only in the tail": (
        GET,
        CHUNKED,
        {"response_bytes": 5000, "tail": b"x\r\n0\r\n\r\n"},
        True,
    ),
    "last chunk, tail not valid": (
        GET,
        CHUNKED,
        {"response_bytes": 5000, "tail": b"x\r\n0\r\n\r\n", "flags": Flag.RESPONSE_TRUNCATED},
        False,
    ),
    "chunked wins over length": (
        GET,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
        {},
        False,
    ),
    "until close, still open": (GET, PLAIN + b"abc", {}, False),
    "until close, FIN seen by the client": (
        GET,
        PLAIN + b"abc",
        {"role": Role.CLIENT, "flags": Flag.PEER_CLOSED},
        True,
    ),
    "until close, FIN of the client": (GET, PLAIN + b"abc", {"flags": Flag.PEER_CLOSED}, False),
    "no response": (GET, b"", {}, False),
    "only interim": (GET, b"HTTP/1.1 100 Continue\r\n\r\n", {}, False),
    "interim, then final": (GET, b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 C\r\n\r\n" + OK, {}, True),
    "bare LF": (GET, OK.replace(b"\r\n", b"\n"), {}, True),
    "one bare LF": (GET, OK.replace(b"OK\r\n", b"OK\n"), {}, True),
    "head cut at the cap": (GET, OK[:36], {"response_bytes": 5000}, False),
    "head cut, HEAD, blank line at the end": (
        b"HEAD / HTTP/1.1\r\n\r\n",
        OK[:30],
        {"response_bytes": 500, "tail": b": abc\r\n\r\n"[-8:]},
        True,
    ),
    "head cut, HEAD, no blank line yet": (b"HEAD / HTTP/1.1\r\n\r\n", OK[:30], {"response_bytes": 500}, False),
    "head cut behind chunked": (GET, CHUNKED[:-2], {"response_bytes": 5000, "tail": b"x\r\n0\r\n\r\n"}, True),
    "status line not whole": (GET, b"HTTP/1.1 20", {}, False),
}


@pytest.mark.parametrize("case", WHOLE)
def test_complete_of_a_provisional_record(case: str) -> None:
    """A response is whole by RFC 9112 section 6.3, not before; a provisional record carries no reason for an error."""
    request, response, fields, expected = WHOLE[case]
    call = parse(request, response, **fields)
    assert call.complete is expected
    if b"403" not in response:
        assert not call.error
        assert "error.type" not in dict(call.attributes)


@pytest.mark.parametrize(
    "case", [case for case, row in WHOLE.items() if row[3] and "end" not in row[2] and "FIN" not in case]
)
@pytest.mark.parametrize("end", FINAL)
@pytest.mark.parametrize("role", Role)
def test_a_whole_response_is_no_error_however_the_connection_ends(case: str, end: End, role: Role) -> None:
    """Once the response is whole, a reset, a close or a timeout of the connection is none of the exchange's."""
    request, response, fields, _ = WHOLE[case]
    call = parse(request, response, **{**fields, "end": end, "role": role})
    assert (call.error, call.complete) == (False, True)


SHORT = {
    "none": b"",
    "head only begun": b"HTTP/1.1 200 OK\r\nContent-",
    "short": OK[:-1],
    "chunked": CHUNKED + b"2\r\nhi\r\n",
}


@pytest.mark.parametrize("response", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize(
    ("role", "end", "flags", "reason"),
    [
        (Role.SERVER, End.TIMED_OUT, 0, "timeout"),
        (Role.CLIENT, End.TIMED_OUT, Flag.PEER_CLOSED, "timeout"),
        (Role.SERVER, End.RESET, 0, "client_disconnect"),
        (Role.SERVER, End.CLOSED, Flag.PEER_CLOSED, "client_disconnect"),
        (Role.SERVER, End.CLOSED, 0, "incomplete_response"),
        (Role.CLIENT, End.RESET, 0, "connection_reset"),
        (Role.CLIENT, End.RESET, Flag.PEER_CLOSED, "connection_reset"),
        (Role.CLIENT, End.CLOSED, Flag.PEER_CLOSED, "incomplete_response"),
        (Role.CLIENT, End.CLOSED, 0, "client_disconnect"),
    ],
)
def test_error_type_of_a_final_record(response: bytes, role: Role, end: End, flags: int, reason: str) -> None:
    """What cut a response short is named from the process's own point of view; a status that came is kept."""
    call = parse(response=response, role=role, end=end, flags=Flag.TAIL_VALID | flags)
    result = dict(call.attributes)
    assert (result["error.type"], call.error, call.complete) == (reason, True, False)
    assert result.get("http.response.status_code") == (200 if response else None)
    assert "http.response.body.size" not in result


@pytest.mark.parametrize("role", Role)
def test_the_next_request_ends_the_exchange(role: Role) -> None:
    """A reused connection proves that an unframed response was whole, but not one that is short of its framing."""
    for trailers in (TRAILERS, CHUNKED):
        assert parse(response=trailers + b"0\r\nX: y\r\n\r\n", role=role, end=End.NEXT).complete
    assert parse(response=PLAIN, role=role, end=End.NEXT).complete
    for unfinished in (OK[:-1], b"", CHUNKED + b"2\r\nhi\r\n"):
        call = parse(response=unfinished, role=role, end=End.NEXT)
        assert not call.complete
        assert not call.error, "a client that goes on with its next request has not seen a failure"
        assert ("spanloom.response.overlapped", True) in call.attributes


def test_an_overlapped_response_is_no_trait_of_its_request() -> None:
    """What is remembered of a request says nothing of how its response ended."""
    parser = Http1(extractor=Extractor(FORMATS))
    for _ in range(2):
        overlapped = parser.parse(exchange(response=OK[:-1], end=End.NEXT))
        assert ("spanloom.response.overlapped", True) in overlapped.all_attributes()
    whole = parser.parse(exchange(response=OK, end=End.NEXT))
    assert "spanloom.response.overlapped" not in dict(whole.all_attributes())


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("flags", [0, Flag.PEER_CLOSED])
def test_a_response_until_the_close(role: Role, flags: int) -> None:
    """It is whole at the close, with the size of what came, whoever closed; only a reset or a timeout cuts it short."""
    request = b"GET / HTTP/1.0\r\n\r\n"
    closed = parse(request, PLAIN + b"abc", role=role, end=End.CLOSED, flags=flags)
    assert (closed.complete, closed.error, dict(closed.attributes)["http.response.body.size"]) == (True, False, 3)
    reset = parse(request, PLAIN + b"abc", role=role, end=End.RESET, flags=flags)
    assert (reset.complete, reset.error) == (False, True)


def test_announced_trailers_count_at_the_close() -> None:
    """Behind trailers the last chunk is out of sight; a blank line at the close is then enough, else it is not."""
    assert parse(response=TRAILERS + b"0\r\nX: y\r\n\r\n", end=End.CLOSED).complete
    assert not parse(response=CHUNKED + b"0\r\nX: y\r\n\r\n", end=End.CLOSED).complete
    assert not parse(response=TRAILERS + b"0\r\nX: y\r\n", end=End.CLOSED).complete


def test_a_response_head_cut_at_the_cap_has_the_benefit_of_the_doubt() -> None:
    """Its length is unknown: final and closed is whole unless the bytes cannot suffice; a reset is an error."""
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nSet-Coo"
    assert parse(response=cut, response_bytes=400, end=End.CLOSED).complete
    assert not parse(response=cut, response_bytes=len(cut) + 99, end=End.CLOSED).complete
    assert attributes(response=cut, response_bytes=400, end=End.RESET)["error.type"] == "client_disconnect"
    assert attributes(response=cut, response_bytes=400, end=End.CLOSED)["http.response.status_code"] == 200


def test_an_error_status_outranks_what_cut_the_response_short() -> None:
    """A 500 whose body is cut short stays a 500: that is the cause worth grouping by."""
    call = parse(response=b"HTTP/1.1 500 E\r\nContent-Length: 9\r\n\r\n", end=End.CLOSED)
    assert dict(call.attributes)["error.type"] == "500"
    assert (call.error, call.complete) == (True, False)


def test_a_request_cut_at_the_cap_is_parsed_as_far_as_it_goes() -> None:
    """Whole lines count, the last partial one does not, and the span says that the head was truncated."""
    whole = b"GET /a HTTP/1.1\r\nHost: h\r\ntraceparent: 00-%s-%s-01\r\n" % (b"1" * 32, b"2" * 16)
    call = parse(whole + b"User-Agent: cur", flags=Flag.REQUEST_TRUNCATED | Flag.TAIL_VALID, request_bytes=9000)
    result = dict(call.attributes)
    assert result["spanloom.request.head_truncated"] is True
    assert result["server.address"] == "h"
    assert "user_agent.original" not in result
    assert "http.request.body.size" not in result
    assert call.context is not None
    assert call.context.trace_id == bytes.fromhex("11" * 16)
    assert "spanloom.request.head_truncated" not in attributes(whole + b"\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "flags", "reason"),
    [
        (b"", 0, "no_request"),
        (b"\r\n\r\n", 0, "no_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", 0, "incomplete_request"),
        (b"GET / HTTP/1.1\r\n", 0, "incomplete_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 0, "binary_head"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 0, "binary_head"),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", 0, "binary_head"),
        (b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n", 0, "binary_head"),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 0, "bad_header"),
        (b"GET / HTTP/1.1\r\nAb\r\n\r\n", 0, "bad_header"),
        (b"GET / HTTP/1.1\r\nHost\r\n\r\n", 0, "bad_header"),
        (b"GET / HTTP/1.1\r\n: b\r\n\r\n", 0, "bad_header"),
        (b"GET  / HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"GET / HTTP/2.0\r\n\r\n", 0, "bad_request_line"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, "bad_request_line"),
        (b"GET / http/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"GET /\r\n\r\n", 0, "bad_request_line"),
        (b"GET example HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"GET http:/// HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"CONNECT /x HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"CONNECT host HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"%s / HTTP/1.1\r\n\r\n" % (b"A" * 33), 0, "bad_request_line"),
        (b"G(T / HTTP/1.1\r\n\r\n", 0, "bad_request_line"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 0, "bad_request_line"),
    ],
)
def test_what_is_not_http_is_refused(request_bytes: bytes, flags: int, reason: str) -> None:
    """Garbage, other protocols and half requests make no span; the reason is one of a few names. Twice the same."""
    http = parser()
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            http.parse(exchange(request_bytes, flags=flags))
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "response",
    [b"SSH-2.0\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 20\r\n\r\n", b"\0", b"\r\n\r\n\r\n", b"HTTX", b"x" * 99],
)
def test_a_response_that_is_not_http_is_refused(response: bytes) -> None:
    """A request that is HTTP does not make an answer HTTP."""
    with pytest.raises(ProtocolError) as caught:
        parser().parse(exchange(response=response))
    assert caught.value.reason == "bad_status_line"


def test_the_context_of_each_format_is_found_among_other_fields() -> None:
    """The extractor gets the raw values, also of repeated fields, and its answer is handed on."""
    trace, span = b"a" * 32, b"b" * 16
    call = parse(
        b"GET / HTTP/1.1\r\nHost: a\r\nTRACEPARENT:00-%s-%s-01\r\nTracestate: a=1\r\ntracestate: b=2\r\n"
        b"b3: %s-%s-1\r\nX-Request-Id: r-1\r\n\r\n" % (trace, span, b"c" * 32, span)
    )
    assert call.context is not None
    assert (call.context.trace_id, call.context.span_id) == (bytes.fromhex("aa" * 16), bytes.fromhex("bb" * 8))
    assert call.context.trace_state == "a=1,b=2"
    assert [other.format for other in call.other_contexts] == ["b3"]
    assert call.request_id == "r-1"
    twice = b"GET / HTTP/1.1\r\ntraceparent: 00-%s-%s-01\r\ntraceparent: 00-%s-%s-01\r\n\r\n" % (
        trace,
        span,
        trace,
        span,
    )
    assert parse(twice).context is None


_A, _B = (b"00-%032x-%016x-01" % (number, number) for number in (0xA, 0xB))


@pytest.mark.parametrize(
    ("fields", "trace_id"),
    [
        (b"traceparent: %b\r\n" % _A, 0xA),
        (b"Traceparent: %b\r\n" % _A, 0xA),
        (b"TRACEPARENT: %b\r\n" % _A, 0xA),
        (b"x-original-traceparent: %b\r\ntraceparent: %b\r\n" % (_A, _B), 0xB),
        (b"x-log: traceparent: %b\r\ntraceparent: %b\r\n" % (_A, _B), 0xB),
        (b"x-original-traceparent: %b\r\n" % _A, None),
        (b"traceparent: %b\r\ntraceparent: %b\r\n" % (_A, _B), None),
    ],
)
def test_the_trace_of_a_repeated_request(fields: bytes, trace_id: int | None) -> None:
    """A request that was seen before is in the trace that its own header names, not in one that looks like it."""
    http = parser()
    request = b"GET /again HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
    for _ in range(3):
        context = http.parse(exchange(request)).context
        assert (int.from_bytes(context.trace_id, "big") if context else None) == trace_id


def test_a_decision_without_ids_is_kept_for_each_request() -> None:
    """A request that carries only a sampling decision says so each time it comes; one without says nothing."""
    http = parser()
    for fields, decision in ((b"b3: 0\r\n", False), (b"b3: 1\r\n", True), (b"", None)):
        for _ in range(2):
            call = http.parse(exchange(b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"))
            assert (call.context, call.decision) == (None, decision)


def test_a_target_that_was_cut_inside_its_authority() -> None:
    """What may be half of a password is not exported; a path that was cut is, as far as it goes."""
    cut = Flag.FIRST | Flag.REQUEST_TRUNCATED
    for target in (b"http://user:1234", b"http://us", b"http:"):
        with pytest.raises(ProtocolError, match="incomplete_request"):
            parse(b"GET " + target, flags=cut, request_bytes=5000, role=Role.CLIENT)
    call = parse(b"GET http://user:1234@host/pa", flags=cut, request_bytes=5000, role=Role.CLIENT)
    assert dict(call.attributes)["url.full"] == "http://REDACTED:REDACTED@host/pa"


def test_called_peers_are_named() -> None:
    """Clients name what they called, also in repeated requests, until the names are to be forgotten; servers do not."""
    asked = []

    def names(address: bytes, port: int):
        asked.append(port)
        return (("service.peer.name", f"service-{port}-{len(asked)}"),)

    http = parser(names_of_peer=names)
    for role in (Role.SERVER, Role.CLIENT):
        for _ in range(3):
            found = dict(http.parse(exchange(role=role, remote_port=80)).all_attributes()).get("service.peer.name")
            assert found == (None if role is Role.SERVER else "service-80-1" if len(asked) == 1 else "service-80-2")
    assert len(asked) == 2, "once for the first request, once for its repetitions"
    assert dict(http.parse(exchange(role=Role.CLIENT, remote_port=81)).all_attributes())["service.peer.name"] == (
        "service-81-3"
    )
    http.forget_peers()
    assert dict(http.parse(exchange(role=Role.CLIENT, remote_port=80)).all_attributes())["service.peer.name"] == (
        "service-80-4"
    )


@pytest.mark.parametrize("end", End)
def test_bytes_that_begin_no_response(end: End) -> None:
    """An exchange that ended with nothing but other bytes is no HTTP; behind a running response they are its rest."""
    one = exchange(response=b"", flags=Flag.FIRST | Flag.FOREIGN, end=end)
    if end in (End.OPEN, End.QUIET, End.NEXT):
        assert "error.type" not in dict(parser().parse(one).attributes)
    else:
        with pytest.raises(ProtocolError, match="foreign_response"):
            parser().parse(one)


def test_the_request_id_is_bounded() -> None:
    """A hostile x-request-id does not become a large key."""
    assert (
        len(parse(b"GET / HTTP/1.1\r\nx-request-id: %s\r\n\r\n" % (b"x" * 999)).request_id)
        == http_semantics.REQUEST_ID_BYTES
    )
    assert parse().request_id == ""


def test_captured_headers_are_arrays_under_their_lower_case_name() -> None:
    """Only listed headers are exported; repeated ones in order; URLs in them are redacted."""
    result = attributes(
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: one\r\nx-tenant: two\r\nX-Other: no\r\n"
        b"Referer: http://u:p@a/?sig=1\r\n\r\n",
        b'HTTP/1.1 302 F\r\nLocation: /next?X-Amz-Signature=s#t\r\nETag: "\xff"\r\nContent-Length: 0\r\n\r\n',
        options={"request_headers": ["X-Tenant", "referer", "host"], "response_headers": ["location", "ETag"]},
    )
    assert result["http.request.header.x-tenant"] == ("one", "two")
    assert result["http.request.header.host"] == ("a",)
    assert result["http.request.header.referer"] == ("http://REDACTED:REDACTED@a/?sig=REDACTED",)
    assert result["http.response.header.location"] == ("/next?X-Amz-Signature=REDACTED",)
    assert result["http.response.header.etag"] == ('"\ufffd"',)
    assert not any("x-other" in key for key in result)


SECRET_FIELDS = (
    "Authorization",
    "Proxy-Authorization",
    "Cookie",
    "Set-Cookie",
    "X-Api-Key",
    "Api-Key",
    "ApiKey",
    "X-Auth-Token",
    "X-Amz-Security-Token",
    "X-Csrf-Token",
    "My-Api-Key",
    "Client-Secret",
)


def mentions(call: Call, secret: str) -> bool:
    return secret in repr((call.name, call.all_attributes(), call.request_id))


@given(
    name=st.sampled_from(SECRET_FIELDS),
    capture=st.lists(st.sampled_from((*SECRET_FIELDS, "accept", "host", "x-tenant")), max_size=12),
    case=st.sampled_from((str, str.upper, str.lower)),
    role=st.sampled_from(Role),
    end=st.sampled_from(End),
    cut=st.integers(0, 40),
)
@settings(max_examples=50, deadline=None)
def test_secrets_are_never_exported(name, capture, case, role, end, cut) -> None:
    """Whatever list of headers is configured, no value of a credential header gets into a call."""
    secret = "s3cr3tVALUE"
    field = f"{case(name)}: {secret}\r\n".encode()
    request = b"GET /a HTTP/1.1\r\nHost: h\r\n" + field + b"Accept: */*\r\n\r\n"
    response = b"HTTP/1.1 200 OK\r\n" + field + b"Content-Length: 0\r\n\r\n"
    http = parser(request_headers=capture, response_headers=[case(each) for each in capture])
    truncated = request[: len(request) - cut]
    flags = Flag.REQUEST_TRUNCATED if cut else 0
    for _ in range(2):
        call = http.parse(exchange(truncated, response, role=role, end=end, flags=flags))
        assert not mentions(call, secret)
    assert set(http.refused_headers) == {each.lower() for each in capture if each in SECRET_FIELDS}
    assert secret not in repr([getattr(http, key) for key in vars(http)]), "kept in a memo"
    assert secret.encode() not in b"".join(http._request_field.__self__) + b"".join(http._response_field.__self__)


def test_the_dangerous_setting_is_needed_and_enough() -> None:
    """Credential headers are exported only with allow_secret_headers, so the property above can fail."""
    request = b"GET / HTTP/1.1\r\nAuthorization: s3cr3t\r\n\r\n"
    assert not mentions(parse(request, options={"request_headers": ["authorization"]}), "s3cr3t")
    options = {"request_headers": ["authorization"], "allow_secret_headers": True}
    assert attributes(request, options=options)["http.request.header.authorization"] == ("s3cr3t",)


def test_configured_query_keys_are_used_in_both_roles() -> None:
    """The parser hands its list of keys to the redaction."""
    options = {"redact_query_keys": ["code"]}
    request = b"GET /?code=1&sig=2 HTTP/1.1\r\nHost: a\r\n\r\n"
    assert attributes(request, options=options)["url.query"] == "code=REDACTED&sig=2"
    assert attributes(request, options=options, role=Role.CLIENT)["url.full"] == "http://a/?code=REDACTED&sig=2"


def test_routes_go_into_name_and_attribute_guesses_only_into_the_name() -> None:
    """http.route comes from configured patterns and only on server spans; a guess is opt-in."""
    request = b"GET /users/42?x=1 HTTP/1.1\r\n\r\n"
    options: dict[str, object] = {"route_patterns": ["/users/{id}"]}
    call = parse(request, options=options)
    assert (call.name, dict(call.attributes)["http.route"]) == ("GET /users/{id}", "/users/{id}")
    call = parse(request, options=options, role=Role.CLIENT)
    assert call.name == "GET /users/{id}"
    assert "http.route" not in dict(call.attributes)
    call = parse(request, options={"guess_routes": True})
    assert call.name == "GET /users/{id}"
    assert "http.route" not in dict(call.attributes)
    assert parse(request).name == "GET"
    assert parse(b"BREW /users/4 HTTP/1.1\r\n\r\n", options=options).name == "HTTP /users/{id}"
    with pytest.raises(ConfigError):
        parser(route_patterns=["users"])


def test_one_exchange_does_not_leak_into_another() -> None:
    """Memos are keyed by everything they depend on: role, Host, peer, method and status."""
    http = parser()
    host = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    records = [
        exchange(request, response, role=role, remote_address=address, remote_port=port)
        for request in (host, host.replace(b": a", b": b"), b"GET / HTTP/1.1\r\n\r\n", host.replace(b"GET", b"HEAD"))
        for response in (OK, OK.replace(b"200", b"404"), PLAIN, b"")
        for role in Role
        for address, port in ((V4, 1), (V6, 2))
    ]
    for record in records * 2:
        assert plain(http.parse(record)) == parser().parse(record)


def test_memos_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile variety empties memos instead of growing them; answers stay right."""
    for module, name in (
        (http1_memo, "MEMO_LINES"),
        (http1, "MEMO_TARGETS"),
        (http1, "MEMO_HEADS"),
        (http_semantics, "MEMO_HOSTS"),
        (http_semantics, "MEMO_PEERS"),
    ):
        monkeypatch.setattr(module, name, 8)
    http = parser()
    for number in range(100):
        request = b"GET /%d HTTP/1.1\r\nHost: h%d\r\nUser-Agent: u%d\r\nX-%d: 1\r\n\r\n" % ((number,) * 4)
        response = b"HTTP/1.1 200 R%d\r\nServer: %d\r\nContent-Length: 0\r\n\r\n" % (number, number)
        result = dict(http.parse(exchange(request, response, remote_port=number)).attributes)
        assert result["url.path"] == f"/{number}"
        assert result["user_agent.original"] == f"u{number}"
        http.parse(exchange(request, response, role=Role.CLIENT, remote_address=number.to_bytes(16, "big")))
    memos = [value for value in vars(http).values() if isinstance(value, dict)]
    memos += [http._request_field.__self__, http._response_field.__self__, http._request_field.__self__._names]
    assert len(memos) >= 10
    assert all(len(memo) <= 8 for memo in memos)
    long = b"GET /%s HTTP/1.1\r\nHost: h\r\nUser-Agent: %s\r\n\r\n" % (b"p" * 2000, b"u" * 2000)
    assert len(dict(http.parse(exchange(long)).attributes)["user_agent.original"]) == 2000
    assert all(len(key) < 300 for memo in memos for key in memo if isinstance(key, bytes))
    assert not any(len(line) > http1.MEMO_TARGET_BYTES for line, _ in http._server_targets)


def test_every_prefix_of_an_exchange_is_parsed_or_refused() -> None:
    """Cut at any byte, a request is refused as incomplete or parsed alike, a response never errs while provisional."""
    request = b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    head_bytes = request.index(b"\r\n\r\n") + 4
    http = parser()
    for size in range(len(request) + 1):
        if size < head_bytes:
            with pytest.raises(ProtocolError):
                http.parse(exchange(request[:size]))
        else:
            call = http.parse(exchange(request[:size]))
            assert dict(call.attributes).get("http.request.body.size", 0) == size - head_bytes
    for size in range(len(OK) + 1):
        call = http.parse(exchange(response=OK[:size]))
        assert call.complete is (size == len(OK))
        assert not call.error


def test_bytes_behind_the_head_are_not_read() -> None:
    """A body that looks like a head changes nothing."""
    body = b"X: y\r\nHost: evil\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
    request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert attributes(request + body) == {**attributes(request), "http.request.body.size": len(body)}


def test_http1_is_among_the_protocols() -> None:
    """The ordered tuple is what the pipeline asks."""
    assert [protocol.__name__ for protocol in PROTOCOLS] == ["Http1", "Http2"]


def load_fuzz_target():
    spec = importlib.util.spec_from_file_location("fuzz_http1", FUZZ_DIRECTORY / "fuzz_http1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = load_fuzz_target()
SEEDS = sorted((FUZZ_DIRECTORY / "corpus" / "http1").iterdir())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_the_fuzz_corpus_holds(seed: Path) -> None:
    """Every seed and every crash of the past passes the fuzz target's checks."""
    FUZZ.check(seed.read_bytes())


def test_the_fuzz_corpus_is_there() -> None:
    """An empty corpus would make the test above vacuous; most seeds are HTTP."""
    http = parser()
    assert len(SEEDS) >= 12
    assert sum(FUZZ.parses(http, seed.read_bytes()) for seed in SEEDS) >= 8


HEADISH = st.lists(
    st.sampled_from(
        (
            *(b"GET / HTTP/1.1", b"HTTP/1.1 200 OK", b"HTTP/1.1 100 C", b"Host: a", b"Content-Length: 1", b"\r\n"),
            *(
                b"Transfer-Encoding: chunked",
                b"\n",
                b"0\r\n\r\n",
                b" x",
                b":",
                b"traceparent: 00",
                b"\0",
                b"\xff",
                b"HEAD",
            ),
            *(b"http://u:p@[::1]:1/?sig=1", b" ", b'Forwarded: for="', b"X-Forwarded-For: ,"),
        )
    )
    | st.binary(max_size=8),
    max_size=14,
).map(b"".join)


@given(
    request=st.binary(max_size=120) | HEADISH | HEADISH.map(b"GET / HTTP/1.1\r\n".__add__),
    response=st.binary(max_size=80) | HEADISH | HEADISH.map(b"HTTP/1.1 200 OK\r\n".__add__),
    numbers=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 512), min_size=6, max_size=6),
    address=st.binary(max_size=18),
    tail=st.binary(max_size=9),
)
@settings(max_examples=120, deadline=None)
def test_hostile_records_raise_the_protocol_error_and_nothing_else(request, response, numbers, address, tail) -> None:
    """Whatever the bytes, the numbers and the flags: a call that can be encoded, or ProtocolError."""
    names = ("role", "end", "flags", "request_bytes", "response_bytes", "remote_port")
    values = dict(zip(names, numbers, strict=True))
    values["remote_port"] &= 0xFFFF  # as wide as it is in the record: it becomes an attribute as it is
    record = exchange(request, response, remote_address=address, tail=tail, **values)
    FUZZ.check_record(record)


def test_a_target_beyond_the_cap_is_shown_as_far_as_it_goes() -> None:
    """A request line that was cut gives a flagged span when it was answered in HTTP, and is refused otherwise."""
    request = b"GET /" + b"a" * 1000
    call = parse(request, flags=Flag.FIRST | Flag.REQUEST_TRUNCATED, request_bytes=5000, end=End.NEXT)
    attributes = dict(call.attributes)
    assert attributes["url.path"] == "/" + "a" * 1000
    assert attributes["network.protocol.version"] == "1.1"
    assert attributes["http.response.status_code"] == 200
    assert attributes["spanloom.request.head_truncated"] is True
    for hostile, response in ((request, b""), (b"GET /\x00" + b"a" * 1000, OK)):
        with pytest.raises(ProtocolError):
            parse(hostile, response, flags=Flag.FIRST | Flag.REQUEST_TRUNCATED, request_bytes=5000, end=End.NEXT)
