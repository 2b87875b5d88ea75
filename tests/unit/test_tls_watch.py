"""agent.tls_watch: processes and libraries of doubles -> what is attached, taken back and refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from agent import tls_watch
from agent.errors import KernelUnsupportedError, PrivilegeError, SpanloomError
from agent.model import TlsNotice
from agent.process import ProcessInfo
from agent.tls_libraries import Function, Library
from agent.tls_watch import TlsWatch

READ, WRITE, FREE = Function("on_tls_read", 16), Function("on_tls_write", 32), Function("on_tls_free", 48)
GO = (
    Function("on_go_read", 16),
    Function("on_go_write", 32),
    Function("on_go_read_return", 20),
    Function("on_go_write_return", 40),
)


class Probes:
    """A kernel that attaches what is wanted, until it is told to refuse."""

    def __init__(self) -> None:
        self.links: list[tuple[str, int, bool]] = []
        self.taken_back: list[tuple[str, int, bool]] = []
        self.holds: threading.Semaphore | None = None  # it is waited for each time that something is taken back
        self.refuses: SpanloomError | None = None
        self.refuses_all: SpanloomError | None = None
        self.watched = 0
        self.announces = False
        self.told_again: list[int] = []

    def load_tls(self) -> None:
        """They are always there."""

    def try_return(self) -> list[tuple[str, int, bool]]:
        if self.refuses_all is not None:
            raise self.refuses_all
        return []

    def watch_call(self, program: str, path: str, offset: int, *, is_return: bool) -> tuple[str, int, bool]:
        if self.refuses is not None and not is_return:
            raise self.refuses
        link = program, offset, is_return
        self.links.append(link)
        return link

    def unwatch(self, links: Iterable[tuple[str, int, bool]]) -> None:
        for link in links:
            self.links.remove(link)
            self.taken_back.append(link)
            if self.holds is not None:
                self.holds.acquire(timeout=20)

    def count_watched(self, files: int, rust_files: int) -> None:
        self.watched, self.watched_rust = files, rust_files

    def forget_tls_told(self, tgid: int) -> None:
        self.told_again.append(tgid)

    def announce_tls(self, wanted: bool) -> None:
        self.announces = wanted


class Libraries:
    """Which process maps which file; a file is a number."""

    def __init__(self) -> None:
        self.mapped: dict[int, list[int]] = {}
        self.go: dict[int, str] = {}  # executables of Go programs, numbered as their processes: why not, or ""
        self.switching: set[int] = set()
        self.closed: set[int] = set()
        self.unknown: set[int] = set()
        self.loaded_next: dict[int, list[int]] = {}  # what processes load behind the next look at them
        self.ends_next: set[int] = set()  # processes that end behind it

    def processes(self) -> Iterator[int]:
        return iter(list(self.mapped | self.go))

    def shared(self, tgid: int) -> list[Library] | None:
        if tgid not in self.mapped and tgid not in self.go:
            return None
        mapped = self.mapped.get(tgid, [])
        if tgid in self.loaded_next:
            self.mapped[tgid] = self.loaded_next.pop(tgid)
        if tgid in self.ends_next:
            self.ends_next.discard(tgid)
            del self.mapped[tgid]
        return [
            Library((1, file), os.open("/dev/null", os.O_RDONLY), f"lib{file}", (READ, WRITE, FREE)) for file in mapped
        ]

    def is_closed(self, tgid: int) -> bool:
        return tgid in self.closed

    def executable(self, tgid: int) -> Library | None:
        if tgid not in self.go:
            return None
        reason = self.go[tgid]
        descriptor = os.open("/dev/null", os.O_RDONLY)
        return Library((2, tgid), descriptor, f"go{tgid}", () if reason else GO, reason)

    with_own_tls = executable

    def stays_on_its_stack(self, tgid: int) -> bool:
        return tgid not in self.unknown

    def switches_stacks(self, tgid: int) -> bool:
        return tgid in self.switching

    def files(self, tgid: int) -> set[tuple[object, ...]]:
        executable = {(2, tgid)} if tgid in self.go else set()
        return executable | {(1, file) for file in self.mapped.get(tgid, ())}


def wait_until(condition: Callable[[], object]) -> None:
    """The thread does something soon."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def process(tgid: int, language: str = "") -> ProcessInfo:
    return ProcessInfo((tgid, 1), f"program{tgid}", f"/{tgid}", (), language, "", (), True)


