"""agent.pipeline: records of a double of the kernel -> spans, drops and books that add up."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.hold import Hold
from agent.kernel.records import Decoder
from agent.model import ConnectionClosed, End, Exchange, Flag, ProcessSeen, Segment, SegmentFlag, Span
from agent.pipeline import PROCESS_IGNORED, PROCESS_TRACED, Pipeline
from agent.process import Placement, ProcessTable, Selector
from agent.propagation import FORMATS, Extractor
from agent.protocols.http1 import Http1
from agent.sampling import Sampler
from agent.stitch import Stitcher
from tests.unit.exchanges import BACK, CLIENT, FRONT, MILLISECOND, SERVER, exchange
from tests.unit.kernel.wire import LAYOUT, batch, pack

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhalf a"
MALFORMED = b"GET /a b HTTP/1.1\r\n\r\n"
NOT_STATUS = b"HTTP/1.1 abc\r\n\r\n"
FIRST = int(Flag.FIRST)
OWN_TGID = 999


class Source:
    """A kernel whose records and counters the test sets."""

    def __init__(self) -> None:
        self.batches: deque[tuple[bytes, list[int]]] = deque()
        self.count: Counter[str] = Counter()
        self.decisions: list[tuple[int, int, int]] = []
        self.watermark_ns = 0

    def drain(self) -> tuple[bytes, list[int]]:
        return self.batches.popleft() if self.batches else (b"", [])

    def sweep(self) -> int:
        return self.watermark_ns

    def decide(self, tgid: int, start_ns: int, state: int) -> None:
        self.decisions.append((tgid, start_ns, state))

    def counters(self) -> dict[str, int]:
        return {name: self.count[name] for name in LAYOUT.counters}

    def send(self, *records: Exchange | ProcessSeen | Segment | ConnectionClosed) -> None:
        self.batches.append(batch([pack(record) for record in records]))


class Sink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.ticks = 0
        self.flushed = False

    def write(self, spans: Sequence[Span], now_ns: int) -> None:
        self.spans += spans

    def tick(self, now_ns: int) -> None:
        self.ticks += 1

    def flush(self) -> None:
        self.flushed = True


class Bench:
    """A pipeline with doubles at both ends."""

    def __init__(
        self,
        *,
        include: Sequence[str] = ("*",),
        ratio: float = 1.0,
        processes: ProcessTable | None = None,
        **options: object,
    ) -> None:
        self.source, self.sink, self.seen = Source(), Sink(), []
        self.extractor = Extractor(FORMATS)
        nobody = ProcessTable(proc_root=Path("/nonexistent"), host_name="h", version="1")
        self.processes = processes if processes is not None else nobody
        self.stitcher = Stitcher(Sampler(ratio), random_bytes=Random(1).randbytes)
        self.pipeline = Pipeline(
            source=self.source,
            decoder=Decoder(LAYOUT),
            protocols=[Http1(extractor=self.extractor)],
            processes=self.processes,
            selector=Selector(include, (), OWN_TGID),
            stitcher=self.stitcher,
            sinks=[self.sink],
            on_process=self.seen.append,
            **options,
        )
        self.now_ms = 1000
        self.counted: Counter[str] = Counter()

    def send(self, *records: Exchange | ProcessSeen | Segment | ConnectionClosed) -> Bench:
        """Records arrive, counted as the kernel would: each first one is an exchange begun and emitted."""
        first = sum(1 for record in records if isinstance(record, Exchange) and record.flags & FIRST)
        self.source.count["begun"] += first
        self.source.count["emitted"] += first
        self.source.send(*records)
        self.pipeline.run_once(self.now_ms * MILLISECOND)
        return self

    def sweep(self, after_ms: int = 200) -> Bench:
        self.now_ms += after_ms
        self.source.watermark_ns = self.now_ms * MILLISECOND
        self.pipeline.sweep(self.now_ms * MILLISECOND)
        return self

    def spans(self) -> list[tuple[int, str]]:
        """(id, error.type) of every span, in order."""
        return [
            (int.from_bytes(span.span_id, "big"), str(dict(span.all_attributes()).get("error.type", "")))
            for span in self.sink.spans
        ]

    def assert_balanced(self, in_flight: int | None = None) -> None:
        books = self.pipeline.books()
        total = books.handed_over + books.sampled_out + sum(books.dropped.values()) + books.in_flight
        assert books.begun == total, books
        assert books.in_flight >= 0, books
        assert books.in_flight_agent >= 0, books
        counted = Counter(
            begun=books.begun, handed_over=books.handed_over, sampled_out=books.sampled_out, **books.dropped
        )
        assert counted >= self.counted, f"counters fell from {self.counted} to {counted}"
        self.counted = counted
        if in_flight is not None:
            assert books.in_flight == in_flight, books


def record(number: int, end: End = End.NEXT, request: bytes = GET, response: bytes = OK, **fields: object) -> Exchange:
    """A record with data, as the kernel fills it."""
    values: dict[str, object] = {
        "end": int(end),
        "request": request,
        "response": response,
        "request_captured": len(request),
        "response_captured": len(response),
        "request_bytes": len(request),
        "response_bytes": len(response),
        "tail": response[-8:].rjust(8, b"\0"),
        "flags": FIRST | Flag.TAIL_VALID,
    }
    if not response:
        values |= {"response_start_ns": 0, "response_end_ns": 0, "response_tid": 0, "flags": FIRST}
    if not fields.pop("first", True):
        values["flags"] &= ~FIRST
    return exchange(number, **values | fields)


def opened(number: int, **fields: object) -> Exchange:
    """An exchange that waits for its response."""
    return record(number, End.OPEN, response=b"", **fields)


def closed(number: int, end: End = End.CLOSED, flags: int = 0, connection: int | None = None) -> ConnectionClosed:
    return ConnectionClosed(4, 1, int(end), int(flags), connection or number, number, 5000 * MILLISECOND)


# -- one record per exchange


def test_an_exchange_becomes_a_span():
    """The common case: one record, one span, at the sink at once."""
    bench = Bench().send(record(1), record(2, End.CLOSED))
    assert sorted(bench.spans()) == [(1, ""), (2, "")]
    bench.assert_balanced(in_flight=0)


def test_everything_that_waits_is_drained():
    """One call empties the ring buffer, however many batches that takes, and the sinks get their tick."""
    bench = Bench()
    for number in range(1, 4):
        bench.source.send(record(number))
    assert bench.pipeline.run_once(0) == 3
    assert len(bench.sink.spans) == 3
    assert bench.sink.ticks == 1


def test_what_is_malformed_is_counted_by_reason():
    """No span is invented, the reason is counted, the next exchange is served."""
    bench = Bench().send(record(1, request=MALFORMED), record(2, response=NOT_STATUS), record(3))
    assert bench.spans() == [(3, "")]
    assert bench.pipeline.dropped == {"bad_request_line": 1, "bad_status_line": 1}
    bench.assert_balanced(in_flight=0)


def test_an_unknown_record_is_counted():
    """A record of another version does not disturb."""
    bench = Bench()
    bench.source.batches.append(batch([b"\x63\0" + bytes(62), pack(record(1))]))
    bench.source.count["begun"] = bench.source.count["emitted"] = 1
    bench.pipeline.run_once(0)
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.unknown_records == 1
    bench.assert_balanced(in_flight=0)


# -- provisional records


def test_a_provisional_record_is_superseded_by_the_last_one():
    """OPEN, QUIET, then the end: one span with the last word."""
    bench = Bench().send(opened(1))
    bench.assert_balanced(in_flight=1)
    bench.send(record(1, End.QUIET, response=UNTIL_CLOSE, first=False))
    assert bench.spans() == []
    bench.assert_balanced(in_flight=1)
    bench.send(record(1, End.CLOSED, response=UNTIL_CLOSE + b"nd more", end_ms=1300, first=False))
    assert bench.spans() == [(1, "")]
    assert bench.sink.spans[0].end_time_ns == 1300 * MILLISECOND
    bench.assert_balanced(in_flight=0)


def test_a_quiet_response_that_is_whole_is_a_span_at_once():
    """Content-Length reached: nothing more is waited for, and what follows is superseded."""
    bench = Bench().send(record(1, End.QUIET))
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.pending == 0
    bench.send(record(1, End.CLOSED, first=False), closed(1))
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.superseded == 1
    bench.assert_balanced(in_flight=0)


def test_a_response_that_came_after_an_announcement_is_a_span():
    """A slow request, then its whole response."""
    bench = Bench().send(opened(1)).send(record(1, End.QUIET, first=False))
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.pending == 0
    bench.assert_balanced(in_flight=0)


@pytest.mark.parametrize(
    ("end", "flags", "error"),
    [
        (End.CLOSED, 0, ""),
        (End.RESET, 0, "client_disconnect"),
    ],
)
def test_a_close_ends_what_was_reported(end, flags, error):
    """The close record of a response that lasts until the close."""
    bench = Bench().send(record(1, End.QUIET, response=UNTIL_CLOSE)).send(closed(1, end, flags))
    assert bench.spans() == [(1, error)]
    assert bench.pipeline.pending == 0
    bench.assert_balanced(in_flight=0)


def test_a_close_brings_the_peers_flag_and_the_time():
    """A client that left before any response: the flag of the close says who it was."""
    bench = Bench().send(opened(1)).send(closed(1, End.CLOSED, Flag.PEER_CLOSED))
    assert bench.spans() == [(1, "client_disconnect")]
    assert bench.sink.spans[0].end_time_ns == 5000 * MILLISECOND
    bench.assert_balanced(in_flight=0)


def test_a_close_of_something_else_is_nothing():
    """A close without an exchange, or of one that ended, changes nothing."""
    bench = Bench().send(opened(1)).send(closed(0, connection=9), closed(2))
    assert bench.spans() == []
    bench.assert_balanced(in_flight=1)


def test_the_next_request_ends_what_its_connection_had():
    """The last record of an announced exchange was lost: the next one on the connection shows that it is over."""
    bench = Bench().send(record(1, End.QUIET, response=UNTIL_CLOSE, connection_id=5))
    bench.send(record(2, connection_id=5))
    assert [number for number, _ in bench.spans()] == [1, 2]
    assert bench.pipeline.pending == 0
    bench.assert_balanced(in_flight=0)


def test_two_connections_do_not_end_each_other():
    """Only the same connection's next request says that."""
    bench = Bench().send(opened(1, connection_id=5)).send(record(2, connection_id=6))
    assert bench.spans() == [(2, "")]
    bench.assert_balanced(in_flight=1)


