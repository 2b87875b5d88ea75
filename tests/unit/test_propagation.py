"""Trace-context extraction: the table of accepted and refused headers per format, order of trust, hostile bytes."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import propagation
from agent.model import TraceContext
from agent.propagation import FORMATS, HEADER_NAMES, Extractor

TRACE = b"4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = b"00f067aa0ba902b7"
TRACE_ID = bytes.fromhex(TRACE.decode())
SPAN_ID = bytes.fromhex(SPAN.decode())
SHORT = b"a3ce929d0e0e4736"
SHORT_ID = bytes(8) + bytes.fromhex(SHORT.decode())
PARENT = b"05e3ac9a4f6e3b90"
TRACEPARENT = b"00-" + TRACE + b"-" + SPAN + b"-01"
OTHER = b"c0ffee00c0ffee00c0ffee00c0ffee00"
OTHER_ID = bytes.fromhex(OTHER.decode())


def grpc_binary(trace: bytes) -> bytes:
    """OpenCensus's binary encoding of a sampled context with the span id SPAN."""
    return b"\0\0" + bytes.fromhex(trace.decode()) + b"\1" + SPAN_ID + b"\2\1"


GRPC = grpc_binary(TRACE)
FUZZ_DIRECTORY = Path(__file__).resolve().parents[1] / "fuzz"


def read(headers, *formats):
    """Extract with fresh counters; returns the context and the counts that are not zero."""
    extractor = Extractor(formats or FORMATS)
    context, others = extractor.extract(headers)
    assert others == ()
    return context, {name: count for name, count in extractor.malformed.items() if count}


def assert_refused(headers, name, count=1):
    assert read(headers) == (None, {name: count})


# ---- All formats


def test_the_known_headers_are_those_of_the_formats():
    """HEADER_NAMES is the union over the formats, all lower case, without x-request-id."""
    assert {
        b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled",
        b"x-b3-flags", b"uber-trace-id", b"x-amzn-trace-id", b"x-datadog-trace-id", b"x-datadog-parent-id",
        b"x-datadog-sampling-priority", b"x-datadog-tags", b"grpc-trace-bin",
    } == HEADER_NAMES  # fmt: skip
    assert Extractor(FORMATS).header_names == HEADER_NAMES


def test_an_extractor_asks_only_for_the_headers_of_its_formats():
    """header_names and the counters cover the configured formats and no other."""
    extractor = Extractor(["jaeger", "tracecontext"])
    assert extractor.header_names == {b"uber-trace-id", b"traceparent", b"tracestate"}
    assert extractor.malformed == {"jaeger": 0, "tracecontext": 0}


@pytest.mark.parametrize("formats", [["w3c"], ["b3", ""], ["b3", "b3"], ["TraceContext"]])
def test_an_unknown_or_repeated_format_is_refused(formats):
    """The constructor raises ValueError that names the format."""
    with pytest.raises(ValueError, match=repr(formats[-1])):
        Extractor(formats)


def test_no_headers_no_context():
    """Without headers, without formats or with strange headers only there is no context and nothing is counted."""
    assert read({}) == (None, {})
    assert Extractor([]).extract({b"traceparent": TRACEPARENT}) == (None, ())
    assert read({b"x-request-id": b"1", b"accept": b"*/*"}) == (None, {})
    assert read({b"x-request-id": b"1"}) == (None, {})


def test_a_format_that_is_not_configured_is_not_read():
    """Headers of other formats are ignored, whether good or bad."""
    assert read({b"traceparent": TRACEPARENT, b"b3": b"junk"}, "jaeger") == (None, {})


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({b"traceparent": b" \t" + TRACEPARENT + b"\t "}, "tracecontext"),
        ({b"grpc-trace-bin": b" " + base64.b64encode(GRPC) + b"\t"}, "grpc"),
        ({b"b3": b" " + TRACE + b"-" + SPAN + b"-1 "}, "b3"),
        ({b"x-b3-traceid": TRACE + b" ", b"x-b3-spanid": b"\t" + SPAN, b"x-b3-sampled": b" 1"}, "b3multi"),
        ({b"uber-trace-id": b" " + TRACE + b":" + SPAN + b":0:1\t"}, "jaeger"),
        (
            {b"x-amzn-trace-id": b" Root=1-" + TRACE[:8] + b"-" + TRACE[8:] + b"; Parent = " + SPAN + b" ;Sampled=1 "},
            "xray",
        ),
        (
            {
                b"x-datadog-trace-id": b" 11803532876627986230 ",
                b"x-datadog-parent-id": b"67667974448284343\t",
                b"x-datadog-sampling-priority": b" 1 ",
                b"x-datadog-tags": b" _dd.p.dm=-1, _dd.p.tid=4bf92f3577b34da6 ",
            },
            "datadog",
        ),
    ],
)
def test_optional_white_space_is_trimmed(headers, name):
    """White space around a value means nothing, in any format; all seven spell the same context here."""
    assert read(headers) == (TraceContext(TRACE_ID, SPAN_ID, True, "", name), {})


@pytest.mark.parametrize(
    "header", sorted(HEADER_NAMES - {b"tracestate", b"x-datadog-tags", b"x-b3-flags", b"x-b3-parentspanid"})
)
def test_an_empty_value_is_malformed(header):
    """An empty value is counted once and is as if absent."""
    context, malformed = read({header: b""})
    assert context is None
    assert list(malformed.values()) == [1]


