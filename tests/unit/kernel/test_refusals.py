"""agent.kernel.refusals: errno, libbpf's words and the machine -> error, exit code, remedy. For real: tests/e2e."""

from __future__ import annotations

import errno
import os

import pytest

from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError, TracingRefusedError
from agent.kernel.refusals import ENOTSUPP, LOAD, Machine, effective_capabilities, explain, unmet, unreadable

ROOT = (1 << 41) - 1
BPF, PERFMON, SYS_ADMIN = 1 << 39, 1 << 38, 1 << 21


def machine(
    release: str = "6.1.0-18-amd64",
    lockdown: str = "none",
    capabilities: int = ROOT,
    has_btf: bool = True,
    lock_limit_bytes: int | None = None,
) -> Machine:
    return Machine(
        release=release,
        lockdown=lockdown,
        capabilities=capabilities,
        has_btf=has_btf,
        lock_limit_bytes=lock_limit_bytes,
    )


def rejected(*lines: str, program: str = "on_read", code: int = 13) -> str:
    """libbpf's words about a program that the verifier looked at, as libbpf 1.1 writes them."""
    return (
        f"libbpf: prog '{program}': BPF program load failed: {os.strerror(code)}\n"
        f"libbpf: prog '{program}': -- BEGIN PROG LOAD LOG --\n"
        + "".join(f"{line}\n" for line in lines)
        + "processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0\n"
        "-- END PROG LOAD LOG --\n"
        f"libbpf: prog '{program}': failed to load: -{code}\n"
        "libbpf: failed to load object 'capture.bpf.o'\n"
    )


UNSAFE = rejected(
    "0: R1=ctx() R10=fp0", "2: (61) r0 = *(u32 *)(r1 +0)", "access beyond struct task_struct at off 268435456 size 4"
)
TOO_LARGE = rejected("8: (05) goto pc-7", "BPF program is too large. Processed 1000001 insn", code=7)
NO_HELPER = rejected("9: (85) call unknown#113", "unknown func bpf_probe_read_kernel#113", code=22)
NO_HELPER_LATER = rejected("program of this type cannot use helper bpf_probe_read_kernel#113", code=22)
NO_TASK_REGISTERS = rejected("unknown func bpf_task_pt_regs#175", code=22)
ACCEPTED = rejected(code=13)  # SELinux looks at a program when the verifier has accepted it
NO_MAP = (
    "libbpf: Error in bpf_object__probe_loading():Operation not permitted(1). Couldn't load trivial BPF program. Make "
    "sure your kernel supports BPF (CONFIG_BPF_SYSCALL=y) and/or that RLIMIT_MEMLOCK is set to big enough value.\n"
    "libbpf: failed to load object 'capture.bpf.o'\n"
)
NO_MEMORY = (
    "libbpf: map 'connections': failed to create: Cannot allocate memory(-12)\n"
    "libbpf: failed to load object 'capture.bpf.o'\n"
)
NO_TRACEPOINT = "libbpf: prog 'on_send': failed to find kernel BTF type ID of 'tcp_sendmsg_locked': -3\n"

OLD, LAST_LOCKED, FIRST_BY_CGROUP, NEW = "4.18.0-553.el8.x86_64", "5.10.0-28-amd64", "5.11.0", "6.18.44"
LIMIT = 64 << 10

UNSUPPORTED, REFUSED, PRIVILEGE, OTHER = KernelUnsupportedError, TracingRefusedError, PrivilegeError, SpanloomError