def test_what_is_never_heard_of_again_expires():
    """Its last record was lost: after the limit it is a span that timed out."""
    bench = Bench(pending_timeout_ns=1_000_000_000).send(opened(1), opened(2, start=1500))
    bench.sweep(900)
    assert bench.spans() == []
    bench.sweep(200)
    assert bench.spans() == [(1, "timeout")]
    bench.sweep(1000)
    assert bench.spans() == [(1, "timeout"), (2, "timeout")]
    bench.assert_balanced(in_flight=0)


def test_a_report_renews_the_limit():
    """A response that still flows is not given up."""
    bench = Bench(pending_timeout_ns=1_000_000_000).send(opened(1))
    bench.sweep(900)
    bench.send(record(1, End.QUIET, response=UNTIL_CLOSE, end_ms=1900, first=False))
    bench.sweep(900)
    assert bench.spans() == []
    bench.sweep(300)
    assert [number for number, _ in bench.spans()] == [1]


def test_pending_exchanges_are_bounded():
    """At the bound the oldest is finished as it is known; what comes of it later is superseded."""
    bench = Bench(max_pending=10)
    for number in range(1, 16):
        bench.send(record(number, End.QUIET, response=UNTIL_CLOSE))
    assert bench.pipeline.pending == 10
    assert [number for number, _ in bench.spans()] == [1, 2, 3, 4, 5]
    bench.send(closed(1), record(2, End.CLOSED, first=False))
    assert bench.pipeline.superseded == 1
    bench.assert_balanced(in_flight=10)


