"""Spans to OTLP wire bytes, written by hand from cached fragments.

In: ``agent.model.Span`` and attribute tuples. Out: protobuf wire bytes of the messages of opentelemetry-proto
(``trace/v1/trace.proto``, ``common/v1/common.proto``, ``collector/trace/v1/trace_service.proto``). Never imports the
protobuf runtime, never does I/O, never raises on text that is not valid Unicode (lone surrogates become ``?``).

Most attributes of a span repeat from span to span (method, scheme, server address, status code), so the encoded
``KeyValue`` of a pair is kept and looked up by the pair; one ``b"".join`` over one ``map`` then encodes a whole
attribute list. Where a span comes with groups, the same is done by group. The output is a pure function of the input:
what a cache holds never changes a byte.

Memory: at most 4096 attribute fragments and 1024 span tails, each of at most 256 bytes and made of ASCII only, and
one table of about 110 heads for each of the ten volatile keys: less than 4 MB together, however hostile the traffic;
and 4096 groups of at most 1 KiB each, which take 4 MB more at the very most and a tenth of that in practice.
The caches are emptied when full; the few dozen fragments that matter are back after a few dozen spans.

Not thread-safe in the sense of bounds only: concurrent callers get right bytes, a cache may exceed its bound by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from struct import error as StructError

from agent import __version__
from agent.model import AttributeGroup, Attributes, AttributeValue, Span

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""The semantic-convention release whose names the attributes use."""

MAX_CACHED_ATTRIBUTES = 4096
MAX_CACHED_TAILS = 1024
MAX_CACHED_FRAGMENT_BYTES = 256
MAX_CACHED_GROUPS = 4096
MAX_CACHED_GROUP_BYTES = 1024

INTEGER_KEYS = frozenset({"http.response.status_code", "server.port"})
"""Keys whose values the conventions define as integers and which repeat.

In a Python dict ``(key, 1)``, ``(key, 1.0)`` and ``(key, True)`` are one key, so numbers cannot be cached by pair in
general: the first type seen would decide for all. They are cached for these keys only, and here a bool or an integral
float is *always* exported as the integer that it equals, whether it was cached or not. For every other key a number is
encoded anew each time and keeps its type.
"""

VOLATILE_KEYS = (
    "url.full",
    "url.path",
    "url.query",
    "client.port",
    "network.local.port",
    "network.peer.port",
    "http.request.body.size",
    "http.request.size",
    "http.response.body.size",
    "http.response.size",
)
"""Keys that take a new value with nearly every span: never cached, so that they cannot push out what repeats."""

_INT64_MIN = -(1 << 63)
_INT64_MAX = (1 << 63) - 1
_UINT64_MAX = (1 << 64) - 1

_DOUBLE = Struct("<d")
_TWO_BYTES = Struct("<H")

# The fixed-size fields of a span in one go, tags as little-endian literals: the ``ScopeSpans.spans`` tag and a two-byte
# length, 0a10 trace_id, 1208 span_id, [2208 parent_span_id,] 39 start, 41 end.
_HEAD_WITH_PARENT = Struct("<BHH16sH8sH8sBQBQ")
_HEAD_WITHOUT_PARENT = Struct("<BHH16sH8sBQBQ")
_WITH_PARENT_BYTES = _HEAD_WITH_PARENT.size - 3
_WITHOUT_PARENT_BYTES = _HEAD_WITHOUT_PARENT.size - 3

_FLAG_SAMPLED = b"\x85\x01\x01\x00\x00\x00"
_STATUS_ERROR = b"\x7a\x02\x18\x02"

_SPAN_ATTRIBUTE_TAG = b"\x4a"
_LINK_ATTRIBUTE_TAG = b"\x22"
_RESOURCE_ATTRIBUTE_TAG = b"\x0a"


def _varint(value: int) -> bytes:
    """Encode 0 <= value < 2**64 as a base-128 varint (protobuf encoding, "Base 128 Varints")."""
    if value < 128:
        return _SMALL[value]
    if value < 16384:
        # The low seven bits with the continuation bit, the rest one bit further up: value + (value without its low
        # seven bits) moves the rest, and 128 sets the bit.
        return _TWO_BYTES.pack(value + (value & -128) + 128)
    if value < 2097152:
        return bytes((value & 127 | 128, value >> 7 & 127 | 128, value >> 14))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = tuple(bytes((value,)) for value in range(128))


def _text(value: str) -> bytes:
    """UTF-8; a lone surrogate, which UTF-8 cannot carry, becomes ``?``."""
    try:
        return value.encode()
    except UnicodeEncodeError:
        return value.encode(errors="replace")


def _delimited(tag: bytes, body: bytes) -> bytes:
    return tag + _varint(len(body)) + body


