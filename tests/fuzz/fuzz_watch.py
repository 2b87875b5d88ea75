"""Fuzz target of the lists and watches of the API server: pods, services and endpoint slices.

``python tests/fuzz/fuzz_watch.py [libFuzzer arguments] CORPUS_DIR``. In: the first byte chooses what is watched and how
the rest is cut into chunks; the rest holds the server's answers, parted by NUL bytes: a page of a list, then watches
with a line per event. Out: an AssertionError, or any exception, is a finding. The checks need no atheris, so the unit
tests replay the corpus through them.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.kube.api import ApiError, _decode_object, split_lines
    from agent.kube.directory import PodDirectory
    from agent.kube.peers import PeerIndex, read_service, read_slice
    from agent.kube.select import PodRules
    from agent.kube.watch import PodWatcher, Watched, Watcher

STEPS = 8


class Stream:
    """In place of the client's: one watch."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._events = map(_decode_object, split_lines(chunks))

    def __iter__(self) -> Iterator[dict]:
        return self._events

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Answers:
    """In place of the client: what the server said, decoded as the client does it."""

    def __init__(self, data: bytes, chunk_bytes: int) -> None:
        self._parts = iter(data.split(b"\0"))
        self._chunk_bytes = chunk_bytes

    def get(self, path: str, query: object, *, interrupt: object) -> dict:
        return _decode_object(self._next())

    def stream(self, path: str, query: object, limit_seconds: float, *, interrupt: object) -> Stream:
        part = self._next()
        size = self._chunk_bytes
        chunks = (part[begin : begin + size] for begin in range(0, len(part), size))
        return Stream(chunks)

    def _next(self) -> bytes:
        try:
            return next(self._parts)
        except StopIteration:
            raise ApiError(0, "disconnected", "nothing more") from None


def check_watch(data: bytes) -> None:
    """Whatever the server says: what is known stays within its bounds, and no defect is met on either side."""
    choice = data[0] if data else 0
    answers = Answers(data[1:], 1 + (choice >> 2) * 7)
    clock = partial(next, itertools.count(0.0, 0.5))
    options = {"clock": clock, "sleep": lambda seconds: None}
    directory, peers = PodDirectory(PodRules(), node_name="node"), PeerIndex(max_claims=50)
    if choice & 3 == 0:
        watcher = PodWatcher(answers, "node", directory.replace, directory.change, **options)
    else:
        kind, read = ("service", read_service) if choice & 1 else ("slice", read_slice)
        watched = Watched(path="/", noun="things", at_most=100, shrink=partial(peers.shrink, read))
        watcher = Watcher(answers, watched, partial(peers.replace, kind), partial(peers.change, read), **options)
    for _ in range(STEPS):
        assert 0.0 <= watcher._step() <= 400.0
    assert not watcher.failures["internal"], watcher.failures
    assert not watcher.failures["callback"], watcher.failures
    assert peers.addresses <= 50
    assert watcher.stop(0.0)


def test_one_input(data: bytes) -> None:
    check_watch(data)


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    logging.disable()
    main()
