"""The Helm engine in a process of its own: ``python -m tests.chart.engine`` answers one request per line.

In: JSON objects, ``{"chart": …, "values": …}`` to render or with ``"lint": true`` to lint. Out: ``{"result": …}`` or
``{"error": …}``, one line each. The engine is a Go runtime that brings threads and signal handlers of its own, which
have no place in the process where the other tests fork and measure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHART = Path(__file__).resolve().parents[2] / "charts" / "spanloom"
RELEASE, NAMESPACE = "spanloom", "tracing"


class RefusedError(Exception):
    """Helm refused the chart or the values; the text is Helm's."""


class Engine:
    """A running engine. Renders are cheap, starting it takes half a second: one serves a whole session."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.chart.engine"]
        directory = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def render(self, values: dict[str, Any], release: str = RELEASE, chart: Path = CHART) -> dict[str, str]:
        """Return template -> text, without those that gave nothing. Raises RefusedError as `helm install` would."""
        files = self._ask({"chart": str(chart), "values": values, "name": release, "namespace": NAMESPACE})
        return {name.partition("/templates/")[2]: text for name, text in sorted(files.items()) if text.strip()}

    def lint(self, values: dict[str, Any], chart: Path = CHART) -> list[dict[str, Any]]:
        """Return the findings of `helm lint --strict`; severity 1 is information, 2 a warning, 3 an error."""
        return self._ask({"chart": str(chart), "values": values, "lint": True})["messages"]

    def close(self) -> None:
        self._process.communicate(timeout=20)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the Helm engine ended; is helm-python-sdk installed?"
        answer = json.loads(line)
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer["result"]


def _serve() -> None:
    import helm_python

    for line in sys.stdin:
        request = json.loads(line)
        chart, values = request["chart"], request["values"]
        try:
            if request.get("lint"):
                result: Any = helm_python.lint(chart, values, strict=True)
            else:
                with helm_python.Chart.load(chart) as loaded:
                    result = loaded.render(values, name=request["name"], namespace=request["namespace"])
            answer = {"result": result}
        except helm_python.HelmError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
