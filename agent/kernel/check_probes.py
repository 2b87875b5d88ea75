"""The probes of ``spanloom check``: each tries one thing for real and says what came of it.

In: nothing but the machine. Out: a ``Finding`` per probe; ``PROBES`` is the order of the table. The programs are those
of bpf/check.bpf.c, loaded one at a time and released at once. Never raises because something is missing or refused.

The module is longer than most: the table at its end says in one place what is tried, why, and what to do about it.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from agent.elf import function_offsets
from agent.kernel import _libbpf, uprobes
from agent.kernel._libbpf import ffi, lib
from agent.kernel.backends import SOCKET_TRACEPOINTS
from agent.kernel.refusals import ENOTSUPP, effective_capabilities

YES, NO, REFUSED = "yes", "no", "refused"
REQUIRED, NICER, LATER, UNUSED = "required", "nicer", "later", "unused"

_REFUSALS = frozenset((errno.EPERM, errno.EACCES))

# include/uapi/linux/bpf.h
_BPF_MAP_CREATE = 0
_MAP_TYPE_ARRAY, _MAP_TYPE_RINGBUF = 2, 27

_PROCESSES_TRIED = 512
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_RUN_RESULT = 42  # RUN_RESULT in bpf/check.bpf.c
_TRACING_KERNEL = "a kernel of 5.10 or later with CONFIG_BPF_SYSCALL=y and CONFIG_BPF_EVENTS=y"
_CAP_SYS_ADMIN = 21
_IN_SYS_ADMIN = (38, 39)


class Finding(msgspec.Struct, frozen=True):
    """What one probe found. ``errno`` is the name of the error, or empty; ``detail`` says more, or is empty.

    ``remedy`` is given where it depends on what was found; the probe's own holds otherwise.
    """

    state: str
    detail: str = ""
    errno: str = ""
    remedy: str = ""


class Probe(msgspec.Struct, frozen=True):
    """One row. ``purpose`` is what Spanloom uses it for; ``remedy`` is what to do about the state ``no``."""

    key: str
    title: str
    need: str
    purpose: str
    remedy: str
    find: Callable[[], Finding]


def may_trace() -> bool:
    """Whether the capabilities that loading and attaching need are there."""
    effective = effective_capabilities()
    return bool(effective >> _CAP_SYS_ADMIN & 1) or all(effective >> bit & 1 for bit in _IN_SYS_ADMIN)


def _failed(code: int, action: str, remedy: str = "") -> Finding:
    code = abs(code)
    name = "ENOTSUPP" if code == ENOTSUPP else errno.errorcode.get(code, str(code))
    reason = "not supported" if code == ENOTSUPP else os.strerror(code)
    return Finding(REFUSED if code in _REFUSALS else NO, f"{action}: {reason}", name, remedy)


def _create_map(kind: int, key_bytes: int, value_bytes: int, entries: int) -> int:
    """A map's descriptor, or -errno. Not through libbpf, which would raise RLIMIT_MEMLOCK by itself."""
    attributes = ffi.new("char[]", struct.pack("<5I", kind, key_bytes, value_bytes, entries, 0).ljust(72, b"\0"))
    return lib.spanloom_bpf(_BPF_MAP_CREATE, attributes, 72)


def _find_bpf() -> Finding:
    descriptor = _create_map(_MAP_TYPE_ARRAY, 4, 8, 1)
    if descriptor < 0:
        return _failed(descriptor, "create a map")
    os.close(descriptor)
    return Finding(YES)


def _find_ring_buffer() -> Finding:
    descriptor = _create_map(_MAP_TYPE_RINGBUF, 0, 0, resource.getpagesize())
    if descriptor < 0:
        return _failed(descriptor, "create it")
    try:
        drain = lib.spanloom_drain_new(descriptor)
        if drain == ffi.NULL:
            return _failed(ffi.errno, "map it into memory")
        lib.spanloom_drain_free(drain)
    finally:
        os.close(descriptor)
    return Finding(YES)


