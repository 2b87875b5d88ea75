"""Spans wait for their pod: between the pipeline and all of its sinks.

In: spans, and of whom the pod is not known yet. Out: the same spans, once the pod is known or the time is up; without
those of processes that turned out not to be selected. Never: a clock is read, or a span is looked at while every
process has its place, which outside of Kubernetes is always so.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.model import Span

ProcessKey = tuple[int, int]


class Hold:
    """Keeps the spans of processes without a place for up to ``hold_ns``, ``max_held`` spans at most.

    Beyond either bound they leave with what is known, and are counted in ``incomplete``. Of 16 384 processes it is
    remembered that they have no place, or that their spans are not wanted; beyond that the oldest is forgotten.
    """

    _PROCESSES = 16_384

    def __init__(self, *, hold_ns: int = 0, max_held: int = 16_384) -> None:
        self.hold_ns = hold_ns
        self._max_held = max_held
        # Processes without a place -> their spans; since when the first of them waits, longest first.
        self._unplaced: dict[ProcessKey, list[Span]] = {}
        self._since: dict[ProcessKey, int] = {}
        # Processes that were found not to be selected after spans of theirs had been made: more may be on their way.
        self._unwanted: dict[ProcessKey, None] = {}
        self._released: list[Span] = []
        self.is_idle = True
        """True while every span may pass as it comes: ``pass_on`` need not be called."""
        self.held = 0
        self.incomplete = 0
        """Spans that left without the metadata of their pod."""
        self.unwanted = 0
        """Spans of processes that turned out not to be selected: dropped."""

    @property
    def waiting(self) -> int:
        """Spans that are here."""
        return self.held + len(self._released)

    def review(self, process: ProcessKey, is_placed: bool, is_wanted: bool) -> None:
        """Say what is known of a process now. What need not wait any more leaves with the next ``pass_on``."""
        if not is_placed:
            if process not in self._unplaced:
                if len(self._unplaced) >= self._PROCESSES:
                    self._give_up(next(iter(self._unplaced)))
                self._unwanted.pop(process, None)
                self._unplaced[process] = []
        elif process in self._unplaced:
            spans = self._take(process)
            if is_wanted:
                self._released += spans
            else:
                self.unwanted += len(spans)
                if len(self._unwanted) >= self._PROCESSES:
                    del self._unwanted[next(iter(self._unwanted))]
                self._unwanted[process] = None
        elif is_wanted:
            self._unwanted.pop(process, None)
        self._consider_idle()

    def overdue(self, now_ns: int) -> list[ProcessKey]:
        """The processes whose spans have waited for so long that the next ``pass_on`` lets them go."""
        found = []
        for process, since_ns in self._since.items():
            if now_ns - since_ns < self.hold_ns:
                break
            found.append(process)
        return found

    def pass_on(self, spans: Sequence[Span], now_ns: int) -> list[Span]:
        """Take spans; return those that leave now, with what was held and need not be any more."""
        for process in self.overdue(now_ns):
            self._give_up(process)
            self._unplaced[process] = []
        leaving, self._released = self._released, []
        unplaced, unwanted = self._unplaced, self._unwanted
        process, group, is_unwanted = None, None, False
        for span in spans:
            if span.process_key is not process:
                process = span.process_key
                group = unplaced.get(process)
                is_unwanted = process in unwanted
            if group is not None:
                if self.hold_ns and self.held < self._max_held:
                    if not group:
                        self._since[process] = now_ns
                    group.append(span)
                    self.held += 1
                    continue
                self.incomplete += 1
            elif is_unwanted:
                self.unwanted += 1
                continue
            leaving.append(span)
        self._consider_idle()
        return leaving

    def flush(self) -> list[Span]:
        """Let everything go that waits."""
        for process in list(self._since):
            self._give_up(process)
        leaving, self._released = self._released, []
        self._consider_idle()
        return leaving

    def _give_up(self, process: ProcessKey) -> None:
        """Release the spans of a process as they are, and forget the process."""
        spans = self._take(process)
        self.incomplete += len(spans)
        self._released += spans

    def _take(self, process: ProcessKey) -> list[Span]:
        spans = self._unplaced.pop(process)
        self._since.pop(process, None)
        self.held -= len(spans)
        return spans

    def _consider_idle(self) -> None:
        self.is_idle = not (self._unplaced or self._unwanted or self._released)
