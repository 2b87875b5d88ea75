"""The agent's memory on a full node: 250 pods, requests of tens of them, and as many spans as the collector takes."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.generator import Generator
from tests.apiserver import make_pod
from tests.collector import Collector
from tests.e2e import servers
from tests.e2e.cluster import NODE
from tests.e2e.harness import AgentProcess, free_port, wait_until

PODS, ASKING = 250, 30
RSS_BYTES = 110_000_000
"""What the agent may take at its peak."""
FULL_SPEED_SECONDS = 3.0
WAITING_SPANS = 6_000
"""So many may be on the way at a time. Without this bound a collector that falls behind fills the exporter's queue, of
16 MiB: then spans are dropped, and the memory measured is that of another case (docs/scale.md).
"""


class CountingCollector(Collector):
    """Keeps no spans; ``by_pod`` counts them by the name of their pod, ``None`` where there is none."""

    def __init__(self) -> None:
        super().__init__(keep=False, on_payload=self._count)
        self.by_pod: Counter[str | None] = Counter()
        self._lock = threading.Lock()

    def _count(self, payload: bytes) -> None:
        found: Counter[str | None] = Counter()
        for of_resource in ExportTraceServiceRequest.FromString(payload).resource_spans:
            names = (one.value.string_value for one in of_resource.resource.attributes if one.key == "k8s.pod.name")
            found[next(names, None)] += sum(len(of_scope.spans) for of_scope in of_resource.scope_spans)
        with self._lock:
            self.by_pod += found


@pytest.fixture
def collector() -> Iterator[CountingCollector]:
    with CountingCollector() as running:
        yield running


def test_250_pods_at_full_export(containers, api, in_cluster, serve, start, collector, public_path: Path):
    """The peak of the resident set stays below the target, nothing is dropped, and each span is its own pod's."""
    port, uids = free_port(), [str(uuid.uuid4()) for _ in range(PODS)]
    running = [containers(uid) for uid in uids[: 1 + ASKING + 2]]  # the server, the clients, and two that are busy
    for number, uid in enumerate(uids):
        own = {"app": running[number].id} if number < len(running) else ("app",)
        api.put(make_pod(f"pod-{number}", "shop", NODE, own, uid=uid))
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 30})
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == PODS, tracing.state)
    serve(running[0].wrap(servers.python_threads(port, public_path)), port)
    for container in running[1 : 1 + ASKING]:
        url = f"http://127.0.0.1:{port}/status/200"
        assert start(container.enter(["curl", "-q", "-s", "-o", "/dev/null", url])).popen.wait(20) == 0
    busy = [start(container.enter(["sleep", "120"])) for container in running[1 + ASKING :]]
    wait_until(lambda: not any(container.is_empty() for container in running[1 + ASKING :]), "both are in their pods")
    generator = Generator(tracing.pid, (busy[0].pid, busy[1].pid))
    try:
        deadline = time.monotonic() + FULL_SPEED_SECONDS
        while time.monotonic() < deadline:
            if generator.written - collector.span_count < WAITING_SPANS:
                generator.write(640)
            time.sleep(0.001)
        written = generator.written
    finally:
        generator.close()
    expected = 2 * ASKING + written
    wait_until(lambda: sum(collector.by_pod.values()) >= expected, lambda: f"all arrives{tracing.state()}", 60)
    books = tracing.books()  # what the generator writes has not begun in the kernel: they do not close here
    peak_bytes = peak_rss_bytes(tracing)
    print(f"RSS: {peak_bytes / 1e6:.1f} MB at its peak, {written / FULL_SPEED_SECONDS:.0f} spans/s")
    assert written > WAITING_SPANS, "too few to say anything"
    assert (books.dropped, books.undelivered, books.rejected) == ({}, {}, 0)
    assert (books.handed_over, sum(collector.by_pod.values())) == (expected, expected)
    of_busy = collector.by_pod.pop(f"pod-{1 + ASKING}") + collector.by_pod.pop(f"pod-{2 + ASKING}")
    assert of_busy == written
    assert collector.by_pod == {"pod-0": ASKING} | {f"pod-{number}": 1 for number in range(1, 1 + ASKING)}
    assert tracing.metrics()["spanloom_kube_spans_without_pod_total"] == 0
    assert peak_bytes < RSS_BYTES, f"{peak_bytes / 1e6:.1f} MB"


def peak_rss_bytes(tracing: AgentProcess) -> int:
    lines = Path(f"/proc/{tracing.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