def test_an_announced_exchange_that_turns_out_malformed_is_dropped_and_forgotten():
    """The request waited, the answer was none of HTTP: counted, no span, nothing kept, its calls are let go."""
    bench = Bench().send(opened(1))
    bench.send(record(3, role=CLIENT, parent_id=1, start=1001, end_ms=1002))
    bench.send(record(1, response=NOT_STATUS, first=False))
    assert bench.pipeline.dropped == {"bad_status_line": 1}
    for _ in range(3):
        bench.sweep()
    assert [number for number, _ in bench.spans()] == [3]
    assert not bench.stitcher._announced
    assert not bench.stitcher._recent
    bench.assert_balanced(in_flight=0)


def test_a_malformed_announced_exchange_releases_what_waits_for_it():
    """It waited for its own peer; when it is dropped, what depends on it is decided without it."""
    bench = Bench().send(opened(2, peer_id=77))
    bench.send(record(3, role=CLIENT, parent_id=2, start=1001, end_ms=1002))
    bench.send(record(2, response=NOT_STATUS, first=False))
    for _ in range(3):
        bench.sweep()
    assert [number for number, _ in bench.spans()] == [3]
    assert (bench.stitcher.held, len(bench.stitcher._undecided)) == (0, 0)
    bench.assert_balanced(in_flight=0)


# -- races between the kernel's sweep and the connection's own records


def test_a_swept_exchange_that_is_reported_as_new_once_more_is_one_span():
    """The next request came while the sweep made its report: both records claim to be the first."""
    bench = Bench().send(record(1, End.QUIET))
    bench.source.count["emitted"] += 1
    bench.source.send(record(1, End.NEXT))
    bench.pipeline.run_once(0)
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.superseded == 1
    bench.assert_balanced(in_flight=0)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_swept_ids_are_remembered_for_a_sweep(sweeps):
    """The race lasts no longer than from one sweep to the next, and neither does the memory."""
    bench = Bench().send(record(1, End.QUIET))
    for _ in range(sweeps):
        bench.sweep()
    bench.source.count["emitted"] += 1
    bench.source.send(record(1, End.NEXT))
    bench.pipeline.run_once(0)
    assert bench.spans() == [(1, "")]
    bench.sweep().sweep()
    assert not bench.pipeline._swept
    assert not bench.pipeline._swept_before
    bench.assert_balanced(in_flight=0)


@pytest.mark.parametrize("last", [End.NEXT, End.CLOSED])
@pytest.mark.parametrize("response", [b"", UNTIL_CLOSE])
def test_an_announced_exchange_that_is_reported_as_new_once_more_is_one_span(last, response):
    """The same race when the sweep's report did not end the exchange."""
    bench = Bench().send(record(1, End.QUIET if response else End.OPEN, response=response))
    bench.source.count["emitted"] += 1
    bench.source.send(record(1, last, response=OK))
    bench.pipeline.run_once(0)
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.pending == 0
    bench.assert_balanced(in_flight=0)


@pytest.mark.parametrize("provisional", [End.OPEN, End.QUIET])
def test_a_report_that_comes_after_the_end_is_superseded(provisional):
    """The same race the other way round: the sweep had made up its mind, and the end was quicker."""
    bench = Bench().send(record(1, End.CLOSED))
    bench.source.count["emitted"] += 1
    bench.source.send(record(1, provisional, response=b"" if provisional is End.OPEN else UNTIL_CLOSE))
    bench.pipeline.run_once(0)
    assert bench.spans() == [(1, "")]
    assert (bench.pipeline.pending, bench.pipeline.superseded) == (0, 1)
    bench.assert_balanced(in_flight=0)


# -- processes


def test_the_kernel_is_told_once_what_is_selected():
    """A process is decided at its announcement, or at its first exchange when that was lost."""
    bench = Bench(include=["nginx"])
    bench.send(ProcessSeen(*FRONT, 0, 1, "nginx", "nginx", b""), ProcessSeen(*BACK, 0, 1, "curl", "curl", b""))
    bench.send(record(1), record(2, process=BACK), record(3, process=BACK), record(4, process=(7, 7)))
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.dropped == {"not_selected": 3}
    assert bench.source.decisions == [(*FRONT, PROCESS_TRACED), (*BACK, PROCESS_IGNORED), (7, 7, PROCESS_IGNORED)]
    assert [info.key for info in bench.seen] == [FRONT, BACK, (7, 7)]
    bench.assert_balanced(in_flight=0)


