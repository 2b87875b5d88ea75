"""Reads the agent's books again and again while something goes on, and keeps what is wrong with them."""

from __future__ import annotations

import threading

from tests.e2e.harness import AgentProcess, Books


class BooksWatcher:
    """Every reading must close, have between 0 and ``most_in_flight`` in flight, and no counter may ever fall.

    A context manager: watches until it is left. What is wrong is told by ``assert_right``.
    """

    def __init__(self, tracing: AgentProcess, most_in_flight: int) -> None:
        self._tracing = tracing
        self._most_in_flight = most_in_flight
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.readings: list[Books] = []
        self.wrong: list[str] = []
        self.error: Exception | None = None

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            try:
                books = self._tracing.books()
            except Exception as error:  # reported by the thread that runs the test
                self.error = error
                return
            self._judge(books)
            self.readings.append(books)

    def _judge(self, books: Books) -> None:
        if not books.closed:
            self.wrong.append(f"does not close: {books}")
        if not 0 <= books.in_flight <= self._most_in_flight:
            self.wrong.append(f"not 0 to {self._most_in_flight} in flight: {books}")
        if self.readings:
            counters = books.counters()
            before = self.readings[-1].counters()
            if fallen := {
                name: (count, counters.get(name, 0)) for name, count in before.items() if counters.get(name, 0) < count
            }:
                self.wrong.append(f"counters fell: {fallen}")

    def __enter__(self) -> BooksWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def assert_right(self, *, readings: int) -> None:
        """Nothing was wrong in any of at least so many readings."""
        assert self.error is None, repr(self.error)
        assert len(self.readings) >= readings
        assert not self.wrong, f"{len(self.wrong)} of {len(self.readings)} readings: " + "; ".join(self.wrong[:5])
