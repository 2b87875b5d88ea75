"""agent.stitch against a simulated system: whatever the services do, a parent is the true one or missing, never wrong.

A seed makes services of several kinds, requests that overlap, and the records and watermarks in the order in which the
kernel would send them. The truth is known because the simulation made it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Call, End, Exchange, Span, TraceContext
from agent.sampling import Sampler
from agent.stitch import Stitcher
from tests.unit.exchanges import CLIENT, MILLISECOND, SERVER, call, context, exchange

SWEEP_MS = 100
OPEN_MS = 200
HEADERS = ("copy", "drop", "sdk", "foreign")


@dataclass
class Service:
    """``threads``: one thread per request, calls made on it; ``pool``: parallel calls are made by other threads;
    ``loop``: the kernel sees at most some of the parents; ``interleaving``: it sees wrong ones; ``handoff``: so it does
    where threads read requests and serve those that others read, which shows in who answers.
    """

    kind: str
    headers: str
    keeps_request_id: bool
    process: tuple[int, int]
    calls: list[int] = field(default_factory=list)


@dataclass
class Seen:
    """One exchange, and what is true of it."""

    exchange: Exchange
    call: Call
    service: Service | None
    parent: int
    """The true parent's span id; 0 for a root."""
    arrival_ms: float
    exact: bool
    """Whether the stitcher must find the parent; else it may leave it out."""


class World:
    """Makes the exchanges of one run."""

    def __init__(self, seed: int, kinds: tuple[str, ...], headers: tuple[str, ...], longest_ms: float) -> None:
        self.random = Random(seed)
        self.longest_ms = longest_ms
        self.seen: list[Seen] = []
        self.number = 0
        count = self.random.randint(2, 5)
        self.services = [
            Service(
                self.random.choice(kinds), self.random.choice(headers), self.random.random() < 0.5, (100 + index, 1)
            )
            for index in range(count)
        ]
        for index, service in enumerate(self.services):
            below = range(index + 1, count)
            service.calls = [self.random.choice(below) for _ in range(self.random.randint(0, 3)) if below]

    def new_id(self) -> int:
        self.number += 1
        return self.number

    def new_context(self) -> TraceContext:
        return context(self.random.randbytes(16), self.random.getrandbits(63) + 1)

    def request(self, start: float) -> None:
        """A request from outside, with or without a context; sometimes one that others carry, too."""
        carried = self.new_context() if self.random.random() < 0.7 else None
        request_id = f"r{self.new_id()}" if self.random.random() < 0.5 else ""
        times = 2 if self.random.random() < 0.2 else 1
        for _ in range(times):
            duration = self.random.choice((1, 0.1, 0.01)) * self.longest_ms * self.random.random() + 1
            self.serve(self.services[0], carried, request_id, 0, start, duration)
            start += self.random.random() * duration

    def serve(
        self, service: Service, carried: TraceContext | None, request_id: str, peer: int, start: float, duration: float
    ) -> None:
        number = self.new_id()
        moves = self.random.random() < {"loop": 0.1, "handoff": 0.5}.get(service.kind, 0)
        record = exchange(
            number,
            SERVER,
            peer_id=peer,
            process=service.process,
            start=start,
            end_ms=start + duration,
            response_tid=9 if moves else service.process[0],
        )
        header = 0 if carried is None else int.from_bytes(carried.span_id, "big")
        self.add(record, call(carried, request_id), service, peer or header, exact=True)
        step = duration / (len(service.calls) + 1)
        is_parallel = self.random.random() < 0.5
        for index, target in enumerate(service.calls):
            if is_parallel:
                begin, length = start + duration * 0.1 * self.random.random() + 0.01, duration * 0.8
            else:
                begin, length = start + step * (index + 0.2), step * 0.7
            self.make_call(service, number, carried, request_id, self.services[target], begin, length, is_parallel)

    def make_call(
        self,
        service: Service,
        number: int,
        inbound: TraceContext | None,
        request_id: str,
        target: Service,
        start: float,
        duration: float,
        is_parallel: bool,
    ) -> None:
        client = self.new_id()
        parent, carried, exact = number, None, False
        if service.headers == "copy":
            carried = inbound
        elif service.headers == "sdk" and inbound is not None:
            carried = context(inbound.trace_id, self.random.getrandbits(63) + 1)
        elif service.headers in ("sdk", "foreign"):
            carried = self.new_context()
        if carried is not None and carried is not inbound:
            parent, exact = int.from_bytes(carried.span_id, "big"), True
        thread = self.kernel_parent(service, number, start, is_parallel)
        if service.kind == "threads":
            exact = True
        record = exchange(
            client, CLIENT, parent_id=thread, process=service.process, start=start, end_ms=start + duration
        )
        sent_id = request_id if service.keeps_request_id else ""
        self.add(record, call(carried, sent_id), service, parent, exact)
        self.serve(target, carried, sent_id, client, start + duration * 0.05, duration * 0.9)

    def kernel_parent(self, service: Service, number: int, start: float, is_parallel: bool) -> int:
        if service.kind == "threads":
            return number
        if service.kind == "pool":
            return 0 if is_parallel else number
        if service.kind == "loop":
            return self.random.choice((0, number))
        in_flight = [
            one.exchange
            for one in self.seen
            if one.service is service
            and one.exchange.role == SERVER
            and one.exchange.request_start_ns <= start * MILLISECOND < one.exchange.end_ns
        ]
        if service.kind == "handoff":
            moved = {one.exchange_id for one in in_flight if one.response_tid != one.request_tid}
            in_flight = [one for one in in_flight if {one.exchange_id, number} & moved]
        return self.random.choice([0, number, *(one.exchange_id for one in in_flight)])

    def add(self, record: Exchange, asked: Call, service: Service, parent: int, exact: bool) -> None:
        delay = self.random.choice((0, 0, 1, 50, 150)) * self.random.random()
        self.seen.append(Seen(record, asked, service, parent, record.end_ns / MILLISECOND + delay, exact))

    def mark_forwarded(self) -> None:
        """A copied context that only one exchange in flight came with is found for certain (rule 1)."""
        for one in self.seen:
            carried = one.call.context
            if one.exchange.role == SERVER or one.exact or carried is None:
                continue
            begin = one.exchange.request_start_ns
            candidates = [
                other
                for other in self.seen
                if other.exchange.role == SERVER
                and other.service is one.service
                and other.call.context is not None
                and other.call.context.trace_id == carried.trace_id
                and other.exchange.request_start_ns <= begin <= other.exchange.response_end_ns
            ]
            one.exact = len(candidates) == 1