def test_the_agent_itself_is_never_traced():
    """Its own exports are no traffic."""
    bench = Bench().send(record(1, process=(OWN_TGID, 5)))
    assert bench.spans() == []
    assert bench.source.decisions == [(OWN_TGID, 5, PROCESS_IGNORED)]
    bench.assert_balanced(in_flight=0)


def test_later_records_of_what_is_not_selected_are_not_counted_again():
    """One exchange, one drop."""
    bench = Bench(include=["nothing"]).send(opened(1)).send(record(1, End.CLOSED, first=False), closed(1))
    assert bench.pipeline.dropped == {"not_selected": 1}
    bench.assert_balanced(in_flight=0)


def test_decisions_are_bounded():
    """Beyond the bound decisions are made anew, not kept."""
    bench = Bench(max_processes=8)
    for number in range(1, 101):
        bench.send(record(number, process=(number, 1)))
    assert len(bench.pipeline._decided) <= 8
    assert len(bench.sink.spans) == 100


def test_an_interleaving_language_has_no_thread_parents():
    """The language of the process decides whether the kernel's parent is believed."""
    bench = Bench()
    bench.send(ProcessSeen(*FRONT, 0, 1, "node", "node", b""), ProcessSeen(*BACK, 0, 1, "python3", "python3", b""))
    assert bench.pipeline.threads_interleave(FRONT)
    assert not bench.pipeline.threads_interleave(BACK)
    assert not bench.pipeline.threads_interleave((1, 1))


# -- pipelined connections


def segment(direction: int, data: bytes, offset: int = 0, connection: int = 50, **fields: object) -> Segment:
    values: dict[str, object] = dict.fromkeys(Segment.__struct_fields__, 0)
    values |= {"kind": 3, "role": SERVER, "tgid": FRONT[0], "process_start_ns": FRONT[1], "time_ns": 2000 * MILLISECOND}
    values |= {"direction": direction, "connection_id": connection, "offset": offset, "data": data}
    values |= {"captured": len(data), "length": len(data), "local_address": bytes(16), "remote_address": bytes(16)}
    return Segment(**values | fields)


def streamed(bench: Bench, *records: Segment | ConnectionClosed) -> Bench:
    """The kernel hands the first exchange of a connection over to stream mode."""
    bench.source.count["begun"] += 1
    bench.source.count["streamed"] += 1
    return bench.send(*records)


def test_pipelined_requests_are_a_span_each():
    """Three requests in one segment, their answers in another."""
    bench = streamed(Bench(), segment(1, GET * 3), segment(2, OK * 3))
    assert [error for _, error in bench.spans()] == ["", "", ""]
    assert bench.pipeline.streams == 1
    bench.assert_balanced(in_flight=0)
    bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 50, 0, 3000 * MILLISECOND))
    assert bench.pipeline.streams == 0
    bench.assert_balanced(in_flight=0)


def test_a_response_that_is_told_of_before_its_request_is_still_its_response():
    """A client's write returns when another thread has read the response already: the kernel marks it."""
    marked = int(SegmentFlag.OVERTAKES)
    bench = streamed(
        Bench(),
        segment(1, GET, role=CLIENT),
        segment(2, OK, role=CLIENT),
        segment(2, NOT_FOUND, len(OK), role=CLIENT, flags=marked),
        segment(1, GET, len(GET), role=CLIENT),
        segment(1, GET, 2 * len(GET), role=CLIENT),
        segment(2, OK, len(OK + NOT_FOUND), role=CLIENT),
    )
    assert [error for _, error in bench.spans()] == ["", "404", ""]
    assert bench.pipeline.stream_losses.unmatched_responses == 0
    bench.assert_balanced(in_flight=0)


@pytest.mark.parametrize("end", ["close", "time"])
def test_a_response_whose_request_was_never_told_of_is_not_kept(end):
    """It is read after all, as one that nothing asked for, and holds up nothing."""
    bench = streamed(Bench(), segment(1, GET, role=CLIENT), segment(2, OK, role=CLIENT))
    bench.send(segment(2, OK, len(OK), role=CLIENT, flags=int(SegmentFlag.OVERTAKES)))
    assert bench.pipeline.stream_losses.unmatched_responses == 0
    if end == "close":
        bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 50, 0, 3000 * MILLISECOND))
    else:
        bench.sweep(3000)
    assert bench.pipeline.stream_losses.unmatched_responses == 1
    assert [error for _, error in bench.spans()] == [""]
    bench.assert_balanced(in_flight=0)


def test_a_close_ends_the_outstanding_pipelined_requests():
    """What had no answer ends with the close's reason."""
    bench = streamed(Bench(), segment(1, GET * 2), segment(2, OK))
    bench.send(ConnectionClosed(4, 1, int(End.RESET), 0, 50, 0, 3000 * MILLISECOND))
    assert [error for _, error in bench.spans()] == ["", "client_disconnect"]
    bench.assert_balanced(in_flight=0)


