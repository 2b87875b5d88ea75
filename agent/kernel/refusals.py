"""What a refusal of the kernel means: an error number and libbpf's log -> an error of ``agent.errors``.

In: the number, what was being done, the log, and what is known of the machine. Out: the error to raise; its class gives
the exit code, its text the remedy. ``explain`` and ``unmet`` look at nothing but their arguments; ``Machine.this()``
does the looking. Never: a guess by kernel version alone where the kernel itself said why.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import resource

import msgspec

from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError, TracingRefusedError

BTF_PATH = "/sys/kernel/btf/vmlinux"
_LOCKDOWN_PATH = "/sys/kernel/security/lockdown"

# include/uapi/linux/capability.h
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 1 << 21, 1 << 38, 1 << 39

LOAD = "load the probes"
"""The action that creates the maps and runs the verifier."""

ENOTSUPP = 524
"""The kernel's own, include/linux/errno.h: the C library has no name for it."""

_OLDEST = (5, 10)
_MEMORY_BY_CGROUP = (5, 11)
"""From here on maps are charged to the cgroup and not to RLIMIT_MEMLOCK (commit 97306be45fbe and its neighbours)."""

_LACKS = frozenset(
    (
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ESRCH,
        errno.ENOENT,
        errno.E2BIG,
        errno.ENOSPC,
        errno.ENOSYS,  # built without CONFIG_BPF_SYSCALL, or no Linux at all
        ENOTSUPP,
    )
)
_REFUSALS = frozenset((errno.EPERM, errno.EACCES))

# The verifier ends its log with this line, whatever it found (print_verification_stats in kernel/bpf/verifier.c); a
# refusal before it ran has none.
_VERIFIER_END = re.compile(r"processed \d+ insns")
_VERIFIER_BEGIN = "BEGIN PROG LOAD LOG"
# What libbpf says of every failure, after the line that tells one from another.
_SAID_ALWAYS = re.compile(r"libbpf: (failed to load object|prog '\w+': failed to load: )")
_DETAIL_CHARS = 200


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a refusal may depend on.

    ``lockdown`` is the word that securityfs has in brackets, "none" where there is none. ``lock_limit_bytes`` is the
    soft RLIMIT_MEMLOCK, None when it is unlimited.
    """

    release: str
    lockdown: str
    capabilities: int
    has_btf: bool
    lock_limit_bytes: int | None

    @classmethod
    def this(cls) -> Machine:
        """The machine and process this runs in."""
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return cls(
            release=platform.release(),
            lockdown=_lockdown(),
            capabilities=effective_capabilities(),
            has_btf=os.path.exists(BTF_PATH),
            lock_limit_bytes=None if limit == resource.RLIM_INFINITY else limit,
        )


def unmet(machine: Machine) -> SpanloomError | None:
    """What loading would fail on anyway, found before it is tried, with the remedy; None when nothing is known."""
    capabilities = machine.capabilities
    if not capabilities & _CAP_SYS_ADMIN and capabilities & (_CAP_PERFMON | _CAP_BPF) != _CAP_PERFMON | _CAP_BPF:
        return PrivilegeError(
            "tracing needs root, or CAP_BPF and CAP_PERFMON (and CAP_SYS_PTRACE to name processes): "
            "run it with sudo, or as a privileged container with hostPID"
        )
    if not machine.has_btf:
        return KernelUnsupportedError(
            f"this kernel offers no BTF ({BTF_PATH}): it needs CONFIG_DEBUG_INFO_BTF=y, "
            "which distribution kernels have from 5.8 on"
        )
    return None


def explain(code: int, action: str, log: str, machine: Machine) -> SpanloomError:
    """The error for a positive errno of ``action`` (LOAD, "attach the probe on_read"), with what libbpf said about it.

    EPERM and EACCES are policy, unless the verifier ran: EACCES of the verifier means that it could not prove a program
    safe, which is a matter of the kernel's age.
    """
    said = [line.strip() for line in log.splitlines() if line.strip()]
    reason = "not supported" if code == ENOTSUPP else os.strerror(code)
    verdict = _verdict(said)
    if machine.lockdown == "confidentiality" and ("bpf_probe_read" in verdict if verdict else code in _REFUSALS):
        # Programs may load as long as they do not call the helpers that read kernel memory, which the verifier does not
        # know then (bpf_base_func_proto in kernel/bpf/helpers.c).
        return TracingRefusedError(
            "the kernel is locked down (confidentiality), which forbids reading kernel memory from BPF: "
            "boot with lockdown=integrity or none"
        )
    if code == errno.ENOMEM or (code == errno.EPERM and action == LOAD and _is_lock_limited(machine)):
        return _memory_error(action, reason, machine)
    kernel = f"this kernel ({machine.release})"
    age = "is too old: Spanloom needs Linux 5.10 or later; " if _version(machine.release) < _OLDEST else ""
    if verdict:
        return KernelUnsupportedError(
            f"the verifier of {kernel} rejects the probes: {_cut(verdict)} ({reason}); "
            f"{age and 'the kernel ' + age}run `spanloom check`"
        )
    lines = [line for line in said if not _SAID_ALWAYS.match(line)]
    detail = f" ({_cut(lines[-1])})" if lines else ""
    if code in _REFUSALS:
        return TracingRefusedError(
            f"the kernel refuses to {action}: {reason}: a security module, a seccomp filter or a sandbox is "
            f"in the way; run `spanloom check` to see what is allowed{detail}"
        )
    if code in _LACKS:
        return KernelUnsupportedError(
            f"{kernel} cannot {action}: {reason}; {age and 'it ' + age}run `spanloom check`{detail}"
        )
    return SpanloomError(f"cannot {action}: {reason}; run `spanloom check`{detail}")


def unreadable(code: int, name: str, log: str) -> SpanloomError:
    """The error for an object file that cannot be opened: no matter of the kernel's."""
    said = log.strip().splitlines()
    reason = _cut(said[-1].strip()) if said else os.strerror(code)
    return SpanloomError(f"{name} cannot be read: {reason}; run `make build` (or reinstall the package)")


