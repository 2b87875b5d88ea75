"""``spanloom run``: builds the stages from the configuration, runs them until a signal, and shuts them down in order.

In: a Config. Out: an exit code. Everything that is expected to fail raises an error of ``agent.errors``.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from agent import __version__
from agent.config import Config
from agent.console import JsonConsole, TreeConsole
from agent.errors import ExportError
from agent.kernel.capture import Capture, CaptureSettings, give_memory_back
from agent.kernel.records import Decoder
from agent.kube.cluster import Cluster
from agent.live import ConfigFile, Loaded, Refused, restart_needed
from agent.metrics import metric_sources
from agent.model import Span
from agent.otlp.batch import Batcher, Subject
from agent.otlp.exporter import OtlpExporter
from agent.otlp.settings import ExporterSettings
from agent.overrides import Override, active, matches, next_end, parse_override
from agent.overrides import apply as apply_override
from agent.pipeline import ExchangeProtocol, Pipeline, Sink
from agent.process import ProcessInfo, ProcessTable, Selector
from agent.propagation import Extractor
from agent.protocols import PROTOCOLS
from agent.sampling import Sampler
from agent.stitch import Stitcher
from agent.telemetry import Telemetry, configure_logging, event

_log = logging.getLogger("spanloom.runtime")

SHUTDOWN_SECONDS = 4.0
"""How long the exporter may take for the last batches: with the rest of the shutdown this stays below 5 s."""

CLOCK_TOLERANCE_NS = 500_000
"""How far the clock of the host may be adjusted before spans follow it."""


class ConsoleSink:
    """Prints spans. Nothing waits here that counts as in flight: printing is the end of a span's way."""

    waiting = 0
    unwanted = 0

    def __init__(self, console: TreeConsole | JsonConsole, processes: ProcessTable) -> None:
        self._console = console
        self._processes = processes

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        lookup = self._processes.lookup
        self._console.write((span, lookup(*span.process_key)) for span in spans)

    def tick(self, now_ns: int) -> None:
        if isinstance(self._console, TreeConsole):
            self._console.tick()

    def flush(self) -> None:
        if isinstance(self._console, TreeConsole):
            self._console.flush()


