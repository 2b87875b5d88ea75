"""Fills the ring buffer of a running agent with realistic exchange records at an exact rate.

In: the agent's pid. Out: records, written by a BPF program through BPF_PROG_TEST_RUN into the agent's own map, which
is found through /proc. No web server and no luck are needed.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from agent.kernel._libbpf import ffi, lib

SPANS_PER_TRACE = 3

_REQUEST = (
    b"GET /articles/00/stock?currency=EUR HTTP/1.1\r\nHost: shop.example:8000\r\n"
    b"traceparent: 00-%032x-%016x-01\r\n"
    b"User-Agent: python-httpx/0.28.1\r\nAccept: application/json\r\nAccept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\nX-Forwarded-Proto: http\r\nX-Padding: "
) % (0, 0)
_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.26\r\nDate: Mon, 23 Nov 2026 10:00:00 GMT\r\n"
    b"Content-Type: application/json\r\nConnection: keep-alive\r\nContent-Length: "
)


def find_map(pid: int, name: str) -> int:
    """A descriptor of the map of that name which process ``pid`` holds. Raises LookupError when it holds none."""
    folder = Path(f"/proc/{pid}/fdinfo")
    for entry in folder.iterdir():
        try:
            info = dict(line.split(":\t", 1) for line in entry.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if "map_id" in info and info.get("map_type", "").strip() == "27":  # BPF_MAP_TYPE_RINGBUF
            descriptor = lib.bpf_map_get_fd_by_id(int(info["map_id"]))
            if descriptor >= 0:
                return descriptor
    raise LookupError(f"process {pid} has no ring buffer ({name})")


def process_start_ns(pid: int) -> int:
    """Start time of a process in CLOCK_BOOTTIME nanoseconds, to the clock tick (proc(5), field 22)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[19]) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


class Generator:
    """Writes traces of SPANS_PER_TRACE exchanges as if the processes ``pids`` had made them."""

    def __init__(self, agent_pid: int, pids: tuple[int, int]) -> None:
        path = Path(__file__).with_name(f"generator.{platform.machine()}.bpf.o")
        lib.spanloom_log_reset()
        self._object = lib.bpf_object__open_file(str(path).encode(), ffi.NULL)
        if self._object == ffi.NULL:
            raise FileNotFoundError(f"{path} cannot be read: `make bench` and `make test` build it")
        ring = find_map(agent_pid, "records")
        error = lib.bpf_map__reuse_fd(lib.bpf_object__find_map_by_name(self._object, b"records"), ring)
        os.close(ring)
        for name, kind, values in (
            ("tgids", "uint32_t *", pids),
            ("starts", "uint64_t *", [process_start_ns(pid) for pid in pids]),
        ):
            pointer = ffi.cast(kind, self._variable(".rodata", name, 2 * ffi.sizeof(kind[:-2])))
            pointer[0], pointer[1] = values
        error = error or lib.bpf_object__load(self._object)
        if error:
            raise OSError(-error, f"cannot load {path.name}: {ffi.string(lib.spanloom_log()).decode()[-2000:]}")
        head = _REQUEST.ljust(448 - 4, b"x") + b"\r\n\r\n"
        body = b"{}".ljust(200 - len(_RESPONSE) - 6, b" ")
        answer = _RESPONSE + b"%02d\r\n\r\n" % len(body) + body
        if (len(head), len(answer)) != (448, 200) or head.index(b"traceparent: 00-") + 16 != 87:
            offset = head.index(b"traceparent: 00-") + 16
            raise AssertionError(f"the template does not fit generator.bpf.c: {len(head)} {len(answer)} {offset}")
        ffi.memmove(self._variable(".bss", "request", 448), head, 448)
        ffi.memmove(self._variable(".bss", "response", 200), answer, 200)
        self._budget = ffi.cast("uint64_t *", self._variable(".bss", "budget", 8))
        self._written = ffi.cast("uint64_t *", self._variable(".bss", "written", 8))
        self._refused = ffi.cast("uint64_t *", self._variable(".bss", "refused", 8))
        self._program = lib.bpf_program__fd(lib.bpf_object__find_program_by_name(self._object, b"generate"))
        self._duration = ffi.new("uint32_t *")
        self._result = ffi.new("uint32_t *")
        self._context = ffi.new("uint64_t[2]")

    def _variable(self, section: str, name: str, size: int):
        loaded = -1
        if section == ".bss":
            loaded = lib.bpf_map__fd(lib.bpf_object__find_map_by_name(self._object, section.encode()))
        pointer = lib.spanloom_variable(self._object, section.encode(), name.encode(), size, loaded)
        if pointer == ffi.NULL:
            raise LookupError(name)
        return pointer

    @property
    def written(self) -> int:
        """Exchanges written since the start."""
        return self._written[0]

    @property
    def refused(self) -> int:
        """Times the ring buffer was full."""
        return self._refused[0]

    def write(self, traces: int) -> None:
        """Write at most ``traces`` traces (64 per run of the program); stops early when the ring buffer is full."""
        while traces > 0:
            self._budget[0] = min(64, traces)
            refused = self._refused[0]
            error = lib.spanloom_test_run(self._program, 0, self._duration, self._context, 16, self._result)
            if error:
                raise OSError(-error, "BPF_PROG_TEST_RUN failed")
            if self._refused[0] != refused:
                return
            traces -= 64

    def run(self, spans_per_second: float, seconds: float) -> int:
        """Write at an exact rate, late ones in a burst. Returns the spans due; what the ring buffer had no room for is
        due and not written."""
        traces_per_second = spans_per_second / SPANS_PER_TRACE
        traces = int(seconds * traces_per_second)
        started = time.monotonic()
        done = 0
        while done < traces:
            due = min(traces, int((time.monotonic() - started) * traces_per_second))
            if due > done:
                self.write(due - done)
                done = due
            time.sleep(0.001)
        return traces * SPANS_PER_TRACE

    def close(self) -> None:
        """Unload the program."""
        lib.bpf_object__close(self._object)
