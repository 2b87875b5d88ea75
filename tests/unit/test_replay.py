"""Recorded ring-buffer bytes through the whole pipeline; the whole output is compared as text.

``golden/<name>.json`` was recorded by tools/record.py from ``golden/<name>.py``; ``make golden`` rewrites
``golden/<name>.txt`` after a change that is meant. Record anew when bpf/events.h changes.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from agent.kernel.layout import WireLayout
from agent.kernel.records import Decoder
from agent.model import Span, SpanKind
from agent.pipeline import Pipeline
from agent.process import ProcessTable, Selector
from agent.propagation import FORMATS, Extractor
from agent.protocols import PROTOCOLS, http1_stream
from agent.sampling import Sampler
from agent.stitch import Stitcher

GOLDEN = Path(__file__).with_name("golden")
RECORDINGS = sorted(GOLDEN.glob("*.json"))
CLOCK_OFFSET_NS = 1_700_000_000_000_000_000


class Recording:
    """A kernel that says again what it said when it was recorded."""

    def __init__(self, recording: dict) -> None:
        self.layout = WireLayout.from_descriptions(recording["descriptions"].__getitem__)
        self.steps = recording["steps"]
        self._counters = recording["counters"]
        self._batches: deque[tuple[bytes, list[int]]] = deque()
        self._watermark_ns = 0

    def load(self, step: dict) -> None:
        """Make a step's batches and watermark the next ones."""
        self._batches.extend(
            (zlib.decompress(base64.b64decode(batch["bytes"])), batch["offsets"]) for batch in step["batches"]
        )
        self._watermark_ns = step["watermark_ns"]

    def drain(self) -> tuple[bytes, list[int]]:
        return self._batches.popleft() if self._batches else (b"", [])

    def sweep(self) -> int:
        return self._watermark_ns

    def decide(self, tgid: int, start_ns: int, state: int) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return self._counters


class DrawnIds:
    """Trace ids that can be told from recorded ones."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return b"".join(b"drawn%011d" % (self._count * 1000 + number) for number in range(size // 16))


def _trace(trace_id: bytes, drawn: dict[bytes, str]) -> str:
    return drawn.setdefault(trace_id, f"drawn-{len(drawn)}") if trace_id.startswith(b"drawn") else trace_id.hex()


class Collected:
    """The sink."""

    waiting = 0
    unwanted = 0

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        self.spans += spans

    def tick(self, now_ns: int) -> None:
        pass

    def flush(self) -> None:
        pass


def replay(path: Path, split: bool = False) -> tuple[list[Span], Pipeline, Stitcher, ProcessTable]:
    """Run a recording. ``split``: each record arrives in a batch of its own."""
    source = Recording(json.loads(path.read_text()))
    sink = Collected()
    stitcher = Stitcher(Sampler(), random_bytes=DrawnIds())
    stitcher.clock_offset_ns = CLOCK_OFFSET_NS
    processes = ProcessTable(proc_root=Path("/nonexistent"), host_name="host", version="0")
    pipeline = Pipeline(
        source=source,
        decoder=Decoder(source.layout),
        protocols=[protocol(extractor=Extractor(FORMATS)) for protocol in PROTOCOLS],
        processes=processes,
        selector=Selector(("*",), (), 0),
        stitcher=stitcher,
        sinks=[sink],
    )
    for step in source.steps:
        if split:
            for batch in step["batches"]:
                data = zlib.decompress(base64.b64decode(batch["bytes"]))
                for offset in batch["offsets"]:
                    pipeline.feed(data, [offset], step["now_ns"])
            source.load(step | {"batches": []})
        else:
            source.load(step)
        if step["watermark_ns"] is None:
            pipeline.run_once(step["now_ns"])
        else:
            pipeline.sweep(step["now_ns"])
    pipeline.finish(source.steps[-1]["now_ns"])
    return sink.spans, pipeline, stitcher, processes


def as_text(spans: list[Span], pipeline: Pipeline, stitcher: Stitcher, processes: ProcessTable) -> str:
    """Everything that came out, one thing per line."""
    lines = []
    # In the order of their beginnings; trace ids that the agent drew are numbered in that order.
    spans = sorted(spans, key=lambda span: (span.start_time_ns, span.span_id))
    drawn: dict[bytes, str] = {}
    for span in spans:
        service = dict(processes.lookup(*span.process_key).resource)["service.name"]
        lines += [
            f"{SpanKind(span.kind).name} {span.name}",
            f"  trace {_trace(span.trace_id, drawn)} span {span.span_id.hex()}"
            f" parent {span.parent_span_id.hex() or '-'} by {span.link_method or '-'}",
            f"  {span.start_time_ns} + {span.end_time_ns - span.start_time_ns} ns, {service} {span.process_key[0]}"
            f"{', error' if span.error else ''}{'' if span.sampled else ', not sampled'}",
            *(f"  {key} = {value!r}" for key, value in sorted(span.all_attributes())),
            *(f"  state {span.trace_state}" for _ in range(bool(span.trace_state))),
            *(f"  link {_trace(link.trace_id, drawn)} {link.span_id.hex()} {link.attributes}" for link in span.links),
            "",
        ]
    books = pipeline.books()
    lines += [
        f"begun {books.begun}",
        f"handed over {books.handed_over}",
        f"sampled out {books.sampled_out}",
        *(f"dropped {reason} {count}" for reason, count in sorted(books.dropped.items())),
        f"in flight {books.in_flight}",
        f"superseded {pipeline.superseded}",
        f"streamed {pipeline.streamed}",
        f"unknown records {pipeline.unknown_records}",
        f"ambiguous {stitcher.ambiguous}",
        f"parents lost {stitcher.parents_lost}",
        f"released early {stitcher.released_early}",
        "",
    ]
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def fixed_ids(monkeypatch):
    """Exchanges of pipelined connections get their ids in the agent: the same ones in every run."""
    monkeypatch.setattr(http1_stream, "getrandbits", Random(1).getrandbits)


def test_there_are_recordings():
    """The other tests here have something to run on."""
    assert RECORDINGS


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recording_gives_the_known_output(path, rewrites_golden):
    """The same bytes give the same spans, links, counts and books, to the letter."""
    text = as_text(*replay(path))
    expected = path.with_suffix(".txt")
    if rewrites_golden:
        expected.write_text(text)
    assert text == expected.read_text()


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_batches_change_nothing(path, monkeypatch):
    """How many records one batch holds does not matter."""
    whole = as_text(*replay(path))
    monkeypatch.setattr(http1_stream, "getrandbits", Random(1).getrandbits)
    assert as_text(*replay(path, split=True)) == whole


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_books_of_a_recording_add_up(path):
    """Everything begun is accounted for, and nothing is left over."""
    spans, pipeline, stitcher, _ = replay(path)
    books = pipeline.books()
    assert books.begun == len(spans) + books.sampled_out + sum(books.dropped.values()) + books.in_flight
    assert (books.in_flight_agent, stitcher.held) == (0, 0)
    assert len({span.span_id for span in spans}) == len(spans)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recorded_secrets_do_not_come_out(path):
    """The recordings hold an Authorization header and a signature; the output holds neither."""
    recorded = b"".join(
        zlib.decompress(base64.b64decode(batch["bytes"]))
        for step in json.loads(path.read_text())["steps"]
        for batch in step["batches"]
    )
    assert b"secret" in recorded
    assert "secret" not in as_text(*replay(path))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recordings_are_small(path):
    """A recording is a fixture, not a data set."""
    assert path.stat().st_size < 64 * 1024
