"""Processes: names, resources, generations, bounds, languages, selection; on a made-up /proc and on the real one."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import ProcessSeen
from agent.process import (
    Placement,
    ProcessInfo,
    ProcessTable,
    Selector,
    language_of_elf,
    parse_resource_attributes,
    systemd_unit,
)
from tests.fuzz.fuzz_process import SEPARATOR
from tests.fuzz.fuzz_process import check as check_files

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
START_TICKS = 123_456
START_NS = START_TICKS * TICK_NS + 1234


def make_process(
    root: Path,
    pid: int = 42,
    *,
    exe: str = "/usr/sbin/nginx",
    environ: bytes = b"",
    cgroup: bytes = b"0::/user.slice/session-3.scope\n",
    cmdline: bytes = b"nginx: worker process\0",
    maps: bytes = b"",
    start_ticks: int = START_TICKS,
    comm: str = "nginx",
) -> Path:
    """A directory as the kernel shows it for a process; ``exe`` is a link that may lead nowhere."""
    directory = root / str(pid)
    directory.mkdir()
    (directory / "stat").write_text(f"{pid} ({comm}) S {' '.join(['0'] * 18)} {start_ticks} 0 0\n")
    (directory / "environ").write_bytes(environ)
    (directory / "cgroup").write_bytes(cgroup)
    (directory / "cmdline").write_bytes(cmdline)
    (directory / "maps").write_bytes(maps)
    (directory / "exe").symlink_to(exe)
    return directory


def make_table(root: Path, **options: object) -> ProcessTable:
    return ProcessTable(proc_root=root, host_name="node1", version="9.9", **options)


def seen(pid: int = 42, start_ns: int = START_NS, comm: str = "nginx", executable: str = "nginx") -> ProcessSeen:
    return ProcessSeen(pid, start_ns, 0, 1, comm, executable, b"")


def describe(root: Path, **process: object) -> ProcessInfo:
    make_process(root, **process)
    return make_table(root).lookup(42, START_NS)


def test_the_resource_of_a_plain_process_is_complete(tmp_path: Path) -> None:
    """Every attribute of SEMANTICS.md that a host has, in a stable order; no language without evidence."""
    make_process(tmp_path)
    info = make_table(tmp_path).observe(seen())
    assert info.alive_when_seen
    assert (info.key, info.executable_name, info.executable_path) == ((42, START_NS), "nginx", "/usr/sbin/nginx")
    assert info.resource == (
        ("service.name", "nginx"),
        ("service.instance.id", f"node1.42.{START_NS}"),
        ("host.name", "node1"),
        ("process.pid", 42),
        ("process.executable.name", "nginx"),
        ("telemetry.sdk.name", "spanloom"),
        ("telemetry.sdk.version", "9.9"),
    )


@pytest.mark.parametrize(
    ("environ", "cgroup", "expected"),
    [
        (b"OTEL_SERVICE_NAME=a\0OTEL_RESOURCE_ATTRIBUTES=service.name=b\0", b"0::/system.slice/c.service\n", "a"),
        (b"OTEL_SERVICE_NAME=\0OTEL_RESOURCE_ATTRIBUTES=service.name=b\0", b"0::/system.slice/c.service\n", "b"),
        (b"OTEL_SERVICE_NAME= \0OTEL_RESOURCE_ATTRIBUTES=service.name=\0", b"0::/system.slice/c.service\n", "c"),
        (b"XOTEL_SERVICE_NAME=a\0", b"0::/\n", "nginx"),
        (b"OTEL_SERVICE_NAME=first\0OTEL_SERVICE_NAME=second\0", b"", "first"),
        (b"OTEL_SERVICE_NAME=\xff\xe9\0", b"", "\ufffd\ufffd"),
        (b"OTEL_SERVICE_NAME=cut", b"", "nginx"),
        (b"OTEL_SERVICE_NAME\0OTEL_SERVICE_NAME=second\0", b"", "second"),
    ],
)
def test_the_first_service_name_that_exists_wins(tmp_path: Path, environ: bytes, cgroup: bytes, expected: str) -> None:
    """OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, systemd unit, executable; empty ones do not exist."""
    info = describe(tmp_path, environ=environ, cgroup=cgroup)
    assert info.service_name == expected
    assert dict(info.resource)["service.name"] == expected


def test_declared_attributes_join_the_resource(tmp_path: Path) -> None:
    """Percent-decoded; they win over configured ones, but cannot change what the agent knows for certain."""
    make_process(
        tmp_path,
        environ=b"OTEL_RESOURCE_ATTRIBUTES=service.namespace=shop,team=a%2Cb%20c,process.pid=1,"
        b"telemetry.sdk.name=fake,service.instance.id=mine\0",
    )
    table = make_table(tmp_path, extra_attributes=(("team", "ops"), ("deployment.environment.name", "test")))
    resource = dict(table.lookup(42, START_NS).resource)
    assert resource["service.namespace"] == "shop"
    assert resource["team"] == "a,b c"
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.instance.id"] == "mine"
    assert (resource["process.pid"], resource["telemetry.sdk.name"]) == (42, "spanloom")


def test_no_other_environment_variable_and_no_argument_is_shown(tmp_path: Path) -> None:
    """Secrets of the environment are nowhere, those of the command line neither in the resource nor in the repr."""
    info = describe(
        tmp_path, environ=b"API_KEY=hunter2\0OTEL_EXPORTER_OTLP_HEADERS=k=hunter2\0", cmdline=b"nginx\0--pw=hunter3\0"
    )
    assert info.command_line == ("nginx", "--pw=hunter3")
    assert "hunter" not in repr(info) + repr(info.resource)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", {}),
        ("a=1,b=2", {"a": "1", "b": "2"}),
        (" a = 1 , b=x=y,", {"a": "1", "b": "x=y"}),
        ("a%3Db=%E6%BC%A2", {"a=b": "漢"}),
        ("bad,=x,%ff=1,c=%ff,d=ok", {"d": "ok"}),
        ("a=1,a=2", {"a": "2"}),
        ("a=%zz", {"a": "%zz"}),
        ("k" * 256 + "=1,v=" + "x" * 2000, {"v": "x" * 1024}),
        ("bad," * 255 + "a=1,b=2", {"a": "1"}),
        ("a=1," * 256 + "a=2", {"a": "1"}),
    ],
)
def test_resource_attributes_are_parsed_pair_by_pair(value: str, expected: dict[str, str]) -> None:
    """A bad pair is left out and does not take the good ones with it."""
    assert parse_resource_attributes(value) == expected


@given(st.text())
def test_resource_attributes_never_raise_and_are_bounded(value: str) -> None:
    """Any text gives at most 64 pairs of valid UTF-8."""
    pairs = parse_resource_attributes((value + ",k=v") * 70)
    assert len(pairs) <= 64
    assert all((key + text).encode() for key, text in pairs.items())


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (b"0::/system.slice/nginx.service\n", "nginx"),
        (b"0::/system.slice/system-gunicorn.slice/gunicorn@shop.service\n", "gunicorn@shop"),
        (b"0::/system.slice/nginx.service (deleted)\n", "nginx"),
        (b"0::/system.slice/app.service/workers/w1\n", "app"),
        (b"12:pids:/other.service\n1:name=systemd:/system.slice/cron.service\n0::/wrong.service\n", "cron"),
        (b"5:cpu,cpuacct:/system.slice/a.service\n0::/system.slice/b.service\n", "b"),
        (b"3:memory:/system.slice/only-v1-memory.service\n", ""),
        (b"0::/user.slice/user-1000.slice/user@1000.service/app.slice/mine.service\n", "mine"),
        (b"0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-x-1.scope\n", ""),
        (b"0::/user.slice/user-1000.slice/user@1000.service/init.scope\n", ""),
        (b"0::/user.slice/user-1000.slice/session-2.scope\n", ""),
        (b"0::/init.scope\n", ""),
        (b"0::/\n", ""),
        (b"0::/system.slice/run-r0123456789abcdef0123456789abcdef.service\n", ""),
        (b"0::/system.slice/run-u12.service\n", ""),
        (b"0::/system.slice/docker-" + b"ab" * 32 + b".scope\n", ""),
        (b"0::/system.slice/containerd.service/kubepods-pod1.slice:cri:" + b"ab" * 32 + b"\n", ""),
        (b"0::/system.slice/k3s.service/kubepods/besteffort/pod1/x\n", ""),
        (b"", ""),
        (b"garbage\n::\n\xff:\xff:\xff\n", ""),
    ],
)
def test_the_systemd_unit_is_read_from_every_cgroup_layout(cgroup: bytes, unit: str) -> None:
    """v1, v2 and hybrid; only a unit that a person would call the service."""
    assert systemd_unit(cgroup) == unit


@given(st.binary(max_size=300))
def test_any_cgroup_text_is_safe(cgroup: bytes) -> None:
    """The path may contain anything but a newline."""
    assert not systemd_unit(b"0::/" + cgroup).endswith(".service")


def test_an_ended_process_is_known_by_the_kernels_word(tmp_path: Path) -> None:
    """Nothing in /proc: the executable that the kernel saw, its language by name, and no more."""
    table = make_table(tmp_path)
    info = table.observe(seen(comm="python3", executable="python3.11"))
    assert not info.alive_when_seen
    assert (info.service_name, info.executable_path, info.language) == ("python3.11", "", "python")
    assert table.vanished == 1


def test_an_unannounced_ended_process_is_an_unknown_service(tmp_path: Path) -> None:
    """The thread name is not the executable, so the name says that it is a guess; without it nothing is known."""
    table = make_table(tmp_path)
    assert table.lookup(1, 5, "curl").service_name == "unknown_service:curl"
    unknown = table.lookup(2, 5)
    assert unknown.service_name == "unknown_service"
    assert "process.executable.name" not in dict(unknown.resource)


@pytest.mark.parametrize(
    ("off_ns", "same"),
    [
        (0, True),
        (TICK_NS - 1, True),
        (-1, False),
        (TICK_NS, False),
        (3 * TICK_NS, False),
        (-2 * TICK_NS, False),
        (-START_TICKS * TICK_NS, False),
    ],
)
def test_a_reused_pid_never_inherits(tmp_path: Path, off_ns: int, same: bool) -> None:
    """The start time decides, as exactly as stat shows it: in whole clock ticks, cut."""
    make_process(tmp_path, environ=b"OTEL_SERVICE_NAME=current\0")
    info = make_table(tmp_path).observe(seen(start_ns=START_TICKS * TICK_NS + off_ns, executable="old"))
    assert info.alive_when_seen is same
    assert info.service_name == ("current" if same else "old")


def test_two_generations_of_one_pid_live_side_by_side(tmp_path: Path) -> None:
    """The key is pid and start time; each keeps its own name."""
    make_process(tmp_path, environ=b"OTEL_SERVICE_NAME=new\0")
    table = make_table(tmp_path)
    old = table.observe(seen(start_ns=77, executable="old"))
    new = table.observe(seen())
    assert (table.get(old.key), table.get(new.key)) == (old, new)
    assert (old.service_name, new.service_name) == ("old", "new")


def test_a_hostile_thread_name_cannot_shift_the_fields_of_stat(tmp_path: Path) -> None:
    """Field 2 may contain parentheses, spaces and digits."""
    make_process(tmp_path, comm="a) S 1 2 3 (b")
    assert make_table(tmp_path).lookup(42, START_NS).alive_when_seen


@pytest.mark.parametrize("stat", [b"", b"42 (x", b"42 (x) S 1 2", b"42 (x) S " + b"x " * 30])
def test_an_unreadable_start_time_counts_as_gone(tmp_path: Path, stat: bytes) -> None:
    """Without proof that it is the same process nothing of it is used."""
    (make_process(tmp_path, environ=b"OTEL_SERVICE_NAME=x\0") / "stat").write_bytes(stat)
    assert make_table(tmp_path).observe(seen()).service_name == "nginx"


@pytest.mark.parametrize("missing", ["environ", "cgroup", "cmdline", "maps", "exe"])
def test_each_file_may_be_unreadable(tmp_path: Path, missing: str) -> None:
    """ESRCH, EACCES and a vanished file all mean: go on with what is known."""
    directory = make_process(tmp_path, environ=b"OTEL_SERVICE_NAME=x\0")
    (directory / missing).unlink()
    info = make_table(tmp_path).observe(seen())
    assert info.alive_when_seen
    assert info.executable_name == "nginx"
    assert info.service_name == ("nginx" if missing == "environ" else "x")


def test_a_large_environment_is_read_up_to_its_bound(tmp_path: Path) -> None:
    """A variable within 256 KiB is found across chunk borders, one behind it is as if absent."""
    filler = b"".join(b"SERVICE_%05d=%s\0" % (i, b"x" * 80) for i in range(2000))
    near = make_process(tmp_path, 42, environ=filler + b"OTEL_SERVICE_NAME=near\0")
    assert 128 * 1024 < (near / "environ").stat().st_size < 256 * 1024
    make_process(tmp_path, 43, environ=filler * 2 + b"OTEL_SERVICE_NAME=far\0")
    table = make_table(tmp_path)
    assert table.lookup(42, START_NS).service_name == "near"
    assert table.lookup(43, START_NS).service_name == "nginx"


@pytest.mark.parametrize(
    ("exe", "name", "path"),
    [
        ("/opt/a b/server (deleted)", "server", "/opt/a b/server"),
        ("/memfd:runner (deleted)", "memfd:runner", "/memfd:runner"),
        ("/usr/bin/python3.11", "python3.11", "/usr/bin/python3.11"),
    ],
)
def test_the_executable_is_named_without_the_kernels_marks(tmp_path: Path, exe: str, name: str, path: str) -> None:
    """A replaced binary keeps its name; an interpreter's name is kept whole."""
    info = describe(tmp_path, exe=exe)
    assert (info.executable_name, info.executable_path) == (name, path)