@pytest.mark.parametrize(
    ("code", "action", "log", "on", "kind", "exit_code", "words"),
    [
        # The verifier ran: the kernel is at fault, whatever the number.
        (errno.EACCES, LOAD, UNSAFE, machine(), UNSUPPORTED, 4, ("verifier", "6.1.0", "access beyond", "check")),
        (errno.EPERM, LOAD, UNSAFE, machine(), UNSUPPORTED, 4, ("verifier", "spanloom check")),
        (errno.EINVAL, LOAD, NO_TASK_REGISTERS, machine(), UNSUPPORTED, 4, ("bpf_task_pt_regs", "spanloom check")),
        (errno.E2BIG, LOAD, TOO_LARGE, machine(), UNSUPPORTED, 4, ("too large", "spanloom check")),
        (errno.ENOSPC, LOAD, UNSAFE, machine(), UNSUPPORTED, 4, ("verifier", "spanloom check")),
        (errno.EACCES, LOAD, UNSAFE, machine(OLD), UNSUPPORTED, 4, ("4.18.0", "too old", "5.10")),
        # It did not run, or had nothing to object to: policy.
        (errno.EPERM, LOAD, NO_MAP, machine(), REFUSED, 5, ("refuses to load", "seccomp", "spanloom check")),
        (errno.EACCES, LOAD, ACCEPTED, machine(), REFUSED, 5, ("refuses to load", "security module")),
        (errno.EACCES, LOAD, "", machine(), REFUSED, 5, ("Permission denied", "spanloom check")),
        (
            errno.EPERM,
            "attach the probe on_read",
            "",
            machine(),
            REFUSED,
            5,
            ("refuses to attach the probe on_read", "spanloom check"),
        ),
        (errno.EPERM, "map the ring buffer", "", machine(), REFUSED, 5, ("map the ring buffer",)),
        # Lockdown: by number, or by the helpers that are gone.
        (errno.EPERM, LOAD, NO_MAP, machine(lockdown="confidentiality"), REFUSED, 5, ("lockdown=integrity",)),
        (
            errno.EACCES,
            "attach the probe x",
            "",
            machine(lockdown="confidentiality"),
            REFUSED,
            5,
            ("lockdown=integrity",),
        ),
        (errno.EINVAL, LOAD, NO_HELPER, machine(lockdown="confidentiality"), REFUSED, 5, ("lockdown=integrity",)),
        (errno.EINVAL, LOAD, NO_HELPER_LATER, machine(lockdown="confidentiality"), REFUSED, 5, ("integrity",)),
        (errno.EINVAL, LOAD, NO_HELPER, machine(lockdown="integrity"), UNSUPPORTED, 4, ("bpf_probe_read_kernel",)),
        (errno.EPERM, LOAD, NO_MAP, machine(lockdown="integrity"), REFUSED, 5, ("seccomp", "spanloom check")),
        (errno.E2BIG, LOAD, TOO_LARGE, machine(lockdown="confidentiality"), UNSUPPORTED, 4, ("too large",)),
        (errno.EACCES, LOAD, UNSAFE, machine(lockdown="confidentiality"), UNSUPPORTED, 4, ("access beyond",)),
        # Memory: of the cgroup, or RLIMIT_MEMLOCK before 5.11, where the kernel says EPERM.
        (errno.ENOMEM, LOAD, NO_MEMORY, machine(), OTHER, 1, ("cgroup", "limits.connections", "Kubernetes")),
        (errno.ENOMEM, LOAD, UNSAFE, machine(), OTHER, 1, ("cgroup",)),
        (errno.ENOMEM, LOAD, NO_MEMORY, machine(FIRST_BY_CGROUP, lock_limit_bytes=LIMIT), OTHER, 1, ("cgroup",)),
        (
            errno.ENOMEM,
            LOAD,
            NO_MEMORY,
            machine(LAST_LOCKED, lock_limit_bytes=LIMIT),
            PRIVILEGE,
            3,
            ("RLIMIT_MEMLOCK", "CAP_SYS_RESOURCE", "LimitMEMLOCK"),
        ),
        (errno.EPERM, LOAD, NO_MAP, machine(LAST_LOCKED, lock_limit_bytes=LIMIT), PRIVILEGE, 3, ("ulimit -l",)),
        (errno.ENOMEM, LOAD, NO_MEMORY, machine(LAST_LOCKED), OTHER, 1, ("cgroup",)),
        (errno.EPERM, LOAD, NO_MAP, machine(LAST_LOCKED), REFUSED, 5, ("seccomp",)),
        (errno.EPERM, LOAD, NO_MAP, machine(NEW, lock_limit_bytes=LIMIT), REFUSED, 5, ("seccomp",)),
        (errno.EPERM, "attach the probe x", "", machine(LAST_LOCKED, lock_limit_bytes=LIMIT), REFUSED, 5, ("seccomp",)),
        # What the kernel has not.
        (errno.ENOSYS, LOAD, "", machine(), UNSUPPORTED, 4, ("not implemented", "spanloom check")),
        (errno.EINVAL, LOAD, "", machine(OLD), UNSUPPORTED, 4, ("4.18.0", "too old", "Linux 5.10", "check")),
        (errno.EINVAL, LOAD, "", machine(NEW), UNSUPPORTED, 4, ("6.18.44", "spanloom check")),
        (errno.ESRCH, LOAD, NO_TRACEPOINT, machine(), UNSUPPORTED, 4, ("tcp_sendmsg_locked", "spanloom check")),
        (errno.ENOENT, "attach the probe x", "", machine(), UNSUPPORTED, 4, ("spanloom check",)),
        (errno.EOPNOTSUPP, "attach the probe sweep", "", machine(), UNSUPPORTED, 4, ("attach the probe sweep",)),
        (errno.ENOSPC, LOAD, "", machine(), UNSUPPORTED, 4, ("spanloom check",)),
        (ENOTSUPP, "attach the probe on_read", "", machine(), UNSUPPORTED, 4, ("not supported", "spanloom check")),
        # Anything else: what it is, and where to look.
        (errno.EMFILE, LOAD, "", machine(), OTHER, 1, ("Too many open files", "spanloom check")),
        (4000, LOAD, "", machine(), OTHER, 1, ("cannot load", "spanloom check")),
        (errno.EINVAL, LOAD, "", machine("mainline"), UNSUPPORTED, 4, ("mainline", "spanloom check")),
    ],
)
def test_refusals_say_what_to_do(code, action, log, on, kind, exit_code, words):
    """Each gives the error of its kind, its exit code, one line, and the words that say what to do."""
    error = explain(code, action, log, on)
    assert type(error) is kind, error
    assert error.exit_code == exit_code
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error), str(error)


