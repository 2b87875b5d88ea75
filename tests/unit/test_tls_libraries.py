"""agent.tls_libraries: processes of a directory made here, and files of this machine."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from agent.model import TlsNotice
from agent.process import ProcessInfo
from agent.tls_libraries import Libraries, inner_function, why_unseen
from tests.unit.test_elf import make as make_elf
from tests.unit.test_go_binary import make

OPENSSL = next(Path("/usr/lib").glob("*-linux-gnu/libssl.so.3"))


class Processes:
    """A ``/proc`` in which processes map files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, tgid: int, *mapped: Path | str, links: bool = True, code: str = "r-xp") -> None:
        directory = self.root / str(tgid)
        (directory / "map_files").mkdir(parents=True)
        (directory / "root").symlink_to("/")
        (directory / "exe").symlink_to("/bin/true")
        lines = ["00400000-00500000 r-xp 00000000 08:01 1 /usr/bin/program"]
        for number, path in enumerate(mapped):
            start = 0x7F0000000000 + number * 0x100000
            inode = os.stat(path).st_ino if os.path.exists(path) else 1
            lines.append(f"{start:x}-{start + 0x1000:x} {code} 00000000 08:01 {inode} {path}")
            if links:
                (directory / "map_files" / f"{start:x}-{start + 0x1000:x}").symlink_to(path)
        (directory / "maps").write_text("\n".join(lines) + "\n")


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path)


def names(libraries: Libraries, tgid: int) -> list[str] | None:
    found = libraries.shared(tgid)
    if found is None:
        return None
    for library in found:
        library.close()
    return [library.name for library in found]


@pytest.mark.parametrize("links", [True, False])
def test_a_library_is_found_by_what_is_mapped(links: bool, processes: Processes, tmp_path: Path):
    """By its inode, or by its name where the agent may not follow the memory map."""
    processes.add(7, OPENSSL, links=links)
    [library] = Libraries(tmp_path).shared(7)
    assert library.name == OPENSSL.name
    assert {function.program for function in library.functions} >= {"on_tls_handshake", "on_tls_free"}
    assert os.path.samefile(library.path, OPENSSL)
    library.close()


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_is_mapped(processes: Processes, tmp_path: Path):
    """By its name there is another inode by now: its offsets would be wrong."""
    library = tmp_path / "libssl.so.3"
    library.write_bytes(OPENSSL.read_bytes())
    processes.add(7, library, links=False)
    replacement = tmp_path / "new"
    replacement.write_bytes(OPENSSL.read_bytes())
    replacement.rename(library)
    assert names(Libraries(tmp_path), 7) == []


def test_only_code_of_tls_libraries_counts(processes: Processes, tmp_path: Path):
    """Neither data, nor a file that is only named like one, nor another library."""
    fake = tmp_path / "libssl.so.9"
    fake.write_bytes(b"no library")
    processes.add(1, OPENSSL, code="r--p")
    processes.add(2, fake)
    processes.add(3, "/lib/libc.so.6")
    libraries = Libraries(tmp_path)
    assert [names(libraries, tgid) for tgid in (1, 2, 3)] == [[], [], []]


def test_a_process_that_has_ended_has_no_answer(processes: Processes, tmp_path: Path):
    """It is told apart from one that has no library."""
    assert names(Libraries(tmp_path), 99) is None


def test_no_more_than_a_bound_is_opened_of_one_process(processes: Processes, tmp_path: Path):
    """Whatever it has mapped: the agent's descriptors are limited."""
    copies = []
    for number in range(100):
        copies.append(tmp_path / f"libssl.so.{number}")
        copies[-1].symlink_to(OPENSSL)
    own = tmp_path / "libssl.so.own"
    own.write_bytes(OPENSSL.read_bytes())
    processes.add(7, *copies[:63], own)
    processes.add(8, *copies, own)
    assert names(Libraries(tmp_path), 7) == ["libssl.so.0", own.name]
    assert names(Libraries(tmp_path), 8) == ["libssl.so.0"]


def test_no_descriptor_is_left(processes: Processes, tmp_path: Path):
    """Whatever is looked at is closed."""
    processes.add(7, OPENSSL, OPENSSL)
    libraries = Libraries(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        names(libraries, 7)
        libraries.files(7)
        libraries.executable(7)
        libraries.switches_stacks(7)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/libboost_fiber.so.1.74.0", True),
        ("/usr/lib/libboost_context-mt.so.1.74.0", True),
        ("/opt/libbrpc.so", True),
        ("/usr/lib/libcrypto.so.3", False),
        ("/usr/lib/libcom_err.so.2", False),
    ],
)
def test_programs_that_switch_stacks_are_known_by_their_libraries(
    path: str, expected: bool, processes: Processes, tmp_path: Path
):
    """Only those whose names say it."""
    processes.add(7, path, links=False)
    assert Libraries(tmp_path).switches_stacks(7) is expected


