"""agent.protocols.http2_headers: header blocks against the hpack library as encoder and as reference decoder."""

from __future__ import annotations

import random

import pytest
from hpack import Decoder, Encoder, HPACKError
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ProtocolError
from agent.protocols import http2_headers
from agent.protocols.http1_stream import StreamLosses
from agent.protocols.http2_headers import UNKNOWN, HeaderDecoder, HuffmanMemo, decode_huffman

NAMES = st.sampled_from(
    [b":method", b":path", b":authority", b"accept", b"x-a", b"x-b", b"cookie", b"authorization", b"traceparent"]
)
VALUES = st.one_of(
    st.sampled_from([b"", b"GET", b"/", b"a", b"b", b"00-" + b"a" * 52]),
    st.binary(max_size=40),
    st.binary(max_size=900),
)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
BLOCKS = st.lists(st.tuples(FIELDS, st.booleans(), st.sampled_from([None] * 6 + [0, 64, 200, 4096])), max_size=12)


def decoder() -> HeaderDecoder:
    return HeaderDecoder(HuffmanMemo(frozenset((b"traceparent",))), StreamLosses())


def begun() -> HeaderDecoder:
    made = decoder()
    made.begin()
    return made


def encode(encoder: Encoder, fields: list[tuple[bytes, bytes]], huffman: bool = True, size: int | None = None) -> bytes:
    if size is not None:
        encoder.header_table_size = size
    # h2 marks what must not be indexed; the marks choose the representation.
    return encoder.encode([(name, value, name == b"authorization") for name, value in fields], huffman=huffman)


@given(BLOCKS)
@settings(max_examples=300, deadline=None)
def test_every_block_of_a_whole_connection_decodes_as_the_library_does(blocks) -> None:
    """Seen from the beginning, nothing is unknown, with and without Huffman codes, whatever the size of the table."""
    encoder, ours = Encoder(), begun()
    for fields, huffman, size in blocks:
        assert ours.decode(encode(encoder, fields, huffman, size)) == fields
        assert ours.table_bytes <= http2_headers.TABLE_BYTES


@given(BLOCKS, st.data())
@settings(max_examples=300, deadline=None)
def test_after_missed_blocks_fields_are_right_or_unknown(blocks, data) -> None:
    """Blocks are lost anywhere: what is decoded later agrees with what was sent wherever it is not None."""
    encoder, ours = Encoder(), begun()
    for fields, huffman, size in blocks:
        block = encode(encoder, fields, huffman, size)
        if data.draw(st.integers(0, 3)) == 0:
            ours.forget()
            continue
        decoded = ours.decode(block)
        assert len(decoded) == len(fields)
        for (name, value), sent in zip(decoded, fields, strict=True):
            assert name in (None, sent[0])
            assert value in (None, sent[1])
            assert name is None or value is not None


def test_what_was_missed_is_unknown_until_it_is_sent_again() -> None:
    """Old entries are unknown, new ones known; an entry with the name of an old one has a value and no name."""
    encoder = Encoder()
    encoder.encode([(b"x-old", b"1"), (b"x-name", b"2")])
    late = decoder()
    assert late.decode(encoder.encode([(b":method", b"GET"), (b"x-old", b"1"), (b"x-new", b"3")])) == [
        (b":method", b"GET"),
        UNKNOWN,
        (b"x-new", b"3"),
    ]
    assert late.decode(encoder.encode([(b"x-new", b"3"), (b"x-name", b"4"), (b"x-name", b"2")])) == [
        (b"x-new", b"3"),
        (None, b"4"),
        UNKNOWN,
    ]
    assert late.decode(encoder.encode([(b"x-name", b"4"), (b"x-new", b"3")])) == [(None, b"4"), (b"x-new", b"3")]


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # an integer without an end
        b"\x40\x05abc",  # a name that is cut
        b"\x41\x05abc",  # a value that is cut
        b"\x41",  # no value at all
        b"\x41\x81\x00",  # Huffman: padding of zeros
        b"\x41\x84\xff\xff\xff\xff",  # Huffman: EOS
        b"\x82\x3f\xe1\x1f",  # a new size behind a field
        b"\x3f\xe2\x1f",  # a size of 4097, which nobody allowed
    ],
    ids=range(9),
)
def test_a_malformed_block_is_refused_and_makes_the_table_unknown(block) -> None:
    """ProtocolError and nothing else; what had been inserted is not relied upon any more."""
    encoder, ours = Encoder(), begun()
    ours.decode(encoder.encode([(b"x-a", b"1")]))
    with pytest.raises(ProtocolError, match="malformed"):
        ours.decode(block)
    assert ours.decode(encoder.encode([(b"x-a", b"1")])) == [UNKNOWN]


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_hostile_blocks_raise_nothing_else(block) -> None:
    """Whatever the bytes: fields within the bounds, or ProtocolError. The library agrees on what is malformed."""
    ours, reference = begun(), Decoder()
    try:
        fields = ours.decode(block)
    except ProtocolError:
        with pytest.raises(HPACKError):
            reference.decode(block, raw=True)
        return
    assert ours.table_bytes <= 4096
    if UNKNOWN not in fields and all(None not in field for field in fields):
        assert fields == reference.decode(block, raw=True)


