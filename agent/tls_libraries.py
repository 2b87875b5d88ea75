"""Which files a process runs TLS with: shared libraries in its memory map, or its own executable.

In: a process id. Out: ``Library`` records, each a file that defines the functions of a TLS library and where they lie,
or the reason why the process's TLS cannot be seen. Files are found through the process's own memory map, so whatever
its mount namespace is and whatever became of the name since: what it runs is what is looked at. Never: waits, attaches
anything, raises because a process is gone or forbidden, reads without a bound.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from agent.elf import ReadAt, function_offsets, functions_with, read_layout
from agent.file_identity import Identity, identity_of
from agent.go_binary import GoUnseenError, crypto_tls_calls
from agent.process import ProcessInfo, language_of_elf

_MAPS_BYTES = 1024 * 1024
_KNOWN_FILES = 4096
_MAPPINGS = 64
"""Of one process that are looked at: a real one has a handful."""
_CODE = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) [-r][-w]x[-ps] [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d{1,20}) +(/[^\0]*)"
)
"""A line of the memory map (proc(5)), of code from a file: begin, end, inode and path."""
_LIBRARY = re.compile(rb"/lib(?:ssl|boringssl|gnutls|node)(?=[^/\n]*+$)[^/\n]*?\.so")

FAMILIES: tuple[dict[str, str], ...] = (
    {
        "SSL_read": "on_tls_read",
        "SSL_read_ex": "on_tls_read_ex",
        "SSL_write": "on_tls_write",
        "SSL_write_ex": "on_tls_write_ex",
        "SSL_do_handshake": "on_tls_handshake",
        "SSL_free": "on_tls_free",
    },
    {
        "gnutls_record_recv": "on_tls_read",
        "gnutls_record_send": "on_tls_write",
        "gnutls_handshake": "on_tls_handshake",
        "gnutls_deinit": "on_tls_free",
    },
)
"""The functions of OpenSSL and its like, and of GnuTLS, and the program that is for each."""
RUSTLS = {"take_received_plaintext": "on_rust_received", "buffer_plaintext": "on_rust_write"}
"""The methods of rustls's CommonState, and the program that is for each. Versions before 0.23 lack the second one."""
_RUSTLS_NAMES = {
    method: re.compile(
        rb"(?:_ZN6rustls12common_state11CommonState%(name)b17h[0-9a-f]{16}E"
        rb"|_RNvM\w*?6rustls12common_stateNt\w*?11CommonState%(name)b)(?:\.llvm\.\d+)?" % {b"name": name}
    )
    for method, name in ((method, b"%d%b" % (len(method), method.encode())) for method in RUSTLS)
}
"""As the compiler names them: with a hash, or in the form of RFC 2603."""
_INNER = (("SSL_read", "SSL_read_ex", "on_tls_read_ex"), ("SSL_write", "SSL_write_ex", "on_tls_write_ex"))
_PROLOGUE_BYTES = 64
_X86_64 = b"\x3e\0"  # EM_X86_64
_NEEDED = ({"SSL_read", "SSL_write"}, {"gnutls_record_recv", "gnutls_record_send"})
_NAMES = [*(name for family in FAMILIES for name in family), "SSL_write_ex2"]

_STACK_SWITCHERS = re.compile(
    rb"/lib(?:boost_(?:context|coroutine|fiber)|brpc|bthread|co|colib|photon)(?:-mt)?[-.\d]*\.so"
)
"""Libraries of programs that may leave a TLS call half-way for another stack, or end it on another thread."""
_STACK_SWITCHING = ("__crystal_main", "bthread_start_background", "co_resume", "_D4vibe4core4core12runEventLoopFZi")
"""Functions that tell the same of an executable: Crystal's runtime, brpc, libco, vibe.d."""

_STAYS_ON_ITS_STACK = re.compile(r"nginx|apache2|httpd|haproxy|node|curl|wget|(?:python|pypy)[\d.]*")


class Function(msgspec.Struct, frozen=True):
    """One function to watch: the program that is for it, and its offset in the file."""

    program: str
    offset: int


