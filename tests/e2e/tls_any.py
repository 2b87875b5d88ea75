"""apps/tls_any.c as a client: HTTP over TLS by a library that is named, asked line by line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import Process, clean_environment, wait_until
from tests.e2e.servers import APPS


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


ClientFactory = Callable[..., Client]


@pytest.fixture(scope="session")
def tls_any(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    made = tmp_path_factory.mktemp("program") / "tls_any"
    subprocess.run(["cc", "-O1", "-o", made, APPS / "tls_any.c", "-ldl"], check=True, timeout=60)
    return made


@pytest.fixture
def tls_client(tls_any: Path, tmp_path: Path) -> Iterator[ClientFactory]:
    """``tls_client(library, port, within=(...))`` starts one; ``within`` is a command that becomes it. What the library
    needs is looked for beside it first.
    """
    with ExitStack() as stack:
        count = 0

        def start(library: Path, port: int, within: tuple[str, ...] = ()) -> Client:
            nonlocal count
            count += 1
            command = [*within, tls_any, library, str(port)]
            environment = clean_environment(LD_LIBRARY_PATH=str(library.parent))
            log = tmp_path / f"client-{count}.log"
            return stack.enter_context(Client(command, log=log, env=environment, stdin=subprocess.PIPE))

        yield start
