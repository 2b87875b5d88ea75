"""The records that pass between the stages of the pipeline.

In: nothing. Out: frozen records. This module never reads a clock, the kernel or the network; it imports
nothing of ours. The flow is ``Exchange`` (kernel) -> ``Call`` (protocols) -> ``Span`` (stitch) -> OTLP bytes.

The records are positional ``msgspec.Struct`` classes without garbage-collector tracking: one of each is made per
exchange, and a keyword-only frozen dataclass costs several times as much to create.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import msgspec

AttributeValue = str | int | float | bool | tuple[str, ...]
Attributes = tuple[tuple[str, AttributeValue], ...]
"""Ordered ``(key, value)`` pairs, hashable, so that encoders may cache by pair or by the whole tuple."""


class AttributeGroup(tuple[tuple[str, AttributeValue], ...]):
    """Attributes that often go together, made once and used again; equal and hashed by identity.

    An encoder keeps the bytes that it made of a group under the group itself: one look-up instead of one per attribute.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__  # type: ignore[assignment]
    __ne__ = object.__ne__  # type: ignore[assignment]


class SpanKind(IntEnum):
    """OTLP ``Span.SpanKind`` numbers (opentelemetry-proto, trace.proto)."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


class Role(IntEnum):
    """Which end of the exchange the observed process is. Numbers of ``enum exchange_role`` in bpf/events.h."""

    SERVER = 1
    CLIENT = 2


class End(IntEnum):
    """Why the kernel emitted the record. Numbers of ``enum exchange_end`` in bpf/events.h, where each is explained.

    OPEN and QUIET are provisional: a later record of the same exchange supersedes the earlier one.
    """

    OPEN = 1
    QUIET = 2
    NEXT = 3
    CLOSED = 4
    RESET = 5
    TIMED_OUT = 6
    HANDED_OVER = 7


class TlsNotice(IntEnum):
    """What the kernel has seen. Numbers of ``enum tls_notice`` in bpf/events.h, where each is explained."""

    UNWATCHED = 1
    OTHER_STACK = 2


class Flag(IntFlag):
    """Bits of ``enum exchange_flag`` in bpf/events.h."""

    FIRST = 1
    REQUEST_TRUNCATED = 2
    RESPONSE_TRUNCATED = 4
    TAIL_VALID = 8
    PEER_CLOSED = 16
    CLIENT_ONLY = 32
    PROCESS_UNKNOWN = 64
    INTERIM = 128
    REQUEST_GAP = 256
    FOREIGN = 512
    STREAM = 1024
    TLS = 2048


class Exchange(msgspec.Struct, frozen=True, gc=False):
    """One kernel record of a request and what is known of its response (``struct record_exchange``).

    Fields stand in the order of the C struct, where each is explained; its other members are not read. ``request`` and
    ``response`` are the captured head bytes (they may include the beginning of a body, and may be cut at the capture
    limit). Times are CLOCK_MONOTONIC nanoseconds, 0 when not reached. Addresses are 16 bytes, IPv4 as IPv4-mapped IPv6.
    ``request_bytes`` and ``response_bytes`` count head and body as seen on the socket. ``tail`` holds the last
    ``min(8, response_bytes)`` response bytes, right-aligned, when ``Flag.TAIL_VALID`` is set. ``tls`` is the version
    and, in its low 16 bits, the cipher suite, as numbers of TLS; 0: no TLS, or they were not seen.
    """

    role: int
    end: int
    flags: int
    exchange_id: int
    parent_id: int
    peer_id: int
    connection_id: int
    process_start_ns: int
    request_start_ns: int
    request_end_ns: int
    response_start_ns: int
    response_end_ns: int
    end_ns: int
    request_bytes: int
    response_bytes: int
    tgid: int
    request_tid: int
    response_tid: int
    remote_port: int
    request_captured: int
    response_captured: int
    remote_address: bytes
    tail: bytes
    tls: int
    request: bytes
    response: bytes


class ProcessSeen(msgspec.Struct, frozen=True, gc=False):
    """A process made its first exchange (``struct record_process``); it may have ended already.

    ``start_ns`` is CLOCK_BOOTTIME nanoseconds; with ``tgid`` it identifies the process. ``executable`` is the last
    component of the executable's path, ``comm`` the name of its main thread, both decoded with replacement characters.
    ``cgroup`` is what ``/proc/<pid>/cgroup`` said of cgroup v2, and of the memory controller where that is in cgroup
    v1, as seen from the root; without what was too long.
    """

    tgid: int
    start_ns: int
    uid: int
    ppid: int
    comm: str
    executable: str
    cgroup: bytes


class SegmentFlag(IntFlag):
    """Bits of ``enum segment_flag`` in bpf/events.h."""

    HTTP2 = 1
    AT_FRAME = 2
    TLS = 4
    OVERTAKES = 8


class Segment(msgspec.Struct, frozen=True, gc=False):
    """Bytes of one system call on a connection in stream mode (``struct record_segment``).

    ``direction`` is 1 for request bytes, 2 for response bytes. ``offset`` counts the bytes of this direction before the
    segment since the connection entered stream mode. ``length`` above ``len(data)`` means a gap at the segment's end.
    ``tls``: see Exchange.
    """

    kind: int
    role: int
    direction: int
    captured: int
    flags: int
    connection_id: int
    process_start_ns: int
    time_ns: int
    offset: int
    length: int
    tgid: int
    tid: int
    netns: int
    local_port: int
    remote_port: int
    local_address: bytes
    remote_address: bytes
    tls: int
    data: bytes


class PeerFound(msgspec.Struct, frozen=True, gc=False):
    """Both ends of an HTTP/2 connection are on this node (``struct record_peer``): the server's and the client's."""

    connection_id: int
    peer_connection_id: int


class ConnectionClosed(msgspec.Struct, frozen=True, gc=False):
    """A connection ended whose last exchange had been reported provisionally, or one in stream mode.

    The fields are those of ``struct record_close``; ``end`` is CLOSED, RESET or TIMED_OUT.
    """

    kind: int
    role: int
    end: int
    flags: int
    connection_id: int
    exchange_id: int
    time_ns: int


class ConnectionUpgraded(msgspec.Struct, frozen=True, gc=False):
    """The response to an exchange of HTTP/1, 101, switched its connection to HTTP/2 (RFC 7540 section 3.2).

    The exchange goes on as stream 1 of the connection, whose segments follow. Its response is the head of the 101.
    """

    exchange: Exchange


class TlsSeen(msgspec.Struct, frozen=True, gc=False):
    """How a process uses TLS is to be looked at (``struct record_tls``); ``notice`` is a number of ``TlsNotice``."""

    notice: int
    tgid: int
    start_ns: int


class TraceContext(msgspec.Struct, frozen=True, gc=False):
    """What one propagation format said about the trace.

    ``trace_id`` is 16 bytes, never all zero. ``span_id`` is 8 bytes, never all zero, or None where the format allows a
    trace without a parent (X-Ray). ``sampled`` is None when the sender left the decision open. ``trace_state`` is the
    verbatim W3C value or an empty string. ``format`` is the configuration name: tracecontext, grpc, b3, b3multi,
    jaeger, xray or datadog.
    """

    trace_id: bytes
    span_id: bytes | None
    sampled: bool | None
    trace_state: str
    format: str


class Call(msgspec.Struct, frozen=True, gc=False):
    """What one exchange asked and answered, as its protocol understands it.

    ``attributes`` follow the semantic conventions already. ``error`` is True when the span status is Error.
    ``context`` is the first valid trace context of the request in the configured order, ``other_contexts`` those valid
    ones that disagree with it about the trace or the parent. ``decision`` is what a request without a context says
    about sampling, None when nothing. ``request_id`` is the ``x-request-id`` value or an empty string.
    ``complete`` is True when the response is whole by the protocol's own rules (Content-Length reached, last chunk
    seen, no body allowed); False means that only the end of the connection or a later record can tell. ``groups``
    come before ``attributes``; ``all_attributes()`` has both.
    """

    name: str
    attributes: Attributes
    error: bool
    context: TraceContext | None
    other_contexts: tuple[TraceContext, ...]
    request_id: str
    complete: bool
    groups: tuple[AttributeGroup, ...] = ()
    decision: bool | None = None

    def all_attributes(self) -> Attributes:
        """The attributes of the groups, then the single ones."""
        return (*(pair for group in self.groups for pair in group), *self.attributes)


class SpanLink(msgspec.Struct, frozen=True, gc=False):
    """A causal reference to another span: ``trace_id`` 16 bytes, ``span_id`` 8 bytes."""

    trace_id: bytes
    span_id: bytes
    trace_state: str
    attributes: Attributes


class Span(msgspec.Struct, frozen=True, gc=False):
    """One finished span, ready to be encoded.

    Ids are raw bytes (16, 8, 8); ``parent_span_id`` is empty for a root. Times are Unix nanoseconds. ``kind`` is a
    ``SpanKind`` number. ``link_method`` names how the parent was found and is exported as ``spanloom.link.method``;
    empty for a root without any context. ``sampled`` is the trace's decision (the exported ``flags`` low bit).
    ``process_key`` selects the resource. ``groups``: see Call.
    """

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    trace_state: str
    name: str
    kind: int
    start_time_ns: int
    end_time_ns: int
    attributes: Attributes
    error: bool
    links: tuple[SpanLink, ...]
    link_method: str
    sampled: bool
    process_key: tuple[int, int]
    groups: tuple[AttributeGroup, ...] = ()

    def all_attributes(self) -> Attributes:
        """The attributes of the groups, then the single ones."""
        return (*(pair for group in self.groups for pair in group), *self.attributes)
