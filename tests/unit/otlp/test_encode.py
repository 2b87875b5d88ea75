"""The hand-written OTLP bytes, decoded by the official stubs."""

import importlib
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.semconv.schemas import Schemas

from agent import __version__
from agent.model import AttributeGroup, Span, SpanKind, SpanLink
from agent.otlp import encode
from agent.otlp.encode import encode_request, encode_resource, encode_span
from tests.collector import count_spans

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(max_size=40) | st.sampled_from(["", "a" * 127, "b" * 128, "ü" * 70, "\ud800", "x\udfffy", "z" * 20000])
KEYS = TEXT | st.sampled_from([*encode.VOLATILE_KEYS, *sorted(encode.INTEGER_KEYS), "http.request.method"])
VALUES = (
    TEXT
    | st.booleans()
    | INT64
    | st.integers(0, 1 << 22)
    | st.floats()
    | st.sampled_from([0, 1, 0.0, 1.0, -0.0, True, False, 127, 128, 16383, 16384, 2097151, 2097152])
    | st.lists(TEXT, max_size=3).map(tuple)
)
ATTRIBUTES = st.lists(st.tuples(KEYS, VALUES), max_size=14).map(tuple)
GROUPS = st.lists(st.tuples(KEYS, VALUES), max_size=5).map(AttributeGroup)
TRACE_IDS = st.binary(min_size=16, max_size=16)
SPAN_IDS = st.binary(min_size=8, max_size=8)
LINKS = st.builds(SpanLink, trace_id=TRACE_IDS, span_id=SPAN_IDS, trace_state=TEXT, attributes=ATTRIBUTES)
SPANS = st.builds(
    Span,
    trace_id=TRACE_IDS,
    span_id=SPAN_IDS,
    parent_span_id=SPAN_IDS | st.just(b""),
    trace_state=TEXT,
    name=TEXT,
    kind=st.sampled_from(SpanKind) | st.integers(1, 3),
    start_time_ns=UINT64,
    end_time_ns=UINT64,
    attributes=ATTRIBUTES,
    error=st.booleans(),
    links=st.lists(LINKS, max_size=2).map(tuple),
    link_method=TEXT,
    sampled=st.booleans(),
    process_key=st.just((1, 2)),
    # One group may come twice: it is then cached within one span.
    groups=st.lists(GROUPS, max_size=3).map(lambda groups: (*groups, *groups[:1])),
)


def make_span(**changes: object) -> Span:
    fields = {
        "trace_id": bytes(range(16)),
        "span_id": bytes(range(8)),
        "parent_span_id": b"",
        "trace_state": "",
        "name": "GET",
        "kind": SpanKind.SERVER,
        "start_time_ns": 1,
        "end_time_ns": 2,
        "attributes": (),
        "error": False,
        "links": (),
        "link_method": "",
        "sampled": True,
        "process_key": (1, 2),
        "groups": (),
    }
    return Span(**(fields | changes))


def forget_all() -> None:
    """Empty every cache of the encoder."""
    encode._attributes.clear()
    encode._groups.clear()
    encode._tails.clear()


def ungrouped(span: Span) -> Span:
    """The same span, all of its attributes one by one."""
    return msgspec.structs.replace(span, attributes=span.all_attributes(), groups=())


def decode_span(data: bytes) -> trace_pb2.Span:
    """Decode one ``ScopeSpans.spans`` element; there must be exactly one and nothing else."""
    scope_spans = trace_pb2.ScopeSpans.FromString(data)
    assert len(scope_spans.spans) == 1
    assert not scope_spans.HasField("scope")
    assert not scope_spans.schema_url
    return scope_spans.spans[0]


def plain_text(value: str) -> str:
    return value.encode(errors="replace").decode()


def expected_value(value: object) -> tuple[str, object]:
    """The AnyValue field and content that a model value must become; floats by their bits, so that NaN compares."""
    if isinstance(value, str):
        return "string_value", plain_text(value)
    if isinstance(value, tuple):
        return "array_value", [("string_value", plain_text(item)) for item in value]
    if isinstance(value, bool):
        return "bool_value", value
    if isinstance(value, int):
        return "int_value", value
    return "double_value", struct.pack("<d", value)


def decoded_value(value: object) -> tuple[str, object]:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return kind, [decoded_value(item) for item in value.array_value.values]
    content = getattr(value, kind)
    return kind, struct.pack("<d", content) if kind == "double_value" else content


def expected_attributes(attributes: object) -> list:
    return [(plain_text(key), expected_value(value)) for key, value in attributes]