def test_an_executable_name_that_is_not_utf8_becomes_exportable(tmp_path: Path) -> None:
    """OTLP strings are UTF-8."""
    directory = make_process(tmp_path)
    (directory / "exe").unlink()
    os.symlink(b"/bin/caf\xe9", bytes(directory / "exe"))
    assert make_table(tmp_path).lookup(42, START_NS).executable_name == "caf\ufffd"


def test_a_process_is_read_once(tmp_path: Path) -> None:
    """Later look-ups and repeated announcements give the same object, also after the process has ended."""
    directory = make_process(tmp_path)
    table = make_table(tmp_path)
    info = table.observe(seen())
    directory.rename(tmp_path / "gone")
    assert table.lookup(42, START_NS) is info
    assert table.get((42, START_NS)) is info
    assert table.observe(seen()) is info


def test_an_exec_is_noticed_when_it_is_announced(tmp_path: Path) -> None:
    """The pid and start time stay, the program changes."""
    directory = make_process(tmp_path, exe="/bin/sh")
    table = make_table(tmp_path)
    assert table.lookup(42, START_NS).service_name == "sh"
    (directory / "exe").unlink()
    (directory / "exe").symlink_to("/usr/sbin/nginx")
    assert table.observe(seen()).service_name == "nginx"


def test_a_long_executable_name_cut_by_the_kernel_is_no_exec(tmp_path: Path) -> None:
    """The kernel announces at most 63 bytes of it."""
    make_process(tmp_path, exe="/bin/" + "x" * 100)
    table = make_table(tmp_path)
    info = table.lookup(42, START_NS)
    assert table.observe(seen(executable="x" * 63)) is info


