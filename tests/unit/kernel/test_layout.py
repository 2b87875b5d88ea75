"""agent.kernel.layout: BTF descriptions -> codecs, and the refusal of an object of another version."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from agent import model
from agent.kernel.layout import LayoutMismatchError, WireLayout, parse_enum, parse_struct
from tests.unit.kernel.wire import DESCRIPTIONS, LAYOUT

EVENTS = Path(__file__).resolve().parents[3] / "bpf" / "events.h"


def layout_with(**replaced: str) -> WireLayout:
    return WireLayout.from_descriptions(lambda name: replaced.get(name, DESCRIPTIONS[name]))


def test_members_become_a_codec_without_the_padding():
    """Each integer size has its code, arrays are bytes, padding is skipped, order and extent are C's."""
    text = "kind 0 2 integer\n_pad 2 2 array\nid 4 4 integer\nname 8 3 array\nx 11 1 integer\ny 12 8 integer\n"
    layout = parse_struct("t", text + "sizeof 0 20 struct\n")
    assert layout.fields == ("kind", "id", "name", "x", "y")
    packed = struct.pack("<H2xI3sBQ", 1, 2, b"abc", 3, 4)
    assert layout.codec.unpack(packed) == (1, 2, b"abc", 3, 4)
    assert layout.codec.size == 20


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a 0 4 integer\nb 8 8 integer\nsizeof 0 16 struct", "implicit padding before b"),
        ("a 0 4 integer\nsizeof 0 8 struct", "implicit padding at its end"),
        ("a 0 16 integer\nsizeof 0 16 struct", "size of 16 bytes"),
        ("a 0 4 integer", "not described"),
        ("", "not described"),
    ],
)
def test_what_is_not_foreseen_is_refused(text, complaint):
    """Implicit padding, odd sizes and half a description raise and name the struct."""
    with pytest.raises(LayoutMismatchError, match=f"struct t.*{complaint}"):
        parse_struct("t", text)


def test_enums_keep_their_numbers():
    """One line per value; negative numbers are numbers."""
    assert parse_enum("A 1\nB -2\n") == {"A": 1, "B": -2}


def test_the_descriptions_here_are_the_agents_own():
    """The layout made from this test's own description passes the comparison with agent.model."""
    assert LAYOUT.exchange.fields == model.Exchange.__struct_fields__[:-2]
    assert LAYOUT.kinds["RECORD_CLOSE"] == 4
    assert LAYOUT.counters[0] == "begun"
    assert "counters" not in LAYOUT.counters


def test_the_descriptions_here_follow_the_header():
    """Member names, enum names and numbers of the description are those of bpf/events.h, in its order."""
    header = re.sub(r"/\*.*?\*/", "", EVENTS.read_text(), flags=re.DOTALL)
    for kind, name, body in re.findall(r"(struct|enum) (\w+) \{(.*?)\};", header, flags=re.DOTALL):
        described = [line.split()[0] for line in DESCRIPTIONS[name].splitlines() if not line.startswith("sizeof")]
        if kind == "struct":
            assert described == re.findall(r"(\w+)(?:\[\d+\])?;", body), name
        else:
            assert described == re.findall(r"^\s*(\w+)", body, flags=re.MULTILINE), name


SWAPPED = DESCRIPTIONS["record_close"].replace("role", "tmp").replace("\nend", "\nrole").replace("tmp", "end")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("record_close", SWAPPED, "record_close"),
        ("record_exchange", DESCRIPTIONS["record_exchange"].replace("peer_id", "peer"), "record_exchange"),
        ("record_segment", DESCRIPTIONS["record_segment"].replace("offset 32", "position 32"), "record_segment"),
        ("record_process", DESCRIPTIONS["record_process"].replace("ppid", "parent"), "record_process"),
        ("exchange_end", DESCRIPTIONS["exchange_end"].replace("RESET 5", "RESET 9"), "exchange_end"),
        ("exchange_role", "ROLE_SERVER 2\nROLE_CLIENT 1", "exchange_role"),
        ("exchange_flag", DESCRIPTIONS["exchange_flag"] + "FLAG_NEW 512\n", "exchange_flag"),
        ("counter", "COUNTER_BEGUN 0\nCOUNTERS 2", "counter"),
    ],
)
def test_an_object_of_another_version_is_refused(name, text, complaint):
    """Any difference in names, order or numbers raises and says where."""
    assert text != DESCRIPTIONS[name]
    with pytest.raises(LayoutMismatchError, match=complaint):
        layout_with(**{name: text})
