"""agent.otlp.batch: spans -> requests of bounded size and age."""

from __future__ import annotations

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.model import Attributes, Span
from agent.otlp.batch import Batcher

SECOND = 1_000_000_000
FRONT, BACK = (1, 10), (2, 20)


class Sent:
    """The exporter: what it was given, decoded by the official stubs."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int]]] = []

    def submit(self, payload: bytes, span_count: int) -> bool:
        request = ExportTraceServiceRequest.FromString(payload)
        batch = [
            (group.resource.attributes[0].value.string_value, len(group.scope_spans[0].spans))
            for group in request.resource_spans
        ]
        assert sum(count for _, count in batch) == span_count
        self.batches.append(batch)
        return True


class Known:
    """What is known of the processes, and who asked for it."""

    def __init__(self) -> None:
        self.resources: dict[tuple[int, int], Attributes] = {
            FRONT: (("service.name", "front"),),
            BACK: (("service.name", "back"),),
        }
        self.asked: list[tuple[int, int]] = []

    def __call__(self, process: tuple[int, int]) -> Attributes:
        self.asked.append(process)
        return self.resources[process]


def span(process: tuple[int, int]) -> Span:
    return Span(bytes(15) + b"1", bytes(7) + b"1", b"", "", "GET", 2, 1, 2, (), False, (), "", True, process)


def batcher(known: Known, **settings: int) -> tuple[Batcher, Sent]:
    sent = Sent()
    values = {"max_spans": 4, "max_delay_ns": SECOND} | settings
    return Batcher(sent, known, **values), sent


def test_a_full_batch_leaves_at_once():
    """By number of spans, over all processes; the rest waits."""
    batches, sent = batcher(Known())
    batches.write([span(FRONT), span(BACK), span(FRONT), span(FRONT), span(BACK)], 0)
    assert sent.batches == [[("front", 3), ("back", 1)]]
    assert batches.waiting == 1


def test_the_oldest_span_decides_when_a_batch_leaves():
    """What waits for longer than the delay leaves at the next tick, not before."""
    batches, sent = batcher(Known())
    batches.write([span(FRONT)], 0)
    batches.write([span(FRONT)], SECOND - 1)
    batches.tick(SECOND - 1)
    assert not sent.batches
    batches.tick(SECOND)
    assert sent.batches == [[("front", 2)]]
    batches.tick(9 * SECOND)
    assert len(sent.batches) == 1


def test_a_resource_is_asked_for_once():
    """And again after it has changed."""
    known = Known()
    batches, _ = batcher(known, max_spans=1)
    batches.write([span(FRONT)] * 3, 0)
    assert known.asked == [FRONT]
    batches.forget_resource(FRONT)
    batches.write([span(FRONT)], 0)
    assert known.asked == [FRONT] * 2


def test_other_bounds_hold_for_what_waits_already():
    """Nothing is sent because of the change, and nothing has to wait longer than the new bounds say."""
    batches, sent = batcher(Known())
    batches.write([span(FRONT)] * 3, 0)
    batches.reconfigure(max_spans=100, max_delay_ns=5 * SECOND)
    batches.write([span(BACK)] * 3, 1)
    batches.tick(5 * SECOND - 1)
    assert not sent.batches
    batches.tick(5 * SECOND)
    assert sent.batches == [[("front", 3), ("back", 3)]]
    batches.write([span(FRONT)] * 3, 6 * SECOND)
    batches.reconfigure(max_spans=2, max_delay_ns=5 * SECOND)
    batches.write([span(FRONT)], 6 * SECOND)
    assert sent.batches[1:] == [[("front", 4)]]


def test_what_was_taken_was_sent_or_waits():
    """At any time; flush leaves nothing."""
    batches, sent = batcher(Known())
    for number in range(11):
        batches.write([span(FRONT if number % 3 else BACK)] * number, number)
        total = sum(count for batch in sent.batches for _, count in batch)
        assert batches.taken == total + batches.waiting
    batches.flush()
    batches.flush()
    assert (batches.taken, batches.waiting) == (55, 0)
    assert sum(count for batch in sent.batches for _, count in batch) == 55
