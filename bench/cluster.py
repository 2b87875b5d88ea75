"""What one agent asks of the API server, and what pods cost in memory: ``python -m bench.cluster``.

Runs the real agent in its in-cluster mode against the tests' API server with a node full of pods: at rest, while pods
come and go, and with the spans of two of them exported at growing rates (bench/generator.py). With ``--services`` the
called services and pods of a whole cluster are named, too. Bytes are those on the wire, TLS included; memory is the
process's (RSS, of which the target is at most 110 MB with 250 pods and full export) and, with everything that the
kernel counts for it, BPF maps too, that of its cgroup.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.__main__ import collected, collector, free_port, get, memory_mb, sample, saturate, settle
from bench.generator import Generator
from tests.apiserver import ApiServer, make_endpoint_slice, make_pod, make_service

NODE = "node-a"
CGROUP = Path("/sys/fs/cgroup")
ENDPOINTS_PER_SLICE = 100


def volume(api: ApiServer, since: int) -> dict[str, int]:
    """Requests since then, and their bytes."""
    requests = api.requests[since:]
    return {
        "requests": len(requests),
        "bytes_to_agent": sum(request.wire_out for request in requests),
        "bytes_from_agent": sum(request.wire_in for request in requests),
    }


def per_hour(measured: dict[str, int], seconds: float) -> dict[str, int]:
    return {name: round(value * 3600 / seconds) for name, value in measured.items()}


@contextmanager
def cgroup(hierarchy: Path, name: str) -> Iterator[Path]:
    """A cgroup of its own, below the mount of a hierarchy; its processes have ended at the end."""
    path = hierarchy / name
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        deadline = time.monotonic() + 10
        while (path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        while path != hierarchy and not [child for child in path.iterdir() if child.is_dir()]:
            path.rmdir()
            path = path.parent


def entering(path: Path, command: list[str]) -> list[str]:
    """The command, started in a cgroup."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(path / "cgroup.procs"), *command]


