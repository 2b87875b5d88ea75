"""The agent as a real process under real probes, and what a test needs around it.

In: settings, and the ports of the test's own servers. Out: an ``AgentProcess`` whose spans arrive at a real collector
in this process and whose metrics are those it serves. Never: a mock of any part, a wait without a bound, a signal to
a process that was not started here.

The agent captures the whole host, so a test names its own ports, picked free, and sees nothing else. A plain TCP
connect carries no request and makes no span: it may be used to wait for a server.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.collector import CollectedSpan, Collector

REPOSITORY = Path(__file__).resolve().parents[2]

START_SECONDS = 30.0
"""Bound on everything that starts; the usual time is about a second."""
WAIT_SECONDS = 20.0
"""Bound on everything that is waited for; the usual time is a fraction of a second."""

NOBODY = 65534
AS_NOBODY = (
    *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
"""Makes a command another user's, who may read all files: the source tree may be closed to others, as /root is."""

_ports_given: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to clients, and never the same one twice."""
    for _ in range(1000):
        port = random.randrange(15_000, 32_000)
        if port in _ports_given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        _ports_given.add(port)
        return port
    raise AssertionError("no free port")


def clean_environment(**variables: str) -> dict[str, str]:
    """A small environment for programs under test: no proxies, no OTEL variables of whoever runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **kept, **variables}


