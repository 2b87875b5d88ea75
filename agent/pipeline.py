"""The flow from kernel records to exported spans; the only module that knows every stage.

In: drained batches of a record source. Out: spans at the sinks. Nothing is lost silently: ``books()`` adds up, at any
time, what began, what left, what was dropped and why, and what is on its way.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from agent.errors import ProtocolError
from agent.hold import Hold
from agent.kernel.records import Decoder
from agent.model import (
    Call,
    ConnectionClosed,
    ConnectionUpgraded,
    End,
    Exchange,
    Flag,
    PeerFound,
    ProcessSeen,
    Segment,
    SegmentFlag,
    Span,
    TlsNotice,
    TlsSeen,
)
from agent.process import ProcessInfo, ProcessTable, Selector
from agent.protocols.http1_stream import PipelinedConnection, StreamLosses
from agent.protocols.http2 import Http2
from agent.protocols.http2_stream import Http2Connection
from agent.protocols.segment_order import SegmentOrder
from agent.stitch import Stitcher

_FIRST = int(Flag.FIRST)
_STREAM = int(Flag.STREAM)
_QUIET = int(End.QUIET)  # OPEN and QUIET, the provisional ends, are the two lowest
_HTTP2 = int(SegmentFlag.HTTP2)
_OVERTAKES = int(SegmentFlag.OVERTAKES)
OPEN_NS = 200_000_000
"""So old is a request of HTTP/2 when others may refer to it before it ends: ``open_ns`` of the kernel's programs."""
SEND_NS = 50_000_000
"""So long may a call that sends a request of HTTP/2 take: its bytes are reported when it returns, and the other end may
have reported them before."""
_INTERLEAVING_LANGUAGES = frozenset({"go", "nodejs"})

PROCESS_TRACED, PROCESS_IGNORED = 1, 2


class RecordSource(Protocol):
    """What the pipeline needs of the kernel: ``agent.kernel.capture.Capture``, or a replay of recorded bytes."""

    def drain(self) -> tuple[bytes, list[int]]: ...
    def sweep(self) -> int: ...
    def decide(self, tgid: int, start_ns: int, state: int) -> None: ...
    def counters(self) -> dict[str, int]: ...


class ExchangeProtocol(Protocol):
    """A protocol of ``agent.protocols``: bytes of one exchange -> Call, or ProtocolError when they are not its own."""

    def parse(self, exchange: Exchange) -> Call: ...
    def forget_peers(self) -> None: ...


class Sink(Protocol):
    """Where spans go."""

    def write(self, spans: Sequence[Span], now_ns: int) -> None: ...
    def tick(self, now_ns: int) -> None: ...
    def flush(self) -> None: ...


_Stream = PipelinedConnection | Http2Connection
_Decision = tuple[int, tuple[int, int], bool, list[Callable[[Exchange], Call]]]


class Books(msgspec.Struct, frozen=True, kw_only=True):
    """``begun = handed_over + sampled_out + sum(dropped.values()) + in_flight`` holds exactly.

    A span that tells of an exchange which is still open counts as begun, too, when it is made.
    ``handed_over`` spans have left the pipeline for an exporter or the console; the exporter keeps books of its own.
    ``begun``, ``handed_over``, ``sampled_out`` and ``dropped`` never fall.
    """

    begun: int
    handed_over: int
    sampled_out: int
    dropped: dict[str, int]
    in_flight_kernel: int
    in_flight_agent: int

    @property
    def in_flight(self) -> int:
        """Exchanges that are going on, in the ring buffer, or held for their place in a trace or for their pod."""
        return self.in_flight_kernel + self.in_flight_agent


