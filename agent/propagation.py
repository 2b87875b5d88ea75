"""Reads the trace context out of a request's headers, in any of seven propagation formats.

In: lower-case header names with their raw values. Out: ``TraceContext`` records. This module never raises because of
what a header holds: a malformed header is counted and treated as absent. It never reads a clock, a socket or the
configuration, never writes a header, and knows nothing of ``x-request-id``, which is no trace context.

Sources: W3C Trace Context Level 2 (sections 3.2, 3.3), OpenCensus BinaryEncoding, openzipkin/b3-propagation (Http
Encodings), Jaeger "Propagation Format", AWS X-Ray "Tracing header", Datadog "Propagating trace context". Where they
allow a choice the stricter reading is taken: a wrong parent is worse than a missing one. All formats stand in this
one module, each with its own section, because they share the rules for ids and for repeated headers.
"""

from __future__ import annotations

import re
from binascii import Error as NotHexError
from binascii import a2b_base64, unhexlify
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import msgspec

from agent.model import TraceContext

_Headers = Mapping[bytes, bytes | list[bytes]]
_Found = TraceContext | bool | None
"""What one format says: a context, a sampling decision without any ids, or nothing."""
_Reader = Callable[[_Headers, dict[str, int]], _Found]

_OWS = b" \t"
_ZERO_TRACE_ID = bytes(16)
_ZERO_SPAN_ID = bytes(8)

TRACE_STATE_MEMBERS_MAX = 32
TRACE_STATE_CACHED_BYTES = 512
"""Only values up to this length are remembered. W3C 3.3.1.5 asks senders to fit into 512."""
TRACE_STATE_CACHE_ENTRIES = 256
"""The least recently used entry goes first: at most about 300 kB, whatever a hostile peer sends."""

_UPPER_HEX_SPOILED = bytes.maketrans(b"ABCDEF", b"??????")
_TRACE_STATE_MEMBER = re.compile(
    rb"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{1,256}={0,2}").fullmatch
_GRPC_FIELD_BYTES = {0: 16, 1: 8, 2: 1}
"""Trace id, span id and options by their field number."""
_B3_STATES = {b"0": False, b"1": True, b"d": True}
_B3_SAMPLED = {b"0": False, b"1": True, b"false": False, b"true": True}
_XRAY_FIELDS = frozenset((b"Root", b"Parent", b"Sampled"))
_XRAY_SAMPLED = {b"0": False, b"1": True, b"?": None}
_DATADOG_TID = re.compile(rb"(?:^|,)[ \t]*_dd\.p\.tid=([^,]*)").findall
_DATADOG_PRIORITY = re.compile(rb"-?[0-9]{1,10}").fullmatch


