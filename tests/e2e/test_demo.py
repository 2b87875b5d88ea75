"""``spanloom demo`` as its users run it: the real agent, nginx, the services, and what is left of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.demo import application
from tests.e2e.harness import clean_environment, wait_until

DEMO = [sys.executable, "-m", "agent", "demo"]
BOUND_SECONDS = 60.0
PR_CAPBSET_DROP = 24  # prctl(2)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A temporary directory of the demo's own, so that what it leaves behind would be seen."""
    (tmp_path / "tmp").mkdir()
    return clean_environment(TMPDIR=str(tmp_path / "tmp"))


def run_demo(
    command: list[str], environment: dict[str, str], preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=BOUND_SECONDS,
        check=False,
        preexec_fn=preexec_fn,
    )


def drop_capabilities() -> None:
    """Leave uid 0 without a single capability after the next exec (capabilities(7): the bounding set limits root)."""
    prctl = ctypes.CDLL(None).prctl
    for capability in range(64):
        prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def temporary_files(environment: dict[str, str]) -> list[str]:
    """What the demo left; the temporary files of Python's own start are nobody's concern."""
    return [name for name in os.listdir(environment["TMPDIR"]) if "spanloom" in name]


def test_every_trace_of_the_demo_is_whole(environment):
    """Five requests make five whole traces: all services, ways of linking, the failure, a summary, exit 0."""
    done = run_demo(DEMO, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "5 of 5 traces whole: 44 spans of 6 services, 1 failing request shown as failing"
    assert len(re.findall(r"^trace [0-9a-f]{32}", done.stdout, re.MULTILINE)) == 5
    assert len(re.findall(r"^request [1-5]: GET /", done.stdout, re.MULTILINE)) == 5
    rows = [line.split() for line in done.stdout.splitlines()]
    for service in ("client", *application.SERVICE_NAMES):
        assert any(row and row[0] == service for row in rows), service
    for way in ("remote parent", "root", "peer", "forwarded", "request id", "thread"):
        assert re.search(rf"(?:ms|µs)  {way}$", done.stdout, re.MULTILINE), way
    assert re.search(r"^price .*GET /price/gold +500 ✗ ", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "starting the agent" in done.stderr
    assert temporary_files(environment) == []


def test_many_requests_are_all_whole(environment):
    """Traces of interleaved requests stay apart; those beyond the first twenty are counted and not drawn."""
    done = run_demo([*DEMO, "--requests", "200"], environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "200 of 200 traces whole: 1760 spans of 6 services, 40 failing requests shown as failing"
    assert len(re.findall(r"^trace [0-9a-f]{32}", done.stdout, re.MULTILINE)) == 20


def test_a_service_that_forwards_no_header_is_found_out(environment, tmp_path):
    """When the shop forwards nothing, nobody can know who caused its calls: exit 1, and each missing span is named."""
    services = tmp_path / "services"
    shutil.copytree(application.SERVICES, services)
    shop = (services / "shop.py").read_text()
    broken = re.sub(r"^FORWARDED_HEADERS = .*$", "FORWARDED_HEADERS = ()", shop, flags=re.MULTILINE)
    assert broken != shop
    (services / "shop.py").write_text(broken)
    program = (
        "import pathlib, sys; from agent import cli; from agent.demo import application;"
        "application.SERVICES = pathlib.Path(sys.argv[1]); sys.exit(cli.main(['demo', '--requests', '1']))"
    )
    done = run_demo([sys.executable, "-c", program, str(services)], environment)
    assert done.returncode == 1, done.stdout + done.stderr
    head = "not whole: request 1 (GET /articles/coffee with a W3C traceparent header): "
    for path in ("/stock/coffee", "/price/coffee"):
        assert f"{head}the span 'shop → GET {path}' is missing\n" in done.stdout
    assert "the span 'shop GET /articles/coffee' is missing" not in done.stdout
    assert "not whole: a trace belongs to no request: 'shop → GET /" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 of 1 trace whole: see above"
    assert temporary_files(environment) == []


def test_an_agent_that_may_not_trace_is_passed_on(environment):
    """Without capabilities the demo ends as the agent does: its one line that says what to do, its exit code 3."""
    done = run_demo(DEMO, environment, preexec_fn=drop_capabilities)
    assert done.returncode == 3
    *_, last = done.stderr.splitlines()
    assert last.startswith("spanloom: ")
    assert "root" in last
    assert done.stdout == ""
    assert temporary_files(environment) == []


class Staying:
    """A demo that has shown its trace and stays; what it prints is read as a person would, a little later."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self._files = (directory / "out", directory / "err")
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.popen = subprocess.Popen(
                [*DEMO, "--requests", "1", "--keep", "600"], env=environment, stdout=out, stderr=err
            )

    @property
    def out(self) -> str:
        return self._files[0].read_text("utf-8")

    @property
    def err(self) -> str:
        return self._files[1].read_text("utf-8")

    def children(self) -> list[int]:
        """Children by pid, from the kernel."""
        pid = self.popen.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self, number: signal.Signals) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(BOUND_SECONDS)


@pytest.fixture
def staying(environment, tmp_path) -> Iterator[Staying]:
    demo = Staying(environment, tmp_path)
    try:
        wait_until(lambda: "/metrics" in demo.err or demo.popen.poll() is not None, lambda: demo.err, BOUND_SECONDS)
        assert demo.popen.poll() is None, demo.err
        yield demo
    finally:
        if demo.popen.poll() is None:
            demo.popen.terminate()
        demo.popen.wait(BOUND_SECONDS)


def test_the_suggested_commands_work_while_the_demo_stays(staying):
    """With --keep it names commands to try; each one's trace is shown within a moment, and Ctrl-C ends it well."""
    assert "1 of 1 trace whole: 10 spans of 6 services\n" in staying.out
    commands = re.findall(r"^demo: +(curl .*)$", staying.err, re.MULTILINE)
    assert len(commands) == 3
    for number, command in enumerate(commands, 2):
        done = subprocess.run(
            [*shlex.split(command), "-sS", "--noproxy", "*"], capture_output=True, text=True, check=True
        )
        if command.endswith("/metrics"):
            assert "spanloom_" in done.stdout
        else:
            assert json.loads(done.stdout)["left" if "stock" in command else "article"]
            wait_until(lambda n=number: staying.out.count("\ntrace ") == n, lambda: staying.out)
    spans = [int(count) for count in re.findall(r"^trace .*?(\d+) spans", staying.out, re.MULTILINE)]
    assert spans == [10, 10, 4]
    children = staying.children()
    assert staying.end(signal.SIGINT) == 0, staying.err
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(staying, environment, number):
    """SIGTERM and a closed terminal end the agent and all services, and remove the temporary files."""
    children = staying.children()
    assert len(children) == 6  # the client has ended and been waited for
    assert staying.end(number) == 128 + number
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert temporary_files(environment) == []


def test_nothing_outlives_a_demo_that_is_killed(staying):
    """Not even SIGKILL leaves children behind: the kernel ends them with their parent."""
    children = staying.children()
    assert staying.end(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not [pid for pid in children if is_running(pid)], "the children ended")


def is_running(pid: int) -> bool:
    """Whether it runs: an orphan that ended may wait to be reaped by a process that is not ours."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_reader_that_leaves_is_no_error_message(environment):
    """``spanloom demo | head -1`` ends with the exit code of a broken pipe, without a traceback or a child left."""
    demo = subprocess.Popen(DEMO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    demo.stdout.close()
    err = demo.stderr.read()
    assert demo.wait(BOUND_SECONDS) == 141, err
    assert "Traceback" not in err
    assert temporary_files(environment) == []


def test_a_poor_environment_is_enough(environment, tmp_path):
    """No Node.js, nothing in PATH, a terminal that knows ASCII only: nginx is found, and all traces are whole."""
    done = run_demo(DEMO, {**environment, "PATH": str(tmp_path), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.isascii()
    assert "Node.js" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("5 of 5 traces whole: ")
