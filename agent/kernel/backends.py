"""Which probes capture: the ways there are, cheapest first, and why some are out of the question on this kernel.

In: the setting ``kernel.backend`` and what the kernel says of itself. Out: the ways to try, in order. Only what can be
told without loading anything is decided here; a way that turns out to be refused is for the loader to give up.
"""

from __future__ import annotations

import gzip
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.errors import KernelUnsupportedError
from agent.kernel._libbpf import ffi, lib


class Way(msgspec.Struct, frozen=True):
    """``backend`` is its name in the configuration, ``hooks`` where its programs are attached.

    ``is_certain`` says that what the kernel lists can be attached: no other way is tried after it. ``attaches_once``
    says that programs that were taken away cannot come back.
    """

    backend: str
    hooks: str
    programs: tuple[str, ...]
    is_certain: bool = True
    attaches_once: bool = False


SYSCALLS = Way("syscalls", "system calls", ("on_sys_enter", "on_sys_exit"))
TRACEPOINTS = Way("sockets", "tracepoints", ("on_send", "on_sent", "on_received", "on_read", "on_switch"))
FUNCTIONS = Way(
    "sockets",
    "fentry",
    ("on_send_enter", "on_send_exit", "on_receive_exit", "on_splice_exit", "on_page_sent", "on_switch"),
    is_certain=False,
)
PROGRAMS = frozenset((*SYSCALLS.programs, *TRACEPOINTS.programs, *FUNCTIONS.programs))
"""All of them, of which one way's are loaded."""

SOCKET_TRACEPOINTS = (
    "tcp_sendmsg_locked",
    "sock_send_length",
    "sock_recv_length",
    "tcp_rcv_space_adjust",
    "sched_switch",
)
"""What ``TRACEPOINTS`` listens to; the youngest is tcp_sendmsg_locked (6.16, commit 0f08335ade71)."""

_TYPEDEF, _STRUCT, _FUNCTION = 8, 4, 12  # BTF_KIND_* of linux/btf.h

SOCKET_FUNCTIONS = ("tcp_sendmsg_locked", "tcp_recvmsg", "tcp_splice_read")
"""What ``FUNCTIONS`` is attached to, but for tcp_sendpage, which 6.5 removed (commit dc97391e6610)."""
_TRAMPOLINE = "bpf_tramp_image"
"""A kernel without it frees the way back of a thread that sleeps in a function whose probe is taken away (fixed in
5.12, commit e21aa341785c, and in stable kernels before)."""

_REATTACHES = "bpf_kfunc_desc"
"""Came with 5.13 (commit e6ac2450d6de), as did attaching a program to its function again (commit f3a95075549e)."""

_MODES = ("sys/kernel/debug/sched/preempt", "proc/1/root/sys/kernel/debug/sched/preempt")
_CONFIGURATIONS = ("proc/config.gz", "boot/config-{release}", "proc/1/root/boot/config-{release}")
_UNDISTURBED = ("none", "voluntary")


def ways(wanted: str) -> tuple[list[Way], list[str]]:
    """The ways to try for a ``kernel.backend``, best first, and why better ones than the first are not among them.

    "fentry" is for tests/vm alone, no setting: a kernel has hung with it (docs/adr/0017). Raises KernelUnsupportedError
    when "sockets" or that is asked for and there is none.
    """
    if wanted == SYSCALLS.backend:
        return [SYSCALLS], []
    missing = _first_missing((f"btf_trace_{name}", _TYPEDEF) for name in SOCKET_TRACEPOINTS)
    if missing < 0:
        return [TRACEPOINTS], []
    reasons = [f"this kernel has no tracepoint {SOCKET_TRACEPOINTS[missing]} (Linux 6.16)"]
    if wanted == "auto":
        return [SYSCALLS], reasons
    if wanted != FUNCTIONS.hooks:
        raise no_sockets(reasons)
    if reason := _against_functions():
        raise no_sockets([*reasons, reason])
    has_sendpage = _first_missing([("tcp_sendpage", _FUNCTION)]) < 0
    programs = tuple(name for name in FUNCTIONS.programs if name != "on_page_sent" or has_sendpage)
    attaches_once = _first_missing([(_REATTACHES, _STRUCT)]) >= 0
    return [msgspec.structs.replace(FUNCTIONS, programs=programs, attaches_once=attaches_once)], reasons


def no_sockets(reasons: Iterable[str]) -> KernelUnsupportedError:
    """The error for the setting that asks for what this kernel has not."""
    return KernelUnsupportedError(
        f"kernel.backend=sockets is not possible: {', and '.join(reasons)}: set kernel.backend to auto"
    )


def _against_functions() -> str:
    """Why the functions of TCP shall not be followed; "" when nothing is known to be against it."""
    needed = [*((name, _FUNCTION) for name in SOCKET_FUNCTIONS), (_TRAMPOLINE, _STRUCT)]
    missing = _first_missing(needed)
    if 0 <= missing < len(SOCKET_FUNCTIONS):
        return f"no function {SOCKET_FUNCTIONS[missing]}"
    if missing >= 0:
        return "its fexit is unsafe (Linux 5.12, or 5.10 of a later date)"
    mode = preemption(platform.version(), platform.release())
    return f"it is preemptible (preempt={mode}), which rules fentry out" if mode and mode not in _UNDISTURBED else ""


def preemption(build: str, release: str, root: Path = Path("/")) -> str:
    """Where the kernel takes the processor from threads that are in it: "none", "voluntary", "full", "lazy" or "rt"; ""
    when it cannot be told. ``build`` is the version of uname.

    Programs at fentry may be interrupted there as well, since 5.11 (commit 74d862b682f5), by another thread that runs
    the same program, which is then left out, or uses the same per-CPU space. At tracepoints they may not.
    """
    words = re.findall(r"PREEMPT\w*", build)
    if not words:
        return "none"
    if "PREEMPT_RT" in words:
        return "rt"
    if "PREEMPT_DYNAMIC" not in words:
        return "lazy" if "PREEMPT_LAZY" in words else "full"
    for name in _MODES:
        if found := re.search(r"\((\w+)\)", _text(root / name)):
            return found[1]
    asked = re.findall(r"(?:^|\s)preempt=(\w+)", _text(root / "proc/cmdline"))
    if asked:
        return asked[-1]
    for name in _CONFIGURATIONS:
        text = _text(root / name.format(release=release))
        for mode, option in (("none", "NONE"), ("voluntary", "VOLUNTARY"), ("lazy", "LAZY"), ("full", "")):
            if re.search(f"^CONFIG_PREEMPT{'_' * bool(option)}{option}=y$", text, re.MULTILINE):
                return mode
    return ""


def _text(path: Path) -> str:
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (OSError, EOFError, ValueError):
        return ""


def _first_missing(types: Iterable[tuple[str, int]]) -> int:
    """The index of the first of these types, by name and kind, that the kernel's BTF has not; -1 when it has all."""
    names, kinds = zip(*types, strict=True)
    texts = [ffi.new("char[]", name.encode()) for name in names]
    return lib.spanloom_missing_types(ffi.new("char *[]", texts), ffi.new("uint32_t[]", kinds), len(names))
