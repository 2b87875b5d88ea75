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
import time
from collections.abc import Sequence
from types import FrameType

from agent import __version__
from agent.config import Config
from agent.console import JsonConsole, TreeConsole
from agent.errors import ConfigError, ExportError, SpanloomError
from agent.hold import Hold
from agent.kernel.capture import Capture, CaptureSettings, give_memory_back
from agent.kernel.records import Decoder
from agent.kube.cluster import Cluster
from agent.live import ConfigFile, Loaded, Refused, head_room, restart_needed
from agent.metrics import metric_sources
from agent.model import Attributes, Span
from agent.otlp.batch import Batcher
from agent.otlp.exporter import Destination, OtlpExporter
from agent.otlp.settings import ExporterSettings
from agent.overrides import Override, active, matches, next_end, parse_override
from agent.overrides import apply as apply_override
from agent.pipeline import ExchangeProtocol, Pipeline, Sink
from agent.process import ProcessInfo, ProcessTable, Selector
from agent.propagation import Extractor
from agent.protocols import PROTOCOLS
from agent.protocols.http2 import Http2
from agent.sampling import Sampler
from agent.stitch import Stitcher
from agent.telemetry import Telemetry, configure_logging, event
from agent.tls_libraries import Libraries
from agent.tls_watch import TlsWatch, raise_descriptor_limit

_log = logging.getLogger("spanloom.runtime")

CERTIFICATES_SECONDS = 2.0
"""How often the exporter's certificate files are looked at."""

SHUTDOWN_SECONDS, LAST_EXPORT_SECONDS, LAST_DETACH_SECONDS = 4.0, 1.0, 0.5
"""When the exporter gives its last batches up, after SIGTERM and, if it came to them late, after they are there; and
how long probes that are being loaded are waited for. With the rest of the shutdown this stays below 5 s."""

CLOCK_TOLERANCE_NS = 500_000
"""How far the clock of the host may be adjusted before spans follow it."""


class ConsoleSink:
    """Prints spans. Nothing waits here that counts as in flight: printing is the end of a span's way."""

    def __init__(self, console: TreeConsole | JsonConsole, processes: ProcessTable) -> None:
        self._console = console
        self._processes = processes

    def prints_with(self, kind: type[TreeConsole | JsonConsole]) -> bool:
        return type(self._console) is kind

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        lookup = self._processes.lookup
        self._console.write((span, lookup(*span.process_key)) for span in spans)

    def tick(self, now_ns: int) -> None:
        if isinstance(self._console, TreeConsole):
            self._console.tick()

    def flush(self) -> None:
        if isinstance(self._console, TreeConsole):
            self._console.flush()


class NotExported:
    """Counts spans in place of an exporter, so that the books close without one, too."""

    def __init__(self) -> None:
        self.taken = 0

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        self.taken += len(spans)

    def tick(self, now_ns: int) -> None:
        """Nothing waits."""

    def flush(self) -> None:
        """Nothing waits."""


