"""What one agent asks of the API server, and what pods cost in memory: ``python -m bench.cluster``.

Runs the real agent in its in-cluster mode against the tests' API server with a node full of pods, at rest and while
they come and go. Bytes are those on the wire, TLS included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from bench.__main__ import free_port, get, memory_mb, sample
from tests.apiserver import ApiServer, make_pod

NODE = "node-a"


def volume(api: ApiServer, since: int) -> dict[str, int]:
    """Requests since then, and their bytes."""
    requests = api.requests[since:]
    return {
        "requests": len(requests),
        "bytes_to_agent": sum(request.wire_out for request in requests),
        "bytes_from_agent": sum(request.wire_in for request in requests),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--pods", type=int, default=250, help="pods of the node (default 250)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each phase (default 60)")
    parser.add_argument("--churn", type=int, default=200, help="pods created and deleted in the second phase")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ApiServer() as api:
        account = api.write_service_account(Path(folder) / "account")
        for number in range(arguments.pods):
            api.put(make_pod(f"pod-{number}", "shop", NODE))
        port = free_port()
        command = [sys.executable, "-m", "agent", "run", "--set", f"telemetry.listen=127.0.0.1:{port}"]
        command += ["--set", f"kubernetes.service_account={account}", "--set", "select.ports.include=[1]"]
        command += ["--set", "export.otlp.endpoint=http://127.0.0.1:1"]
        agent = subprocess.Popen(
            command, env={**os.environ, **api.environ, "NODE_NAME": NODE}, stderr=subprocess.DEVNULL
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    if sample(url, "spanloom_kube_pods") == arguments.pods:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            else:
                raise SystemExit("the agent does not know the pods: " + get(url + "/metrics")[-2000:])
            result: dict[str, object] = {"pods": arguments.pods, "start": volume(api, 0)}
            since = len(api.requests)
            time.sleep(arguments.seconds)
            result["idle"] = {"seconds": arguments.seconds, **volume(api, since)}
            result["rss_mb"], result["peak_mb"] = (round(value, 1) for value in memory_mb(agent.pid))
            watched = api.requests[-1]
            before = watched.wire_out
            since = len(api.requests)
            for number in range(arguments.churn):
                pod = make_pod(f"job-{number}", "jobs", NODE, uid=str(uuid.uuid4()))
                api.put(pod)
                time.sleep(arguments.seconds / arguments.churn)
                api.delete("jobs", f"job-{number}")
            time.sleep(1.0)
            churn = volume(api, since)
            churn["bytes_to_agent"] += watched.wire_out - before
            result["churn"] = {"seconds": arguments.seconds, "pods": arguments.churn, **churn}
            result["rss_mb_after_churn"], result["peak_mb_after_churn"] = (
                round(value, 1) for value in memory_mb(agent.pid)
            )
            result["pods_known_after_churn"] = sample(url, "spanloom_kube_pods")
        finally:
            agent.terminate()
            agent.wait(20)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