class Agent:
    """All stages, put together. ``run()`` turns the loop until ``stop()``, ``apply()`` changes settings between turns.

    ``config_file`` is asked for changes by the loop; without one the configuration stays as it is.
    """

    def __init__(self, config: Config, config_file: ConfigFile | None = None) -> None:
        self.config = config
        self._started_with = config
        self.config_file = config_file
        self._stopping = False
        self._attached = False
        self._stepped_at = time.monotonic()
        self.exporter = _exporter(config)
        self.cluster = Cluster.of(config, os.environ)
        self.capture = Capture(_capture_settings(config))
        try:
            self._build(config)
        except BaseException:
            self.capture.close()
            raise

    def _build(self, config: Config) -> None:
        self.processes = ProcessTable(
            host_name=socket.gethostname(),
            extra_attributes=tuple(config.resource.attributes.items()),
            max_processes=config.limits.processes,
            version=__version__,
            pods=self.cluster.directory if self.cluster is not None else None,
        )
        self._placed_generation: object = None
        self.selector = _selector(config)
        self.extractor = Extractor(config.propagation.formats)
        self.stitcher = Stitcher(
            Sampler(config.sampling.ratio, config.sampling.parent_based),
            threads_interleave=lambda process: self.pipeline.threads_interleave(process),
            hold_ns=int(config.stitching.hold_seconds * 1e9),
            hold_spans=config.stitching.hold_spans,
        )
        self.batcher: Batcher | None = None
        self.pipeline = Pipeline(
            source=self.capture,
            decoder=Decoder(self.capture.layout),
            protocols=self._protocols(config),
            processes=self.processes,
            selector=self.selector,
            stitcher=self.stitcher,
            sinks=self._sinks(config),
            on_process=self._on_process,
            protocols_of=self._protocols_apart,
            max_pending=config.limits.connections,
            ring_bytes=config.kernel.ring_buffer_bytes,
            max_processes=config.limits.processes * 2,
            exchange_timeout_ns=int(config.limits.exchange_timeout_seconds * 1e9),
            pending_timeout_ns=int((config.limits.exchange_timeout_seconds + 60) * 1e9),
        )
        self._follow_overrides(time.time_ns(), begin=True)
        self.telemetry = Telemetry(metric_sources(self), is_ready=self.is_ready, is_healthy=self.is_healthy)

    # -- overrides: some processes have settings of their own for a time

    def _follow_overrides(self, now_unix_ns: int, begin: bool = False) -> None:
        """Take up those of the configuration (``begin``), or go on without those that have ended."""
        if begin:
            self._overrides = tuple(
                parse_override(raw, f"overrides[{index}]") for index, raw in enumerate(self.config.overrides)
            )
        elif self._override_end is None or now_unix_ns < self._override_end:
            return
        self._overrides = active(self._overrides, now_unix_ns)
        self._override_end = next_end(self._overrides, now_unix_ns)
        self._apart: dict[tuple[Override, ...], tuple[list[ExchangeProtocol], Sampler]] = {}
        if not begin:
            event(_log, "override_ended", left=len(self._overrides))
            self.pipeline.reconfigure(self._protocols(self.config), self.selector)

    def _overrides_of(self, info: ProcessInfo) -> tuple[Override, ...]:
        if not self._overrides:
            return ()
        facts = dict(info.placement.facts) if info.placement is not None else {}
        facts |= {
            "executable": info.executable_name,
            "executable_path": info.executable_path,
            "service": info.service_name,
        }
        return tuple(override for override in self._overrides if matches(override, facts))

    def _settings_apart(self, info: ProcessInfo) -> tuple[list[ExchangeProtocol], Sampler] | None:
        """Protocols and sampler of a process that overrides match, made once per combination of overrides."""
        matching = self._overrides_of(info)
        if not matching:
            return None
        found = self._apart.get(matching)
        if found is None:
            config = self.config
            for override in matching:
                config = apply_override(config, override)
            sampler = Sampler(config.sampling.ratio, config.sampling.parent_based)
            found = self._apart[matching] = self._protocols(config), sampler
        return found

    def _protocols_apart(self, info: ProcessInfo) -> list[ExchangeProtocol] | None:
        apart = self._settings_apart(info)
        return apart[0] if apart is not None else None

    def _on_process(self, info: ProcessInfo) -> None:
        apart = self._settings_apart(info)
        self.stitcher.sample_apart(info.key, apart[1] if apart is not None else None)
        if self.batcher is not None:
            self.batcher.forget_resource(info.key)

    def _protocols(self, config: Config) -> list[ExchangeProtocol]:
        return [
            protocol(
                extractor=self.extractor,
                request_headers=config.capture.request_headers,
                response_headers=config.capture.response_headers,
                allow_secret_headers=config.capture.dangerously_allow_secret_headers,
                redact_query_keys=config.redaction.query_keys,
                route_patterns=config.routes.patterns,
                guess_routes=config.routes.guess,
            )
            for protocol in PROTOCOLS
        ]

    def _sinks(self, config: Config) -> list[Sink]:
        sinks: list[Sink] = []
        if self.exporter is None:
            self.batcher = None
        else:
            self.batcher = Batcher(
                self.exporter,
                self._subject,
                max_spans=config.export.batch.max_spans,
                max_delay_ns=int(config.export.batch.max_delay_seconds * 1e9),
                hold_ns=int(config.kubernetes.wait_seconds * 1e9),
            )
            sinks.append(self.batcher)
        console = _console(config, self.exporter is not None)
        if console is not None:
            sinks.append(ConsoleSink(console, self.processes))
        return sinks

    def _subject(self, process: tuple[int, int]) -> Subject:
        info = self.processes.lookup(*process)
        return Subject(info.resource, info.is_placed, not info.is_placed or self.selector.selects(info))

    def apply(self, config: Config) -> None:
        """Go on with other settings from the next batch of records on; call it between two turns of the loop.

        What was read before keeps what it was read under. Settings that are fixed at start stay as they are.
        """
        old, self.config = self.config, config
        if (old.telemetry.log_level, old.telemetry.log_format) != (
            config.telemetry.log_level,
            config.telemetry.log_format,
        ):
            configure_logging(config.telemetry.log_level, config.telemetry.log_format)
        if (old.export, old.kubernetes.wait_seconds) != (config.export, config.kubernetes.wait_seconds):
            self._apply_export(old, config)
        self.extractor = Extractor(config.propagation.formats)
        self.stitcher.reconfigure(
            Sampler(config.sampling.ratio, config.sampling.parent_based),
            hold_ns=int(config.stitching.hold_seconds * 1e9),
            hold_spans=config.stitching.hold_spans,
        )
        if self.cluster is not None:
            self.cluster.configure(config)
        if old.resource != config.resource:
            self.processes.describe_with(tuple(config.resource.attributes.items()))
        self.selector = _selector(config)
        self._follow_overrides(time.time_ns(), begin=True)
        self.pipeline.reconfigure(self._protocols(config), self.selector)
        if old.select.ports != config.select.ports:
            self.capture.select_ports(config.select.ports.include, config.select.ports.exclude)
        self.capture.limit_heads(config.capture.request_head_bytes, config.capture.response_head_bytes)
        if (old.select.executables, old.select.host, old.select.kubernetes) != (
            config.select.executables,
            config.select.host,
            config.select.kubernetes,
        ):
            self.capture.forget_decisions()
        if self.batcher is not None:
            self.batcher.forget_resources()

    def _apply_export(self, old: Config, config: Config) -> None:
        """Let everything that waits leave through the old sinks; an exporter that is replaced ends by itself."""
        before = self.exporter
        if old.export.otlp != config.export.otlp:
            self.exporter = _exporter(config)
        sinks = self.pipeline.replace_sinks(lambda: self._sinks(config))
        for sink in sinks:
            sink.flush()
        if before is not None and before is not self.exporter:
            threading.Thread(target=before.close, args=(SHUTDOWN_SECONDS,), name="otlp-retire", daemon=True).start()

    def start(self) -> None:
        """Open the telemetry endpoint, attach the probes, and begin to watch pods."""
        if self.config.telemetry.listen is not None:
            self.telemetry.start(self.config.telemetry.listen)
        self.capture.attach([os.getpid()])
        self._attached = True
        event(_log, "probes_attached", backend=self.capture.backend, programs=len(self.capture.statistics()))
        if self.cluster is not None:
            self.cluster.start()

    def is_ready(self) -> bool:
        """True while the probes are attached."""
        return self._attached

    def is_healthy(self) -> bool:
        """True while the loop turns."""
        return time.monotonic() - self._stepped_at < 30.0

    def stop(self, *_: int | FrameType | None) -> None:
        """End ``run()`` soon. Usable as a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Run until ``stop()``."""
        # Records are made without collector tracking; what remains is long-lived, and scanning it would only cost.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        kernel = self.config.kernel
        sweep_ns, next_sweep_ns, soonest_sweep_ns = int(kernel.sweep_seconds * 1e9), 0, 0
        while not self._stopping:
            self.capture.wait(kernel.poll_seconds)
            self._stepped_at = time.monotonic()
            now_ns = time.monotonic_ns()
            self._follow_pods()
            self._follow_file()
            self._follow_overrides(time.time_ns())
            self.stitcher.clock_offset_ns = _clock_offset_ns(self.stitcher.clock_offset_ns)
            if now_ns >= next_sweep_ns or (self.stitcher.is_crowded and now_ns >= soonest_sweep_ns):
                self.pipeline.sweep(now_ns)
                # A sweep over very many connections may take long: it gets a tenth of the time at most.
                soonest_sweep_ns = now_ns + 10 * self.pipeline.sweep_ns
                next_sweep_ns = max(now_ns + sweep_ns, soonest_sweep_ns)
            else:
                self.pipeline.run_once(now_ns)

    def _follow_pods(self) -> None:
        """Tell the stages what the API server said since the last turn."""
        if self.cluster is not None and (generation := self.cluster.directory.generation) != self._placed_generation:
            self._placed_generation = generation
            self.pipeline.reconsider(self.processes.refresh())

    def _follow_file(self) -> None:
        """Apply a change of the configuration file, or say why not."""
        outcome = self.config_file.poll() if self.config_file is not None else None
        if isinstance(outcome, Refused):
            event(_log, "config_refused", level=logging.ERROR, message=outcome.message)
            if self.cluster is not None:
                self.cluster.report("ConfigRefused", outcome.message)
        elif isinstance(outcome, Loaded):
            fixed = restart_needed(self._started_with, outcome.config)
            if outcome.changed:
                self.apply(outcome.config)
            event(_log, "config_applied", changed=list(outcome.changed), needs_restart=list(fixed))

    def close(self) -> None:
        """Stop capturing, export what is complete, release everything. Takes less than 5 s."""
        try:
            if self._attached:
                self._attached = False
                self.capture.detach()
                self.capture.hasten()
                now_ns = time.monotonic_ns()
                self.pipeline.sweep(now_ns)
                self.pipeline.finish(now_ns)
        finally:
            if self.cluster is not None:
                self.cluster.stop()
            if self.exporter is not None:
                self.exporter.close(SHUTDOWN_SECONDS)
            books = self.pipeline.books()
            event(
                _log,
                "stopped",
                begun=books.begun,
                handed_over=books.handed_over,
                sampled_out=books.sampled_out,
                dropped=sum(books.dropped.values()),
                in_flight=books.in_flight,
            )
            self.telemetry.stop()
            self.capture.close()


