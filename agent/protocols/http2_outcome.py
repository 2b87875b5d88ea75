"""What became of an HTTP/2 stream, and how that reads as a call.

In: what the connection noted of a stream, and how it ended. Out: its ``Exchange`` and its ``Call``. Never happens: a
status, size or count is stated that was not seen or does not follow from what was seen.
"""

from __future__ import annotations

import msgspec

from agent.model import Call, End, Exchange, Flag, Role, Segment
from agent.protocols import grpc
from agent.protocols.http2 import Answer, Asked, Http2
from agent.protocols.http2_frames import UNKNOWN_AMOUNT

_SERVER = int(Role.SERVER)
_FIRST = int(Flag.FIRST)
_KEPT = int(Flag.CLIENT_ONLY | Flag.PROCESS_UNKNOWN | Flag.INTERIM)
_NEXT, _RESET, _TIMED_OUT = int(End.NEXT), int(End.RESET), int(End.TIMED_OUT)
REFUSED = "REFUSED_STREAM"
OTHER_ERROR = "_OTHER"
ERRORS = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    REFUSED,
    "cancelled",  # CANCEL: no failure of the protocol, but somebody's decision
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
"""``error.type`` of a stream that was reset: the names of RFC 9113 section 7."""
_BROKEN = frozenset(("connection_reset", "client_disconnect", "incomplete_response"))
"""Causes of http1_outcome: the connection ended, and the stream with it."""


class Side:
    """What is known of a stream's request or response. ``is_exact``: body_bytes is without padding."""

    __slots__ = ("body_bytes", "end_ns", "is_exact", "messages", "start_ns", "tid")

    def __init__(self, start_ns: int, end_ns: int, tid: int, messages: grpc.MessageCounter | None) -> None:
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.tid = tid
        self.messages = messages
        self.body_bytes = 0
        self.is_exact = True

    def skip(self, gap_bytes: int) -> None:
        """Take bytes of the body that were not captured."""
        if gap_bytes == UNKNOWN_AMOUNT:
            self.is_exact = False
        else:
            self.body_bytes += gap_bytes
        if self.messages is not None:
            self.messages.skip(gap_bytes)


class Stream:
    """An open stream: a request whose exchange has not been handed out."""

    __slots__ = ("answer", "asked", "interim", "request", "request_ended", "response", "trailers")

    def __init__(self, asked: Asked, request: Side, request_ended: int) -> None:
        self.asked = asked
        self.request = request
        self.request_ended = request_ended
        self.response: Side | None = None
        self.answer: Answer | None = None
        self.trailers: Answer | None = None
        self.interim = 0


_NO_SIDE = Side(0, 0, 0, None)
_NO_TAIL = bytes(8)
UNREAD = Answer(((None, None),), (), (), is_server=True)
"""A header block of a response that could not be read."""


def read_error(payload: bytes | None) -> str:
    """Return ``error.type`` for the payload of RST_STREAM, which is None when it was not captured."""
    code = int.from_bytes(payload, "big") if payload is not None else len(ERRORS)
    return ERRORS[code] if code < len(ERRORS) else OTHER_ERROR


_ID_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""An odd number whose multiples lie far from each other (Knuth, TAOCP 3, section 6.4)."""


def exchange_id_of(connection_id: int, stream_id: int) -> int:
    """Return the id of a stream's exchange: as random as the connection's, and known at the other end, too."""
    return (connection_id + stream_id * _GOLDEN) & _ID_MASK or 1


def exchange_of(
    segment: Segment | Exchange, stream: Stream, end: int, end_ns: int, stream_id: int, peer_connection_id: int
) -> Exchange:
    """Return the exchange of a stream that ended; ``segment`` is one of its connection, or the exchange that it began
    with. It is made by position, as names cost twice the time.
    """
    request, response = stream.request, stream.response or _NO_SIDE
    return Exchange(
        segment.role,
        end,
        _FIRST | stream.interim,
        exchange_id_of(segment.connection_id, stream_id),
        0,  # parent_id
        exchange_id_of(peer_connection_id, stream_id) if peer_connection_id else 0,
        segment.connection_id,
        segment.process_start_ns,
        request.start_ns,
        request.end_ns,
        response.start_ns,
        response.end_ns,
        end_ns,
        request.body_bytes,
        response.body_bytes,
        segment.tgid,
        request.tid,
        0,  # response_tid: which thread sends a frame says nothing of who made the answer
        segment.remote_port,
        0,  # request_captured
        0,  # response_captured
        segment.remote_address,
        _NO_TAIL,
        segment.tls,
        b"",
        b"",
    )


def continued(exchange: Exchange, begun: Exchange) -> Exchange:
    """Return the exchange of stream 1 as what has become of ``begun``, the exchange that switched to HTTP/2.

    It keeps the ids, by which others may know it, and what else the kernel knew of it.
    """
    return msgspec.structs.replace(
        exchange,
        exchange_id=begun.exchange_id,
        parent_id=begun.parent_id,
        peer_id=begun.peer_id,
        flags=exchange.flags | begun.flags & _KEPT,
    )


def call_of(protocol: Http2, stream: Stream, segment: Segment | Exchange, end: int, cause: str, end_ns: int) -> Call:
    """Return the call of a stream that ended; ``cause`` is what cut it short, "" when its response is whole.

    ``segment`` is one of its connection, or the exchange that it began with.
    """
    role = segment.role
    asked, answer, request, response = stream.asked, stream.answer, stream.request, stream.response
    if asked[0].rpc is not None and protocol.is_rpc(asked[0], answer, stream.trailers):
        # An answer may come while the request goes on, or while the loss of its last segments has not shown yet.
        is_counted = request.messages is not None and (stream.request_ended or cause)
        messages = (
            request.messages.count if is_counted else None,
            response.messages.count if response is not None and response.messages is not None else 0,
        )
        status = _rpc_status(stream, role, end, cause, end_ns)
        return protocol.rpc_call(asked, segment, (answer, stream.trailers), cause, status, messages)
    sizes = (
        request.body_bytes if stream.request_ended and request.is_exact else UNKNOWN_AMOUNT,
        response.body_bytes if response is not None and response.is_exact and end == _NEXT else UNKNOWN_AMOUNT,
    )
    return protocol.http_call(asked, segment, answer, cause, sizes)


def _rpc_status(stream: Stream, role: int, end: int, cause: str, end_ns: int) -> str:
    """Return the name of a call's status code: what the server sent, or what the client makes of the end.

    "" when it is not known: a part of the headers that may hold it is unknown, or the agent gave up waiting.
    """
    answer, trailers = stream.answer, stream.trailers
    for part in (trailers, answer):
        if part is not None and part.rpc_status:
            return part.rpc_status
    if not cause:
        if answer is None or answer.is_partial or (trailers is not None and trailers.is_partial):
            return ""
        return grpc.status_of_http(answer.status)
    if end == _TIMED_OUT:
        return ""
    if cause in _BROKEN:
        if cause == "client_disconnect":
            return "CANCELLED"
        return "" if role == _SERVER else "UNAVAILABLE"  # statuscodes.md: what a client makes of a broken connection
    status = grpc.status_of_error(cause)
    if status == "CANCELLED" and grpc.has_expired(stream.asked[5], end_ns - stream.request.start_ns):
        return "DEADLINE_EXCEEDED"
    return status
