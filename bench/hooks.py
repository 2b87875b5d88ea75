"""What a hook on system calls costs before the program in it does anything: ``python -m bench.hooks``.

Compares empty ``tp_btf`` programs on all system calls with empty classic tracepoint programs on one of them, for a
call that is hooked (write) and one that is not (getppid). Nanoseconds per call above no hook at all, and their ratio.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

from agent.kernel._libbpf import ffi, lib

CALLS = 300_000
ROUNDS = 7
VARIANTS = {"none": (), "tp_btf": ("raw_enter", "raw_exit"), "tracepoint": ("classic_enter", "classic_exit")}


def nanoseconds(call) -> float:
    """Best of a few loops: the least disturbed one."""
    began = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return (time.thread_time_ns() - began) / CALLS


def main() -> int:
    lib.spanloom_log_reset()
    path = Path(__file__).with_name(f"hooks.{platform.machine()}.bpf.o")
    loaded = lib.bpf_object__open_file(str(path).encode(), ffi.NULL)
    if loaded == ffi.NULL or lib.bpf_object__load(loaded):
        print(ffi.string(lib.spanloom_log()).decode(), file=sys.stderr)
        return 1
    sink = os.open("/dev/null", os.O_WRONLY)
    calls = {"write": lambda: os.write(sink, b"x"), "getppid": os.getppid}
    best: dict[str, dict[str, float]] = {variant: dict.fromkeys(calls, float("inf")) for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant, programs in VARIANTS.items():
            links = []
            for name in programs:
                program = lib.bpf_object__find_program_by_name(loaded, name.encode())
                links.append(lib.bpf_program__attach(program))
                if links[-1] == ffi.NULL:
                    print(ffi.string(lib.spanloom_log()).decode(), file=sys.stderr)
                    return 1
            for name, call in calls.items():
                best[variant][name] = min(best[variant][name], nanoseconds(call))
            for link in links:
                lib.bpf_link__destroy(link)
    result = {
        variant: {name: round(value - best["none"][name], 1) for name, value in values.items()}
        for variant, values in best.items()
        if variant != "none"
    }
    print("nanoseconds per system call above no hook: " + ", ".join(calls))
    for variant, values in result.items():
        print(f"  {variant:<11}" + "".join(f"{value:>10.1f}" for value in values.values()))
    print(json.dumps(result))
    lib.bpf_object__close(loaded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
