"""agent.elf: files made here, files of this machine, and files that lie."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.elf import ReadAt, function_offsets, functions_with

CODE, CODE_ADDRESS = 0x1000, 0x401000


def make(functions: dict[str, int], kind: int = 11, filler: int = 0, comment: bytes = b"") -> bytes:
    """An ELF file with one symbol table that puts each function at an address; ``filler`` symbols come before. With
    ``comment`` it says which compiler made it.
    """
    names = b"\0" + b"".join(f"filler{number}".encode() + b"\0" for number in range(filler))
    symbols = [bytes(24)] + [struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 0, 0)] * filler
    for name, address in functions.items():
        symbols.append(struct.pack("<IBBHQQ", len(names), 0x12, 0, 1, address, 16))
        names += name.encode() + b"\0"
    table = b"".join(symbols)
    segments_at, sections_at = 64, 64 + 56
    table_at = sections_at + (5 if comment else 3) * 64
    names_at = table_at + len(table)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, segments_at, sections_at, 0, 64, 56, 1, 64, *((5, 4) if comment else (3, 0))
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, CODE, CODE_ADDRESS, 0, 0x5000, 0x5000, 4096)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, table_at, len(table), 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    if comment:
        section_names = b"\0.comment\0"
        comment_at = names_at + len(names)
        sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, comment_at, len(comment), 0, 0, 1, 0)
        sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, comment_at + len(comment), len(section_names), 0, 0, 1, 0)
        names += comment + section_names
    return header + segment + sections + table + names


def files_like(*wholes: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, any bytes behind the beginning of an ELF file, and these files changed in places, or cut."""

    def changed(whole: bytes, changes: list[tuple[int, bytes]], cut: int) -> bytes:
        data = bytearray(whole)
        for at, new in changes:
            data[at : at + len(new)] = new
        return bytes(data[: len(data) - cut])

    largest = max(map(len, wholes))
    places = st.one_of(st.integers(0, 200), st.integers(0, largest))  # the headers, and anywhere
    numbers = st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from((bytes(8), b"\xff" * 8)))
    changes = st.lists(st.tuples(places, numbers), max_size=8)
    cuts = st.one_of(st.just(0), st.integers(0, largest))
    return st.one_of(
        st.binary(),
        st.binary(max_size=2000).map(wholes[0][:20].__add__),
        st.builds(changed, st.sampled_from(wholes), changes, cuts),
    )


def reading(data: bytes, reads_max: int) -> ReadAt:
    """Reads from a file of these bytes. Asserts that pread(2) would take each offset, that no read asks for more than a
    mebibyte, and that there are not too many.
    """
    reads = 0

    def read_at(offset: int, count: int) -> bytes:
        nonlocal reads
        reads += 1
        assert reads <= reads_max
        assert 0 <= offset < 2**63
        assert 0 <= count <= 1 << 20
        return data[offset : offset + count]

    return read_at


def offsets(data: bytes, *names: str) -> dict[str, int]:
    return function_offsets(lambda offset, count: data[offset : offset + count], names)


@pytest.mark.parametrize("kind", [2, 11])
@pytest.mark.parametrize("filler", [0, 40_000])
def test_functions_are_found_where_they_lie_in_the_file(kind: int, filler: int):
    """An address becomes an offset by the segment that holds it, in either kind of table, however long it is."""
    data = make({"SSL_read": CODE_ADDRESS + 0x123, "SSL_write": CODE_ADDRESS + 0x456}, kind, filler)
    assert offsets(data, "SSL_read", "SSL_write", "SSL_free") == {"SSL_read": CODE + 0x123, "SSL_write": CODE + 0x456}


def test_a_name_is_a_whole_name():
    """Neither the end nor the beginning of another name is it."""
    data = make({"xSSL_read": CODE_ADDRESS, "SSL_read_ex": CODE_ADDRESS + 16})
    assert offsets(data, "SSL_read") == {}


def test_a_function_outside_of_all_segments_is_not_there():
    """Its address leads to no byte of the file."""
    assert offsets(make({"SSL_read": 0x10}), "SSL_read") == {}


def test_what_is_cut_or_no_elf_has_no_functions():
    """Wherever the file ends, nothing is raised, and what is found is right."""
    data = make({"SSL_read": CODE_ADDRESS})
    for length in range(len(data)):
        assert offsets(data[:length], "SSL_read") in ({}, {"SSL_read": CODE})
    assert offsets(b"#!/bin/sh\n", "SSL_read") == {}


def test_the_same_as_nm_says():
    """Of this machine's own library: the offsets that binutils find."""
    library = next(Path("/usr/lib").glob("*-linux-gnu/libssl.so.3"))
    said = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    addresses = {line.split()[2].partition("@")[0]: int(line.split()[0], 16) for line in said.splitlines()}
    data = library.read_bytes()
    found = offsets(data, "SSL_read", "SSL_write", "SSL_do_handshake")
    assert len(found) == 3
    for name, offset in found.items():
        assert data[offset : offset + 4] != bytes(4)
        assert offset == addresses[name]  # its code is mapped where it lies in the file


@settings(deadline=None, max_examples=400)
@given(files_like(make({"SSL_read": CODE_ADDRESS}), make({"SSL_write": CODE_ADDRESS + 8, "SSL_read": CODE_ADDRESS}, 2)))
def test_whatever_the_file_says_nothing_is_raised(data: bytes):
    """And of a file of a few kilobytes no more is read than its headers and, twice each, four tables with names."""
    found = function_offsets(reading(data, 3 + 4 * 2 * 2), ("SSL_read", "SSL_write"))
    assert found.keys() <= {"SSL_read", "SSL_write"}
    assert all(0 <= offset < 2**64 for offset in found.values())


def test_functions_are_found_by_a_pattern_of_their_whole_names():
    """All of them, once each; what only holds the part, and a name beyond all measure, is not one."""
    data = make(
        {
            "_ZN4read17h00E": CODE_ADDRESS + 0x10,
            "_ZN4read17h01E": CODE_ADDRESS + 0x20,
            "_ZN4read17h02E": CODE_ADDRESS + 0x20,
            "_ZN4read17h03E.cold": CODE_ADDRESS + 0x30,
            "x_ZN4read17h04E": CODE_ADDRESS + 0x40,
            f"_ZN4read17h{'0' * 600}E": CODE_ADDRESS + 0x50,
        },
        filler=60_000,
    )
    pattern = re.compile(rb"_ZN4read17h[0-9a-f]*E")
    found = functions_with(lambda offset, count: data[offset : offset + count], b"4read", pattern)
    assert found == [CODE + 0x10, CODE + 0x20]


def test_a_file_full_of_names_that_nearly_match_is_given_up():
    """What is compared with the pattern is bounded: a program's author may want the agent to be busy."""
    compared = 0

    class Counting:
        def fullmatch(self, name: bytes) -> None:
            nonlocal compared
            compared += 1

    data = make({f"x4read{number}": CODE_ADDRESS for number in range(20_000)})
    assert functions_with(lambda offset, count: data[offset : offset + count], b"4read", Counting()) == []
    assert 1000 < compared < 10_000


@given(files_like(make({"_ZN4read17h00E": CODE_ADDRESS, "4read": CODE_ADDRESS})))
def test_a_pattern_is_looked_for_in_any_file(data: bytes):
    """Whatever the file is, reads are bounded."""
    found = functions_with(reading(data, 2000), b"4read", re.compile(rb"\w*4read\w*"))
    assert all(0 <= offset < 2**64 for offset in found)
