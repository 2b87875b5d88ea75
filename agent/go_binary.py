"""Where Go's ``crypto/tls`` reads and writes plaintext in an executable, stripped or not.

In: a function that reads from the file. Out: for ``Conn.Read`` and ``Conn.Write`` the file offset of the first
instruction that every call passes once, and that of each instruction that returns. Go moves the stacks of its
goroutines, so a probe on returns, which replaces a return address, would crash the program; one on an instruction that
returns does not. Never: reads without a bound, trusts a number of the file, guesses: what is not as the Go linker
writes it is refused with a reason.

The functions are found as the runtime finds them, in the table of functions (``pclntab``) that is in every Go
executable, whatever was stripped. Layouts: Go's debug/gosym/pclntab.go, cmd/link/internal/ld/pcln.go, and
runtime/symtab.go (``moduledata``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from agent.elf import Layout, ReadAt, Section, chunks, names_at, read_layout

READ = "crypto/tls.(*Conn).Read"
WRITE = "crypto/tls.(*Conn).Write"

_X86_64, _AARCH64 = 62, 183  # EM_X86_64, EM_AARCH64
_SECTIONS = (".gopclntab", ".data.rel.ro.gopclntab")
_GO_1_2, _GO_1_16, _GO_1_18, _GO_1_20 = 0xFFFFFFFB, 0xFFFFFFFA, 0xFFFFFFF0, 0xFFFFFFF1
_HEADER = struct.Struct("<IHBB8Q")
"""Magic, zeros, size of an instruction, size of a pointer; functions, files, start of the code (since Go 1.18), and the
offsets of names, compilation units, file names, tables of values, and of the table of functions."""
_SCANNED_BYTES = 128 << 20
"""How far the table is looked for in a file without sections; that of Kubernetes' largest program lies within 64 MB."""
_TABLE_BYTES = 128 << 20
_CANDIDATES = 1024
"""Places that hold the number of a name, whatever they are."""
_HEADERS = 8
"""Places that look like the table's header. What looks for the code's start may read much for each."""
_FUNCTIONS_MAX = 1 << 22
_CODE_BYTES = 64 * 1024
"""Of one function. Those that are looked for have a hundredth of it."""
_OFFSET_MAX = 2**62
_TEXT_WORD = 22
"""In ``moduledata``: the table's header, six slices, ``findfunctab``, ``minpc``, ``maxpc``, then the code's start."""


class GoCall(msgspec.Struct, frozen=True):
    """A function, by file offsets: where each call comes by once, and where each ends."""

    entry: int
    returns: tuple[int, ...]


