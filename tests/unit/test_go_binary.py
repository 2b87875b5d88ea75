"""agent.go_binary: executables made here as Go's linker lays them out, and files that lie."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings

from agent.go_binary import READ, WRITE, GoCall, GoUnseenError, crypto_tls_calls
from tests.unit.test_elf import files_like, reading

CODE, CODE_ADDRESS = 0x200, 0x401200
DATA, DATA_ADDRESS = 0x400, 0x601400
GO_1_26, GO_1_18, GO_1_17 = 0xFFFFFFF1, 0xFFFFFFF0, 0xFFFFFFFA
X86_64, AARCH64 = 62, 183

# cmp rsp, [r14+16]; jbe; mov rax, 0xc3c3c3c3c3c3c3c3; ret; xchg bx, ax with a displacement of c3; ret; int3
X86_64_CODE = bytes.fromhex("493b6610 0f8640000000 48b8c3c3c3c3c3c3c3c3 c3 488983c3000000 c3 cccc")
X86_64_ENTRY, X86_64_RETURNS = 10, (20, 28)
# lea r12, [rsp-0x58]; cmp r12, [r14+16]; jbe; ret
X86_64_LARGE = bytes.fromhex("4c8d6424a8 4d3b6610 0f8640000000 c3")
# ldr x16, [x28, #16]; sub x17, sp, #80; cmp x17, x16; b.ls; ldr x0, a constant; ret; the constant, which looks like one
AARCH64_CODE = struct.pack(
    "<8I", 0xF9400B90, 0xD10143F1, 0xEB10023F, 0x540000A9, 0x58000040, 0xD65F03C0, 0xD65F03C0, 0xD65F03C0
)


def make(
    read: bytes = X86_64_CODE,
    write: bytes = X86_64_LARGE,
    *,
    magic: int = GO_1_26,
    machine: int = X86_64,
    has_sections: bool = True,
    start: int = 0,
    names: tuple[str, str] = (READ, WRITE),
) -> bytes:
    """An executable with these two functions; ``start`` is what the table says of the code's start, 0 as Go 1.26."""
    wide = magic == GO_1_17
    word = "<Q" if wide else "<I"
    base = CODE_ADDRESS if wide else 0
    texts = b"runtime.text\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets = [0, texts.index(names[0].encode()), texts.index(names[1].encode())]
    ends = [0, 16, 16 + len(read), 16 + len(read) + len(write)]
    code = b"\x90" * 16 + read + write
    names_at = 8 + 8 * (7 if wide else 8)
    rows_at = -(-(names_at + len(texts)) // 8) * 8 + 16
    row_bytes = struct.calcsize(word) * 2
    details_at = [row_bytes * 3 + struct.calcsize(word) + 40 * number for number in range(3)]
    rows = b"".join(
        struct.pack(word, base + end) + struct.pack(word, at) for end, at in zip(ends, details_at, strict=False)
    )
    rows += struct.pack(word, base + ends[3])
    details = b"".join(
        (struct.pack(word, base + end) + struct.pack("<i", name)).ljust(40, b"\0")
        for end, name in zip(ends, offsets, strict=False)
    )
    header = struct.pack("<IHBBQQ", magic, 0, 1 if machine == X86_64 else 4, 8, 3, 1)
    header += b"" if wide else struct.pack("<Q", start)
    header += struct.pack("<5Q", names_at, rows_at - 16, rows_at - 12, rows_at - 8, rows_at)
    table = ((header + texts).ljust(rows_at, b"\0") + rows + details + bytes(64)).ljust(0x300, b"\0")
    module = struct.pack("<QQ", DATA_ADDRESS, DATA_ADDRESS + names_at).ljust(22 * 8, b"\0")
    module += struct.pack("<Q", CODE_ADDRESS)
    data = table + module
    sections_at = DATA + len(data)
    elf = b"\x7fELF\x02\x01\x01" + bytes(9)
    sections = (64, 3, 2) if has_sections else (0, 0, 0)
    elf += struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, sections_at if has_sections else 0, 0, 64, 56, 2, *sections
    )
    elf += struct.pack("<IIQQQQQQ", 1, 5, CODE, CODE_ADDRESS, 0, len(code), len(code), 4096)
    elf += struct.pack("<IIQQQQQQ", 1, 4, DATA, DATA_ADDRESS, 0, len(data), len(data), 4096)
    file = (elf.ljust(CODE, b"\0") + code).ljust(DATA, b"\0") + data
    if has_sections:
        strings = b"\0.gopclntab\0"
        file += bytes(64)
        file += struct.pack("<IIQQQQIIQQ", 1, 1, 2, DATA_ADDRESS, DATA, len(table), 0, 0, 8, 0)
        file += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, sections_at + 3 * 64, len(strings), 0, 0, 1, 0)
        file += strings
    return file