def test_go_programs_are_known_by_their_table(tmp_path: Path):
    """Even without sections: what is watched of them, or why nothing is; a program of another kind is not one."""
    (tmp_path / "7").mkdir()
    executable = tmp_path / "7" / "exe"
    libraries = Libraries(tmp_path)
    for data, programs, reason in (
        (make(has_sections=False), ["on_go_read", "on_go_write", *["on_go_read_return"] * 2, "on_go_write_return"], ""),
        (make(has_sections=False, names=("a", "b")), [], "go_no_tls"),
    ):
        executable.write_bytes(data)
        for library in (libraries.with_own_tls(7), libraries.executable(7)):
            assert library is not None
            assert ([function.program for function in library.functions], library.reason) == (programs, reason)
            library.close()
        executable.unlink()
    executable.write_bytes(b"\x7fELF\x02\x01" + bytes(58))
    assert libraries.with_own_tls(7) is libraries.executable(7) is None


@pytest.mark.parametrize(
    ("names", "programs"),
    [
        (
            [
                "_ZN6rustls12common_state11CommonState23take_received_plaintext17hf5b407d2fdca83b6E",
                "_ZN6rustls12common_state11CommonState16buffer_plaintext17h5101020129f24232E.llvm.1234",
            ],
            ["on_rust_received", "on_rust_write"],
        ),
        (
            [
                "_RNvMs_NtCs5L4r2_6rustls12common_stateNtB4_11CommonState23take_received_plaintext",
                "_RNvMs_NtCs5L4r2_6rustls12common_stateNtB4_11CommonState16buffer_plaintext",
            ],
            ["on_rust_received", "on_rust_write"],
        ),
        (["_ZN6rustls12common_state11CommonState23take_received_plaintext17hf5b407d2fdca83b6E"], []),
        (
            [
                "_ZN6rustls12common_state11CommonState23take_received_plaintext17hf5b407d2fdca83b6E",
                "_ZN6rustls12common_state11CommonState16buffer_plaintext17h5101020129f24232E.cold",
            ],
            [],
        ),
    ],
)
@pytest.mark.parametrize("comment", [b"rustc version 1.95.0", b"GCC: 12.2.0"])
def test_rust_programs_are_known_by_both_methods_of_rustls(
    names: list[str], programs: list[str], comment: bytes, tmp_path: Path
):
    """However the compiler names them, and only in what rustc has compiled."""
    (tmp_path / "7").mkdir()
    data = make_elf({name: 0x401000 + 16 * at for at, name in enumerate(names)}, comment=comment)
    (tmp_path / "7" / "exe").write_bytes(data)
    libraries = Libraries(tmp_path)
    library = libraries.with_own_tls(7)
    if not programs or comment.startswith(b"GCC"):
        assert library is libraries.executable(7) is None
        return
    assert library is not None
    assert [function.program for function in library.functions] == programs
    assert len({function.offset for function in library.functions}) == 2
    library.close()


def machine_code(plain: bytes, extended: bytes, inner: bytes, inner_at: int = 0x100) -> bytes:
    """A file with two functions at 0x40 and 0x80 that call a third one."""

    def call(at: int) -> bytes:
        return b"\xe8" + struct.pack("<i", inner_at - (at + 5))

    data = bytearray(0x200)
    data[18:20] = b"\x3e\0"
    data[0x40 : 0x40 + len(plain) + 5] = plain + call(0x40 + len(plain))
    data[0x80 : 0x80 + len(extended) + 5] = extended + call(0x80 + len(extended))
    data[inner_at : inner_at + len(inner)] = inner
    return bytes(data)


SUB, PUSH, PUSH_R12 = b"\x48\x83\xec\x18", b"\x55", b"\x41\x54"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (machine_code(SUB, SUB, PUSH_R12), 0x100),
        (machine_code(SUB, SUB, PUSH + b"\x53"), 0x100),
        (machine_code(PUSH + b"\x90", SUB, PUSH_R12), None),
        (machine_code(SUB, SUB, SUB), None),
        (machine_code(SUB, SUB, PUSH_R12, 0x108), None),
        (machine_code(SUB, b"", PUSH_R12)[:0x80] + bytes(0x180), None),
        (b"", None),
    ],
    ids=["push r12", "push rbp", "cheap already", "no push", "not aligned", "not called from both", "empty"],
)
def test_the_function_that_both_call(code: bytes, expected: int | None):
    """It is taken when all signs agree, and there is need of it."""
    assert inner_function(lambda offset, count: code[offset : offset + count], 0x40, 0x80) == expected


@pytest.mark.parametrize("language", ["java", "go", "rust", "", "python"])
def test_why_nothing_is_seen(language: str):
    """What has TLS of its own is named; of the rest it is only known that no symbols were found."""
    info = ProcessInfo((1, 2), "a", "/a", (), language, "", (), True)
    assert why_unseen(info) == (language if language in ("java", "go", "rust") else "no_symbols")


def test_the_numbers_of_notices_are_bits():
    """The kernel keeps them as such."""
    assert [int(notice) for notice in TlsNotice] == [1, 2]