def test_pipelined_requests_that_are_never_answered_expire():
    """They are timed out when their connection was silent for the limit, once; late responses are no spans."""
    bench = streamed(Bench(exchange_timeout_ns=1000 * MILLISECOND), segment(1, GET * 3, time_ns=1000 * MILLISECOND))
    bench.send(segment(2, OK, time_ns=1500 * MILLISECOND))
    bench.sweep(1499)
    assert [error for _, error in bench.spans()] == [""]
    bench.assert_balanced(in_flight=2)
    bench.sweep(1)
    assert [error for _, error in bench.spans()] == ["", "timeout", "timeout"]
    assert bench.pipeline.streams_outstanding == 0
    bench.assert_balanced(in_flight=0)
    bench.send(segment(2, OK, offset=len(OK), time_ns=2600 * MILLISECOND))
    bench.send(segment(1, GET, offset=3 * len(GET), time_ns=2700 * MILLISECOND))
    bench.assert_balanced(in_flight=1)
    bench.send(segment(2, OK * 2, offset=2 * len(OK), time_ns=2800 * MILLISECOND))
    assert [error for _, error in bench.spans()] == ["", "timeout", "timeout", ""]
    bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 50, 0, 3000 * MILLISECOND)).sweep(10_000)
    assert len(bench.spans()) == 4
    bench.assert_balanced(in_flight=0)


def test_the_most_silent_pipelined_connections_expire_first():
    """One that goes on is left alone, however early it began."""
    bench = Bench(exchange_timeout_ns=1000 * MILLISECOND)
    for number in (1, 2):
        streamed(bench, segment(1, GET * 2, connection=number, time_ns=(1000 + number) * MILLISECOND))
    bench.send(segment(2, OK, connection=1, time_ns=1900 * MILLISECOND))
    bench.sweep(1100)
    assert [error for _, error in bench.spans()] == ["", "timeout", "timeout"]
    bench.assert_balanced(in_flight=1)


def test_lost_segments_are_counted_as_exchanges_lost():
    """A gap where framing matters loses what was outstanding, by count."""
    bench = streamed(Bench(), segment(1, GET * 2), segment(2, OK[:10], length=60))
    bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 50, 0, 3000 * MILLISECOND))
    assert bench.spans() == []
    assert bench.pipeline.dropped["stream_lost"] == 2
    bench.assert_balanced(in_flight=0)


def test_pipelined_connections_are_bounded():
    """At the bound the oldest is closed; what it owed is counted."""
    bench = Bench(max_pending=4)
    for number in range(1, 11):
        streamed(bench, segment(1, GET, connection=number))
    assert bench.pipeline.streams == 4
    assert bench.pipeline.dropped["stream_lost"] == 6
    bench.assert_balanced(in_flight=4)


def test_pipelined_exchanges_of_a_process_that_is_not_selected_are_dropped():
    """Selection holds in stream mode, too."""
    bench = streamed(Bench(include=["nothing"]), segment(1, GET * 2), segment(2, OK * 2))
    assert bench.spans() == []
    assert bench.pipeline.dropped["not_selected"] == 2
    bench.assert_balanced(in_flight=0)


def test_an_announced_exchange_that_becomes_pipelined_is_one_span():
    """The first request waited long enough to be announced, then a second one followed: it is not told twice."""
    bench = Bench().send(opened(1, connection_id=50))
    bench.source.count["streamed"] += 1
    bench.send(segment(1, GET), segment(1, GET, offset=len(GET)), segment(2, OK * 2))
    bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 50, 1, 3000 * MILLISECOND))
    bench.sweep(10_000_000)
    assert [error for _, error in bench.spans()] == ["", ""]
    assert bench.pipeline.pending == 0
    assert not bench.stitcher._announced
    bench.assert_balanced(in_flight=0)


def test_a_stream_without_a_readable_request_is_lost_once():
    """The kernel counted the exchange that began it; until a request is read it is in flight, at last it is lost."""
    bench = Bench()
    bench.source.count["begun"] += 1
    bench.assert_balanced(in_flight=1)
    bench.source.count["streamed"] += 1
    bench.send(segment(1, GET[:9]))
    bench.assert_balanced(in_flight=1)
    bench.send(segment(1, GET[9:] + GET, offset=9))
    bench.assert_balanced(in_flight=2)
    bench.send(segment(2, OK * 2))
    bench.assert_balanced(in_flight=0)
    streamed(bench, segment(1, b"\0nothing", connection=51))
    bench.assert_balanced(in_flight=1)
    bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, 51, 0, 3000 * MILLISECOND))
    assert bench.pipeline.dropped["stream_lost"] == 1
    bench.assert_balanced(in_flight=0)


def stream_end(connection: int = 50) -> ConnectionClosed:
    """As the kernel tells of the end of a connection in stream mode."""
    return ConnectionClosed(4, 1, int(End.CLOSED), int(Flag.STREAM), connection, 0, 3000 * MILLISECOND)


def test_a_stream_of_which_only_the_close_came_is_lost():
    """The ring buffer was full for all of its segments: nothing of it is in flight for ever."""
    bench = streamed(Bench())
    bench.assert_balanced(in_flight=1)
    bench.send(stream_end())
    assert (bench.spans(), bench.pipeline.dropped["stream_lost"], bench.pipeline.streams) == ([], 1, 0)
    bench.assert_balanced(in_flight=0)
    streamed(bench, segment(1, GET, connection=51), segment(2, OK, connection=51), stream_end(51))
    assert len(bench.spans()) == 1
    assert bench.pipeline.dropped["stream_lost"] == 1
    bench.assert_balanced(in_flight=0)