def _find_btf() -> Finding:
    count = lib.spanloom_btf_types(b"/sys/kernel/btf/vmlinux")
    return Finding(YES, f"{count} types") if count > 0 else _failed(count or errno.EINVAL, "parse it")


def object_path() -> Path:
    """Where the build puts the probes' BPF object for this machine's architecture."""
    return Path(__file__).with_name(f"check.{platform.machine()}.bpf.o")


def _find_program(name: str, use: Callable, prepare: Callable[[object], None] = lambda program: None) -> Finding:
    """Load one program of the object and no other, and hand it and the object to ``use``; before, to ``prepare``."""
    path = object_path()
    if not path.exists():
        return Finding(NO, f"{path.name} is missing", "ENOENT", "run `make build`, or reinstall the package")
    lib.spanloom_log_reset()
    loaded = lib.bpf_object__open_file(str(path).encode(), ffi.NULL)
    if loaded == ffi.NULL:
        return _failed(ffi.errno, "open the probe")
    try:
        wanted = lib.bpf_object__find_program_by_name(loaded, name.encode())
        program = lib.bpf_object__next_program(loaded, ffi.NULL)
        while program != ffi.NULL:
            lib.bpf_program__set_autoload(program, program == wanted)
            program = lib.bpf_object__next_program(loaded, program)
        prepare(wanted)
        error = lib.bpf_object__load(loaded)
        return _failed(error, "load") if error else use(wanted, loaded)
    finally:
        lib.bpf_object__close(loaded)


def _detached(link: object) -> Finding:
    if link == ffi.NULL:
        return _failed(ffi.errno, "attach")
    lib.bpf_link__destroy(link)
    return Finding(YES)


def _loads(name: str) -> Callable[[], Finding]:
    return lambda: _find_program(name, lambda program, loaded: Finding(YES))


def _attaches(name: str) -> Callable[[], Finding]:
    return lambda: _find_program(name, lambda program, loaded: _detached(lib.bpf_program__attach(program)))


def _find_socket_tracepoints() -> Finding:
    """Whether the socket backend has all its tracepoints: the first that cannot be attached is the answer."""
    for name in SOCKET_TRACEPOINTS:
        found = _attaches(f"check_socket_{name}")()
        if found.state != YES:
            return msgspec.structs.replace(found, detail=f"{name}: {found.detail}")
    return Finding(YES, f"{len(SOCKET_TRACEPOINTS)} of {len(SOCKET_TRACEPOINTS)}")


