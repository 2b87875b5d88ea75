"""The agent as a child process: ``spanloom run`` with its spans as JSON lines on a pipe.

In: the ports to look at. Out: spans as the records that the console draws. Never: a wait for the agent without a bound,
an error of the agent that stays unexplained: its own line and its exit code are passed on.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agent
from agent.demo.application import Children
from agent.errors import SpanloomError
from agent.model import Attributes, Span, SpanKind, SpanLink
from agent.process import ProcessInfo

Item = tuple[Span, ProcessInfo]

READY_SECONDS = 30.0
FLUSH_SECONDS = 10.0  # the agent itself promises five
_POLL_SECONDS = 0.02
_READ_BYTES = 1 << 16  # the size of a pipe
_READS = 16  # at a time, however much there is
_KINDS = {kind.name.lower(): int(kind) for kind in SpanKind}


class AgentEndedError(SpanloomError):
    """The agent ended when it should not have. The text and the exit code are its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AgentProcess:
    """A running agent. What it writes has to be taken with ``take`` now and then, or it waits, and drops in the end."""

    def __init__(self, children: Children, ports: Sequence[int], telemetry: str) -> None:
        self._children = children
        self._telemetry = telemetry
        self._rest = b""
        settings = {
            "export.console": "json",
            "select.ports.include": json.dumps(list(ports)),
            "telemetry.listen": telemetry,
            "telemetry.log_format": "json",
        }
        command = [sys.executable, "-P", "-m", "agent", "run"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        # The package that runs now, wherever the demo was started: -P keeps an "agent" of the current directory out.
        paths = [str(Path(agent.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = children.start("agent", command, environment, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)

    def wait_until_ready(self) -> None:
        """Wait until the probes are attached. Raises AgentEndedError when the agent gives up instead."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self.raise_if_ended()
            if self._is_ready():
                return
            if time.monotonic() > deadline:
                raise SpanloomError(f"the agent is not ready after {READY_SECONDS:.0f} s: {self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self._telemetry, timeout=1.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def raise_if_ended(self) -> None:
        code = self._process.poll()
        if code is not None:
            raise AgentEndedError(self._last_words(), code if code > 0 else 1)

    def _last_words(self) -> str:
        lines = self._children.log("agent").splitlines()
        said = [line.removeprefix("spanloom: ") for line in lines if line.startswith("spanloom: ")]
        return said[-1] if said else f"the agent ended: {lines[-1] if lines else 'it said nothing'}"

    def take(self) -> list[Item]:
        """The spans that came since the last call. Does not wait."""
        for _ in range(_READS):
            chunk = self._output.read(_READ_BYTES)
            if not chunk:
                break
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        return [span_from_json(line) for line in lines]

    def stop(self) -> list[Item]:
        """End the agent as an operator would. Returns the spans that it still had; raises if that goes wrong."""
        self._process.terminate()
        deadline = time.monotonic() + FLUSH_SECONDS
        items = []
        while self._process.poll() is None:
            items += self.take()
            if time.monotonic() > deadline:
                raise SpanloomError(f"the agent does not end within {FLUSH_SECONDS:.0f} s after SIGTERM")
            time.sleep(_POLL_SECONDS)
        while rest := self.take():
            items += rest
        if self._process.returncode:
            self.raise_if_ended()
        return items


def span_from_json(line: bytes) -> Item:
    """The records that a line of ``agent.console.JsonConsole`` was made of, as far as it tells."""
    record: dict[str, Any] = json.loads(line)
    resource = record["resource"]
    key = (int(resource.get("process.pid", 0)), 0)
    links = tuple(
        SpanLink(bytes.fromhex(link["trace_id"]), bytes.fromhex(link["span_id"]), "", _attributes(link["attributes"]))
        for link in record["links"]
    )
    span = Span(
        bytes.fromhex(record["trace_id"]),
        bytes.fromhex(record["span_id"]),
        bytes.fromhex(record["parent_span_id"]),
        record["trace_state"],
        record["name"],
        _KINDS[record["kind"]],
        record["start_time_ns"],
        record["end_time_ns"],
        _attributes(record["attributes"]),
        record["status"] == "error",
        links,
        record["link_method"],
        record["sampled"],
        key,
    )
    name = resource.get("process.executable.name", "")
    return span, ProcessInfo(key, name, "", (), "", resource["service.name"], _attributes(resource), True)


def _attributes(values: dict[str, Any]) -> Attributes:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in values.items())