class Library(msgspec.Struct, frozen=True):
    """A file whose TLS functions can be watched, or the executable of a Go program with the ``reason`` why they cannot.
    It is held open until ``close()``, so that ``path`` leads to it even when the process that showed it has ended.
    """

    identity: Identity
    descriptor: int
    name: str
    functions: tuple[Function, ...]
    reason: str = ""

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"

    def close(self) -> None:
        os.close(self.descriptor)


class _Mapping(msgspec.Struct, frozen=True):
    """``span`` is the address range as ``map_files`` names it."""

    span: str
    inode: int
    path: str


class Libraries:
    """Looks into processes. What a file defines is remembered for the last ``_KNOWN_FILES`` files."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self._proc_root = os.fspath(proc_root)
        self._known: OrderedDict[Identity, tuple[tuple[Function, ...], str]] = OrderedDict()
        self._switching: OrderedDict[Identity, bool] = OrderedDict()

    def processes(self) -> Iterator[int]:
        """The processes there are now."""
        with os.scandir(self._proc_root) as entries:
            yield from (int(entry.name) for entry in entries if entry.name.isdecimal())

    def stays_on_its_stack(self, tgid: int) -> bool:
        """Whether a process runs a program that is known to come back from each call before it makes another one.

        Of any other its first TLS bytes have to show that. The programs are those that most connections belong to.
        """
        try:
            path = os.readlink(f"{self._proc_root}/{tgid}/exe")
        except OSError:
            return False
        return _STAYS_ON_ITS_STACK.fullmatch(os.path.basename(path).removesuffix(" (deleted)")) is not None

    def shared(self, tgid: int) -> list[Library] | None:
        """The TLS libraries that a process has mapped as code; to be closed by the caller. None: it has ended."""
        found: dict[Identity, Library] = {}
        mapped = self._mapped(tgid)
        for mapping in mapped or ():
            library = self._look(self._open_mapped(tgid, mapping), os.path.basename(mapping.path))
            if library is not None and found.setdefault(library.identity, library) is not library:
                library.close()  # mapped twice
        return None if mapped is None else list(found.values())

    def executable(self, tgid: int) -> Library | None:
        """The executable of a process, when it defines the functions of a TLS library itself, or is a Go program's; to
        be closed.

        Of a Go program only Go's own TLS is watched, whatever it defines: its stacks move, and a return probe would
        write into what was copied elsewhere.
        """
        return self._look(*self._open_executable(tgid), self._functions_of_executable)

    def with_own_tls(self, tgid: int) -> Library | None:
        """The executable of a process, if it is a Go program, or one in Rust that has rustls; to be closed.

        Of others little is read.
        """
        return self._look(*self._open_executable(tgid), self._functions_of_its_own)

    def _open_executable(self, tgid: int) -> tuple[int | None, str]:
        fd = _open(f"{self._proc_root}/{tgid}/exe")
        try:
            return fd, os.path.basename(os.readlink(f"{self._proc_root}/{tgid}/exe")).removesuffix(" (deleted)")
        except OSError:
            return fd, ""

    def is_closed(self, tgid: int) -> bool:
        """Whether the agent lacks the right to open what the process runs (CAP_SYS_PTRACE, proc(5))."""
        try:
            os.close(os.open(f"{self._proc_root}/{tgid}/exe", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return isinstance(error, PermissionError)
        return False

    def switches_stacks(self, tgid: int) -> bool:
        """Whether the process may leave a call of a TLS library half-way: probes on returns could crash it."""
        if any(map(_STACK_SWITCHERS.search, self._map_lines(tgid) or ())):
            return True
        fd = _open(f"{self._proc_root}/{tgid}/exe")
        if fd is None:
            return False
        try:
            status = os.fstat(fd)
            known_as = (status.st_dev, *identity_of(fd), status.st_size, status.st_mtime_ns)
            found = self._switching.get(known_as)
            if found is None:
                found = bool(function_offsets(lambda offset, count: os.pread(fd, count, offset), _STACK_SWITCHING))
                if len(self._switching) >= _KNOWN_FILES:
                    self._switching.popitem(last=False)
                self._switching[known_as] = found
            return found
        except OSError:
            return False
        finally:
            os.close(fd)

    def files(self, tgid: int) -> set[Identity]:
        """What the process runs: its executable, and whatever is named like a TLS library."""
        found = {_identity(_open(f"{self._proc_root}/{tgid}/exe"))}
        found.update(_identity(self._open_mapped(tgid, mapping)) for mapping in self._mapped(tgid) or ())
        return {identity for identity in found if identity is not None}

    def _map_lines(self, tgid: int) -> list[bytes] | None:
        """The process's memory map. None: nothing is mapped, the process has ended."""
        try:
            with open(f"{self._proc_root}/{tgid}/maps", "rb", buffering=0) as maps:
                data = bytearray()
                while len(data) < _MAPS_BYTES and (chunk := maps.read(65536)):
                    data += chunk
        except OSError:
            return None
        return bytes(data).splitlines() or None

    def _mapped(self, tgid: int) -> list[_Mapping] | None:
        """The first ``_MAPPINGS`` mappings of code whose name is that of a TLS library, or None."""
        lines = self._map_lines(tgid)
        if lines is None:
            return None
        found = []
        for line in lines:
            if b".so" in line and _LIBRARY.search(line.removesuffix(b" (deleted)")):
                code = _CODE.fullmatch(line)
                if code is not None:
                    span = f"{int(code[1], 16):x}-{int(code[2], 16):x}"
                    path = code[4].removesuffix(b" (deleted)").decode("utf-8", "surrogateescape")
                    found.append(_Mapping(span, int(code[3]), path))
                    if len(found) == _MAPPINGS:
                        break
        return found

    def _open_mapped(self, tgid: int, mapping: _Mapping) -> int | None:
        """What is mapped, whatever has its name now. Without CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc(5)) it is
        looked for by its name, in the root of the process, and must be the inode that the memory map tells.
        """
        fd = _open(f"{self._proc_root}/{tgid}/map_files/{mapping.span}")
        if fd is None:
            fd = _open(f"{self._proc_root}/{tgid}/root{mapping.path}")
            if fd is not None and os.fstat(fd).st_ino != mapping.inode:
                os.close(fd)
                fd = None
        return fd

    def _look(
        self, fd: int | None, name: str, find: Callable[[ReadAt], tuple[tuple[Function, ...], str] | None] | None = None
    ) -> Library | None:
        """What the file is, which is closed unless it is returned. ``find`` finds functions in it, or why there are
        none to watch; None when it has not looked closely.
        """
        if fd is None:
            return None
        library = None
        try:
            status = os.fstat(fd)
            identity = identity_of(fd)
            # The same file may have been changed in its place since it was looked at. Where functions lie is believed
            # of no other device: a file system that a user made may say of its files what it likes.
            known_as = (status.st_dev, *identity, status.st_size, status.st_mtime_ns)
            found = self._known.get(known_as)
            if found is None:
                found = (find or self._functions)(lambda offset, count: os.pread(fd, count, offset))
                if found is not None:
                    if len(self._known) >= _KNOWN_FILES:
                        self._known.popitem(last=False)
                    self._known[known_as] = found
            if found is not None and any(found):
                library = Library(identity, fd, name, *found)
        except OSError:
            pass  # it is gone
        finally:
            if library is None:
                os.close(fd)
        return library

    @staticmethod
    def _functions(read_at: ReadAt) -> tuple[tuple[Function, ...], str]:
        offsets = function_offsets(read_at, _NAMES)
        functions: dict[int, Function] = {}
        for family, needed in zip(FAMILIES, _NEEDED, strict=True):
            if needed <= offsets.keys():
                for name, program in family.items():
                    if name in offsets:  # two names of one function are one function
                        functions.setdefault(offsets[name], Function(program, offsets[name]))
        for plain, extended, program in _INNER if "SSL_write_ex2" not in offsets else _INNER[:1]:
            if plain in offsets and extended in offsets:
                inner = inner_function(read_at, offsets[plain], offsets[extended])
                if inner is not None:
                    functions.pop(offsets[plain], None)
                    functions.pop(offsets[extended], None)
                    functions[inner] = Function(program, inner)
        return tuple(functions.values()), ""

    def _functions_of_executable(self, read_at: ReadAt) -> tuple[tuple[Function, ...], str]:
        found = self._functions_of_go(read_at)
        if found is not None:
            return found
        functions, reason = self._functions(read_at)
        return (*functions, *self._functions_of_rust(read_at)), reason

    def _functions_of_its_own(self, read_at: ReadAt) -> tuple[tuple[Function, ...], str] | None:
        found = self._functions_of_go(read_at)
        return self._functions_of_executable(read_at) if found is None and self._functions_of_rust(read_at) else found

    @staticmethod
    def _functions_of_rust(read_at: ReadAt) -> tuple[Function, ...]:
        """Those of rustls: in pairs, one of each for every version of it that is in the program. A compiler may have
        put either into its callers.
        """
        if language_of_elf(read_at) != "rust":
            return ()
        found = {method: functions_with(read_at, method.encode(), pattern) for method, pattern in _RUSTLS_NAMES.items()}
        if not all(found.values()):
            return ()
        return tuple(Function(RUSTLS[method], offset) for method, offsets in found.items() for offset in offsets)

    @staticmethod
    def _functions_of_go(read_at: ReadAt) -> tuple[tuple[Function, ...], str] | None:
        is_go = language_of_elf(read_at) == "go"
        if not is_go:
            layout = read_layout(read_at)
            if layout is None or layout.sections:
                return None
        # Without sections nothing else tells: a Go program is what has Go's table of functions.
        try:
            read, write = crypto_tls_calls(read_at)
        except GoUnseenError as error:
            return ((), error.reason) if is_go or error.reason != "go_layout" else None
        return (
            Function("on_go_read", read.entry),
            Function("on_go_write", write.entry),
            *(Function("on_go_read_return", offset) for offset in read.returns),
            *(Function("on_go_write_return", offset) for offset in write.returns),
        ), ""


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def _identity(fd: int | None) -> Identity | None:
    """Of an open file, which is closed."""
    if fd is None:
        return None
    try:
        return identity_of(fd)
    finally:
        os.close(fd)