def kernel_mb(path: Path) -> float:
    """The peak of what the kernel counts for a cgroup (v2, or v1's name of it), in MB."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if (path / name).exists():
            return int((path / name).read_text()) / 2**20
    return 0.0


def fill(api: ApiServer, pods: int, services: int, endpoints: int) -> list[str]:
    """Objects of a cluster. Returns the container ids of two pods of the node."""
    containers = [secrets.token_hex(32) for _ in range(2)]
    for number in range(pods):
        own = {"app": containers[number]} if number < len(containers) else ("app",)
        api.put(make_pod(f"pod-{number}", "shop", NODE, own, uid=f"00000000-0000-4000-8000-{number:012x}"))
    for number in range(services):
        api.put(make_service(f"service-{number}", "shop", f"10.96.{number >> 8 & 255}.{number & 255}", 80))
    for begin in range(0, endpoints, ENDPOINTS_PER_SLICE):
        behind = {
            f"pod-{number}": f"10.{128 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
            for number in range(begin, min(begin + ENDPOINTS_PER_SLICE, endpoints))
        }
        api.put(make_endpoint_slice(f"service-{begin // ENDPOINTS_PER_SLICE}", "shop", behind, 8080))
    return containers


def export(agent: int, port: int, counter: subprocess.Popen, pids: tuple[int, int], group: Path) -> list[dict]:
    """Spans of two pods at growing rates: what arrived with its pod, and memory."""
    results = []
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})  # not the agent's, as in ``make bench``
    generator = Generator(agent, pids)
    try:
        for rate in (1000, 5000, 20_000, 0):
            written, counted = generator.written, collected(counter)
            if rate:
                generator.run(rate, 5.0)
            else:
                saturate(generator, 5.0)
            settle(generator, counter)
            rss, peak = memory_mb(agent)
            results.append(
                {
                    "rate": rate or "full speed",
                    "written": generator.written - written,
                    "exported": collected(counter) - counted,
                    "rss_mb": round(rss, 1),
                    "peak_mb": round(peak, 1),
                    "cgroup_peak_mb": round(kernel_mb(group), 1),
                }
            )
    finally:
        generator.close()
        os.sched_setaffinity(0, cores)
    url = f"http://127.0.0.1:{port}"
    lost = sample(url, "spanloom_exchanges_dropped_total") + sample(url, "spanloom_export_dropped_total")
    return [*results, {"spans_without_pod": sample(url, "spanloom_kube_spans_without_pod_total"), "dropped": lost}]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--pods", type=int, default=250, help="pods of the node (default 250)")
    parser.add_argument(
        "--idle", type=float, default=60.0, help="seconds at rest (default 60; 900 sees watches renewed)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of churn (default 60)")
    parser.add_argument("--churn", type=int, default=200, help="pods created and deleted in the second phase")
    parser.add_argument("--services", type=int, default=0, help="name peers, in a cluster of so many services")
    parser.add_argument("--endpoints", type=int, default=0, help="pods behind them")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        api = stack.enter_context(ApiServer())
        account = api.write_service_account(Path(folder) / "account")
        containers = fill(api, arguments.pods, arguments.services, arguments.endpoints)
        unified = next(path for path in (CGROUP / "unified", CGROUP) if (path / "cgroup.procs").exists())
        memory = CGROUP / "memory" if (CGROUP / "memory").exists() else unified
        group = stack.enter_context(cgroup(memory, f"spanloom-bench-{os.getpid()}"))
        pods = []
        for number, container in enumerate(containers):
            slice_name = f"kubepods-burstable-pod00000000_0000_4000_8000_{number:012x}.slice"
            name = f"kubepods.slice/kubepods-burstable.slice/{slice_name}/cri-containerd-{container}.scope"
            path = stack.enter_context(cgroup(unified, name))
            pods.append(subprocess.Popen(entering(path, ["sleep", "900"])))
            stack.callback(lambda process=pods[-1]: (process.kill(), process.wait()))
        sink, counter = stack.enter_context(collector())
        port = free_port()
        command = [
            "taskset",
            "-c",
            "1",
            sys.executable,
            "-m",
            "agent",
            "run",
            "--set",
            f"telemetry.listen=127.0.0.1:{port}",
        ]
        command += ["--set", f"kubernetes.service_account={account}", "--set", "select.ports.include=[1]"]
        command += ["--set", f"export.otlp.endpoint=http://127.0.0.1:{sink}"]
        command += ["--set", f"kubernetes.peers={str(arguments.services > 0).lower()}"]
        agent = subprocess.Popen(
            entering(group, command), env={**os.environ, **api.environ, "NODE_NAME": NODE}, stderr=subprocess.DEVNULL
        )
        stack.callback(lambda: (agent.terminate(), agent.wait(20)))
        url = f"http://127.0.0.1:{port}"
        known = {
            "spanloom_kube_pods": arguments.pods,
            "spanloom_kube_peer_addresses": arguments.services + arguments.endpoints,
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                if all(sample(url, name) == value for name, value in known.items()):
                    break
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise SystemExit("the agent does not know the cluster: " + get(url + "/metrics")[-2000:])
            time.sleep(0.1)
        result: dict[str, object] = {"pods": arguments.pods, "services": arguments.services}
        result |= {"endpoints": arguments.endpoints, "start": volume(api, 0)}
        watches = [request for request in api.requests if request.verb == "watch"]
        before, since = sum(request.wire_out for request in watches), len(api.requests)
        time.sleep(arguments.idle)
        idle = volume(api, since)
        idle["bytes_to_agent"] += sum(request.wire_out for request in watches) - before
        result["idle"] = {"seconds": arguments.idle, **idle, "per_hour": per_hour(idle, arguments.idle)}
        result["rss_mb"], result["peak_mb"] = (round(value, 1) for value in memory_mb(agent.pid))
        result["cgroup_peak_mb"] = round(kernel_mb(group), 1)
        watches = [request for request in api.requests if request.verb == "watch"]
        before = sum(request.wire_out for request in watches)
        since = len(api.requests)
        for number in range(arguments.churn):
            api.put(make_pod(f"job-{number}", "jobs", NODE, uid=str(uuid.uuid4())))
            if arguments.services:
                behind = {f"job-{number}": f"10.99.{number >> 8 & 255}.{number & 255}"}
                api.put(make_endpoint_slice("jobs", "jobs", behind, 8080))
            time.sleep(arguments.seconds / arguments.churn)
            api.delete("jobs", f"job-{number}")
        time.sleep(1.0)
        churn = volume(api, since)
        churn["bytes_to_agent"] += sum(request.wire_out for request in watches) - before
        result["churn"] = {"seconds": arguments.seconds, "pods": arguments.churn, **churn}
        result["churn"]["per_hour"] = per_hour(churn, arguments.seconds)
        result["rss_mb_after_churn"], result["peak_mb_after_churn"] = (
            round(value, 1) for value in memory_mb(agent.pid)
        )
        result["pods_known_after_churn"] = sample(url, "spanloom_kube_pods")
        result["export"] = export(agent.pid, port, counter, (pods[0].pid, pods[1].pid), group)
        for process in (agent, *pods):
            process.terminate()
            process.wait(20)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
