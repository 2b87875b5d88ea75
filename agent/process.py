"""Which program a record belongs to: process -> resource attributes, and which programs are traced.

In: what the kernel said about a process (``ProcessSeen``, or just its pid and start time) and the bounded beginning of
a few files of ``/proc/<pid>``. Out: ``ProcessInfo``, one per process, and the decision of the ``Selector``. Never:
waits, talks to the network, raises because a process is gone or forbidden, keeps an environment variable other than
``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``, or gives one process what belongs to another that had its pid.

A process is ``(tgid, start_ns)``, the start in CLOCK_BOOTTIME nanoseconds. Its directory in ``/proc`` is opened once,
its start time is compared, and all other files are read through that descriptor: the kernel ties the descriptor to the
process and not to the number, so a pid that is used again in between yields ESRCH and never a stranger's data.

The module is longer than most: reading ``/proc`` with bounds and guessing the language stay with their only user.
"""

from __future__ import annotations

import fnmatch
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote_to_bytes

import msgspec

from agent.model import Attributes, ProcessSeen

# Bounds on what is read of each file. Everything behind a bound is as if absent.
_STAT_BYTES = 4096
_CGROUP_BYTES = 16 * 1024
_COMMAND_LINE_BYTES = 2048
_COMMAND_LINE_ARGUMENTS = 16
_ENVIRON_BYTES = 256 * 1024  # in Kubernetes, every service of a namespace adds some 500 bytes
_MAPS_BYTES = 1024 * 1024  # shared libraries stand behind the heap of a JVM
_ELF_TABLE_BYTES = 64 * 1024  # section headers, section names: 1024 sections
_ELF_COMMENT_BYTES = 4096
_READ_CHUNK_BYTES = 16 * 1024

# Bounds on what a process may declare about itself: what is over is left out, a longer value is cut.
_DECLARED_PAIRS = 64
_DECLARED_ITEMS = 256  # looked at, bad ones and repetitions included
_DECLARED_KEY_CHARS = 255
_DECLARED_VALUE_CHARS = 1024

# At the bound of the table, this many of its oldest entries are asked whether they still run before one is evicted.
_EVICTION_CANDIDATES = 16

_NS_PER_SECOND = 1_000_000_000
_TICK_NS = _NS_PER_SECOND // os.sysconf("SC_CLK_TCK")

# What the agent knows better than the process does; its OTEL_RESOURCE_ATTRIBUTES cannot change these.
_FACTS = frozenset(("process.pid", "process.executable.name"))
_SDK_NAME = "telemetry.sdk.name", "spanloom"


class Placement(msgspec.Struct, frozen=True, gc=False):
    """What is known of the pod that a process runs in.

    ``container`` identifies the container to whoever made this. Until the pod is ``known``, ``attributes`` hold only
    what the process itself gives away. ``selected``: by the rules for pods. ``facts`` are for matching overrides:
    namespace, pod, container. ``basis`` is what the placement was made of, for ``Pods.is_current``.
    """

    container: object
    known: bool
    selected: bool
    attributes: Attributes
    facts: tuple[tuple[str, str], ...] = ()
    basis: object = None


class Pods(Protocol):
    """What is needed of ``agent.kube``."""

    def container_of(self, cgroup: bytes) -> object | None:
        """The container that the text of ``/proc/<pid>/cgroup`` tells of; None outside of pods."""

    def place(self, container: object, declared: Mapping[str, str]) -> Placement:
        """What is known now. ``declared`` is what the process says of itself, by attribute."""

    def is_current(self, placement: Placement) -> bool:
        """False when ``place`` may say something else by now; much cheaper than asking it."""


class ProcessInfo(msgspec.Struct, frozen=True, gc=False):
    """One process.

    ``key`` is ``(tgid, start_ns)``. ``executable_name`` and ``executable_path`` may be empty. ``command_line`` (at most
    16 arguments of 2 KiB together) serves language detection; it may hold secrets, so it is never exported and not
    part of the ``repr``. ``language`` is a value of ``telemetry.sdk.language`` or empty. ``resource`` holds every
    resource attribute of the process's spans. ``alive_when_seen`` tells whether ``/proc`` could be read. ``placement``
    is None outside of pods; ``declared`` are the resource attributes of its own environment.
    """

    key: tuple[int, int]
    executable_name: str
    executable_path: str
    command_line: tuple[str, ...]
    language: str
    service_name: str
    resource: Attributes
    alive_when_seen: bool
    own_name: str = ""
    declared: tuple[tuple[str, str], ...] = ()
    placement: Placement | None = None

    @property
    def is_placed(self) -> bool:
        """False while its pod is not known."""
        return self.placement is None or self.placement.known

    def __repr__(self) -> str:
        return f"ProcessInfo(key={self.key}, executable={self.executable_name!r}, service_name={self.service_name!r})"


