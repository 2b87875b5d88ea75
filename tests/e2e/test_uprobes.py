"""Probes on functions, by links and by the perf events of kernels before 6.6: both run here."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent.kernel import uprobes
from tests.e2e.test_capabilities import dropping_all_but

PROBE_A_FUNCTION = """
    import json, os, sys
    from agent.errors import PrivilegeError
    from agent.kernel import _libbpf, uprobes
    from agent.kernel._libbpf import lib
    from agent.kernel.capture import Capture, CaptureSettings

    if sys.argv[1] == "perf events":
        uprobes.has_links = lambda: False

    def open_files():
        return sorted(os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")[:-1])

    with Capture(CaptureSettings(connections=64)) as capture:
        capture.load_tls()
        before = open_files()
        try:
            links = capture.try_return()
        except PrivilegeError as error:
            print(json.dumps({"refused": str(error)}))
            sys.exit()
        kinds = sorted(set(open_files()) - set(before))
        lib.spanloom_canary_under_filter()
        runs = {one.name: one.run_count for one in capture.statistics()}["on_tls_return"]
        capture.unwatch(links)
        lib.spanloom_canary_under_filter()
        after = {one.name: one.run_count for one in capture.statistics()}["on_tls_return"]
        print(json.dumps({"kinds": kinds, "runs": runs, "runs_after": after, "left": open_files() == before}))
"""


def probing(way: str, *, capabilities: tuple[str, ...] = ()) -> dict[str, object]:
    """What a process of its own says that puts a probe on a function."""
    within = dropping_all_but(capabilities) if capabilities else []
    command = [*within, sys.executable, "-c", textwrap.dedent(PROBE_A_FUNCTION), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def _run_statistics():
    path = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = path.read_text()
    path.write_text("1")
    yield
    path.write_text(before)


LINK, PERF_EVENT = "anon_inode:bpf_link", "anon_inode:[perf_event]"
with_links = pytest.mark.skipif(not uprobes.has_links(), reason="links for uprobes need Linux 6.6")


@pytest.mark.parametrize(
    ("way", "kinds"), [pytest.param("links", [LINK], marks=with_links), ("perf events", [PERF_EVENT, LINK])]
)
def test_a_probe_runs_and_is_taken_back(way: str, kinds: list[str]):
    told = probing(way)
    assert told["kinds"] == kinds
    assert told["runs"] == 2, "once in try_return(), once after it"
    assert (told["runs_after"], told["left"]) == (2, True)


@pytest.mark.parametrize(
    ("way", "answer"), [pytest.param("links", "runs", marks=with_links), ("perf events", "refused")]
)
def test_what_is_allowed_without_sys_admin(way: str, answer: str):
    """Links are; perf events of programs are refused, and the error says what is missing."""
    told = probing(way, capabilities=("BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH"))
    assert answer in told
    assert way == "links" or "CAP_SYS_ADMIN" in told["refused"]