@pytest.mark.parametrize("release", [LAST_LOCKED, NEW])
def test_a_kernel_that_is_new_enough_is_not_called_old(release):
    """ "Too old" is said of kernels before 5.10 only."""
    assert "too old" not in str(explain(errno.EINVAL, LOAD, "", machine(release)))
    assert "too old" not in str(explain(errno.EACCES, LOAD, UNSAFE, machine(release)))


def test_the_detail_is_what_differs_and_has_a_bound():
    """libbpf's last words are the same for every failure: the line before them is shown, cut at 200 characters."""
    error = str(explain(errno.EINVAL, LOAD, "libbpf: map 'x': " + "y" * 999 + "\n" + NO_MEMORY[-46:], machine()))
    assert "(libbpf: map 'x': yyy" in error
    assert "failed to load object" not in error
    assert len(error) < 400
    assert len(str(explain(errno.EACCES, LOAD, rejected("z" * 999), machine()))) < 400


def test_a_log_whose_beginning_is_lost_still_has_its_verdict():
    """The log keeps its end only: the verifier's reason is there."""
    assert "access beyond" in str(explain(errno.EACCES, LOAD, UNSAFE[-330:], machine()))


@pytest.mark.parametrize(
    ("on", "kind", "words"),
    [
        (machine(), None, ()),
        (machine(capabilities=SYS_ADMIN), None, ()),
        (machine(capabilities=BPF | PERFMON), None, ()),
        (machine(capabilities=0), PRIVILEGE, ("root", "CAP_BPF", "CAP_PERFMON", "sudo")),
        (machine(capabilities=BPF), PRIVILEGE, ("CAP_PERFMON",)),
        (machine(capabilities=PERFMON), PRIVILEGE, ("CAP_BPF",)),
        (machine(capabilities=ROOT & ~SYS_ADMIN & ~BPF), PRIVILEGE, ("CAP_BPF",)),
        (machine(has_btf=False), UNSUPPORTED, ("/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y")),
        (machine(capabilities=0, has_btf=False), PRIVILEGE, ("root",)),
    ],
)
def test_what_is_known_before_loading(on, kind, words):
    """Missing capabilities come first, which the user can do something about; then BTF."""
    error = unmet(on)
    assert (type(error) if error is not None else None) is kind
    for word in words:
        assert word in str(error)


def test_an_object_that_cannot_be_opened_is_no_fault_of_the_kernel():
    """A damaged or closed file: exit code 1 and how to make it anew."""
    said = "libbpf: elf: failed to get section names strings from capture.bpf.o: invalid `Elf' handle\n"
    for error in (unreadable(4001, "capture.bpf.o", said), unreadable(errno.EACCES, "capture.bpf.o", "")):
        assert type(error) is SpanloomError
        assert "make build" in str(error)
    assert "invalid `Elf'" in str(unreadable(4001, "capture.bpf.o", said))
    assert "Permission denied" in str(unreadable(errno.EACCES, "capture.bpf.o", ""))


def test_this_machine_is_looked_at():
    """The facts are those of the running kernel and process."""
    found = Machine.this()
    assert found.release == os.uname().release
    assert found.has_btf == os.path.exists("/sys/kernel/btf/vmlinux")
    assert found.capabilities == effective_capabilities()
    assert found.lockdown in ("none", "integrity", "confidentiality")