class Extractor:
    """Finds the trace context of a request in the configured formats.

    ``formats`` is an ordered selection of ``FORMATS``, the most trusted first; an unknown name or one given twice
    raises ``ValueError``. B3's single header outranks its multiple headers (b3-propagation, Http Encodings), so when
    both are configured ``b3`` is read before ``b3multi`` in either order.

    ``header_names`` holds the lower-case names of the headers that the configured formats read. ``malformed`` counts,
    per format, the malformed headers seen so far; an id whose other half is missing counts as one. Give the counts of
    an extractor that this one follows to go on counting in them.
    """

    __slots__ = ("_format_by_header", "_formats", "context_behind_version", "header_names", "malformed")

    def __init__(self, formats: Sequence[str], malformed: dict[str, int] | None = None) -> None:
        order = list(formats)
        for position, name in enumerate(order):
            if name not in _FORMATS:
                raise ValueError(f"unknown propagation format {name!r}; known are {', '.join(FORMATS)}")
            if name in order[:position]:
                raise ValueError(f"propagation format {name!r} is given twice")
        if "b3" in order and "b3multi" in order and order.index("b3") > order.index("b3multi"):
            order.remove("b3")
            order.insert(order.index("b3multi"), "b3")
        self._formats = tuple(_FORMATS[name] for name in order)
        self._format_by_header = {header: entry for entry in self._formats for header in entry[0]}
        self.header_names: frozenset[bytes] = frozenset(self._format_by_header)
        self.malformed: dict[str, int] = malformed if malformed is not None else {}
        for name in order:
            self.malformed.setdefault(name, 0)
        self.context_behind_version = context_behind_version

    def extract(
        self, headers: _Headers, malformed: dict[str, int] | None = None
    ) -> tuple[TraceContext | None, tuple[TraceContext, ...]]:
        """Return the first valid context in the configured order and those that disagree with it about trace or parent.

        ``headers`` maps lower-case names to the value, or to the list of values in order when the header was repeated;
        names outside ``header_names`` are ignored. A format that carries only a decision (``b3: 0``, ``X-B3-Sampled``
        or ``Sampled=`` without ids) yields no context, but decides for a first context that left the decision open, and
        ``b3`` alone for the ids of the multiple headers, which it wins over. Malformed headers are counted in
        ``malformed``, which must have a value for each format, when that is given. Never raises.
        """
        if not headers:
            return None, ()
        if malformed is None:
            malformed = self.malformed
        # One format alone, the common case: nothing can disagree, and a decision without ids is of no use.
        for header in headers:
            names, read = self._format_by_header.get(header, _NO_FORMAT)
            if len(headers) == 1 or names.issuperset(headers):
                found = read(headers, malformed)
                return (found, ()) if found.__class__ is TraceContext else (None, ())
            break
        first: TraceContext | None = None
        others: tuple[TraceContext, ...] = ()
        decision: bool | None = None
        single: bool | None = None
        for names, read in self._formats:
            if names.isdisjoint(headers):
                continue
            found = read(headers, malformed)
            if found is None:
                continue
            if found is True or found is False:
                if decision is None:
                    decision = found
                if b"b3" in names:
                    single = found
            elif first is None:
                first = found
            elif _disagree(first, found):
                others += (found,)
        if first is not None:
            if single is not None and first.format == "b3multi":
                first = msgspec.structs.replace(first, sampled=single)
            elif first.sampled is None and decision is not None:
                first = msgspec.structs.replace(first, sampled=decision)
        return first, others

    def decision(self, headers: _Headers) -> bool | None:
        """What headers without ids say about sampling: the first decision in the configured order, None without one.

        For requests in which ``extract`` found no context: the trace that begins here follows it.
        """
        for names, read in self._formats:
            if not names.isdisjoint(headers):
                found = read(headers, Counter())
                if found is True or found is False:
                    return found
        return None


def _disagree(first: TraceContext, other: TraceContext) -> bool:
    if not _same_trace(first.trace_id, other.trace_id):
        return True
    return None not in (first.span_id, other.span_id) and first.span_id != other.span_id


def _same_trace(left: bytes, right: bytes) -> bool:
    """Whether two trace ids can be of one trace: a format that carries 64 bits says nothing about the upper half."""
    if left == right:
        return True
    return left[8:] == right[8:] and _ZERO_SPAN_ID in (left[:8], right[:8])


def _only(headers: _Headers, name: bytes) -> bytes | None:
    """Return the trimmed value, None when absent, and for a repeated header empty bytes, which no format accepts."""
    value = headers.get(name)
    if isinstance(value, list):
        if len(value) != 1:
            return b"" if value else None
        value = value[0]
    return None if value is None else value.strip(_OWS)


def _joined(headers: _Headers, name: bytes) -> bytes | None:
    """Return the trimmed value of a list header; repeated ones are combined in order (RFC 9110, section 5.3)."""
    value = headers.get(name)
    if isinstance(value, list):
        value = b",".join(value)
    return None if value is None else value.strip(_OWS)


def _first(headers: _Headers, name: bytes) -> bytes | None:
    """Return the trimmed value of the first such header or None."""
    value = headers.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else value.strip(_OWS)


def _padded(digits: bytes, size: int) -> bytes | None:
    """Return 1 to ``2 * size`` hex digits of either case as ``size`` bytes, zeros on the left; None when malformed."""
    if not 0 < len(digits) <= 2 * size:
        return None
    try:
        return unhexlify(digits.rjust(2 * size, b"0"))
    except NotHexError:
        return None


def _trace_id(digits: bytes) -> bytes | None:
    """Return 1 to 32 hex digits as a trace id of 16 bytes; None when malformed or zero."""
    value = _padded(digits, 16)
    return None if value == _ZERO_TRACE_ID else value


def _span_id(digits: bytes) -> bytes | None:
    """Return 1 to 16 hex digits as a span id of 8 bytes; None when malformed or zero."""
    value = _padded(digits, 8)
    return None if value == _ZERO_SPAN_ID else value


# ---- W3C Trace Context