def test_a_larger_table_is_allowed_by_the_other_side_only() -> None:
    """SETTINGS_HEADER_TABLE_SIZE raises the limit, in front of the preface as well; a lower one is ignored."""
    grown = b"\x3f\xe1\x3f"  # 8192
    allowed = begun()
    allowed.allow(8192)
    allowed.allow(100)
    assert allowed.decode(grown + b"\x82") == [(b":method", b"GET")]
    early = decoder()
    early.allow(8192)
    early.begin()
    assert early.decode(grown) == []
    with pytest.raises(ProtocolError):
        begun().decode(grown)


def test_what_came_before_the_preface_stays() -> None:
    """After an upgrade the server may answer, with a table that it has been allowed, before the preface comes."""
    encoder, early = Encoder(), decoder()
    early.allow(8192)
    encoder.header_table_size = 8192
    sent = [(b"x-a", b"v" * 3000), (b"x-b", b"v" * 3000)]
    early.decode(encoder.encode(sent))
    early.begin()
    early.decode(encoder.encode([(b"x-c", b"1")]))
    assert early.decode(encoder.encode(sent)) == sent


def test_a_table_is_kept_up_to_the_bound_and_the_rest_is_unknown() -> None:
    """A peer that may use a megabyte gets 16 KiB of memory; what lies beyond is unknown, not wrong, and counted."""
    encoder, ours = Encoder(), begun()
    encoder.header_table_size = 1 << 20
    ours.allow(1 << 20)
    for number in range(100):
        sent = [(b"x-%d" % number, b"v" * 1000)]
        assert ours.decode(encoder.encode(sent)) == sent
        assert ours.table_bytes <= http2_headers.TABLE_BYTES
    assert ours.decode(encoder.encode([(b"x-0", b"v" * 1000)])) == [UNKNOWN]
    assert ours.decode(encoder.encode([(b"x-99", b"v" * 1000)])) == [(b"x-99", b"v" * 1000)]
    assert ours._losses.reasons == {"table_too_large": 1}


def test_a_bomb_of_indexed_fields_is_cut_and_counted() -> None:
    """A small block that expands to megabytes is cut at the bound; the table stays in step."""
    encoder, ours = Encoder(), begun()
    ours.decode(encoder.encode([(b"x-a", b"v" * 3000)]))
    fields = ours.decode(b"\xbe" * 5000)
    assert sum(32 + len(name) + len(value) for name, value in fields) <= http2_headers.LIST_BYTES
    assert len(fields) == http2_headers.LIST_BYTES // 3035
    assert ours._losses.reasons == {"list_too_long": 1}
    assert ours.decode(encoder.encode([(b"x-a", b"v" * 3000)])) == [(b"x-a", b"v" * 3000)]


def test_an_entry_larger_than_the_table_empties_it() -> None:
    """RFC 7541 section 4.4."""
    encoder, ours = Encoder(), begun()
    ours.decode(encoder.encode([(b"x-a", b"1")]))
    ours.decode(encoder.encode([(b"x-b", b"v" * 5000)]))
    assert ours.table_bytes == 0


def test_secret_values_are_not_remembered() -> None:
    """The memo of decoded strings keeps neither credentials nor what differs each time."""
    huffman = HuffmanMemo(frozenset((b"traceparent",)))
    ours = HeaderDecoder(huffman, StreamLosses())
    secrets = [(b"authorization", b"Bearer 123"), (b"cookie", b"a=123"), (b"traceparent", b"00-123")]
    ours.decode(Encoder().encode([*secrets, (b"accept", b"text/html")]))
    assert list(huffman._values.values()) == [b"text/html"]


def test_repeats_are_forgotten_when_the_table_changes() -> None:
    """What an owner remembers of a block holds only as long as the block means the same."""
    encoder, ours = Encoder(), begun()
    ours.decode(encoder.encode([(b"x-a", b"1")]))
    ours.repeats[1] = "known"
    ours.decode(encoder.encode([(b"x-a", b"1"), (b":method", b"GET")]))
    assert ours.repeats == {1: "known"}
    ours.decode(encoder.encode([(b"x-b", b"1")]))
    assert ours.repeats == {}


def test_huffman_strings_decode_as_the_library_does() -> None:
    """All bytes, in random strings."""
    choice = random.Random(1)
    coder = Encoder().huffman_coder
    for _ in range(300):
        text = choice.randbytes(choice.randrange(60))
        assert decode_huffman(coder.encode(text)) == text
