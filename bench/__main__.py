"""``python -m bench``: the cost of the agent on this machine, as a table and as one JSON document.

Every figure is a ratio or a count within one run, its target is printed beside it where it has one; nothing here passes
or fails. Needs root and two cores: the agent is
pinned to core 1, what it is measured against to core 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.generator import Generator

TARGETS = {
    "throughput_ratio": 0.80,
    "throughput_ratio_tls": 0.75,
    "cpu_us_per_span_http2": 20.0,
    "cpu_us_per_span": 12.0,
    "complete_percent": 100.0,
    "memory_mb": 80.0,
    "seconds_to_first_span": 2.0,
}
"""What is aimed at, whatever the machine: at least the ratios and the completeness, at most the others."""
CPU_TARGET_FROM, COMPLETE_TARGET_AT = 5000, 20000
"""Spans per second from which on, and at which, these targets hold: fewer spans share the agent's idle turns."""

BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads (proc(5), /proc/pid/schedstat has nanoseconds per thread)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return total / 1e9


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident set now and at its peak, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "VmHWM"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


@contextmanager
def collector(core: int = 0) -> Iterator[tuple[int, subprocess.Popen]]:
    """A collector that counts: by default not on the agent's core."""
    process = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, "-m", "tests.collector", "--port", "0", "--count-only"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield int(process.stdout.readline()), process
    finally:
        process.terminate()
        process.wait(10)


def collected(process: subprocess.Popen) -> int:
    """The collector's count so far."""
    process.send_signal(signal.SIGUSR1)
    return int(process.stdout.readline().split()[-1])


@contextmanager
def agent(endpoint_port: int, *settings: str, core: int = 1) -> Iterator[tuple[int, str]]:
    """The real agent on one core: its pid and its telemetry URL."""
    port = free_port()
    arguments = [f"export.otlp.endpoint=http://127.0.0.1:{endpoint_port}", f"telemetry.listen=127.0.0.1:{port}"]
    command = ["taskset", "-c", str(core), sys.executable, "-m", "agent", "run"]
    for setting in (*arguments, *settings):
        command += ["--set", setting]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                if get(url + "/readyz"):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the agent did not start: {process.stderr.read()}") from None
                time.sleep(0.02)
        yield process.pid, url
    finally:
        process.terminate()
        process.wait(20)


