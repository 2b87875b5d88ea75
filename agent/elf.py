"""Where functions lie in an ELF file.

In: a function that reads from the file, and names. Out: the file offset of each function that the file defines. Never:
reads without a bound, trusts a number of the file, raises for what is in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator

ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, count)`` returns at most ``count`` bytes."""

_TABLE_BYTES = 64 * 1024
"""Section headers and program headers; what is behind is as if absent."""
_SYMBOLS_BYTES = 32 << 20
"""Of one symbol table: a million symbols. The executable of Node.js has a twelfth of it."""
_NAMES_BYTES = 64 << 20
_TABLES = 4
"""Symbol tables that are looked at; linkers make two."""
_CANDIDATES = 65536
"""Places of a symbol table that hold the number of a name, whatever they are."""
_CHUNK_BYTES = 24 << 14
"""A multiple of the size of a symbol."""
_SYMBOL_TABLES = (11, 2)  # SHT_DYNSYM, which is shorter and looked at first, SHT_SYMTAB
_LOAD = 1  # PT_LOAD
_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_OFFSET_MAX = 2**62


def function_offsets(read_at: ReadAt, names: Collection[str]) -> dict[str, int]:
    """The file offsets of those of the functions that the file defines in its symbol tables.

    64-bit little-endian files only, which is what every supported machine runs. Layouts: System V ABI, "ELF header",
    "Sections", "Symbol table", "Program header".
    """
    header = read_at(0, 64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return {}
    segments_offset, sections_offset = struct.unpack_from("<QQ", header, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
    if segment_size != _SEGMENT.size or section_size != _SECTION.size:
        return {}
    segments = [
        (offset, address, in_file)
        for kind, _, offset, address, _, in_file, _, _ in _table(read_at, segments_offset, segment_count, _SEGMENT)
        if kind == _LOAD and offset <= _OFFSET_MAX
    ]
    sections = list(_table(read_at, sections_offset, section_count, _SECTION))
    wanted = {name.encode(): name for name in names}
    found: dict[str, int] = {}
    tables = sorted((one for one in sections if one[1] in _SYMBOL_TABLES), key=lambda one: -one[1])
    for _, _, _, _, offset, size, link, _, _, entry_size in tables[:_TABLES]:
        if link >= len(sections) or entry_size != _SYMBOL.size:
            continue
        names_offset, names_size = sections[link][4], sections[link][5]
        if max(offset, names_offset) > _OFFSET_MAX:
            continue
        indices = _names_at(read_at, names_offset, min(names_size, _NAMES_BYTES), wanted)
        for index, address in _symbols(read_at, offset, min(size, _SYMBOLS_BYTES), indices):
            name = indices[index]
            for segment_offset, start, length in segments:
                if start <= address < start + length and name not in found:
                    found[name] = address - start + segment_offset
    return found


def _table(read_at: ReadAt, offset: int, count: int, entry: struct.Struct) -> Iterator[tuple[int, ...]]:
    if offset > _OFFSET_MAX:
        return iter(())
    data = read_at(offset, min(count * entry.size, _TABLE_BYTES))
    return entry.iter_unpack(data[: len(data) // entry.size * entry.size])


def _chunks(read_at: ReadAt, offset: int, size: int, overlap: int) -> Iterator[tuple[int, bytes]]:
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


def _names_at(read_at: ReadAt, offset: int, size: int, wanted: dict[bytes, str]) -> dict[int, str]:
    """Where the names stand in a string table, whole strings only."""
    found: dict[int, str] = {}
    strings = {b"\0" + name + b"\0": name for name in wanted}
    overlap = max(map(len, strings), default=1) - 1
    for start, data in _chunks(read_at, offset, size, overlap):
        for string, name in strings.items():
            at = data.find(string)
            if at >= 0:
                found[start + at + 1] = wanted[name]
        if len(found) == len(wanted):
            break
    return found


def _symbols(read_at: ReadAt, offset: int, size: int, indices: dict[int, str]) -> Iterator[tuple[int, int]]:
    """Index of the name and address of each function in a symbol table that has one of these names."""
    if not indices:
        return
    patterns = [struct.pack("<I", index) for index in indices]
    candidates = 0
    for _, data in _chunks(read_at, offset, size - size % _SYMBOL.size, 0):
        for pattern in patterns:
            at = data.find(pattern)
            while at >= 0 and candidates < _CANDIDATES:
                candidates += 1
                if at % _SYMBOL.size == 0 and at + _SYMBOL.size <= len(data):
                    index, info, _, section, address, _ = _SYMBOL.unpack_from(data, at)
                    if info & 15 in _FUNCTIONS and section:
                        yield index, address
                at = data.find(pattern, at + 1)