class Bench:
    def __init__(self) -> None:
        self.probes, self.libraries = Probes(), Libraries()
        self.watch = TlsWatch(self.probes, self.libraries, own_tgid=1, idle_seconds=0, max_probes=1000)

    def start(self) -> None:
        self.watch.start()
        assert self.watch.has_begun.wait(20)

    def tell(self, tgid: int, notice: TlsNotice = TlsNotice.UNWATCHED, language: str = "") -> None:
        self.watch.look_at(process(tgid, language), notice)

    def look(self) -> None:
        """Twice: a file that has no users is let go when it still has none. Then its probes go."""
        self.watch._look_for_users()
        self.watch._look_for_users()
        while self.watch._leaving:
            self.watch._take_one_back()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(tls_watch, "LOOK_SECONDS", 3600.0)  # the test looks itself
    made = Bench()
    before = len(os.listdir("/proc/self/fd"))
    yield made
    made.watch.stop(30)
    assert made.probes.links == []
    assert made.probes.watched == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_is_watched_once_however_many_run_it(bench: Bench):
    """From the start, and for processes that are told of later; the agent itself is passed over."""
    bench.libraries.mapped = {1: [9], 10: [5], 11: [5]}
    bench.start()
    assert bench.watch.files == bench.probes.watched == 1
    bench.libraries.mapped[12] = [5, 6]
    bench.tell(12)
    wait_until(lambda: bench.watch.files == 2)
    assert bench.watch.attached == 2
    assert len(bench.probes.links) == 2 * (3 + 2)


def test_what_a_little_known_program_runs_is_not_watched_before_its_first_bytes(bench: Bench):
    """It may be one that switches stacks: the kernel tells with them."""
    bench.libraries.mapped = {10: [5], 11: [6]}
    bench.libraries.unknown = {11}
    bench.start()
    assert bench.watch.files == 1
    bench.tell(11)
    wait_until(lambda: bench.watch.files == 2)


def test_returns_come_first_and_go_last(bench: Bench):
    """A beginning that is seen is one whose end will be."""
    bench.libraries.mapped = {10: [5]}
    bench.start()
    assert [link[2] for link in bench.probes.links] == [True, True, False, False, False]
    bench.watch.stop(30)
    assert [link[2] for link in bench.probes.taken_back] == [False, False, False, True, True]


def test_a_file_is_let_go_with_its_last_user(bench: Bench):
    """Not before; and not when somebody runs it who was never told of."""
    bench.libraries.mapped = {10: [5], 11: [5]}
    bench.start()
    del bench.libraries.mapped[10]
    bench.look()
    assert bench.watch.files == 1
    bench.libraries.mapped[12] = bench.libraries.mapped.pop(11)
    bench.look()
    assert bench.watch.files == 1
    bench.libraries.mapped.clear()
    bench.look()
    assert (bench.watch.files, bench.watch.detached, bench.probes.links) == (0, 1, [])


def test_who_uses_tls_does_not_wait_for_files_that_are_let_go(bench: Bench):
    """Their probes go one by one, while nobody waits: beginnings first."""
    bench.libraries.mapped = {10: list(range(50))}
    bench.start()
    bench.libraries.mapped = {11: [60]}
    taking = bench.probes.holds = threading.Semaphore(0)
    bench.watch._look_for_users()
    bench.watch._look_for_users()
    bench.tell(11)
    wait_until(lambda: bench.watch.attached == 51 and bench.probes.taken_back)
    bench.libraries.mapped[12] = [61]
    bench.tell(12)
    taking.release()
    wait_until(lambda: bench.watch.attached == 52)
    assert len(bench.probes.taken_back) <= 2
    taking.release(1000)
    wait_until(lambda: bench.watch.detached == 50)
    assert bench.watch.files == 2
    assert [is_return for *_, is_return in bench.probes.taken_back] == [False, False, False, True, True] * 50