def test_the_table_is_bounded_and_gives_up_ended_processes_first(tmp_path: Path) -> None:
    """The oldest entry stays as long as its process runs and a younger ended one can go."""
    make_process(tmp_path, 42)
    table = make_table(tmp_path, max_processes=4)
    table.lookup(42, START_NS)
    for pid in range(100, 120):
        table.lookup(pid, 5, "short")
        assert len(table) <= 4
    assert table.get((42, START_NS)) is not None
    assert table.get((119, 5)) is not None
    assert table.evicted == 17


def test_the_table_is_bounded_when_all_processes_run(tmp_path: Path) -> None:
    """Then the oldest goes, and is read again when it is needed."""
    for pid in range(10, 40):
        make_process(tmp_path, pid)
    table = make_table(tmp_path, max_processes=20)
    for pid in range(10, 40):
        table.lookup(pid, START_NS)
    assert len(table) == 20
    assert table.lookup(10, START_NS).service_name == "nginx"
    assert len(table) == 20


def test_forget_drops_an_entry_and_ignores_an_unknown_one(tmp_path: Path) -> None:
    """For a process that the kernel says has ended."""
    table = make_table(tmp_path)
    key = table.lookup(1, 2, "x").key
    table.forget(key)
    table.forget(key)
    assert table.get(key) is None


