"""Loads and attaches the capture programs, and hands out what they record.

In: settings and a BPF object file. Out: batches of ring-buffer bytes with record offsets, counters, program statistics.
Raises the errors of ``agent.errors`` with what to do; never parses a record.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Iterable
from errno import EACCES, EPERM
from pathlib import Path
from typing import Any

import msgspec

from agent.elf import function_offsets
from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError
from agent.kernel import _libbpf, uprobes
from agent.kernel._libbpf import ffi, lib
from agent.kernel.backends import PROGRAMS, TRACEPOINTS, Way, no_sockets, ways
from agent.kernel.layout import LayoutMismatchError, WireLayout, parse_enum, parse_struct
from agent.kernel.refusals import LOAD, Machine, explain, unmet, unreadable

BATCH_BYTES = 128 << 10
"""Bytes drained per call: large enough that the call does not matter, small enough that a batch and everything made of
it stay in the second-level cache (a fifth less CPU per span than with 1 MiB: `make bench`)."""
BATCH_SLOTS = 4096

PROCESS_UNKNOWN, PROCESS_TRACED, PROCESS_IGNORED = range(3)

_ZERO_AT_FIRST = frozenset(
    ("ports_filtered", "ports_generation", "tls_enabled", "tls_attached")
)  # the compiler puts these into .bss, the other settings into .data

_BPF_EXIST = 2  # linux/bpf.h: change an entry, make none
_COMMON = ("on_sock_state", "on_process_exit", "on_process_exec")
TLS_PROGRAMS = (
    "on_tls_read",
    "on_tls_read_ex",
    "on_tls_write",
    "on_tls_write_ex",
    "on_tls_handshake",
    "on_tls_free",
    "on_tls_return",
    "on_go_read",
    "on_go_write",
    "on_go_read_return",
    "on_go_write_return",
)
RUST_PROGRAMS = ("on_rust_received", "on_rust_write", "on_rust_return")
"""What ``watch_call`` attaches. Each family is loaded when the first of it is needed, and costs nothing before."""
_RUST_HOOKS = {"sockets": ("on_rust_send", "on_rust_recv"), "syscalls": ("on_rust_sys_enter", "on_rust_sys_exit")}
"""Backend -> what is loaded with RUST_PROGRAMS, and attached while one of them is."""
_ON_DEMAND = (*TLS_PROGRAMS, *RUST_PROGRAMS, *itertools.chain(*_RUST_HOOKS.values()))


class CaptureSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the programs are loaded with. Sizes in bytes; ports are the server's; empty ``include`` selects all.

    ``backend``: where the programs listen. "syscalls" works everywhere, "sockets" is cheaper and needs tracepoints of
    Linux 6.16, "auto" takes the cheaper one that this kernel has.
    """

    backend: str = "auto"
    request_head_bytes: int = 1024
    response_head_bytes: int = 256
    connections: int = 32768
    processes: int = 8192
    ring_buffer_bytes: int = 8 << 20
    exchange_timeout_seconds: float = 600.0
    quiet_seconds: float = 0.05
    open_seconds: float = 0.2
    ports_include: tuple[int, ...] = ()
    ports_exclude: tuple[int, ...] = ()
    http2: bool = True


class ProgramStatistics(msgspec.Struct, frozen=True):
    """The kernel's own account of one program. Run time and count need ``kernel.bpf_stats_enabled``."""

    name: str
    run_time_ns: int
    run_count: int
    misses: int
    verified_instructions: int


def object_path() -> Path:
    """Where the build puts the BPF object for this machine's architecture."""
    return Path(__file__).with_name(f"capture.{platform.machine()}.bpf.o")