def sample(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", get(url + "/metrics"), re.MULTILINE)
    return sum(map(float, found))


def measure_spans(rate: float, seconds: float, *settings: str) -> dict[str, float]:
    """Agent CPU per exported span, from ring-buffer record to acknowledged OTLP. ``rate`` 0: as fast as it goes."""
    bystanders = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    try:
        with (
            collector() as (port, counter),
            agent(port, "select.ports.include=[1]", *settings) as (pid, url),
        ):
            os.sched_setaffinity(0, {0})
            generator = Generator(pid, (bystanders[0].pid, bystanders[1].pid))
            generator.run(1000, 1.0)  # imports, channel, caches
            settle(generator, counter)
            written, counted = generator.written, collected(counter)
            before, began = cpu_seconds(pid), time.monotonic()
            due = generator.run(rate, seconds) if rate else saturate(generator, seconds)
            settle(generator, counter)
            used, took = cpu_seconds(pid) - before, time.monotonic() - began
            written, counted = generator.written - written, collected(counter) - counted
            due = due or written
            rss, peak = memory_mb(pid)
            lost = sample(url, "spanloom_exchanges_dropped_total") + sample(url, "spanloom_export_dropped_total")
            generator.close()
            return {
                "rate": rate or round(written / took),
                "due": due,
                "spans": counted,
                "cpu_us_per_span": round(used / max(counted, 1) * 1e6, 2),
                "complete_percent": complete_percent(counted, due),
                "refused_by_full_ring": due - written,
                "dropped": lost,
                "core_percent": round(100 * used / took, 1),
                "rss_mb": round(rss, 1),
                "peak_mb": round(peak, 1),
            }
    finally:
        os.sched_setaffinity(0, range(os.cpu_count()))
        for process in bystanders:
            process.kill()
            process.wait()


def middle_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run with the median cost, with the worst of all runs where something may be lost or grow."""
    middle = dict(sorted(runs, key=lambda run: run["cpu_us_per_span"])[len(runs) // 2])
    middle["complete_percent"] = min(run["complete_percent"] for run in runs)
    for name in ("dropped", "refused_by_full_ring", "rss_mb", "peak_mb"):
        middle[name] = max(run[name] for run in runs)
    return middle


def complete_percent(counted: int, due: int) -> float:
    """Spans that arrived of those that were due, cut and not rounded: 100 means all."""
    return math.floor(100_000 * counted / max(due, 1)) / 1000


def saturate(generator: Generator, seconds: float) -> int:
    """Keep the ring buffer filled. Returns 0: what does not fit is tried again, so nothing is due at a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        generator.write(640)
        time.sleep(0.002)
    return 0


def settle(generator: Generator, counter: subprocess.Popen) -> None:
    """Wait until the collector's count stands still at the number of spans written, or just stands still."""
    deadline, last = time.monotonic() + 60, -1
    while time.monotonic() < deadline:
        count = collected(counter)
        if count >= generator.written or (count == last and time.monotonic() > deadline - 55):
            return
        last = count
        time.sleep(0.25)


KINDS = ("http", "https", "http2", "grpc")
MULTIPLEXED = ("http2", "grpc")


class Server(NamedTuple):
    """What is asked: its port, the pid of the process that answers, and how many requests that has served so far."""

    port: int
    pid: int
    served: Callable[[], int]


"""What nginx is asked by: HTTP/1.1, the same over TLS, HTTP/2 in the clear; one connection kept for many requests."""


@contextmanager
def nginx(kind: str = "http") -> Iterator[Server]:
    """A single-worker nginx on core 0 with the settings of Debian's package and a small page."""
    folder = tempfile.mkdtemp(prefix="spanloom-bench-")
    port, status_port = free_port(), free_port()
    Path(folder, "index.html").write_text("hello " * 100)
    secured = ""
    if kind == "https":
        key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        secured = f"ssl_certificate {certificate}; ssl_certificate_key {key};"
    listens = f"127.0.0.1:{port}{ {'http': '', 'https': ' ssl', 'http2': ' http2'}[kind] }"
    Path(folder, "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log {folder}/access.log; sendfile on; tcp_nopush on; keepalive_requests 100000000;\n"
        f"root {folder}; server {{ listen {listens}; {secured} }}\n"
        f"server {{ listen 127.0.0.1:{status_port}; location / {{ access_log off; stub_status; }} }} }}\n"
    )
    os.chmod(folder, 0o755)
    process = subprocess.Popen(
        ["taskset", "-c", "0", shutil.which("nginx") or "/usr/sbin/nginx", "-c", f"{folder}/nginx.conf"]
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        with socket.create_connection(("127.0.0.1", status_port)) as status:

            def served() -> int:
                status.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
                return int(re.search(rb"\n (\d+) (\d+) (\d+)", status.recv(4096))[3])

            yield Server(port, int(children[0]), served)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


@contextmanager
def grpcio() -> Iterator[Server]:
    """grpcio's server on core 0, in Python: bench/grpc_load.py."""
    port = free_port()
    command = ["taskset", "-c", "0", sys.executable, "-m", "bench.grpc_load", "serve", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()

        def served() -> int:
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield Server(port, process.pid, served)
    finally:
        process.stdin.close()
        process.wait(10)


@contextmanager
def requests(kind: str, port: int, seconds: float) -> Iterator[None]:
    """Requests from core 1: over 256 connections, as fewer leave the worker idle while the agent has the core, or over
    16 with 16 streams each, which are new every second: of those that are older than the agent it sees little.

    Its TLS library is another file than the server's: clients elsewhere do not meet the server's breakpoints.
    """
    length = int(seconds) + 1
    if kind == "grpc":
        command = [sys.executable, "-m", "bench.grpc_load", "call", str(port), str(length)]
    elif kind == "http2":
        once = f"h2load -t1 -c16 -m16 -D1 http://127.0.0.1:{port}/"
        command = ["sh", "-c", f"for second in $(seq {length}); do {once}; done"]
    else:
        command = ["wrk", "-t1", "-c256", f"-d{length}s", f"{kind}://127.0.0.1:{port}/"]
    with tempfile.TemporaryDirectory() as libraries:
        linked = subprocess.run(
            ["ldd", shutil.which(command[0]) or ""], capture_output=True, text=True, check=True
        ).stdout
        for path in re.findall(r"=> (/\S*/lib(?:ssl|crypto)\.so\S*)", linked):
            shutil.copy(path, libraries)
        process = subprocess.Popen(
            ["taskset", "-c", "1", *command],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)


class Switchable:
    """The real agent on core 1, its probes on and off by command: bench/switchable.py."""

    def __init__(self, *settings: str) -> None:
        command = ["taskset", "-c", "1", sys.executable, "-m", "bench.switchable", *settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the agent did not start")
        return line

    def command(self, name: str) -> str:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


def measure_server(pairs: int, backend: str, kind: str = "http") -> dict[str, object]:
    """Requests per second of a saturated server, attached over not attached, in short windows one after the other; and
    the agent's CPU time per span of the attached ones, all that it does included.
    """
    settle_seconds, window_seconds = (1.5 if kind in MULTIPLEXED else 0.75), 0.5
    windows: dict[str, list[tuple[float, float]]] = {"detached": [], "attached": []}
    # Core 0 is the server's alone: everything else shares core 1 with the agent.
    agent_seconds = spans = 0
    # The load generator stands for clients elsewhere and is not traced, but for gRPC's: its executable is the server's.
    excluded, spans_per_request = ("", 2) if kind == "grpc" else ("wrk, h2load", 1)
    with grpcio() if kind == "grpc" else nginx(kind) as server, collector(core=1) as (collector_port, _):
        port, worker, served = server
        agent = Switchable(
            f"export.otlp.endpoint=http://127.0.0.1:{collector_port}",
            "telemetry.listen=null",
            f"select.executables.exclude=[{excluded}]",
            f"select.ports.include=[{port}]",
            f"kernel.backend={backend}",
            f"capture.tls={str(kind == 'https').lower()}",
        )

        def window() -> tuple[float, float]:
            count, used, began = served(), cpu_seconds(worker), time.monotonic()
            time.sleep(window_seconds)
            count, used = served() - count, cpu_seconds(worker) - used
            took = time.monotonic() - began
            return count / took, used / took

        def statistics_of_programs() -> dict[str, dict[str, float]]:
            previous = BPF_STATS.read_text()
            BPF_STATS.write_text("1")
            try:
                before = json.loads(agent.command("statistics"))
                requests = served()
                time.sleep(1.0)
                after = json.loads(agent.command("statistics"))
                requests = served() - requests
            finally:
                BPF_STATS.write_text(previous)
            programs = {}
            for name, (runs, spent) in after["programs"].items():
                runs_before, spent_before = before["programs"].get(name, (0, 0))
                runs, spent = runs - runs_before, spent - spent_before
                if runs:
                    programs[name] = {
                        "ns_per_run": round(spent / runs),
                        "runs_per_request": round(runs / requests, 2),
                        "ns_per_request": round(spent / requests),
                    }
            return programs

        try:
            with requests(kind, port, 2 * pairs * (settle_seconds + window_seconds + 0.2) + 8):
                for _ in range(pairs):
                    for state in ("detached", "attached"):
                        agent.command(state.removesuffix("ed"))
                        time.sleep(settle_seconds)
                        used = cpu_seconds(agent.process.pid)
                        windows[state].append(window())
                        if state == "attached":
                            agent_seconds += cpu_seconds(agent.process.pid) - used
                            spans += round(windows[state][-1][0] * window_seconds) * spans_per_request
                programs = statistics_of_programs()
            counters = json.loads(agent.command("statistics"))["counters"]
        finally:
            agent.close()
    paired = list(zip(windows["detached"], windows["attached"], strict=True))
    return {
        "server": "grpcio" if kind == "grpc" else "nginx",
        "kind": kind,
        "backend": backend,
        "agent_us_per_span": round(agent_seconds / max(spans, 1) * 1e6, 2),
        "requests_per_second_plain": round(statistics.median(rate for rate, _ in windows["detached"])),
        "requests_per_second_traced": round(statistics.median(rate for rate, _ in windows["attached"])),
        "throughput_ratio": round(statistics.median(traced[0] / plain[0] for plain, traced in paired), 3),
        # By the worker's CPU time per request: what a worker without idle time serves.
        "capacity_ratio": round(
            statistics.median((plain[1] / plain[0]) / (traced[1] / traced[0]) for plain, traced in paired), 3
        ),
        "worker_busy_percent_plain": round(100 * statistics.median(busy for _, busy in windows["detached"]), 1),
        "worker_busy_percent_traced": round(100 * statistics.median(busy for _, busy in windows["attached"]), 1),
        "dropped": sum(value for name, value in counters.items() if name.startswith("dropped")),
        "begun": counters["begun"],
        "programs": programs,
    }


def measure_start(rounds: int) -> dict[str, float]:
    """Seconds from starting the agent to its first span at the collector, with requests going on all the time."""
    seconds = []
    with nginx() as server, collector() as (collector_port, counter):
        for _ in range(rounds):
            counted = collected(counter)
            began = time.monotonic()
            with agent(collector_port, "export.batch.max_delay_seconds=0.1", f"select.ports.include=[{server.port}]"):
                while collected(counter) == counted and time.monotonic() - began < 30:
                    get(f"http://127.0.0.1:{server.port}/")
                    time.sleep(0.02)
                seconds.append(time.monotonic() - began)
    return {"seconds_to_first_span": round(statistics.median(seconds), 2), "rounds": rounds}


def table(result: dict) -> str:
    """The result as text for people."""
    lines = []
    if "nginx" in result:
        for web in result["nginx"]:
            lines += [
                f"{web['server']} by {web['kind']}, one saturated worker, backend {web['backend']}",
                "  (agent and load generator on the other core)",
                f"  requests/s attached / not attached   {web['throughput_ratio']:.3f}{_ratio_target(web['kind'])}",
                f"  ({web['requests_per_second_traced']} / {web['requests_per_second_plain']}, worker busy "
                f"{web['worker_busy_percent_traced']:.0f} % / {web['worker_busy_percent_plain']:.0f} %)",
                f"  the same by the worker's CPU time per request   {web['capacity_ratio']:.3f}",
                f"  agent, CPU µs per span   {web['agent_us_per_span']:.2f}{_http2_target(web['kind'])}",
                f"  exchanges dropped   {web['dropped']} of {web['begun']}",
                "",
                "  program                 ns/run  runs/request  ns/request",
            ]
            lines += [
                f"  {name:<20} {one['ns_per_run']:>9} {one['runs_per_request']:>13} {one['ns_per_request']:>11}"
                for name, one in web["programs"].items()
            ]
            lines.append("")
    if "spans" in result:
        lines += [
            "agent, from ring-buffer record to acknowledged OTLP (each figure with its target)",
            "  spans/s     CPU µs/span      complete %   ring full   dropped   core %      RSS MB     peak MB",
        ]
        lines += [
            f"  {one['rate']:>7.0f} {_cpu(one):>15} {_complete(one):>15} {one['refused_by_full_ring']:>11} "
            f"{one['dropped']:>9.0f} {one['core_percent']:>8} "
            f"{_memory(one['rss_mb']):>11} {_memory(one['peak_mb']):>11}"
            for one in result["spans"]
        ]
        lines.append("")
    if "start" in result:
        lines.append(
            f"start to first span: {result['start']['seconds_to_first_span']} s "
            f"(target: at most {TARGETS['seconds_to_first_span']:g} s)"
        )
    return "\n".join(lines)


def _ratio_target(kind: str) -> str:
    target = {"http": TARGETS["throughput_ratio"], "https": TARGETS["throughput_ratio_tls"]}.get(kind)
    return f"   (target: at least {target:.2f})" if target else ""


def _http2_target(kind: str) -> str:
    return f"   (target: at most {TARGETS['cpu_us_per_span_http2']:g})" if kind in MULTIPLEXED else ""


def _cpu(one: dict[str, float]) -> str:
    target = f" ≤ {TARGETS['cpu_us_per_span']:g}" if one["rate"] >= CPU_TARGET_FROM else ""
    return f"{one['cpu_us_per_span']:.2f}{target:<5}"


def _complete(one: dict[str, float]) -> str:
    target = f" = {TARGETS['complete_percent']:g}" if one["rate"] == COMPLETE_TARGET_AT else ""
    return f"{one['complete_percent']:.3f}{target:<6}"


def _memory(megabytes: float) -> str:
    return f"{megabytes:.1f} ≤ {TARGETS['memory_mb']:g}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["nginx", "spans", "start", []], help="default: all")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement (default 6)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the agent (spans)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each rate of spans (default 3)")
    parser.add_argument(
        "--pairs", type=int, default=15, help="windows without and with the probes on nginx (default 15)"
    )
    parser.add_argument(
        "--backends", nargs="*", default=["sockets", "syscalls"], help="kernel.backend of the nginx comparison"
    )
    parser.add_argument(
        "--kinds", nargs="*", default=KINDS, choices=KINDS, help="what the server is asked by (default: all)"
    )
    arguments = parser.parse_args()
    parts = arguments.parts or ["nginx", "spans", "start"]
    result: dict[str, object] = {}
    if "nginx" in parts:
        print("measuring nginx …", file=sys.stderr)
        result["nginx"] = [
            measure_server(arguments.pairs, backend, kind) for kind in arguments.kinds for backend in arguments.backends
        ]
    if "spans" in parts:
        result["spans"] = []
        for rate in (1000, 5000, 20000, 0):
            print(f"measuring {rate or 'all the'} spans/s …", file=sys.stderr)
            runs = [measure_spans(rate, arguments.seconds, *arguments.set) for _ in range(arguments.repeat)]
            result["spans"].append(middle_of(runs))
    if "start" in parts:
        print("measuring the start …", file=sys.stderr)
        result["start"] = measure_start(3)
    result["targets"] = TARGETS
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