@pytest.mark.parametrize(
    ("headers", "name", "count"),
    [
        ({b"traceparent": [TRACEPARENT, TRACEPARENT]}, "tracecontext", 1),
        ({b"traceparent": [TRACEPARENT] * 55}, "tracecontext", 1),
        ({b"grpc-trace-bin": [base64.b64encode(GRPC)] * 2}, "grpc", 1),
        ({b"b3": [b"1", b"1"]}, "b3", 1),
        ({b"uber-trace-id": [b"1:1:0:1", b"1:1:0:1"]}, "jaeger", 1),
        ({b"x-amzn-trace-id": [b"Root=1-5759e988-bd862e3fe1be46a994272793"] * 2}, "xray", 1),
        ({b"x-datadog-trace-id": [b"1", b"2"], b"x-datadog-parent-id": b"3"}, "datadog", 1),
    ],
)
def test_a_repeated_header_is_malformed(headers, name, count):
    """Which of several values is meant cannot be known, so none is used."""
    assert_refused(headers, name, count)


def test_a_list_of_one_or_none_is_like_the_plain_value():
    """The list form is accepted whatever its length."""
    assert read({b"traceparent": [TRACEPARENT]})[0].trace_id == TRACE_ID
    assert read({header: [] for header in HEADER_NAMES}) == (None, {})


# ---- W3C Trace Context


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (TRACEPARENT, True),
        (b"00-" + TRACE + b"-" + SPAN + b"-00", False),
        (b"00-" + TRACE + b"-" + SPAN + b"-02", False),
        (b"00-" + TRACE + b"-" + SPAN + b"-03", True),
        (b"00-" + TRACE + b"-" + SPAN + b"-ff", True),
        (b"00-" + TRACE + b"-" + SPAN + b"-fe", False),
        (b"01-" + TRACE + b"-" + SPAN + b"-01", True),
        (b"cc-" + TRACE + b"-" + SPAN + b"-01-what-the-future-will-be-like", True),
        (b"fe-" + TRACE + b"-" + SPAN + b"-00-\x00\xff", False),
        (b"cc-" + TRACE + b"-" + SPAN + b"-01-", True),
    ],
)
def test_traceparent(value, sampled):
    """Bit 0 of the flags is the decision, other bits are ignored; a higher version may carry more behind a dash."""
    assert read({b"traceparent": value}) == (TraceContext(TRACE_ID, SPAN_ID, sampled, "", "tracecontext"), {})


@pytest.mark.parametrize(
    "value",
    [
        b"00-" + bytes(32).replace(b"\0", b"0") + b"-" + SPAN + b"-01",
        b"00-" + TRACE + b"-0000000000000000-01",
        b"ff-" + TRACE + b"-" + SPAN + b"-01",
        b"ff-" + TRACE + b"-" + SPAN + b"-01-more",
        TRACEPARENT + b"-",
        TRACEPARENT + b"-more",
        TRACEPARENT[:-1],
        TRACEPARENT + b"0",
        b"cc-" + TRACE + b"-" + SPAN + b"-01.more",
        b"cc-" + TRACE + b"-" + SPAN + b"-0",
        b"cc-" + TRACE + b"-" + SPAN + b"-0-more",
        b"00-" + TRACE.upper() + b"-" + SPAN + b"-01",
        b"00-" + TRACE + b"-" + SPAN.upper() + b"-01",
        b"00-" + TRACE + b"-" + SPAN + b"-0A",
        b"CC-" + TRACE + b"-" + SPAN + b"-01",
        b"0g-" + TRACE + b"-" + SPAN + b"-01",
        b"00-" + b"z" + TRACE[1:] + b"-" + SPAN + b"-01",
        b"00-" + TRACE + b"-" + b"\xff" + SPAN[1:] + b"-01",
        b"00-" + TRACE + b"-" + SPAN + b"-.1",
        b"00-" + TRACE + b" " + SPAN + b"-01",
        b"00" + TRACE + b"--" + SPAN + b"-01",
        b"00-" + TRACE + SPAN + b"--01",
        b"00-" + TRACE + b"-" + SPAN + b"01-",
        b"000" + TRACE + b"0" + SPAN + b"001",
        b"-" * 55,
        b"\0" * 55,
        b",".join((TRACEPARENT, TRACEPARENT)),
    ],
)
def test_malformed_traceparent(value):
    """Any other form is counted, and takes a valid tracestate with it."""
    assert_refused({b"traceparent": value}, "tracecontext")
    assert_refused({b"traceparent": value, b"tracestate": b"a=1"}, "tracecontext")


def state(value):
    context, malformed = read({b"traceparent": TRACEPARENT, b"tracestate": value})
    assert context.trace_id == TRACE_ID
    assert context.span_id == SPAN_ID
    return context.trace_state, malformed


MEMBERS_32 = [b"k%d=v" % number for number in range(32)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (b"rojo=1 ,\tcongo=2", "rojo=1 ,\tcongo=2"),
        (b" a=1\t", "a=1"),
        (b"a=1,,b=2,", "a=1,,b=2,"),
        (b"fw529a3039@dt=FfTfgd,0a_-*/@=x", "fw529a3039@dt=FfTfgd,0a_-*/@=x"),
        (b"a= x y!~", "a= x y!~"),
        (b"k" * 256 + b"=" + b"v" * 256, "k" * 256 + "=" + "v" * 256),
        (b",".join(MEMBERS_32), b",".join(MEMBERS_32).decode()),
        (b",,".join(MEMBERS_32), b",,".join(MEMBERS_32).decode()),
        ([b"a=1", b"b=2,c=3", b"d=4"], "a=1,b=2,c=3,d=4"),
        ([b"a=1", b""], "a=1,"),
        (b"", ""),
        (b" , \t,", ""),
    ],
)
def test_tracestate_is_kept_verbatim(value, text):
    """Valid members are kept as sent, repeated headers joined in order, empty members allowed, nothing counted."""
    assert state(value) == (text, {})


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        b"a=",
        b"a=,b=2",
        b"=1",
        b"a=1=2",
        b"A=1",
        b"_a=1",
        b"a b=1",
        b"a =1",
        b"\xc3\xa9=1",
        b"a=\xc3\xa9",
        b"a=\x7f",
        b"a=x\ty",
        b"a=\x00",
        b"a=1;\n",
        b"a=1,b=2,a=3",
        b"k" * 257 + b"=v",
        b"k=" + b"v" * 257,
        b",".join([*MEMBERS_32, b"more=1"]),
        [b"a=1", b"a=2"],
        [b"a=1", b"junk"],
    ],
)
def test_a_bad_member_invalidates_tracestate_only(value):
    """One bad, duplicate or surplus member drops the whole tracestate; the traceparent stays, one header counts."""
    assert state(value) == ("", {"tracecontext": 1})