class GoUnseenError(Exception):
    """TLS of this executable cannot be seen; ``reason`` is a metric label.

    ``go_old``: a Go before 1.17 (on arm64 1.18), which passes arguments on the stack. ``go_no_tls``: the program has no
    crypto/tls. ``go_layout``: its table of functions is not found, or not understood. ``go_code``: a function is not as
    the Go compiler makes it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Table(msgspec.Struct, frozen=True):
    """A table of functions, by file offsets. ``code`` is the address that entries count from; 0: they are addresses."""

    magic: int
    functions: int
    names: int
    names_size: int
    rows: int
    end: int
    code: int

    @property
    def is_relative(self) -> bool:
        return self.magic != _GO_1_16

    @property
    def word(self) -> struct.Struct:
        return struct.Struct("<I" if self.is_relative else "<Q")


def crypto_tls_calls(read_at: ReadAt) -> tuple[GoCall, GoCall]:
    """``Conn.Read`` and ``Conn.Write`` of a Go executable. Raises GoUnseenError."""
    layout = read_layout(read_at)
    if layout is None or layout.machine not in (_X86_64, _AARCH64):
        raise GoUnseenError("go_layout")
    table = _find_table(read_at, layout)
    if table.magic == _GO_1_16 and layout.machine == _AARCH64:
        raise GoUnseenError("go_old")
    spans = _find_functions(read_at, table, (READ, WRITE))
    if spans.keys() != {READ, WRITE}:
        raise GoUnseenError("go_no_tls")
    return _call(read_at, layout, table, *spans[READ]), _call(read_at, layout, table, *spans[WRITE])


def _find_table(read_at: ReadAt, layout: Layout) -> _Table:
    for section in layout.sections_named(read_at, _SECTIONS):
        return _read_table(read_at, layout, section)
    for section in _scan(read_at, layout):
        try:
            return _read_table(read_at, layout, section)
        except GoUnseenError as error:
            if error.reason == "go_old":
                raise
    raise GoUnseenError("go_layout")


def _scan(read_at: ReadAt, layout: Layout) -> Iterator[Section]:
    """Places that look like the table in a file whose sections are gone."""
    quantum = 1 if layout.machine == _X86_64 else 4
    patterns = [struct.pack("<IHBB", magic, 0, quantum, 8) for magic in (_GO_1_20, _GO_1_18, _GO_1_16, _GO_1_2)]
    left, candidates = _SCANNED_BYTES, 0
    for segment in layout.segments:
        if segment.flags & 1:
            continue  # code
        size = min(segment.bytes_in_file, left)
        left -= size
        for start, data in chunks(read_at, segment.offset, size, 7):
            for pattern in patterns:
                at = data.find(pattern)
                while at >= 0 and candidates < _HEADERS:
                    candidates += 1
                    offset = segment.offset + start + at
                    yield Section(0, 0, offset, segment.bytes_in_file - start - at, 0, 0)
                    at = data.find(pattern, at + 1)


def _read_table(read_at: ReadAt, layout: Layout, section: Section) -> _Table:
    data = read_at(section.offset, _HEADER.size)
    if len(data) < _HEADER.size:
        raise GoUnseenError("go_layout")
    magic, zero, quantum, pointer, functions, _, *offsets = _HEADER.unpack(data)
    if magic == _GO_1_2 and not zero:
        raise GoUnseenError("go_old")
    if zero or magic not in (_GO_1_16, _GO_1_18, _GO_1_20) or pointer != 8:
        raise GoUnseenError("go_layout")
    if quantum != (1 if layout.machine == _X86_64 else 4) or not 0 < functions <= _FUNCTIONS_MAX:
        raise GoUnseenError("go_layout")
    code = 0 if magic == _GO_1_16 else offsets.pop(0)
    names, units, *_, rows = offsets[:5]
    size = min(section.size, _TABLE_BYTES)
    row_size = 16 if magic == _GO_1_16 else 8
    if not (_HEADER.size - 8 <= names < units <= size and rows + (functions + 1) * row_size <= size):
        raise GoUnseenError("go_layout")
    if magic != _GO_1_16 and not code:
        code = _code_start(read_at, layout, section.offset, names)
    return _Table(
        magic, functions, section.offset + names, units - names, section.offset + rows, section.offset + size, code
    )


def _code_start(read_at: ReadAt, layout: Layout, table_offset: int, names: int) -> int:
    """The address of the code's start, of which Go 1.26 tells its runtime only (``moduledata``)."""
    address = next(
        (
            table_offset - one.offset + one.address
            for one in layout.segments
            if one.offset <= table_offset < one.offset + one.bytes_in_file
        ),
        -1,
    )
    if not 0 <= address < _OFFSET_MAX:
        raise GoUnseenError("go_layout")
    pattern = struct.pack("<QQ", address, address + names)
    left = _SCANNED_BYTES
    for segment in layout.segments:
        if segment.flags & 1:
            continue
        size = min(segment.bytes_in_file, left)
        left -= size
        for start, data in chunks(read_at, segment.offset, size, len(pattern) - 1):
            at = data.find(pattern)
            if at >= 0:
                word = read_at(segment.offset + start + at + 8 * _TEXT_WORD, 8)
                if len(word) == 8:
                    return int.from_bytes(word, "little")
    raise GoUnseenError("go_layout")