def calls(data: bytes) -> tuple[GoCall, GoCall]:
    return crypto_tls_calls(lambda offset, count: data[offset : offset + count])


def reason(data: bytes) -> str:
    with pytest.raises(GoUnseenError) as refused:
        calls(data)
    return refused.value.reason


@pytest.mark.parametrize("has_sections", [True, False])
@pytest.mark.parametrize(
    ("magic", "start"), [(GO_1_26, 0), (GO_1_26, CODE_ADDRESS), (GO_1_18, CODE_ADDRESS), (GO_1_17, 0)]
)
def test_both_functions_are_found(magic: int, start: int, has_sections: bool):
    """In the tables of all versions, in a section or not; a return is an instruction, not a byte that looks so."""
    read, write = calls(make(magic=magic, start=start, has_sections=has_sections))
    begin = CODE + 16
    assert read == GoCall(begin + X86_64_ENTRY, tuple(begin + at for at in X86_64_RETURNS))
    begin += len(X86_64_CODE)
    assert write == GoCall(begin + 15, (begin + 15,))


def test_instructions_of_arm64_are_told_from_constants():
    """What a load leads to, and the words behind it, are no code, whatever they look like."""
    read, _ = calls(make(AARCH64_CODE, AARCH64_CODE, machine=AARCH64))
    assert read == GoCall(CODE + 16 + 16, (CODE + 16 + 20,))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (make(magic=0xFFFFFFFB), "go_old"),
        (make(magic=GO_1_17, read=bytes.fromhex("64488b0c25f8ffffff 483b6110 7601 c3")), "go_old"),
        (make(AARCH64_CODE, AARCH64_CODE, magic=GO_1_17, machine=AARCH64), "go_old"),
        (make(names=(READ, "crypto/tls.(*Conn).Writer")), "go_no_tls"),
        (make(names=(READ, "vendor/crypto/tls.(*Conn).Write")), "go_no_tls"),
        (make(magic=0xFFFFFFF2), "go_layout"),
        (make(machine=3), "go_layout"),
        (make(has_sections=False, magic=0xFFFFFFF2), "go_layout"),
        (make(start=0x10), "go_layout"),
        (b"", "go_layout"),
        (make(read=X86_64_CODE[:-3] + b"\x06\x06\x06"), "go_code"),  # no instruction in 64-bit mode
        (make(read=bytes.fromhex("55 4889e5 c3")), "go_code"),
        (make(read=bytes.fromhex("493b6610 0f8640000000 90")), "go_code"),
    ],
)
def test_what_is_not_as_go_makes_it_is_refused(data: bytes, expected: str):
    """With the reason, by which the process is reported."""
    assert reason(data) == expected


def test_a_name_s_number_elsewhere_is_no_function():
    """Only what the table of functions leads to counts: a number that looks like the details of one is passed over."""
    data = bytearray(make())
    number = struct.pack("<i", 13)
    at = data.rindex(number, 0, DATA + 0x300)
    data[DATA + 0x2A0 : DATA + 0x2A8] = data[at - 4 : at + 4]
    data[at : at + 4] = struct.pack("<i", 0)
    assert reason(bytes(data)) == "go_no_tls"


def test_what_is_cut_or_changed_raises_nothing_else():
    """Wherever the file ends, and whatever one of its bytes says, there is an answer within the file or a reason."""
    whole = make()
    for end in range(0, len(whole), 7):
        with suppress(GoUnseenError):
            calls(whole[:end])
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        try:
            found = calls(bytes(changed))
        except GoUnseenError:
            continue
        for call in found:
            assert all(0 <= offset < len(whole) for offset in (call.entry, *call.returns))


REASONS = {"go_old", "go_no_tls", "go_layout", "go_code"}
READS_MAX = 1000
"""A file of two kilobytes has at most 40 segments and 8 places that look like the table. For each of these places the
code's start may be looked for in all segments, with three reads each.
"""


@settings(deadline=None, max_examples=400)
@given(
    files_like(
        make(),
        make(has_sections=False),
        make(magic=GO_1_17),
        make(magic=GO_1_18, start=CODE_ADDRESS),
        make(AARCH64_CODE, AARCH64_CODE, machine=AARCH64),
    )
)
def test_whatever_the_file_says_there_is_an_answer_or_a_reason(data: bytes):
    """Nothing else is raised, the answer lies within the file, and the number of reads is bounded."""
    refused = ""
    found: tuple[GoCall, ...] = ()
    try:
        found = crypto_tls_calls(reading(data, READS_MAX))
    except GoUnseenError as error:
        refused = error.reason
    assert refused in (REASONS if not found else {""})
    for call in found:
        assert call.returns
        assert all(0 <= offset < len(data) for offset in (call.entry, *call.returns))
