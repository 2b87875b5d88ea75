"""Fuzz target of the HTTP/2 reader: ``python tests/fuzz/fuzz_http2.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a list of segments as in fuzz_http1_stream.py; the process is the client when a response comes first.
Out: any exception, a broken bound, a request that is neither handed out nor lost nor open, or a call that contradicts
its exchange is a finding. The checks need no atheris.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import msgspec

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.model import Call, End, Exchange, Flag, Role
    from agent.propagation import FORMATS, Extractor
    from agent.protocols import http2_frames, http2_headers, http2_outcome, http2_stream
    from agent.protocols.http1_stream import StreamLosses
    from agent.protocols.http2 import Http2
    from agent.protocols.http2_stream import Http2Connection

from tests.fuzz.fuzz_http1_stream import closing, segments

PROTOCOL = Http2(
    extractor=Extractor(FORMATS),
    request_headers=["accept", "x-tenant", "referer"],
    response_headers=["server", "location"],
    route_patterns=["/r/{id}"],
    guess_routes=True,
)
FAILURES = {
    "timeout",
    "connection_reset",
    "client_disconnect",
    "incomplete_response",
    "cancelled",
    "_OTHER",
    *http2_outcome.ERRORS,
}


def check_bounds(connection: Http2Connection) -> None:
    """Assert the documented bounds."""
    assert 0 <= connection.outstanding <= http2_stream.OPEN_STREAMS
    for reader in (connection._requests, connection._responses):
        # A whole block, a frame of it with what is around it, and a frame header.
        assert reader.buffered_bytes <= 2 * http2_frames.BLOCK_BYTES + 256 + 5 + 9
        assert reader._remaining >= 0
        assert not reader.is_seeking or not reader.buffered_bytes
    for decoder in (connection._request_fields, connection._response_fields):
        assert 0 <= decoder.table_bytes <= http2_headers.TABLE_BYTES
        assert decoder.table_bytes >= 32 * len(decoder._entries)
        assert len(decoder.repeats) <= http2_headers.BLOCK_REPEATS


def check_exchange(exchange: Exchange, call: Call) -> None:
    """Assert what holds for every exchange and its call."""
    assert exchange.exchange_id
    assert exchange.flags & Flag.FIRST
    assert exchange.request == exchange.response == b""
    assert exchange.request_start_ns <= exchange.request_end_ns <= exchange.end_ns
    assert exchange.response_start_ns <= exchange.response_end_ns <= exchange.end_ns
    assert call.complete == (exchange.end in (End.NEXT, End.HANDED_OVER))
    pairs = call.all_attributes()
    attributes = dict(pairs)
    assert len(attributes) == len(pairs), pairs
    assert all(value is not None for value in attributes.values())
    if attributes.get("rpc.system.name") == "grpc":
        assert attributes["rpc.method"] == call.name or call.name == "grpc"
        status = attributes.get("rpc.response.status_code")
        assert call.error == ("error.type" in attributes)
        assert status != "OK" or not call.error
    else:
        assert attributes["http.request.method"].isascii()
        assert ("url.path" in attributes) == (exchange.role == Role.SERVER)
        assert call.error == ("error.type" in attributes)
        error = attributes.get("error.type")
        assert error is None or error in FAILURES or error == str(attributes["http.response.status_code"])
    assert len(msgspec.json.encode(pairs)) < 8 * http2_headers.LIST_BYTES


def check(data: bytes) -> int:
    """The entry point for atheris. Returns the number of exchanges."""
    losses = StreamLosses()
    connection = Http2Connection(PROTOCOL, losses)
    role = int(Role.CLIENT if data[:1] and data[0] & 1 else Role.SERVER)
    count = 0
    for each, expires in segments(data):
        for exchange, call in connection.feed(msgspec.structs.replace(each, role=role)):
            check_exchange(exchange, call)
            count += 1
        if expires:
            outstanding = connection.outstanding
            expired = connection.expire(each.time_ns)
            assert len(expired) == outstanding
            assert not connection.outstanding
            for exchange, call in expired:
                check_exchange(exchange, call)
            count += outstanding
        check_bounds(connection)
    outstanding, lost = connection.outstanding, connection.lost
    ended = connection.close(closing(data))
    assert len(ended) + connection.lost - lost == outstanding
    for exchange, call in ended:
        check_exchange(exchange, call)
    check_bounds(connection)
    assert not connection.outstanding
    assert all(reason and number > 0 for reason, number in losses.reasons.items())
    return count + len(ended)


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")

    def one_input(data: bytes) -> None:
        check(data)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