def run(config: Config, config_file: ConfigFile | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT. Returns the exit code; raises errors of ``agent.errors``."""
    configure_logging(config.telemetry.log_level, config.telemetry.log_format)
    give_memory_back()
    agent = Agent(config, config_file)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, agent.stop)
        agent.start()
        agent.run()
    except ExportError as error:
        if error.reason != "console_closed":
            raise
    finally:
        agent.close()
    return 0


def _clock_offset_ns(known_ns: int) -> int:
    """Return Unix time minus CLOCK_MONOTONIC, or ``known_ns`` as long as that is right to CLOCK_TOLERANCE_NS.

    Spans of one trace are made in different rounds of the loop: an offset that follows every reading moves them against
    each other by however long this thread lost the CPU between the two clocks.
    """
    before_ns = time.monotonic_ns()
    unix_ns = time.time_ns()
    after_ns = time.monotonic_ns()
    lowest_ns, highest_ns = unix_ns - after_ns, unix_ns - before_ns
    if lowest_ns - CLOCK_TOLERANCE_NS <= known_ns <= highest_ns + CLOCK_TOLERANCE_NS:
        return known_ns
    return (lowest_ns + highest_ns) // 2


def _capture_settings(config: Config) -> CaptureSettings:
    return CaptureSettings(
        backend=config.kernel.backend,
        request_head_bytes=config.capture.request_head_bytes,
        response_head_bytes=config.capture.response_head_bytes,
        connections=config.limits.connections,
        processes=config.limits.processes,
        ring_buffer_bytes=config.kernel.ring_buffer_bytes,
        exchange_timeout_seconds=config.limits.exchange_timeout_seconds,
        ports_include=tuple(config.select.ports.include),
        ports_exclude=tuple(config.select.ports.exclude),
    )


def _selector(config: Config) -> Selector:
    executables = config.select.executables
    return Selector(executables.include, executables.exclude, os.getpid(), host=config.select.host)


def _exporter(config: Config) -> OtlpExporter | None:
    otlp = config.export.otlp
    if otlp.endpoint is None:
        return None
    return OtlpExporter(
        ExporterSettings(
            endpoint=otlp.endpoint,
            headers=dict(otlp.headers),
            compression=otlp.compression,
            timeout_seconds=otlp.timeout_seconds,
            insecure=bool(otlp.insecure),
            certificate=otlp.certificate,
            client_key=otlp.client_key,
            client_certificate=otlp.client_certificate,
            queue_spans=config.export.queue_spans,
        )
    )


def _console(config: Config, exports: bool) -> TreeConsole | JsonConsole | None:
    choice = config.export.console
    if choice == "auto":
        choice = "off" if exports else "tree" if sys.stdout.isatty() else "json"
    if choice == "tree":
        return TreeConsole(sys.stdout)
    return JsonConsole(sys.stdout) if choice == "json" else None