def test_tracestate_alone_is_nothing():
    """A tracestate without a traceparent is ignored, not counted."""
    assert read({b"tracestate": b"a=1"}) == (None, {})
    assert read({b"tracestate": b"A"}) == (None, {})


def test_the_tracestate_cache_is_bounded_and_counts_every_time():
    """A remembered bad value is counted again; neither many nor long values make the cache grow past its bound."""
    extractor = Extractor(FORMATS)
    propagation._trace_state.cache_clear()
    for _ in range(3):
        extractor.extract({b"traceparent": TRACEPARENT, b"tracestate": b"A"})
    assert extractor.malformed["tracecontext"] == 3
    long_value = b",".join(b"%d=" % key + b"v" * 200 for key in range(3))
    assert len(long_value) > propagation.TRACE_STATE_CACHED_BYTES
    context, _ = extractor.extract({b"traceparent": TRACEPARENT, b"tracestate": long_value})
    assert context.trace_state == long_value.decode()
    assert propagation._trace_state.cache_info().currsize == 1
    for number in range(2 * propagation.TRACE_STATE_CACHE_ENTRIES):
        extractor.extract({b"traceparent": TRACEPARENT, b"tracestate": b"a=%d" % number})
    assert propagation._trace_state.cache_info().currsize == propagation.TRACE_STATE_CACHE_ENTRIES


# ---- B3


@pytest.mark.parametrize(
    ("value", "trace_id", "sampled"),
    [
        (TRACE + b"-" + SPAN, TRACE_ID, None),
        (TRACE + b"-" + SPAN + b"-0", TRACE_ID, False),
        (TRACE + b"-" + SPAN + b"-1", TRACE_ID, True),
        (TRACE + b"-" + SPAN + b"-d", TRACE_ID, True),
        (TRACE + b"-" + SPAN + b"-1-" + PARENT, TRACE_ID, True),
        (TRACE + b"-" + SPAN + b"-1-0000000000000000", TRACE_ID, True),
        (SHORT + b"-" + SPAN + b"-0-" + PARENT, SHORT_ID, False),
        (TRACE.upper() + b"-" + SPAN.upper(), TRACE_ID, None),
    ],
)
def test_b3_single(value, trace_id, sampled):
    """Ids, then optionally the state, then optionally the parent; 64-bit trace ids are padded on the left."""
    assert read({b"b3": value}) == (TraceContext(trace_id, SPAN_ID, sampled, "", "b3"), {})


@pytest.mark.parametrize("value", [b"0", b"1", b"d"])
def test_b3_decision_alone_is_no_context(value):
    """A decision without ids is valid, but there is no trace to speak of."""
    assert read({b"b3": value}) == (None, {})


@pytest.mark.parametrize(
    "value",
    [
        b"2",
        b"D",
        b"true",
        b"-",
        b"1-",
        TRACE,
        TRACE + b"-",
        TRACE + b"-" + SPAN + b"-",
        TRACE + b"-" + SPAN + b"-2",
        TRACE + b"-" + SPAN + b"-" + PARENT,
        TRACE + b"-" + SPAN + b"-1-",
        TRACE + b"-" + SPAN + b"-1-" + PARENT[:-1],
        TRACE + b"-" + SPAN + b"-1-" + PARENT[:-1] + b"x",
        TRACE + b"-" + SPAN + b"-1-" + PARENT + b"-1",
        TRACE[:-1] + b"-" + SPAN,
        SHORT + b"00-" + SPAN,
        TRACE + b"0-" + SPAN,
        TRACE + b"-" + SPAN[:-1],
        TRACE + b"-0" + SPAN,
        b"0" * 32 + b"-" + SPAN,
        b"0" * 16 + b"-" + SPAN,
        TRACE + b"-0000000000000000",
        TRACE[:-1] + b"\xff-" + SPAN,
        TRACE[:-1] + b" -" + SPAN,
    ],
)
def test_malformed_b3_single(value):
    """Any other form of b3 is counted and as if absent."""
    assert_refused({b"b3": value}, "b3")


@pytest.mark.parametrize(
    ("extra", "sampled"),
    [
        ({}, None),
        ({b"x-b3-sampled": b"1"}, True),
        ({b"x-b3-sampled": b"0"}, False),
        ({b"x-b3-sampled": b"true"}, True),
        ({b"x-b3-sampled": b"False"}, False),
        ({b"x-b3-flags": b"1"}, True),
        ({b"x-b3-flags": b"1", b"x-b3-sampled": b"0"}, True),
        ({b"x-b3-flags": b"0", b"x-b3-sampled": b"0"}, False),
        ({b"x-b3-flags": b"0"}, None),
        ({b"x-b3-parentspanid": PARENT}, None),
    ],
)
@pytest.mark.parametrize(("digits", "trace_id"), [(TRACE, TRACE_ID), (SHORT, SHORT_ID)])
def test_b3_multi(extra, sampled, digits, trace_id):
    """Ids of 64 or 128 bits, the decision in its current and legacy spelling, debug over the decision."""
    headers = {b"x-b3-traceid": digits, b"x-b3-spanid": SPAN, **extra}
    assert read(headers) == (TraceContext(trace_id, SPAN_ID, sampled, "", "b3multi"), {})


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({b"x-b3-traceid": TRACE[:-1]}, 1),
        ({b"x-b3-traceid": b"0" * 32}, 1),
        ({b"x-b3-traceid": b"0" * 16}, 1),
        ({b"x-b3-traceid": SHORT + b"0000"}, 1),
        ({b"x-b3-traceid": b"x" * 32}, 1),
        ({b"x-b3-spanid": SPAN[1:]}, 1),
        ({b"x-b3-spanid": b"0" * 16}, 1),
        ({b"x-b3-spanid": TRACE}, 1),
        ({b"x-b3-spanid": b"", b"x-b3-traceid": b"", b"x-b3-sampled": b"", b"x-b3-parentspanid": b""}, 4),
    ],
)
def test_malformed_b3_multi_ids(changed, count):
    """Without both ids there is no context; each malformed header is counted."""
    headers = {b"x-b3-traceid": TRACE, b"x-b3-spanid": SPAN, b"x-b3-sampled": b"1", **changed}
    assert_refused(headers, "b3multi", count)