def test_a_file_that_is_used_again_while_it_is_let_go(bench: Bench):
    """It is never watched twice."""
    bench.libraries.mapped = {10: [5]}
    bench.start()
    del bench.libraries.mapped[10]
    bench.watch._look_for_users()
    bench.watch._look_for_users()
    bench.watch._take_one_back()
    assert (bench.watch.files, len(bench.probes.links)) == (1, 4)
    bench.libraries.mapped[11] = [5]
    bench.tell(11)
    wait_until(lambda: bench.watch.attached == 2)
    assert (bench.watch.files, bench.watch.detached, len(bench.probes.links)) == (1, 1, 5)


def test_one_process_that_switches_stacks_keeps_probes_off(bench: Bench):
    """At once and for good, for all that run the file; others are not concerned."""
    bench.libraries.mapped = {10: [5], 11: [6]}
    bench.start()
    bench.libraries.mapped[12] = [5]
    bench.tell(12, TlsNotice.OTHER_STACK)
    wait_until(lambda: bench.watch.files == 1)
    bench.libraries.mapped[13] = [5]
    bench.tell(13)
    wait_until(lambda: bench.watch.unseen["stacks"] == 2)
    assert bench.watch.files == 1
    assert bench.watch.refused == {"stacks": 1}


def test_what_is_known_to_switch_stacks_is_never_watched(bench: Bench):
    """By its libraries or its executable."""
    bench.libraries.mapped = {10: [5]}
    bench.libraries.switching = {10}
    bench.start()
    assert (bench.watch.files, bench.watch.refused, bench.probes.taken_back) == (0, {"stacks": 1}, [])


def test_a_refusal_leaves_nothing_attached(bench: Bench):
    """What was attached before it is taken back, the file is not tried again, and its processes are counted."""
    bench.probes.refuses = SpanloomError("no")
    bench.libraries.mapped = {10: [5], 11: [5]}
    bench.start()
    assert (bench.watch.files, bench.probes.links, bench.watch.refused) == (0, [], {"attach": 1})
    bench.tell(11)
    wait_until(lambda: bench.watch.unseen["attach"] == 1)
    assert len(bench.probes.taken_back) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KernelUnsupportedError("x"), "unsafe"), (PrivilegeError("x"), "privilege"), (SpanloomError("x"), "attach")],
)
def test_where_return_probes_do_not_work_nothing_is_watched(error: SpanloomError, reason: str, bench: Bench):
    """The kernel is not even asked to tell of processes."""
    bench.probes.refuses_all = error
    bench.libraries.mapped = {10: [5]}
    bench.start()
    bench.tell(10)
    assert (bench.watch.files, bench.watch.refused, bench.probes.announces) == (0, {reason: 1}, False)


def test_what_cannot_be_seen_is_counted_by_reason(bench: Bench):
    """Of each process, once it was looked at."""
    bench.libraries.mapped = {10: [], 11: [], 13: []}
    bench.libraries.closed = {13, 14}
    bench.start()
    bench.tell(10, language="java")
    for tgid in (11, 12, 13, 14):
        bench.tell(tgid)
    wait_until(lambda: sum(bench.watch.unseen.values()) == 5)
    assert bench.watch.unseen == {"java": 1, "no_symbols": 1, "gone": 1, "privilege": 2}


def test_a_library_that_is_loaded_while_its_process_is_looked_at_is_watched(bench: Bench):
    """The process is asked twice before it is said that nothing is seen of it."""
    bench.start()
    bench.libraries.mapped = {10: []}
    bench.libraries.loaded_next = {10: [5]}
    bench.tell(10)
    wait_until(lambda: bench.watch.files == 1)
    assert not bench.watch.unseen


def test_what_ends_while_it_is_looked_at_leaves_nothing(bench: Bench):
    """Its file is watched, as others may run it soon, and let go when nobody does."""
    bench.start()
    for number in range(20):
        bench.libraries.mapped[10] = [number]
        bench.libraries.ends_next = {10}
        bench.tell(10)
        wait_until(lambda number=number: bench.watch.attached == number + 1)
    assert bench.watch.files == 20
    bench.look()
    assert (bench.watch.files, bench.watch.detached, bench.probes.links) == (0, 20, [])