def expected_span_attributes(attributes: object) -> list:
    """As expected_attributes, with the integers that the conventions define as such."""
    return expected_attributes(
        (key, clamped(int(value)) if key in encode.INTEGER_KEYS and is_integral(value) else value)
        for key, value in attributes
    )


def is_integral(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def clamped(value: int) -> int:
    return min(max(value, -(1 << 63)), (1 << 63) - 1)


def decoded_attributes(pairs: object) -> list:
    return [(pair.key, decoded_value(pair.value)) for pair in pairs]


def only_value(key: str, value: object) -> tuple[str, object]:
    [(_, decoded)] = decoded_attributes(decode_span(encode_span(make_span(attributes=((key, value),)))).attributes)
    return decoded


def check_span(span: Span, decoded: trace_pb2.Span) -> None:
    assert decoded.trace_id == span.trace_id
    assert decoded.span_id == span.span_id
    assert decoded.parent_span_id == span.parent_span_id
    assert decoded.trace_state == plain_text(span.trace_state)
    assert decoded.flags == (1 if span.sampled else 0)
    assert decoded.name == plain_text(span.name)
    assert decoded.kind == span.kind
    assert decoded.start_time_unix_nano == span.start_time_ns
    assert decoded.end_time_unix_nano == span.end_time_ns
    attributes = list(span.all_attributes())
    if span.link_method:
        attributes.insert(0, ("spanloom.link.method", span.link_method))
    assert decoded_attributes(decoded.attributes) == expected_span_attributes(attributes)
    assert decoded.HasField("status") == span.error
    assert decoded.status.code == (trace_pb2.Status.STATUS_CODE_ERROR if span.error else 0)
    assert not decoded.status.message
    assert len(decoded.links) == len(span.links)
    for link, decoded_link in zip(span.links, decoded.links, strict=True):
        assert decoded_link.trace_id == link.trace_id
        assert decoded_link.span_id == link.span_id
        assert decoded_link.trace_state == plain_text(link.trace_state)
        assert decoded_attributes(decoded_link.attributes) == expected_attributes(link.attributes)
        assert decoded_link.flags == 0
    assert not decoded.events


@settings(max_examples=60, deadline=None)
@given(SPANS)
def test_any_span_decodes_to_itself_cold_and_warm(span):
    """The stubs read back every field of any span, and the bytes do not depend on what the caches hold."""
    forget_all()
    cold = encode_span(span)
    check_span(span, decode_span(cold))
    assert encode_span(span) == cold
    forget_all()
    assert encode_span(ungrouped(span)) == cold
    assert encode_span(span) == cold


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(ATTRIBUTES, st.lists(SPANS, max_size=3)), max_size=3))
def test_a_request_decodes_to_its_groups(groups):
    """A request holds one ResourceSpans with one ScopeSpans per group that has spans, in order, with the schema URL."""
    data = encode_request(
        (encode_resource(attributes), [encode_span(span) for span in spans]) for attributes, spans in groups
    )
    request = ExportTraceServiceRequest.FromString(data)
    groups = [group for group in groups if group[1]]
    assert len(request.resource_spans) == len(groups)
    for (attributes, spans), resource_spans in zip(groups, request.resource_spans, strict=True):
        assert decoded_attributes(resource_spans.resource.attributes) == expected_attributes(attributes)
        assert resource_spans.schema_url == encode.SCHEMA_URL
        [scope_spans] = resource_spans.scope_spans
        assert (scope_spans.scope.name, scope_spans.scope.version) == ("spanloom", __version__)
        assert scope_spans.schema_url == encode.SCHEMA_URL
        assert len(scope_spans.spans) == len(spans)
        for span, decoded in zip(spans, scope_spans.spans, strict=True):
            check_span(span, decoded)
    assert count_spans(data) == sum(len(spans) for _, spans in groups)


@pytest.mark.parametrize("order", [(True, 1, 1.0), (1.0, True, 1), (1, 1.0, True), (0, False, -0.0), (-0.0, 0, False)])
@pytest.mark.parametrize("key", ["app.flag", "http.request.body.size", "url.path"])
def test_equal_numbers_of_different_types_keep_their_types(order, key):
    """True, 1 and 1.0 are one dict key in Python and three values in OTLP, whichever came first."""
    encode._attributes.clear()
    for value in (*order, *order):
        assert only_value(key, value) == expected_value(value)