def context_behind_version(value: bytes, trace_state: str) -> TraceContext | None:
    """The context of a version 00 ``traceparent``, given its 52 bytes behind ``00-``; None when they are malformed.

    For callers that have cut them out of a head already; ``trace_state`` is a validated tracestate or empty.
    """
    try:
        fields = unhexlify(value.translate(_UPPER_HEX_SPOILED, b"-"))
    except NotHexError:
        return None
    trace_id = fields[:16]
    span_id = fields[16:24]
    if (
        len(fields) != 25
        or len(value) != 52
        or value[32] != 45
        or value[49] != 45
        or trace_id == _ZERO_TRACE_ID
        or span_id == _ZERO_SPAN_ID
    ):
        return None
    return TraceContext(trace_id, span_id, fields[24] & 1 == 1, trace_state, "tracecontext")


def _read_tracecontext(headers: _Headers, malformed: dict[str, int]) -> TraceContext | None:
    """Read ``traceparent`` and ``tracestate``.

    One translation and one conversion check all digits at once: upper case is spoiled, exactly three dashes go, and
    ``unhexlify`` refuses the rest. This runs for nearly every traced request, hence no regular expression.
    """
    value = headers.get(b"traceparent")
    if value is None:
        return None
    if value.__class__ is list or len(value) != 55:
        value = _long_traceparent(headers)
        if value is None:
            return None
    try:
        fields = unhexlify(value.translate(_UPPER_HEX_SPOILED, b"-"))
    except NotHexError:
        fields = b""
    trace_id = fields[1:17]
    span_id = fields[17:25]
    if (
        len(fields) != 26
        or value[2] != 45
        or value[35] != 45
        or value[52] != 45
        or fields[0] == 255
        or trace_id == _ZERO_TRACE_ID
        or span_id == _ZERO_SPAN_ID
    ):
        malformed["tracecontext"] += 1
        return None
    trace_state = ""
    if len(headers) > 1:
        state = _joined(headers, b"tracestate")
        if state:
            cached = len(state) <= TRACE_STATE_CACHED_BYTES
            valid = _trace_state(state) if cached else _trace_state.__wrapped__(state)
            if valid is None:
                malformed["tracecontext"] += 1
            else:
                trace_state = valid
    return TraceContext(trace_id, span_id, fields[25] & 1 == 1, trace_state, "tracecontext")


def _long_traceparent(headers: _Headers) -> bytes | None:
    """Return the 55 bytes to read of an unusual ``traceparent``, empty bytes when malformed, None when absent.

    Unusual is: repeated, surrounded by white space, or of a higher version with more behind the flags.
    """
    value = _only(headers, b"traceparent")
    if value is None or len(value) == 55:
        return value
    if len(value) > 55 and value[55] == 45 and value[:2] != b"00":
        return value[:55]
    return b""


@lru_cache(maxsize=TRACE_STATE_CACHE_ENTRIES)
def _trace_state(value: bytes) -> str | None:
    """Return a valid ``tracestate`` as text, verbatim, None when malformed, and an empty string without members.

    Empty members are allowed and not counted (W3C 3.3.1.2; RFC 9110, section 5.6.1.2).
    """
    keys = set()
    for untrimmed in value.split(b","):
        member = untrimmed.strip(_OWS)
        if not member:
            continue
        key = member.partition(b"=")[0]
        if key in keys or len(keys) == TRACE_STATE_MEMBERS_MAX or _TRACE_STATE_MEMBER(member) is None:
            return None
        keys.add(key)
    return value.decode("ascii") if keys else ""


# ---- gRPC


def _read_grpc(headers: _Headers, malformed: dict[str, int]) -> TraceContext | None:
    """Read ``grpc-trace-bin``: OpenCensus's binary encoding, as a binary metadata value of gRPC.

    That is base64 with or without padding, several values joined by commas; behind a zero byte it is not coded at all
    (gRFC G1). Fields may stand in any order and end at the first unknown one. Without the sampled bit the sender left
    the decision open (OpenCensus, Trace-options).
    """
    value = _only(headers, b"grpc-trace-bin")
    if value is None:
        return None
    if value[:1] == b"\0":
        value = value[1:]
    else:
        try:
            # With more padding than needed it decodes all the same; anything but the alphabet is refused.
            value = a2b_base64(value.rstrip(b"=") + b"==") if _BASE64(value) else b""
        except NotHexError:
            value = b""
    fields: dict[int, bytes] = {}
    position = 1
    while position < len(value) and value[0] == 0:
        size = _GRPC_FIELD_BYTES.get(value[position])
        if size is None:
            break
        field = value[position + 1 : position + 1 + size]
        if len(field) < size or value[position] in fields:
            fields.clear()
            break
        fields[value[position]] = field
        position += 1 + size
    trace_id = fields.get(0, _ZERO_TRACE_ID)
    span_id = fields.get(1, _ZERO_SPAN_ID)
    if trace_id == _ZERO_TRACE_ID or span_id == _ZERO_SPAN_ID:
        malformed["grpc"] += 1
        return None
    return TraceContext(trace_id, span_id, True if fields.get(2, b"\0")[0] & 1 else None, "", "grpc")


