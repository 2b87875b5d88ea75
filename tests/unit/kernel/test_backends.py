"""agent.kernel.backends: which kernels take the processor from programs at fentry. The choice runs in tests/e2e and
tests/vm.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from agent.kernel.backends import preemption

DYNAMIC = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-07-02)"
RELEASE = "6.1.0-50-cloud-amd64"


@pytest.mark.parametrize(
    ("build", "mode"),
    [
        ("#1 SMP Debian 5.10.223-1 (2024-08-10)", "none"),
        ("#1 SMP PREEMPT Tue Jan 2 2024", "full"),
        ("#1 SMP PREEMPT_RT Debian 6.1.176-1", "rt"),
        ("#1 SMP PREEMPT_LAZY Tue Jan 2 2026", "lazy"),
        (DYNAMIC, ""),
    ],
)
def test_what_the_build_tells(tmp_path: Path, build: str, mode: str):
    """A kernel whose mode is fixed says so in its version; of others nothing is known by that alone."""
    assert preemption(build, RELEASE, tmp_path) == mode


def put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_the_kernel_itself_is_asked_first(tmp_path: Path):
    """What debugfs shows holds, seen from the agent or from the host; then what the kernel was started with, where the
    last word counts; then what it was built with.
    """
    configuration = b"# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_DYNAMIC=y\n"
    put(tmp_path, f"proc/1/root/boot/config-{RELEASE}", configuration)
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "voluntary"
    put(tmp_path, f"boot/config-{RELEASE}", b"CONFIG_PREEMPT_DYNAMIC=y\nCONFIG_PREEMPT=y\n")
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "full"
    put(tmp_path, "proc/config.gz", gzip.compress(b"CONFIG_PREEMPT_LAZY=y\n"))
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "lazy"
    put(tmp_path, "proc/cmdline", b"quiet preempt=full nopreempt=voluntary preempt=none\n")
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "none"
    put(tmp_path, "proc/1/root/sys/kernel/debug/sched/preempt", b"none voluntary (full)\n")
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "full"
    put(tmp_path, "sys/kernel/debug/sched/preempt", b"none (voluntary) full\n")
    assert preemption(DYNAMIC, RELEASE, tmp_path) == "voluntary"


def test_a_configuration_that_cannot_be_read(tmp_path: Path):
    """Half a file and one that is no text are as none at all."""
    put(tmp_path, "proc/config.gz", gzip.compress(b"CONFIG_PREEMPT=y\n")[:-9])
    put(tmp_path, f"boot/config-{RELEASE}", b"\xff\nCONFIG_PREEMPT=y\n")
    assert preemption(DYNAMIC, RELEASE, tmp_path) == ""
