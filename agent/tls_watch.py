"""Watches the TLS libraries of processes: attaches where one is used, takes it back when its last user is gone.

In: the processes that the kernel says use TLS, and at the start all that run. Out: probes on each file, once however
many processes use it; what cannot be watched is logged and counted. One thread does all of it, as reading a process's
memory map and attaching take milliseconds that the records must not wait for. Never: raises out of that thread, keeps
a descriptor of a process, holds more than ``MAX_FILES`` files or ``MAX_WAITING`` processes that wait, leaves no
descriptors to the rest of the agent.
"""

from __future__ import annotations

import logging
import queue
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError
from agent.file_identity import Identity
from agent.model import TlsNotice
from agent.process import ProcessInfo
from agent.telemetry import event
from agent.tls_libraries import Libraries, Library, why_unseen

_log = logging.getLogger("spanloom.tls")

MAX_FILES = 256
"""Files that are watched at a time; more are refused, and counted."""
MAX_DESCRIPTORS = 65536
"""The limit of open files is raised to this, where that is allowed. Many systems begin with 1024."""
OTHER_DESCRIPTORS = 256
"""These are not for probes but for all else that the agent opens."""
DESCRIPTORS_PER_PROBE = 2
"""Of a perf event; a link (agent.kernel.uprobes) needs one. Room is kept for the larger number on every kernel."""
MAX_REFUSED = 4096
"""Files that are remembered as not to be watched; of more, the oldest is tried again."""
MAX_WAITING = 4096
"""Processes that wait to be looked at; more are told of again by their next connection."""
MAX_USERS = 8192
"""Users that are remembered of one file. With more of them the file is kept until it is looked for everywhere."""
LOOK_SECONDS = 5.0
"""How often it is looked whether files still have users."""
_LOGGED_EXECUTABLES = 256
_LOGGED_PROCESSES = 10
_TLS_CALLS = ("on_tls_read", "on_tls_read_ex", "on_tls_write", "on_tls_write_ex", "on_tls_handshake")
_RETURNS = dict.fromkeys(_TLS_CALLS, "on_tls_return") | {"on_rust_write": "on_rust_return"}
"""Program for a call -> the one for its return."""
_GO_RETURNS = frozenset(("on_go_read_return", "on_go_write_return"))


class Probes(Protocol):
    """What is needed of ``agent.kernel.capture.Capture``."""

    def load_tls(self) -> None: ...
    def try_return(self) -> list[Any]: ...
    def watch_call(self, program: str, path: str, offset: int, *, is_return: bool) -> Any: ...
    def unwatch(self, links: Iterable[Any]) -> None: ...
    def count_watched(self, files: int, rust_files: int) -> None: ...
    def forget_tls_told(self, tgid: int) -> None: ...
    def announce_tls(self, wanted: bool) -> None: ...


