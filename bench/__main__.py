"""``python -m bench``: the cost of the agent on this machine, as a table and as one JSON document.

Every figure is a ratio or a count within one run; nothing here passes or fails. Needs root and two cores: the agent is
pinned to core 1, what it is measured against to core 0.
"""

from __future__ import annotations

import argparse
import json
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.generator import SPANS_PER_TRACE, Generator

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
def collector() -> Iterator[tuple[int, subprocess.Popen]]:
    """A collector that counts, on core 0."""
    process = subprocess.Popen(
        ["taskset", "-c", "0", sys.executable, "-m", "tests.collector", "--port", "0", "--count-only"],
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
            if rate:
                generator.run(rate, seconds)
            else:
                saturate(generator, seconds)
            settle(generator, counter)
            used, took = cpu_seconds(pid) - before, time.monotonic() - began
            written, counted = generator.written - written, collected(counter) - counted
            rss, peak = memory_mb(pid)
            lost = sample(url, "spanloom_exchanges_dropped_total") + sample(url, "spanloom_export_dropped_total")
            generator.close()
            return {
                "rate": rate or round(written / took),
                "spans": counted,
                "cpu_us_per_span": round(used / max(counted, 1) * 1e6, 2),
                "complete_percent": round(100 * counted / max(written, 1), 3),
                "refused_by_full_ring": generator_refusals(written, rate, seconds),
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


def generator_refusals(written: int, rate: float, seconds: float) -> int:
    """Spans that were due and not written, because the ring buffer was full (0 at full speed: it waits there)."""
    if not rate:
        return 0
    due = int(rate / SPANS_PER_TRACE * seconds) * SPANS_PER_TRACE
    return max(0, due - written - SPANS_PER_TRACE * 64)


def saturate(generator: Generator, seconds: float) -> None:
    """Keep the ring buffer filled."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        generator.write(640)
        time.sleep(0.002)


def settle(generator: Generator, counter: subprocess.Popen) -> None:
    """Wait until the collector's count stands still at the number of spans written, or just stands still."""
    deadline, last = time.monotonic() + 60, -1
    while time.monotonic() < deadline:
        count = collected(counter)
        if count >= generator.written or (count == last and time.monotonic() > deadline - 55):
            return
        last = count
        time.sleep(0.25)


@contextmanager
def nginx() -> Iterator[tuple[int, int]]:
    """A single-worker nginx on core 0, serving a small file: its port and its worker's pid."""
    folder = tempfile.mkdtemp(prefix="spanloom-bench-")
    port = free_port()
    Path(folder, "index.html").write_text("hello " * 20)
    Path(folder, "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 1000000; root {folder};\n"
        f"server {{ listen 127.0.0.1:{port}; }} }}\n"
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
        yield port, int(children[0])
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


def wrk(port: int, seconds: int) -> float:
    """Requests per second of 64 keep-alive connections, from core 1."""
    output = subprocess.run(
        ["taskset", "-c", "1", "wrk", "-t1", "-c64", f"-d{seconds}s", f"http://127.0.0.1:{port}/"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1])


def measure_nginx(rounds: int, seconds: int) -> dict[str, object]:
    """Requests per second of a saturated nginx, attached over not attached, in alternating rounds; ns per program."""
    plain: list[tuple[float, float]] = []
    traced: list[tuple[float, float]] = []
    programs: dict[str, dict[str, float]] = {}

    def one(results: list[tuple[float, float]]) -> None:
        before, began = cpu_seconds(worker), time.monotonic()
        rate = wrk(port, seconds)
        busy = (cpu_seconds(worker) - before) / (time.monotonic() - began)
        results.append((rate, busy))

    with nginx() as (port, worker), collector() as (collector_port, _):
        wrk(port, 1)
        for _ in range(rounds):
            one(plain)
            # The load generator stands for clients elsewhere: it is not traced.
            with agent(collector_port, "select.executables.exclude=[wrk]", f"select.ports.include=[{port}]"):
                wrk(port, 1)
                one(traced)
        with agent(collector_port, "select.executables.exclude=[wrk]", f"select.ports.include=[{port}]") as (_, url):
            previous = BPF_STATS.read_text()
            BPF_STATS.write_text("1")
            try:
                rate = wrk(port, seconds)
                text = get(url + "/metrics")
            finally:
                BPF_STATS.write_text(previous)
            requests = rate * seconds
            for name in re.findall(r'spanloom_program_runs_total{program="(\w+)"}', text):
                runs = float(re.search(rf'spanloom_program_runs_total{{program="{name}"}} (\S+)', text)[1])
                spent = float(re.search(rf'spanloom_program_seconds_total{{program="{name}"}} (\S+)', text)[1])
                if runs:
                    programs[name] = {
                        "ns_per_run": round(spent / runs * 1e9),
                        "runs_per_request": round(runs / requests, 2),
                        "ns_per_request": round(spent / requests * 1e9),
                    }
    rates = [t[0] / p[0] for p, t in zip(plain, traced, strict=True)]
    # What a worker with no time to spare serves: the load generator shares its core with the agent and may not keep
    # the worker busy while the agent works.
    cpu = [(t[1] / t[0]) / (p[1] / p[0]) for p, t in zip(plain, traced, strict=True)]
    return {
        "requests_per_second_plain": round(statistics.median(rate for rate, _ in plain)),
        "requests_per_second_traced": round(statistics.median(rate for rate, _ in traced)),
        "throughput_ratio": round(statistics.median(rates), 3),
        "capacity_ratio": round(1 / statistics.median(cpu), 3),
        "worker_busy_percent_plain": round(100 * statistics.median(busy for _, busy in plain), 1),
        "worker_busy_percent_traced": round(100 * statistics.median(busy for _, busy in traced), 1),
        "programs": programs,
    }


def measure_start(rounds: int) -> dict[str, float]:
    """Seconds from starting the agent to its first span at the collector, with requests going on all the time."""
    seconds = []
    with nginx() as (port, _), collector() as (collector_port, counter):
        for _ in range(rounds):
            counted = collected(counter)
            began = time.monotonic()
            with agent(collector_port, "export.batch.max_delay_seconds=0.1", f"select.ports.include=[{port}]"):
                while collected(counter) == counted and time.monotonic() - began < 30:
                    get(f"http://127.0.0.1:{port}/")
                    time.sleep(0.02)
                seconds.append(time.monotonic() - began)
    return {"seconds_to_first_span": round(statistics.median(seconds), 2), "rounds": rounds}


def table(result: dict) -> str:
    """The result as text for people."""
    lines = []
    if "nginx" in result:
        web = result["nginx"]
        lines += [
            "nginx, one saturated worker (agent on the other core)",
            f"  requests/s attached / not attached   {web['throughput_ratio']:.3f}   "
            f"({web['requests_per_second_traced']} / {web['requests_per_second_plain']}, worker busy "
            f"{web['worker_busy_percent_traced']:.0f} % / {web['worker_busy_percent_plain']:.0f} %)",
            f"  the same for a worker busy all the time, by its CPU per request   {web['capacity_ratio']:.3f}",
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
            "agent, from ring-buffer record to acknowledged OTLP",
            "  spans/s   CPU µs/span   complete %   core %   RSS MB   peak MB   dropped",
        ]
        lines += [
            f"  {one['rate']:>7.0f} {one['cpu_us_per_span']:>13} {one['complete_percent']:>12} "
            f"{one['core_percent']:>8} {one['rss_mb']:>8} {one['peak_mb']:>9} {one['dropped']:>9.0f}"
            for one in result["spans"]
        ]
        lines.append("")
    if "start" in result:
        lines.append(f"start to first span: {result['start']['seconds_to_first_span']} s")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["nginx", "spans", "start", []], help="default: all")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement (default 6)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the agent (spans)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the nginx comparison (default 5)")
    arguments = parser.parse_args()
    parts = arguments.parts or ["nginx", "spans", "start"]
    result: dict[str, object] = {}
    if "nginx" in parts:
        print("measuring nginx …", file=sys.stderr)
        result["nginx"] = measure_nginx(arguments.rounds, max(1, round(arguments.seconds / 3)))
    if "spans" in parts:
        result["spans"] = []
        for rate in (1000, 5000, 20000, 0):
            print(f"measuring {rate or 'all the'} spans/s …", file=sys.stderr)
            result["spans"].append(measure_spans(rate, arguments.seconds, *arguments.set))
    if "start" in parts:
        print("measuring the start …", file=sys.stderr)
        result["start"] = measure_start(3)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