@pytest.mark.parametrize(
    ("exe", "language"),
    [
        ("python3", "python"),
        ("python3.13t", "python"),
        ("pypy3.10", "python"),
        ("pythonic-server", ""),
        ("node", "nodejs"),
        ("nodejs20", "nodejs"),
        ("node_exporter", ""),
        ("java", "java"),
        ("ruby3.1", "ruby"),
        ("php-fpm8.2", "php"),
        ("php", "php"),
        ("dotnet", "dotnet"),
        ("beam.smp", "erlang"),
    ],
)
def test_runtimes_are_known_by_name(tmp_path: Path, exe: str, language: str) -> None:
    """The whole name has to match, so that node_exporter is not Node."""
    info = describe(tmp_path, exe="/nonexistent/" + exe)
    assert info.language == language
    assert dict(info.resource).get("telemetry.sdk.language", "") == language


@pytest.mark.parametrize(
    ("library", "language"),
    [
        ("/usr/lib/jvm/java-17/lib/server/libjvm.so", "java"),
        ("/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0", "python"),
        ("/usr/share/dotnet/shared/Microsoft.NETCore.App/8.0.1/libcoreclr.so", "dotnet"),
        ("/usr/lib/libruby-3.1.so.3.1.2 (deleted)", "ruby"),
        ("/usr/lib/apache2/modules/libphp8.2.so", "php"),
        ("/usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30", "cpp"),
        ("/usr/lib/libpythonish/readme", ""),
    ],
)
def test_embedded_runtimes_are_known_by_their_library(tmp_path: Path, library: str, language: str) -> None:
    """uwsgi, jsvc, mod_php and their like; a runtime's own C++ library does not make it C++."""
    maps = f"7f0-7f1 r-xp 00000000 08:01 77   /bin/x\n7f1-7f2 r-xp 00000000 08:01 78    {library}\n".encode()
    assert describe(tmp_path, maps=maps).language == language


