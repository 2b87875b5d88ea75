"""Where functions lie in an ELF file.

In: a function that reads from the file, and names. Out: the file offset of each function that the file defines. Never:
reads without a bound, trusts a number of the file, raises for what is in it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Iterator

import msgspec

ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, count)`` returns at most ``count`` bytes."""

_TABLE_BYTES = 64 * 1024
"""Section headers and program headers; what is behind is as if absent."""
_SYMBOLS_BYTES = 32 << 20
"""Of one symbol table: a million symbols. The executable of Node.js has a twelfth of it."""
_NAMES_BYTES = 64 << 20
_NAMES_OF_SECTIONS_BYTES = 64 * 1024
_TABLES = 4
"""Symbol tables that are looked at; linkers make two."""
_CANDIDATES = 65536
"""Places of a symbol table that hold the number of a name, whatever they are."""
_NAME_BYTES = 512
"""Of a name that is looked for by its parts."""
_NAMES_LIKE = 4096
"""So many names that hold the part are compared with the pattern: a program has a handful."""
_CHUNK_BYTES = 24 << 14
"""A multiple of the size of a symbol."""
_SYMBOL_TABLES = (11, 2)  # SHT_DYNSYM, which is shorter and looked at first, SHT_SYMTAB
_LOAD = 1  # PT_LOAD
_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_OFFSET_MAX = 2**62


class Segment(msgspec.Struct, frozen=True):
    """A part of the file that is mapped when it runs."""

    flags: int  # PF_X 1, PF_W 2, PF_R 4
    offset: int
    address: int
    bytes_in_file: int


class Section(msgspec.Struct, frozen=True):
    """A section; ``name`` is an offset in the names of sections. One that lies beyond every file is empty."""

    name: int
    kind: int
    offset: int
    size: int
    link: int
    entry_size: int


class Layout(msgspec.Struct, frozen=True):
    """What the headers say. Either list may be empty: a file runs without sections."""

    machine: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    names: int  # index of the section with the names of sections

    def offset_of(self, address: int) -> int | None:
        """Where in the file a byte of the running program lies."""
        for segment in self.segments:
            if segment.address <= address < segment.address + segment.bytes_in_file:
                return address - segment.address + segment.offset
        return None

    def sections_named(self, read_at: ReadAt, names: Collection[str]) -> list[Section]:
        """The sections of these names, in the order of the file."""
        if self.names >= len(self.sections):
            return []
        table = self.sections[self.names]
        data = read_at(table.offset, min(table.size, _NAMES_OF_SECTIONS_BYTES))
        wanted = {name.encode() for name in names}
        return [one for one in self.sections if data[one.name : data.find(b"\0", one.name)] in wanted]


