"""TLS libraries that come and go: programs that end early, files that are replaced, many processes, containers. Nothing
is left of them in the agent or in the kernel, whose probes live as long as the agent's descriptors of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.harness import AgentProcess, Process, curl, free_port, show, wait_until
from tests.e2e.servers import APPS
from tests.e2e.test_tls import SYSTEM_PYTHON, nginx, open_files, own_library, wait_for_libraries
from tests.e2e.tls_any import ClientFactory

OPENSSL = next(Path("/usr/lib").glob("*-linux-gnu/libssl.so.3"))
OWN = "libssl-churn.so"
"""No other program's library is called this."""
LINK, PERF_EVENT = "anon_inode:bpf_link", "anon_inode:[perf_event]"
"""Each probe is one of the first, and before Linux 6.6 one of the second, too."""


class Watching:
    """An agent that watches a server over TLS, and what it holds for libraries of the name ``OWN``.

    Other programs of this machine come and go with theirs, which the agent's log tells apart.
    """

    def __init__(self, tracing: AgentProcess, port: int) -> None:
        wait_for_libraries(tracing)
        tracing.settle()
        self.tracing, self.port = tracing, port
        self._others = self._probes_of_others()
        self._open = open_files(tracing)

    def _events(self, name: str) -> list[dict[str, Any]]:
        lines = (line for line in self.tracing.stderr().splitlines() if f'"event":"{name}"' in line)
        return [json.loads(line) for line in lines]

    def _probes_of_others(self) -> int:
        """On each function, and where calls return; none is for what frees. Go's functions are given with theirs."""
        functions = {one["library"]: one["functions"] for one in self._events("tls_attached")}
        watched = Counter(one["library"] for one in self._events("tls_attached"))
        watched.subtract(one["library"] for one in self._events("tls_detached"))
        probes = {name: 2 * count - 1 if name.startswith("lib") else count for name, count in functions.items()}
        return sum(count * probes[name] for name, count in watched.items() if name != OWN)

    @property
    def attached(self) -> int:
        """Files, since the beginning."""
        return sum(one["library"] == OWN for one in self._events("tls_attached"))

    @property
    def files(self) -> int:
        """That are watched now."""
        return self.attached - sum(one["library"] == OWN for one in self._events("tls_detached"))

    @property
    def probes(self) -> int:
        """On these files."""
        return open_files(self.tracing)[LINK] - self._open[LINK] - self._probes_of_others() + self._others

    def wait_for_attached(self, count: int) -> None:
        """And for nothing else to be under way."""
        wait_until(
            lambda: self.attached == count and self.probes > 0,
            lambda: f"{count} files were attached{self.tracing.state()}",
        )

    def wait_for_files(self, count: int) -> None:
        wait_until(lambda: self.files == count, lambda: f"{count} files are watched{self.tracing.state()}", 120)

    def assert_nothing_left(self) -> None:
        """No file is watched, no probe and no file of theirs is open."""
        self.wait_for_files(0)

        def left() -> Counter[str]:
            allowed = self._open.copy()
            others = max(0, self._probes_of_others() - self._others)
            allowed.update({LINK: others, PERF_EVENT: others})
            return open_files(self.tracing) - allowed

        wait_until(lambda: not left(), lambda: f"{left()} are closed{self.tracing.state()}")

    def asked(self, name: str) -> Counter[tuple[str, str]]:
        """The spans of requests whose path begins with the name: kind and path."""
        self.tracing.settle()
        spans = [(span.kind, span.attributes.get("url.path") or span.attributes["url.full"]) for span in self.spans()]
        paths = [(kind, f"/{path.rpartition('/')[2].partition('?')[0]}") for kind, path in spans]
        return Counter((kind, path) for kind, path in paths if path.startswith(f"/{name}"))

    def spans(self) -> list[CollectedSpan]:
        return self.tracing.spans(self.port)


@pytest.fixture
def watching(tls_agent, serve, public_path: Path, pem: Path) -> Watching:
    """Probes go with the last user of a file; nginx serves, whatever it is asked for."""
    port = free_port()
    tracing = tls_agent([port], {"capture.tls_idle_seconds": 0})
    serve(nginx(port, public_path, pem, extra="location / { return 200 hello; }"), port)
    return Watching(tracing, port)


def copy_of_library(directory: Path) -> Path:
    """A file that nobody else uses."""
    directory.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(OPENSSL, directory / OWN))


def both_ends(name: str, count: int) -> Counter[tuple[str, str]]:
    return Counter({("CLIENT", f"/{name}"): count, ("SERVER", f"/{name}"): count})


