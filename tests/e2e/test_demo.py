"""``spanloom demo`` as its users run it: the real agent, nginx, the services, and what is left of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.demo import application

DEMO = [sys.executable, "-m", "agent", "demo"]
BOUND_SECONDS = 60.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A temporary directory of the demo's own, so that what it leaves behind would be seen."""
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


def run_demo(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=BOUND_SECONDS, check=False
    )


def temporary_files(environment: dict[str, str]) -> list[str]:
    """What the demo left; the temporary files of Python's own start are nobody's concern."""
    return [name for name in os.listdir(environment["TMPDIR"]) if "spanloom" in name]


def test_every_trace_of_the_demo_is_whole(environment):
    """Five requests make five whole traces: all services, all ways of linking, the failure, one summary line, exit 0."""
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


def test_without_root_the_agent_s_message_and_exit_code_are_passed_on(environment, tmp_path):
    """As an ordinary user the demo ends as the agent does: one line that says what to do, exit code 3."""
    user = 65534

    def drop() -> None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)

    # An unprivileged copy: the checkout may lie where only root can read.
    package = Path(application.__file__).parents[1]
    shared = Path("/tmp") / f"spanloom-test-{os.getpid()}"
    shutil.copytree(package, shared / "agent")
    try:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", "import sys"], preexec_fn=drop, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
    finally:
        shutil.rmtree(shared)


@pytest.fixture
def staying(environment) -> Iterator[subprocess.Popen[str]]:
    """A demo that has shown its traces and stays."""
    demo = subprocess.Popen(
        [*DEMO, "--requests", "1", "--keep", "600"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        yield demo
    finally:
        demo.kill()
        demo.communicate()
