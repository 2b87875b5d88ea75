"""The wire format of bpf/events.h written down a second time, by hand, and bytes made of it.

``DESCRIPTIONS`` is what ``spanloom_describe`` says of the compiled object, so that no test here needs a compiler; the
tests of the layout compare it with the header.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from agent.kernel.layout import WireLayout
from agent.model import ConnectionClosed, ConnectionUpgraded, Exchange, PeerFound, ProcessSeen, Segment, TlsSeen

_STRUCTS = {
    "record_exchange": (
        "kind:2 role:1 end:1 flags:4 exchange_id:8 parent_id:8 peer_id:8 connection_id:8 process_start_ns:8 "
        "request_start_ns:8 request_end_ns:8 response_start_ns:8 response_end_ns:8 end_ns:8 request_bytes:8 "
        "response_bytes:8 tgid:4 request_tid:4 response_tid:4 netns:4 local_port:2 remote_port:2 request_captured:2 "
        "response_captured:2 local_address:16a remote_address:16a tail:8a "
        "tls:4 _pad:4a"
    ),
    "record_process": (
        "kind:2 cgroup_bytes:2 memory_cgroup_bytes:2 _pad:6a tgid:4 start_ns:8 uid:4 ppid:4 comm:16a executable:64a"
    ),
    "record_segment": (
        "kind:2 role:1 direction:1 captured:2 flags:2 connection_id:8 process_start_ns:8 time_ns:8 offset:8 length:8 "
        "tgid:4 tid:4 netns:4 local_port:2 remote_port:2 local_address:16a remote_address:16a "
        "tls:4 _pad:4a"
    ),
    "record_peer": "kind:2 _pad:6a connection_id:8 peer_connection_id:8",
    "record_close": "kind:2 role:1 end:1 flags:4 connection_id:8 exchange_id:8 time_ns:8",
    "record_tls": "kind:2 notice:2 tgid:4 start_ns:8",
}
_ENUMS = {
    "record_kind": ("RECORD_", 1, "EXCHANGE PROCESS SEGMENT CLOSE PEER TLS UPGRADE"),
    "exchange_role": ("ROLE_", 1, "SERVER CLIENT"),
    "exchange_end": ("END_", 1, "OPEN QUIET NEXT CLOSED RESET TIMED_OUT HANDED_OVER"),
    "tls_notice": ("TLS_", 1, "UNWATCHED OTHER_STACK"),
    "segment_direction": ("DIRECTION_", 1, "REQUEST RESPONSE"),
    "counter": (
        "COUNTER_",
        0,
        "BEGUN EMITTED DROPPED_RING_FULL DROPPED_STATE_FULL DROPPED_NOT_HTTP CANCELLED STREAMS_UNTOLD STREAMED "
        "REEMITTED REEMIT_LOST SEGMENTS SEGMENTS_LOST CLOSES_LOST PROCESSES_LOST PROCESS_FULL THREAD_FULL "
        "ENDPOINT_FULL IGNORED_TLS IGNORED_OTHER IGNORED_PORT RESPONSE_ALONE READ_FAULT PEERS_LOST FRAMES_LOST "
        "TLS_TIED TLS_UNTIED TLS_CONTRADICTED TLS_FULL",
    ),
}
_FLAGS = (
    "FIRST REQUEST_TRUNCATED RESPONSE_TRUNCATED TAIL_VALID PEER_CLOSED CLIENT_ONLY PROCESS_UNKNOWN INTERIM REQUEST_GAP "
    "FOREIGN STREAM TLS"
)


def _describe_struct(members: str) -> str:
    lines, offset = [], 0
    for member in members.split():
        name, size = member.split(":")
        kind = "array" if size.endswith("a") else "integer"
        lines.append(f"{name} {offset} {size.rstrip('a')} {kind}")
        offset += int(size.rstrip("a"))
    return "\n".join([*lines, f"sizeof 0 {offset} struct", ""])


def _describe_enum(prefix: str, first: int, names: str) -> str:
    lines = [f"{prefix}{name} {number}" for number, name in enumerate(names.split(), first)]
    return "\n".join([*lines, *([f"COUNTERS {len(lines)}"] if prefix == "COUNTER_" else []), ""])


DESCRIPTIONS = {
    **{name: _describe_struct(members) for name, members in _STRUCTS.items()},
    **{name: _describe_enum(*parts) for name, parts in _ENUMS.items()},
    "segment_flag": "SEGMENT_HTTP2 1\nSEGMENT_AT_FRAME 2\nSEGMENT_TLS 4\nSEGMENT_OVERTAKES 8\n",
    "exchange_flag": "".join(f"FLAG_{name} {1 << bit}\n" for bit, name in enumerate(_FLAGS.split())),
}
LAYOUT = WireLayout.from_descriptions(DESCRIPTIONS.__getitem__)

EXCHANGE = struct.Struct("<HBBI12Q4I4H16s16s8sI4x")
PROCESS = struct.Struct("<HHH6xIQII16s64s")
SEGMENT = struct.Struct("<HBBHH5Q3IHH16s16sI4x")
PEER = struct.Struct("<H6xQQ")
CLOSE = struct.Struct("<HBBIQQQ")
TLS = struct.Struct("<HHIQ")


def pack(
    record: Exchange | ProcessSeen | Segment | ConnectionClosed | ConnectionUpgraded | PeerFound | TlsSeen,
) -> bytes:
    """The bytes that the kernel sends for a record."""
    values = [getattr(record, name) for name in record.__struct_fields__]
    match record:
        case Exchange():
            # What user space does not read is not 0, so that a shift by a member shows.
            known = {"kind": 1, "netns": 14, "local_port": 80, "local_address": bytes(range(16))}
            known |= dict(zip(record.__struct_fields__, values, strict=True))
            members = [member.partition(":")[0] for member in _STRUCTS["record_exchange"].split() if member[0] != "_"]
            return EXCHANGE.pack(*(known[member] for member in members)) + record.request + record.response
        case ProcessSeen():
            names = [_names(line.split(b"/")[1:]) for line in record.cgroup.splitlines()] + [b"", b""]
            sizes = [len(names[0]), len(names[1])]
            head = PROCESS.pack(2, *sizes, *values[:-3], record.comm.encode(), record.executable.encode())
            return head + b"".join(names)
        case Segment():
            return SEGMENT.pack(*values[:-1]) + record.data
        case PeerFound():
            return PEER.pack(5, *values)
        case ConnectionClosed():
            return CLOSE.pack(*values)
        case ConnectionUpgraded():
            return (7).to_bytes(2, "little") + pack(record.exchange)[2:]
        case TlsSeen():
            return TLS.pack(6, *values)


def _names(path: list[bytes]) -> bytes:
    return b"".join(name + b"\0" for name in reversed(path) if name) + b"\0"


def batch(pieces: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """A drained batch: each record begins at a multiple of 8."""
    data, offsets = bytearray(), []
    for piece in pieces:
        offsets.append(len(data))
        data += piece + bytes(-len(piece) % 8)
    return bytes(data), offsets