# ---- B3


def _b3_trace_id(digits: bytes) -> bytes | None:
    return _trace_id(digits) if len(digits) in (16, 32) else None


def _b3_span_id(digits: bytes) -> bytes | None:
    return _span_id(digits) if len(digits) == 16 else None


def _read_b3(headers: _Headers, malformed: dict[str, int]) -> _Found:
    """Read the single header ``b3``."""
    value = _only(headers, b"b3")
    if value is None:
        return None
    fields = value.split(b"-", 4)
    if len(fields) == 1:
        decision = _B3_STATES.get(value)
        if decision is None:
            malformed["b3"] += 1
        return decision
    trace_id = _b3_trace_id(fields[0])
    span_id = _b3_span_id(fields[1])
    sampled = _B3_STATES.get(fields[2]) if len(fields) > 2 else None
    if (
        trace_id is None
        or span_id is None
        or len(fields) > 4
        or (len(fields) > 2 and sampled is None)
        or (len(fields) > 3 and not _is_b3_parent(fields[3]))
    ):
        malformed["b3"] += 1
        return None
    return TraceContext(trace_id, span_id, sampled, "", "b3")


def _read_b3multi(headers: _Headers, malformed: dict[str, int]) -> _Found:
    """Read the ``X-B3-*`` headers, each for itself: a malformed one is as if absent, of several the first wins."""
    sampled = None
    value = _first(headers, b"x-b3-sampled")
    if value is not None:
        sampled = _B3_SAMPLED.get(value.lower())
        malformed["b3multi"] += sampled is None
    # No implementation reads the flags as a bit field, and other values than 1 mean nothing.
    if _first(headers, b"x-b3-flags") == b"1":
        sampled = True
    parent = _first(headers, b"x-b3-parentspanid")
    if parent is not None:
        malformed["b3multi"] += not _is_b3_parent(parent)
    trace_digits = _first(headers, b"x-b3-traceid")
    span_digits = _first(headers, b"x-b3-spanid")
    if trace_digits is None and span_digits is None:
        return sampled
    if trace_digits is None or span_digits is None:
        malformed["b3multi"] += 1
        return sampled
    trace_id = _b3_trace_id(trace_digits)
    span_id = _b3_span_id(span_digits)
    if trace_id is None or span_id is None:
        malformed["b3multi"] += (trace_id is None) + (span_id is None)
        return sampled
    return TraceContext(trace_id, span_id, sampled, "", "b3multi")


def _is_b3_parent(digits: bytes) -> bool:
    """Whether it has the form of a parent span id. Zero is let pass: some senders mean "no parent" by it."""
    return len(digits) == 16 and _padded(digits, 8) is not None


# ---- Jaeger


def _read_jaeger(headers: _Headers, malformed: dict[str, int]) -> TraceContext | None:
    """Read ``uber-trace-id``. The parent field is not looked at; both the sampled and the debug bit mean sampled."""
    value = _only(headers, b"uber-trace-id")
    if value is None:
        return None
    if b"%" in value:
        value = value.replace(b"%3A", b":").replace(b"%3a", b":")
    fields = value.split(b":", 4)
    if len(fields) == 4:
        trace_id = _trace_id(fields[0])
        span_id = _span_id(fields[1])
        flags = _padded(fields[3], 1)
        if trace_id is not None and span_id is not None and flags is not None:
            return TraceContext(trace_id, span_id, flags[0] & 3 != 0, "", "jaeger")
    malformed["jaeger"] += 1
    return None


# ---- AWS X-Ray