@pytest.mark.parametrize("order", [(200, 200.0), (200.0, 200), (1, True), (True, 1)])
def test_a_conventional_integer_is_an_integer_whatever_came_first(order):
    """The few numeric keys that are cached always export the integer, so no order of arrival changes a byte."""
    encode._attributes.clear()
    for value in (*order, *order):
        assert only_value("http.response.status_code", value) == ("int_value", int(value))
    assert only_value("http.response.status_code", 200.5) == expected_value(200.5)
    assert only_value("http.response.status_code", "200") == ("string_value", "200")
    assert math.isnan(struct.unpack("<d", only_value("server.port", math.nan)[1])[0])


@pytest.mark.parametrize("key", ["app.size", "http.response.body.size", "server.port"])
@pytest.mark.parametrize("value", [(1 << 63), -(1 << 63) - 1, 1 << 200, -(1 << 200)])
def test_integers_beyond_64_bits_are_clamped(key, value):
    """An integer that int_value cannot carry becomes the nearest that it can."""
    assert only_value(key, value) == ("int_value", clamped(value))


@pytest.mark.parametrize("key", ["app.size", "http.response.body.size", "network.peer.port", "server.port"])
def test_every_length_of_an_integer(key):
    """Integers on both sides of each change of the varint's size decode, negative ones too."""
    for bits in range(64):
        for value in ((1 << bits) - 1, -(1 << bits)):
            assert only_value(key, value) == ("int_value", value)
    assert only_value(key, 1 << 21) == ("int_value", 1 << 21)


def test_times_beyond_64_bits_are_clamped():
    """A negative or too large time costs the time, not the span."""
    decoded = decode_span(encode_span(make_span(start_time_ns=-5, end_time_ns=1 << 70, parent_span_id=b"p" * 8)))
    assert (decoded.start_time_unix_nano, decoded.end_time_unix_nano) == (0, (1 << 64) - 1)
    assert decoded.parent_span_id == b"p" * 8


@pytest.mark.parametrize("parent_span_id", [b"", b"p" * 8])
def test_every_length_of_the_length_prefix(parent_span_id):
    """Spans on both sides of each change of size of the length prefix decode."""
    for size in [*range(80), *range(16200, 16400, 3), 70000]:
        span = make_span(name="n" * size, parent_span_id=parent_span_id)
        check_span(span, decode_span(encode_span(span)))


@pytest.mark.parametrize("key", ["url.path", "url.full", "app.text"])
def test_every_length_of_a_text_value(key):
    """Text on both sides of each change of size of its three length prefixes decodes."""
    for size in [*range(140), *range(16370, 16390)]:
        assert only_value(key, "v" * size) == ("string_value", "v" * size)


@pytest.mark.parametrize("key", ["url.path", "app.text"])
def test_lone_surrogates_become_question_marks(key):
    """Text that UTF-8 cannot carry is exported with a replacement, never an exception."""
    assert only_value(key, "a\ud800b") == ("string_value", "a?b")
    assert only_value(key, ("a\ud800",)) == ("array_value", [("string_value", "a?")])


def test_a_value_of_another_type_is_refused():
    """bytes and None are no attribute values of the model; the error names the type."""
    for value in (b"raw", None):
        with pytest.raises(TypeError, match=type(value).__name__):
            encode_span(make_span(attributes=(("k", value),)))


def test_caches_stay_within_their_bounds_under_hostile_variety():
    """Neither many distinct values nor long, wide or nested ones take the caches beyond their bounds."""
    for number in range(encode.MAX_CACHED_ATTRIBUTES + 500):
        pairs = (
            ("user_agent.original", f"agent-{number}"),
            ("url.path", f"/{number}"),
            ("network.peer.port", number),
            ("app.number", number),
            ("user_agent.original", f"\U0001f600{number}"),
            ("http.request.header.x", (str(number), str(number))),
            ("user_agent.original", "x" * encode.MAX_CACHED_FRAGMENT_BYTES + str(number)),
        )
        encode_span(make_span(name=f"name-{number}", attributes=pairs))
        assert len(encode._attributes) <= encode.MAX_CACHED_ATTRIBUTES
        assert len(encode._tails) <= encode.MAX_CACHED_TAILS
    assert max(map(len, encode._attributes.values())) <= encode.MAX_CACHED_FRAGMENT_BYTES
    kept = {(key, type(value)) for key, value in encode._attributes}
    assert kept == {("user_agent.original", str)}


