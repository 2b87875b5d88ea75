"""agent.kernel.check: findings -> rows, remedies, verdict, table and JSON. The real probes run in tests/e2e."""

from __future__ import annotations

import errno
import json
import re

import pytest

from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError, TracingRefusedError
from agent.kernel import check, check_probes
from agent.kernel.capture import ProgramStatistics
from agent.kernel.check_probes import LATER, NICER, NO, PROBES, REFUSED, REQUIRED, UNUSED, YES, Finding

ROOT = (1 << 41) - 1
KEYS = [probe.key for probe in PROBES] + ["capture"]
ANSI = re.compile(r"\x1b\[\d+m")


class FakeCapture:
    """Loads, or raises ``error``."""

    error: Exception | None = None

    def __init__(self, settings: object) -> None:
        if self.error is not None:
            raise self.error

    backend = "syscalls"
    hooks = "system calls"
    reasons = ("there is no tracepoint",)

    def __enter__(self) -> FakeCapture:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def statistics(self) -> list[ProgramStatistics]:
        return [ProgramStatistics("enter", 0, 0, 0, 1000), ProgramStatistics("exit", 0, 0, 0, 234)]


@pytest.fixture
def machine(monkeypatch):
    """A machine that answers as told: ``machine(tp_btf=Finding(...), capture=error, capabilities=mask)``."""

    def setup(capture: Exception | None = None, capabilities: int = ROOT, **findings: Finding) -> check.Report:
        assert findings.keys() <= set(KEYS)
        probes = tuple(
            check_probes.Probe(
                probe.key,
                probe.title,
                probe.need,
                probe.purpose,
                probe.remedy,
                lambda key=probe.key: findings.get(key, Finding(YES)),
            )
            for probe in PROBES
        )
        monkeypatch.setattr(check, "PROBES", probes)
        monkeypatch.setattr(check, "Capture", FakeCapture)
        monkeypatch.setattr(FakeCapture, "error", capture)
        monkeypatch.setattr(check_probes, "effective_capabilities", lambda: capabilities)
        return check.report()

    return setup


def test_everything_allowed_is_exit_code_zero_without_a_remedy(machine):
    """Where all is allowed there is nothing to do, and the capture's row tells what the verifier followed."""
    found = machine()
    assert found.exit_code == 0
    assert [result.remedy for result in found.checks.values()] == [""] * len(KEYS)
    assert "1234 instructions" in found.checks["capture"].detail
    assert "1000 of them in enter" in found.checks["capture"].detail


def test_the_row_of_the_capture_says_what_was_chosen_and_why(machine):
    """Which backend, by what, and what stands against a cheaper one."""
    detail = machine().checks["capture"].detail
    assert detail.startswith("backend syscalls by system calls, because there is no tracepoint; 2 programs")


@pytest.mark.parametrize(
    ("error", "exit_code", "state"),
    [
        (PrivilegeError("not root"), 3, REFUSED),
        (KernelUnsupportedError("too old"), 4, NO),
        (TracingRefusedError("locked"), 5, REFUSED),
        (SpanloomError("object missing"), 1, NO),
        (PermissionError(errno.EACCES, "Permission denied"), 1, NO),
    ],
)
def test_the_exit_code_is_that_of_run(machine, error, exit_code, state):
    """What stops the loader of ``run`` gives the exit code and the words of the verdict."""
    found = machine(capture=error)
    assert found.exit_code == exit_code
    assert found.checks["capture"].state == state
    assert f"exit code {exit_code}" in found.verdict
    assert found.programs == []


@pytest.mark.parametrize("key", ["tp_btf", "map_iter"])
@pytest.mark.parametrize(("state", "exit_code"), [(NO, 4), (REFUSED, 5)])
def test_what_loads_but_cannot_be_attached_is_no_success(machine, key, state, exit_code):
    """Loading alone does not trace: both ways of attaching that ``run`` uses must work."""
    assert machine(**{key: Finding(state)}).exit_code == exit_code


@pytest.mark.parametrize("key", [probe.key for probe in PROBES if probe.need != REQUIRED])
def test_what_is_not_required_does_not_change_the_exit_code(machine, key):
    """A later or nicer feature that is refused leaves exit code 0."""
    assert machine(**{key: Finding(REFUSED, "", "EPERM")}).exit_code == 0


def test_a_refusal_is_a_matter_of_rights_first_and_of_policy_then(machine):
    """Without capabilities the remedy is to become root; with them that would be wrong advice."""
    refused = Finding(REFUSED, "load: Operation not permitted", "EPERM")
    assert "root" in machine(fentry=refused, capabilities=0).checks["fentry"].remedy
    assert "root is not enough" in machine(fentry=refused).checks["fentry"].remedy