def _read_xray(headers: _Headers, malformed: dict[str, int]) -> _Found:
    """Read ``X-Amzn-Trace-Id``. One bad or repeated field of the three known ones spoils the header."""
    value = _only(headers, b"x-amzn-trace-id")
    if value is None:
        return None
    fields: dict[bytes, bytes] = {}
    for field in value.split(b";"):
        name, _, text = field.partition(b"=")
        name = name.strip(_OWS)
        if name in _XRAY_FIELDS:
            # A second one of the same name makes it unclear which is meant, so let the first fail.
            fields[name] = b"" if name in fields else text.strip(_OWS)
    root = fields.get(b"Root")
    parent = fields.get(b"Parent")
    decision = fields.get(b"Sampled", b"?" if root is not None else b"")
    trace_id = None if root is None else _xray_trace_id(root)
    span_id = _span_id(parent) if parent is not None and len(parent) == 16 else None
    if (
        decision not in _XRAY_SAMPLED
        or (root is not None and trace_id is None)
        or (parent is not None and span_id is None)
    ):
        malformed["xray"] += 1
        return None
    sampled = _XRAY_SAMPLED[decision]
    return sampled if trace_id is None else TraceContext(trace_id, span_id, sampled, "", "xray")


def _xray_trace_id(root: bytes) -> bytes | None:
    if len(root) != 35 or root[:2] != b"1-" or root[10] != 45:
        return None
    return _trace_id(root[2:10] + root[11:])


# ---- Datadog


def _read_datadog(headers: _Headers, malformed: dict[str, int]) -> TraceContext | None:
    """Read the ``x-datadog-*`` headers, each for itself: a malformed one is as if absent."""
    sampled = None
    value = _only(headers, b"x-datadog-sampling-priority")
    if value is not None:
        if _DATADOG_PRIORITY(value):
            sampled = int(value) > 0
        else:
            malformed["datadog"] += 1
    upper = _ZERO_SPAN_ID
    value = _joined(headers, b"x-datadog-tags")
    if value is not None:
        digits = _DATADOG_TID(value)
        if digits:
            tid = digits[0].strip(_OWS)
            read = _padded(tid, 8) if len(digits) == 1 and len(tid) == 16 else None
            if read is None:
                malformed["datadog"] += 1
            else:
                upper = read
    trace_digits = _only(headers, b"x-datadog-trace-id")
    span_digits = _only(headers, b"x-datadog-parent-id")
    if trace_digits is None and span_digits is None:
        return None
    if trace_digits is None or span_digits is None:
        malformed["datadog"] += 1
        return None
    lower = _unsigned64(trace_digits)
    span_id = _unsigned64(span_digits)
    if lower is None or span_id is None:
        malformed["datadog"] += (lower is None) + (span_id is None)
        return None
    return TraceContext(upper + lower, span_id, sampled, "", "datadog")


def _unsigned64(digits: bytes) -> bytes | None:
    """Return a decimal number from 1 to 2**64 - 1 as 8 bytes, else None."""
    # 20 digits are the longest number in range, and the bound keeps int() from quadratic work on hostile input.
    if len(digits) > 20 or not digits.isdigit():
        return None
    number = int(digits)
    return number.to_bytes(8, "big") if 0 < number < 1 << 64 else None


_NO_FORMAT: tuple[frozenset[bytes], _Reader] = (frozenset(), lambda headers, malformed: None)
_FORMATS: dict[str, tuple[frozenset[bytes], _Reader]] = {
    "tracecontext": (frozenset((b"traceparent", b"tracestate")), _read_tracecontext),
    "grpc": (frozenset((b"grpc-trace-bin",)), _read_grpc),
    "b3": (frozenset((b"b3",)), _read_b3),
    "b3multi": (
        frozenset((b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags")),
        _read_b3multi,
    ),
    "jaeger": (frozenset((b"uber-trace-id",)), _read_jaeger),
    "xray": (frozenset((b"x-amzn-trace-id",)), _read_xray),
    "datadog": (
        frozenset((b"x-datadog-trace-id", b"x-datadog-parent-id", b"x-datadog-sampling-priority", b"x-datadog-tags")),
        _read_datadog,
    ),
}
FORMATS: tuple[str, ...] = tuple(_FORMATS)
"""The names of the known formats in the default order of trust."""
HEADER_NAMES: frozenset[bytes] = frozenset(header for headers, _ in _FORMATS.values() for header in headers)
"""The lower-case names of all headers that any format reads, and no others."""