@pytest.mark.parametrize("header", [b"x-b3-traceid", b"x-b3-spanid"])
def test_b3_multi_needs_both_ids(header):
    """An id whose other half is missing counts as one malformed header."""
    assert_refused({header: SHORT}, "b3multi")


@pytest.mark.parametrize(
    "extra",
    [
        {b"x-b3-sampled": b"yes"},
        {b"x-b3-sampled": b"d"},
        {b"x-b3-parentspanid": b"root"},
        {b"x-b3-parentspanid": TRACE},
    ],
)
def test_a_malformed_b3_option_leaves_the_ids(extra):
    """A bad decision or parent is counted and as if absent; the ids stay."""
    headers = {b"x-b3-traceid": TRACE, b"x-b3-spanid": SPAN, **extra}
    assert read(headers) == (TraceContext(TRACE_ID, SPAN_ID, None, "", "b3multi"), {"b3multi": 1})


def test_the_first_of_repeated_b3_multi_headers_wins():
    """b3-propagation, Multiple Headers: the first value wins."""
    headers = {b"x-b3-traceid": [TRACE, OTHER], b"x-b3-spanid": [SPAN, PARENT], b"x-b3-sampled": [b"0", b"1"]}
    assert read(headers) == (TraceContext(TRACE_ID, SPAN_ID, False, "", "b3multi"), {})


@pytest.mark.parametrize("extra", [{}, {b"x-b3-flags": b"1"}, {b"x-b3-parentspanid": PARENT}])
def test_b3_multi_decision_alone_is_no_context(extra):
    """X-B3-Sampled or X-B3-Flags without ids is valid, but no context."""
    assert read({b"x-b3-sampled": b"1", **extra}) == (None, {})


# ---- Jaeger


@pytest.mark.parametrize(
    ("value", "trace_id", "span_id", "sampled"),
    [
        (TRACE + b":" + SPAN + b":0:1", TRACE_ID, SPAN_ID, True),
        (TRACE + b":" + SPAN + b":0:0", TRACE_ID, SPAN_ID, False),
        (TRACE + b":" + SPAN + b":0:2", TRACE_ID, SPAN_ID, True),
        (TRACE + b":" + SPAN + b":0:03", TRACE_ID, SPAN_ID, True),
        (TRACE + b":" + SPAN + b":0:8", TRACE_ID, SPAN_ID, False),
        (TRACE + b":" + SPAN + b":" + PARENT + b":01", TRACE_ID, SPAN_ID, True),
        (TRACE + b":" + SPAN + b":parent?:1", TRACE_ID, SPAN_ID, True),
        (TRACE + b":" + SPAN + b"::1", TRACE_ID, SPAN_ID, True),
        (b"1:2:0:1", bytes(15) + b"\x01", bytes(7) + b"\x02", True),
        (b"ABC:dEf:0:0", bytes(14) + b"\x0a\xbc", bytes(6) + b"\x0d\xef", False),
        (SHORT + b":f067aa0ba902b7:0:1", SHORT_ID, SPAN_ID, True),
        (TRACE + b"%3A" + SPAN + b"%3a0%3A1", TRACE_ID, SPAN_ID, True),
    ],
)
def test_jaeger(value, trace_id, span_id, sampled):
    """Hex of any length is padded on the left, the parent is ignored, bits 1 and 2 sample, %3A is a colon."""
    assert read({b"uber-trace-id": value}) == (TraceContext(trace_id, span_id, sampled, "", "jaeger"), {})


@pytest.mark.parametrize(
    "value",
    [
        b"0:1:0:1",
        b"1:0:0:1",
        b"0" * 32 + b":1:0:1",
        b":1:0:1",
        b"1::0:1",
        b"1:1:0:",
        b"1:1:0",
        b"1:1:0:1:1",
        b"1:1:0:100",
        b"1:1:0:x",
        b"1:1:0:+1",
        b"0" + TRACE + b":1:0:1",
        b"1:0" + SPAN + b":0:1",
        b"0x1:1:0:1",
        b"1 :1:0:1",
        b"1:-1:0:1",
        b"1%3B1%3B0%3B1",
        b"%",
        b"\xff:\xff:\xff:\xff",
    ],
)
def test_malformed_jaeger(value):
    """Zero or overlong ids, bad digits or another number of fields: counted and as if absent."""
    assert_refused({b"uber-trace-id": value}, "jaeger")


# ---- AWS X-Ray

ROOT = b"Root=1-4bf92f35-77b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("value", "span_id", "sampled"),
    [
        (ROOT + b";Parent=" + SPAN + b";Sampled=1", SPAN_ID, True),
        (ROOT + b";Parent=" + SPAN + b";Sampled=0", SPAN_ID, False),
        (ROOT + b";Parent=" + SPAN + b";Sampled=?", SPAN_ID, None),
        (ROOT + b";Parent=" + SPAN, SPAN_ID, None),
        (b"Sampled=1;Parent=" + SPAN + b";" + ROOT, SPAN_ID, True),
        (ROOT, None, None),
        (ROOT + b";Sampled=1;", None, True),
        (b"Self=1-67891233-12456789abcdef012345678;" + ROOT + b";CalledFrom=app;Lineage=a:1|b:2", None, None),
        (b"flag;" + ROOT + b";=;;x=y=z;root=0", None, None),
    ],
)
def test_xray(value, span_id, sampled):
    """Fields in any order, unknown ones ignored, no Parent means only the trace is known, ? leaves it open."""
    assert read({b"x-amzn-trace-id": value}) == (TraceContext(TRACE_ID, span_id, sampled, "", "xray"), {})


