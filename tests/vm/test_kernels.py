"""Stock kernels, booted for real: older verifiers refuse what this machine's kernel takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import kernels

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/vm.py"
EXCHANGES = 58  # those of tests/vm/traffic.py, seen from both sides


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_the_probes_load_and_see_traffic(kernel: str) -> None:
    """Every program loads, attaches and fires, on the oldest kernel that is supported and on those in between. None is
    near what the verifier allows, nor much nearer than it was.
    """
    done = subprocess.run([sys.executable, TOOL, kernel], capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kernel}." in done.stdout
    assert f"syscalls: {EXCHANGES} exchanges" in done.stdout
    assert "syscalls: pipelined requests, frames of HTTP/2" in done.stdout
    assert "syscalls: many processes, sleep through a detachment" in done.stdout
    assert "auto: syscalls by system calls" in done.stdout
    found, record = kernels.work(kernels.measured(done.stdout)), json.loads(kernels.RECORD.read_text())
    assert max(found.values()) < 0.8 * kernels.LIMIT, found
    if record["compiler"] == kernels.compiler():
        before = kernels.work(record["kernels"][kernel])
        assert found.keys() == before.keys(), "`make kernels` records what has changed"
        for name, count in found.items():
            assert count < 1.1 * before[name] + 1000, f"{name}: {before[name]} before; `make kernels` records it"


@pytest.mark.timeout(400)
def test_a_kernel_that_is_locked_down() -> None:
    """The agent would end with the exit code for what is refused, and one line that says what to do."""
    done = subprocess.run([sys.executable, TOOL, "6.1", "--lockdown"], capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lockdown: none integrity [confidentiality]" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("exit code ")]
    assert line.startswith("exit code 5: ")
    assert "lockdown=integrity" in line


def test_the_table_is_what_was_recorded() -> None:
    """docs/kernels.md is what ``make docs`` writes."""
    assert (ROOT / "docs/kernels.md").read_text() == kernels.page(json.loads(kernels.RECORD.read_text()))