def test_an_announced_exchange_of_whose_stream_only_the_close_came():
    """It was in flight here as reported before, and is lost once."""
    bench = Bench().send(opened(1, connection_id=50))
    bench.source.count["streamed"] += 1
    bench.send(stream_end()).sweep(10_000_000)
    assert (bench.spans(), bench.pipeline.dropped["stream_lost"], bench.pipeline.pending) == ([], 1, 0)
    bench.assert_balanced(in_flight=0)


def test_a_stream_that_is_never_read_expires():
    """Its close was lost, and what came of it was no request: it is in flight for the limit, and then lost."""
    bench = streamed(Bench(exchange_timeout_ns=1000 * MILLISECOND), segment(1, GET[:9], time_ns=1000 * MILLISECOND))
    bench.sweep(999)
    bench.assert_balanced(in_flight=1)
    bench.sweep(1)
    assert bench.pipeline.dropped["stream_lost"] == 1
    bench.assert_balanced(in_flight=0)
    bench.send(segment(1, GET, offset=9, time_ns=5000 * MILLISECOND), stream_end()).sweep(10_000)
    bench.assert_balanced(in_flight=0)


def test_a_stream_of_which_nothing_can_be_told_is_lost():
    """Not even its close found room: the kernel counts it."""
    bench = streamed(Bench())
    bench.source.count["streams_untold"] += 1
    assert bench.pipeline.books().dropped["stream_lost"] == 1
    bench.assert_balanced(in_flight=0)


def test_the_close_of_a_stream_that_was_given_up_before_is_no_other_one():
    """At the bound the oldest was closed early; its own end comes later."""
    bench = Bench(max_pending=1)
    streamed(bench, segment(1, GET, connection=1))
    streamed(bench, segment(1, GET, connection=2))
    assert bench.pipeline.dropped["stream_lost"] == 1
    bench.send(stream_end(1))
    assert bench.pipeline.dropped["stream_lost"] == 1
    bench.assert_balanced(in_flight=1)


def test_what_pipelined_connections_cannot_follow_is_counted_together():
    """By reason, over all connections, those included that are gone."""
    bench = Bench()
    for connection in (50, 51):
        streamed(
            bench, segment(1, GET * 2, connection=connection), segment(2, OK[:10], length=60, connection=connection)
        )
        bench.send(segment(2, OK[:5], offset=5, connection=connection))
        bench.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, connection, 0, 3000 * MILLISECOND))
    losses = bench.pipeline.stream_losses
    assert losses.reasons == {"gap": 2}
    assert losses.overlapping_bytes == 10


# -- pods


class Cluster:
    """The pods of the node: every process runs in one, which is known and selected as the test says."""

    def __init__(self) -> None:
        self.known, self.selected = False, True

    def container_of(self, cgroup: bytes) -> object | None:
        return "container" if b"pod" in cgroup else None

    def place(self, container: object, declared: object) -> Placement:
        return Placement(container, self.known, self.selected, ())

    def is_current(self, placement: Placement) -> bool:
        return (placement.known, placement.selected) == (self.known, self.selected)


def in_pod(**options: object) -> tuple[Bench, Cluster]:
    """A process in a pod that is not known yet has announced itself."""
    cluster = Cluster()
    table = ProcessTable(proc_root=Path("/nonexistent"), host_name="h", version="1", pods=cluster)
    bench = Bench(processes=table, hold=Hold(hold_ns=2000 * MILLISECOND), **options)
    return bench.send(ProcessSeen(*FRONT, 0, 1, "app", "app", b"0::/pod\n")), cluster


def test_spans_are_in_flight_while_their_pod_is_not_known():
    """They reach the sinks when it is, without another record."""
    bench, cluster = in_pod()
    bench.send(record(1))
    assert bench.spans() == []
    bench.assert_balanced(in_flight=1)
    cluster.known = True
    bench.pipeline.reconsider(bench.processes.refresh())
    bench.send()
    assert bench.spans() == [(1, "")]
    bench.assert_balanced(in_flight=0)


def test_spans_leave_without_their_pod_when_the_time_is_up():
    """Also when nothing else happens."""
    bench, _ = in_pod()
    bench.send(record(1))
    bench.now_ms += 1999
    assert bench.send().spans() == []
    bench.now_ms += 1
    assert bench.send().spans() == [(1, "")]
    bench.assert_balanced(in_flight=0)


def test_spans_of_a_pod_that_is_not_selected_after_all_are_dropped():
    """Held ones, those that wait for their place, and those whose exchange is still going on."""
    bench, cluster = in_pod()
    bench.send(record(1), record(2, role=CLIENT, parent_id=9, start=1001, end_ms=1009), opened(3))
    bench.assert_balanced(in_flight=3)
    cluster.known, cluster.selected = True, False
    bench.pipeline.reconsider(bench.processes.refresh())
    bench.send(record(3, End.CLOSED, first=False))
    for _ in range(3):
        bench.sweep()
    assert bench.spans() == []
    assert bench.pipeline.books().dropped == {"not_selected": 3}
    bench.assert_balanced(in_flight=0)


def test_an_exchange_that_was_begun_while_selected_ends_as_one():
    """Its end is taken although the process has been taken out of the selection meanwhile; the next one is not."""
    bench = Bench().send(opened(1))
    bench.pipeline.reconfigure([Http1(extractor=bench.extractor)], Selector((), (), OWN_TGID))
    bench.send(record(1, End.NEXT, first=False), record(2))
    assert bench.spans() == [(1, "")]
    assert bench.pipeline.dropped == {"not_selected": 1}
    bench.assert_balanced(in_flight=0)