@pytest.mark.parametrize("value", [b"Sampled=1", b"Sampled=0", b"Sampled=?", b"Parent=" + SPAN + b";Sampled=1"])
def test_xray_without_root_is_no_context(value):
    """A decision without a trace id is valid, but no context."""
    assert read({b"x-amzn-trace-id": value}) == (None, {})


@pytest.mark.parametrize(
    "value",
    [
        b"junk",
        b"Self=1-67891233-12456789abcdef012345678",
        b"Parent=" + SPAN,
        b"Root=",
        b"Root",
        b"Root=1-00000000-000000000000000000000000",
        b"Root=2-4bf92f35-77b34da6a3ce929d0e0e4736",
        b"Root=1-4bf92f3-577b34da6a3ce929d0e0e4736",
        b"Root=1-4bf92f35-77b34da6a3ce929d0e0e473",
        b"Root=1-4bf92f35-77b34da6a3ce929d0e0e47361",
        b"Root=1-4bf92f35x77b34da6a3ce929d0e0e4736",
        b"Root=1-4bf92f35-77b34da6a3ce929d0e0e473g",
        b"Root=1-4bf92f3--77b34da6a3ce929d0e0e4736",
        ROOT + b";Parent=0000000000000000",
        ROOT + b";Parent=",
        ROOT + b";Parent=" + SPAN[1:],
        ROOT + b";Parent=" + TRACE,
        ROOT + b";Parent=" + SPAN[1:] + b"x",
        ROOT + b";Sampled=2",
        ROOT + b";Sampled=",
        ROOT + b";Sampled=true",
        ROOT + b";" + ROOT,
        ROOT + b";Sampled=1;Sampled=1",
        ROOT + b";Parent=" + SPAN + b";Parent=" + SPAN,
        ROOT + b"," + ROOT,
    ],
)
def test_malformed_xray(value):
    """A bad or repeated known field, or nothing usable at all, spoils the header: counted and as if absent."""
    assert_refused({b"x-amzn-trace-id": value}, "xray")


# ---- Datadog


def datadog(**extra):
    named = {b"x-datadog-" + key.encode().replace(b"_", b"-"): value for key, value in extra.items()}
    return {b"x-datadog-trace-id": b"1234567890123456789", b"x-datadog-parent-id": b"18446744073709551615", **named}


LOWER_ID = (1234567890123456789).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("extra", "upper", "sampled"),
    [
        ({}, bytes(8), None),
        ({"sampling_priority": b"2"}, bytes(8), True),
        ({"sampling_priority": b"1"}, bytes(8), True),
        ({"sampling_priority": b"0"}, bytes(8), False),
        ({"sampling_priority": b"-1"}, bytes(8), False),
        ({"tags": b"_dd.p.tid=640cfd8d00000000"}, bytes.fromhex("640cfd8d00000000"), None),
        ({"tags": b"_dd.p.dm=-4,_dd.p.tid=640cfd8d00000000,_dd.p.x=y"}, bytes.fromhex("640cfd8d00000000"), None),
        ({"tags": [b"_dd.p.dm=-4", b"_dd.p.tid=640cfd8d00000000"]}, bytes.fromhex("640cfd8d00000000"), None),
        ({"tags": b"_dd.p.dm=-4"}, bytes(8), None),
        ({"tags": b"x_dd.p.tid=junk"}, bytes(8), None),
        ({"tags": b""}, bytes(8), None),
        ({"tags": b"\xff=\x00,,="}, bytes(8), None),
    ],
)
def test_datadog(extra, upper, sampled):
    """Decimal ids, the upper half of the trace id from _dd.p.tid, a priority above 0 is sampled."""
    expected = TraceContext(upper + LOWER_ID, b"\xff" * 8, sampled, "", "datadog")
    assert read(datadog(**extra)) == (expected, {})


@pytest.mark.parametrize("number", [b"0", b"00", b"18446744073709551616", b"-1", b"+1", b"1_0", b"1.0", b"0x1", b"a",
                                    b"1 2", b"\xd9\xa1", b"9" * 5000])  # fmt: skip
@pytest.mark.parametrize("field", ["trace_id", "parent_id"])
def test_malformed_datadog_ids(field, number):
    """An id that is zero, out of range or not plain decimal leaves no context."""
    assert_refused(datadog(**{field: number}), "datadog")


@pytest.mark.parametrize("header", [b"x-datadog-trace-id", b"x-datadog-parent-id"])
def test_datadog_needs_both_ids(header):
    """An id whose other half is missing counts as one malformed header."""
    assert_refused({header: b"1", b"x-datadog-sampling-priority": b"1"}, "datadog")


def test_datadog_options_alone_are_nothing():
    """Priority and tags without ids are no context and not malformed."""
    assert read({b"x-datadog-sampling-priority": b"1", b"x-datadog-tags": b"_dd.p.dm=-1"}) == (None, {})