def test_a_runtime_wins_over_the_cpp_library_that_it_uses(tmp_path: Path) -> None:
    """libjvm needs libstdc++."""
    maps = b"1-2 r-xp 0 08:01 7 /usr/lib/libstdc++.so.6\n2-3 r-xp 0 08:01 8 /usr/lib/jvm/lib/server/libjvm.so\n"
    assert describe(tmp_path, maps=maps).language == "java"


def test_hostile_mappings_take_no_longer_than_others(tmp_path: Path) -> None:
    """A process chooses the names: with a pattern that goes back for each of these it would take hours."""
    maps = b"1-2 r-xp 0 08:01 7 /libphp" + b".so" * 300_000 + b"/\n2-3 r-xp 0 08:01 8 /usr/lib/libruby.so\n"
    assert describe(tmp_path, maps=maps).language == "ruby"


def make_elf(sections: list[tuple[bytes, bytes]], *, wide: bool = True, order: str = "<") -> bytes:
    """An ELF file with just a header, a section header table and the sections."""
    names = b"\0" + b"".join(name + b"\0" for name, _ in sections) + b".shstrtab\0"
    sections = [(b"", b""), *sections, (b".shstrtab", names)]
    entry = struct.Struct(order + ("IIQQQQIIQQ" if wide else "10I"))
    header_bytes = 64 if wide else 52
    offset = header_bytes + entry.size * len(sections)
    table = body = b""
    for name, content in sections:
        name_offset = names.index(name + b"\0") if name else 0
        table += entry.pack(name_offset, 1, 0, 0, offset + len(body), len(content), 0, 0, 1, 0)
        body += content
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    word = "Q" if wide else "I"
    rest = struct.pack(
        f"{order}HHI3{word}I6H", 2, 62, 1, 0, 0, header_bytes, 0, header_bytes, 0, 0, entry.size, len(sections),
        len(sections) - 1,
    )  # fmt: skip
    return ident + rest + table + body


def of_bytes(data: bytes) -> str:
    return language_of_elf(lambda offset, count: data[offset : offset + count])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_go_and_rust_executables_say_so(wide: bool, order: str) -> None:
    """32 and 64 bits, both byte orders."""
    comment = b"GCC: (Debian) 12.2.0\0rustc version 1.75.0 (82e1608df)\0"
    assert of_bytes(make_elf([(b".text", b"x"), (b".go.buildinfo", b"y")], wide=wide, order=order)) == "go"
    assert of_bytes(make_elf([(b".text", b"x"), (b".comment", comment)], wide=wide, order=order)) == "rust"
    assert of_bytes(make_elf([(b".text", b"rustc "), (b".comment", b"GCC: 12")], wide=wide, order=order)) == ""


@given(st.data())
def test_any_damaged_elf_is_safe(data: st.DataObject) -> None:
    """Overwritten and cut headers, offsets beyond the file, absurd sizes: an answer, never an exception."""
    elf = bytearray(make_elf([(b".text", b"x"), (b".comment", b"rustc version 1")], wide=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(0, 6))):
        elf[data.draw(st.integers(4, len(elf) - 1))] = data.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]))
    assert of_bytes(bytes(elf[: data.draw(st.integers(0, len(elf)))])) in ("", "rust", "go")


def test_the_executable_of_a_process_is_looked_into(tmp_path: Path) -> None:
    """/proc/<pid>/exe leads to the file even when it was deleted or belongs to another mount namespace."""
    binary = tmp_path / "server"
    binary.write_bytes(make_elf([(b".go.buildinfo", b"x")]))
    assert describe(tmp_path, exe=str(binary)).language == "go"