def _any_value(value: AttributeValue) -> bytes:
    """The body of an ``AnyValue``. Integers beyond 64 bits signed are clamped. Raises TypeError for other types."""
    if isinstance(value, str):
        return _delimited(b"\x0a", _text(value))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(min(max(value, _INT64_MIN), _INT64_MAX) & _UINT64_MAX)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE.pack(value)
    if isinstance(value, tuple):
        items = b"".join(_delimited(b"\x0a", _delimited(b"\x0a", _text(item))) for item in value)
        return _delimited(b"\x2a", items)
    raise TypeError(f"an attribute value must be str, bool, int, float or a tuple of str, not {type(value).__name__}")


def _key_value(tag: bytes, key: str, value: AttributeValue) -> bytes:
    return _delimited(tag, _delimited(b"\x0a", _text(key)) + _delimited(b"\x12", _any_value(value)))


def _text_heads(key: str) -> list[bytes]:
    """All bytes before the value of a text attribute, by the value's length, while every length fits one byte."""
    key_part = _delimited(b"\x0a", _text(key))
    heads = []
    length = 0
    while (body_length := len(key_part) + length + 4) < 128:
        heads.append(_SPAN_ATTRIBUTE_TAG + _SMALL[body_length] + key_part + bytes((0x12, length + 2, 0x0A, length)))
        length += 1
    return heads


def _integer_heads(key: str) -> list[bytes]:
    """All bytes before the varint of an integer attribute, by the varint's length, up to three bytes."""
    key_part = _delimited(b"\x0a", _text(key))
    return [
        _SPAN_ATTRIBUTE_TAG + _SMALL[len(key_part) + length + 3] + key_part + bytes((0x12, length + 1, 0x18))
        for length in range(4)
    ]


_VOLATILE_HEADS = {key: (_text_heads(key), _integer_heads(key)) for key in VOLATILE_KEYS}


class _AttributeFragments(dict[tuple[str, AttributeValue], bytes]):
    """``(key, value)`` -> the ``Span.attributes`` element, tag and length included; bounds in the module docstring."""

    __slots__ = ()

    def __missing__(self, pair: tuple[str, AttributeValue]) -> bytes:
        key, value = pair
        heads = _VOLATILE_HEADS.get(key)
        if heads is not None:
            # The branches of _varint again, inline: two or three of these per span are most of its cost.
            if type(value) is int:
                if 127 < value < 16384:
                    return heads[1][2] + _TWO_BYTES.pack(value + (value & -128) + 128)
                if 16383 < value < 2097152:
                    return heads[1][3] + bytes((value & 127 | 128, value >> 7 & 127 | 128, value >> 14))
            elif type(value) is str:
                try:
                    text = value.encode()
                    return heads[0][len(text)] + text
                except (UnicodeEncodeError, IndexError):
                    pass
            return _key_value(_SPAN_ATTRIBUTE_TAG, key, value)
        if key in INTEGER_KEYS and isinstance(value, float | int) and value == value // 1:
            value = int(value)
            cacheable = True
        else:
            # Only ASCII: a Python string takes up to four bytes for each character, and the bound is on the fragment.
            text = value[0] if type(value) is tuple and len(value) == 1 else value
            cacheable = type(text) is str and text.isascii() and key.isascii()
        fragment = _key_value(_SPAN_ATTRIBUTE_TAG, key, value)
        if cacheable and len(fragment) <= MAX_CACHED_FRAGMENT_BYTES:
            if len(self) >= MAX_CACHED_ATTRIBUTES:
                self.clear()
            self[key, value] = fragment
        return fragment


class _GroupFragments(dict[AttributeGroup, bytes]):
    """A group -> its ``Span.attributes`` elements; bounds in the module docstring. Keeps the group alive, too."""

    __slots__ = ()

    def __missing__(self, group: AttributeGroup) -> bytes:
        fragment = b"".join(map(_attribute, group))
        if len(fragment) <= MAX_CACHED_GROUP_BYTES:
            if len(self) >= MAX_CACHED_GROUPS:
                self.clear()
            self[group] = fragment
        return fragment


class _Tails(dict[tuple[str, int, bool, bool, str], bytes]):
    """``(name, kind, error, sampled, link_method)`` -> those fields; bounds in the module docstring."""

    __slots__ = ()

    def __missing__(self, identity: tuple[str, int, bool, bool, str]) -> bytes:
        name, kind, error, sampled, link_method = identity
        parts = [_delimited(b"\x2a", _text(name)), b"\x30", _varint(kind & _UINT64_MAX)]
        if link_method:
            parts.append(_key_value(_SPAN_ATTRIBUTE_TAG, "spanloom.link.method", link_method))
        if error:
            parts.append(_STATUS_ERROR)
        if sampled:
            parts.append(_FLAG_SAMPLED)
        fragment = b"".join(parts)
        if len(fragment) <= MAX_CACHED_FRAGMENT_BYTES and name.isascii() and link_method.isascii():
            if len(self) >= MAX_CACHED_TAILS:
                self.clear()
            self[identity] = fragment
        return fragment