@pytest.mark.parametrize(
    "extra",
    [
        {"sampling_priority": b"high"},
        {"sampling_priority": b"1.5"},
        {"sampling_priority": b"--1"},
        {"sampling_priority": [b"1", b"1"]},
        {"tags": b"_dd.p.tid="},
        {"tags": b"_dd.p.tid=640cfd8d"},
        {"tags": b"_dd.p.tid=640cfd8d0000000x"},
        {"tags": b"_dd.p.tid=640cfd8d000000001"},
        {"tags": b"_dd.p.tid=640cfd8d00000000,_dd.p.tid=640cfd8d00000001"},
    ],
)
def test_a_malformed_datadog_option_leaves_the_ids(extra):
    """A bad priority or upper half is counted and as if absent."""
    expected = TraceContext(bytes(8) + LOWER_ID, b"\xff" * 8, None, "", "datadog")
    assert read(datadog(**extra)) == (expected, {"datadog": 1})


# ---- gRPC


@pytest.mark.parametrize(
    ("binary", "sampled"),
    [
        (GRPC, True),
        (GRPC[:-1] + b"\0", None),
        (GRPC[:-1] + b"\3", True),
        (GRPC[:-2], None),
        (b"\0\2\1\1" + SPAN_ID + b"\0" + TRACE_ID, True),
        (GRPC + b"\x07whatever follows an unknown field", True),
    ],
    ids=["example", "not sampled", "other bits", "no options", "another order", "later fields"],
)
@pytest.mark.parametrize("form", ["padded", "unpadded", "binary"])
def test_grpc_trace_bin_is_read(binary, sampled, form):
    """Fields in any order until an unknown one; base64 with or without padding, or the bytes behind a zero byte."""
    value = b"\0" + binary if form == "binary" else base64.b64encode(binary)
    value = value.rstrip(b"=") if form == "unpadded" else value
    assert read({b"grpc-trace-bin": value}) == (TraceContext(TRACE_ID, SPAN_ID, sampled, "", "grpc"), {})


@pytest.mark.parametrize(
    "value",
    [
        b"AAAA",
        b"not base64!",
        base64.b64encode(b"\1" + GRPC[1:]),
        base64.b64encode(GRPC[:18]),
        base64.b64encode(b"\0\1" + SPAN_ID),
        base64.b64encode(GRPC[:25]),
        base64.b64encode(GRPC + GRPC[1:18]),
        base64.b64encode(GRPC[:-1]),
        base64.b64encode(b"\0\0" + bytes(16) + GRPC[18:]),
        base64.b64encode(GRPC[:19] + bytes(8)),
        base64.b64encode(GRPC) + b"," + base64.b64encode(GRPC),
        base64.b64encode(GRPC)[:-2] + b"=====",
        b"\0",
        b"A" * 5000,
    ],
)
def test_a_malformed_grpc_trace_bin_is_refused(value):
    """Another version, a missing, zero, cut or repeated field, several values, what is no base64."""
    assert_refused({b"grpc-trace-bin": value}, "grpc", 1)


# ---- Several formats


def spelled(name, trace):
    """The headers of format ``name`` for 32 hex digits of trace id and the span id SPAN."""
    return {
        "tracecontext": {b"traceparent": b"00-" + trace + b"-" + SPAN + b"-01"},
        "grpc": {b"grpc-trace-bin": base64.b64encode(grpc_binary(trace))},
        "b3": {b"b3": trace + b"-" + SPAN + b"-1"},
        "b3multi": {b"x-b3-traceid": trace, b"x-b3-spanid": SPAN, b"x-b3-sampled": b"1"},
        "jaeger": {b"uber-trace-id": trace + b":" + SPAN + b":0:1"},
        "xray": {b"x-amzn-trace-id": b"Root=1-" + trace[:8] + b"-" + trace[8:] + b";Parent=" + SPAN + b";Sampled=1"},
        "datadog": {
            b"x-datadog-trace-id": b"%d" % int(trace[16:], 16),
            b"x-datadog-parent-id": b"%d" % int(SPAN, 16),
            b"x-datadog-tags": b"_dd.p.tid=" + trace[:16],
        },
    }[name]


def spelled_all(traces):
    headers = {}
    for name, trace in traces.items():
        headers |= spelled(name, trace)
    return headers


@pytest.mark.parametrize("order", [FORMATS, FORMATS[::-1], ("jaeger", "tracecontext")])
def test_the_configured_order_decides(order):
    """The first valid context in the configured order wins; formats that agree are not reported."""
    headers = spelled_all(dict.fromkeys(FORMATS, TRACE))
    context, others = Extractor(order).extract(headers)
    assert (context.format, context.trace_id, others) == (order[0], TRACE_ID, ())


def test_contexts_that_disagree_are_returned_in_order():
    """The second element holds the valid contexts of other traces, in the configured order."""
    traces = {name: b"%032x" % number for number, name in enumerate(FORMATS, start=1)}
    traces["jaeger"] = traces["tracecontext"]
    context, others = Extractor(FORMATS).extract(spelled_all(traces))
    assert context.format == "tracecontext"
    assert [other.format for other in others] == ["grpc", "b3", "b3multi", "xray", "datadog"]
    assert [other.trace_id[-1] for other in others] == [2, 3, 4, 6, 7]


def test_the_order_of_the_headers_does_not_matter():
    """Only the configuration ranks the formats."""
    headers = spelled("datadog", OTHER) | spelled("tracecontext", TRACE)
    context, others = Extractor(FORMATS).extract(headers)
    assert (context.format, [other.format for other in others]) == ("tracecontext", ["datadog"])


def test_a_malformed_first_choice_falls_through():
    """A malformed header is as if absent: the next format supplies the context."""
    headers = {b"traceparent": b"00-junk", b"tracestate": b"a=1"} | spelled("jaeger", OTHER)
    context, malformed = read(headers)
    assert (context.format, context.trace_id, context.trace_state) == ("jaeger", OTHER_ID, "")
    assert malformed == {"tracecontext": 1}


@pytest.mark.parametrize("order", [("b3", "b3multi"), ("b3multi", "b3"), ("b3multi", "jaeger", "b3")])
def test_b3_single_wins_over_multi(order):
    """Whatever the configured order, the single header wins when both are there; the other one is a disagreement."""
    context, others = Extractor(order).extract(spelled("b3", TRACE) | spelled("b3multi", OTHER))
    assert (context.format, context.trace_id) == ("b3", TRACE_ID)
    assert [(other.format, other.trace_id) for other in others] == [("b3multi", OTHER_ID)]


