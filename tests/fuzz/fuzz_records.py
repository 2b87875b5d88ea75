"""Fuzz target of the record decoder: ``python tests/fuzz/fuzz_records.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a list of records, each two bytes of length (big endian) and that many bytes as the kernel would write
them, from the 16-bit kind on; short ones are filled up with zeros, as the kernel never sends less than the struct. Out:
any exception, a record that is lost, or data from outside its record is a finding; then the records go through the
whole pipeline, whose books must add up. The checks need no atheris.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.kernel.records import Decoder
    from agent.model import (
        ConnectionClosed,
        ConnectionUpgraded,
        End,
        Exchange,
        Flag,
        PeerFound,
        ProcessSeen,
        Segment,
        Span,
        TlsSeen,
    )
    from agent.pipeline import Pipeline
    from agent.process import ProcessTable, Selector
    from agent.propagation import FORMATS, Extractor
    from agent.protocols import PROTOCOLS
    from agent.sampling import Sampler
    from agent.stitch import Stitcher
    from tests.unit.kernel.wire import CLOSE, EXCHANGE, LAYOUT, PEER, PROCESS, SEGMENT, TLS, batch

SIZES = {1: EXCHANGE.size, 2: PROCESS.size, 3: SEGMENT.size, 4: CLOSE.size, 5: PEER.size, 6: TLS.size, 7: EXCHANGE.size}
KINDS = {1: Exchange, 2: ProcessSeen, 3: Segment, 4: ConnectionClosed, 5: PeerFound, 6: TlsSeen, 7: ConnectionUpgraded}
RECORDS_MAX = 64
SWEEP_NS = 10**9


def pieces(data: bytes) -> list[bytes]:
    """Turn an input into the bytes of each record."""
    found = []
    ended: set[int] = set()
    position = 0
    while position + 2 <= len(data) and len(found) < RECORDS_MAX:
        length = int.from_bytes(data[position : position + 2], "big")
        piece = data[position + 2 : position + 2 + length]
        position += 2 + length
        kind = piece[0] if piece else 0
        record = bytearray(piece.ljust(SIZES.get(kind, 4), b"\0"))
        # The kernel program's own numbers, role and end or direction, are what the layout's check found them to be.
        record[2] = 1 + (record[2] - 1) % 2
        record[3] = 1 + (record[3] - 1) % (2 if kind == 3 else 7)
        if kind in (1, 7):  # an exchange belongs to one connection, which may have several
            exchange_id = int.from_bytes(record[8:16], "little")
            record[32:40] = (exchange_id >> 1).to_bytes(8, "little")
            if kind == 7:
                record[3] = End.HANDED_OVER
                if exchange_id in ended:
                    continue
            if record[3] > End.QUIET:  # and ends once
                if exchange_id in ended:
                    record[4] &= ~Flag.FIRST & 0xFF
                ended.add(exchange_id)
        found.append(bytes(record))
    return found


def check_decoder(records: list[bytes]) -> int:
    """Decode all at once and one by one; returns the number of exchanges that the kernel would have begun."""
    decoder = Decoder(LAYOUT)
    data, offsets = batch(records)
    decoded = decoder.decode(data, offsets)
    assert [type(record) for record in decoded] == [KINDS[piece[0]] for piece in records if piece[0] in KINDS]
    assert len(decoded) + decoder.unknown_records == len(records)
    for record in decoded:
        match record:
            case Exchange():
                assert len(record.request) <= record.request_captured
                assert len(record.response) <= record.response_captured
                assert record.request + record.response in data
            case Segment():
                assert len(record.data) <= record.captured
                assert record.data in data
            case ProcessSeen():
                assert "\0" not in record.comm + record.executable
    again = Decoder(LAYOUT)
    assert [record for offset in offsets for record in again.decode(data, [offset])] == decoded
    return sum(1 for record in decoded if isinstance(record, Exchange) and record.flags & Flag.FIRST)


class Source:
    """The kernel that sent these records."""

    def __init__(self, records: list[bytes], begun: int) -> None:
        self._batches = deque([batch([record]) for record in records])
        self._count = Counter(begun=begun, emitted=begun)

    def drain(self) -> tuple[bytes, list[int]]:
        return self._batches.popleft() if self._batches else (b"", [])

    def sweep(self) -> int:
        return 2**63

    def decide(self, tgid: int, start_ns: int, state: int) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {name: self._count[name] for name in LAYOUT.counters}


class Sink:
    waiting = 0
    unwanted = 0

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        self.spans += spans

    def tick(self, now_ns: int) -> None:
        pass

    def flush(self) -> None:
        pass


def check_pipeline(records: list[bytes], begun: int) -> None:
    """Whatever the records say, the stages take them, let go of them, and account for them."""
    sink = Sink()
    stitcher = Stitcher(Sampler(), random_bytes=Random(1).randbytes)
    pipeline = Pipeline(
        source=Source(records, begun),
        decoder=Decoder(LAYOUT),
        protocols=[protocol(extractor=Extractor(FORMATS)) for protocol in PROTOCOLS],
        processes=ProcessTable(proc_root=Path("/nonexistent"), host_name="h", version="1"),
        selector=Selector(("*",), (), 0),
        stitcher=stitcher,
        sinks=[sink],
        max_pending=4,
    )
    pipeline.run_once(0)
    for now_ns in (SWEEP_NS, 2**62, 2**64, 2**66):
        pipeline.sweep(now_ns)
        books = pipeline.books()
        assert books.begun == len(sink.spans) + sum(books.dropped.values()) + books.in_flight, books
    # Pipelined requests wait for the end of their connection.
    assert (stitcher.held, pipeline.pending, books.in_flight_agent) == (0, 0, pipeline.streams_outstanding)
    pipeline.finish(2**66)


def check(data: bytes) -> None:
    """The entry point for atheris."""
    records = pieces(data)
    check_pipeline(records, check_decoder(records))


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