_attributes = _AttributeFragments()
_attribute = _attributes.__getitem__
_groups = _GroupFragments()
_group = _groups.__getitem__
_tails = _Tails()
_tail = _tails.__getitem__


def encode_span(span: Span) -> bytes:
    """One element of ``ScopeSpans.spans``, tag and length included (trace.proto, message Span).

    Ids must have their sizes (16, 8, 0 or 8 bytes). Times outside of 64 bits unsigned are clamped, as are integer
    attributes outside of 64 bits signed. ``flags`` carries only the W3C sampled bit: whether the parent is remote is
    not known. Raises TypeError for an attribute value of a type that the model does not allow.
    """
    body = _tail((span.name, span.kind, span.error, span.sampled, span.link_method)) + b"".join(
        map(_group, span.groups)
    )
    if span.attributes:
        body += b"".join(map(_attribute, span.attributes))
    if span.links or span.trace_state:
        body += _trace_state_and_links(span)
    parent_span_id = span.parent_span_id
    try:
        if parent_span_id:
            length = len(body) + _WITH_PARENT_BYTES
            if 127 < length < 16384:
                return (
                    # The two-byte varint of the length, as in _varint.
                    _HEAD_WITH_PARENT.pack(
                        0x12,
                        length + (length & -128) + 128,
                        0x100A,
                        span.trace_id,
                        0x0812,
                        span.span_id,
                        0x0822,
                        parent_span_id,
                        0x39,
                        span.start_time_ns,
                        0x41,
                        span.end_time_ns,
                    )
                    + body
                )
        else:
            length = len(body) + _WITHOUT_PARENT_BYTES
            if 127 < length < 16384:
                return (
                    _HEAD_WITHOUT_PARENT.pack(
                        0x12,
                        length + (length & -128) + 128,
                        0x100A,
                        span.trace_id,
                        0x0812,
                        span.span_id,
                        0x39,
                        span.start_time_ns,
                        0x41,
                        span.end_time_ns,
                    )
                    + body
                )
    except StructError:
        pass
    return _encode_unusual_span(span, body)


def _encode_unusual_span(span: Span, body: bytes) -> bytes:
    """A span whose length does not take two bytes, or whose times do not fit."""
    start_time_ns = min(max(span.start_time_ns, 0), _UINT64_MAX)
    end_time_ns = min(max(span.end_time_ns, 0), _UINT64_MAX)
    fixed = [
        b"\x0a\x10",
        span.trace_id,
        b"\x12\x08",
        span.span_id,
        b"\x22\x08" + span.parent_span_id if span.parent_span_id else b"",
        b"\x39",
        start_time_ns.to_bytes(8, "little"),
        b"\x41",
        end_time_ns.to_bytes(8, "little"),
    ]
    return _delimited(b"\x12", b"".join(fixed) + body)


def _trace_state_and_links(span: Span) -> bytes:
    parts = []
    if span.trace_state:
        parts.append(_delimited(b"\x1a", _text(span.trace_state)))
    for link in span.links:
        fields = [b"\x0a\x10", link.trace_id, b"\x12\x08", link.span_id]
        if link.trace_state:
            fields.append(_delimited(b"\x1a", _text(link.trace_state)))
        fields.extend(_key_value(_LINK_ATTRIBUTE_TAG, key, value) for key, value in link.attributes)
        parts.append(_delimited(b"\x6a", b"".join(fields)))
    return b"".join(parts)


def encode_resource(attributes: Attributes) -> bytes:
    """The ``ResourceSpans.resource`` field, tag and length included (resource.proto, message Resource).

    Not cached here: a resource belongs to a process, and its owner keeps the bytes.
    """
    return _delimited(b"\x0a", b"".join(_key_value(_RESOURCE_ATTRIBUTE_TAG, key, value) for key, value in attributes))


_SCOPE = _delimited(b"\x0a", _delimited(b"\x0a", b"spanloom") + _delimited(b"\x12", __version__.encode()))
_SCHEMA_URL = _delimited(b"\x1a", SCHEMA_URL.encode())


def encode_request(groups: Iterable[tuple[bytes, list[bytes]]]) -> bytes:
    """An ``ExportTraceServiceRequest`` of ``(encode_resource(...), [encode_span(...), ...])`` groups.

    One ``ResourceSpans`` with one ``ScopeSpans`` per group, both with the schema URL. A group without spans is omitted.
    """
    parts: list[bytes] = []
    for resource, spans in groups:
        if not spans:
            continue
        scope_spans_length = len(_SCOPE) + sum(map(len, spans)) + len(_SCHEMA_URL)
        scope_spans_head = b"\x12" + _varint(scope_spans_length)
        resource_spans_length = len(resource) + len(scope_spans_head) + scope_spans_length + len(_SCHEMA_URL)
        parts += (b"\x0a", _varint(resource_spans_length), resource, scope_spans_head, _SCOPE)
        parts += spans
        parts += (_SCHEMA_URL, _SCHEMA_URL)
    return b"".join(parts)