def test_b3_multi_serves_when_single_is_malformed():
    """Single wins only when it is valid."""
    assert read({b"b3": b"junk"} | spelled("b3multi", TRACE))[0].format == "b3multi"


def test_a_64_bit_id_agrees_with_its_128_bit_form():
    """A format that knows only the lower 64 bits does not disagree about the upper ones; other lower bits do."""
    headers = {b"traceparent": TRACEPARENT, b"b3": SHORT + b"-" + SPAN}
    assert Extractor(FORMATS).extract(headers)[1] == ()
    assert Extractor(("b3", "tracecontext")).extract(headers)[1] == ()
    headers[b"b3"] = SHORT[::-1] + b"-" + SPAN
    assert len(Extractor(FORMATS).extract(headers)[1]) == 1
    headers[b"b3"] = b"f" * 16 + SHORT + b"-" + SPAN
    assert len(Extractor(FORMATS).extract(headers)[1]) == 1


@pytest.mark.parametrize(
    ("decision", "sampled"),
    [
        ({b"b3": b"0"}, False),
        ({b"b3": b"1"}, True),
        ({b"b3": b"d"}, True),
        ({b"x-b3-sampled": b"0"}, False),
        ({b"x-b3-flags": b"1"}, True),
        ({b"b3": b"0", b"x-b3-sampled": b"1"}, False),
    ],
)
def test_a_decision_without_ids_decides_for_a_format_that_left_it_open(decision, sampled):
    """An open X-Ray or Datadog context takes B3's decision, the first in order; the id-less B3 never disagrees."""
    for headers in ({b"x-amzn-trace-id": ROOT + b";Sampled=?"}, spelled("datadog", TRACE)):
        assert read(headers)[0].sampled is None
        context, others = Extractor(FORMATS).extract(headers | decision)
        assert (context.trace_id, context.sampled, others) == (TRACE_ID, sampled, ())


def test_a_formats_own_flag_wins_over_a_decision_without_ids():
    """B3's decision does not overrule the flag that came with the ids, and nor does X-Ray's without Root."""
    for decision in ({b"b3": b"0"}, {b"x-b3-sampled": b"0"}, {b"x-amzn-trace-id": b"Sampled=0"}):
        assert read({b"traceparent": TRACEPARENT} | decision) == (
            TraceContext(TRACE_ID, SPAN_ID, True, "", "tracecontext"),
            {},
        )


@pytest.mark.parametrize(("single", "sampled"), [(b"0", False), (b"1", True), (b"d", True)])
def test_a_single_b3_decision_wins_over_multiple_headers(single, sampled):
    """Single wins over multi: the ids are those of the multiple headers, the decision is the single one's."""
    multi = spelled("b3multi", TRACE) | {b"x-b3-sampled": b"0" if sampled else b"1"}
    context, others = Extractor(FORMATS).extract(multi | {b"b3": single})
    assert (context.trace_id, context.span_id, context.sampled, others) == (TRACE_ID, SPAN_ID, sampled, ())


@pytest.mark.parametrize(
    ("headers", "decision"),
    [
        ({b"b3": b"0"}, False),
        ({b"b3": b"d"}, True),
        ({b"x-b3-sampled": b"false"}, False),
        ({b"x-amzn-trace-id": b"Sampled=1"}, True),
        ({b"x-b3-sampled": b"1", b"b3": b"0"}, False),
        ({b"b3": b"x"}, None),
        ({b"traceparent": TRACEPARENT}, None),
        ({}, None),
    ],
)
def test_a_decision_alone(headers, decision):
    """What headers without ids say about sampling is told, and nothing is counted that extract() counts already."""
    extractor = Extractor(FORMATS)
    assert extractor.decision(headers) is decision
    assert not any(extractor.malformed.values())


def test_another_parent_in_the_same_trace_disagrees():
    """A proxy that writes one format and passes another on: the first valid one wins, the other is kept."""
    context, others = Extractor(FORMATS).extract(
        {b"traceparent": TRACEPARENT, b"b3": TRACE + b"-" + SPAN[::-1] + b"-1"}
    )
    assert (context.format, [other.format for other in others]) == ("tracecontext", ["b3"])
    _, others = Extractor(FORMATS).extract({b"traceparent": TRACEPARENT, b"b3": TRACE + b"-" + SPAN + b"-1"})
    assert others == ()


def test_a_decision_without_ids_keeps_the_rest_of_the_context():
    """B3 ids that came without a decision take it from the multiple headers, and stay as they were otherwise."""
    headers = {b"b3": TRACE + b"-" + SPAN, b"x-b3-sampled": b"0"}
    assert read(headers) == (TraceContext(TRACE_ID, SPAN_ID, False, "", "b3"), {})


def test_counters_add_up_per_format():
    """Each format has its own counter, which only grows."""
    extractor = Extractor(FORMATS)
    bad = {
        b"traceparent": b"?",
        b"grpc-trace-bin": b"?",
        b"b3": b"?",
        b"x-b3-traceid": b"?",
        b"x-b3-spanid": b"?",
        b"uber-trace-id": b"?",
        b"x-amzn-trace-id": b"?",
        b"x-datadog-trace-id": b"?",
        b"x-datadog-parent-id": b"?",
    }
    for _ in range(2):
        assert extractor.extract(bad) == (None, ())
    assert extractor.malformed == {
        "tracecontext": 2, "grpc": 2, "b3": 2, "b3multi": 4, "jaeger": 2, "xray": 2, "datadog": 4,
    }  # fmt: skip
    extractor.extract(spelled_all(dict.fromkeys(FORMATS, TRACE)))
    assert sum(extractor.malformed.values()) == 18


