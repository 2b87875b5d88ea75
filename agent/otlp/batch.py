"""Spans -> export requests of bounded size and age.

In: spans and the resource of a process. Out: encoded requests handed to an exporter. Never waits: what the exporter
refuses is counted by the exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from agent.model import Attributes, Span
from agent.otlp.encode import encode_request, encode_resource, encode_span


class Exporter(Protocol):
    def submit(self, payload: bytes, span_count: int) -> bool: ...


class Batcher:
    """Groups encoded spans by process and submits them when ``max_spans`` wait or the oldest waited ``max_delay_ns``.

    At any time, exactly: spans in ``taken`` = spans submitted + ``waiting``.

    Bound: ``max_spans`` encoded spans wait here at most, plus what one ``write`` brings. Encoded resources are cached
    per process, 4096 at most; the cache is emptied when full.
    """

    _RESOURCES = 4096

    def __init__(
        self,
        exporter: Exporter,
        resource_of: Callable[[tuple[int, int]], Attributes],
        *,
        max_spans: int = 512,
        max_delay_ns: int = 1_000_000_000,
    ) -> None:
        self._submit = exporter.submit
        self._resource_of = resource_of
        self._max_spans = max_spans
        self._max_delay_ns = max_delay_ns
        self._resources: dict[tuple[int, int], bytes] = {}
        self._groups: dict[tuple[int, int], list[bytes]] = {}
        self._oldest_ns = 0
        self.taken = 0
        """Spans that were written here."""
        self.waiting = 0
        """Spans that wait for their batch."""

    def reconfigure(self, *, max_spans: int, max_delay_ns: int) -> None:
        """Send batches of another size or age from now on; what waits goes on waiting."""
        self._max_spans = max_spans
        self._max_delay_ns = max_delay_ns

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        """Encode and collect spans, and submit full batches. ``now_ns``: CLOCK_MONOTONIC."""
        groups = self._groups
        waiting = self.waiting
        if not waiting:
            self._oldest_ns = now_ns
        max_spans = self._max_spans
        process, group = None, None
        for span in spans:
            if span.process_key is not process:
                process = span.process_key
                group = groups.get(process)
                if group is None:
                    group = groups[process] = []
            group.append(encode_span(span))
            waiting += 1
            if waiting >= max_spans:
                self._send()
                groups, process = self._groups, None
                waiting = 0
                self._oldest_ns = now_ns
        self.waiting = waiting
        self.taken += len(spans)

    def tick(self, now_ns: int) -> None:
        """Submit what has waited for too long."""
        if self.waiting and now_ns - self._oldest_ns >= self._max_delay_ns:
            self._send()

    def flush(self) -> None:
        """Submit everything that waits."""
        self._send()

    def forget_resource(self, process: tuple[int, int]) -> None:
        """The resource of a process has changed: encode it anew."""
        self._resources.pop(process, None)

    def forget_resources(self) -> None:
        """All of them may have changed."""
        self._resources.clear()

    def _send(self) -> None:
        groups, self._groups = self._groups, {}
        self.waiting = 0
        if groups:
            ready = [(self._resource(process), spans) for process, spans in groups.items()]
            self._submit(encode_request(ready), sum(len(spans) for _, spans in ready))

    def _resource(self, process: tuple[int, int]) -> bytes:
        encoded = self._resources.get(process)
        if encoded is None:
            if len(self._resources) >= self._RESOURCES:
                self._resources.clear()
            encoded = self._resources[process] = encode_resource(self._resource_of(process))
        return encoded