def effective_capabilities() -> int:
    """The effective capability set of this process as a bit mask (proc(5), CapEff)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def _verdict(said: list[str]) -> str:
    """The verifier's reason: the line before its statistics. Empty when it did not run, or had nothing to object to."""
    for index in range(len(said) - 1, 0, -1):
        if _VERIFIER_END.match(said[index]):
            return "" if _VERIFIER_BEGIN in said[index - 1] else said[index - 1]
    return ""


def _is_lock_limited(machine: Machine) -> bool:
    """Whether EPERM for a map means RLIMIT_MEMLOCK, which libbpf has tried to raise by then."""
    return _version(machine.release) < _MEMORY_BY_CGROUP and machine.lock_limit_bytes is not None


def _memory_error(action: str, reason: str, machine: Machine) -> SpanloomError:
    if _is_lock_limited(machine):
        return PrivilegeError(
            f"too little lockable memory (RLIMIT_MEMLOCK) to {action}: {reason}; add CAP_SYS_RESOURCE, or "
            "raise the limit (ulimit -l unlimited, systemd: LimitMEMLOCK=infinity)"
        )
    return SpanloomError(
        f"too little memory to {action}: {reason}; raise the memory limit of the agent's cgroup (systemd: "
        "MemoryMax=, Kubernetes: resources.limits.memory), or lower limits.connections and kernel.ring_buffer_bytes"
    )


def _version(release: str) -> tuple[int, int]:
    """The first two numbers of a release; one that begins otherwise counts as the newest."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (1 << 30, 0)


def _cut(text: str) -> str:
    return text[:_DETAIL_CHARS]


def _lockdown() -> str:
    try:
        with open(_LOCKDOWN_PATH, encoding="ascii") as state:
            return state.read().split("[", 1)[1].split("]", 1)[0]
    except (OSError, IndexError, UnicodeError):
        return "none"
