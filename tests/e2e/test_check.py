"""``spanloom check`` on this machine, for real: as root, with no capability, as nobody; nothing stays behind."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.kernel import _libbpf, check
from tests.e2e.harness import AS_NOBODY, NOBODY

ffi, lib = _libbpf.ffi, _libbpf.lib

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = (sys.executable, "-m", "agent", "check")
PR_CAPBSET_DROP = 24
BPF_PROG_GET_NEXT_ID, BPF_PROG_GET_FD_BY_ID, BPF_OBJ_GET_INFO_BY_FD = 11, 13, 15  # include/uapi/linux/bpf.h
NAME_OFFSET = 64  # of name in struct bpf_prog_info


def run_check(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*CHECK, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False, **options
    )


def drop_capabilities() -> None:
    """Leave uid 0 without a single capability after the next exec (capabilities(7): the bounding set limits root)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def bpf(command: int, *words: int) -> int:
    """The system call itself, with 32-bit attributes; a result, or -errno."""
    attributes = ffi.new("uint32_t[32]", words)
    result = lib.spanloom_bpf(command, attributes, 128)
    return attributes[1] if result == 0 and command == BPF_PROG_GET_NEXT_ID else result


def programs() -> dict[int, str]:
    """id -> name of all BPF programs of the machine."""
    names = {}
    current = 0
    for _ in range(100_000):
        current = bpf(BPF_PROG_GET_NEXT_ID, current)
        if current < 0:
            return names
        descriptor = bpf(BPF_PROG_GET_FD_BY_ID, current)
        if descriptor < 0:
            continue  # gone in the meantime
        information = ffi.new("char[256]")
        address = int(ffi.cast("uintptr_t", information))
        assert bpf(BPF_OBJ_GET_INFO_BY_FD, descriptor, 256, address & 0xFFFFFFFF, address >> 32) == 0
        os.close(descriptor)
        names[current] = ffi.string(information + NAME_OFFSET, 16).decode()
    raise AssertionError("the ids do not end")


def open_bpf_objects() -> list[str]:
    """The lines of /proc/self/fdinfo that name a program, map or link that this process holds."""
    lines = []
    for name in os.listdir("/proc/self/fdinfo"):
        try:
            text = Path(f"/proc/self/fdinfo/{name}").read_text()
        except FileNotFoundError:  # that of the listing itself
            continue
        lines += [line for line in text.splitlines() if line.startswith(("prog_id", "map_id", "link_id"))]
    return lines


@pytest.fixture(scope="module")
def document() -> dict:
    done = run_check("--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"]
    return found


def test_this_machine_can_be_traced(document):
    """Where the end-to-end tests run, everything that is required is there."""
    assert document["exit_code"] == 0, document["verdict"]
    states = {key: row["state"] for key, row in document["checks"].items() if row["need"] == "required"}
    assert set(states.values()) == {"yes"}, states


