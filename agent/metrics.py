"""Every metric the agent exposes, and where it is read.

In: the running agent. Out: declarations and readers for ``agent.telemetry``; ``python -m agent.metrics`` prints the
reference page. Nothing is counted for metrics alone: the readers look at what the stages count for themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent import __version__
from agent.telemetry import SOURCE_ERRORS, Metric, Source

if TYPE_CHECKING:
    from agent.runtime import Agent

_BOOKS = (
    Metric(
        "spanloom_exchanges_begun_total",
        "Exchanges that the kernel saw begin, and spans that told of an open one.",
        "counter",
    ),
    Metric("spanloom_spans_handed_over_total", "Spans given to the exporter or the console.", "counter"),
    Metric("spanloom_spans_sampled_out_total", "Spans of traces that were not sampled.", "counter"),
    Metric(
        "spanloom_exchanges_dropped_total", "Exchanges that did not become a span, by reason.", "counter", ("reason",)
    ),
    Metric(
        "spanloom_exchanges_in_flight",
        "Exchanges going on, or held for their place in a trace or for their pod.",
        "gauge",
        ("where",),
    ),
)
_KERNEL = (
    Metric(
        "spanloom_kernel_events_total",
        "Counters of the BPF programs (enum counter in bpf/events.h).",
        "counter",
        ("event",),
    ),
    Metric(
        "spanloom_program_runs_total",
        "Runs of a BPF program (needs kernel.bpf_stats_enabled).",
        "counter",
        ("program",),
    ),
    Metric(
        "spanloom_program_seconds_total",
        "Run time of a BPF program (needs kernel.bpf_stats_enabled).",
        "counter",
        ("program",),
    ),
    Metric(
        "spanloom_program_missed_total", "Runs that the kernel skipped to prevent recursion.", "counter", ("program",)
    ),
)
_STITCHING = (
    Metric(
        "spanloom_stitching_released_early_total",
        "Exchanges placed before everything was known, because of a bound.",
        "counter",
    ),
    Metric(
        "spanloom_stitching_openings_total",
        "Spans that told of an exchange which was still open (capture.announce_open_seconds).",
        "counter",
    ),
    Metric("spanloom_stitching_parents_lost_total", "Exchanges whose parent or peer never arrived.", "counter"),
    Metric(
        "spanloom_stitching_ambiguous_total",
        "Client exchanges left without a parent: several were possible.",
        "counter",
    ),
    Metric(
        "spanloom_propagation_malformed_total",
        "Trace headers that could not be read, by format.",
        "counter",
        ("format",),
    ),
)
_PIPELINE = (
    Metric("spanloom_records_unknown_total", "Ring-buffer records of an unknown kind.", "counter"),
    Metric("spanloom_records_superseded_total", "Records of exchanges that had been finished already.", "counter"),
    Metric(
        "spanloom_streams_lost_total",
        "Times that requests of a pipelined or HTTP/2 connection could not be followed, or a limit was met, by reason.",
        "counter",
        ("reason",),
    ),
    Metric(
        "spanloom_streams_unmatched_responses_total",
        "Responses on pipelined and HTTP/2 connections without a request to go with.",
        "counter",
    ),
    Metric("spanloom_streams_overlapping_bytes_total", "Bytes of such connections that were seen before.", "counter"),
    Metric("spanloom_processes", "Processes whose resource is remembered.", "gauge"),
    Metric("spanloom_processes_vanished_total", "Processes that were gone before they could be looked up.", "counter"),
    Metric("spanloom_processes_evicted_total", "Processes that were forgotten to make room for others.", "counter"),
)
_TLS = (
    Metric("spanloom_tls_files", "Libraries and executables whose TLS functions are watched.", "gauge"),
    Metric("spanloom_tls_attached_total", "Times that the probes were put on such a file.", "counter"),
    Metric("spanloom_tls_detached_total", "Times that they were taken back: nobody ran the file.", "counter"),
    Metric("spanloom_tls_refused_total", "Files that could not be watched, by reason.", "counter", ("reason",)),
    Metric(
        "spanloom_tls_unseen_processes_total",
        "Processes that use TLS in a way that is not seen, by reason.",
        "counter",
        ("reason",),
    ),
)
_EXPORT = (
    Metric("spanloom_export_spans_total", "Spans by what became of them at the collector.", "counter", ("outcome",)),
    Metric("spanloom_export_dropped_total", "Spans that could not be delivered, by reason.", "counter", ("reason",)),
    Metric("spanloom_export_retries_total", "Batches sent again.", "counter"),
    Metric("spanloom_export_in_flight_spans", "Spans accepted for export and not settled.", "gauge"),
    Metric("spanloom_export_waiting_spans", "Spans that wait for their batch to be full or old enough.", "gauge"),
    Metric(
        "spanloom_spans_without_exporter_total",
        "Spans handed over while no endpoint was set: printed, or for nobody.",
        "counter",
    ),
)
_KUBE = (
    Metric("spanloom_kube_pods", "Pods of the node that are known.", "gauge"),
    Metric("spanloom_kube_connected", "1 while the watch of pods is open.", "gauge"),
    Metric("spanloom_kube_requests_total", "Lists and watches that the API server answered.", "counter", ("kind",)),
    Metric("spanloom_kube_events_total", "Watch events taken in, bookmarks included.", "counter"),
    Metric("spanloom_kube_relists_total", "Times a watch could not go on and all pods were listed again.", "counter"),
    Metric("spanloom_kube_failures_total", "Failed requests to the API server, by reason.", "counter", ("reason",)),
    Metric("spanloom_kube_peer_addresses", "Addresses and ports of services and endpoints that have a name.", "gauge"),
    Metric("spanloom_kube_peers_connected", "1 while the watches of services and endpoint slices are open.", "gauge"),
    Metric("spanloom_kube_peers_overflowed_total", "Addresses without a name because of the bound.", "counter"),
    Metric("spanloom_kube_objects_malformed_total", "Objects of the API server that are no pods.", "counter"),
    Metric("spanloom_kube_spans_without_pod_total", "Spans that left before their pod was known.", "counter"),
    Metric("spanloom_kube_spans_held", "Spans that wait for their pod to be known.", "gauge"),
)
_CONFIG = (
    Metric("spanloom_config_last_reload_successful", "1 when the configuration file in place is in effect.", "gauge"),
    Metric("spanloom_config_restart_needed", "Settings of the file that only a restart will apply.", "gauge"),
    Metric("spanloom_config_last_reload_success_timestamp_seconds", "When the last good one was read.", "gauge"),
    Metric("spanloom_config_reloads_total", "Changes of the configuration file, by outcome.", "counter", ("outcome",)),
)
_BUILD = (Metric("spanloom_build_info", "1, with the version as a label.", "gauge", ("version",)),)

ALL = (*_BOOKS, *_KERNEL, *_STITCHING, *_PIPELINE, *_TLS, *_EXPORT, *_KUBE, *_CONFIG, *_BUILD, SOURCE_ERRORS)


def metric_sources(agent: Agent) -> list[Source]:
    """The sources of a running agent. They are read in the telemetry thread; each reads plain numbers only."""

    def books() -> dict[str, Any]:
        # From the kernel to the collector at one moment, so that begun = exported + rejected + without an exporter +
        # sampled out + dropped + in flight + waiting holds in every scrape.
        with agent.pipeline.standing_still():
            state = agent.pipeline.books()
            batcher, exporter = agent.batcher, agent.exporter
            waiting = batcher.waiting if batcher is not None else 0
            not_exported = agent.not_exported.taken
            export = exporter.snapshot() if exporter is not None else None
        readings: dict[str, Any] = (
            {}
            if export is None
            else {
                "spanloom_export_spans_total": {"exported": export.exported, "rejected": export.rejected},
                "spanloom_export_dropped_total": export.dropped,
                "spanloom_export_retries_total": export.retries,
                "spanloom_export_in_flight_spans": export.in_flight,
            }
        )
        return readings | {
            "spanloom_exchanges_begun_total": state.begun,
            "spanloom_spans_handed_over_total": state.handed_over,
            "spanloom_spans_sampled_out_total": state.sampled_out,
            "spanloom_exchanges_dropped_total": state.dropped,
            "spanloom_exchanges_in_flight": {"kernel": state.in_flight_kernel, "agent": state.in_flight_agent},
            "spanloom_export_waiting_spans": waiting,
            "spanloom_spans_without_exporter_total": not_exported,
        }

    def kernel() -> dict[str, Any]:
        statistics = agent.capture.statistics()
        return {
            "spanloom_kernel_events_total": agent.capture.counters(),
            "spanloom_program_runs_total": {one.name: one.run_count for one in statistics},
            "spanloom_program_seconds_total": {one.name: one.run_time_ns / 1e9 for one in statistics},
            "spanloom_program_missed_total": {one.name: one.misses for one in statistics},
        }

    def stitching() -> dict[str, Any]:
        return {
            "spanloom_stitching_released_early_total": agent.stitcher.released_early,
            "spanloom_stitching_openings_total": agent.stitcher.openings,
            "spanloom_stitching_parents_lost_total": agent.stitcher.parents_lost,
            "spanloom_stitching_ambiguous_total": agent.stitcher.ambiguous,
            "spanloom_propagation_malformed_total": dict(agent.extractor.malformed),
        }

    def pipeline() -> dict[str, Any]:
        return {
            "spanloom_records_unknown_total": agent.pipeline.unknown_records,
            "spanloom_records_superseded_total": agent.pipeline.superseded,
            "spanloom_streams_lost_total": agent.pipeline.stream_losses.reasons,
            "spanloom_streams_unmatched_responses_total": agent.pipeline.stream_losses.unmatched_responses,
            "spanloom_streams_overlapping_bytes_total": agent.pipeline.stream_losses.overlapping_bytes,
            "spanloom_processes": len(agent.processes),
            "spanloom_processes_vanished_total": agent.processes.vanished,
            "spanloom_processes_evicted_total": agent.processes.evicted,
        }

    def tls() -> dict[str, Any]:
        return {
            "spanloom_tls_files": agent.tls.files,
            "spanloom_tls_attached_total": agent.tls.attached,
            "spanloom_tls_detached_total": agent.tls.detached,
            "spanloom_tls_refused_total": dict(agent.tls.refused),
            "spanloom_tls_unseen_processes_total": dict(agent.tls.unseen),
        }

    def kube() -> dict[str, Any]:
        if agent.cluster is None:
            return {}
        watcher, peers = agent.cluster.watcher, agent.cluster.peers
        named = {}
        if peers is not None:
            named = {
                "spanloom_kube_peer_addresses": peers.addresses,
                "spanloom_kube_peers_connected": int(all(one.connected for one in agent.cluster.peer_watchers)),
                "spanloom_kube_peers_overflowed_total": peers.overflowed,
            }
        return named | {
            "spanloom_kube_pods": agent.cluster.directory.pods,
            "spanloom_kube_connected": int(watcher.connected),
            "spanloom_kube_requests_total": {"list": watcher.lists, "watch": watcher.watches},
            "spanloom_kube_events_total": watcher.events,
            "spanloom_kube_relists_total": watcher.relists,
            "spanloom_kube_failures_total": dict(watcher.failures),
            "spanloom_kube_objects_malformed_total": agent.cluster.directory.malformed,
            "spanloom_kube_spans_without_pod_total": agent.hold.incomplete,
            "spanloom_kube_spans_held": agent.hold.held,
        }

    def config() -> dict[str, Any]:
        file = agent.config_file
        if file is None:
            return {}
        return {
            "spanloom_config_last_reload_successful": int(file.last_reload_successful),
            "spanloom_config_restart_needed": len(agent.restart_needed),
            "spanloom_config_last_reload_success_timestamp_seconds": file.last_reload_success_unix,
            "spanloom_config_reloads_total": dict(file.reloads),
        }

    return [
        Source(_BOOKS + _EXPORT, books),
        Source(_KERNEL, kernel),
        Source(_STITCHING, stitching),
        Source(_PIPELINE, pipeline),
        Source(_TLS, tls),
        Source(_KUBE, kube),
        Source(_CONFIG, config),
        Source(_BUILD, lambda: {"spanloom_build_info": {__version__: 1}}),
    ]


def reference() -> str:
    """The metrics reference in Markdown (docs/metrics.md)."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m agent.metrics`; do not edit.",
        "",
        "| metric | kind | labels | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.help} |" for one in ALL]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