class _Account(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's side of the books at one moment."""

    received: int = 0
    streamed: int = 0
    openings: int = 0
    handed_over: int = 0
    sampled_out: int = 0
    dropped: dict[str, int] = {}
    streams_seen: int = 0
    streams_outstanding: int = 0
    waiting: int = 0


READING_SECONDS = 1.0
"""How long a reader waits for the pipeline to stand still: a console that nobody reads may stop it for ever."""


def _parsers_of(protocols: Sequence[Any]) -> list[Callable[[Exchange], Call]]:
    """Those that read exchanges; HTTP/2 reads connections."""
    return [protocol.parse for protocol in protocols if not isinstance(protocol, Http2)] or [_no_protocol]


def _no_protocol(exchange: Exchange) -> Call:
    raise ProtocolError("protocol_off")


class Pipeline:
    """Runs the stages over batches. Not thread-safe: one thread feeds it.

    Bounds: ``max_pending`` exchanges that were reported before their end (the oldest is finished as it is known),
    ``max_pending`` pipelined connections, ``max_processes`` decisions on processes. ``exchange_timeout_ns`` is how long
    a pipelined connection with unanswered requests may be silent: the kernel does not watch over these. It does over
    others, and ``pending_timeout_ns`` is for what its last record was lost of. ``ring_bytes`` is the size of the
    ring buffer: one ``run_once`` takes at most about as much, however fast it is filled.
    """

    def __init__(
        self,
        *,
        source: RecordSource,
        decoder: Decoder,
        protocols: Sequence[ExchangeProtocol],
        processes: ProcessTable,
        selector: Selector,
        stitcher: Stitcher,
        sinks: Sequence[Sink],
        hold: Hold | None = None,
        on_process: Callable[[ProcessInfo], None] = lambda info: None,
        protocols_of: Callable[[ProcessInfo], Sequence[ExchangeProtocol] | None] = lambda info: None,
        on_tls: Callable[[ProcessInfo, int], None] = lambda info, notice: None,
        max_pending: int = 32768,
        max_processes: int = 16384,
        exchange_timeout_ns: int = 600_000_000_000,
        pending_timeout_ns: int = 660_000_000_000,
        ring_bytes: int = 8 << 20,
    ) -> None:
        self._ring_bytes = ring_bytes
        self.has_more = False
        """The last ``run_once`` took all that it was allowed to: there is more, or will be soon."""
        self.sweep_ns = 0
        """How long the last sweep took in the kernel, without what it brought."""
        self._source = source
        self._decoder = decoder
        self._protocols = protocols
        self._parsers = _parsers_of(protocols)
        self._processes = processes
        self._selector = selector
        self._stitcher = stitcher
        self._sinks = list(sinks)
        self._hold = hold if hold is not None else Hold()
        # Whoever has it sees the account, the sinks and what they hand on to as they are between two batches.
        self._hand_over_lock = threading.RLock()
        self._on_process = on_process
        self._on_tls = on_tls
        self._max_pending = max_pending
        self._max_processes = max_processes
        self._exchange_timeout_ns = exchange_timeout_ns
        self._pending_timeout_ns = pending_timeout_ns
        # By process id: start time, key, whether it is selected, the parsers. The key is one object for all exchanges.
        self._decided: dict[int, _Decision] = {}
        self._protocols_of = protocols_of
        # Exchanges of the batch at hand that have ended and are not placed yet, in the kernel's order.
        self._ready: list[tuple[Exchange, Call, tuple[int, int]]] = []
        # Exchanges reported before their end, by id, oldest first; and which of them a connection has.
        self._pending: dict[int, Exchange] = {}
        self._pending_of: dict[int, int] = {}
        # Ids finished by a report of the sweep, in two generations: the connection's next request may, in a race,
        # report the same exchange as new. In another race it enters stream mode before the report is there.
        self._swept: set[int] = set()
        self._swept_before: set[int] = set()
        # Connections whose exchange or stream was finished before the kernel was done with it; twice ``max_pending`` at
        # most.
        self._ended_early: set[int] = set()
        self._streams: dict[int, _Stream] = {}
        self._order = SegmentOrder()
        # When something was last heard of those that may owe spans, by connection, the most silent one first.
        self._streams_waiting: OrderedDict[int, int] = OrderedDict()
        self._closes_lost = self._closes_lost_ns = 0
        self._streams_seen = 0
        self._streams_outstanding = 0
        # The clients' ends of servers' HTTP/2 connections, until the first segment of these.
        self._peers_found: dict[int, int] = {}
        self._http2_streams = 0  # connections of HTTP/2 among _streams
        # Streams of which no request has been read yet: each stands for the exchange that the kernel has counted.
        self._streams_unread: set[int] = set()
        self.received = 0
        """Exchanges of which a first record was read."""
        self.streamed = 0
        """Exchanges made from the segments of pipelined connections."""
        self.handed_over = 0
        self.dropped: Counter[str] = Counter()
        self._account = _Account()
        self.stream_losses = StreamLosses()
        """What pipelined connections could not make sense of, all of them together."""
        self.superseded = 0
        """Records of exchanges that had been finished already."""
        self._handlers = {
            ProcessSeen: self._on_process_seen,
            Segment: self._on_segment,
            ConnectionClosed: self._on_close,
            ConnectionUpgraded: self._on_upgraded,
            PeerFound: self._on_peer,
            TlsSeen: self._on_tls_seen,
        }

    def run_once(self, now_ns: int, limit_bytes: int | None = None) -> int:
        """Take what is in the ring buffer now, and not what may follow forever. Returns the number of records.

        With a limit it may leave something, and says so in ``has_more``.
        """
        limit_bytes = limit_bytes or self._ring_bytes
        total = taken_bytes = 0
        while taken_bytes < limit_bytes:
            batch, offsets = self._source.drain()
            if not offsets:
                break
            total += len(offsets)
            taken_bytes += len(batch)
            self.feed(batch, offsets, now_ns)
        self.has_more = taken_bytes >= limit_bytes
        if self._hold.waiting:
            self._hand_over(now_ns)
        with self._hand_over_lock:
            for sink in self._sinks:
                sink.tick(now_ns)
        return total

    def feed(self, batch: bytes, offsets: Iterable[int], now_ns: int) -> None:
        """Run one batch through all stages."""
        on_exchange, handlers = self._on_exchange, self._handlers
        for record in self._decoder.decode(batch, offsets):
            if type(record) is Exchange:
                on_exchange(record)
            else:
                handlers[type(record)](record)
        self._place_ready()
        self._hand_over(now_ns)

    def sweep(self, now_ns: int) -> None:
        """Let the kernel report what is quiet, take all of it, and decide what the new watermark allows."""
        began_ns = time.monotonic_ns()
        watermark_ns = self._source.sweep()
        self.sweep_ns = time.monotonic_ns() - began_ns
        self.run_once(now_ns)
        self._stitcher.advance(self._announce_streams(watermark_ns, now_ns), now_ns)
        self._swept_before, self._swept = self._swept, set()
        self._expire(now_ns)
        self._hand_over(now_ns)

    def finish(self, now_ns: int) -> None:
        """Place and hand over everything that waits. What has not ended yet stays in flight."""
        self._stitcher.flush()
        self._hand_over(now_ns)
        with self._hand_over_lock:
            self._write(self._hold.flush(), now_ns)
            for sink in self._sinks:
                sink.flush()

    def abandon(self) -> None:
        """Give up what is under way, since the probes were detached: nothing more will be seen of it.

        Call it when the ring buffer has been emptied, and before the kernel forgets its connections.
        """
        for exchange_id in list(self._pending):
            self._forget_pending(exchange_id)
            self._stitcher.withdraw(exchange_id)
            self.dropped["switched_off"] += 1
        for connection_id in list(self._streams):
            self._close_stream(connection_id, self._streams.pop(connection_id), None)
        self._ended_early.clear()
        with self._hand_over_lock:
            self._close_account()
            never_told = self.books().in_flight_kernel
            self.received += never_told
            self.dropped["switched_off"] += never_told
            self._close_account()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Keep spans from moving on while several accounts are read that have to fit together. For other threads."""
        has_it = self._hand_over_lock.acquire(timeout=READING_SECONDS)
        try:
            yield
        finally:
            if has_it:
                self._hand_over_lock.release()

    def books(self) -> Books:
        """The account of everything since the start; see Books."""
        # Another thread may ask in the middle of a batch: the agent's own numbers are those of the last whole batch,
        # and what was read since then still counts as in the kernel, which is asked last, or it would be behind.
        with self.standing_still():
            account = self._account
            kernel = self._source.counters()
        dropped = Counter(account.dropped)
        for name in ("ring_full", "state_full", "not_http"):
            dropped[name] += kernel[f"dropped_{name}"]
        dropped["write_refused"] += kernel["cancelled"]
        dropped["stream_lost"] += kernel["streams_untold"]
        left = kernel["emitted"] + kernel["cancelled"] + kernel["streamed"]
        left += sum(kernel[f"dropped_{name}"] for name in ("ring_full", "state_full", "not_http"))
        streams_unseen = kernel["streamed"] - kernel["streams_untold"] - account.streams_seen
        return Books(
            # What entered stream mode counts as one exchange until its segments tell how many it is.
            begun=kernel["begun"]
            - account.streams_seen
            + account.streamed
            + account.streams_outstanding
            + account.openings,
            handed_over=account.handed_over,
            sampled_out=account.sampled_out,
            dropped=+dropped,
            in_flight_kernel=kernel["begun"] - left + kernel["emitted"] - account.received + streams_unseen,
            in_flight_agent=account.waiting,
        )

    def _close_account(self) -> None:
        """Note the agent's side of the books, between two batches, where it adds up."""
        dropped = dict(self.dropped)
        if self._hold.unwanted:
            dropped["not_selected"] = dropped.get("not_selected", 0) + self._hold.unwanted
        self._account = _Account(
            received=self.received,
            streamed=self.streamed,
            openings=self._stitcher.openings,
            handed_over=self.handed_over,
            sampled_out=self._stitcher.sampled_out,
            dropped=dropped,
            streams_seen=self._streams_seen,
            streams_outstanding=self._streams_outstanding,
            waiting=len(self._pending) + self._stitcher.held + self._streams_outstanding + self._hold.waiting,
        )

    @property
    def pending(self) -> int:
        """Exchanges that were reported before their end."""
        return len(self._pending)

    @property
    def unknown_records(self) -> int:
        """Ring-buffer records of an unknown kind."""
        return self._decoder.unknown_records

    @property
    def streams_outstanding(self) -> int:
        """Requests of pipelined connections that wait for their response."""
        return self._streams_outstanding

    @property
    def streams(self) -> int:
        """Pipelined connections that are followed."""
        return len(self._streams)

    def _hand_over(self, now_ns: int) -> None:
        spans = self._stitcher.take()
        with self._hand_over_lock:
            if not self._hold.is_idle:
                for process in self._hold.overdue(now_ns):
                    info = self._processes.get(process)
                    if info is not None:
                        self._decide(info)  # the last moment to learn of its pod
                spans = self._hold.pass_on(spans, now_ns)
            self._write(spans, now_ns)

    def _write(self, spans: Sequence[Span], now_ns: int) -> None:
        if spans:
            self.handed_over += len(spans)
            for sink in self._sinks:
                sink.write(spans, now_ns)
        self._close_account()

    # -- exchanges

    def _on_exchange(self, exchange: Exchange) -> None:
        is_first = exchange.flags & _FIRST
        if is_first:
            self.received += 1
            if self._ended_early:
                self._ended_early.discard(exchange.connection_id)
        decided = self._decided.get(exchange.tgid)
        if decided is None or decided[0] != exchange.process_start_ns:
            decided = self._decide(self._processes.lookup(exchange.tgid, exchange.process_start_ns))
        if not decided[2]:
            if is_first:
                self.dropped["not_selected"] += 1
            if is_first or exchange.exchange_id not in self._pending:
                if exchange.end <= _QUIET:
                    self._remember_early_end(exchange.connection_id)
                else:
                    self._ended_early.discard(exchange.connection_id)
                return
            # It was begun while the process was selected, or its pod was not known: it ends as it began.
        if (
            not is_first
            or exchange.end <= _QUIET
            or exchange.connection_id in self._pending_of
            or exchange.exchange_id in self._swept
            or exchange.exchange_id in self._swept_before
        ):
            self._place_ready()
            self._on_reported(exchange, bool(is_first))
            return
        try:
            self._ready.append((exchange, decided[3][0](exchange), decided[1]))
        except ProtocolError:
            self._finish(exchange)

    def _place_ready(self) -> None:
        """Hand the ended exchanges to the stitcher, last one first: parents end after their children, and a child whose
        parent is known need not wait for it.
        """
        ready = self._ready
        if ready:
            add = self._stitcher.add
            for exchange, call, process in reversed(ready):
                add(exchange, call, process)
            ready.clear()

    def _on_reported(self, exchange: Exchange, is_first: bool) -> None:
        """The rarer cases: a provisional record, or one that follows a provisional record."""
        exchange_id = exchange.exchange_id
        if is_first:
            if (
                exchange_id in self._swept
                or exchange_id in self._swept_before
                or (exchange.end <= _QUIET and exchange.connection_id in self._streams)
            ):
                self.received -= 1  # counted twice by the kernel, too: see the race at _swept
                self.superseded += 1
                return
            older = self._pending_of.get(exchange.connection_id)
            if older == exchange_id:
                self.received -= 1  # the same race, and the report did not end the exchange
                is_first = False
            elif exchange.end <= _QUIET and self._stitcher.knows(exchange_id):
                self.received -= 1  # the same race the other way round: the exchange's end came before the report
                self.superseded += 1
                return
            elif older is not None:
                self._finish(msgspec.structs.replace(self._forget_pending(older), end=int(End.NEXT)))
        elif exchange_id not in self._pending:
            self.superseded += 1
            if exchange.end > _QUIET:
                self._ended_early.discard(exchange.connection_id)  # what comes next on it is another exchange
            return
        if exchange.end > _QUIET:
            if not is_first:
                self._forget_pending(exchange_id)
            self._finish(exchange)
            return
        call = self._parse(exchange, provisional=True)
        if call is not None and call.complete:
            if not is_first:
                self._forget_pending(exchange_id)
            self._swept.add(exchange_id)
            self._stitcher.add(exchange, call)
            return
        if is_first and len(self._pending) >= self._max_pending:
            self._end_early(self._forget_pending(next(iter(self._pending))))
        self._pending[exchange_id] = exchange
        self._pending_of[exchange.connection_id] = exchange_id
        if call is not None:
            self._stitcher.announce(exchange, call)

    def _finish(self, exchange: Exchange) -> None:
        call = self._parse(exchange)
        if call is not None:
            self._stitcher.add(exchange, call)
        else:
            self._stitcher.withdraw(exchange.exchange_id)

    def _parse(self, exchange: Exchange, provisional: bool = False) -> Call | None:
        """Ask the protocols in order. The reason of the last one counts, unless a later record may do better."""
        reason = "no_protocol"
        decided = self._decided.get(exchange.tgid)
        if decided is not None and decided[0] != exchange.process_start_ns:
            decided = None  # of a later process with the number
        for parse in decided[3] if decided is not None else self._parsers:
            try:
                return parse(exchange)
            except ProtocolError as error:
                reason = error.reason
        if not provisional:
            self.dropped[reason] += 1
        return None

    def _forget_pending(self, exchange_id: int) -> Exchange:
        exchange = self._pending.pop(exchange_id)
        if self._pending_of.get(exchange.connection_id) == exchange_id:
            del self._pending_of[exchange.connection_id]
        return exchange

    def _expire(self, now_ns: int) -> None:
        """Finish what was reported once and never again: its last record was lost, or its end has not been seen. And
        pipelined requests that nothing has been heard of for too long, as well as streams of HTTP/2, when the end of
        their connection may have been missed.
        """
        limit_ns = now_ns - self._pending_timeout_ns
        while self._pending:
            oldest = next(iter(self._pending.values()))
            if oldest.end_ns > limit_ns:
                break
            self._end_early(msgspec.structs.replace(self._forget_pending(oldest.exchange_id), end=int(End.TIMED_OUT)))
        if self._order.waiting:
            for connection_id in self._order.overdue(now_ns):
                for segment in self._order.release(connection_id):
                    self._feed(self._streams[connection_id], segment)
        limit_ns = now_ns - self._exchange_timeout_ns
        while self._streams_waiting:
            connection_id, heard_ns = next(iter(self._streams_waiting.items()))
            if heard_ns > limit_ns:
                break
            stream = self._streams[connection_id]
            outstanding = stream.outstanding
            if outstanding and type(stream) is Http2Connection and heard_ns > self._last_lost_close_ns(now_ns):
                # A stream may be silent for hours. Its connection is there: its close would have been told of.
                self._streams_waiting[connection_id] = now_ns
                self._streams_waiting.move_to_end(connection_id)
                continue
            self._take_streamed(stream.expire(now_ns))
            self._give_up_unread(connection_id, stream)
            self._count_stream(connection_id, stream, stream.lost, outstanding, now_ns)

    def _last_lost_close_ns(self, now_ns: int) -> int:
        """When the kernel last lost the record of a connection's end, as far as it is known: not later. 0: never."""
        closes_lost = self._source.counters()["closes_lost"]
        if closes_lost != self._closes_lost:
            self._closes_lost, self._closes_lost_ns = closes_lost, now_ns
        return self._closes_lost_ns

    def _end_early(self, exchange: Exchange) -> None:
        """Finish an exchange that the kernel may still have more to say of."""
        self._remember_early_end(exchange.connection_id)
        self._finish(exchange)

    def _remember_early_end(self, connection_id: int) -> None:
        if len(self._ended_early) >= 2 * self._max_pending:
            self._ended_early.pop()  # should it go on after all, the books are off by one
        self._ended_early.add(connection_id)

    def _on_close(self, closed: ConnectionClosed) -> None:
        stream = self._streams.pop(closed.connection_id, None)
        if stream is None and closed.flags & _STREAM and closed.connection_id not in self._ended_early:
            # All of its segments were lost: its close is the first that is heard of it.
            stream = PipelinedConnection(self.stream_losses)
            self._enter_stream(closed.connection_id)
        self._ended_early.discard(closed.connection_id)
        if stream is not None:
            self._close_stream(closed.connection_id, stream, closed)
            return
        exchange = self._pending.get(closed.exchange_id)
        if exchange is not None:
            self._forget_pending(closed.exchange_id)
            self._finish(
                msgspec.structs.replace(
                    exchange,
                    end=closed.end,
                    flags=exchange.flags | closed.flags & Flag.PEER_CLOSED,
                    end_ns=closed.time_ns,
                )
            )

    # -- pipelined connections

    def _on_segment(self, segment: Segment) -> None:
        stream = self._streams.get(segment.connection_id)
        if stream is None:
            http2 = None
            if segment.flags & _HTTP2:
                http2 = self._http2_of(segment.tgid, segment.process_start_ns)
            stream = self._new_stream(segment.connection_id, http2)
            self._enter_stream(segment.connection_id)
        if segment.flags & _OVERTAKES or self._order.waiting:
            for one in self._order.arrange(segment):
                self._feed(stream, one)
        else:
            self._feed(stream, segment)

    def _feed(self, stream: _Stream, segment: Segment) -> None:
        lost, outstanding = stream.lost, stream.outstanding
        ended = stream.feed(segment)
        self._take_streamed(ended)
        if self._streams_unread and (ended or stream.lost or stream.outstanding):
            self._note_request(segment.connection_id)
        self._count_stream(segment.connection_id, stream, lost, outstanding, segment.time_ns)

    def _on_upgraded(self, upgraded: ConnectionUpgraded) -> None:
        """Follow a connection that HTTP/1 switched to HTTP/2. Where HTTP/2 is not wanted, the switch is its end."""
        exchange = upgraded.exchange
        connection_id = exchange.connection_id
        if connection_id in self._streams:  # a connection is switched once
            self.superseded += 1
            return
        is_announced = self._pending_of.get(connection_id) == exchange.exchange_id
        http2 = self._http2_of(exchange.tgid, exchange.process_start_ns)
        stream = self._new_stream(connection_id, http2)
        self._enter_stream(connection_id, exchange.exchange_id)
        if isinstance(stream, Http2Connection):
            stream.take_over(exchange, is_announced=is_announced)
        else:
            stream.hand_over()
            self._take_streamed((exchange,))
        self._note_request(connection_id)
        self._count_stream(connection_id, stream, 0, 0, exchange.end_ns)

    def _enter_stream(self, connection_id: int, continued_id: int = 0) -> None:
        """Take over into the books what the kernel counts as streamed since a connection entered stream mode.

        ``continued_id`` is the exchange that is known to go on as a stream of it.
        """
        if connection_id in self._ended_early:
            self._ended_early.discard(connection_id)  # it is in the books already, and the segments tell of it again
        else:
            self._streams_seen += 1
            self._streams_unread.add(connection_id)
            self._streams_outstanding += 1
        announced = self._pending_of.get(connection_id)
        if announced is not None:
            # The connection's first exchange had been reported before the second request came. The kernel counts it as
            # streamed now, and the segments tell of it again.
            self._forget_pending(announced)
            if announced != continued_id:
                self._stitcher.withdraw(announced)
            self.received -= 1
            self.superseded += 1

    def _on_peer(self, found: PeerFound) -> None:
        stream = self._streams.get(found.connection_id)
        if type(stream) is Http2Connection:
            stream.peer_connection_id = found.peer_connection_id
            return
        if len(self._peers_found) >= self._max_pending:  # their segments were lost
            del self._peers_found[next(iter(self._peers_found))]
        self._peers_found[found.connection_id] = found.peer_connection_id

    def _new_stream(self, connection_id: int, http2: Http2 | None) -> _Stream:
        """Follow one more connection, and the oldest one no longer when there are too many."""
        if len(self._streams) >= self._max_pending:
            oldest = next(iter(self._streams))
            self._close_stream(oldest, self._streams.pop(oldest), None)
            self._remember_early_end(oldest)
        stream: _Stream
        if http2 is not None:
            self._http2_streams += 1
            stream = Http2Connection(http2, self.stream_losses)
            stream.peer_connection_id = self._peers_found.pop(connection_id, 0)
        else:
            stream = PipelinedConnection(self.stream_losses)
        self._streams[connection_id] = stream
        return stream

    def _http2_of(self, tgid: int, process_start_ns: int) -> Http2 | None:
        """The settings by which HTTP/2 connections of a process are read; None when they are not to be."""
        special = self._protocols_of(self._processes.lookup(tgid, process_start_ns))
        protocols = special if special is not None else self._protocols
        return next((protocol for protocol in protocols if isinstance(protocol, Http2)), None)

    def _close_stream(self, connection_id: int, stream: _Stream, closed: ConnectionClosed | None) -> None:
        for segment in self._order.release(connection_id):
            self._feed(stream, segment)
        lost, outstanding = stream.lost, stream.outstanding
        if type(stream) is Http2Connection:
            self._http2_streams -= 1
        self._take_streamed(stream.close(closed))
        self._give_up_unread(connection_id, stream)
        self._count_stream(connection_id, stream, lost, outstanding, 0)

    def _give_up_unread(self, connection_id: int, stream: _Stream) -> None:
        """The kernel saw a request begin; count it as lost if none could be read. A preface of HTTP/2 is none."""
        if self._note_request(connection_id):
            self.streamed += 1
            self.dropped["no_request" if isinstance(stream, Http2Connection) else "stream_lost"] += 1

    def _note_request(self, connection_id: int) -> bool:
        """Let a stream that was unread stand for the exchanges that were read from it; False when it did already."""
        if connection_id not in self._streams_unread:
            return False
        self._streams_unread.discard(connection_id)
        self._streams_outstanding -= 1
        return True

    def _announce_streams(self, watermark_ns: int, now_ns: int) -> int:
        """Tell the stitcher of HTTP/2 requests that have been open for a while, as the kernel does of others.

        Returns a watermark that holds for them, too: the stitcher knows of every one that began before it.
        """
        if not self._http2_streams:
            return watermark_ns
        watermark_ns = min(watermark_ns, now_ns - SEND_NS)
        for connection_id in self._streams_waiting:
            stream = self._streams[connection_id]
            if type(stream) is Http2Connection:
                announced, oldest_ns = stream.announce(now_ns - OPEN_NS)
                for exchange, call in announced:
                    if self._decision_of(exchange)[2]:
                        self._stitcher.announce(exchange, call)
                if oldest_ns:
                    watermark_ns = min(watermark_ns, oldest_ns)
        return watermark_ns

    def _count_stream(
        self,
        connection_id: int,
        stream: PipelinedConnection | Http2Connection,
        lost: int,
        outstanding: int,
        heard_ns: int,
        reason: str = "stream_lost",
    ) -> None:
        if stream.lost != lost:
            self.streamed += stream.lost - lost
            self.dropped[reason] += stream.lost - lost
            if type(stream) is Http2Connection and stream.withdrawn:
                for exchange_id in stream.withdrawn:
                    self._stitcher.withdraw(exchange_id)
                stream.withdrawn = []
        self._streams_outstanding += stream.outstanding - outstanding
        if stream.outstanding or connection_id in self._streams_unread:
            self._streams_waiting[connection_id] = heard_ns
            self._streams_waiting.move_to_end(connection_id)
        else:
            self._streams_waiting.pop(connection_id, None)

    def _take_streamed(self, ended: Iterable[Exchange | tuple[Exchange, Call]]) -> None:
        for one in ended:
            exchange, call = one if type(one) is tuple else (one, None)
            self.streamed += 1
            decided = self._decision_of(exchange)
            if not decided[2]:
                self.dropped["not_selected"] += 1
                self._stitcher.withdraw(exchange.exchange_id)
            elif call is None:
                self._finish(exchange)
            else:
                self._stitcher.add(exchange, call, decided[1])

    def _decision_of(self, exchange: Exchange) -> _Decision:
        decided = self._decided.get(exchange.tgid)
        if decided is None or decided[0] != exchange.process_start_ns:
            decided = self._decide(self._processes.lookup(exchange.tgid, exchange.process_start_ns))
        return decided

    # -- processes

    def _on_process_seen(self, seen: ProcessSeen) -> None:
        self._decide(self._processes.observe(seen))

    def _on_tls_seen(self, seen: TlsSeen) -> None:
        info = self._processes.lookup(seen.tgid, seen.start_ns)
        if self._selector.selects(info) or not info.is_placed or seen.notice == TlsNotice.OTHER_STACK:
            self._on_tls(info, seen.notice)

    def reconsider(self, infos: Iterable[ProcessInfo]) -> None:
        """Decide again on processes of which something else is known now."""
        for info in infos:
            self._decide(info)

    def reconfigure(self, protocols: Sequence[ExchangeProtocol], selector: Selector) -> None:
        """Read and select otherwise from the next batch on. What the kernel was told is for the caller to take back."""
        self._protocols = protocols
        self._parsers = _parsers_of(protocols)
        self._selector = selector
        self._decided.clear()
        for connection_id, stream in self._streams.items():
            if isinstance(stream, Http2Connection):
                http2 = self._http2_of(*stream.process)
                if http2 is not None:
                    stream.use(http2)
                else:
                    lost, outstanding = stream.lost, stream.outstanding
                    stream.abandon()
                    self._count_stream(connection_id, stream, lost, outstanding, 0, "protocol_off")

    def forget_peers(self) -> None:
        """The names of peers may be others now."""
        for protocol in self._protocols:
            protocol.forget_peers()

    def use_sinks(self, sinks: Sequence[Sink]) -> None:
        """Hand what comes next to these sinks. Those that are not among them any more are flushed."""
        with self._hand_over_lock:
            old, self._sinks = self._sinks, list(sinks)
            for sink in old:
                if sink not in self._sinks:
                    sink.flush()

    def _decide(self, info: ProcessInfo) -> _Decision:
        selected = self._selector.selects(info)
        special = self._protocols_of(info)
        parsers = self._parsers if special is None else _parsers_of(special)
        if len(self._decided) >= self._max_processes:
            self._decided.clear()
        decided = self._decided[info.key[0]] = (info.key[1], info.key, selected, parsers)
        if info.is_placed or not selected:  # what is not known yet is captured all the same
            self._source.decide(*info.key, PROCESS_TRACED if selected else PROCESS_IGNORED)
        self._on_process(info)
        if not (info.is_placed and self._hold.is_idle):
            self._hold.review(info.key, info.is_placed, selected)
        return decided

    def threads_interleave(self, process: tuple[int, int]) -> bool:
        """Whether the language runs several requests on one thread in ways that the kernel cannot see."""
        info = self._processes.get(process)
        return info is not None and info.language in _INTERLEAVING_LANGUAGES
