"""Spans -> export requests of bounded size and age.

In: spans and the resource of a process. Out: encoded requests handed to an exporter. Never waits: what the exporter
refuses is counted by the exporter. Spans of a process whose pod is not known yet are held for a bounded time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from agent.model import Attributes, Span
from agent.otlp.encode import encode_request, encode_resource, encode_span


class Exporter(Protocol):
    def submit(self, payload: bytes, span_count: int) -> bool: ...


class Subject(NamedTuple):
    """Whose spans: the resource, whether it is complete, and whether its spans are wanted after all."""

    resource: Attributes
    is_complete: bool = True
    is_wanted: bool = True


class Batcher:
    """Groups encoded spans by process and submits them when ``max_spans`` wait or the oldest waited ``max_delay_ns``.

    Spans of a subject that is not complete are held for up to ``hold_ns`` more, ``max_held`` of them at most; then they
    leave with what is known, and are counted in ``incomplete``. What is not wanted is counted in ``unwanted``.

    Bound: ``max_spans`` encoded spans wait here at most, plus ``max_held``, plus what one ``write`` brings. Encoded
    resources are cached per process, 4096 at most; the cache is emptied when full.
    """

    _RESOURCES = 4096

    def __init__(
        self,
        exporter: Exporter,
        subject_of: Callable[[tuple[int, int]], Subject],
        *,
        max_spans: int = 512,
        max_delay_ns: int = 1_000_000_000,
        hold_ns: int = 0,
        max_held: int = 16_384,
    ) -> None:
        self._submit = exporter.submit
        self._subject_of = subject_of
        self._max_spans = max_spans
        self._max_delay_ns = max_delay_ns
        self._hold_ns = hold_ns
        self._max_held = max_held
        self._resources: dict[tuple[int, int], bytes | None] = {}
        self._groups: dict[tuple[int, int], list[bytes]] = {}
        self._oldest_ns = 0
        self._waiting = 0
        # Spans whose subject is not complete, and since when.
        self._held: dict[tuple[int, int], tuple[int, list[bytes]]] = {}
        self.held = 0
        self.incomplete = 0
        """Spans that left without the metadata of their pod."""
        self.unwanted = 0
        """Spans of processes that turned out not to be selected."""

    @property
    def waiting(self) -> int:
        """Spans that wait for their batch, or for their pod to be known."""
        return self._waiting + self.held

    def write(self, spans: Iterable[Span], now_ns: int) -> None:
        """Encode and collect spans, and submit full batches. ``now_ns``: CLOCK_MONOTONIC."""
        groups = self._groups
        waiting = self._waiting
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
                self._waiting = waiting
                self._send(now_ns)
                groups, process = self._groups, None
                waiting = 0
                self._oldest_ns = now_ns
        self._waiting = waiting

    def tick(self, now_ns: int) -> None:
        """Submit what has waited for too long, and what was held and need not be any more."""
        if (self._waiting and now_ns - self._oldest_ns >= self._max_delay_ns) or self._held:
            self._send(now_ns)

    def flush(self) -> None:
        """Submit everything that waits."""
        self._send(None)

    def forget_resource(self, process: tuple[int, int]) -> None:
        """The resource of a process has changed: encode it anew."""
        self._resources.pop(process, None)

    def forget_resources(self) -> None:
        """All of them may have changed."""
        self._resources.clear()

    def _send(self, now_ns: int | None) -> None:
        """Submit all groups, but those held for their subject until it is complete or the time is up (None: it is)."""
        groups, self._groups = self._groups, {}
        self._waiting = 0
        held, self._held = self._held, {}
        self.held = 0
        since_ns: dict[tuple[int, int], int] = {}
        for process, (since, spans) in held.items():
            groups[process] = spans + groups.get(process, [])
            since_ns[process] = since
        ready: list[tuple[bytes, list[bytes]]] = []
        count = 0
        for process, spans in groups.items():
            encoded = self._resources.get(process, b"")
            if encoded == b"":
                subject = self._subject_of(process)
                if not subject.is_complete:
                    since = since_ns.get(process, now_ns)
                    if now_ns is not None and now_ns - since < self._hold_ns and self.held < self._max_held:
                        self._held[process] = since, spans
                        self.held += len(spans)
                        continue
                    self.incomplete += len(spans)
                encoded = encode_resource(subject.resource) if subject.is_wanted else None
                if subject.is_complete:
                    self._remember(process, encoded)
            if encoded is None:
                self.unwanted += len(spans)
            else:
                ready.append((encoded, spans))
                count += len(spans)
        if count:
            self._submit(encode_request(ready), count)

    def _remember(self, process: tuple[int, int], encoded: bytes | None) -> None:
        if len(self._resources) >= self._RESOURCES:
            self._resources.clear()
        self._resources[process] = encoded