class ProcessTable:
    """All processes that made exchanges, read from ``/proc`` once each.

    At most ``max_processes`` entries; at the bound an entry whose process has ended is evicted, oldest first, looking
    at 16 candidates at most, and if all of those run, the oldest one: it is read again when it is next looked up.

    ``service.instance.id`` is ``<host_name>.<pid>.<start_ns>`` unless the process declares another one: the same for
    every span of one process, and different for any other process of the host until it boots again.

    With ``pods``, processes in containers are described by their pods; ``refresh()`` follows what becomes known later.

    ``proc_root`` must show the host's pids. ``extra_attributes`` go to every resource; what a process declares in its
    own environment wins over them. ``version`` is that of the agent. Counters: ``vanished`` counts the processes of
    which only the kernel's word is known, ``evicted`` the entries given up at the bound.
    """

    def __init__(
        self,
        *,
        proc_root: Path = Path("/proc"),
        host_name: str,
        extra_attributes: Attributes = (),
        max_processes: int = 8192,
        version: str,
        pods: Pods | None = None,
    ) -> None:
        self._pods = pods
        self._proc_root = os.fspath(proc_root)
        self._host_name = host_name
        self._extra_attributes = extra_attributes
        self._max_processes = max(1, max_processes)
        self._sdk_version = "telemetry.sdk.version", version
        self._processes: dict[tuple[int, int], ProcessInfo] = {}
        # What was last said of a container, by what its processes declare: those that are alike share it.
        self._placements: dict[tuple[object, tuple[tuple[str, str], ...]], Placement] = {}
        self.vanished = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._processes)

    def observe(self, seen: ProcessSeen) -> ProcessInfo:
        """Take the kernel's announcement of a process. It is read again only after an exec."""
        known = self._processes.get((seen.tgid, seen.start_ns))
        if known is not None and known.alive_when_seen and _is_named(known.executable_name, seen.executable):
            return known
        return self._add(seen.tgid, seen.start_ns, seen.executable, seen.comm, seen.cgroup)

    def get(self, key: tuple[int, int]) -> ProcessInfo | None:
        return self._processes.get(key)

    def lookup(self, tgid: int, start_ns: int, comm: str = "") -> ProcessInfo:
        """The process of a record; one that was never announced (the announcement was lost) is read from ``/proc``."""
        known = self._processes.get((tgid, start_ns))
        return known if known is not None else self._add(tgid, start_ns, "", comm)

    def forget(self, key: tuple[int, int]) -> None:
        self._processes.pop(key, None)

    def _add(self, tgid: int, start_ns: int, executable: str, comm: str, told: bytes = b"") -> ProcessInfo:
        """``told`` is what the kernel told of its cgroups, if it did."""
        key = (tgid, start_ns)
        cgroup = b""
        directory_fd = self._open_generation(key)
        if directory_fd is not None:
            cgroup = _read(directory_fd, "cgroup", _CGROUP_BYTES)
            if self._is_elsewhere(cgroup, told):
                os.close(directory_fd)
                directory_fd = None
        if directory_fd is None:
            self.vanished += 1
            info = self._describe(key, executable, comm, None, self._container_of(told))
        else:
            try:
                # The kernel's word comes first: it is seen from the root, and not from a cgroup namespace.
                container = self._container_of(told + cgroup)
                info = self._describe(key, executable, comm, directory_fd, container, systemd_unit(cgroup))
            finally:
                os.close(directory_fd)
        if key not in self._processes and len(self._processes) >= self._max_processes:
            self._evict_one()
        self._processes[key] = info
        return info

    def _open_generation(self, key: tuple[int, int]) -> int | None:
        """A descriptor of ``/proc/<tgid>`` if that is the process that started at ``start_ns``, else None."""
        tgid, start_ns = key
        try:
            fd = os.open(f"{self._proc_root}/{tgid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        # stat shows whole clock ticks, cut and not rounded (nsec_to_clock_t). Two processes that had the pid within one
        # tick look alike: see _is_elsewhere.
        started_ns = _start_ticks(_read(fd, "stat", _STAT_BYTES)) * _TICK_NS
        if started_ns >= 0 and 0 <= start_ns - started_ns < _TICK_NS:
            return fd
        os.close(fd)
        return None

    def _is_elsewhere(self, cgroup: bytes, told: bytes) -> bool:
        """Whether a process in ``cgroup`` is not the one that the kernel told of, as far as pods go.

        It had the pid within the same clock tick, or ended before it was read. (That a process leaves its container is
        not to be expected: runtimes move processes before they run a program. The kernel's word would be right, too: it
        is of the moment of the exchange.)
        """
        if self._pods is None or not told or _shows(cgroup, told):
            return False
        return self._container_of(cgroup) != self._container_of(told)

    def _container_of(self, cgroup: bytes) -> object | None:
        return self._pods.container_of(cgroup) if self._pods is not None and cgroup else None

    def _evict_one(self) -> None:
        for key in list(islice(self._processes, _EVICTION_CANDIDATES)):
            fd = self._open_generation(key)
            if fd is None:
                break
            os.close(fd)
            self._processes[key] = self._processes.pop(key)  # alive: to the young end
        else:
            key = next(iter(self._processes))
        del self._processes[key]
        self.evicted += 1

    def refresh(self) -> list[ProcessInfo]:
        """Look at the pods again; return the processes of which something is different now."""
        changed = []
        if self._pods is not None:
            outdated = [
                info
                for info in self._processes.values()
                if info.placement is not None and not self._pods.is_current(info.placement)
            ]
            for info in outdated:
                before, placement = info.placement, self._place(info.placement.container, info.declared)
                if before.known and not placement.known:
                    # Its pod went so long ago that it is forgotten: that makes what was known of it no less true.
                    placement = msgspec.structs.replace(before, basis=placement.basis)
                if placement == msgspec.structs.replace(before, basis=placement.basis):
                    self._processes[info.key] = msgspec.structs.replace(info, placement=placement)
                else:
                    self._processes[info.key] = self._compose(info, placement)
                    changed.append(self._processes[info.key])
        return changed

    def _place(self, container: object, declared: tuple[tuple[str, str], ...]) -> Placement:
        key = container, declared
        placement = self._placements.get(key)
        if placement is None or not self._pods.is_current(placement):
            if len(self._placements) >= self._max_processes:
                self._placements.clear()
            placement = self._placements[key] = self._pods.place(container, dict(declared))
        return placement

    def describe_with(self, extra_attributes: Attributes) -> None:
        """Give every process other extra attributes from now on."""
        self._extra_attributes = extra_attributes
        for key, info in list(self._processes.items()):
            self._processes[key] = self._compose(info, info.placement)

    def _describe(
        self,
        key: tuple[int, int],
        executable: str,
        comm: str,
        directory_fd: int | None,
        container: object | None,
        unit: str = "",
    ) -> ProcessInfo:
        path, command_line = "", ()
        declared: dict[str, str] = {}
        if directory_fd is None:
            name = executable
            language = _language_of_name(name)
        else:
            path = _executable_path(directory_fd)
            name = _base_name(path) or executable
            command_line = _command_line(_read(directory_fd, "cmdline", _COMMAND_LINE_BYTES))
            declared = _declared(_read_declarations(directory_fd))
            language = _language(directory_fd, name, command_line)
        info = ProcessInfo(
            key=key,
            executable_name=name,
            executable_path=path,
            command_line=command_line,
            language=language,
            service_name="",
            resource=(),
            alive_when_seen=directory_fd is not None,
            own_name=unit or name or (f"unknown_service:{comm}" if comm else "unknown_service"),
            declared=tuple(declared.items()),
        )
        placement = self._place(container, info.declared) if container is not None else None
        return self._compose(info, placement, comm)

    def _compose(self, info: ProcessInfo, placement: Placement | None, comm: str = "") -> ProcessInfo:
        """Put the resource together: the host's view, what the process declares, and above both what its pod says."""
        tgid, start_ns = info.key
        service_name = next((value for key, value in info.declared if key == "service.name"), "") or info.own_name
        # By attribute the whole pair, which all processes of a container share: they may be thousands.
        resource = {
            pair[0]: pair
            for pair in (
                ("service.name", service_name),
                ("service.instance.id", f"{self._host_name}.{tgid}.{start_ns}"),
                ("host.name", self._host_name),
                *self._extra_attributes,
                *(pair for pair in info.declared if pair[0] not in _FACTS and not pair[0].startswith("telemetry.sdk.")),
            )
        }
        resource["service.name"] = "service.name", service_name
        if placement is not None:
            resource.update((pair[0], pair) for pair in placement.attributes)
        resource["process.pid"] = "process.pid", tgid
        name = info.executable_name or comm or dict(info.resource).get("process.executable.name", "")
        if name:
            resource["process.executable.name"] = "process.executable.name", name
        resource["telemetry.sdk.name"] = _SDK_NAME
        if info.language:
            resource["telemetry.sdk.language"] = "telemetry.sdk.language", info.language
        resource["telemetry.sdk.version"] = self._sdk_version
        return msgspec.structs.replace(
            info,
            service_name=str(resource["service.name"][1]),
            resource=tuple(resource.values()),
            placement=placement,
        )


class Selector:
    """Which processes are traced: those that match an ``include`` glob and no ``exclude`` glob, never the agent itself.

    The globs are ``fnmatch`` patterns, case-sensitive: one with a ``/`` is for the executable's whole path, one without
    for its name alone. An empty ``include`` selects nothing. A process whose name is unknown is matched by ``*`` only,
    one whose path is unknown by no glob with a ``/``. In a pod, the rules for pods must select it as well; outside of
    pods, ``host`` must be true.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str], own_tgid: int, *, host: bool = True) -> None:
        self._host = host
        self._include_name, self._include_path = _matchers(include)
        self._exclude_name, self._exclude_path = _matchers(exclude)
        self._own_tgid = own_tgid

    def selects(self, info: ProcessInfo) -> bool:
        if info.key[0] == self._own_tgid:
            return False
        if not (self._host if info.placement is None else info.placement.selected):
            return False
        name, path = info.executable_name, info.executable_path
        if self._exclude_name(name) is not None or (path and self._exclude_path(path) is not None):
            return False
        return self._include_name(name) is not None or (path != "" and self._include_path(path) is not None)


_Match = Callable[[str], re.Match[str] | None]


def _matchers(globs: Sequence[str]) -> tuple[_Match, _Match]:
    """What matches names, and what matches paths."""
    return _matcher([glob for glob in globs if "/" not in glob]), _matcher([glob for glob in globs if "/" in glob])


def _matcher(globs: Sequence[str]) -> _Match:
    """One expression for all globs; without a glob it matches nothing."""
    return re.compile("|".join(map(fnmatch.translate, globs)) if globs else r"(?!)").match


def _shows(cgroup: bytes, told: bytes) -> bool:
    """Whether the text of ``/proc/<pid>/cgroup`` can be of a process that the kernel told ``told`` of.

    A path from a cgroup namespace has ``/..`` for what it hides of the path from the root, or nothing.
    """
    paths = {_hierarchy(line): line.split(b":", 2)[-1] for line in cgroup.splitlines() if line.count(b":") >= 2}
    for line in told.splitlines():
        path, found = line.split(b":", 2)[-1], paths.get(_hierarchy(line))
        if found is None:
            return False
        found = found.removesuffix(b" (deleted)")
        while found.startswith(b"/.."):
            found = found[3:]
        if not path.endswith(found.rstrip(b"/")):
            return False
    return True


def _hierarchy(line: bytes) -> bytes:
    """Which hierarchy a line of ``/proc/<pid>/cgroup`` is of, as far as ``ProcessSeen`` tells them apart."""
    controllers = line.split(b":", 2)[1]
    return b"memory" if b"memory" in controllers.split(b",") else controllers


def systemd_unit(cgroup: bytes) -> str:
    """The service unit in the text of ``/proc/<pid>/cgroup`` without ``.service``, or an empty string.

    systemd keeps its own hierarchy in ``name=systemd`` (v1, hybrid) or in ``0::`` (v2); controllers of v1 are not
    asked, as anybody may move processes there. A user's service manager (``user@1000.service``), a transient unit with
    a random name and a container below a runtime's unit are not what a person would call the service.
    """
    path = b""
    for line in cgroup.split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        controllers, separator, line_path = rest.partition(b":")
        if not separator:
            continue
        if controllers == b"name=systemd":
            path = line_path
            break
        if hierarchy == b"0" and controllers == b"":
            path = line_path
    below_unit: list[bytes] = []
    for component in reversed(path.removesuffix(b" (deleted)").split(b"/")):
        if component.endswith(b".service"):
            unit = component.removesuffix(b".service")
            if unit.startswith(b"user@") or _TRANSIENT_UNIT.fullmatch(unit) or any(map(_CONTAINER.search, below_unit)):
                return ""
            return unit.decode("utf-8", "replace")
        below_unit.append(component)
    return ""


_TRANSIENT_UNIT = re.compile(rb"run-(?:r[0-9a-f]{16,}|[up]\d[\w-]*)")  # what systemd-run invents without --unit
_CONTAINER = re.compile(rb"[0-9a-f]{64}|^kubepods|^libpod|^docker")


def parse_resource_attributes(value: str) -> dict[str, str]:
    """The pairs of ``OTEL_RESOURCE_ATTRIBUTES`` (OpenTelemetry specification, Resource SDK): ``key=value,key2=...``.

    Keys and values are percent-decoded. A pair without ``=``, without a key, or that is no UTF-8 after decoding is left
    out, as the SDKs do; of equal keys the last one wins. At most 64 pairs, among the first 256 items; values are cut at
    1024 characters.
    """
    pairs: dict[str, str] = {}
    for item in value.split(",", _DECLARED_ITEMS)[:_DECLARED_ITEMS]:
        raw_key, separator, raw_value = item.partition("=")
        try:
            key = unquote_to_bytes(raw_key.strip()).decode()
            decoded = unquote_to_bytes(raw_value.strip()).decode()
        except UnicodeDecodeError:
            continue
        if not separator or not key or len(key) > _DECLARED_KEY_CHARS:
            continue
        if len(pairs) >= _DECLARED_PAIRS and key not in pairs:
            break
        pairs[key] = decoded[:_DECLARED_VALUE_CHARS]
    return pairs


def _declared(environment: dict[bytes, bytes]) -> dict[str, str]:
    """What the process says about itself; ``service.name`` is absent or not empty."""
    attributes = parse_resource_attributes(environment.get(_RESOURCE_ATTRIBUTES, b"").decode("utf-8", "replace"))
    name = environment.get(_SERVICE_NAME, b"").decode("utf-8", "replace").strip()[:_DECLARED_VALUE_CHARS]
    if name:
        attributes["service.name"] = name
    elif not attributes.get("service.name"):
        attributes.pop("service.name", None)
    return attributes


_SERVICE_NAME = b"OTEL_SERVICE_NAME"
_RESOURCE_ATTRIBUTES = b"OTEL_RESOURCE_ATTRIBUTES"


def _read_declarations(directory_fd: int) -> dict[bytes, bytes]:
    """The two variables of the environment that matter. Like getenv, the first of equal names counts."""
    found: dict[bytes, bytes] = {}
    rest = b""
    for chunk in _chunks(directory_fd, "environ", _ENVIRON_BYTES):
        *entries, rest = (rest + chunk).split(b"\0")  # an entry without its final NUL was cut, and is not used
        for entry in entries:
            if entry.startswith(b"OTEL_"):
                name, separator, value = entry.partition(b"=")
                if separator and name in (_SERVICE_NAME, _RESOURCE_ATTRIBUTES):
                    found.setdefault(name, value)
        if len(found) == 2:
            break
    return found


def _executable_path(directory_fd: int) -> str:
    try:
        target = os.readlink(b"exe", dir_fd=directory_fd)
    except OSError:  # a kernel thread, a zombie, or no permission
        return ""
    return target.removesuffix(b" (deleted)").decode("utf-8", "replace")


def _base_name(path: str) -> str:
    return path[1:] if path.startswith("/memfd:") else path.rpartition("/")[2]


def _is_named(name: str, announced: str) -> bool:
    """Whether the kernel's name, cut at 63 bytes, is that of this executable."""
    return name == announced or (len(announced) >= 31 and name.startswith(announced.rstrip("\ufffd")))


def _command_line(data: bytes) -> tuple[str, ...]:
    arguments = data.rstrip(b"\0").split(b"\0", _COMMAND_LINE_ARGUMENTS)[:_COMMAND_LINE_ARGUMENTS]
    return tuple(argument.decode("utf-8", "replace") for argument in arguments) if data else ()


def _start_ticks(stat: bytes) -> int:
    """Field 22 of ``/proc/<pid>/stat``, or -1. The name in field 2 may hold spaces and parentheses."""
    fields = stat.rpartition(b")")[2].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError):
        return -1