def test_the_rows_agree_with_the_machine(document):
    """What can be told in another way is told so: kernel, capabilities, mounts."""
    checks = document["checks"]
    assert document["kernel"] == os.uname().release
    effective = next(
        int(line.split()[1], 16) for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line
    )
    assert (checks["cap_sys_resource"]["state"] == "yes") == bool(effective >> 24 & 1)
    assert (checks["cap_sys_ptrace"]["state"] == "yes") == bool(effective >> 19 & 1)
    mounted = {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    assert (checks["cgroup"]["state"] == "yes") == ("cgroup2" in mounted)
    assert (checks["bpffs"]["state"] == "yes") == ("bpf" in mounted)
    if "tracefs" not in mounted and "debugfs" not in mounted:
        assert checks["tracefs"]["state"] == "no"
        assert checks["tracepoint"]["state"] == "no", "without tracefs nobody knows a tracepoint's number"


def test_the_row_of_the_socket_backend_agrees_with_what_is_chosen(document):
    """Where its tracepoints can be attached the loader takes it, and elsewhere it does not."""
    is_chosen = document["checks"]["capture"]["detail"].startswith("backend sockets by tracepoints;")
    assert (document["checks"]["socket_tracepoints"]["state"] == "yes") == is_chosen


@pytest.mark.parametrize(("capabilities", "state"), [("+dac_read_search", "yes"), ("-dac_override", "no")])
def test_the_environment_of_others_needs_a_capability(capabilities: str, state: str):
    """What the row of CAP_DAC_READ_SEARCH says is so: uid 0 and CAP_SYS_PTRACE alone cannot read it."""
    other = subprocess.Popen(["setpriv", "--reuid", str(NOBODY), "--clear-groups", "sleep", "60"])
    try:
        limited = ("setpriv", "--bounding-set", f"-all,+sys_ptrace,{capabilities}")
        deadline = time.monotonic() + 30
        while os.stat(f"/proc/{other.pid}").st_uid != NOBODY:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        read = subprocess.run((*limited, "cat", f"/proc/{other.pid}/environ"), capture_output=True, timeout=60)
        assert (read.returncode == 0) == (state == "yes"), read.stderr
    finally:
        other.kill()
        other.wait()
    done = subprocess.run((*limited, *CHECK, "--json"), cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["checks"]["cap_dac_read_search"]["state"] == state


def test_the_verifier_work_is_below_its_limit(document):
    """Every capture program loads with room to spare on kernels that follow paths less cleverly."""
    counts = {program["name"]: program["verified_instructions"] for program in document["programs"]}
    assert counts
    assert max(counts.values()) < 600_000  # of a million that the kernel allows


def test_the_table_says_the_same(document):
    """The table has a row per check with its state, and the same verdict."""
    done = run_check(env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == document["exit_code"]
    for row in document["checks"].values():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{row['title']}  "))
        assert f"  {row['state']} " in line
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "spanloom run: works here" in done.stdout


def test_nothing_stays_open_loaded_or_attached():
    """After the check this process holds no further descriptor, program, map or link."""
    check.report()  # lets the first use of modules and devices pass
    descriptors, objects = sorted(os.listdir("/proc/self/fd")), open_bpf_objects()
    assert check.report().exit_code == 0
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert open_bpf_objects() == objects


def test_the_kernel_forgets_the_probes():
    """No program of the check is left in the kernel, pinned or not; the kernel may take a moment to let them go."""
    before = set(programs())
    assert run_check("--json").returncode == 0
    deadline = time.monotonic() + 30
    left = {}
    while time.monotonic() < deadline:
        left = {
            number: name for number, name in programs().items() if name.startswith("check_") and number not in before
        }
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"still loaded: {left}")


def assert_refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["exit_code"] == 3
    for key in (
        "tp_btf",
        "map_iter",
        "socket_tracepoints",
        "fentry",
        "kprobe",
        "uprobe",
        "raw_tracepoint",
        "tracepoint",
        "sk_msg",
        "test_run",
    ):
        row = found["checks"][key]
        assert (row["state"], row["errno"]) == ("refused", "EPERM"), key
        assert "root" in row["remedy"], key
    assert found["checks"]["cap_bpf"]["state"] == "no"
    assert found["programs"] == []


def test_root_without_capabilities_is_refused():
    """A container's root without any capability gets rows, a remedy and the exit code of ``run``."""
    assert_refused(run_check("--json", preexec_fn=drop_capabilities))


def test_nobody_is_refused():
    """Another user gets the same."""
    command = (*AS_NOBODY, *CHECK, "--json")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert_refused(done)
    assert json.loads(done.stdout)["uid"] == NOBODY


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_run_and_check_end_alike(arguments):
    """``spanloom run`` without capabilities ends with the exit code that the check foretells."""
    foretold = run_check(*arguments, preexec_fn=drop_capabilities).returncode
    run = subprocess.run(
        (sys.executable, "-m", "agent", "run", "--set", "telemetry.listen=null"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=drop_capabilities,
    )
    assert run.returncode == foretold == 3