def test_the_group_cache_stays_within_its_bounds():
    """At the bound the groups are forgotten and begin anew; the bytes stay right all along, and memory bounded."""
    forget_all()
    kept = AttributeGroup((("server.address", "shop"), ("server.port", 80)))
    expected = encode_span(make_span(attributes=tuple(kept)))
    sizes = []
    for number in range(encode.MAX_CACHED_GROUPS + 500):
        group = AttributeGroup((("app.number", number), ("app.text", f"\U0001f600{number}")))
        span = make_span(groups=(kept, group))
        assert encode_span(span) == encode_span(ungrouped(span))
        sizes.append(len(encode._groups))
    assert max(sizes) == encode.MAX_CACHED_GROUPS
    assert sizes[-1] < encode.MAX_CACHED_GROUPS
    assert encode_span(make_span(groups=(kept,))) == expected
    assert sum(map(len, encode._groups.values())) <= encode.MAX_CACHED_GROUPS * encode.MAX_CACHED_GROUP_BYTES


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_group_is_kept_up_to_its_bound_in_bytes(over):
    """A longer one is encoded each time, to the same bytes."""
    forget_all()
    empty = len(encode._key_value(b"\x4a", "app.text", "x" * 200)) - 200  # its length prefixes have two bytes each
    value = "x" * (encode.MAX_CACHED_GROUP_BYTES - empty + over)
    group = AttributeGroup((("app.text", value),))
    span = make_span(groups=(group,))
    for _ in range(2):
        check_span(span, decode_span(encode_span(span)))
        assert (group in encode._groups) == (over <= 0)
    if over == 0:
        assert len(encode._groups[group]) == encode.MAX_CACHED_GROUP_BYTES


def test_equal_groups_are_different_keys():
    """1, 1.0 and True are equal in Python: were groups compared by what they hold, the first type would win."""
    forget_all()
    groups = [AttributeGroup((("app.flag", value),)) for value in (1, True, 1.0, 1)]
    for group in (*groups, *reversed(groups)):
        [(_, decoded)] = decoded_attributes(decode_span(encode_span(make_span(groups=(group,)))).attributes)
        assert decoded == expected_value(group[0][1])
    assert len(encode._groups) == len(groups)


def test_a_cached_group_lives_as_long_as_its_bytes():
    """Groups are looked up by identity: were one let go of, another might get its address, and its bytes."""
    forget_all()
    for number in range(300):
        group = AttributeGroup((("app.number", number),))
        [(_, decoded)] = decoded_attributes(decode_span(encode_span(make_span(groups=(group,)))).attributes)
        assert decoded == ("int_value", number)
        del group
    assert len(encode._groups) == 300


def test_unsampled_root_without_error_omits_the_optional_fields():
    """Default values are absent on the wire: no parent, flags, status, trace state or link method."""
    decoded = decode_span(encode_span(make_span(sampled=False)))
    present = {descriptor.name for descriptor, _ in decoded.ListFields()}
    assert present == {"trace_id", "span_id", "name", "kind", "start_time_unix_nano", "end_time_unix_nano"}


def test_a_resource_is_the_field_of_resource_spans():
    """The encoded resource is one ``resource`` field: tag, length and the attributes."""
    resource_spans = trace_pb2.ResourceSpans.FromString(encode_resource((("service.name", "shop"), ("process.pid", 7))))
    assert isinstance(resource_spans.resource, Resource)
    assert decoded_attributes(resource_spans.resource.attributes) == [
        ("service.name", ("string_value", "shop")),
        ("process.pid", ("int_value", 7)),
    ]


def test_no_groups_and_empty_groups_encode_to_nothing():
    """There is nothing to send without spans."""
    assert encode_request([]) == b""
    assert encode_request([(encode_resource((("service.name", "shop"),)), [])]) == b""


def test_the_schema_url_is_a_released_one():
    """The schema URL is one that the semantic-conventions package knows."""
    assert encode.SCHEMA_URL in {schema.value for schema in Schemas}


def test_neither_protobuf_nor_grpc_is_imported():
    """Encoder and exporter modules cost no import of the protobuf runtime or of gRPC."""
    program = (
        "import sys, json, agent.otlp.encode, agent.otlp.exporter;"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('google', 'grpc', 'opentelemetry')]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []


CORPUS = sorted((Path(__file__).parents[2] / "fuzz" / "corpus" / "otlp_encode").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_fuzz_corpus_passes(path):
    """Every input of the fuzz target's corpus holds all of its checks."""
    # Imported here, as the fuzz target takes its checks from this module.
    importlib.import_module("tests.fuzz.fuzz_otlp_encode").test_one_input(path.read_bytes())
