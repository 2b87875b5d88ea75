"""Records what the kernel sends while a command runs, for the replay tests (root).

    .venv/bin/python tools/record.py tests/unit/golden/NAME.json --ports 2 -- .venv/bin/python tests/unit/golden/NAME.py

In: a command; it gets free ports as further arguments, and only exchanges on these are captured. Out: one JSON file
with every batch of the ring buffer, every sweep's watermark, the counters, and the descriptions that the layout is made
from. The file holds whatever the command sent: run it with made-up traffic only.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.kernel.capture import PROCESS_TRACED, Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import ProcessSeen

DESCRIBED = (
    "record_exchange",
    "record_process",
    "record_segment",
    "record_close",
    "record_peer",
    "record_tls",
    "record_kind",
    "exchange_role",
    "exchange_end",
    "exchange_flag",
    "segment_flag",
    "tls_notice",
    "counter",
)
SWEEP_SECONDS = 0.05
AFTERWARDS_SECONDS = 0.5


def free_ports(count: int) -> tuple[int, ...]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)


class Recorder:
    """Drains and sweeps like the agent, and keeps the bytes."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._decoder = Decoder(capture.layout)
        self.steps: list[dict[str, object]] = []

    def step(self, sweeps: bool) -> None:
        """Take what is there. A step is what the pipeline did at one time."""
        watermark_ns = self._capture.sweep() if sweeps else None
        batches = []
        while (drained := self._capture.drain())[1]:
            batch, offsets = drained
            batches.append({"offsets": offsets, "bytes": base64.b64encode(zlib.compress(batch, 9)).decode()})
            for record in self._decoder.decode(batch, offsets):
                if isinstance(record, ProcessSeen):
                    self._capture.decide(record.tgid, record.start_ns, PROCESS_TRACED)
        if batches or sweeps:
            self.steps.append({"now_ns": time.monotonic_ns(), "watermark_ns": watermark_ns, "batches": batches})

    def run_until(self, is_over) -> None:
        """Step until told; a sweep every 50 ms."""
        next_sweep = 0.0
        while not is_over():
            self._capture.wait(0.02)
            sweeps = time.monotonic() >= next_sweep
            if sweeps:
                next_sweep = time.monotonic() + SWEEP_SECONDS
            self.step(sweeps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ports", type=int, default=1, help="how many free ports the command gets")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    ports = free_ports(arguments.ports)
    with Capture(CaptureSettings(ports_include=ports)) as capture:
        capture.attach([os.getpid()])
        recorder = Recorder(capture)
        child = subprocess.Popen([*arguments.command, *map(str, ports)])
        recorder.run_until(lambda: child.poll() is not None)
        deadline = time.monotonic() + AFTERWARDS_SECONDS
        recorder.run_until(lambda: time.monotonic() > deadline)
        capture.detach()
        capture.hasten()
        recorder.step(sweeps=True)
        recording = {
            "descriptions": {name: capture._describe(name) for name in DESCRIBED},
            "counters": capture.counters(),
            "steps": recorder.steps,
        }
    arguments.output.write_text(json.dumps(recording, indent=1) + "\n")
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes, {len(recording['steps'])} steps")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