class Capture:
    """The loaded and attached programs. Use as a context manager; everything is released at the end.

    ``backend`` is what was chosen, ``hooks`` where its programs are attached, ``reasons`` why nothing cheaper is.
    Raises PrivilegeError, KernelUnsupportedError or TracingRefusedError when loading or attaching is impossible.
    """

    def __init__(self, settings: CaptureSettings, path: Path | None = None) -> None:
        self._links: dict[str, Any] = {}
        self._way: Way | None = None
        self._object = ffi.NULL
        self._families: dict[tuple[str, ...], Any] = {}  # programs that were loaded on demand, and their objects
        self._rust_links: list[Any] = []
        self._drain = ffi.NULL
        self._iter_link = ffi.NULL
        self._capturing = ffi.NULL
        lib.spanloom_log_reset()
        path = path or object_path()
        if not path.exists():
            raise SpanloomError(f"{path.name} is missing: run `make build` (or reinstall the package)")
        try:
            self._open(settings, path)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: CaptureSettings, path: Path) -> None:
        if (error := unmet(Machine.this())) is not None:
            raise error
        self._path = path
        self._way = self._load_best(settings)
        self.backend, self.hooks = self._way.backend, self._way.hooks
        self._maps = {name: lib.bpf_map__fd(self._map(name)) for name in ("processes", "counters", "connections")}
        self._settings: dict[str, Any] = {}
        self._ports: dict[int, int] = {}
        self._ports_generation = 0
        self.select_ports(settings.ports_include, settings.ports_exclude)
        self.limit_heads(settings.request_head_bytes, settings.response_head_bytes)
        self.follow_http2(settings.http2)
        self._capturing = ffi.cast("uint64_t *", self._variable(".bss", "capturing", 8))
        self._tracked = ffi.cast("uint64_t *", self._variable(".bss", "tracked_connections", 8))
        self._oldest = ffi.cast("uint64_t *", self._variable(".bss", "oldest_unreported_ns", 8))
        self._drain = lib.spanloom_drain_new(lib.bpf_map__fd(self._map("records")))
        if self._drain == ffi.NULL:
            raise _refusal(ffi.errno, "map the ring buffer")
        self._buffer = ffi.new("unsigned char[]", BATCH_BYTES)
        self._offsets = ffi.new("uint32_t[]", BATCH_SLOTS)
        self._cpus = lib.libbpf_num_possible_cpus()

    def _load_best(self, settings: CaptureSettings) -> Way:
        """Load the first way that the kernel lets load, and attach it where only that tells whether it may be."""
        possible, self.reasons = ways(settings.backend)
        for way in possible:
            try:
                self._load(way, settings)
                if not way.is_certain:
                    self._attach(way.programs)
                return way
            except SpanloomError as error:
                if way.is_certain:
                    raise
                self.reasons.append(f"by {way.hooks} {error}")
                self._unload()
        raise no_sockets(self.reasons)

    def _load(self, way: Way, settings: CaptureSettings) -> None:
        self._object = lib.bpf_object__open_file(str(self._path).encode(), ffi.NULL)
        if self._object == ffi.NULL:
            raise unreadable(ffi.errno, self._path.name, _libbpf_log())
        self.layout = WireLayout.from_descriptions(self._describe)
        process = parse_struct("process", self._describe("process"))
        if process.fields != ("start_ns", "state", "served", "tls_told"):
            raise LayoutMismatchError(f"struct process has {process.fields}")
        self._process = process.codec
        states = {
            "PROCESS_UNKNOWN": PROCESS_UNKNOWN,
            "PROCESS_TRACED": PROCESS_TRACED,
            "PROCESS_IGNORED": PROCESS_IGNORED,
        }
        if parse_enum(self._describe("process_state")) != states:
            raise LayoutMismatchError(f"enum process_state differs from {states}")
        self._configure(settings)
        for name in PROGRAMS:
            lib.bpf_program__set_autoload(self._program(name), name in way.programs)
        for name in _ON_DEMAND:
            lib.bpf_program__set_autoload(self._program(name), False)
        code = -lib.bpf_object__load(self._object)
        if code:
            raise _refusal(code, LOAD)

    def _attach(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._links:
                self._links[name] = self._attached(name)

    def _attached(self, name: str) -> Any:
        link = lib.bpf_program__attach(self._program(name))
        if link == ffi.NULL:
            raise _refusal(ffi.errno, f"attach the probe {name}")
        return link

    def attach(self, ignore_tgids: Iterable[int] = ()) -> None:
        """Start capturing. Processes in ``ignore_tgids`` (the agent itself) are never captured."""
        for tgid in ignore_tgids:
            key = ffi.new("uint32_t *", tgid)
            value = ffi.from_buffer(self._process.pack(0, PROCESS_IGNORED, 0, 0))
            self._check(lib.bpf_map_update_elem(self._maps["processes"], key, value, 0))
        self._attach((*self._way.programs, *_COMMON))
        self._release_sweep()
        self._iter_link = lib.spanloom_attach_map_iter(self._program("sweep"), self._map("connections"))
        if self._iter_link == ffi.NULL:
            raise _refusal(ffi.errno, "attach the probe sweep")
        self._capturing[0] = 1

    # -- TLS libraries

    def load_tls(self) -> None:
        """Load ``TLS_PROGRAMS``, which takes the verifier as long as all others together. Raises what the constructor
        does.
        """
        self._load_family(TLS_PROGRAMS)

    def load_rust(self) -> None:
        """Load ``RUST_PROGRAMS``, as ``watch_call`` does when it needs one. Raises what the constructor does."""
        self._load_family(RUST_PROGRAMS, self._rust_hooks)

    @property
    def _rust_hooks(self) -> tuple[str, ...]:
        return _RUST_HOOKS["sockets" if self._way is TRACEPOINTS else "syscalls"]

    def _load_family(self, family: tuple[str, ...], hooks: tuple[str, ...] = ()) -> None:
        """Load an object of the same file with these programs and the maps of the first one, unless it is there.

        Those of ``family`` are attached to calls, ``hooks`` to the kernel.
        """
        names = family + hooks
        if names in self._families:
            return
        loaded = lib.bpf_object__open_file(str(self._path).encode(), ffi.NULL)
        if loaded == ffi.NULL:
            raise unreadable(ffi.errno, self._path.name, _libbpf_log())
        for name in (*PROGRAMS, *_COMMON, "sweep", *_ON_DEMAND):
            program = lib.bpf_object__find_program_by_name(loaded, name.encode())
            if name not in names:
                lib.bpf_program__set_autoload(program, False)
            elif name in family:
                uprobes.prepare(program)
        code = -(lib.spanloom_share_maps(loaded, self._object) or lib.bpf_object__load(loaded))
        if code:
            lib.bpf_object__close(loaded)
            raise _refusal(code, "load the probes for TLS")
        self._families[names] = loaded
        give_memory_back()  # libbpf has read the kernel's types once more

    def announce_tls(self, wanted: bool) -> None:
        """Choose whether records tell of processes that use TLS in ways that are not watched. Live.

        Call it with True before anything is watched: calls of Go programs that were under way when the probes were
        taken back have returned unseen since, and are forgotten.
        """
        if wanted:
            self._empty("go_calls")
        self._set("tls_enabled", wanted)

    def watch_call(self, program: str, path: str, offset: int, *, is_return: bool) -> Any:
        """Attach one of ``TLS_PROGRAMS`` or ``RUST_PROGRAMS`` to the function at ``offset`` of a file.

        Returns the link. ``path`` is followed once; what it leads to then is what is watched. Raises SpanloomError when
        that is refused.
        """
        if program in RUST_PROGRAMS:
            self.load_rust()
        try:
            return uprobes.attach(self._program(program), path, offset, is_return=is_return)
        except OSError as error:
            if error.errno in (EACCES, EPERM) and not uprobes.has_links():
                raise PrivilegeError(
                    "the kernel refuses probes on programs: before Linux 6.6, TLS is traced with CAP_SYS_ADMIN only"
                ) from None
            raise _refusal(error.errno, f"attach the probe {program}") from None

    def try_return(self) -> list[Any]:
        """Attach a return probe where only this process is, and see a child under a seccomp filter live through it.

        Linux 6.11 to 6.13 on x86-64 leave a probed function through a system call of its own, which filters refuse;
        then the process crashes (fixed in 6.14, commit cf6cb56ef244, and in some stable kernels). Returns what to take
        back. Raises KernelUnsupportedError when the child crashed, SpanloomError when probes are refused.
        """
        path = _libbpf.__file__
        with open(path, "rb", buffering=0) as file:
            offset = function_offsets(lambda at, count: os.pread(file.fileno(), count, at), ["spanloom_canary"])
        if not offset:
            raise SpanloomError("the binding to libbpf has lost its symbols: reinstall the package")
        link = self.watch_call("on_tls_return", path, offset["spanloom_canary"], is_return=True)
        died_of = lib.spanloom_canary_under_filter()
        if died_of > 0:
            self.unwatch([link])
            raise KernelUnsupportedError(
                "return probes of this kernel crash processes under seccomp filters (Linux 6.11 to 6.13 on x86-64): "
                "TLS is not traced; update the kernel, or set capture.tls to false"
            )
        return [link]

    def unwatch(self, links: Iterable[Any]) -> None:
        """Take back what ``watch_call`` attached."""
        uprobes.detach(links)

    def count_watched(self, files: int, rust_files: int) -> None:
        """Tell the programs how many files are watched: at 0 they do not look for what belongs to TLS objects. While
        some of them are watched for rustls, it is followed where threads have their TLS bytes.
        """
        self._set("tls_attached", files)
        while self._rust_links and not rust_files:
            lib.bpf_link__destroy(self._rust_links.pop())
        if rust_files and not self._rust_links:
            self._rust_links = [self._attached(name) for name in self._rust_hooks]

    def forget_tls_told(self, tgid: int) -> None:
        """Let a process that uses TLS be told of again."""
        key, value = ffi.new("uint32_t *", tgid), ffi.new("unsigned char[]", self._process.size)
        if lib.bpf_map_lookup_elem(self._maps["processes"], key, value) == 0:
            *kept, _ = self._process.unpack(ffi.buffer(value))
            ffi.buffer(value)[:] = self._process.pack(*kept, 0)
            lib.bpf_map_update_elem(self._maps["processes"], key, value, _BPF_EXIST)

    def wait(self, timeout_seconds: float) -> bool:
        """Sleep until the kernel asks to be read, a signal arrives, or the time is up. True: there is something."""
        return lib.spanloom_drain_wait(self._drain, int(timeout_seconds * 1000)) > 0

    def drain(self) -> tuple[bytes, list[int]]:
        """Take one batch: its bytes and the offset of each record. Empty when nothing is waiting."""
        count = lib.spanloom_drain(self._drain, self._buffer, BATCH_BYTES, self._offsets, BATCH_SLOTS)
        if count < 0:
            raise SpanloomError(f"reading the ring buffer failed: {os.strerror(-count)}")
        if not count:
            return b"", []
        used = lib.spanloom_drain_used(self._drain)
        return ffi.buffer(self._buffer, used)[:], ffi.unpack(self._offsets, count)

    def sweep(self) -> int:
        """Let the kernel report what has gone quiet or has waited for long.

        Returns the watermark in CLOCK_MONOTONIC nanoseconds: of every exchange that began before it a record is in the
        ring buffer by now (or was dropped and counted).
        """
        started_ns = time.monotonic_ns()
        if not self._tracked[0]:
            return started_ns
        self._oldest[0] = (1 << 64) - 1
        descriptor = lib.bpf_iter_create(lib.bpf_link__fd(self._iter_link))
        if descriptor < 0:
            raise SpanloomError(f"the sweep over connections failed: {os.strerror(ffi.errno)}")
        try:
            while os.read(descriptor, 4096):
                pass
        finally:
            os.close(descriptor)
        return min(self._oldest[0], started_ns)

    def decide(self, tgid: int, start_ns: int, state: int) -> None:
        """Record whether a process is traced, in its entry. Nothing is done without one: the process has ended, or runs
        another program by now, or could not be remembered, and what comes next is announced anew. An entry made here
        would outlast the process and be found by a later one of the same number. The rest of it is kept.
        """
        key = ffi.new("uint32_t *", tgid)
        value = ffi.new("unsigned char[]", self._process.size)
        if lib.bpf_map_lookup_elem(self._maps["processes"], key, value):
            return
        seen_start_ns, _, *rest = self._process.unpack(ffi.buffer(value))
        if seen_start_ns != start_ns:
            return  # another process has the number by now
        ffi.buffer(value)[:] = self._process.pack(start_ns, state, *rest)
        lib.bpf_map_update_elem(self._maps["processes"], key, value, _BPF_EXIST)

    def counters(self) -> dict[str, int]:
        """Sum the per-CPU counters of ``enum counter``, by lower-case name. Threads may ask at the same time.

        ``begun`` is read last: whatever has ended by then is among what has begun, and not the other way round.
        """
        result = {}
        key = ffi.new("uint32_t *")
        values = ffi.new("uint64_t[]", self._cpus)  # of this call alone: the look-up lets other threads run
        for index, name in sorted(enumerate(self.layout.counters), key=lambda entry: entry[1] == "begun"):
            key[0] = index
            lib.bpf_map_lookup_elem(self._maps["counters"], key, values)
            result[name] = sum(ffi.unpack(values, self._cpus))
        return result

    def connections(self) -> int:
        """Count the tracked connections (walks the map: for tests and metrics, not for the hot path)."""
        key, following = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        previous, count = ffi.NULL, 0
        while lib.bpf_map_get_next_key(self._maps["connections"], previous, following) == 0:
            key[0] = following[0]
            previous, count = key, count + 1
        return count

    def statistics(self) -> list[ProgramStatistics]:
        """The kernel's statistics of every program."""
        result = []
        statistics = ffi.new("struct program_statistics *")
        for name in (*self._way.programs, *_COMMON, "sweep", *itertools.chain(*tuple(self._families))):
            if lib.spanloom_program_statistics(lib.bpf_program__fd(self._program(name)), statistics) == 0:
                result.append(
                    ProgramStatistics(
                        name,
                        statistics.run_time_ns,
                        statistics.run_count,
                        statistics.misses,
                        statistics.verified_instructions,
                    )
                )
        return result

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map, for programs that write into it (the benchmark's generator)."""
        return lib.bpf_map__fd(self._map(name))

    def detach(self) -> None:
        """Stop capturing; what is in the ring buffer can still be drained.

        Programs that could not come back stay where they are until ``close``; they do nothing.
        """
        if self._links and self._capturing != ffi.NULL:
            self._capturing[0] = 0
        stay = self._way.programs if self._way is not None and self._way.attaches_once else ()
        for name in [name for name in reversed(self._links) if name not in stay]:
            lib.bpf_link__destroy(self._links.pop(name))

    def forget_connections(self) -> None:
        """Drop what the kernel knows, while detached: it tells nothing of what follows a pause in capturing."""
        for name in (
            "connections",
            "endpoints",
            "threads",
            "processes",
            "tls_objects",
            "tls_candidates",
            "tls_threads",
            "go_calls",
        ):
            self._empty(name)
        self._tracked[0] = 0
        ffi.cast("uint64_t *", self._variable(".bss", "stream_connections", 8))[0] = 0
        self._release_sweep()

    def hasten(self, hurry: bool = True) -> None:
        """Let sweeps report responses without waiting for silence, before the capture ends; ``False``: no longer."""
        ffi.cast("uint64_t *", self._variable(".bss", "draining", 8))[0] = hurry

    def close(self) -> None:
        """Detach and release everything. May be called twice."""
        self.detach()
        self._release_sweep()
        if self._drain != ffi.NULL:
            lib.spanloom_drain_free(self._drain)
            self._drain = ffi.NULL
        while self._rust_links:
            lib.bpf_link__destroy(self._rust_links.pop())
        while self._families:
            lib.bpf_object__close(self._families.popitem()[1])
        self._unload()

    def _unload(self) -> None:
        while self._links:
            lib.bpf_link__destroy(self._links.popitem()[1])
        if self._object != ffi.NULL:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL

    def _release_sweep(self) -> None:
        if self._iter_link != ffi.NULL:
            lib.bpf_link__destroy(self._iter_link)
            self._iter_link = ffi.NULL

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _configure(self, settings: CaptureSettings) -> None:
        request, response = settings.request_head_bytes, settings.response_head_bytes
        limits = parse_enum(self._describe("capture_limit"))
        if not (0 < request <= limits["REQUEST_CAP_MAX"] and 0 < response <= limits["RESPONSE_CAP_MAX"]):
            raise SpanloomError("capture limits are out of range")
        constants = {
            "request_cap": ("uint32_t *", 4, request),
            "response_cap": ("uint32_t *", 4, response),
            "quiet_ns": ("uint64_t *", 8, int(settings.quiet_seconds * 1e9)),
            "open_ns": ("uint64_t *", 8, int(settings.open_seconds * 1e9)),
            "expire_ns": ("uint64_t *", 8, int(settings.exchange_timeout_seconds * 1e9)),
            "wakeup_bytes": ("uint64_t *", 8, settings.ring_buffer_bytes // 4),
        }
        for name, (kind, size, value) in constants.items():
            ffi.cast(kind, self._variable(".rodata", name, size))[0] = value
        offsets = dict(line.split()[:2] for line in self._describe("connection").splitlines())
        entry = int(offsets["data"]) + request + response + limits["COPY_SLACK"]
        entry = (entry + 7) & ~7
        for name, size in (("connections", entry), ("sweep_scratch", entry)):
            self._check(lib.bpf_map__set_value_size(self._map(name), size))
        for name, entries in (
            ("connections", settings.connections),
            ("endpoints", settings.connections * 2),
            ("processes", settings.processes),
            ("tls_objects", settings.connections),
            ("records", settings.ring_buffer_bytes),
        ):
            self._check(lib.bpf_map__set_max_entries(self._map(name), entries))

    def select_ports(self, include: Iterable[int], exclude: Iterable[int]) -> None:
        """Choose the server ports whose connections are traced; an empty ``include`` means all. Live.

        Each open connection is judged again when its next exchange begins.
        """
        wanted = dict.fromkeys(include, 1) | dict.fromkeys(exclude, 0)
        descriptor = lib.bpf_map__fd(self._map("ports"))
        key, value = ffi.new("uint16_t *"), ffi.new("uint8_t *")
        changes = False
        for port in self._ports.keys() - wanted.keys():
            key[0] = port
            lib.bpf_map_delete_elem(descriptor, key)
            changes = True
        for port, selected in wanted.items():
            if self._ports.get(port) != selected:
                key[0], value[0] = port, selected
                self._check(lib.bpf_map_update_elem(descriptor, key, value, 0))
                changes = True
        self._ports = wanted
        self._set("ports_default", not any(wanted.values()))
        self._set("ports_filtered", bool(wanted))
        if changes:
            self._ports_generation += 1
            self._set("ports_generation", self._ports_generation)

    def limit_heads(self, request_bytes: int, response_bytes: int) -> None:
        """Capture at most so many bytes of each head, as far as the sizes at loading allow. Live."""
        self._set("request_limit", request_bytes)
        self._set("response_limit", response_bytes)

    def follow_http2(self, wanted: bool) -> None:
        """Recognise HTTP/2 and forward its frames, or leave such connections alone. Live."""
        self._set("http2_enabled", wanted)

    def forget_decisions(self) -> None:
        """Let every process but the agent itself be announced and decided on anew, at its next exchange."""
        descriptor, value = self._maps["processes"], ffi.new("unsigned char[]", self._process.size)
        for wanted in self._keys("processes"):
            if lib.bpf_map_lookup_elem(descriptor, wanted, value) == 0:
                start_ns, state, *_ = self._process.unpack(ffi.buffer(value))
                if start_ns and state == PROCESS_IGNORED:
                    lib.bpf_map_delete_elem(descriptor, wanted)

    def _empty(self, name: str) -> None:
        descriptor = lib.bpf_map__fd(self._map(name))
        for key in self._keys(name):
            lib.bpf_map_delete_elem(descriptor, key)

    def _keys(self, name: str) -> list[Any]:
        """The keys of a map at this moment, as bytes in memory; one that changes meanwhile may be missed."""
        found = self._map(name)
        descriptor, size, keys = lib.bpf_map__fd(found), lib.bpf_map__key_size(found), []
        previous, following = ffi.NULL, ffi.new("unsigned char[]", size)
        while lib.bpf_map_get_next_key(descriptor, previous, following) == 0:
            previous, following = following, ffi.new("unsigned char[]", size)
            keys.append(previous)
            if len(keys) > 1 << 20:  # a map that changes under the walk may lead it in a circle
                break
        return keys

    def _set(self, name: str, value: int) -> None:
        pointer = self._settings.get(name)
        if pointer is None:
            section = ".bss" if name in _ZERO_AT_FIRST else ".data"
            pointer = self._settings[name] = ffi.cast("uint64_t *", self._variable(section, name, 8))
        pointer[0] = value

    def _describe(self, name: str) -> str:
        text = ffi.new("char[]", 16384)
        if lib.spanloom_describe(self._object, name.encode(), text, 16384):
            raise SpanloomError(f"the BPF object does not describe {name}: it was built without -g")
        return ffi.string(text).decode()

    def _variable(self, section: str, name: str, size: int):
        # .rodata is set before loading, in libbpf's memory; .bss is shared with the loaded programs.
        loaded = lib.bpf_map__fd(self._map(section)) if section in (".bss", ".data") else -1
        pointer = lib.spanloom_variable(self._object, section.encode(), name.encode(), size, loaded)
        if pointer == ffi.NULL:
            raise SpanloomError(f"the BPF object has no {size}-byte variable {name} in {section}")
        return pointer

    def _map(self, name: str):
        found = lib.bpf_object__find_map_by_name(self._object, name.encode())
        if found == ffi.NULL:
            raise SpanloomError(f"the BPF object has no map {name}")
        return found

    def _program(self, name: str):
        loaded = next((loaded for family, loaded in tuple(self._families.items()) if name in family), self._object)
        found = lib.bpf_object__find_program_by_name(loaded, name.encode())
        if found == ffi.NULL:
            raise SpanloomError(f"the BPF object has no program {name}")
        return found

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise _refusal(-error, "prepare the maps")


def give_memory_back() -> None:
    """Let freed blocks of memory go back to the system, now and later. The first call has to come before threads start;
    does nothing without glibc.
    """
    lib.spanloom_give_memory_back()


def _refusal(code: int, action: str) -> SpanloomError:
    return explain(code, action, _libbpf_log(), Machine.this())


def _libbpf_log() -> str:
    return ffi.string(lib.spanloom_log()).decode("utf-8", "replace")