def read_layout(read_at: ReadAt) -> Layout | None:
    """The headers of a 64-bit little-endian file, which is what every supported machine runs; None for another one.

    Layouts: System V ABI, "ELF header", "Sections", "Program header".
    """
    header = read_at(0, 64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return None
    (machine,) = struct.unpack_from("<H", header, 18)
    segments_offset, sections_offset = struct.unpack_from("<QQ", header, 32)
    segment_size, segment_count, section_size, section_count, names = struct.unpack_from("<5H", header, 54)
    segments = sections = iter(())
    if segment_size == _SEGMENT.size:
        segments = _table(read_at, segments_offset, segment_count, _SEGMENT)
    if section_size == _SECTION.size:
        sections = _table(read_at, sections_offset, section_count, _SECTION)
    return Layout(
        machine,
        tuple(
            Segment(flags, offset, address, in_file)
            for kind, flags, offset, address, _, in_file, _, _ in segments
            if kind == _LOAD and offset <= _OFFSET_MAX
        ),
        tuple(
            Section(name, kind, *((offset, size) if offset <= _OFFSET_MAX else (0, 0)), link, entry_size)
            for name, kind, _, _, offset, size, link, _, _, entry_size in sections
        ),
        names,
    )


def function_offsets(read_at: ReadAt, names: Collection[str]) -> dict[str, int]:
    """The file offsets of those of the functions that the file defines in its symbol tables.

    Layout: System V ABI, "Symbol table".
    """
    wanted = {name.encode(): name for name in names}
    found: dict[str, int] = {}
    for name, offset in _defined(read_at, lambda at, size: names_at(read_at, at, size, wanted)):
        found.setdefault(name, offset)
    return found


def functions_with(read_at: ReadAt, part: bytes, pattern: re.Pattern[bytes]) -> list[int]:
    """The file offsets of the functions whose whole names match, all of which hold ``part``: mangled names have hashes.

    Names of more than ``_NAME_BYTES`` are not looked at.
    """
    found = _defined(read_at, lambda at, size: _names_with(read_at, at, size, part, pattern))
    return sorted({offset for _, offset in found})


def _defined(read_at: ReadAt, find: Callable[[int, int], dict[int, str]]) -> Iterator[tuple[str, int]]:
    """Name and file offset of each function that has one of the names which ``find(offset, size)`` finds in a string
    table, by their places there.
    """
    layout = read_layout(read_at)
    if layout is None:
        return
    sections = layout.sections
    tables = sorted((one for one in sections if one.kind in _SYMBOL_TABLES), key=lambda one: -one.kind)
    for table in tables[:_TABLES]:
        if table.link >= len(sections) or table.entry_size != _SYMBOL.size:
            continue
        strings = sections[table.link]
        indices = find(strings.offset, min(strings.size, _NAMES_BYTES))
        for index, address in _symbols(read_at, table.offset, min(table.size, _SYMBOLS_BYTES), indices):
            offset = layout.offset_of(address)
            if offset is not None:
                yield indices[index], offset


def _table(read_at: ReadAt, offset: int, count: int, entry: struct.Struct) -> Iterator[tuple[int, ...]]:
    if offset > _OFFSET_MAX:
        return iter(())
    data = read_at(offset, min(count * entry.size, _TABLE_BYTES))
    return entry.iter_unpack(data[: len(data) // entry.size * entry.size])


def chunks(read_at: ReadAt, offset: int, size: int, overlap: int) -> Iterator[tuple[int, bytes]]:
    """The bytes in pieces, each with its place; one begins ``overlap`` bytes before the end of the one before it."""
    done = 0
    while done < size:
        data = read_at(offset + done, min(_CHUNK_BYTES, size - done))
        if not data:
            return
        yield done, data
        if len(data) <= overlap:
            return
        done += len(data) - overlap


def names_at(read_at: ReadAt, offset: int, size: int, wanted: dict[bytes, str]) -> dict[int, str]:
    """Where the names stand in a string table, whole strings only."""
    found: dict[int, str] = {}
    strings = {b"\0" + name + b"\0": name for name in wanted}
    overlap = max(map(len, strings), default=1) - 1
    for start, data in chunks(read_at, offset, size, overlap):
        for string, name in strings.items():
            at = data.find(string)
            if at >= 0:
                found[start + at + 1] = wanted[name]
        if len(found) == len(wanted):
            break
    return found


def _names_with(read_at: ReadAt, offset: int, size: int, part: bytes, pattern: re.Pattern[bytes]) -> dict[int, str]:
    """Where names stand that match and hold ``part``."""
    found: dict[int, str] = {}
    compared = 0
    for start, data in chunks(read_at, offset, size, _NAME_BYTES):
        at = data.find(part)
        while at >= 0 and compared < _NAMES_LIKE:
            compared += 1
            begin = data.rfind(b"\0", max(0, at - _NAME_BYTES), at) + 1
            name = data[begin : data.find(b"\0", at)]
            if begin and len(name) <= _NAME_BYTES and pattern.fullmatch(name):
                found[start + begin] = name.decode("ascii", "replace")
            at = data.find(part, at + 1)
    return found


def _symbols(read_at: ReadAt, offset: int, size: int, indices: dict[int, str]) -> Iterator[tuple[int, int]]:
    """Index of the name and address of each function in a symbol table that has one of these names."""
    if not indices:
        return
    patterns = [struct.pack("<I", index) for index in indices]
    candidates = 0
    for _, data in chunks(read_at, offset, size - size % _SYMBOL.size, 0):
        for pattern in patterns:
            at = data.find(pattern)
            while at >= 0 and candidates < _CANDIDATES:
                candidates += 1
                if at % _SYMBOL.size == 0 and at + _SYMBOL.size <= len(data):
                    index, info, _, section, address, _ = _SYMBOL.unpack_from(data, at)
                    if info & 15 in _FUNCTIONS and section:
                        yield index, address
                at = data.find(pattern, at + 1)