def wait_until(
    condition: Callable[[], object],
    what: str | Callable[[], str] = "the condition",
    timeout_seconds: float = WAIT_SECONDS,
    interval_seconds: float = 0.02,
) -> Any:
    """Poll until ``condition()`` is true and return its value; else fail with ``what`` (text, or a function)."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            text = what() if callable(what) else what
            raise AssertionError(f"after {timeout_seconds:g} s still not true: {text}")
        time.sleep(interval_seconds)


def port_accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a TCP connect succeeds."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


class Process:
    """A program under test: started at once, output in a file, ended by its own pid. A context manager."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.log = log
        with log.open("wb") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, **options}
            # A session of its own: Apache ends its whole process group, which must not be that of the tests.
            options.setdefault("start_new_session", True)
            self.popen = subprocess.Popen(self.arguments, env=dict(env or clean_environment()), cwd=cwd, **options)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def check_alive(self) -> None:
        code = self.popen.poll()
        assert code is None, f"{self.arguments[0]} ended with {code}:\n{self.output()[-4000:]}"

    def wait_for_port(self, port: int, host: str = "127.0.0.1") -> None:
        """Wait until the program accepts connections; fail with its output when it ends before."""

        def accepts() -> bool:
            self.check_alive()
            return port_accepts(port, host)

        wait_until(accepts, lambda: f"{self.arguments[0]} listens on {port}:\n{self.output()[-4000:]}", START_SECONDS)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL for what does not end within seconds. May be called twice."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(5)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait(10)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The account that ``/metrics`` gives in one reading, from the kernel to the collector.

    ``in_flight`` has not reached the exporter, ``waiting`` has no batch there yet, ``exporting`` is not settled.
    """

    begun: int
    handed_over: int
    sampled_out: int
    dropped: dict[str, int]
    in_flight: int
    waiting: int
    exporting: int
    exported: int
    rejected: int
    undelivered: dict[str, int]
    not_exported: int

    @property
    def closed(self) -> bool:
        """Whether the books close: nothing is missing and nothing is there twice."""
        left = self.handed_over + self.sampled_out + sum(self.dropped.values()) + self.in_flight
        settled = self.exported + self.rejected + sum(self.undelivered.values()) + self.not_exported
        return self.begun == left and self.handed_over == settled + self.exporting + self.waiting

    @property
    def on_the_way(self) -> int:
        """What has begun and not ended in any way."""
        return self.in_flight + self.waiting + self.exporting

    def counters(self) -> dict[str, int]:
        """What may only grow."""
        own = {"begun": self.begun, "handed_over": self.handed_over, "sampled_out": self.sampled_out}
        own |= {"exported": self.exported, "rejected": self.rejected, "not_exported": self.not_exported}
        dropped = {f"dropped {reason}": count for reason, count in self.dropped.items()}
        return own | dropped | {f"undelivered {reason}": count for reason, count in self.undelivered.items()}


class AgentFailedError(AssertionError):
    """``spanloom run`` ended instead of becoming ready. ``code`` is its exit code, ``stderr`` what it said."""

    def __init__(self, code: int, stderr: str) -> None:
        super().__init__(f"spanloom run ended with exit code {code}:\n{stderr.strip()[-4000:]}")
        self.code = code
        self.stderr = stderr


class AgentProcess:
    """``spanloom run`` as a process, with its collector. A context manager: entering waits for ``/readyz``.

    ``ports`` is ``select.ports.include``; empty traces every port of the host. ``settings`` are further ones by dotted
    key, stronger than ``config``, a file. Without a ``collector`` no endpoint is set, and spans go to standard output,
    which is the file ``stdout_path``. ``within`` is a command that becomes the agent, such as setpriv with its options.
    Leaving stops the agent and asserts that it ended well.
    """

    def __init__(
        self,
        directory: Path,
        collector: Collector | None,
        ports: Iterable[int] = (),
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        config: Path | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.within = within
        self.expects_errors = False
        self.collector = collector
        self.ports = tuple(ports)
        self.telemetry_port = free_port()
        self.settings: dict[str, Any] = {
            "telemetry.listen": f"127.0.0.1:{self.telemetry_port}",
            "select.ports.include": list(self.ports),
            "export.batch.max_delay_seconds": 0.05,
        }
        if collector is not None:
            self.settings["export.otlp.endpoint"] = collector.endpoint
        if backend := os.environ.get("SPANLOOM_TEST_BACKEND"):
            self.settings["kernel.backend"] = backend
        self.settings.update(settings or {})
        self.environment = clean_environment(**(environment or {}))
        tag = f"agent-{self.telemetry_port}"
        self.stdout_path = directory / f"{tag}.stdout"
        self.stderr_path = directory / f"{tag}.stderr"
        self.popen: subprocess.Popen[bytes] | None = None

    # -- life

    def start(self, wait: bool = True) -> AgentProcess:
        """Start it, and wait until it is ready. Raises AgentFailedError with its own message when it ends instead."""
        arguments = [*self.within, sys.executable, "-m", "agent", "run"]
        if self.config is not None:
            arguments += ["--config", str(self.config)]
        for key, value in self.settings.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.popen = subprocess.Popen(
                arguments,
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        if wait:
            try:
                self.wait_until_ready()
            except BaseException:
                self.kill()
                raise
        return self

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            self.check_alive()
            return self.probe("/readyz") == 200

        wait_until(ready, lambda: f"the agent is ready; it said:\n{self.stderr()[-4000:]}", START_SECONDS)

    def check_alive(self) -> None:
        assert self.popen is not None
        code = self.popen.poll()
        if code is not None:
            raise AgentFailedError(code, self.stderr())

    def stop(self, timeout_seconds: float = 30.0) -> int:
        """SIGTERM, wait for the end, assert that it was a clean one, return the exit code. May be called twice."""
        assert self.popen is not None
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            code = self.popen.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the agent did not end on SIGTERM; it said:\n{self.stderr()[-4000:]}") from None
        said = self.stderr()
        assert code == 0, f"the agent ended with {code}:\n{said[-4000:]}"
        assert "Traceback" not in said, said[-4000:]
        assert self.expects_errors or '"level":"error"' not in said, said[-4000:]
        return code

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait(10)

    def __enter__(self) -> AgentProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()  # the failure under way is the one to report
        else:
            self.stop()

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def stdout(self) -> str:
        return self.stdout_path.read_text("utf-8", "replace")

    def stderr(self) -> str:
        return self.stderr_path.read_text("utf-8", "replace")

    # -- spans

    def spans(self, port: int | None = None, kind: str | None = None) -> list[CollectedSpan]:
        """The spans that the collector has, in the order of arrival; of one server port and one kind where given."""
        assert self.collector is not None
        return [
            span
            for span in self.collector.spans()
            if (port is None or span_port(span) == port) and (kind is None or span.kind == kind)
        ]

    def wait_for_spans(
        self,
        what: int | Callable[[list[CollectedSpan]], object],
        timeout_seconds: float = WAIT_SECONDS,
        *,
        port: int | None = None,
        kind: str | None = None,
    ) -> list[CollectedSpan]:
        """Wait for that many spans (of a port, of a kind), or until ``what(spans)`` is true. Returns them.

        Fails with what did arrive, and with what the agent says about itself.
        """
        assert self.collector is not None

        def reached(_: object = None) -> bool:
            spans = self.spans(port, kind)
            return len(spans) >= what if isinstance(what, int) else bool(what(spans))

        if not self.collector.wait_for(reached, timeout_seconds):
            raise AssertionError(
                f"waited {timeout_seconds:g} s for {what if isinstance(what, int) else 'a condition on'} spans "
                f"(port {port}, kind {kind}); there are {len(self.spans(port, kind))}:\n"
                + show(self.spans(port)[-30:])
                + self.state()
            )
        return self.spans(port, kind)

    def exact_spans(self, count: int, *, port: int | None = None, kind: str | None = None) -> list[CollectedSpan]:
        """Wait for ``count`` spans, then until nothing is in flight any more, and assert that there are no more."""
        self.wait_for_spans(count, port=port, kind=kind)
        self.settle()
        spans = self.spans(port, kind)
        assert len(spans) == count, f"{count} spans expected, {len(spans)} arrived:\n" + show(spans[:40])
        return spans

    # -- what it says about itself

    def probe(self, path: str) -> int:
        """The status of a GET on the telemetry endpoint; 0 when nothing listens."""
        try:
            with self._open(path) as response:
                response.read()
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def metrics_text(self) -> str:
        with self._open("/metrics") as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """All samples: ``name`` or ``name{label=value,...}`` (values without quotes) -> number."""
        samples = {}
        for family in text_string_to_metric_families(self.metrics_text()):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def books(self) -> Books:
        metrics = self.metrics()

        def by_reason(name: str) -> dict[str, int]:
            prefix = f"{name}{{reason="
            return {
                key.removeprefix(prefix).rstrip("}"): int(value)
                for key, value in metrics.items()
                if key.startswith(prefix) and value
            }

        in_flight = "spanloom_exchanges_in_flight{"
        return Books(
            begun=int(metrics["spanloom_exchanges_begun_total"]),
            handed_over=int(metrics["spanloom_spans_handed_over_total"]),
            sampled_out=int(metrics["spanloom_spans_sampled_out_total"]),
            dropped=by_reason("spanloom_exchanges_dropped_total"),
            in_flight=int(sum(value for key, value in metrics.items() if key.startswith(in_flight))),
            waiting=int(metrics["spanloom_export_waiting_spans"]),
            exporting=int(metrics.get("spanloom_export_in_flight_spans", 0)),
            exported=int(metrics.get("spanloom_export_spans_total{outcome=exported}", 0)),
            rejected=int(metrics.get("spanloom_export_spans_total{outcome=rejected}", 0)),
            undelivered=by_reason("spanloom_export_dropped_total"),
            not_exported=int(metrics["spanloom_spans_without_exporter_total"]),
        )

    def settle(self, timeout_seconds: float = WAIT_SECONDS) -> Books:
        """Wait until nothing is in flight in the agent, and all that it handed over is at the collector."""
        assert self.collector is not None
        books: Books | None = None

        def quiet() -> bool:
            nonlocal books
            books = self.books()
            exported = self.collector.span_count if self.collector is not None else books.handed_over
            return books.in_flight == 0 and books.closed and exported == books.handed_over

        wait_until(
            quiet,
            lambda: f"{books} settled, the collector has {self.collector.span_count}",
            timeout_seconds,
            interval_seconds=0.05,
        )
        assert books is not None
        return books

    def state(self) -> str:
        """For messages: metrics that are not zero, and the end of the log."""
        try:
            numbers = [f"  {key} {value:g}" for key, value in self.metrics().items() if value and "bucket" not in key]
            metrics = "\n".join(line for line in numbers if "spanloom" in line)
        except OSError as error:
            metrics = f"  no metrics: {error}"
        return f"\nmetrics:\n{metrics}\nlog:\n{self.stderr()[-2000:]}"

    def _open(self, path: str) -> Any:
        return _opener.open(f"http://127.0.0.1:{self.telemetry_port}{path}", timeout=10)


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# ---------------------------------------------------------------------------------------------------- spans


def span_port(span: CollectedSpan) -> int | None:
    """The port of the server's end: as the request names it, or that of the connection for a client."""
    port = span.attributes.get("server.port")
    if port is None and span.kind == "CLIENT":
        port = span.attributes.get("network.peer.port")
    return port if isinstance(port, int) else None


