"""Helm against a cluster, each action in a process of its own: see tests/chart/engine.py for why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.chart.engine import CHART, RefusedError

_SECONDS = 120


def helm(kubeconfig: Path, action: str, release: str, namespace: str, values: Any = None) -> dict[str, Any]:
    """``helm install``, ``upgrade`` or ``uninstall`` without waiting. Raises RefusedError with Helm's own text."""
    request = {"kubeconfig": str(kubeconfig), "action": action, "release": release, "namespace": namespace}
    request["values"] = values or {}
    command = [sys.executable, "-m", "tests.real.helm"]
    run = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    if "error" in answer:
        raise RefusedError(answer["error"])
    return answer["result"]


def _serve() -> None:
    import helm_python

    request = json.load(sys.stdin)
    release, namespace = request["release"], request["namespace"]
    try:
        with helm_python.Config(kubeconfig_path=request["kubeconfig"], namespace=namespace) as config:
            if request["action"] == "uninstall":
                result = config.uninstall(release)
            else:
                act = {"install": config.install, "upgrade": config.upgrade}[request["action"]]
                result = act(str(CHART), release, request["values"], namespace=namespace)
        answer = {"result": result}
    except helm_python.HelmError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