def test_containers_of_one_image_share_the_probes(watching: Watching, tls_client: ClientFactory, public_path: Path):
    """Each has a file system of its own, laid over the same files: probes are on the file below, once, and every
    request is seen once.
    """
    for name in ("lower", *(f"{part}{number}" for part in ("upper", "work", "merged") for number in range(3))):
        (public_path / name).mkdir()
    copy_of_library(public_path / "lower")
    containers = []
    for number in range(3):
        merged = public_path / f"merged{number}"
        layers = f"lowerdir={public_path}/lower,upperdir={public_path}/upper{number},workdir={public_path}/work{number}"
        script = f'mount -t overlay -o {layers} overlay {merged} && exec "$@"'
        containers.append(tls_client(merged / OWN, watching.port, ("unshare", "-m", "sh", "-c", script, "sh")))
    for number, container in enumerate(containers):
        container.ask("/early")
        if number == 0:
            watching.wait_for_attached(1)
            probes = watching.probes
    watching.tracing.settle()
    for container in containers:
        container.ask(*["/later"] * 5)
    assert watching.asked("later") == both_ends("later", 15), show(watching.spans()) + watching.tracing.state()
    assert (watching.probes, watching.files) == (probes, 1)
    for container in containers:
        container.end()
    watching.assert_nothing_left()