def raise_descriptor_limit() -> int:
    """Raise the process's own limit of open files as far as it may. Returns how many probes there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(0, wanted - OTHER_DESCRIPTORS) // DESCRIPTORS_PER_PROBE


class _Watched:
    def __init__(self, library: Library, links: list[Any]) -> None:
        self.name = library.name
        self.links = links
        self.returns = len(_ends(library))  # so many of the links, the first ones, are where calls end
        self.is_rust = any(function.program == "on_rust_write" for function in library.functions)
        self.users: set[int] = set()
        self.unused_since: float | None = None


class TlsWatch:
    """The watched files. ``start()`` and ``stop()`` may be called in turns; the rest is for any thread.

    ``idle_seconds``: how long a file that nobody runs any more stays watched. Programs that run for a moment (curl)
    come back, and attaching anew would miss their first request. ``max_probes``: on all files together.

    For metrics: ``files`` that are watched; ``attached`` and ``detached`` count them; ``refused`` counts files that
    could not be, ``unseen`` processes whose TLS is not seen, both by reason.
    """

    def __init__(
        self, probes: Probes, libraries: Libraries, own_tgid: int, idle_seconds: float, max_probes: int
    ) -> None:
        self.idle_seconds = idle_seconds
        self.attached = 0
        self.detached = 0
        self.refused: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()
        self._probes = probes
        self._libraries = libraries
        self._own_tgid = own_tgid
        self._max_probes = max_probes
        self._watched: dict[Identity, _Watched] = {}
        self._leaving: dict[Identity, _Watched] = {}  # nobody uses them: their probes are taken off one by one
        self._refused_files: dict[Identity, str] = {}
        self._logged: dict[tuple[str, str], int] = {}
        self._waiting: queue.Queue[tuple[ProcessInfo, int] | None] = queue.Queue(MAX_WAITING)
        self._canary: list[Any] = []
        self._thread: threading.Thread | None = None  # the one that watches
        self._last: threading.Thread | None = None  # it, or the one before, which may still be taking probes back
        self._ends = threading.Event()  # set when the thread at hand is to end
        self.has_begun = threading.Event()

    @property
    def files(self) -> int:
        return len(self._watched) + len(self._leaving)

    def start(self) -> None:
        """Begin soon, in a thread: loading the probes takes a second or two. ``has_begun`` is set when that is over."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.has_begun.clear()
        self._ends = threading.Event()
        arguments = self._last, self._ends
        self._thread = self._last = threading.Thread(target=self._run, args=arguments, name="tls", daemon=True)
        self._thread.start()

    def _begin(self) -> bool:
        """Watch what well-known programs that run now use. False when TLS cannot be traced here.

        Of other programs it is not known whether they switch stacks, until the kernel tells of their first TLS bytes.
        """
        try:
            self._probes.load_tls()
            self._canary = self._probes.try_return()
        except SpanloomError as error:
            kinds = {KernelUnsupportedError: "unsafe", PrivilegeError: "privilege"}
            self.refused[kinds.get(type(error), "attach")] += 1
            event(_log, "tls_off", level=logging.WARNING, message=str(error))
            return False
        for tgid in self._libraries.processes():
            if tgid != self._own_tgid and self._libraries.stays_on_its_stack(tgid):
                for library in self._libraries.shared(tgid) or ():
                    self._use(library, tgid)
        event(_log, "tls_on", files=self.files)
        return True

    def stop(self, wait_seconds: float = 0.0) -> bool:
        """Take all probes back, in the thread that watched. May be called twice.

        Waits at most so long and returns whether it is over. The verifier may be at the programs still: that ends by
        itself, or with the process.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ends.set()
            while True:
                try:
                    self._waiting.put_nowait(None)
                    break
                except queue.Full:
                    self._drop_one()
        if self._last is None:
            return True
        self._last.join(wait_seconds)
        return not self._last.is_alive()

    def look_at(self, info: ProcessInfo, notice: int) -> None:
        """A process uses TLS: it is looked at soon. ``notice`` is a number of ``TlsNotice``."""
        if self._thread is None or info.key[0] == self._own_tgid:
            return
        try:
            self._waiting.put_nowait((info, notice))
        except queue.Full:
            self._probes.forget_tls_told(info.key[0])

    def _drop_one(self) -> bool:
        try:
            self._waiting.get_nowait()
        except queue.Empty:
            return False
        return True

    def _run(self, before: threading.Thread | None, ends: threading.Event) -> None:
        if before is not None:
            before.join()
        try:
            if not ends.is_set():
                self._probes.announce_tls(True)  # who is told of before the probes are there is looked at then
            may_go_on = not ends.is_set() and self._begin()
        except Exception:
            self.refused["error"] += 1
            _log.exception("tls_failed")
            may_go_on = False
        self.has_begun.set()
        if may_go_on:
            self._follow(ends)
        self._take_back()

    def _take_back(self) -> None:
        self._probes.announce_tls(False)
        self._release(*self._watched, *self._leaving)
        self._probes.unwatch(self._canary)
        self._canary = []
        while self._drop_one():
            pass

    def _follow(self, ends: threading.Event) -> None:
        """Go on with what is told of, until the end."""
        look_at = time.monotonic() + LOOK_SECONDS
        survey: Iterator[int] | None = iter(list(self._libraries.processes()))
        while not ends.is_set():
            try:
                if survey is not None and self._waiting.empty():
                    survey = self._survey(survey)
                elif self._leaving and self._waiting.empty():
                    self._take_one_back()
                else:
                    told = self._waiting.get(timeout=max(0.0, look_at - time.monotonic()))
                    if told is None:
                        return
                    self._examine(*told)
            except queue.Empty:
                pass
            except Exception:  # a process that nobody foresaw must not end the watch over all others
                self.unseen["error"] += 1
                _log.exception("tls_failed")
            if time.monotonic() >= look_at:
                self._look_for_users()
                look_at = time.monotonic() + LOOK_SECONDS

    def _survey(self, processes: Iterator[int]) -> Iterator[int] | None:
        """Watch the next program with Go's TLS or rustls that ran before the agent; None when there are no more.

        Its first connection would tell of it, but the request that comes with that one is over before the probes are
        there. Those who are told of meanwhile come first.
        """
        for tgid in processes:
            library = self._libraries.with_own_tls(tgid) if tgid != self._own_tgid else None
            if library is not None:
                self._use(library, tgid)
                return processes
        return None

    def _examine(self, info: ProcessInfo, notice: int) -> None:
        tgid = info.key[0]
        found = self._libraries.shared(tgid)
        if found is None:
            self._report(info, "privilege" if self._libraries.is_closed(tgid) else "gone")
            return
        if not found or info.language in ("go", "rust"):  # which may use a library beside their own TLS
            executable = self._libraries.executable(tgid)
            if executable is not None and executable.reason == "go_no_tls" and found:
                executable.close()
            elif executable is not None:
                found.append(executable)
        if not found:
            # The executable of a process that has ended cannot be read; one that goes on may have loaded more.
            found = self._libraries.shared(tgid)
            if not found:
                closed = found is not None and self._libraries.is_closed(tgid)
                self._report(info, "privilege" if closed else "gone" if found is None else why_unseen(info))
                return
        is_unsafe = notice == TlsNotice.OTHER_STACK
        for library in found:
            reason = self._use(library, tgid, is_unsafe)
            if reason:
                self._report(info, reason)

    def _use(self, library: Library, tgid: int, is_unsafe: bool = False) -> str:
        """Watch a file that a process uses, and close it. Returns why not, or an empty string.

        Probes are on the file, whoever runs it: one process that they could crash keeps them off for all.
        """
        try:
            if library.reason:
                return library.reason
            if _has_returns(library) and (is_unsafe or self._libraries.switches_stacks(tgid)):
                self._refuse(library, "stacks", "a process that runs it switches stacks")
            return self._watch(library, tgid)
        finally:
            library.close()

    def _refuse(self, library: Library, reason: str, message: str) -> None:
        """Watch a file no more, and not again."""
        if self._refused_files.get(library.identity) == reason:
            return
        if len(self._refused_files) >= MAX_REFUSED:
            self._refused_files.pop(next(iter(self._refused_files)))
        self._refused_files[library.identity] = reason
        self.refused[reason] += 1
        event(_log, "tls_refused", level=logging.WARNING, library=library.name, reason=reason, message=message)
        if library.identity in self._watched or library.identity in self._leaving:
            self._release(library.identity)

    def _watch(self, library: Library, tgid: int) -> str:
        watched = self._watched.get(library.identity)
        if watched is None:
            reason = self._refused_files.get(library.identity, "")
            if reason:
                return reason
            if library.identity in self._leaving:
                self._release(library.identity)  # with two probes on a function each call would be seen twice
            probes = sum(len(one.links) for one in (*self._watched.values(), *self._leaving.values()))
            probes += _probes_on(library)
            if self.files >= MAX_FILES or probes > self._max_probes:
                self.refused["too_many"] += 1
                return "too_many"
            try:
                links = self._attach(library)
            except SpanloomError as error:
                self._refuse(library, "attach", str(error))
                return "attach"
            watched = self._watched[library.identity] = _Watched(library, links)
            self.attached += 1
            self._count_watched()
            event(_log, "tls_attached", library=library.name, functions=len(library.functions), pid=tgid)
        watched.unused_since = None
        if len(watched.users) < MAX_USERS:
            watched.users.add(tgid)
        return ""

    def _attach(self, library: Library) -> list[Any]:
        """Ends come first: a call whose beginning was seen is one whose end will be."""
        links: list[Any] = []
        try:
            for program, offset, is_return in _ends(library):
                links.append(self._probes.watch_call(program, library.path, offset, is_return=is_return))
            for function in library.functions:
                if function.program not in _GO_RETURNS:
                    links.append(
                        self._probes.watch_call(function.program, library.path, function.offset, is_return=False)
                    )
        except BaseException:
            self._probes.unwatch(links)
            raise
        return links

    def _look_for_users(self) -> None:
        """Let go of files that nobody has run for ``idle_seconds``."""
        now = time.monotonic()
        unused = set()
        for identity, watched in self._watched.items():
            while watched.users:
                tgid = next(iter(watched.users))
                if identity in self._libraries.files(tgid):
                    break
                watched.users.discard(tgid)
            if watched.users:
                continue
            if watched.unused_since is None:
                watched.unused_since = now
            elif now - watched.unused_since >= self.idle_seconds:
                unused.add(identity)
        if not unused:
            return
        # Before they go, all processes are asked: one may run a file and never have been told of.
        for tgid in self._libraries.processes():
            for identity in unused & self._libraries.files(tgid) if tgid != self._own_tgid else ():
                unused.discard(identity)
                self._watched[identity].users.add(tgid)
                self._watched[identity].unused_since = None
        for identity in unused:
            self._leaving[identity] = self._watched.pop(identity)

    def _take_one_back(self) -> None:
        """One probe of a file that is let go. The kernel takes up to 0.1 s for each, and whoever begins to use TLS
        meanwhile must not wait for hundreds of them.
        """
        identity, watched = next(iter(self._leaving.items()))
        self._probes.unwatch([watched.links.pop()])  # beginnings first, see _release()
        if not watched.links:
            del self._leaving[identity]
            self._count_detached(watched)

    def _release(self, *identities: Identity) -> None:
        """Take all their probes back now."""
        released = [self._watched.pop(one, None) or self._leaving.pop(one) for one in identities]
        # A return whose call's beginning was not seen is ignored; a beginning without a return is held for a call that
        # goes on. So beginnings go first.
        self._probes.unwatch(link for watched in released for link in watched.links[watched.returns :])
        self._probes.unwatch(link for watched in released for link in watched.links[: watched.returns])
        self._count_detached(*released)

    def _count_watched(self) -> None:
        rust_files = sum(watched.is_rust for watched in (*self._watched.values(), *self._leaving.values()))
        self._probes.count_watched(self.files, rust_files)

    def _count_detached(self, *released: _Watched) -> None:
        self.detached += len(released)
        self._count_watched()
        for watched in released:
            event(_log, "tls_detached", library=watched.name)

    def _report(self, info: ProcessInfo, reason: str) -> None:
        """Say once of a process that its TLS is not seen; of one executable, for its first few processes."""
        self.unseen[reason] += 1
        known_as = info.executable_path or info.executable_name, reason
        count = self._logged[known_as] = self._logged.get(known_as, 0) + 1
        if len(self._logged) > _LOGGED_EXECUTABLES:
            self._logged.pop(next(iter(self._logged)))
        if count <= _LOGGED_PROCESSES and reason != "gone":
            event(
                _log,
                "tls_not_seen",
                level=logging.WARNING,
                executable=info.executable_name,
                pid=info.key[0],
                service=info.service_name,
                reason=reason,
            )


def _probes_on(library: Library) -> int:
    return len(_ends(library)) + sum(function.program not in _GO_RETURNS for function in library.functions)


def _has_returns(library: Library) -> bool:
    """Of calls that may leave a stack for another one half-way. What is watched of rustls calls nothing."""
    return any(function.program in _TLS_CALLS for function in library.functions)


def _ends(library: Library) -> list[tuple[str, int, bool]]:
    """Where calls end: program, offset, and whether it is the return of the function there. In Go code it is an
    instruction like any other.
    """
    ends = []
    for function in library.functions:
        if function.program in _RETURNS:
            ends.append((_RETURNS[function.program], function.offset, True))
        elif function.program in _GO_RETURNS:
            ends.append((function.program, function.offset, False))
    return ends