def show(spans: Iterable[CollectedSpan]) -> str:
    """Spans for a message, one per line."""
    lines = []
    for span in spans:
        target = span.attributes.get("url.full") or span.attributes.get("url.path")
        lines.append(
            f"  {span.kind} {span.name} {target} {span.attributes.get('http.response.status_code')} "
            f"{span.status} {span.attributes.get('error.type', '')} exe={span.resource.get('process.executable.name')} "
            f"pid={span.resource.get('process.pid')} port={span_port(span)} trace={span.trace_id[:8]} "
            f"id={span.span_id} parent={span.parent_span_id} {span.attributes.get('spanloom.link.method', '')} "
            f"{(span.end_time_ns - span.start_time_ns) / 1e6:.2f} ms"
        )
    return "\n".join(lines) + "\n"


def one(spans: Iterable[CollectedSpan]) -> CollectedSpan:
    """The only span of them."""
    found = list(spans)
    assert len(found) == 1, f"one span expected, not {len(found)}:\n{show(found)}"
    return found[0]


# ---------------------------------------------------------------------------------------------------- clients


def curl(*arguments: str | Path, timeout_seconds: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run curl, quiet, without the user's configuration; its exit code is the caller's business."""
    return subprocess.run(
        ["curl", "-q", "-sS", "--noproxy", "*", *map(str, arguments)],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_seconds,
    )