# -- malformed trace headers

BAD_TRACE = b"GET /a HTTP/1.1\r\nHost: a\r\ntraceparent: 00-nonsense\r\nb3: what\r\n\r\n"


def test_a_malformed_header_counts_once_per_exchange():
    """However many records tell of the exchange, and however often an equal request comes."""
    bench = Bench()
    bench.send(opened(1, request=BAD_TRACE))
    bench.send(record(1, End.QUIET, request=BAD_TRACE, response=UNTIL_CLOSE, first=False))
    assert bench.extractor.malformed["tracecontext"] == 0
    bench.send(record(1, End.CLOSED, request=BAD_TRACE, response=UNTIL_CLOSE, first=False))
    assert (bench.extractor.malformed["tracecontext"], bench.extractor.malformed["b3"]) == (1, 1)
    bench.send(record(2, End.QUIET, request=BAD_TRACE))
    assert (bench.extractor.malformed["tracecontext"], bench.extractor.malformed["b3"]) == (2, 2)
    for number in range(3, 6):
        bench.send(record(number, request=BAD_TRACE))
    assert (bench.extractor.malformed["tracecontext"], bench.extractor.malformed["b3"]) == (5, 5)


def test_without_a_protocol_everything_is_dropped():
    """All protocols may be switched off; the exchanges are counted."""
    bench = Bench()
    bench.pipeline.reconfigure([], Selector(("*",), (), OWN_TGID))
    bench.send(record(1)).sweep()
    assert bench.pipeline.books().dropped == {"protocol_off": 1}
    bench.assert_balanced(in_flight=0)


def test_a_connection_that_is_pipelined_after_an_exchange_that_was_given_up_is_counted():
    """What ended early has its end told in vain; what follows on the connection is in the books like any other."""
    bench = Bench(max_pending=1).send(opened(1, connection_id=50), opened(2))
    assert bench.pipeline.pending == 1
    bench.send(record(1, connection_id=50, first=False))
    streamed(bench, segment(1, GET * 2), segment(2, OK * 2))
    bench.assert_balanced(in_flight=1)


# -- books


def test_what_waits_for_its_place_is_in_flight():
    """Held spans are neither lost nor done."""
    bench = Bench().send(record(2, role=CLIENT, parent_id=1, start=1001, end_ms=1009))
    bench.assert_balanced(in_flight=1)
    bench.sink.waiting = 0
    bench.send(record(1)).sweep(500)
    bench.assert_balanced(in_flight=0)


def test_what_is_in_the_ring_buffer_is_in_flight():
    """The kernel has emitted it, nobody has read it."""
    bench = Bench()
    bench.source.count.update(begun=3, emitted=2, dropped_ring_full=1)
    bench.assert_balanced(in_flight=2)
    assert bench.pipeline.books().dropped == {"ring_full": 1}


def test_the_end_hands_over_what_is_complete():
    """Shutdown places what waits and flushes the sinks; what has not ended stays in flight."""
    bench = Bench().send(record(2, role=CLIENT, parent_id=1, start=1001, end_ms=1009), opened(5))
    bench.pipeline.finish(0)
    assert [number for number, _ in bench.spans()] == [2]
    assert bench.sink.flushed
    bench.assert_balanced(in_flight=1)


def test_what_is_under_way_when_the_probes_go_is_dropped():
    """Announced, pipelined or never told of: counted, once each, and what had ended is handed over."""
    bench = Bench().send(record(1), opened(2, connection_id=12), segment(1, GET * 2, connection=13))
    bench.source.count.update(begun=4, streamed=1)  # three of them nobody heard of
    bench.pipeline.abandon()
    bench.assert_balanced(in_flight=0)
    assert bench.pipeline.books().dropped == {"switched_off": 4, "stream_lost": 2}
    bench.sweep(1000)
    assert [number for number, _ in bench.spans()] == [1]
    assert bench.pipeline.pending == bench.pipeline.streams == 0
    bench.send(record(7)).sweep(1000)
    bench.assert_balanced(in_flight=0)


REPORTS = ("wait", "quiet", "whole", "end", "garbled end", "close")


