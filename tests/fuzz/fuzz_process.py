"""Fuzz target of what is read of a process: ``python tests/fuzz/fuzz_process.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is four bytes of numbers (choices, and how much of the environment, of the command line and of the
mappings comes before what the input says) and eight parts, separated by FF FE FF: the thread's name, the executable's
name, environ, cmdline, cgroup, maps, the executable's bytes, and a whole stat that is read instead of a right one when
a choice says so. Out: an exception, a broken bound, a descriptor left open, text that OTLP cannot carry, or an
environment that is read otherwise than getenv would is a finding. The files are real; the checks need no atheris.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent import process
    from agent.model import ProcessSeen
    from agent.otlp.encode import encode_resource
    from agent.process import ProcessInfo, ProcessTable, Selector, parse_resource_attributes, systemd_unit
    from agent.tls_libraries import _MAPPINGS, Libraries

SEPARATOR = b"\xff\xfe\xff"
PARTS = 8
NUMBERS = 4
PID = 42
START_TICKS = 123_456
START_NS = START_TICKS * process._TICK_NS
VARIABLE = b"SERVICE_PORT=80\0"
# How many of them: none mostly, or up to either side of the border of a chunk, and of the bound.
VARIABLES = (0,) * 12 + (1023, 1024, 16383, 16384)
MAPPING = b"1-2 r-xp 0 08:01 7 /usr/bin/true\n"
LANGUAGES = frozenset(("", "python", "nodejs", "java", "ruby", "php", "dotnet", "erlang", "go", "rust", "cpp"))
SELECTORS = (Selector(("a*", "/bin/*"), ("*b", "*[!-~]*"), 1), Selector(("*",), (), 1))

_DIRECTORY = tempfile.TemporaryDirectory(prefix="fuzz-process-")
ROOT = os.fsencode(_DIRECTORY.name)
PROCESS = b"%b/%d" % (ROOT, PID)
EXECUTABLES = ROOT + b"/bin"
os.mkdir(PROCESS)
os.mkdir(EXECUTABLES)


class Files:
    """One made-up process; a context in which its files are where the table looks for them."""

    def __init__(self, data: bytes) -> None:
        choices, variables, empty_arguments, mappings = data[:NUMBERS].ljust(NUMBERS, b"\0")
        parts = data[NUMBERS:].split(SEPARATOR, PARTS - 1)
        parts += [b""] * (PARTS - len(parts))
        comm, name, environ, cmdline, self.cgroup, maps, self.program, stat = parts
        # What the kernel grants: no NUL anywhere, 15 bytes for a thread's name and 255 for a file's.
        self.comm = comm.replace(b"\0", b"")[:15]
        self.name = name.replace(b"\0", b"").replace(b"/", b"")[:240]
        if self.name in (b"", b".", b".."):
            self.name += b"a"
        self.is_memfd = choices & 1 != 0
        self.is_deleted = choices & 2 != 0
        self.has_own_stat = choices & 4 != 0
        self.environ = VARIABLE * VARIABLES[variables % 16] + environ
        right_stat = b"%d (%b) S %b %d 0 0\n" % (PID, self.comm, b" ".join([b"0"] * 18), START_TICKS)
        self.contents = {
            b"stat": stat if self.has_own_stat else right_stat,
            b"environ": self.environ,
            b"cmdline": b"\0" * (empty_arguments % 32) + cmdline,
            b"cgroup": self.cgroup,
            b"maps": MAPPING * (mappings % 4 * 500) + maps,
        }

    def __enter__(self) -> Files:
        for file, content in self.contents.items():
            write(PROCESS + b"/" + file, content)
        self._executable = EXECUTABLES + b"/" + self.name
        write(self._executable, self.program)
        target = b"/memfd:" + self.name if self.is_memfd else self._executable
        os.symlink(target + b" (deleted)" * self.is_deleted, PROCESS + b"/exe")
        return self

    def __exit__(self, *_: object) -> None:
        os.unlink(self._executable)
        os.unlink(PROCESS + b"/exe")


def write(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def new_table() -> ProcessTable:
    return ProcessTable(proc_root=Path(os.fsdecode(ROOT)), host_name="h", version="1")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def getenv(environ: bytes, name: bytes) -> str:
    """The first of that name within the bound, as getenv(3) finds it; an entry without its final NUL was cut."""
    entries = environ[: process._ENVIRON_BYTES].split(b"\0")[:-1]
    return next((text(entry[len(name) + 1 :]) for entry in entries if entry.startswith(name + b"=")), "")


def check_info(info: ProcessInfo) -> None:
    """Assert what holds for every process, read or not."""
    assert info.key == (PID, START_NS)
    keys = [key for key, _ in info.resource]
    assert len(set(keys)) == len(keys), keys
    resource = dict(info.resource)
    assert resource["service.name"] == info.service_name != ""
    assert resource["process.pid"] == PID
    assert (resource["telemetry.sdk.name"], resource["telemetry.sdk.version"]) == ("spanloom", "1")
    assert resource.get("telemetry.sdk.language", "") == info.language in LANGUAGES
    for key, value in info.resource:
        f"{key}{value}".encode()  # no lone surrogates
    encode_resource(info.resource)
    assert len(info.command_line) <= process._COMMAND_LINE_ARGUMENTS
    assert sum(map(len, info.command_line)) <= process._COMMAND_LINE_BYTES
    assert len(info.declared) <= process._DECLARED_PAIRS + 1
    for key, value in info.declared:
        assert 0 < len(key) <= process._DECLARED_KEY_CHARS
        assert len(value) <= process._DECLARED_VALUE_CHARS
    for selector in SELECTORS:
        selector.selects(info)


def check_alive(info: ProcessInfo, files: Files) -> None:
    """Assert that the process is described as its files describe it."""
    expected = parse_resource_attributes(getenv(files.environ, b"OTEL_RESOURCE_ATTRIBUTES"))
    declared_name = getenv(files.environ, b"OTEL_SERVICE_NAME").strip()[: process._DECLARED_VALUE_CHARS]
    name = declared_name or expected.pop("service.name", "")
    declared = dict(info.declared)
    assert declared.pop("service.name", "") == name
    expected.pop("service.name", None)
    assert declared == expected
    if not files.name.endswith(b" (deleted)"):
        assert info.executable_name == "memfd:" * files.is_memfd + text(files.name)
    assert dict(info.resource)["process.executable.name"] == info.executable_name
    assert info.service_name == (name or systemd_unit(files.cgroup) or info.executable_name)


def check_libraries(files: Files) -> None:
    """Assert that mappings are read as they are told, and that nothing that is not there is opened."""
    libraries = Libraries(Path(os.fsdecode(ROOT)))
    mapped = libraries._mapped(PID)
    assert (mapped is None) == (not files.contents[b"maps"].splitlines())
    assert len(mapped or ()) <= _MAPPINGS
    for mapping in mapped or ():
        assert re.fullmatch(r"[0-9a-f]{1,16}-[0-9a-f]{1,16}", mapping.span)
        path = os.fsencode(mapping.path)
        assert path.startswith(b"/")
        assert b"%d" % mapping.inode in files.contents[b"maps"]
        assert path in files.contents[b"maps"]
    assert not libraries.shared(PID)
    assert len(libraries.files(PID)) <= 1  # the executable
    assert libraries.switches_stacks(PID) in (False, True)


def check(data: bytes) -> None:
    """The entry point for atheris."""
    with Files(data) as files:
        before = descriptors()
        table = new_table()
        announced, comm = text(files.name[:63]), text(files.comm)
        info = table.observe(ProcessSeen(PID, START_NS, 0, 1, comm, announced, files.cgroup))
        check_info(info)
        process._shows(files.cgroup, b"0::/a/b\n1:memory:/c\n")
        assert info.alive_when_seen or files.has_own_stat, "a thread's name shifted the fields of stat"
        assert table.vanished == (not info.alive_when_seen)
        if info.alive_when_seen:
            check_alive(info, files)
        else:
            assert (info.executable_path, info.command_line, info.declared) == ("", (), ())
            assert info.executable_name == announced
        assert table.lookup(PID, START_NS) is info
        check_info(new_table().lookup(PID, START_NS, comm))
        check_libraries(files)
        assert descriptors() == before


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