def real_start_ns(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19]) * TICK_NS + TICK_NS // 2


def test_a_real_process_is_read_from_the_real_proc() -> None:
    """This interpreter's own child, with its environment; after its end the table still knows it."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"OTEL_SERVICE_NAME": "kid"},
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()  # in the middle of exec, /proc shows the new program but no environment yet
        path = os.readlink(f"/proc/{child.pid}/exe")
        start_ns = real_start_ns(child.pid)
        table = ProcessTable(host_name="h", version="0")
        info = table.lookup(child.pid, start_ns)
    finally:
        child.communicate(b"\n")
    assert info.alive_when_seen
    assert info.executable_path == path
    assert (info.service_name, info.language) == ("kid", "python")
    assert table.lookup(child.pid, start_ns) is info
    fresh = ProcessTable(host_name="h", version="0").lookup(child.pid, start_ns, "python3")
    assert (fresh.alive_when_seen, fresh.service_name) == (False, "unknown_service:python3")


def test_a_real_process_with_odd_names_is_read_from_the_real_proc(tmp_path: Path) -> None:
    """Its file is no UTF-8 and holds a parenthesis, digits and a line feed, its environment is large and full of %."""
    program = os.fsencode(tmp_path) + b"/a) S 1\n2 (\xe9.service"
    shutil.copy(shutil.which("cat") or "", program)
    environment = {f"SERVICE_{number}": "x" * 1000 for number in range(150)}
    environment["OTEL_RESOURCE_ATTRIBUTES"] = "bad=%ff,team=%E6%BC%A2%2C%0A," + "filler=%20," * 8000
    child = subprocess.Popen(
        [b"cat", b"-", b"\xff\n) ("], executable=program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"ready\n")
        child.stdin.flush()
        child.stdout.readline()
        info = ProcessTable(host_name="h", version="0").lookup(child.pid, real_start_ns(child.pid))
    finally:
        child.kill()
        child.communicate()
    assert info.alive_when_seen
    assert info.executable_name == "a) S 1\n2 (\ufffd.service"
    assert info.executable_path == f"{tmp_path}/{info.executable_name}"
    assert info.command_line == ("cat", "-", "\ufffd\n) (")
    assert dict(info.declared) == {"team": "漢,\n", "filler": " "}


NAME_BYTES = st.binary(max_size=20) | st.sampled_from(
    [b"a) S 1 2 (b", b"x (deleted)", b"\n", b"caf\xe9", b"python3", b".."]
)
SERVICE_NAMES = st.sampled_from([b"", b"=", b"=a", b"= \xff", b"S=b"]).map(lambda rest: b"OTEL_SERVICE_NAME" + rest)
PAIRS = st.sampled_from([b"a=b", b"%ff=1", b"k=%E6%BC%A2", b"=", b"service.name=", b"service.name=z", b""])
RESOURCES = st.lists(PAIRS).map(lambda pairs: b"OTEL_RESOURCE_ATTRIBUTES=" + b",".join(pairs))
ENVIRONMENTS = st.lists(SERVICE_NAMES | RESOURCES | st.binary(max_size=20), max_size=6).map(b"\0".join)
TICKS = st.integers(-(1 << 70), 1 << 70) | st.integers(START_TICKS - 2, START_TICKS + 2)
STATS = st.binary(max_size=40) | TICKS.map(lambda ticks: b"1 (x) S " + b"0 " * 18 + b"%d" % ticks)
NUMBERS = st.tuples(st.integers(0, 7), st.integers(0, 15), st.integers(0, 31), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(
    NUMBERS,
    st.tuples(
        NAME_BYTES,
        NAME_BYTES,
        ENVIRONMENTS,
        st.binary(max_size=60),
        st.binary(max_size=60) | st.binary(max_size=20).map(lambda name: b"0::/" + name + b".service\n"),
        st.binary(max_size=60) | st.binary(max_size=20).map(lambda name: b"/libjvm" + name + b".so\n"),
        st.just(make_elf([(b".go.buildinfo", b"x")])) | st.just(b""),
        STATS,
    ),
)
def test_any_files_of_a_process_are_read_within_the_bounds(numbers: tuple[int, ...], parts: tuple[bytes, ...]) -> None:
    """Whatever a process shows: described as its files say, or by the kernel's word; nothing raises or stays open."""
    check_files(bytes(numbers) + SEPARATOR.join(parts))