class Machine:
    """A kernel that makes up connections and keeps its counters as bpf/exchange.bpf.h does."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.number = 0
        self.open: dict[int, tuple[Exchange, str]] = {}  # connection -> exchange, its last report
        self.streams: dict[int, list[int]] = {}  # pipelined connection -> bytes of either direction, by direction
        self.unclosed: set[int] = set()  # connections whose close was lost: real ones have a new id afterwards

    def emit(self, one: Exchange, fate: str) -> None:
        """Send a first or later record, or lose it."""
        count = self.bench.source.count
        first = bool(one.flags & FIRST)
        if fate == "lost":
            count["dropped_ring_full" if first else "reemit_lost"] += 1
        else:
            count["emitted" if first else "reemitted"] += 1
            self.bench.source.send(one)

    def step(self, action: str, connection: int, fate: str) -> None:
        count = self.bench.source.count
        known = self.open.get(connection)
        if action == "begin" and known is None and connection not in self.streams:
            self.number += 1
            request = MALFORMED if fate == "malformed" else GET
            process = BACK if connection == 3 else FRONT
            one = record(self.number, request=request, connection_id=connection, process=process, response=b"")
            self.open[connection] = (one, "")
            count["begun"] += 1
        elif action in ("cancel", "give up") and known is not None and not known[1]:
            del self.open[connection]
            count["cancelled" if action == "cancel" else "dropped_not_http"] += 1
        elif (
            action == "stream" and known is not None and known[1] in ("", "wait")
        ):  # a second request before any response
            del self.open[connection]
            count["streamed"] += 1
            stream = 100 + self.number
            data = GET * 2
            owner = {"tgid": known[0].tgid, "process_start_ns": known[0].process_start_ns}
            sent = [segment(1, data, connection=stream, **owner), segment(2, OK, connection=stream, **owner)]
            if fate == "lost":
                sent.pop(0)
            if known[1]:
                sent = [
                    segment(1, data, connection=connection, **owner),
                    segment(2, OK, connection=connection, **owner),
                ]
                stream = connection
            self.bench.source.send(*sent)
            self.bench.source.send(ConnectionClosed(4, 1, int(End.CLOSED), 0, stream, 0, 9 * MILLISECOND))
        elif action == "pipeline":
            if known is not None or connection in self.unclosed:
                return
            if connection not in self.streams:
                count["begun"] += 1
                count["streamed"] += 1
            self.segment(connection, 1, GET * 2, fate)
        elif action == "answer" and connection in self.streams:
            self.segment(connection, 2, NOT_STATUS if fate == "malformed" else OK, fate)
        elif action == "hang up" and connection in self.streams:
            del self.streams[connection]
            end = ConnectionClosed(4, 1, int(End.CLOSED), 0, connection, 0, self.bench.now_ms * MILLISECOND)
            self.bench.source.send(end)
        elif known is not None and action in REPORTS:
            self.report(action, connection, fate, *known)

    def segment(self, connection: int, direction: int, data: bytes, fate: str) -> None:
        """Send a segment of a connection that stays pipelined, or lose it, unless it is the first to tell of it."""
        offsets = self.streams.setdefault(connection, [0, 0, 0])
        if fate != "lost" or not any(offsets):
            offset, time_ns = offsets[direction], self.bench.now_ms * MILLISECOND
            self.bench.source.send(segment(direction, data, offset, connection=connection, time_ns=time_ns))
        offsets[direction] += len(data)

    def report(self, action: str, connection: int, fate: str, one: Exchange, reported: str) -> None:
        if action == "wait" and reported:
            return  # an announcement is made once
        response = {"quiet": UNTIL_CLOSE, "whole": OK, "end": OK, "garbled end": NOT_STATUS}.get(action, b"")
        end = {"wait": End.OPEN, "quiet": End.QUIET, "whole": End.QUIET}.get(action, End.CLOSED)
        if action == "close" and reported:
            del self.open[connection]
            if fate != "lost":
                self.bench.source.send(closed(one.exchange_id, connection=connection))
            else:
                self.bench.source.count["closes_lost"] += 1
                self.unclosed.add(connection)
            return
        sent = record(
            one.exchange_id,
            end,
            request=one.request,
            response=response,
            connection_id=connection,
            process=(one.tgid, one.process_start_ns),
            first=not reported,
        )
        if end is End.CLOSED:
            del self.open[connection]
        elif fate == "lost":
            return  # the sweep tries again
        else:
            self.open[connection] = (one, action)
        self.emit(sent, fate)


ACTIONS = st.tuples(
    st.sampled_from(
        [*["begin"] * 5, *REPORTS, "end", "cancel", "give up", "stream", *["pipeline", "answer"] * 2, "hang up"]
    ),
    st.integers(1, 4),
    st.sampled_from(["fine"] * 6 + ["lost", "malformed"]),
    st.sampled_from(["", "drain", "sweep"]),
)


@settings(max_examples=200, deadline=None)
@example(
    [
        ("begin", 1, "fine", ""),
        ("wait", 1, "fine", "drain"),
        *[("begin", 2, "fine", "sweep")] * 6,
        ("stream", 1, "fine", ""),
    ],
    1.0,
    1000,
)  # streamed after it was given up
@example(
    [("begin", 3, "fine", ""), ("wait", 3, "fine", ""), ("stream", 3, "fine", "")], 1.0, 1000
)  # streamed after it was left out as not selected
@given(st.lists(ACTIONS, max_size=60), st.sampled_from([1.0, 0.5, 0.0]), st.sampled_from([2, 1000]))
def test_the_books_add_up_at_any_time(actions, ratio, max_pending):
    """Whatever the kernel sends or loses, what began is handed over, sampled out, dropped or in flight, exactly."""
    bench = Bench(
        ratio=ratio, max_pending=max_pending, include=["nginx"], pending_timeout_ns=10**9, exchange_timeout_ns=10**9
    )
    bench.send(ProcessSeen(*FRONT, 0, 1, "nginx", "nginx", b""))
    machine = Machine(bench)
    for action, connection, fate, then in actions:
        machine.step(action, connection, fate)
        if then == "drain":
            bench.send()
        elif then == "sweep":
            bench.sweep()
        bench.assert_balanced()
    bench.send()
    for connection in list(machine.open):
        machine.step("close", connection, "fine")
    for connection in list(machine.streams):
        machine.step("hang up", connection, "fine")
    bench.send()
    bench.sweep(10_000).sweep(10_000)
    bench.assert_balanced(in_flight=0)
    ids = [number for number, _ in bench.spans()]
    assert len(set(ids)) == len(ids), "a span was made twice"
    assert bench.pipeline.pending == bench.pipeline.streams == bench.stitcher.held == 0
    assert not bench.stitcher._announced
