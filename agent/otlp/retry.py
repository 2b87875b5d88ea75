"""What to do after an OTLP/gRPC attempt: sans-IO.

In: gRPC status codes, the ``grpc-status-details-bin`` trailer, response bytes. Out: delays in seconds, rejected span
counts. Never sleeps, reads a clock or imports gRPC or the protobuf runtime; malformed bytes are as if absent.

Sources: OTLP specification, sections "Failures", "Retryable Response Codes", "OTLP/gRPC Throttling" and "Partial
Success"; google/rpc/status.proto and google/rpc/error_details.proto (RetryInfo); google/protobuf/duration.proto.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

RETRYABLE_CODES = frozenset({"cancelled", "deadline_exceeded", "aborted", "out_of_range", "unavailable", "data_loss"})
"""gRPC status codes, in lower case, after which the same request may succeed."""

THROTTLING_CODE = "resource_exhausted"
"""Retryable only when the server says with RetryInfo that it will recover."""

BACKOFF_FACTOR = 2.0
_RETRY_INFO = b"google.rpc.RetryInfo"


def retry_delay_seconds(code: str, status_details: bytes, backoff_seconds: float) -> tuple[float | None, bool]:
    """``(delay, asked for by the server)`` before the next attempt; the delay is None when there must be none.

    ``status_details`` is the ``grpc-status-details-bin`` trailer, empty when there was none. A delay that the server
    asks for is kept to the full and spread by up to 10 % on top; otherwise it is ``backoff_seconds`` spread by a
    quarter to either side, so that a fleet of agents does not return in step.
    """
    if code not in RETRYABLE_CODES and code != THROTTLING_CODE:
        return None, False
    asked_seconds = retry_info_seconds(status_details)
    if asked_seconds is None and code == THROTTLING_CODE:
        return None, False
    if asked_seconds:
        return asked_seconds * random.uniform(1.0, 1.1), True
    return backoff_seconds * random.uniform(0.75, 1.25), False


def retry_info_seconds(status_details: bytes) -> float | None:
    """The ``retry_delay`` of the RetryInfo in a serialized ``google.rpc.Status``.

    0.0 when RetryInfo comes without a delay or with a negative one; None without RetryInfo or with malformed bytes.
    """
    try:
        for number, detail in _fields(status_details):
            if number != 3 or not isinstance(detail, bytes):
                continue
            any_fields = dict(_fields(detail))
            type_url = any_fields.get(1)
            if not isinstance(type_url, bytes) or type_url.rpartition(b"/")[2] != _RETRY_INFO:
                continue
            duration = dict(_fields(_as_bytes(dict(_fields(_as_bytes(any_fields.get(2)))).get(1))))
            seconds = _as_signed(duration.get(1))
            nanoseconds = _as_signed(duration.get(2))
            return max(0.0, seconds + nanoseconds / 1e9)
    except ValueError:
        pass
    return None


def partial_success(response: bytes) -> tuple[int, str]:
    """``(rejected_spans, error_message)`` of an ``ExportTraceServiceResponse``; ``(0, "")`` for a full success.

    A negative count is read as 0. Malformed bytes are read as a full success: the call itself succeeded.
    """
    if not response:
        return 0, ""
    try:
        fields = dict(_fields(_as_bytes(dict(_fields(response)).get(1))))
        message = _as_bytes(fields.get(2)).decode(errors="replace")
        return max(0, _as_signed(fields.get(1))), message
    except ValueError:
        return 0, ""


def _as_bytes(value: int | bytes | None) -> bytes:
    if value is None:
        return b""
    if isinstance(value, int):
        raise ValueError("a message was expected")
    return value


def _as_signed(value: int | bytes | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bytes):
        raise ValueError("an integer was expected")
    return value - (1 << 64) if value >> 63 else value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """``(field number, value)`` of a protobuf message; an integer for varint and fixed fields. Raises ValueError."""
    offset = 0
    while offset < len(message):
        tag, offset = _read_varint(message, offset)
        wire_type = tag & 7
        if wire_type == 0:
            value, offset = _read_varint(message, offset)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, offset = _read_varint(message, offset)
        elif wire_type == 1:
            size = 8
        elif wire_type == 5:
            size = 4
        else:
            raise ValueError(f"wire type {wire_type}")
        data = message[offset : offset + size]
        offset += size
        if len(data) != size:
            raise ValueError("truncated")
        yield tag >> 3, data if wire_type == 2 else int.from_bytes(data, "little")


def _read_varint(message: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            raise ValueError("truncated")
        byte = message[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, offset
    raise ValueError("a varint of more than ten bytes")