def inner_function(read_at: ReadAt, plain: int, extended: int) -> int | None:
    """Where the function lies that both of two functions of x86-64 call, by their offsets; None when there is no need.

    The kernel steps over most first instructions with a single-step exception, which costs 1 µs, or 25 µs on a virtual
    machine whose hypervisor intercepts it. It emulates a push (since Linux 4.20). Where ``SSL_read`` does not begin
    with one, the function that OpenSSL 1.1.1 and 3 call from it and from ``SSL_read_ex`` (ssl_lib.c, ssl_read_internal)
    often does; it takes what ``SSL_read_ex`` takes. Nothing is taken for a function that is not called from both, does
    not lie where functions are aligned, or begins otherwise.
    """
    if read_at(18, 2) != _X86_64 or _begins_with_push(read_at(plain, 2)):
        return None
    shared = _callees(read_at, plain) & _callees(read_at, extended)
    inner = [one for one in shared if one % 16 == 0 and _begins_with_push(read_at(one, 2))]
    return inner[0] if len(inner) == 1 else None


def _begins_with_push(code: bytes) -> bool:
    """Of a 64-bit register (Intel 64 Architectures Software Developer's Manual, volume 2, PUSH)."""
    return len(code) == 2 and (0x50 <= code[0] <= 0x57 or (code[0] == 0x41 and 0x50 <= code[1] <= 0x57))


def _callees(read_at: ReadAt, function: int) -> set[int]:
    """What its first instructions may call: CALL rel32, wherever the byte stands."""
    code = read_at(function, _PROLOGUE_BYTES)
    found = set()
    for at in range(len(code) - 4):
        if code[at] == 0xE8:
            found.add(function + at + 5 + int.from_bytes(code[at + 1 : at + 5], "little", signed=True))
    return {one for one in found if one > 0}


def why_unseen(info: ProcessInfo) -> str:
    """Why nothing is seen of the TLS of a process in which no library was found: a metric label."""
    return {"java": "java", "go": "go", "rust": "rust"}.get(info.language, "no_symbols")
