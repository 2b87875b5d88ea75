"""Fuzz target of the HTTP/1 record parser: ``python tests/fuzz/fuzz_http1.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is twelve bytes of numbers (role, end, two of flags, four of extra request and four of extra response
bytes) and then the request's and the response's captured bytes, separated by the first FF FE FF. Out: an
AssertionError or any exception but ProtocolError is a finding; the same holds where the request is taken for one that
switched its connection to HTTP/2. The checks need no atheris, so that the unit tests can
replay the corpus.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    import msgspec

    from agent.errors import ProtocolError
    from agent.model import Call, Exchange, TraceContext
    from agent.propagation import FORMATS, Extractor
    from agent.protocols.http1 import Http1
    from agent.protocols.http1_stream import StreamLosses
    from agent.protocols.http2 import Http2
    from agent.protocols.http2_stream import Http2Connection

SEPARATOR = b"\xff\xfe\xff"
HEADER_BYTES = 12
REASONS = frozenset(
    (
        "no_request",
        "incomplete_request",
        "binary_head",
        "bad_request_line",
        "bad_header",
        "bad_status_line",
        "foreign_response",
    )
)
FAILURES = frozenset(("timeout", "connection_reset", "client_disconnect", "incomplete_response"))
CAPTURE = ("host", "x-tenant", "content-length", "referer", "authorization", "cookie")
PARSERS = (
    Http1(extractor=Extractor(FORMATS)),
    Http1(
        extractor=Extractor(FORMATS[::-1]),
        request_headers=CAPTURE,
        response_headers=(*CAPTURE, "location", "set-cookie"),
        route_patterns=("GET /a/{id}", "/static/*"),
        guess_routes=True,
    ),
)
UPGRADED = Http2(extractor=Extractor(FORMATS), request_headers=CAPTURE)
SAME = ("http.request.method", "url.path", "url.query", "http.request.body.size")
"""Attributes that a request has in HTTP/2 as well, when both read it."""


def build(data: bytes) -> Exchange:
    """Turn an input into a record."""
    numbers, rest = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), data[HEADER_BYTES:]
    request, _, response = rest.partition(SEPARATOR)
    values: dict[str, object] = dict.fromkeys(Exchange.__struct_fields__, 0)
    values |= {
        "role": numbers[0],
        "end": numbers[1],
        "flags": int.from_bytes(numbers[2:4], "little"),
        "request_bytes": len(request) + int.from_bytes(numbers[4:8], "little"),
        "response_bytes": len(response) + int.from_bytes(numbers[8:12], "little"),
        "remote_port": 80,
        "remote_address": bytes(10) + b"\xff\xff\x7f\0\0\1",
        "tail": response[-8:].rjust(8, b"\0"),
        "request": request,
        "response": response,
    }
    return Exchange(**values)


def parses(parser: Http1, data: bytes) -> bool:
    """Whether the input is HTTP."""
    try:
        parser.parse(build(data))
    except ProtocolError:
        return False
    return True


def check_call(call: Call, record: Exchange) -> None:
    """Assert what holds for every call."""
    keys = [key for key, _ in call.all_attributes()]
    assert len(set(keys)) == len(keys), keys
    values = dict(call.all_attributes())
    for key, value in call.all_attributes():
        assert type(key) is str, key
        for item in value if type(value) is tuple else (value,):
            assert type(item) in (str, int, bool), (key, item)
            if type(item) is str:
                item.encode()  # no lone surrogates
                assert "\0" not in item, key
            else:
                assert 0 <= item < 2**63, (key, item)
        assert not key.startswith(
            ("http.request.header.auth", "http.request.header.cookie", "http.response.header.set")
        )
    assert "http.request.method" in values or "rpc.method" in values
    assert "?" not in call.name
    assert ("error.type" in values) == call.error
    assert (call.context is None) <= (call.other_contexts == ())
    assert call.context is None or type(call.context) is TraceContext
    if values.get("error.type") in FAILURES:
        assert not call.complete
        assert record.end not in (1, 2), "a provisional record names no failure"
    if record.end not in (1, 2) and record.end > 2 and not call.complete:
        is_cancelled = values.get("rpc.response.status_code") == "CANCELLED"  # no error of the server's
        assert call.error or is_cancelled or "spanloom.response.overlapped" in values


def check_record(record: Exchange) -> None:
    """Parse with each parser, twice: memos change nothing."""
    for parser in PARSERS:
        results = []
        for _ in range(2):
            try:
                call = parser.parse(record)
            except ProtocolError as error:
                results.append(error.reason)
            else:
                check_call(call, record)
                results.append(msgspec.structs.replace(call, attributes=call.all_attributes(), groups=()))
        assert results[0] == results[1]
        assert type(results[0]) is Call or results[0] in REASONS, results[0]


def check_upgrade(record: Exchange) -> None:
    """Let the connection be one of HTTP/2 from the response on: the request is open, or lost, and reads the same."""
    connection = Http2Connection(UPGRADED, StreamLosses())
    connection.take_over(record, is_announced=False)
    assert connection.outstanding + connection.lost == 1
    for _, call in connection.expire(1):
        values = dict(call.all_attributes())
        try:
            wanted = dict(PARSERS[0].parse(record).all_attributes())
        except ProtocolError:
            continue
        if "rpc.system.name" in wanted:
            continue  # gRPC-Web, which HTTP/2 is not looked at for
        assert {name: values.get(name, wanted.get(name)) for name in SAME} == {name: wanted.get(name) for name in SAME}


def check(data: bytes) -> None:
    """The entry point for atheris."""
    record = build(data)
    check_record(record)
    check_upgrade(record)


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
