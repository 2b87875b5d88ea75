"""agent.otlp.batch: spans -> requests of bounded size and age; what is held for its pod, and for how long."""

from __future__ import annotations

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.model import Span
from agent.otlp.batch import Batcher, Subject

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
    """What is known of the processes; changeable."""

    def __init__(self, **subjects: Subject) -> None:
        self.subjects = {FRONT: Subject((("service.name", "front"),)), BACK: Subject((("service.name", "back"),))}
        self.asked: list[tuple[int, int]] = []

    def __call__(self, process: tuple[int, int]) -> Subject:
        self.asked.append(process)
        return self.subjects[process]


def span(process: tuple[int, int]) -> Span:
    return Span(bytes(15) + b"1", bytes(7) + b"1", b"", "", "GET", 2, 1, 2, (), False, (), "", True, process)


def batcher(known: Known, **settings: int) -> tuple[Batcher, Sent]:
    sent = Sent()
    values = {"max_spans": 4, "max_delay_ns": SECOND, "hold_ns": 2 * SECOND} | settings
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


def test_spans_wait_for_their_pod():
    """They leave with its metadata when it becomes known in time; others are not held up."""
    known = Known()
    known.subjects[BACK] = Subject((("service.name", "?"),), is_complete=False)
    batches, sent = batcher(known)
    batches.write([span(FRONT), span(BACK), span(BACK), span(FRONT)], 0)
    assert sent.batches == [[("front", 2)]]
    assert batches.waiting == batches.held == 2
    known.subjects[BACK] = Subject((("service.name", "back"),))
    batches.tick(SECOND)
    assert sent.batches[1:] == [[("back", 2)]]
    assert (batches.waiting, batches.incomplete) == (0, 0)


def test_the_wait_is_bounded_in_time():
    """Then they leave with what is known, and are counted."""
    known = Known()
    known.subjects[BACK] = Subject((("service.name", "?"),), is_complete=False)
    batches, sent = batcher(known)
    batches.write([span(BACK)] * 4, 0)
    batches.tick(2 * SECOND - 1)
    assert not sent.batches
    batches.tick(2 * SECOND)
    assert sent.batches == [[("?", 4)]]
    assert batches.incomplete == 4


def test_the_wait_is_bounded_in_number():
    """Beyond the bound nothing more is held."""
    known = Known()
    known.subjects[BACK] = Subject((("service.name", "?"),), is_complete=False)
    known.subjects[FRONT] = Subject((("service.name", "??"),), is_complete=False)
    batches, sent = batcher(known, max_held=2)
    batches.write([span(BACK)] * 3 + [span(FRONT)], 0)
    assert sent.batches == [[("??", 1)]]
    assert (batches.held, batches.incomplete) == (3, 1)


def test_the_end_waits_for_nothing():
    """flush() hands over what is held."""
    known = Known()
    known.subjects[BACK] = Subject((("service.name", "?"),), is_complete=False)
    batches, sent = batcher(known)
    batches.write([span(BACK)], 0)
    batches.flush()
    batches.flush()
    assert sent.batches == [[("?", 1)]]
    assert (batches.waiting, batches.incomplete) == (0, 1)


def test_what_turns_out_not_to_be_wanted_is_dropped_and_counted():
    """A pod that the rules leave out may have made spans before it was known."""
    known = Known()
    known.subjects[BACK] = Subject((), is_complete=False)
    batches, sent = batcher(known)
    batches.write([span(BACK)] * 4, 0)
    known.subjects[BACK] = Subject((), is_wanted=False)
    batches.tick(1)
    batches.write([span(BACK)] * 4, 2)
    assert not sent.batches
    assert (batches.waiting, batches.unwanted) == (0, 8)