def test_every_row_that_matters_has_a_remedy_when_it_is_missing(machine):
    """No row leaves its reader without a next step, unless Spanloom does not use the feature."""
    found = machine(**{key: Finding(NO) for key in KEYS[:-1]})
    without = {key for key, result in found.checks.items() if not result.remedy and result.need != UNUSED}
    assert without <= {"capture", "lockdown", "proc"}, "these three say it in their finding, or have nothing to say"


def test_rows_do_not_promise_what_another_backend_does(machine):
    """A lack of fentry or kprobes changes nothing: only the row of the socket backend names system calls as what is
    used instead.
    """
    found = machine(**{key: Finding(NO) for key in KEYS[:-1]})
    assert {key for key, row in found.checks.items() if "system calls" in row.remedy} == {"socket_tracepoints"}
    assert "6.16" in found.checks["socket_tracepoints"].remedy
    assert found.checks["socket_tracepoints"].need == NICER


def test_a_socket_tracepoint_that_is_missing_is_named(monkeypatch):
    """All are tried until one is missing; the row says which, and why."""
    tried = []

    def attaches(name: str):
        tried.append(name)
        absent = name == "check_socket_sock_recv_length"
        return lambda: Finding(NO, "load: No such process", "ESRCH") if absent else Finding(YES)

    monkeypatch.setattr(check_probes, "_attaches", attaches)
    found = check_probes._find_socket_tracepoints()
    assert (found.state, found.errno) == (NO, "ESRCH")
    assert found.detail == "sock_recv_length: load: No such process"
    assert tried == [f"check_socket_{name}" for name in check_probes.SOCKET_TRACEPOINTS[:3]]


def test_the_environment_of_others_is_needed_now():
    """CAP_DAC_READ_SEARCH names services today; it is not for a later feature."""
    (row,) = (probe for probe in PROBES if probe.key == "cap_dac_read_search")
    assert row.need == NICER
    assert "environment" in row.purpose


@pytest.mark.parametrize("key", ["fentry", "kprobe"])
def test_what_captures_nothing_yet_is_for_later(machine, key):
    """No setting leads to these hooks (docs/adr/0017): whoever lacks them loses nothing, and is told so."""
    row = machine(**{key: Finding(NO)}).checks[key]
    assert row.need == LATER
    assert "nothing is captured through it yet" in row.remedy


def test_rows_are_named_once_and_say_what_for():
    """Keys are unique, and each row has a need of the known kinds and a purpose."""
    assert len(set(KEYS)) == len(KEYS)
    for probe in PROBES:
        assert probe.need in (REQUIRED, NICER, LATER, UNUSED)
        assert probe.purpose
        assert probe.title


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 200])
def test_the_table_fits_the_terminal_and_is_aligned(machine, columns):
    """No line is wider than the terminal (60 at least); the columns begin at the same place in every row."""
    found = machine(
        capture=TracingRefusedError("x" * 200),
        proc=Finding(REFUSED, "read /proc/1/environ and /proc/1/exe: Permission denied", "EACCES"),
    )
    lines = check.render(found, columns, colour=False).splitlines()
    assert max(map(len, lines)) <= max(columns, 60)
    rows = [line for line in lines[2:] if line and line[0] != " "][: len(KEYS)]
    needs = [row.index(f" {result.need} ") for row, result in zip(rows, found.checks.values(), strict=True)]
    assert len(set(needs)) == 1


def test_colour_changes_nothing_but_colour(machine):
    """The coloured table without its escape sequences is the plain one; red is kept for what is required."""
    found = machine(tp_btf=Finding(NO), fentry=Finding(REFUSED))
    coloured = check.render(found, 100, colour=True)
    assert ANSI.sub("", coloured) == check.render(found, 100, colour=False)
    assert coloured.count("\x1b[31m") == 1


def test_json_has_stable_keys(machine, capsys, monkeypatch):
    """The document's keys are these, and the exit code stands in it."""
    found = machine(capture=PrivilegeError("not root"))
    monkeypatch.setattr(check, "report", lambda: found)
    assert check.main(json=True) == 3
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["version", "kernel", "machine", "uid", "exit_code", "verdict", "checks", "programs"]
    assert list(document["checks"]) == KEYS
    for row in document["checks"].values():
        assert list(row) == ["title", "state", "errno", "need", "purpose", "detail", "remedy"]
    assert document["exit_code"] == 3


