"""TLS libraries that come and go: programs that end early, files that are replaced, many processes, containers. Nothing
is left of them in the agent or in the kernel, whose probes live as long as the agent's descriptors of them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import AgentProcess, Process, free_port, show, wait_until
from tests.e2e.servers import APPS
from tests.e2e.test_tls import nginx, open_files, wait_for_libraries

OPENSSL = next(Path("/usr/lib").glob("*-linux-gnu/libssl.so.3"))
PROBE = "anon_inode:[perf_event]"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client that uses the library that it is told to."""
    made = tmp_path_factory.mktemp("program") / "tls_any"
    subprocess.run(["cc", "-O1", "-o", made, APPS / "tls_any.c", "-ldl"], check=True, timeout=60)
    return made


class Client(Process):
    """It asks for what it is told to, one line at a time."""

    def ask(self, *lines: str, answers: int | None = None) -> None:
        """Wait for as many answers as there are lines, or ``answers``; all are 200."""
        wanted = self.answered + (len(lines) if answers is None else answers)
        assert self.popen.stdin is not None
        self.popen.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.popen.stdin.flush()
        wait_until(lambda: self.answered >= wanted, self.output, 60)
        assert set(self.output().split()) == {"200"}

    @property
    def answered(self) -> int:
        return self.output().count("\n")

    def end(self) -> None:
        self.popen.communicate(timeout=30)
        assert self.popen.returncode == 0, self.output()


@pytest.fixture
def client(program: Path, public_path: Path) -> Iterator[Callable[..., Client]]:
    """``client(library, port, within=(...))`` starts one; ``within`` is a command that becomes it."""
    with ExitStack() as stack:
        count = 0

        def start(library: Path, port: int, within: tuple[str, ...] = ()) -> Client:
            nonlocal count
            count += 1
            command = [*within, program, library, str(port)]
            return stack.enter_context(
                Client(command, log=public_path / f"client-{count}.log", stdin=subprocess.PIPE)
            )

        yield start


class Watching:
    """An agent that watches a server over TLS, and what it holds open for that."""

    def __init__(self, tracing: AgentProcess, port: int) -> None:
        wait_for_libraries(tracing)
        tracing.settle()
        self.tracing, self.port = tracing, port
        self.files = self.count("spanloom_tls_files")
        self.attached = self.count("spanloom_tls_attached_total")
        self.open = open_files(tracing)

    def count(self, metric: str) -> float:
        return self.tracing.metrics()[metric]

    def wait_for_attached(self, count: int) -> None:
        """Since the beginning."""
        wait_until(
            lambda: self.count("spanloom_tls_attached_total") == self.attached + count,
            lambda: f"{count} files were attached{self.tracing.state()}",
        )

    def wait_for_files(self, count: int) -> None:
        """Beside those of the beginning."""
        wait_until(
            lambda: self.count("spanloom_tls_files") == self.files + count,
            lambda: f"{count} files are watched{self.tracing.state()}",
            60,
        )

    @property
    def probes(self) -> int:
        """Beside those of the beginning."""
        return open_files(self.tracing)[PROBE] - self.open[PROBE]

    def assert_nothing_left(self) -> None:
        self.wait_for_files(0)
        metrics = self.tracing.metrics()
        assert metrics["spanloom_tls_attached_total"] - metrics["spanloom_tls_detached_total"] == self.files
        wait_until(
            lambda: open_files(self.tracing) <= self.open,
            lambda: f"{open_files(self.tracing) - self.open} are closed",
        )

    def asked(self, name: str) -> Counter[tuple[str, str]]:
        """The spans of requests whose path begins with the name: kind and path."""
        self.tracing.settle()
        spans = [(span, span.attributes.get("url.path") or span.attributes["url.full"]) for span in self.spans()]
        paths = [(span.kind, f"/{path.rpartition('/')[2]}") for span, path in spans]
        return Counter((kind, path.partition("?")[0]) for kind, path in paths if path.startswith(f"/{name}"))

    def spans(self) -> list:
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
    return Path(shutil.copy(OPENSSL, directory / OPENSSL.name))


def both_ends(name: str, count: int) -> Counter[tuple[str, str]]:
    return Counter({("CLIENT", f"/{name}"): count, ("SERVER", f"/{name}"): count})


def test_containers_of_one_image_share_the_probes(watching: Watching, client, public_path: Path):
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
        containers.append(client(merged / OPENSSL.name, watching.port, ("unshare", "-m", "sh", "-c", script, "sh")))
    for number, container in enumerate(containers):
        container.ask("/early")
        if number == 0:
            watching.wait_for_attached(1)
            probes = watching.probes
    watching.tracing.settle()
    for container in containers:
        container.ask(*["/later"] * 5)
    assert watching.asked("later") == both_ends("later", 15), show(watching.spans()) + watching.tracing.state()
    assert (watching.probes, watching.count("spanloom_tls_files")) == (probes, watching.files + 1)
    for container in containers:
        container.end()
    watching.assert_nothing_left()