def _find_functions(read_at: ReadAt, table: _Table, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where the code of each function begins and ends, by address.

    What is known of a function (``_func``) begins with its entry and the offset of its name. The number of the name may
    stand elsewhere by chance: only what the table of functions leads to is a function.
    """
    wanted = names_at(read_at, table.names, table.names_size, {name.encode(): name for name in names})
    found: dict[str, tuple[int, int]] = {}
    if not wanted:
        return found
    patterns = {struct.pack("<I", offset): name for offset, name in wanted.items()}
    word, candidates = table.word, 0
    for start, data in chunks(read_at, table.rows, table.end - table.rows, word.size + 3):
        for pattern, name in patterns.items():
            at = data.find(pattern, word.size)
            while at >= 0 and name not in found and candidates < _CANDIDATES:
                candidates += 1
                (entry,) = word.unpack_from(data, at - word.size)
                span = _row(read_at, table, entry, start + at - word.size)
                if span is not None:
                    found[name] = span
                at = data.find(pattern, at + 1)
        if len(found) == len(names):
            break
    return found


def _row(read_at: ReadAt, table: _Table, entry: int, details: int) -> tuple[int, int] | None:
    """Begin and end of the function that the table has at ``entry``, if its details are there."""
    row = struct.Struct("<II" if table.is_relative else "<QQ")
    low, high = 0, table.functions
    while low < high:
        middle = (low + high) // 2
        data = read_at(table.rows + middle * row.size, row.size + table.word.size)
        if len(data) < row.size + table.word.size:
            return None
        begin, where = row.unpack_from(data)
        if begin == entry:
            (end,) = table.word.unpack_from(data, row.size)
            return (table.code + begin, table.code + end) if where == details and begin < end else None
        if begin < entry:
            low = middle + 1
        else:
            high = middle
    return None


def _call(read_at: ReadAt, layout: Layout, table: _Table, begin: int, end: int) -> GoCall:
    offset = layout.offset_of(begin)
    if offset is None or offset > _OFFSET_MAX or end - begin > _CODE_BYTES:
        raise GoUnseenError("go_layout")
    code = read_at(offset, end - begin)
    if len(code) < end - begin:
        raise GoUnseenError("go_layout")
    entry, returns = (_points_x86_64 if layout.machine == _X86_64 else _points_aarch64)(code)
    if entry is None:
        # Go 1.16 and 1.17 have the same table; the earlier one does not keep the goroutine in a register.
        raise GoUnseenError("go_old" if table.magic == _GO_1_16 else "go_code")
    if not returns:
        raise GoUnseenError("go_code")
    return GoCall(offset + entry, tuple(offset + at for at in returns))


def _points_x86_64(code: bytes) -> tuple[int | None, list[int]]:
    """The instruction behind the check of the stack's size, and those that return.

    A function whose stack is too small has it enlarged and begins anew: only what is behind the check is passed once.
    Arguments are in their registers there still. The check compares with what r14, the goroutine, points to.
    """
    import capstone  # of some size: only for machines that run a Go program with TLS

    entry, returns, at, checks = None, [], 0, False
    for number, (at_now, size, mnemonic, operands) in enumerate(
        capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm_lite(code, 0)
    ):
        at = at_now + size
        if mnemonic == "ret":
            returns.append(at_now)
        elif entry is None and number < 8:
            checks = checks or (mnemonic == "cmp" and operands.endswith("[r14 + 0x10]"))
            if mnemonic == "jbe" and checks:
                entry = at
            elif mnemonic not in ("cmp", "lea", "mov", "sub", "jb"):
                return None, []
    if at != len(code):
        raise GoUnseenError("go_code")  # a return may be in what could not be read
    return entry, returns


def _points_aarch64(code: bytes) -> tuple[int | None, list[int]]:
    """The same for instructions of one size: ``ldr x16, [x28, #16]``, a comparison, ``b.ls``; ``ret``.

    Constants that the assembler put between them are told by the loads that lead there.
    """
    words = [word for (word,) in struct.iter_unpack("<I", code[: len(code) & ~3])]
    constants = set()
    for index, word in enumerate(words):
        if word & 0x3B000000 == 0x18000000:  # ldr (literal)
            target = index + ((word >> 5 & 0x7FFFF) ^ 0x40000) - 0x40000
            constants.update((target, target + 1, target + 2, target + 3))
    entry = None
    if words[:1] == [0xF9400B90]:
        entry = next((4 * index + 4 for index, word in enumerate(words[:8]) if word & 0xFF00001F == 0x54000009), None)
    return entry, [4 * index for index, word in enumerate(words) if word == 0xD65F03C0 and index not in constants]