def _chunks(directory_fd: int, name: str, limit_bytes: int) -> Iterator[bytes]:
    """The file in pieces up to the limit; it ends where an error occurs."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError:
        return
    try:
        while limit_bytes > 0:
            chunk = os.read(fd, min(limit_bytes, _READ_CHUNK_BYTES))
            if not chunk:
                return
            limit_bytes -= len(chunk)
            yield chunk
    except OSError:
        return
    finally:
        os.close(fd)


def _read(directory_fd: int, name: str, limit_bytes: int) -> bytes:
    return b"".join(_chunks(directory_fd, name, limit_bytes))


_LANGUAGE_BY_NAME = (
    (re.compile(r"(?:python|pypy)[\d.]*(?:-dbg|[dmt]+)?"), "python"),
    (re.compile(r"node(?:js)?\d*"), "nodejs"),
    (re.compile(r"java"), "java"),
    (re.compile(r"j?ruby[\d.]*"), "ruby"),
    (re.compile(r"php(?:-fpm|-cgi)?[\d.]*"), "php"),
    (re.compile(r"dotnet"), "dotnet"),
    (re.compile(r"beam(?:\.smp)?"), "erlang"),
)
# First that it is the last component of the line, without ever going back, then that it is a library: processes choose
# the names of their mappings, and the time taken must grow only with their length.
_RUNTIME_LIBRARY = re.compile(
    rb"/lib(jvm|coreclr|python|ruby|php|node|stdc\+\+|c\+\+)(?=[^/\n]*+$)[^/\n]*?\.so", re.MULTILINE
)
_LANGUAGE_BY_LIBRARY = (
    (b"jvm", "java"),
    (b"coreclr", "dotnet"),
    (b"python", "python"),
    (b"ruby", "ruby"),
    (b"php", "php"),
    (b"node", "nodejs"),
)


def _language_of_name(name: str) -> str:
    return next((language for pattern, language in _LANGUAGE_BY_NAME if pattern.fullmatch(name)), "")


def _language(directory_fd: int, name: str, command_line: tuple[str, ...]) -> str:
    """From the cheapest to the dearest evidence: the name, the runtime's libraries, the executable's own sections."""
    language = _language_of_name(name) or (_language_of_name(_base_name(command_line[0])) if command_line else "")
    if language:
        return language
    libraries = {match[1] for match in _RUNTIME_LIBRARY.finditer(_read(directory_fd, "maps", _MAPS_BYTES))}
    for library, language in _LANGUAGE_BY_LIBRARY:
        if library in libraries:
            return language
    try:
        fd = os.open("exe", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory_fd)
    except OSError:
        language = ""
    else:
        try:
            language = language_of_elf(lambda offset, count: os.pread(fd, count, offset))
        except OSError:
            language = ""
        finally:
            os.close(fd)
    return language or ("cpp" if libraries else "")


def language_of_elf(read_at: Callable[[int, int], bytes]) -> str:
    """``go`` or ``rust`` when an executable says so, else an empty string; any bytes are safe.

    ``read_at(offset, count)`` returns at most ``count`` bytes. Go's linker writes ``.go.buildinfo`` even when symbols
    are stripped; rustc leaves its version in ``.comment``. Layouts: System V ABI, "ELF header" and "Sections".
    """
    header = read_at(0, 64)
    if len(header) < 52 or header[:4] != b"\x7fELF" or header[4] not in (1, 2) or header[5] not in (1, 2):
        return ""
    order, wide = "<>"[header[5] - 1], header[4] == 2
    if wide and len(header) < 64:
        return ""
    (table_offset,) = struct.unpack_from(order + "Q" if wide else order + "I", header, 40 if wide else 32)
    entry_size, count, names_index = struct.unpack_from(order + "3H", header, 58 if wide else 46)
    entry = struct.Struct(order + ("I20xQQ" if wide else "I12xII"))  # sh_name, sh_offset, sh_size
    if entry_size < entry.size or names_index >= count or table_offset > 2**62:
        return ""
    table = read_at(table_offset, min(entry_size * count, _ELF_TABLE_BYTES))
    sections = [entry.unpack_from(table, at) for at in range(0, len(table) - entry_size + 1, entry_size)]
    if names_index >= len(sections):
        return ""
    _, names_offset, names_size = sections[names_index]
    if names_offset > 2**62:
        return ""
    names = read_at(names_offset, min(names_size, _ELF_TABLE_BYTES))
    for name_offset, offset, size in sections:
        name = names[name_offset : names.find(b"\0", name_offset)]
        if name in (b".go.buildinfo", b".note.go.buildid"):
            return "go"
        if name == b".comment" and offset <= 2**62 and b"rustc " in read_at(offset, min(size, _ELF_COMMENT_BYTES)):
            return "rust"
    return ""