def test_output_that_is_no_terminal_has_no_escape_sequences(machine, capsys, monkeypatch):
    """A pipe gets plain text."""
    found = machine(tp_btf=Finding(NO))
    monkeypatch.setattr(check, "report", lambda: found)
    assert check.main(json=False) == 4
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "state", "name"),
    [
        (errno.EPERM, REFUSED, "EPERM"),
        (-errno.EACCES, REFUSED, "EACCES"),
        (-errno.ENOENT, NO, "ENOENT"),
        (524, NO, "ENOTSUPP"),
        (4000, NO, "4000"),
    ],
)
def test_errors_become_states_with_names(code, state, name):
    """EPERM and EACCES are refusals, everything else a lack; libbpf's sign does not matter, nor an unknown number."""
    found = check_probes._failed(code, "attach")
    assert (found.state, found.errno) == (state, name)
    assert found.detail.startswith("attach: ")


MOUNTS = {
    "v1": "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n",
    "v2": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
    "hybrid": "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
    "none": "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n",
}


@pytest.mark.parametrize(
    ("kind", "state", "detail"),
    [
        ("v1", NO, "v1 only"),
        ("v2", YES, "v2, cgroup2 at /sys/fs/cgroup"),
        ("hybrid", YES, "hybrid, cgroup2 at /sys/fs/cgroup/unified"),
        ("none", NO, "no cgroup file system is mounted"),
    ],
)
def test_cgroup_versions_are_told_apart(monkeypatch, kind, state, detail):
    """The mounts say which versions there are and where the second one is."""
    monkeypatch.setattr(check_probes, "_read_text", lambda path: MOUNTS[kind].strip())
    assert check_probes._find_cgroup() == Finding(state, detail)


def test_a_mount_point_with_spaces_is_decoded(monkeypatch):
    """proc(5) writes a space as ``\\040``."""
    monkeypatch.setattr(check_probes, "_read_text", lambda path: "bpf /my\\040fs bpf rw 0 0")
    assert check_probes._find_bpffs() == Finding(YES, "/my fs")


@pytest.mark.parametrize(
    ("text", "state"),
    [("none [integrity] confidentiality", YES), ("none integrity [confidentiality]", REFUSED), ("[none] a b", YES)],
)
def test_only_confidentiality_forbids_reading_the_kernel(monkeypatch, text, state):
    """Lockdown's integrity mode leaves tracing alone (kernel_lockdown(7))."""
    monkeypatch.setattr(check_probes, "_read_text", lambda path: text)
    found = check_probes._find_lockdown()
    assert found.state == state
    assert bool(found.remedy) == (state == REFUSED)


def test_tracefs_that_is_only_not_mounted_is_told_from_one_that_does_not_exist(monkeypatch):
    """The remedy is a mount in the one case and another kernel in the other."""
    files = {"/proc/self/mounts": "proc /proc proc rw 0 0", "/proc/filesystems": "nodev\ttracefs"}
    monkeypatch.setattr(check_probes, "_read_text", files.__getitem__)
    assert check_probes._find_tracefs() == Finding(NO, "not mounted", "ENOENT")
    files["/proc/filesystems"] = "nodev\tproc"
    assert "CONFIG_FTRACE" in check_probes._find_tracefs().remedy


def test_a_file_that_cannot_be_read_is_a_finding(monkeypatch):
    """A surrounding that cannot be looked at is refused with the error's name, never a traceback."""

    def refuse(path: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(check_probes, "_read_text", refuse)
    rows = {probe.key: probe.find for probe in PROBES}
    for key in ("lockdown", "tracefs", "bpffs", "cgroup", "unprivileged_bpf", "proc"):
        assert rows[key]().state == REFUSED, key


@pytest.mark.parametrize(
    ("capabilities", "bpf", "admin"),
    [(0, NO, NO), (1 << 39, YES, NO), (1 << 21, YES, YES), (1 << 38, NO, NO)],
)
def test_sys_admin_includes_bpf(monkeypatch, capabilities, bpf, admin):
    """CAP_SYS_ADMIN stands in for CAP_BPF, and not the other way round (capabilities(7))."""
    monkeypatch.setattr(check_probes, "effective_capabilities", lambda: capabilities)
    rows = {probe.key: probe.find for probe in PROBES}
    assert (rows["cap_bpf"]().state, rows["cap_sys_admin"]().state) == (bpf, admin)


def test_a_missing_object_says_how_to_make_it(monkeypatch, tmp_path):
    """Without the compiled probes each row says so."""
    monkeypatch.setattr(check_probes, "object_path", lambda: tmp_path / "check.bpf.o")
    found = check_probes._find_program("check_fentry", lambda program, loaded: Finding(YES))
    assert found.state == NO
    assert "make build" in found.remedy


def test_the_lock_limit_is_as_it_was():
    """Trying whether maps need lockable memory leaves the limit as it was."""
    before = check_probes.resource.getrlimit(check_probes.resource.RLIMIT_MEMLOCK)
    assert check_probes._find_memory_accounting().state in (YES, NO, REFUSED)
    assert check_probes.resource.getrlimit(check_probes.resource.RLIMIT_MEMLOCK) == before