def test_more_files_than_the_bound_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """And counted."""
    monkeypatch.setattr(tls_watch, "MAX_FILES", 2)
    bench.libraries.mapped = {10: [1, 2, 3, 4]}
    bench.start()
    assert (bench.watch.files, bench.watch.refused) == (2, {"too_many": 2})


def test_more_probes_than_the_bound_are_refused(bench: Bench):
    """Files whose probes do not fit any more, whatever others may fit; and counted."""
    bench.watch._max_probes = 12
    bench.libraries.mapped = {10: [1, 2, 3]}
    bench.libraries.go = {11: ""}
    bench.start()
    wait_until(lambda: bench.watch.refused["too_many"] == 2)
    assert (bench.watch.files, len(bench.probes.links)) == (2, 10)


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "probes"),
    [(100, 100, 100, 0), (100, 1256, 1256, 500), (300, 300, 300, 22), (1024, 2**20, 65536, 32640)],
)
def test_the_limit_of_open_files(soft: int, hard: int, raised: int, probes: int):
    """It is raised as far as it may be, and what others need is not for probes."""
    program = f"""
import resource
from agent.tls_watch import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    hardest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hardest != resource.RLIM_INFINITY and hard > hardest:
        hard, raised = hardest, min(hardest, 65536)
        program, probes = program.replace(str(2**20), str(hardest)), (raised - 256) // 2
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == [str(probes), str(raised), str(hard)], told.stderr


def test_off_and_on_and_off_again(bench: Bench):
    """Each turn waits for the one before, however quickly they follow; at the end nothing is attached."""
    bench.libraries.mapped = {10: [5]}
    for _ in range(20):
        bench.watch.start()
        bench.watch.stop()
    bench.watch.stop(30)
    assert (bench.probes.links, bench.probes.announces, bench.watch.files) == ([], False, 0)
    bench.start()
    assert bench.watch.files == 1


def test_more_processes_than_can_wait_are_told_of_again(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The kernel forgets that it told of them."""
    monkeypatch.setattr(tls_watch, "MAX_WAITING", 1)
    full = Bench()
    full.watch._thread = bench  # nobody takes what waits
    full.tell(10)
    full.tell(11)
    assert full.probes.told_again == [11]


def test_go_programs_are_watched_from_the_start_without_return_probes(bench: Bench):
    """Where their calls return is watched first and let go last, by instructions; whatever stacks they run on."""
    bench.libraries.go = {10: ""}
    bench.libraries.switching = bench.libraries.unknown = {10}
    bench.start()
    wait_until(lambda: bench.watch.files == 1)
    assert [link[:2] for link in bench.probes.links] == [
        ("on_go_read_return", 20),
        ("on_go_write_return", 40),
        ("on_go_read", 16),
        ("on_go_write", 32),
    ]
    assert not any(is_return for *_, is_return in bench.probes.links)
    bench.tell(10, TlsNotice.OTHER_STACK, language="go")
    wait_until(lambda: bench.watch._waiting.empty())
    bench.libraries.go.clear()
    bench.look()
    assert {link[0] for link in bench.probes.taken_back[2:]} == {"on_go_read_return", "on_go_write_return"}
    assert not bench.watch.refused


def test_a_go_program_may_use_a_library_as_well(bench: Bench):
    """Both are watched; one without TLS of its own is not reported for that."""
    bench.libraries.unknown = {10, 11}
    bench.start()
    bench.libraries.mapped = {10: [5], 11: [5]}
    bench.libraries.go = {10: "", 11: "go_no_tls"}
    bench.tell(10, language="go")
    wait_until(lambda: bench.watch.files == 2)
    bench.tell(11, language="go")
    bench.libraries.go[12] = "go_old"
    bench.tell(12, language="go")
    wait_until(lambda: bench.watch.unseen)
    assert bench.watch.unseen == {"go_old": 1}