def test_no_descriptor_is_leaked(tmp_path: Path) -> None:
    """Neither on the good path nor where files are missing or the pid was reused."""
    make_process(tmp_path, environ=b"OTEL_SERVICE_NAME=a\0OTEL_RESOURCE_ATTRIBUTES=b=c\0" + b"x" * 40_000)
    table = make_table(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for start_ns in (START_NS, 1, 2):
        table.lookup(42, start_ns)
    table.lookup(43, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def program(name: str, path: str = "", tgid: int = 42) -> ProcessInfo:
    return ProcessInfo((tgid, 1), name, path, (), "", name, (), True)


@pytest.mark.parametrize(
    ("include", "exclude", "info", "selected"),
    [
        (["*"], [], program("nginx"), True),
        (["*"], [], program(""), True),
        ([], [], program("nginx"), False),
        (["python*", "node"], [], program("python3.11"), True),
        (["python*", "node"], [], program("node_exporter"), False),
        (["/opt/*/bin/app"], [], program("app", "/opt/x/bin/app"), True),
        (["/opt/*"], [], program("app", "/usr/bin/app"), False),
        (["*"], ["nginx"], program("nginx", "/usr/sbin/nginx"), False),
        (["nginx"], ["/usr/*"], program("nginx", "/usr/sbin/nginx"), False),
        (["*"], ["*local*"], program("app", "/usr/local/bin/app"), True),
        (["*"], ["*local*"], program("localdb", "/usr/bin/localdb"), False),
        (["*"], ["*/local/*"], program("app", "/usr/local/bin/app"), False),
        (["*bin*"], [], program("app", "/usr/bin/app"), False),
        (["*/bin/*"], [], program("app", "/usr/bin/app"), True),
        (["app"], [], program("other", "app"), False),
        (["*/app"], [], program("app"), False),
        (["*"], ["*/app"], program("app"), True),
        (["/opt/*", "nginx"], [], program("nginx", "/usr/sbin/nginx"), True),
        (["/opt/*", "nginx"], [], program("app", "/opt/app"), True),
        (["*"], ["/opt/*", "nginx"], program("nginx", "/usr/sbin/nginx"), False),
        (["/*"], [], program(""), False),
        (["NGINX"], [], program("nginx"), False),
        (["ng[ij]nx"], [], program("nginx"), True),
        (["*"], [], program("spanloom", tgid=1), False),
    ],
)
def test_selection(include: list[str], exclude: list[str], info: ProcessInfo, selected: bool) -> None:
    """Globs on the name, with a slash on the whole path, case-sensitive; exclude wins; never the agent itself."""
    assert Selector(include, exclude, own_tgid=1).selects(info) is selected


class FewPods:
    """Pods with one container each; counts what it was asked."""

    def __init__(self) -> None:
        self.known = False
        self.version = 1
        self.placed = 0

    def container_of(self, cgroup: bytes) -> object | None:
        found = re.search(rb"kubepods/(\w+)", cgroup)
        return found[1] if found else None

    def place(self, container: object, declared: object) -> Placement:
        self.placed += 1
        name = "cart" if self.known else "?"
        return Placement(container, self.known, True, (("k8s.pod.name", name),), (), self.version)

    def is_current(self, placement: Placement) -> bool:
        return placement.basis == self.version


def in_pod(number: int) -> bytes:
    return b"0::/kubepods/%d\n" % number


def ended(pid: int, cgroup: bytes = in_pod(7)) -> ProcessSeen:
    return ProcessSeen(pid, START_NS, 0, 1, "curl", "curl", cgroup)


def running(cgroup: bytes, executable: str = "nginx") -> ProcessSeen:
    return msgspec.structs.replace(seen(executable=executable), cgroup=cgroup)


def test_a_process_that_has_ended_is_placed_by_what_the_kernel_told(tmp_path: Path) -> None:
    """Its directory is gone, and so may be its cgroup; the kernel's word is not."""
    table = make_table(tmp_path, pods=FewPods())
    info = table.observe(ended(51))
    assert info.placement is not None
    assert not info.is_placed
    shared = b"0::/system.slice/containerd.service\n"
    assert table.observe(ended(52, shared + b"1:memory:/kubepods/7\n")).placement is not None
    assert table.observe(ended(53, b"0::/system.slice/cron.service\n")).placement is None
    assert table.observe(ended(54, shared + b"1:memory:/\n")).placement is None
    assert table.observe(ended(55, b"")).placement is None


def test_processes_of_one_container_share_what_its_pod_says(tmp_path: Path) -> None:
    """However many end one after the other; those that declare something else of themselves do not."""
    pods = FewPods()
    make_process(tmp_path, cgroup=in_pod(7), environ=b"OTEL_SERVICE_NAME=own\0")
    table = make_table(tmp_path, pods=pods)
    first, second = table.observe(ended(51)), table.observe(ended(52))
    assert first.placement is second.placement
    of_pod = [pair for pair in first.resource if pair[0] == "k8s.pod.name"]
    assert of_pod[0] is next(pair for pair in second.resource if pair[0] == "k8s.pod.name")
    table.observe(running(in_pod(7)))
    assert pods.placed == 2
    pods.version, pods.known = 2, True
    assert len(table.refresh()) == 3
    assert pods.placed == 4
    assert table.observe(ended(53)).placement is table.get((51, START_NS)).placement


def test_what_was_known_of_a_pod_stays_known(tmp_path: Path) -> None:
    """A pod that went is forgotten at last; its processes are none without a pod for that."""
    pods = FewPods()
    pods.known = True
    table = make_table(tmp_path, pods=pods)
    before = table.observe(ended(51))
    pods.version, pods.known = 2, False
    assert table.refresh() == []
    assert table.get(before.key).resource == before.resource
    assert pods.placed == 2
    assert table.refresh() == []
    assert pods.placed == 2, "what is current is not looked at again"


def test_who_is_in_another_container_is_another_process(tmp_path: Path) -> None:
    """Whoever has the pid within the same clock tick tells nothing of itself."""
    make_process(tmp_path, exe="/opt/other", cgroup=in_pod(9), environ=b"OTEL_SERVICE_NAME=other\0")
    table = make_table(tmp_path, pods=FewPods())
    info = table.observe(running(b"0::/system.slice/cron.service\n"))
    assert (info.placement, info.own_name, info.executable_path, info.declared) == (None, "nginx", "", ())
    own = table.observe(running(in_pod(9), "other"))
    assert (own.placement is not None, own.service_name) == (True, "other")


@pytest.mark.parametrize(
    ("cgroup", "told", "container"),
    [
        (b"0::/\n", b"0::/kubepods/7\n", b"7"),
        (b"0::/../9\n", b"0::/kubepods/9\n", b"9"),
        (b"0::/../../kubepods/9\n", b"0::/node.scope/kubepods/9\n", b"9"),
        (b"0::/kubepods/9 (deleted)\n", b"0::/kubepods/9\n", b"9"),
        (b"0::/kubepods/9\n", b"", b"9"),
        (b"12:cpu:/\n4:hugetlb,memory:/../9\n0::/\n", b"0::/\n1:memory:/kubepods/9\n", b"9"),
        (b"0::/session.scope\n", b"0::/system.slice\n", None),
    ],
)
def test_a_cgroup_namespace_hides_what_the_kernel_tells(
    tmp_path: Path, cgroup: bytes, told: bytes, container: bytes | None
) -> None:
    """A process is itself however its path is shown; what the root sees of it counts."""
    make_process(tmp_path, exe="/opt/app", cgroup=cgroup)
    info = make_table(tmp_path, pods=FewPods()).observe(running(told, "app"))
    assert info.alive_when_seen
    assert (info.placement.container if info.placement is not None else None) == container


def test_a_process_that_ends_while_it_is_read_keeps_its_pod(tmp_path: Path) -> None:
    """Its directory was opened and tells nothing any more; the kernel's word is as good as if it had ended before."""
    (make_process(tmp_path) / "cgroup").unlink()
    info = make_table(tmp_path, pods=FewPods()).observe(running(in_pod(7)))
    assert info.placement is not None


def test_processes_follow_what_becomes_known_of_their_pods(tmp_path: Path) -> None:
    """Only those of which something is different are told of."""
    pods = FewPods()
    make_process(tmp_path, cgroup=b"0::/kubepods/x\n")
    make_process(tmp_path, 43)
    table = make_table(tmp_path, pods=pods)
    table.lookup(42, START_NS)
    table.lookup(43, START_NS)
    assert table.refresh() == []
    assert pods.placed == 1, "what is current is not looked at again"
    pods.version = 2
    assert table.refresh() == [], "looked at, and nothing is different"
    assert table.refresh() == []
    assert pods.placed == 2
    pods.known = True
    pods.version = 3
    [info] = table.refresh()
    assert info.key == (42, START_NS)
    assert info.is_placed
    assert dict(info.resource)["k8s.pod.name"] == "cart"
    assert dict(info.resource)["process.executable.name"] == "nginx"
    assert table.get((42, START_NS)) == info
    assert table.refresh() == []