# ---- Any bytes

NEAR_MISSES = st.text("0123456789abcdefABCDEFd-:;=,% _@\t?xRootParentSampled.", max_size=70).map(str.encode)
VALUES = st.one_of(st.binary(max_size=80), NEAR_MISSES, st.sampled_from([TRACEPARENT, TRACE, SPAN, ROOT, b"1", b"a=1"]))
HEADERS = st.dictionaries(
    st.sampled_from(sorted(HEADER_NAMES)), st.one_of(VALUES, st.lists(VALUES, max_size=3)), max_size=len(HEADER_NAMES)
)


def fuzz_target():
    """The fuzz target's module; it needs no atheris unless it is run."""
    spec = importlib.util.spec_from_file_location("fuzz_propagation", FUZZ_DIRECTORY / "fuzz_propagation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = fuzz_target()


@given(HEADERS)
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_well_formed_answer(headers):
    """Whatever the bytes, extraction does not raise and what it returns keeps the promises of TraceContext."""
    FUZZ.check(headers)


@pytest.mark.parametrize("seed", sorted(path.name for path in (FUZZ_DIRECTORY / "corpus/propagation").iterdir()))
def test_the_fuzz_corpus_holds(seed):
    """Every seed and every crash of the past passes the fuzz target's checks and holds a header that is read."""
    data = (FUZZ_DIRECTORY / "corpus/propagation" / seed).read_bytes()
    assert FUZZ.parse(data)
    FUZZ.test_one_input(data)


def test_the_fuzz_corpus_is_there():
    """Every format has seeds that are read as valid contexts."""
    found = set()
    for path in (FUZZ_DIRECTORY / "corpus/propagation").iterdir():
        context, others = Extractor(FORMATS).extract(FUZZ.parse(path.read_bytes()))
        found |= {each.format for each in (context, *others) if each is not None}
    assert found == set(FORMATS)


IDS_16 = st.binary(min_size=16, max_size=16).filter(any)
IDS_8 = st.binary(min_size=8, max_size=8).filter(any)


@given(IDS_16, IDS_8, st.integers(0, 255), st.integers(0, 254))
@settings(max_examples=50, deadline=None)
def test_traceparent_round_trip(trace_id, span_id, flags, version):
    """Any ids, flags and version that are valid come back as they were sent."""
    value = f"{version:02x}-{trace_id.hex()}-{span_id.hex()}-{flags:02x}".encode()
    expected = TraceContext(trace_id, span_id, flags % 2 == 1, "", "tracecontext")
    assert read({b"traceparent": value}) == (expected, {})


@given(IDS_16, IDS_8, IDS_8, st.sampled_from([("", None), ("-0", False), ("-1", True), ("-d", True)]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_b3_round_trip(trace_id, span_id, parent_id, state_and_meaning, short):
    """Any valid ids and decision come back from both encodings of B3."""
    suffix, sampled = state_and_meaning
    digits = trace_id.hex()
    if short and any(trace_id[8:]):
        digits = trace_id[8:].hex()
        trace_id = bytes(8) + trace_id[8:]
    parent = f"-{parent_id.hex()}" if suffix else ""
    single = {b"b3": f"{digits}-{span_id.hex()}{suffix}{parent}".encode()}
    assert read(single) == (TraceContext(trace_id, span_id, sampled, "", "b3"), {})
    multi = {b"x-b3-traceid": digits.encode(), b"x-b3-spanid": span_id.hex().encode()}
    if suffix == "-d":
        multi[b"x-b3-flags"] = b"1"
    elif suffix:
        multi[b"x-b3-sampled"] = suffix[1:].encode()
    assert read(multi) == (TraceContext(trace_id, span_id, sampled, "", "b3multi"), {})


@given(IDS_16, IDS_8, st.integers(0, 2**64), st.integers(0, 255), st.booleans())
@settings(max_examples=50, deadline=None)
def test_jaeger_round_trip(trace_id, span_id, parent, flags, encoded):
    """Any valid ids come back, written without leading zeros as the Jaeger clients do."""
    value = f"{int.from_bytes(trace_id, 'big'):x}:{int.from_bytes(span_id, 'big'):x}:{parent:x}:{flags:x}"
    value = value.replace(":", "%3A") if encoded else value
    expected = TraceContext(trace_id, span_id, flags % 4 > 0, "", "jaeger")
    assert read({b"uber-trace-id": value.encode()}) == (expected, {})


@given(IDS_16, st.none() | IDS_8, st.sampled_from([None, True, False]), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_xray_round_trip(trace_id, span_id, sampled, random):
    """Any valid ids come back with the fields in any order."""
    digits = trace_id.hex()
    fields = [f"Root=1-{digits[:8]}-{digits[8:]}", f"Sampled={'?' if sampled is None else int(sampled)}", "Self=x"]
    if span_id is not None:
        fields.append(f"Parent={span_id.hex()}")
    random.shuffle(fields)
    expected = TraceContext(trace_id, span_id, sampled, "", "xray")
    assert read({b"x-amzn-trace-id": ";".join(fields).encode()}) == (expected, {})


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1), st.integers(1, 2**64 - 1), st.none() | st.integers(-9, 9))
@settings(max_examples=50, deadline=None)
def test_datadog_round_trip(upper, lower, span, priority):
    """Any ids and priority come back."""
    headers = {
        b"x-datadog-trace-id": b"%d" % lower,
        b"x-datadog-parent-id": b"%d" % span,
        b"x-datadog-tags": b"_dd.p.dm=-1,_dd.p.tid=%016x" % upper,
    }
    sampled = None
    if priority is not None:
        headers[b"x-datadog-sampling-priority"] = b"%d" % priority
        sampled = priority > 0
    trace_id = (upper << 64 | lower).to_bytes(16, "big")
    assert read(headers) == (TraceContext(trace_id, span.to_bytes(8, "big"), sampled, "", "datadog"), {})
