#!/usr/bin/env python3
"""What Spanloom uses on which kernel: ``tools/kernels.py`` prints docs/kernels.md from what the last runs recorded.

With ``--run`` it boots each stock kernel in QEMU before (tools/vm.py, some minutes) and writes tests/vm/kernels.json
anew: for each kernel its release, what "auto" takes, and for each backend where its programs are attached, how many
exchanges were seen with the right bytes, and how many instructions the verifier walked for each program, of the
million that it allows. tests/vm/test_kernels.py compares with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests/vm/kernels.json"
KERNELS = ("5.10", "6.1", "6.12")
LIMIT = 1_000_000  # BPF_COMPLEXITY_LIMIT_INSNS, include/linux/bpf_verifier.h

_INTRODUCTION = """# Kernels

Made by `tools/kernels.py` from tests/vm/kernels.json, which `make kernels` records: stock Debian kernels are booted in
QEMU, every program is loaded and attached there, and real exchanges are recorded, which have to be right to the byte
(`make test` does this, too, and compares). The probes were built by {compiler}.

The backend is chosen at the start (`kernel.backend`): the socket layer's tracepoints (Linux 6.16 and later,
[ADR 7](adr/0007-socket-tracepoints.md)), else all system calls ([ADR 2](adr/0002-raw-tracepoints.md)). Why fentry does
not take its place before 6.16 yet is in [ADR 17](adr/0017-functions-of-tcp-by-fentry.md). `spanloom check` says what a
machine gets, and why.

Since 7.0 programs at tracepoints can be preempted, and where another thread comes to the same place meanwhile, the
kernel leaves its run out. `spanloom_program_missed_total` counts these, and what they would have told is missing: in
QEMU, where programs take a thousand times as long, 2 to 48 runs for 800 exchanges (`make vm KERNEL=sid`).

| kernel | release | auto takes | exchanges | HTTP/2, pipelining | probes for TLS |
|---|---|---|---|---|---|
"""

_WORK = """
The verifier allows {limit:,} instructions per program. What it walked, as kernels tell since 5.16 (aba64c7da983),
without programs of less than 10,000:

| program | {kernels} |
|---|{rules}|
"""


def measured(said: str) -> dict[str, Any]:
    """What a run of tools/vm.py recorded. Raises SystemExit when it did not get that far."""
    found = re.search(r"^record (\{.*\})$", said, re.MULTILINE)
    if found is None:
        raise SystemExit(f"kernels: nothing was recorded:\n{said}")
    return json.loads(found[1])


def compiler() -> str:
    """The compiler that the objects in agent/kernel are built with, as far as its numbers matter: "clang 14"."""
    said = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True).stdout
    return "clang " + re.search(r"version (\d+)", said)[1]


def work(kernel: dict[str, Any]) -> dict[str, int]:
    """Instructions by program, those of both backends together."""
    return {name: count for backend in kernel["backends"].values() for name, count in backend["instructions"].items()}


def page(record: dict[str, Any]) -> str:
    """docs/kernels.md."""
    text = _INTRODUCTION.format(compiler=record["compiler"])
    kernels = record["kernels"]
    for name, kernel in kernels.items():
        seen = " / ".join(f"{one['exchanges']} by {one['hooks']}" for one in kernel["backends"].values())
        tls = sum(program.startswith(("on_tls_", "on_go_")) for program in work(kernel))
        text += f"| {name} | {kernel['release']} | {kernel['auto']} | {seen} | yes | {tls} programs load |\n"
    programs = {program: count for kernel in kernels.values() for program, count in work(kernel).items()}
    text += _WORK.format(limit=LIMIT, kernels=" | ".join(kernels), rules="|".join("---" for _ in kernels))
    for program in sorted(programs):
        counts = [work(kernel).get(program, 0) for kernel in kernels.values()]
        if max(counts) >= 10_000:
            text += f"| {program} | " + " | ".join(f"{count:,}" if count else "—" for count in counts) + " |\n"
    return text


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--run"]):
        print("usage: tools/kernels.py [--run]", file=sys.stderr)
        return 2
    if arguments:
        record: dict[str, Any] = {"compiler": compiler(), "kernels": {}}
        for name in KERNELS:
            print(f"kernels: booting {name} …", file=sys.stderr)
            done = subprocess.run([sys.executable, ROOT / "tools/vm.py", name], capture_output=True, text=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                return 1
            record["kernels"][name] = measured(done.stdout)
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(page(json.loads(RECORD.read_text())), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
