"""From the BTF of a BPF object to the Python layout of its records.

In: the text that ``spanloom_describe`` makes of the object's BTF. Out: ``struct.Struct`` codecs, checked against the
records of ``agent.model``. An object whose layout differs is refused: numbers are never kept in step by hand.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass

from agent import model
from agent.errors import SpanloomError

_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}


class LayoutMismatchError(SpanloomError):
    """The BPF object and this version of the agent were not built from the same bpf/events.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """One C struct: the codec of its whole extent and the names of its members in order, padding left out."""

    codec: struct.Struct
    fields: tuple[str, ...]


def parse_struct(name: str, text: str, wanted: Collection[str] | None = None) -> RecordLayout:
    """Turn ``member offset size kind`` lines into a codec that passes over what is not ``wanted`` (None: nothing).

    Raises LayoutMismatchError on anything unforeseen.
    """
    parts = ["<"]
    fields: list[str] = []
    position = 0
    for line in text.splitlines():
        member, offset_text, size_text, kind = line.split()
        offset, size = int(offset_text), int(size_text)
        if kind == "struct":  # the last line: the whole extent
            if position != size:
                raise LayoutMismatchError(f"struct {name}: implicit padding at its end")
            return RecordLayout(codec=struct.Struct("".join(parts)), fields=tuple(fields))
        if position != offset:
            raise LayoutMismatchError(f"struct {name}: implicit padding before {member}")
        position += size
        if member.startswith("_pad") or (wanted is not None and member not in wanted):
            parts.append(f"{size}x")
        elif kind == "array":
            parts.append(f"{size}s")
            fields.append(member)
        elif size in _INTEGERS:
            parts.append(_INTEGERS[size])
            fields.append(member)
        else:
            raise LayoutMismatchError(f"struct {name}: member {member} has a size of {size} bytes")
    raise LayoutMismatchError(f"struct {name} is not described")


def parse_enum(text: str) -> dict[str, int]:
    """Turn ``NAME value`` lines into a mapping."""
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def check_fields(name: str, layout: RecordLayout, record: type, captured: tuple[str, ...]) -> None:
    """Compare a C struct with the model's record, whose further fields are the captured bytes.

    Raises LayoutMismatchError naming the first difference.
    """
    expected = record.__struct_fields__
    if layout.fields + captured != expected:
        raise LayoutMismatchError(f"struct {name} has {layout.fields}, the agent expects {expected}")


def check_enum(name: str, values: dict[str, int], prefix: str, members: type) -> None:
    """Compare a C enum with the model's enum of the same meaning."""
    found = {key.removeprefix(prefix): value for key, value in values.items()}
    expected = {member.name: int(member) for member in members}  # type: ignore[attr-defined]
    if found != expected:
        raise LayoutMismatchError(f"enum {name} is {found}, the agent expects {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLayout:
    """Everything the decoder and the counters need to know about one BPF object."""

    exchange: RecordLayout
    process: RecordLayout
    segment: RecordLayout
    close: RecordLayout
    peer: RecordLayout
    tls: RecordLayout
    kinds: dict[str, int]
    counters: tuple[str, ...]

    @classmethod
    def from_descriptions(cls, describe) -> WireLayout:
        """Read and check all of bpf/events.h. ``describe(name)`` returns the text for one struct or enum.

        Raises LayoutMismatchError when anything differs from ``agent.model``.
        """
        layouts = {
            name: parse_struct(name, describe(name), wanted)
            for name, wanted in (
                ("record_exchange", model.Exchange.__struct_fields__),
                ("record_process", None),
                ("record_segment", None),
                ("record_close", None),
                ("record_peer", None),
                ("record_tls", None),
            )
        }
        check_fields("record_exchange", layouts["record_exchange"], model.Exchange, ("request", "response"))
        check_fields("record_segment", layouts["record_segment"], model.Segment, ("data",))
        check_fields("record_close", layouts["record_close"], model.ConnectionClosed, ())
        if layouts["record_peer"].fields != ("kind", *model.PeerFound.__struct_fields__):
            raise LayoutMismatchError(f"struct record_peer has {layouts['record_peer'].fields}")
        process = layouts["record_process"].fields
        if process != ("kind", "cgroup_bytes", "memory_cgroup_bytes", *model.ProcessSeen.__struct_fields__[:-1]):
            raise LayoutMismatchError(f"struct record_process has {process}")
        tls = layouts["record_tls"].fields
        if tls != ("kind", *model.TlsSeen.__struct_fields__):
            raise LayoutMismatchError(f"struct record_tls has {tls}")
        check_enum("exchange_role", parse_enum(describe("exchange_role")), "ROLE_", model.Role)
        check_enum("exchange_end", parse_enum(describe("exchange_end")), "END_", model.End)
        check_enum("tls_notice", parse_enum(describe("tls_notice")), "TLS_", model.TlsNotice)
        check_enum("exchange_flag", parse_enum(describe("exchange_flag")), "FLAG_", model.Flag)
        check_enum("segment_flag", parse_enum(describe("segment_flag")), "SEGMENT_", model.SegmentFlag)
        counters = parse_enum(describe("counter"))
        if list(counters.values()) != list(range(len(counters))):
            raise LayoutMismatchError("enum counter is not contiguous")
        return cls(
            exchange=layouts["record_exchange"],
            process=layouts["record_process"],
            segment=layouts["record_segment"],
            close=layouts["record_close"],
            peer=layouts["record_peer"],
            tls=layouts["record_tls"],
            kinds=parse_enum(describe("record_kind")),
            counters=tuple(name.removeprefix("COUNTER_").lower() for name in list(counters)[:-1]),
        )
