"""Builders of exchanges and calls for the tests of the stages behind the protocols."""

from __future__ import annotations

from agent.model import Call, End, Exchange, Flag, Role, TraceContext

MILLISECOND = 1_000_000
TRACE, OTHER_TRACE = bytes(range(1, 17)), bytes(range(101, 117))
SERVER, CLIENT = int(Role.SERVER), int(Role.CLIENT)
LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
FRONT, BACK, THIRD = (100, 1000), (200, 2000), (300, 3000)
"""Process keys."""


def context(
    trace_id: bytes = TRACE, span: int | None = 7, sampled: bool | None = True, state: str = ""
) -> TraceContext:
    """What a sender's header said."""
    span_id = None if span is None else span.to_bytes(8, "big")
    return TraceContext(trace_id, span_id, sampled, state, "tracecontext")


def exchange(exchange_id: int, role: int = SERVER, **fields: object) -> Exchange:
    """A finished exchange of 10 ms that began at 1 s; ``process``, ``start`` and ``end_ms`` (in ms) are shorthands."""
    process = fields.pop("process", FRONT)
    start_ns = int(fields.pop("start", 1000) * MILLISECOND)
    end_ns = int(fields.pop("end_ms", start_ns / MILLISECOND + 10) * MILLISECOND)
    values: dict[str, object] = dict.fromkeys(Exchange.__struct_fields__, 0)
    values |= {
        "role": role,
        "end": int(End.NEXT),
        "flags": int(Flag.FIRST),
        "exchange_id": exchange_id,
        "connection_id": exchange_id,
        "tgid": process[0],
        "process_start_ns": process[1],
        "request_start_ns": start_ns,
        "request_end_ns": start_ns,
        "response_start_ns": end_ns,
        "response_end_ns": end_ns,
        "end_ns": end_ns,
        "request_tid": process[0],
        "response_tid": process[0],
        "remote_port": 40000,
        "remote_address": LOOPBACK,
        "tail": bytes(8),
        "request": b"",
        "response": b"",
    }
    assert fields.keys() <= values.keys(), fields
    return Exchange(**values | fields)


def call(carried: TraceContext | None = None, request_id: str = "", others: tuple[TraceContext, ...] = ()) -> Call:
    """What the exchange asked."""
    return Call("GET", (("http.request.method", "GET"),), False, carried, others, request_id, True)