def resident_bytes(tracing: AgentProcess) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{tracing.pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def kernel_bytes(tracing: AgentProcess) -> int:
    """Of the agent's maps, as the kernel tells (since Linux 6.4 by what is in them)."""
    directory = Path(f"/proc/{tracing.pid}/fdinfo")
    told = (
        re.search(r"map_type:.*^memlock:\s*(\d+)", one.read_text(), re.DOTALL | re.MULTILINE)
        for one in directory.iterdir()
    )
    return sum(int(found[1]) for found in told if found)


def test_a_library_is_watched_while_it_has_users(watching: Watching, public_path: Path, pem: Path):
    """Python with a library of its own is seen; when it ends, the probes are taken back. The file may be replaced on
    disk meanwhile.
    """
    rounds = 10
    for number in range(rounds):
        library = public_path / f"library-{number}"
        environment = own_library(library, OWN)
        command = [SYSTEM_PYTHON, APPS / "tls_client.py", str(watching.port), pem, "3", "again"]
        log = public_path / f"client-{number}.log"
        with Process(command, log=log, env=environment, stdin=subprocess.PIPE) as client:
            wait_until(lambda client=client: client.output().count("200") == 3, client.output)
            watching.wait_for_attached(number + 1)
            (library / OWN).unlink()
            (library / OWN).write_bytes(b"another version")
            client.popen.communicate(b"\n", timeout=30)
            assert client.popen.returncode == 0, client.output()
    watching.tracing.settle()
    urls = [span.attributes.get("url.full", "") for span in watching.spans()]
    assert sum("id=again-" in url for url in urls) == 3 * rounds, show(watching.spans()) + watching.tracing.state()
    assert sum(span.kind == "SERVER" for span in watching.spans()) == 6 * rounds
    watching.assert_nothing_left()


def test_a_thousand_starts_and_ends_leave_nothing(
    watching: Watching, tls_any: Path, tls_client: ClientFactory, public_path: Path
):
    """Of programs that make one request, or end within their handshake; every fortieth has a library of its own,
    which is removed.
    """
    shared = copy_of_library(public_path / "shared")

    def run(library: Path, lines: str) -> None:
        done = subprocess.run(
            [tls_any, library, str(watching.port)], input=lines.encode(), capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, b"")

    def start_and_end(count: int) -> None:
        for number in range(count):
            lines = "leave\n" if number % 4 == 3 else "/short\n"
            if number % 80 not in (0, 43):
                run(shared, lines)
                continue
            own = copy_of_library(public_path / "own")
            run(own, lines)
            own.unlink()

    start_and_end(200)
    watching.tracing.settle()
    watching.assert_nothing_left()
    before, in_kernel = resident_bytes(watching.tracing), kernel_bytes(watching.tracing)
    start_and_end(800)
    watching.tracing.settle()
    watching.assert_nothing_left()
    assert kernel_bytes(watching.tracing) - in_kernel < 32 << 10
    # What is remembered of a process is a part of this; a file that stays watched, or read, is much more.
    assert resident_bytes(watching.tracing) - before < 8 << 20
    attached = watching.attached
    assert attached > 2, watching.tracing.state()
    # It is as good as new.
    late = tls_client(copy_of_library(public_path / "late"), watching.port)
    late.ask("/early")
    watching.wait_for_attached(attached + 1)
    late.ask("/late")
    assert watching.asked("late") == both_ends("late", 1)


def test_500_processes_share_the_probes_of_a_library(watching: Watching, tls_client: ClientFactory, public_path: Path):
    """At the same time, each with a connection of its own: every request is seen from both ends."""
    parent = tls_client(copy_of_library(public_path / "shared"), watching.port)
    parent.ask("/early")
    watching.wait_for_attached(1)
    probes = watching.probes
    parent.ask("fork 500 /many", answers=500)
    assert watching.asked("many") == both_ends("many", 500), watching.tracing.state()
    assert (watching.probes, watching.files) == (probes, 1)
    parent.end()
    watching.assert_nothing_left()


def test_a_library_is_replaced_by_an_upgrade(watching: Watching, tls_client: ClientFactory, public_path: Path):
    """As package managers do it: by renaming another file over it. Who runs the old one goes on being seen, and its
    probes go with the last of them; who starts later is seen by the new one.
    """
    library = copy_of_library(public_path / "library")
    older = tls_client(library, watching.port)
    older.ask("/early")
    watching.wait_for_attached(1)
    probes = watching.probes
    copy_of_library(public_path / "upgrade").rename(library)
    newer = tls_client(library, watching.port)
    newer.ask("/early")
    watching.wait_for_attached(2)
    watching.wait_for_files(2)
    older.ask("/old")
    newer.ask("/new")
    assert watching.asked("old") == both_ends("old", 1), watching.tracing.state()
    assert watching.asked("new") == both_ends("new", 1), watching.tracing.state()
    older.end()
    watching.wait_for_files(1)
    wait_until(lambda: watching.probes == probes, lambda: f"{watching.probes} probes, of {probes} for a file")
    newer.ask("/newer")
    assert watching.asked("newer") == both_ends("newer", 1), watching.tracing.state()
    newer.end()
    watching.assert_nothing_left()


def test_a_container_whose_file_system_is_read_only(watching: Watching, tls_client: ClientFactory, public_path: Path):
    """Nothing of it can be written, and its library is where no other process sees it."""
    inside = public_path / "inside"
    inside.mkdir()
    script = f"""
mount -t tmpfs tmpfs {inside} && cp {OPENSSL} {inside}/{OWN} && mount -o remount,ro {inside} &&
mount -o remount,ro,bind / && ! touch {inside}/new {public_path}/new 2>&- && exec "$@"
"""
    contained = tls_client(inside / OWN, watching.port, ("unshare", "-m", "sh", "-c", script, "sh"))
    contained.ask("/early")
    watching.wait_for_attached(1)
    assert not list(inside.iterdir())
    contained.ask("/later")
    assert watching.asked("later") == both_ends("later", 1), watching.tracing.state()
    contained.end()
    watching.assert_nothing_left()


def test_a_process_that_has_ended_when_it_is_looked_at(watching: Watching, tls_any: Path, public_path: Path):
    """The agent is told of it, and is held up until it is gone: that is counted, and nothing is left."""
    gone = "spanloom_tls_unseen_processes_total{reason=gone}"
    before = watching.tracing.metrics().get(gone, 0)
    os.kill(watching.tracing.pid, signal.SIGSTOP)
    try:
        for number in range(5):
            library = copy_of_library(public_path / f"library-{number}")
            subprocess.run([tls_any, library, str(watching.port)], input=b"leave\n", check=True, timeout=60)
            shutil.rmtree(library.parent)
    finally:
        os.kill(watching.tracing.pid, signal.SIGCONT)
    wait_until(
        lambda: watching.tracing.metrics().get(gone, 0) >= before + 5,
        lambda: f"they are counted{watching.tracing.state()}",
    )
    assert watching.attached == 0
    watching.assert_nothing_left()


@pytest.mark.parametrize(("limits", "all_fit"), [("128:4096", True), ("340:340", False)])
def test_a_limit_of_open_files(
    limits: str,
    all_fit: bool,
    collector,
    serve,
    tls_client: ClientFactory,
    public_path: Path,
    pem: Path,
    tmp_path: Path,
):
    """The soft one is raised, and where the hard one is low, too, probes leave to the rest of the agent what it needs:
    what cannot be watched for that is counted.
    """
    port, plain = free_port(), free_port()
    serve(nginx(port, public_path, pem, extra="location / { return 200 hello; }"), port)
    serve(servers.python_threads(plain, public_path), plain)
    with AgentProcess(tmp_path, collector, [port, plain], within=("prlimit", f"--nofile={limits}")) as tracing:
        wait_for_libraries(tracing)
        clients = [tls_client(copy_of_library(public_path / f"{number}"), port) for number in range(16)]
        for client in clients:
            client.ask("/early")
        too_many = "spanloom_tls_unseen_processes_total{reason=too_many}"
        attached = f'"event":"tls_attached","library":"{OWN}"'
        wait_until(
            lambda: tracing.stderr().count(attached) + tracing.metrics().get(too_many, 0) >= 16,
            lambda: f"all are looked at{tracing.state()}",
        )
        count = tracing.stderr().count(attached)
        assert count == 16 if all_fit else 0 < count < 16, tracing.state()
        for client in clients:
            client.ask("/later")
        assert curl(f"http://127.0.0.1:{plain}/status/200").returncode == 0
        tracing.exact_spans(2, port=plain)
        tracing.settle()
        later = [span for span in tracing.spans(port) if "/later" in str(span.attributes)]
        assert Counter(span.kind for span in later) == {"CLIENT": count, "SERVER": 16}, show(later)