class Agent:
    """All stages, put together. ``run()`` turns the loop until ``stop()``, ``apply()`` changes settings between turns.

    ``config_file`` is asked for changes by the loop; without one the configuration stays as it is.
    """

    def __init__(self, config: Config, config_file: ConfigFile | None = None) -> None:
        self.config = config
        self._started_with = config
        self.restart_needed: tuple[str, ...] = ()
        """Settings of the file in place that only a restart will apply."""
        self.config_file = config_file
        self._stopping = False
        self._stopped_at = 0.0
        self._started = False
        self._attached = False
        self._stepped_at = time.monotonic()
        self._certificates, self._certificates_looked_at = _certificates(config), 0.0
        destination = _destination(config)
        self.exporter = OtlpExporter(destination) if destination is not None else None
        self.cluster = Cluster.of(config, os.environ)
        self.capture = Capture(_capture_settings(config))
        try:
            self._build(config)
        except BaseException:
            self.capture.close()
            raise

    def _build(self, config: Config) -> None:
        self.processes = ProcessTable(
            host_name=self.cluster.node_name if self.cluster is not None else socket.gethostname(),
            extra_attributes=tuple(config.resource.attributes.items()),
            max_processes=config.limits.processes,
            version=__version__,
            pods=self.cluster.directory if self.cluster is not None else None,
        )
        self.capture.limit_heads(config.capture.request_head_bytes, config.capture.response_head_bytes)
        self._placed_generation: object = None
        self._named_generation = 0
        self.selector = _selector(config)
        self.extractor = Extractor(config.propagation.formats)
        self.stitcher = Stitcher(
            Sampler(config.sampling.ratio, config.sampling.parent_based),
            threads_interleave=lambda process: self.pipeline.threads_interleave(process),
            hold_ns=int(config.stitching.hold_seconds * 1e9),
            hold_spans=config.stitching.hold_spans,
            announce_open_ns=int((config.capture.announce_open_seconds or 0) * 1e9),
        )
        self.tls = TlsWatch(
            self.capture, Libraries(), os.getpid(), config.capture.tls_idle_seconds, raise_descriptor_limit()
        )
        self.hold = Hold(hold_ns=int(config.kubernetes.wait_seconds * 1e9))
        self.batcher: Batcher | None = None
        self.not_exported = NotExported()
        self._console: ConsoleSink | None = None
        self.pipeline = Pipeline(
            source=self.capture,
            decoder=Decoder(self.capture.layout),
            protocols=self._protocols(config),
            processes=self.processes,
            selector=self.selector,
            stitcher=self.stitcher,
            sinks=self._sinks(config),
            hold=self.hold,
            on_process=self._on_process,
            protocols_of=self._protocols_apart,
            on_tls=self.tls.look_at,
            max_pending=config.limits.connections,
            ring_bytes=config.kernel.ring_buffer_bytes,
            max_processes=config.limits.processes * 2,
            exchange_timeout_ns=int(config.limits.exchange_timeout_seconds * 1e9),
            pending_timeout_ns=int((config.limits.exchange_timeout_seconds + 60) * 1e9),
        )
        self._use_overrides(_overrides(config), time.time_ns())
        self.telemetry = Telemetry(metric_sources(self), is_ready=self.is_ready, is_healthy=self.is_healthy)

    # -- overrides: some processes have settings of their own for a time

    def _follow_overrides(self, now_unix_ns: int) -> None:
        """Go on without those that have ended."""
        if self._override_end is not None and now_unix_ns >= self._override_end:
            self._use_overrides(self._overrides, now_unix_ns)
            event(_log, "override_ended", left=len(self._overrides))
            self.pipeline.reconfigure(self._protocols(self.config), self.selector)

    def _use_overrides(self, overrides: tuple[Override, ...], now_unix_ns: int) -> None:
        self._overrides = active(overrides, now_unix_ns)
        self._override_end = next_end(self._overrides, now_unix_ns)
        self._apart: dict[tuple[Override, ...], tuple[list[ExchangeProtocol], Sampler]] = {}

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

    def _protocols(self, config: Config, extractor: Extractor | None = None) -> list[ExchangeProtocol]:
        peers = self.cluster.peers if self.cluster is not None else None
        names = {"names_of_peer": peers.attributes} if peers is not None else {}
        return [
            protocol(
                extractor=extractor if extractor is not None else self.extractor,
                request_headers=config.capture.request_headers,
                response_headers=config.capture.response_headers,
                allow_secret_headers=config.capture.dangerously_allow_secret_headers,
                redact_query_keys=config.redaction.query_keys,
                route_patterns=config.routes.patterns,
                guess_routes=config.routes.guess,
                **names,
            )
            for protocol in PROTOCOLS
            if protocol.name in config.capture.protocols
        ]

    def _sinks(self, config: Config) -> list[Sink]:
        """The sinks that the configuration asks for; those that are there already are kept, with what they hold."""
        sinks: list[Sink] = []
        exports = config.export.otlp.endpoint is not None
        if exports and self.exporter is not None:
            batch = config.export.batch
            bounds = {"max_spans": batch.max_spans, "max_delay_ns": int(batch.max_delay_seconds * 1e9)}
            if self.batcher is None:
                self.batcher = Batcher(self.exporter, self._resource_of, **bounds)
            else:
                self.batcher.reconfigure(**bounds)
            sinks.append(self.batcher)
        else:
            sinks.append(self.not_exported)
        kind = _console_kind(config, exports)
        if kind is None:
            self._console = None
        elif self._console is None or not self._console.prints_with(kind):
            self._console = ConsoleSink(kind(sys.stdout), self.processes)
        if self._console is not None:
            sinks.append(self._console)
        return sinks

    def _resource_of(self, process: tuple[int, int]) -> Attributes:
        return self.processes.lookup(*process).resource

    def apply(self, config: Config) -> None:
        """Go on with other settings from the next batch of records on; call it between two turns of the loop.

        What ended before keeps what it ended under. Settings that are fixed at start stay as they are. Raises
        ConfigError, and then nothing has changed.
        """
        old = self.config
        # All that can fail comes first.
        is_new_way = (old.export.otlp, old.export.queue_spans) != (config.export.otlp, config.export.queue_spans)
        destination = _destination(config) if is_new_way else None
        extractor = Extractor(config.propagation.formats, self.extractor.malformed)
        sampler = Sampler(config.sampling.ratio, config.sampling.parent_based)
        selector = _selector(config)
        overrides = _overrides(config)
        protocols = self._protocols(config, extractor)
        self.pipeline.run_once(time.monotonic_ns())  # what waits in the ring buffer ended before
        if self.cluster is not None:
            self.cluster.configure(config)
        if config.capture.enabled and not self._attached:
            try:
                self._attach()
            except SpanloomError as error:
                raise ConfigError(f"capture.enabled: {error}") from error

        self.config = config
        if (old.telemetry.log_level, old.telemetry.log_format) != (
            config.telemetry.log_level,
            config.telemetry.log_format,
        ):
            configure_logging(config.telemetry.log_level, config.telemetry.log_format)
        self.extractor = extractor
        self.stitcher.reconfigure(
            sampler,
            hold_ns=int(config.stitching.hold_seconds * 1e9),
            hold_spans=config.stitching.hold_spans,
            announce_open_ns=int((config.capture.announce_open_seconds or 0) * 1e9),
        )
        self.hold.hold_ns = int(config.kubernetes.wait_seconds * 1e9)
        if old.export != config.export:
            self._apply_export(config, destination)
        if old.resource != config.resource:
            if self.batcher is not None:
                self.batcher.flush()  # what is encoded leaves as it was described
            self.processes.describe_with(tuple(config.resource.attributes.items()))
        self.selector = selector
        self._use_overrides(overrides, time.time_ns())
        self.pipeline.reconfigure(protocols, selector)
        self._follow_pods()  # before the kernel forgets, and before a record is judged by what pods were selected
        if old.select.ports != config.select.ports:
            self.capture.select_ports(config.select.ports.include, config.select.ports.exclude)
        self.capture.follow_http2(Http2.name in config.capture.protocols)
        self.capture.limit_heads(config.capture.request_head_bytes, config.capture.response_head_bytes)
        if (old.select.executables, old.select.host, old.select.kubernetes) != (
            config.select.executables,
            config.select.host,
            config.select.kubernetes,
        ):
            self.capture.forget_decisions()
        if self.batcher is not None:
            self.batcher.forget_resources()
        self.tls.idle_seconds = config.capture.tls_idle_seconds
        if self._attached and not config.capture.enabled:
            self._detach()
        elif self._attached and config.capture.tls:
            self.tls.start()
        else:
            self.tls.stop()

    def _apply_export(self, config: Config, destination: Destination | None) -> None:
        """Lead the spans elsewhere, those that wait included. Without a destination, what is exported last still is."""
        self._certificates = _certificates(config)
        if destination is not None:
            if self.exporter is None:
                self.exporter = OtlpExporter(destination)
            else:
                self.exporter.redirect(destination)
        self.pipeline.use_sinks(self._sinks(config))

    def start(self) -> None:
        """Open the telemetry endpoint, attach the probes, and begin to watch pods."""
        if self.config.telemetry.listen is not None:
            self.telemetry.start(self.config.telemetry.listen)
        if self.config.capture.enabled:
            self._attach()
        else:
            self.capture.detach()  # some programs were attached to see whether they may be
        self._started = True
        if self.cluster is not None:
            self.cluster.start()

    def _attach(self) -> None:
        self.capture.attach([os.getpid()])
        self._attached = True
        if self.config.capture.tls:
            self.tls.start()
        event(
            _log,
            "probes_attached",
            backend=self.capture.backend,
            hooks=self.capture.hooks,
            programs=len(self.capture.statistics()),
        )

    def _detach(self) -> None:
        """Take the probes away, with what they were seeing; what has ended is reported as ever."""
        self.capture.detach()
        self.tls.stop()
        self._attached = False
        self.capture.hasten()
        self.pipeline.sweep(time.monotonic_ns())
        self.capture.hasten(False)
        self.pipeline.abandon()
        self.capture.forget_connections()
        event(_log, "probes_detached")

    def is_ready(self) -> bool:
        """True while the probes are attached, or are not to be."""
        return self._attached or (self._started and not self.config.capture.enabled)

    def is_healthy(self) -> bool:
        """True while the loop turns."""
        return time.monotonic() - self._stepped_at < 30.0

    def stop(self, *_: int | FrameType | None) -> None:
        """End ``run()`` soon. Usable as a signal handler."""
        if not self._stopping:
            self._stopping, self._stopped_at = True, time.monotonic()

    def run(self) -> None:
        """Run until ``stop()``."""
        # Records are made without collector tracking; what remains is long-lived, and scanning it would only cost.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        kernel = self.config.kernel
        sweep_ns, next_sweep_ns, soonest_sweep_ns = int(kernel.sweep_seconds * 1e9), 0, 0
        while not self._stopping:
            self.capture.wait(0.0 if self.pipeline.has_more else kernel.poll_seconds)
            self._stepped_at = time.monotonic()
            now_ns = time.monotonic_ns()
            self._follow_file()
            self._follow_certificates()
            self._follow_pods()
            self._follow_overrides(time.time_ns())
            self.stitcher.clock_offset_ns = _clock_offset_ns(self.stitcher.clock_offset_ns)
            if now_ns >= next_sweep_ns or (self.stitcher.is_crowded and now_ns >= soonest_sweep_ns):
                self.pipeline.sweep(now_ns)
                # A sweep over very many connections may take long: it gets a tenth of the time at most.
                soonest_sweep_ns = now_ns + 10 * self.pipeline.sweep_ns
                next_sweep_ns = max(now_ns + sweep_ns, soonest_sweep_ns)
            else:
                # A part at a time, so that a sweep may come in between and let go of what is decided.
                self.pipeline.run_once(now_ns, kernel.ring_buffer_bytes // 16)

    def _follow_pods(self) -> None:
        """Tell the stages what the API server said since the last turn."""
        if self.cluster is not None and (generation := self.cluster.directory.generation) != self._placed_generation:
            self._placed_generation = generation
            self.pipeline.reconsider(self.processes.refresh())
        peers = self.cluster.peers if self.cluster is not None else None
        if peers is not None and peers.generation != self._named_generation:
            self._named_generation = peers.generation
            self.pipeline.forget_peers()
            for protocols, _ in self._apart.values():
                for protocol in protocols:
                    protocol.forget_peers()

    def _follow_certificates(self) -> None:
        """Take up certificates of the exporter that were replaced: those of a mounted Secret are, while it runs."""
        now = time.monotonic()
        if now - self._certificates_looked_at < CERTIFICATES_SECONDS:
            return
        self._certificates_looked_at = now
        signature = _certificates(self.config)
        if signature == self._certificates:
            return
        self._certificates = signature
        try:
            destination = _destination(self.config)
        except ConfigError as error:
            # Half of them are new, or none is whole: what the exporter has read goes on working until it expires.
            event(_log, "certificates_refused", level=logging.ERROR, message=str(error))
            return
        if destination is not None and self.exporter is not None:
            self.exporter.redirect(destination)
            event(_log, "certificates_renewed")

    def _follow_file(self) -> None:
        """Apply a change of the configuration file, or say why not."""
        outcome = self.config_file.poll(self.apply) if self.config_file is not None else None
        if isinstance(outcome, Refused):
            event(_log, "config_refused", level=logging.ERROR, message=outcome.message)
            if self.cluster is not None:
                self.cluster.report("ConfigRefused", outcome.message)
        elif isinstance(outcome, Loaded):
            fixed = self.restart_needed = restart_needed(self._started_with, outcome.config)
            event(_log, "config_applied", changed=list(outcome.changed), needs_restart=list(fixed))

    def close(self) -> bool:
        """Stop capturing, export what is complete, release everything. Takes less than 5 s.

        Returns whether all is released: the verifier may be at the probes for TLS still, in a thread that ends with the
        process. An agent that never captured has no books to tell of: what stopped it is the only line of its log.
        """
        captured, self._started = self._started, False
        began = self._stopped_at if self._stopping else time.monotonic()
        try:
            if captured:
                self._attached = False
                self.tls.stop()
                self.capture.detach()
                self.capture.hasten()
                now_ns = time.monotonic_ns()
                self.pipeline.sweep(now_ns)
                self.pipeline.finish(now_ns)
        finally:
            if self.cluster is not None:
                self.cluster.stop()
            if self.exporter is not None:
                self.exporter.close(max(began + SHUTDOWN_SECONDS - time.monotonic(), LAST_EXPORT_SECONDS))
            tls_has_ended = self.tls.stop(LAST_DETACH_SECONDS)
            if captured:
                books = self.pipeline.books()
                exported = {}
                if self.exporter is not None:
                    counters = self.exporter.snapshot()
                    exported = {
                        "exported": counters.exported,
                        "not_delivered": counters.rejected + sum(counters.dropped.values()),
                    }
                event(
                    _log,
                    "stopped",
                    begun=books.begun,
                    handed_over=books.handed_over,
                    sampled_out=books.sampled_out,
                    dropped=sum(books.dropped.values()),
                    in_flight=books.in_flight,
                    **exported,
                )
            self.telemetry.stop()
            if tls_has_ended:  # else its thread uses what would be closed here
                self.capture.close()
        return tls_has_ended


def run(config: Config, config_file: ConfigFile | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT. Returns the exit code, or ends the process with it where a thread is left
    that the interpreter's end would disturb; raises errors of ``agent.errors``.
    """
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
        is_released = agent.close()
    if not is_released:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
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
    room = head_room(config)
    return CaptureSettings(
        backend=config.kernel.backend,
        request_head_bytes=room["capture.request_head_bytes"],
        response_head_bytes=room["capture.response_head_bytes"],
        connections=config.limits.connections,
        processes=config.limits.processes,
        ring_buffer_bytes=config.kernel.ring_buffer_bytes,
        exchange_timeout_seconds=config.limits.exchange_timeout_seconds,
        ports_include=tuple(config.select.ports.include),
        ports_exclude=tuple(config.select.ports.exclude),
        http2=Http2.name in config.capture.protocols,
    )


def _selector(config: Config) -> Selector:
    executables = config.select.executables
    return Selector(executables.include, executables.exclude, os.getpid(), host=config.select.host)


def _overrides(config: Config) -> tuple[Override, ...]:
    return tuple(parse_override(raw, f"overrides[{index}]") for index, raw in enumerate(config.overrides))


def _certificates(config: Config) -> list[tuple[int, int, int] | None]:
    """What tells the exporter's certificate files from others in their place; None for one that is not there."""
    otlp = config.export.otlp
    found: list[tuple[int, int, int] | None] = []
    for path in filter(None, (otlp.certificate, otlp.client_key, otlp.client_certificate)):
        try:
            status = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def _destination(config: Config) -> Destination | None:
    otlp = config.export.otlp
    if otlp.endpoint is None:
        return None
    return Destination(
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


def _console_kind(config: Config, exports: bool) -> type[TreeConsole | JsonConsole] | None:
    choice = config.export.console
    if choice == "auto":
        choice = "off" if exports else "tree" if sys.stdout.isatty() else "json"
    return {"tree": TreeConsole, "json": JsonConsole}.get(choice)
