"""Fuzz target of the pipelined reader: ``python tests/fuzz/fuzz_http1_stream.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a list of segments, each one byte of control, two bytes of length (big endian) and the data. Control:
bit 0 response instead of request; bit 1 a gap of 16 bytes behind the data; bit 2 a gap of 16 bytes in front; bit 3 an
overlap of 4 bytes; bits 4 to 6, in the last segment, how the connection closes. Out: any exception, a broken bound or
a finished exchange that the record parser calls incomplete is a finding. The checks need no atheris.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.errors import ProtocolError
    from agent.model import ConnectionClosed, End, Exchange, Flag, Segment
    from agent.propagation import FORMATS, Extractor
    from agent.protocols import http1_reader, http1_stream
    from agent.protocols.http1 import Http1
    from agent.protocols.http1_stream import PipelinedConnection

PARSER = Http1(extractor=Extractor(FORMATS))
CLOSES = (None, End.CLOSED, End.RESET, End.TIMED_OUT)


def segment(direction: int, data: bytes, offset: int, length: int, time_ns: int, flags: int = 0) -> Segment:
    """A segment as the kernel would make it."""
    return Segment(
        kind=3,
        role=1,
        direction=direction,
        captured=len(data),
        flags=flags,
        connection_id=7,
        process_start_ns=5,
        time_ns=time_ns,
        offset=offset,
        length=length,
        tgid=10,
        tid=10 + direction,
        netns=1,
        local_port=80,
        remote_port=40000,
        local_address=bytes(16),
        remote_address=bytes(10) + b"\xff\xff\x0a\0\0\x09",
        tls=0,
        data=data,
    )


def segments(data: bytes) -> Iterator[tuple[Segment, bool]]:
    """Turn an input into segments, and whether what is outstanding times out behind each."""
    offsets = {1: 0, 2: 0}
    position = number = 0
    while position + 3 <= len(data):
        control = data[position]
        length = int.from_bytes(data[position + 1 : position + 3], "big")
        piece = data[position + 3 : position + 3 + length]
        position += 3 + length
        number += 1
        direction = 2 if control & 1 else 1
        offset = offsets[direction] + (16 if control & 4 else 0)
        if control & 8:
            offset = max(offset - 4, 0)
        total = len(piece) + (16 if control & 2 else 0)
        offsets[direction] = offset + total
        yield segment(direction, piece, offset, total, number, 3 if control & 16 else 1), bool(control & 128)


def closing(data: bytes) -> ConnectionClosed | None:
    """Turn the last segment's control byte into the close."""
    position = control = 0
    while position + 3 <= len(data):
        control = data[position]
        position += 3 + int.from_bytes(data[position + 1 : position + 3], "big")
    end = CLOSES[control >> 4 & 3]
    flags = Flag.PEER_CLOSED if control & 64 else 0
    return None if end is None else ConnectionClosed(4, 1, int(end), int(flags), 7, 0, 10**6)


def check_bounds(connection: PipelinedConnection) -> None:
    """Assert the documented bounds."""
    pairs = connection._pairs
    assert len(pairs) <= http1_stream.OUTSTANDING_REQUESTS
    assert 0 <= connection._expired <= len(pairs)
    assert sum(len(pair.request.head) for pair in pairs) == connection._head_bytes
    assert connection._head_bytes <= http1_stream.OUTSTANDING_HEAD_BYTES
    for reader in (connection._requests, connection._responses):
        assert len(reader._buffer) <= http1_reader.HEAD_BYTES
        assert reader.remaining >= 0


def check_exchange(exchange: Exchange, closed: bool) -> None:
    """Assert what holds for every exchange: the record parser reads it; a finished one is complete."""
    assert exchange.exchange_id
    assert exchange.request_captured == len(exchange.request) <= exchange.request_bytes
    assert exchange.response_captured == len(exchange.response) <= exchange.response_bytes
    assert exchange.request_start_ns <= exchange.request_end_ns <= exchange.end_ns
    assert exchange.response_start_ns <= exchange.response_end_ns <= exchange.end_ns
    try:
        call = PARSER.parse(exchange)
    except ProtocolError:
        # Of a response whose head had not ended, only the beginning was looked at.
        if closed and not exchange.response.endswith(b"\n\r\n"):
            return
        raise
    if not closed:
        assert exchange.end in (End.NEXT, End.HANDED_OVER)
        assert call.complete, exchange
        assert "http.response.status_code" in dict(call.all_attributes())


def check(data: bytes) -> int:
    """The entry point for atheris. Returns the number of exchanges."""
    connection = PipelinedConnection()
    count = 0
    for each, expires in segments(data):
        for exchange in connection.feed(each):
            check_exchange(exchange, closed=False)
            count += 1
        if expires:
            outstanding = connection.outstanding
            expired = connection.expire(each.time_ns)
            assert len(expired) == outstanding
            assert not connection.outstanding
            for exchange in expired:
                check_exchange(exchange, closed=True)
            count += outstanding
        check_bounds(connection)
    for exchange in connection.close(closing(data)):
        check_exchange(exchange, closed=exchange.end != End.NEXT)
        count += 1
    check_bounds(connection)
    assert not connection._pairs
    return count


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")

    def one_input(data: bytes) -> None:
        check(data)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
