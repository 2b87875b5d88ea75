"""Ring-buffer bytes -> records of ``agent.model``.

In: one drained batch and the offsets of its records. Out: records, in the kernel's order. Never interprets what an
exchange says; unknown kinds are counted and skipped.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.kernel.layout import WireLayout
from agent.model import ConnectionClosed, ConnectionUpgraded, Exchange, PeerFound, ProcessSeen, Segment, TlsSeen

Record = Exchange | ProcessSeen | Segment | ConnectionClosed | ConnectionUpgraded | PeerFound | TlsSeen


class Decoder:
    """Decodes batches of one BPF object's records."""

    def __init__(self, layout: WireLayout) -> None:
        self.unknown_records = 0
        kinds = layout.kinds
        self._exchange_kind = kinds["RECORD_EXCHANGE"]
        self._exchange = layout.exchange.codec
        fields = layout.exchange.fields
        self._request_captured = fields.index("request_captured")
        self._response_captured = fields.index("response_captured")
        self._process = layout.process.codec
        self._segment = layout.segment.codec
        self._segment_captured = layout.segment.fields.index("captured")
        self._close = layout.close.codec
        self._peer = layout.peer.codec
        self._tls = layout.tls.codec
        self._others = {
            kinds["RECORD_PROCESS"]: self._decode_process,
            kinds["RECORD_SEGMENT"]: self._decode_segment,
            kinds["RECORD_CLOSE"]: self._decode_close,
            kinds["RECORD_PEER"]: self._decode_peer,
            kinds["RECORD_TLS"]: self._decode_tls,
            kinds["RECORD_UPGRADE"]: self._decode_upgrade,
        }

    def decode(self, batch: bytes, offsets: Iterable[int]) -> list[Record]:
        """Decode one batch.

        ``batch`` holds the records, each of which starts at one of ``offsets`` with its 16-bit kind. The lengths inside
        are the kernel program's own: it is trusted, and slices cannot leave the batch.
        """
        records: list[Record] = []
        append = records.append
        unpack = self._exchange.unpack_from
        head = self._exchange.size
        request_captured, response_captured = self._request_captured, self._response_captured
        exchange_kind = self._exchange_kind
        for offset in offsets:
            if batch[offset] == exchange_kind:  # kinds are small: the low byte decides
                values = unpack(batch, offset)
                start = offset + head
                middle = start + values[request_captured]
                append(Exchange(*values, batch[start:middle], batch[middle : middle + values[response_captured]]))
                continue
            decode = self._others.get(batch[offset])
            if decode is None:
                self.unknown_records += 1
            else:
                append(decode(batch, offset))
        return records

    def _decode_process(self, batch: bytes, offset: int) -> ProcessSeen:
        _, unified, memory, *values, comm, executable = self._process.unpack_from(batch, offset)
        start = offset + self._process.size
        middle = start + unified
        cgroup = _cgroup_line(b"0::", batch[start:middle])
        cgroup += _cgroup_line(b"1:memory:", batch[middle : middle + memory])
        return ProcessSeen(*values, _text(comm), _text(executable), cgroup)

    def _decode_segment(self, batch: bytes, offset: int) -> Segment:
        values = self._segment.unpack_from(batch, offset)
        start = offset + self._segment.size
        return Segment(*values, batch[start : start + values[self._segment_captured]])

    def _decode_close(self, batch: bytes, offset: int) -> ConnectionClosed:
        return ConnectionClosed(*self._close.unpack_from(batch, offset))

    def _decode_peer(self, batch: bytes, offset: int) -> PeerFound:
        return PeerFound(*self._peer.unpack_from(batch, offset)[1:])

    def _decode_tls(self, batch: bytes, offset: int) -> TlsSeen:
        _, notice, tgid, start_ns = self._tls.unpack_from(batch, offset)
        return TlsSeen(notice, tgid, start_ns)

    def _decode_upgrade(self, batch: bytes, offset: int) -> ConnectionUpgraded:
        values = self._exchange.unpack_from(batch, offset)
        start = offset + self._exchange.size
        middle = start + values[self._request_captured]
        end = middle + values[self._response_captured]
        return ConnectionUpgraded(Exchange(*values, batch[start:middle], batch[middle:end]))


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _cgroup_line(hierarchy: bytes, names: bytes) -> bytes:
    """The line of ``/proc/<pid>/cgroup``. ``names`` are those from the cgroup up to the root; empty: not known."""
    return hierarchy + b"/" + b"/".join(reversed(names.split(b"\0")[:-2])) + b"\n" if names else b""