def announced(record: Exchange) -> Exchange:
    """What the kernel says of an exchange that has no response yet."""
    return exchange(
        record.exchange_id,
        record.role,
        process=(record.tgid, record.process_start_ns),
        start=record.request_start_ns / MILLISECOND,
        parent_id=record.parent_id,
        peer_id=record.peer_id,
        response_start_ns=0,
        response_end_ns=0,
        response_tid=0,
        end=int(End.OPEN),
    )


def run(world: World) -> tuple[list[Span], Stitcher]:
    """Feed the stitcher as the kernel would: records at their time, announcements and watermarks with each sweep."""
    interleaving = {service.process for service in world.services if service.kind == "interleaving"}
    stitcher = Stitcher(
        Sampler(), threads_interleave=interleaving.__contains__, hold_ns=10**15, random_bytes=Random(1).randbytes
    )
    spans: list[Span] = []
    waiting = sorted(world.seen, key=lambda one: one.arrival_ms)
    told: set[int] = set()
    now = 1000.0
    while waiting:
        now += SWEEP_MS
        while waiting and waiting[0].arrival_ms <= now:
            one = waiting.pop(0)
            told.add(one.exchange.exchange_id)
            stitcher.add(one.exchange, one.call)
        untold = [one for one in waiting if one.exchange.exchange_id not in told]
        for one in untold:
            if one.exchange.request_start_ns <= (now - OPEN_MS) * MILLISECOND:
                told.add(one.exchange.exchange_id)
                stitcher.announce(announced(one.exchange), one.call)
        begun = [one.exchange.request_start_ns for one in untold if one.exchange.exchange_id not in told]
        watermark = min([now * MILLISECOND, *begun])
        stitcher.advance(int(watermark), int(now * MILLISECOND))
        spans += stitcher.take()
    for _ in range(3):
        now += SWEEP_MS
        stitcher.advance(int(now * MILLISECOND), int(now * MILLISECOND))
    return spans + stitcher.take(), stitcher


def check(world: World) -> int:
    """Assert the truth; return how many parents were found."""
    world.mark_forwarded()
    spans, stitcher = run(world)
    found = {int.from_bytes(span.span_id, "big"): span for span in spans}
    assert len(found) == len(spans) == len(world.seen), "each exchange is one span"
    assert (stitcher.held, stitcher.released_early, stitcher.parents_lost) == (0, 0, 0)
    right = 0
    for one in world.seen:
        span = found[one.exchange.exchange_id]
        parent = int.from_bytes(span.parent_span_id, "big")
        what = f"{one.service} {span.link_method} {one.exchange.exchange_id} -> {parent}, not {one.parent}"
        if one.exact:
            assert parent == one.parent, what
        else:
            assert parent in (one.parent, 0), what
        if parent in found:
            assert found[parent].trace_id == span.trace_id, what
        right += parent == one.parent
    return right


def make_world(seed: int, kinds: tuple[str, ...], headers: tuple[str, ...], requests: int, longest_ms: float) -> World:
    world = World(seed, kinds, headers, longest_ms)
    for _ in range(requests):
        world.request(1000 + world.random.random() * world.random.choice((10, 300, 3000)))
    return world


SEEDS = st.integers(0, 2**32)
LONGEST = st.sampled_from([20.0, 500.0, 8000.0])


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 20), LONGEST)
def test_no_parent_is_ever_wrong(seed, requests, longest_ms):
    """Services of all kinds and habits together: every parent is the true one or none."""
    check(make_world(seed, ("threads", "pool", "loop", "interleaving", "handoff"), HEADERS, requests, longest_ms))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), LONGEST)
def test_threads_are_always_right(seed, requests, longest_ms):
    """Thread-per-request services: every parent is found, headers or not."""
    world = make_world(seed, ("threads",), HEADERS, requests, longest_ms)
    assert check(world) == len(world.seen)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), LONGEST)
def test_sdks_and_foreign_traces_are_always_right(seed, requests, longest_ms):
    """Rules 2 and 3: what the header says is the parent, in services of any kind."""
    world = make_world(seed, ("pool", "loop", "interleaving"), ("sdk", "foreign"), requests, longest_ms)
    assert check(world) == len(world.seen)


@pytest.mark.parametrize("seed", range(5))
def test_fifty_requests_at_once_are_always_right_when_headers_are_copied(seed):
    """Rule 1 at a concurrency of 50 through three event-loop tiers, one context per request."""
    world = World(seed, ("interleaving",), ("copy",), 400)
    process = [(100 + index, 1) for index in range(3)]
    world.services = [
        Service("interleaving", "copy", False, process[index], [index + 1][: 2 - index]) for index in range(3)
    ]
    for _ in range(50):
        world.serve(world.services[0], world.new_context(), "", 0, 1000 + world.random.random() * 10, 400)
    assert check(world) == len(world.seen) == 250