def _find_map_iter() -> Finding:
    def use(program: object, loaded: object) -> Finding:
        link = lib.spanloom_attach_map_iter(program, lib.bpf_object__find_map_by_name(loaded, b"check_map"))
        if link == ffi.NULL:
            return _failed(ffi.errno, "attach")
        try:
            descriptor = lib.bpf_iter_create(lib.bpf_link__fd(link))
            if descriptor < 0:
                return _failed(descriptor, "start it")
            try:
                os.read(descriptor, 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            return _failed(error.errno, "run it")
        finally:
            lib.bpf_link__destroy(link)
        return Finding(YES)

    return _find_program("check_map_iter", use)


def _find_uprobe() -> Finding:
    return _probed(is_return=False, use=lambda: None)


def _find_uretprobe() -> Finding:
    def use() -> Finding | None:
        died_of = lib.spanloom_canary_under_filter()
        return Finding(NO, f"a process under a seccomp filter died of signal {died_of}") if died_of > 0 else None

    return _probed(is_return=True, use=use)


def _probed(*, is_return: bool, use: Callable[[], Finding | None]) -> Finding:
    """Attach a probe to a function that only this process has, the way that TLS is probed, and call ``use`` meanwhile.

    A function of a shared library would be changed in all processes that have it.
    """
    path, symbol = _libbpf.__file__, "spanloom_canary"
    with open(path, "rb", buffering=0) as file:
        offsets = function_offsets(lambda at, count: os.pread(file.fileno(), count, at), [symbol])
    if not offsets:
        return Finding(NO, "the binding to libbpf has no symbols", "ENOENT")

    def attached(program: object, loaded: object) -> Finding:
        try:
            link = uprobes.attach(program, path, offsets[symbol], is_return=is_return)
        except OSError as error:
            return _failed(-error.errno, "attach")
        try:
            return use() or Finding(YES)
        finally:
            uprobes.detach([link])

    return _find_program("check_uprobe", attached, uprobes.prepare)


def _find_test_run() -> Finding:
    def use(program: object, loaded: object) -> Finding:
        duration, result = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        error = lib.spanloom_test_run(lib.bpf_program__fd(program), 0, duration, ffi.NULL, 0, result)
        if error:
            return _failed(error, "run")
        return Finding(YES) if result[0] == _RUN_RESULT else Finding(NO, f"it returned {result[0]}")

    return _find_program("check_run", use)


def _find_jit() -> Finding:
    def use(program: object, loaded: object) -> Finding:
        count = lib.spanloom_jited_bytes(lib.bpf_program__fd(program))
        if count < 0:
            return _failed(count, "ask for a program's machine code")
        return Finding(YES) if count else Finding(NO, "programs are interpreted")

    return _find_program("check_run", use)


def _find_memory_accounting() -> Finding:
    """Whether a map can be made without any lockable memory: then its memory is charged to the cgroup."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    free = _find_bpf()
    if free.state != YES:
        return free
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        bound = _find_bpf()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    return Finding(YES) if bound.state == YES else Finding(NO, f"RLIMIT_MEMLOCK counts, which is {limit} here")


# -- probes of the surroundings


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _guarded(find: Callable[[], Finding], action: str) -> Callable[[], Finding]:
    def guarded() -> Finding:
        try:
            return find()
        except OSError as error:
            return _failed(error.errno or errno.EIO, action)

    return guarded


def _mounts(kinds: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(file system, mount point, options) of the mounts of some kinds, in this process's view (proc(5))."""
    for line in _read_text("/proc/self/mounts").splitlines():
        fields = line.split(" ")
        if fields[2] in kinds:
            yield fields[2], fields[1].encode().decode("unicode_escape"), fields[3]


def _find_tracefs() -> Finding:
    points = [point for _, point, _ in _mounts(("tracefs",))]
    points += [f"{point}/tracing" for _, point, _ in _mounts(("debugfs",))]
    if not points:
        is_built_in = "tracefs" in _read_text("/proc/filesystems")
        return Finding(
            NO,
            "not mounted" if is_built_in else "the kernel was built without it",
            "ENOENT",
            "" if is_built_in else "a kernel with CONFIG_FTRACE=y",
        )
    count = len(os.listdir(f"{points[0]}/events"))
    return Finding(YES, f"{points[0]}, {count} groups of events")


def _find_bpffs() -> Finding:
    points = [point for _, point, _ in _mounts(("bpf",))]
    return Finding(YES, points[0]) if points else Finding(NO, "not mounted", "ENOENT")


def _find_cgroup() -> Finding:
    mounts = list(_mounts(("cgroup", "cgroup2")))
    unified = [point for kind, point, _ in mounts if kind == "cgroup2"]
    has_v1 = any(kind == "cgroup" for kind, _, _ in mounts)
    if unified:
        return Finding(YES, f"{'hybrid' if has_v1 else 'v2'}, cgroup2 at {unified[0]}")
    return Finding(NO, "v1 only" if has_v1 else "no cgroup file system is mounted")


def _find_proc() -> Finding:
    options = next((options for _, point, options in _mounts(("proc",)) if point == "/proc"), "")
    details = [option for option in options.split(",") if option.startswith("hidepid=")]
    pids = [name for name in os.listdir("/proc") if name.isdecimal()][:_PROCESSES_TRIED]
    refused = sum(1 for pid in pids if isinstance(_read_process(pid), PermissionError))
    if refused:
        details.append(f"{refused} of {len(pids)} processes are closed")
    error = _read_process("1")
    if error is None:
        return Finding(YES, ", ".join(details))
    found = _failed(error.errno or errno.EIO, "read /proc/1/environ and /proc/1/exe")
    remedy = "" if not may_trace() else "CAP_SYS_PTRACE, and no hidepid on /proc; what is closed even then has no name"
    return msgspec.structs.replace(found, detail=", ".join((found.detail, *details)), remedy=remedy)


def _read_process(pid: str) -> OSError | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            environ.read(1)
        os.readlink(f"/proc/{pid}/exe")
    except OSError as error:
        return error
    return None


def _find_pid_namespace() -> Finding:
    is_initial = os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE
    return Finding(YES) if is_initial else Finding(NO, "this process is in a pid namespace of its own")


def _find_lockdown() -> Finding:
    """Yes when lockdown, if there is any, leaves the reading of kernel memory allowed (kernel_lockdown(7))."""
    try:
        state = _read_text("/sys/kernel/security/lockdown").partition("[")[2].partition("]")[0]
    except FileNotFoundError:
        return Finding(YES, "the kernel has no lockdown, or securityfs is not mounted")
    if state == "confidentiality":
        return Finding(REFUSED, f"lockdown is {state}", "EPERM", "boot with lockdown=integrity or none")
    return Finding(YES, f"lockdown is {state}")


def _find_unprivileged() -> Finding:
    value = _read_text("/proc/sys/kernel/unprivileged_bpf_disabled")
    return Finding(YES if value == "0" else NO, f"kernel.unprivileged_bpf_disabled is {value}")


def _capability(bit: int) -> Callable[[], Finding]:
    def find() -> Finding:
        effective = effective_capabilities()
        if effective >> bit & 1:
            return Finding(YES)
        if bit in _IN_SYS_ADMIN and effective >> _CAP_SYS_ADMIN & 1:
            return Finding(YES, "included in CAP_SYS_ADMIN")
        return Finding(NO)

    return find


_CAPABILITIES = (  # include/uapi/linux/capability.h
    ("CAP_BPF", 39, REQUIRED, "loads the programs"),
    ("CAP_PERFMON", 38, REQUIRED, "lets them read the kernel, and attaches them"),
    ("CAP_SYS_ADMIN", _CAP_SYS_ADMIN, NICER, "stands in for the two above; before Linux 6.6 HTTPS needs it"),
    ("CAP_SYS_PTRACE", 19, NICER, "names the programs of other users"),
    ("CAP_SYS_RESOURCE", 24, NICER, "raises RLIMIT_MEMLOCK where maps count against it"),
    ("CAP_DAC_READ_SEARCH", 2, NICER, "reads the environment of other users' programs, which names their service"),
    ("CAP_NET_ADMIN", 12, LATER, "header injection loads socket programs"),
)

PROBES: tuple[Probe, ...] = (
    Probe(
        "btf",
        "BTF",
        REQUIRED,
        "where the kernel keeps its fields",
        "a kernel with CONFIG_DEBUG_INFO_BTF=y, which distribution kernels have from 5.8 on",
        _find_btf,
    ),
    Probe("bpf", "BPF system call", REQUIRED, "everything begins with it", _TRACING_KERNEL, _find_bpf),
    Probe(
        "ring_buffer", "ring buffer", REQUIRED, "brings the records to the agent", _TRACING_KERNEL, _find_ring_buffer
    ),
    Probe(
        "tp_btf",
        "BTF tracepoints",
        REQUIRED,
        "the capture of system calls or sockets",
        _TRACING_KERNEL,
        _attaches("check_tp_btf"),
    ),
    Probe(
        "map_iter", "map iterators", REQUIRED, "reports connections that went quiet", _TRACING_KERNEL, _find_map_iter
    ),
    Probe(
        "lockdown",
        "kernel memory",
        REQUIRED,
        "reading it from BPF, which lockdown may forbid",
        "",
        _guarded(_find_lockdown, "read the state of lockdown"),
    ),
    Probe(
        "socket_tracepoints",
        "socket tracepoints",
        NICER,
        "the capture in the socket layer, which costs traced programs less",
        "a kernel of 6.16 or later; until then system calls are captured instead",
        _find_socket_tracepoints,
    ),
    Probe(
        "jit",
        "BPF compiler",
        NICER,
        "probes cost several times as much without it",
        "sysctl net.core.bpf_jit_enable=1",
        _find_jit,
    ),
    Probe(
        "memory_accounting",
        "memory by cgroup",
        NICER,
        "maps need no lockable memory",
        "CAP_SYS_RESOURCE, or ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)",
        _find_memory_accounting,
    ),
    Probe(
        "proc", "/proc of others", NICER, "names services, finds their language", "", _guarded(_find_proc, "read /proc")
    ),
    Probe(
        "pid_namespace",
        "pids of the host",
        NICER,
        "the kernel's pids are the agent's: without that no process has its name",
        "docker run --pid=host; in Kubernetes hostPID: true",
        _guarded(_find_pid_namespace, "read /proc/self/ns/pid"),
    ),
    Probe(
        "test_run",
        "BPF test run",
        NICER,
        "make bench fills the ring buffer with it",
        "a kernel of 5.10 or later",
        _find_test_run,
    ),
    *(
        Probe(
            name.lower(),
            name,
            need,
            purpose,
            "run as root, or add the capability (systemd: AmbientCapabilities; containers: privileged)",
            _guarded(_capability(bit), "read /proc/self/status"),
        )
        for name, bit, need, purpose in _CAPABILITIES
    ),
    Probe(
        "fentry",
        "fentry",
        LATER,
        "the capture in the socket layer on kernels without its tracepoints",
        "a kernel with CONFIG_FUNCTION_TRACER=y, on arm64 6.4 or later; nothing is captured through it yet",
        _attaches("check_fentry"),
    ),
    Probe(
        "kprobe",
        "kprobes",
        LATER,
        "the same where fentry is missing",
        "a kernel with CONFIG_KPROBES=y; nothing is captured through it yet",
        _attaches("check_kprobe"),
    ),
    Probe(
        "uprobe",
        "uprobes",
        NICER,
        "HTTPS is traced",
        "a kernel with CONFIG_UPROBES=y; before Linux 6.6, CAP_SYS_ADMIN among the capabilities",
        _find_uprobe,
    ),
    Probe(
        "uretprobe",
        "return probes",
        NICER,
        "HTTPS is traced, and programs under seccomp filters live through it",
        "a kernel without the defect of Linux 6.11 to 6.13 on x86-64 (fixed in 6.14, commit cf6cb56ef244)",
        _find_uretprobe,
    ),
    Probe("sk_msg", "sk_msg", LATER, "header injection", "a kernel with CONFIG_NET_SOCK_MSG=y", _loads("check_sk_msg")),
    Probe(
        "sockops", "sockops", LATER, "header injection", "a kernel with CONFIG_CGROUP_BPF=y", _loads("check_sockops")
    ),
    Probe(
        "cgroup",
        "cgroup v2",
        LATER,
        "header injection is attached to it; pods are told from cgroups of either version",
        "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1",
        _guarded(_find_cgroup, "read /proc/self/mounts"),
    ),
    Probe(
        "raw_tracepoint",
        "raw tracepoints",
        LATER,
        "the capture on kernels without BTF",
        _TRACING_KERNEL,
        _attaches("check_raw_tracepoint"),
    ),
    Probe(
        "tracepoint",
        "tracepoints",
        LATER,
        "the classic form, another way on kernels without BTF",
        "mount tracefs, see there",
        _attaches("check_tracepoint"),
    ),
    Probe(
        "tracefs",
        "tracefs",
        LATER,
        "classic tracepoints are attached through it",
        "mount -t tracefs tracefs /sys/kernel/tracing",
        _guarded(_find_tracefs, "read it"),
    ),
    Probe("bpffs", "bpffs", UNUSED, "nothing is pinned", "", _guarded(_find_bpffs, "read /proc/self/mounts")),
    Probe(
        "unprivileged_bpf",
        "BPF for anybody",
        UNUSED,
        "the agent has privileges of its own",
        "",
        _guarded(_find_unprivileged, "read the setting"),
    ),
)
