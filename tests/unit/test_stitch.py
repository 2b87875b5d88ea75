"""agent.stitch: hand-made exchanges -> spans with the right parents, in any order of arrival."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import AttributeGroup, Call, End, Exchange, Flag, Span, SpanKind
from agent.sampling import Sampler
from agent.stitch import Stitcher
from tests.unit.exchanges import (
    BACK,
    CLIENT,
    FRONT,
    MILLISECOND,
    OTHER_TRACE,
    SERVER,
    THIRD,
    TRACE,
    call,
    context,
    exchange,
)

FAR_NS = 1_000_000 * MILLISECOND
INTERLEAVED = Flag.FIRST  # exchanges of a thread-per-request process have no special flag
Arrival = tuple[Exchange, Call]


def id_bytes(number: int) -> bytes:
    return number.to_bytes(8, "big")


def make_stitcher(**options: object) -> Stitcher:
    counter = itertools.count(1)
    options.setdefault(
        "random_bytes", lambda count: b"".join(next(counter).to_bytes(16, "big") for _ in range(count // 16))
    )
    return Stitcher(options.pop("sampler", Sampler()), **options)


def stitch(arrivals: list[Arrival], **options: object) -> dict[int, Span]:
    """Add everything, move the watermark behind it, and return the spans by exchange id."""
    stitcher = make_stitcher(**options)
    for one, asked in arrivals:
        stitcher.add(one, asked)
    stitcher.advance(FAR_NS, FAR_NS)
    spans = stitcher.take()
    assert stitcher.held == 0
    assert not stitcher._undecided
    assert not stitcher._expected
    by_id = {int.from_bytes(span.span_id, "big"): span for span in spans}
    assert len(by_id) == len(spans) == len(arrivals), "each exchange is one span"
    return by_id


def parents(spans: dict[int, Span]) -> dict[int, int]:
    """span id -> parent span id, 0 for none."""
    return {number: int.from_bytes(span.parent_span_id, "big") for number, span in spans.items()}


def methods(spans: dict[int, Span]) -> dict[int, str]:
    return {number: span.link_method for number, span in spans.items()}


def prove_threads(stitcher: Stitcher, process: tuple[int, int] = FRONT) -> None:
    """Let a process answer on the threads that read the requests until it is believed to do so always."""
    for number in range(Stitcher._PROOFS + 1):  # at the same time: the first has no other before it
        stitcher.add(*served(1_000_000 + number, process=process))
    stitcher.take()


def served(number: int, *, peer: int = 0, carried=None, request_id: str = "", **fields: object) -> Arrival:
    """A server exchange."""
    return exchange(number, SERVER, peer_id=peer, **fields), call(carried, request_id)


def called(number: int, *, thread: int = 0, carried=None, request_id: str = "", **fields: object) -> Arrival:
    """A client exchange; ``thread`` is the server exchange that its thread was serving."""
    fields.setdefault("start", 1001)
    fields.setdefault("end_ms", 1009)
    return exchange(number, CLIENT, parent_id=thread, **fields), call(carried, request_id)


INBOUND = context()  # trace T, parent P: what the outside world sent
OWN = context(span=99)  # the same trace, an id that an SDK made
FOREIGN = context(OTHER_TRACE, 55)


# -- the five rules


def test_rule_1_a_forwarded_context_makes_the_server_the_parent():
    """C copies T and P of S: the parent of C is S, and the server that C calls has C as parent, not P."""
    spans = stitch(
        [
            served(1, carried=INBOUND),
            called(2, thread=1, carried=INBOUND),
            served(3, peer=2, carried=INBOUND, process=BACK, start=1002, end_ms=1008),
        ]
    )
    assert parents(spans) == {1: 7, 2: 1, 3: 2}
    assert methods(spans) == {1: "header", 2: "forwarded", 3: "peer"}
    assert {span.trace_id for span in spans.values()} == {TRACE}


def test_rule_1_needs_no_thread():
    """An event loop that copies headers: the only server exchange with T and P is the parent."""
    spans = stitch([served(1, carried=INBOUND), called(2, carried=INBOUND)])
    assert parents(spans) == {1: 7, 2: 1}
    assert methods(spans)[2] == "forwarded"


def test_rule_2_an_id_of_an_sdk_is_the_parent():
    """C carries T and an id X that nobody here received: the application's own span X is the parent."""
    for thread in (0, 1):
        spans = stitch([served(1, carried=INBOUND), called(2, thread=thread, carried=OWN)])
        assert parents(spans) == {1: 7, 2: 99}
        assert methods(spans)[2] == "header"


def test_rule_2_holds_for_the_server_that_is_called():
    """The called server's parent is the client exchange that was observed, not the header's X."""
    spans = stitch(
        [
            served(1, carried=INBOUND),
            called(2, thread=1, carried=OWN),
            served(3, peer=2, carried=OWN, process=BACK, start=1002, end_ms=1008),
        ]
    )
    assert parents(spans) == {1: 7, 2: 99, 3: 2}


def test_rule_3_a_foreign_trace_wins_and_the_cause_is_linked():
    """C carries another trace: it goes there, and a link to S says why it happened."""
    spans = stitch([served(1, carried=INBOUND), called(2, thread=1, carried=FOREIGN)])
    assert (spans[2].trace_id, parents(spans)[2]) == (OTHER_TRACE, 55)
    [link] = spans[2].links
    assert (link.trace_id, link.span_id) == (TRACE, id_bytes(1))
    assert link.attributes == (("spanloom.link.reason", "served_exchange"),)


def test_rule_3_the_called_server_stays_in_the_foreign_trace():
    """The server at the other end inherits the client's trace."""
    spans = stitch(
        [
            served(1, carried=INBOUND),
            called(2, thread=1, carried=FOREIGN),
            served(3, peer=2, carried=FOREIGN, process=BACK, start=1002, end_ms=1008),
        ]
    )
    assert (spans[3].trace_id, parents(spans)[3]) == (OTHER_TRACE, 2)


def test_rule_4_without_a_context_the_thread_tells():
    """C carries nothing: its parent is what its thread was serving, and trace ids are inherited along both edges."""
    spans = stitch([served(1), called(2, thread=1), served(3, peer=2, process=BACK, start=1002, end_ms=1008)])
    assert parents(spans) == {1: 0, 2: 1, 3: 2}
    assert methods(spans) == {1: "", 2: "thread", 3: "peer"}
    assert len({span.trace_id for span in spans.values()}) == 1


def test_rule_5_a_trace_id_without_a_parent_finds_the_only_candidate():
    """X-Ray may send a trace id alone: the one server exchange with it is the parent."""
    alone = context(span=None)
    spans = stitch([served(1, carried=alone), called(2, carried=context(span=None))])
    assert parents(spans) == {1: 0, 2: 1}


def test_rule_5_a_request_id_finds_the_only_candidate():
    """No context, no thread: the one server exchange in flight with the same x-request-id is the parent."""
    spans = stitch([served(1, request_id="r"), served(2, request_id="q"), called(3, request_id="r")])
    assert parents(spans) == {1: 0, 2: 0, 3: 1}
    assert methods(spans)[3] == "request_id"
    assert spans[3].trace_id == spans[1].trace_id


def test_rule_5_two_candidates_are_none():
    """Two exchanges with one request id in flight: no parent is invented."""
    stitcher = make_stitcher()
    for one in (served(1, request_id="r"), served(2, request_id="r"), called(3, request_id="r")):
        stitcher.add(*one)
    stitcher.flush()
    spans = {span.span_id: span for span in stitcher.take()}
    assert spans[id_bytes(3)].parent_span_id == b""
    assert stitcher.ambiguous == 1


def test_rule_5_a_candidate_must_be_in_flight():
    """What had been answered before the call began did not cause it by request id."""
    spans = stitch([served(1, request_id="r", start=900, end_ms=950), called(2, request_id="r")])
    assert parents(spans) == {1: 0, 2: 0}


def test_a_request_id_of_another_process_says_nothing():
    """The id joins exchanges of one process only."""
    spans = stitch([served(1, request_id="r", process=BACK), called(2, request_id="r")])
    assert parents(spans) == {1: 0, 2: 0}


# -- two exchanges with one context


TWICE = [served(1, carried=INBOUND, start=1000), served(2, carried=INBOUND, start=1000.5)]


def test_two_servers_with_equal_contexts_and_no_thread_are_ambiguous():
    """A parallel caller that copies headers: which of the two made the call cannot be told, so nobody is named."""
    spans = stitch([*TWICE, called(3, carried=INBOUND)])
    assert parents(spans)[3] == 0
    assert methods(spans)[3] == "ambiguous"
    assert spans[3].trace_id == TRACE


def test_two_servers_with_equal_contexts_are_told_apart_by_thread():
    """Thread-per-request: the thread decides."""
    spans = stitch([*TWICE, called(3, thread=2, carried=INBOUND), called(4, thread=1, carried=INBOUND)])
    assert (parents(spans)[3], parents(spans)[4]) == (2, 1)


def test_two_servers_with_equal_contexts_are_told_apart_by_request_id():
    """A request id that differs decides."""
    spans = stitch(
        [
            served(1, carried=INBOUND, request_id="a"),
            served(2, carried=INBOUND, request_id="b"),
            called(3, carried=INBOUND, request_id="b"),
        ]
    )
    assert parents(spans)[3] == 2


def test_two_servers_with_equal_contexts_are_told_apart_by_time():
    """The one that had been answered before the call began is out."""
    spans = stitch(
        [served(1, carried=INBOUND, start=900, end_ms=950), served(2, carried=INBOUND), called(3, carried=INBOUND)]
    )
    assert parents(spans)[3] == 2


def test_a_server_that_began_after_the_call_is_no_candidate():
    """Causes come first."""
    spans = stitch([served(1, carried=INBOUND, start=1005), called(2, carried=INBOUND, start=1001)])
    assert parents(spans) == {1: 7, 2: 7}


def test_an_ambiguous_calls_server_hangs_below_it():
    """The client without a parent still is the parent of the server that it called."""
    spans = stitch([*TWICE, called(3, carried=INBOUND), served(4, peer=3, carried=INBOUND, process=BACK, start=1002)])
    assert parents(spans)[4] == 3


# -- what the kernel's parent is worth


def test_a_language_that_interleaves_has_no_thread_parents():
    """Goroutines and event loops: the kernel's parent is not used, the header is."""
    arrivals = [served(1), called(2, thread=1)]
    assert parents(stitch(arrivals)) == {1: 0, 2: 1}
    assert parents(stitch(arrivals, threads_interleave=lambda process: True)) == {1: 0, 2: 0}
    forwarded = [served(1, carried=INBOUND), served(2, carried=OWN), called(3, thread=2, carried=INBOUND)]
    assert parents(stitch(forwarded, threads_interleave=lambda process: True))[3] == 1


def test_interleaving_is_asked_per_process():
    """A thread-per-request service beside it keeps its threads."""
    arrivals = [served(1), called(2, thread=1), served(3, process=BACK), called(4, thread=3, process=BACK)]
    spans = stitch(arrivals, threads_interleave=lambda process: process == BACK)
    assert parents(spans) == {1: 0, 2: 1, 3: 0, 4: 0}


def test_a_process_that_answers_on_another_thread_has_no_thread_parents():
    """An exchange that moved to another thread shows that threads mean nothing in this process."""
    spans = stitch([served(9, response_tid=7), served(1), called(2, thread=1)])
    assert parents(spans)[2] == 0


def test_a_client_only_process_needs_no_wait():
    """A process that never served has no parents: its calls are placed at once."""
    stitcher = make_stitcher()
    stitcher.add(*called(1, carried=INBOUND, flags=int(Flag.FIRST | Flag.CLIENT_ONLY)))
    [span] = stitcher.take()
    assert (span.trace_id, span.parent_span_id) == (TRACE, id_bytes(7))


def test_a_flag_from_before_the_first_request_does_not_stick():
    """The flag of a call that began before the process served counts; once it served, candidates are looked for."""
    spans = stitch(
        [
            called(2, carried=INBOUND, start=900, end_ms=1005, flags=int(Flag.FIRST | Flag.CLIENT_ONLY)),
            served(1, carried=INBOUND),
        ]
    )
    assert parents(spans) == {1: 7, 2: 7}


# -- links, contexts, times


def test_disagreeing_contexts_become_links():
    """The first valid context places the span; the others are links."""
    one, _ = served(1)
    stitcher = make_stitcher()
    stitcher.add(one, call(INBOUND, others=(FOREIGN, context(bytes([9] * 16), None))))
    [span] = stitcher.take()
    assert span.trace_id == TRACE
    [link] = span.links
    assert (link.trace_id, link.span_id) == (OTHER_TRACE, id_bytes(55))
    assert link.attributes == (("spanloom.link.reason", "other_context"),)


def test_the_trace_state_is_inherited():
    """tracestate goes verbatim to every span of the trace."""
    inbound = context(state="a=1,b=2")
    spans = stitch([served(1, carried=inbound), called(2, thread=1), served(3, peer=2, process=BACK)])
    assert {span.trace_state for span in spans.values()} == {"a=1,b=2"}


def test_times_are_moved_to_unix_time():
    """Start is the request's first byte, end the response's last byte; without a response, the record's end."""
    stitcher = make_stitcher()
    stitcher.clock_offset_ns = 5_000_000_000
    stitcher.add(*served(1))
    stitcher.add(exchange(2, response_start_ns=0, response_end_ns=0, end_ns=1_300_000_000, end=int(End.CLOSED)), call())
    first, second = stitcher.take()
    assert (first.start_time_ns, first.end_time_ns) == (6_000_000_000, 6_010_000_000)
    assert (second.start_time_ns, second.end_time_ns) == (6_000_000_000, 6_300_000_000)
    assert first.process_key == FRONT


def test_new_trace_ids_are_16_random_bytes_each():
    """Roots without a context get one trace each, from the random source."""
    spans = stitch([served(number) for number in range(1, 600)])
    assert len({span.trace_id for span in spans.values()}) == 599
    assert all(len(span.trace_id) == 16 for span in spans.values())


# -- order of arrival


DIAMOND = [
    served(1, carried=INBOUND, start=1000, end_ms=1100),
    called(2, thread=1, carried=INBOUND, start=1001, end_ms=1050),
    called(3, thread=1, carried=INBOUND, start=1002, end_ms=1060),
    served(4, peer=2, carried=INBOUND, process=BACK, start=1003, end_ms=1049),
    served(5, peer=3, carried=INBOUND, process=THIRD, start=1004, end_ms=1059),
    called(6, thread=4, carried=INBOUND, process=BACK, start=1010, end_ms=1040),
    called(7, thread=5, carried=INBOUND, process=THIRD, start=1010, end_ms=1045),
    served(8, peer=6, carried=INBOUND, process=(400, 1), start=1012, end_ms=1039),
    served(9, peer=7, carried=INBOUND, process=(400, 1), start=1013, end_ms=1044),
]
DIAMOND_PARENTS = {1: 7, 2: 1, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7}


@given(st.permutations(DIAMOND))
def test_a_diamond_is_right_in_any_order(arrivals):
    """A calls B and C, both call D, all copy one header: every edge is right whatever arrives first."""
    assert parents(stitch(arrivals)) == DIAMOND_PARENTS


WITHOUT_HEADERS = [(one, call()) for one, _ in DIAMOND]


@given(st.permutations(WITHOUT_HEADERS))
def test_a_diamond_without_headers_is_one_trace_in_any_order(arrivals):
    """Thread-per-request services on one node need no header at all."""
    spans = stitch(arrivals)
    assert parents(spans) == DIAMOND_PARENTS | {1: 0}
    assert len({span.trace_id for span in spans.values()}) == 1


@given(st.permutations(DIAMOND), st.data())
def test_announcements_change_nothing(arrivals, data):
    """An exchange announced before its end, at any moment, has the same place and one span."""
    stitcher = make_stitcher()
    actions = [("add", one) for one in arrivals]
    for one in arrivals:
        if data.draw(st.booleans()):
            last = actions.index(("add", one))
            actions.insert(data.draw(st.integers(0, last)), ("announce", one))
    for action, (one, asked) in actions:
        if action == "add":
            stitcher.add(one, asked)
        else:
            provisional = exchange(
                one.exchange_id,
                one.role,
                process=(one.tgid, one.process_start_ns),
                start=one.request_start_ns / MILLISECOND,
                parent_id=one.parent_id,
                peer_id=one.peer_id,
                response_start_ns=0,
                response_end_ns=0,
                end=int(End.OPEN),
            )
            stitcher.announce(provisional, asked)
    stitcher.advance(FAR_NS, FAR_NS)
    spans = stitcher.take()
    assert len(spans) == len(arrivals)
    assert parents({int.from_bytes(span.span_id, "big"): span for span in spans}) == DIAMOND_PARENTS
    assert stitcher.held == 0
    assert not stitcher._announced


# -- waiting


OPEN = exchange(1, end=int(End.OPEN), response_start_ns=0, response_end_ns=0, response_tid=0)


def test_a_call_waits_for_the_answer_of_an_announced_parent():
    """Who answers tells whether the thread that read a slow request served it; the call and the one called wait."""
    stitcher = make_stitcher()
    prove_threads(stitcher)
    stitcher.announce(OPEN, call())
    stitcher.add(*served(3, peer=2, process=BACK, start=1002))
    stitcher.add(*called(2, thread=1))
    for now in range(1200, 4000, 200):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    assert (stitcher.take(), stitcher.held) == ([], 2)
    stitcher.add(exchange(1, end_ms=4000), call())
    stitcher.advance(4100 * MILLISECOND, 4100 * MILLISECOND)
    spans = {int.from_bytes(span.span_id, "big"): span for span in stitcher.take()}
    assert parents(spans) == {1: 0, 2: 1, 3: 2}
    assert methods(spans)[2] == "thread"
    assert (stitcher.held, stitcher.released_early) == (0, 0)


def test_an_answer_that_goes_on_is_enough():
    """A stream that has begun tells who serves it: calls made before need not wait for its end."""
    stitcher = make_stitcher()
    prove_threads(stitcher)
    stitcher.announce(OPEN, call())
    stitcher.add(*called(2, thread=1))
    stitcher.announce(exchange(1, end=int(End.QUIET), end_ms=1500), call())
    stitcher.advance(1600 * MILLISECOND, 1600 * MILLISECOND)
    [span] = stitcher.take()
    assert span.parent_span_id == id_bytes(1)


@pytest.mark.parametrize("how", ["final", "provisional"])
def test_an_announced_parent_that_another_thread_answers_is_none(how):
    """The thread that read the request had handed it on: what it did since belongs to another request."""
    stitcher = make_stitcher()
    prove_threads(stitcher)
    stitcher.announce(OPEN, call())
    stitcher.add(*called(2, thread=1))
    stitcher.advance(1200 * MILLISECOND, 1200 * MILLISECOND)
    if how == "final":
        stitcher.add(exchange(1, end_ms=1300, response_tid=9), call())
    else:
        stitcher.announce(exchange(1, end=int(End.QUIET), end_ms=1300, response_tid=9), call())
    stitcher.advance(1400 * MILLISECOND, 1400 * MILLISECOND)
    spans = {int.from_bytes(span.span_id, "big"): span for span in stitcher.take()}
    assert spans[2].parent_span_id == b""
    assert stitcher.parents_lost == 0


def test_a_process_that_is_not_known_yet_is_believed_when_the_answers_of_its_time_are_known():
    """The first request's call is placed once nobody can have answered another one meanwhile from a wrong thread."""
    stitcher = make_stitcher()
    stitcher.announce(exchange(5, start=1005, end=int(End.OPEN), response_end_ns=0, response_tid=0), call())
    stitcher.add(*served(1))
    stitcher.add(*called(2, thread=1))
    for now in (1020, 1400, 1600):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
        assert [span.span_id for span in stitcher.take()] in ([], [id_bytes(1)])
    stitcher.add(exchange(5, start=1005, end_ms=1650), call())
    stitcher.advance(1700 * MILLISECOND, 1700 * MILLISECOND)
    found = {span.span_id: span.parent_span_id for span in stitcher.take()}
    assert found == {id_bytes(5): b"", id_bytes(2): id_bytes(1)}


def test_lone_requests_prove_nothing():
    """A pool whose threads take up each other's work only under load answered many lone requests on the reading thread.

    Then the first requests that overlap come: 1 is read by the front's thread, which goes on with 2 that another one
    read, makes the call for it, and answers 1 first, by chance. The answer of 2 shows what the call must not be.
    """
    stitcher = make_stitcher()
    for number in range(10 * Stitcher._PROOFS):
        stitcher.add(*served(1_000_000 + number, start=10 * number, end_ms=10 * number + 9))
    stitcher.advance(9000 * MILLISECOND, 9000 * MILLISECOND)
    stitcher.take()
    stitcher.announce(exchange(2, start=9001, end=int(End.OPEN), response_start_ns=0, response_end_ns=0), call())
    stitcher.add(*called(3, thread=1, start=9003, end_ms=9004))
    stitcher.add(*served(1, start=9002, end_ms=9005))
    for now in (9100, 9300, 9500):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    stitcher.add(exchange(2, start=9001, end_ms=9600, request_tid=8, response_tid=100), call())
    stitcher.advance(FAR_NS, FAR_NS)
    found = {span.span_id: span for span in stitcher.take()}
    assert found[id_bytes(3)].parent_span_id == b""


def test_a_process_that_hands_requests_on_is_not_believed_by_chance():
    """One answer from the thread that had read proves nothing while another request of the time has no answer yet."""
    stitcher = make_stitcher()
    stitcher.announce(exchange(5, start=1005, end=int(End.OPEN), response_end_ns=0, response_tid=0), call())
    stitcher.add(*served(1))
    stitcher.add(*called(2, thread=1))
    stitcher.advance(1400 * MILLISECOND, 1400 * MILLISECOND)
    stitcher.add(exchange(5, start=1005, end_ms=1450, response_tid=9), call())
    stitcher.advance(1700 * MILLISECOND, 1700 * MILLISECOND)
    assert {span.span_id: span.parent_span_id for span in stitcher.take()}[id_bytes(2)] == b""


# -- telling of what is open


def tell(stitcher: Stitcher, at_ms: int) -> list[Span]:
    """What comes out of a sweep at a time; exchanges of the tests begin at 1000 ms."""
    stitcher.advance(at_ms * MILLISECOND, at_ms * MILLISECOND)
    return stitcher.take()


def test_a_request_that_stays_open_is_told_of_once():
    """A span below its own, at its beginning, says what was asked and by whom, and nothing of an answer."""
    stitcher = make_stitcher(announce_open_ns=5000 * MILLISECOND, random_bytes=lambda count: b"\xee" * count)
    groups = (AttributeGroup((("rpc.method", "pkg.Echo/Tick"), ("client.address", "10.0.0.1"))),)
    outcome = (
        ("http.response.status_code", 200),
        ("http.request.body.size", 5),
        ("rpc.response.status_code", "UNKNOWN"),
        ("spanloom.rpc.response.messages", 3),
        ("error.type", "UNKNOWN"),
    )
    asked = Call("pkg.Echo/Tick", outcome, True, INBOUND, (), "", False, groups)
    stitcher.announce(OPEN, asked)
    assert tell(stitcher, 5999) == []
    [opening] = tell(stitcher, 6000)
    stitcher.announce(exchange(1, end=int(End.QUIET), end_ms=6500), asked)
    assert tell(stitcher, 7000) == tell(stitcher, 60_000) == []
    stitcher.add(exchange(1, end_ms=61_000), msgspec.structs.replace(asked, attributes=()))
    [final] = tell(stitcher, 62_000)
    assert (opening.name, opening.kind) == ("pkg.Echo/Tick (opened)", SpanKind.INTERNAL)
    assert opening.all_attributes() == (*groups[0], ("spanloom.opened", "server"))
    assert opening.start_time_ns == opening.end_time_ns == final.start_time_ns
    assert (opening.trace_id, opening.parent_span_id) == (final.trace_id, final.span_id)
    assert (opening.process_key, opening.error, opening.links) == (final.process_key, False, ())
    assert opening.span_id != final.span_id
    assert (stitcher.openings, stitcher._opened) == (1, set())


@pytest.mark.parametrize("how", ["off", "ended", "withdrawn", "sampled out"])
def test_what_is_not_told_of(how):
    """Without the setting nothing is; with it, nothing that has ended, is lost, or is in a trace that is not wanted."""
    sampler = Sampler(0.0 if how == "sampled out" else 1.0)
    stitcher = make_stitcher(announce_open_ns=0 if how == "off" else 500 * MILLISECOND, sampler=sampler)
    stitcher.announce(OPEN, call())
    if how == "ended":
        stitcher.add(exchange(1), call())
    elif how == "withdrawn":
        stitcher.withdraw(1)
    assert len(tell(stitcher, 2000)) == (how == "ended")
    assert (stitcher.openings, stitcher.sampled_out) == (0, 0)


def test_a_request_that_has_no_place_yet_is_told_of_when_it_has():
    """A call whose parent is not known yet has no trace; what tells of it would be in another one."""
    stitcher = make_stitcher(announce_open_ns=500 * MILLISECOND)
    prove_threads(stitcher)
    stitcher.announce(OPEN, call(INBOUND))
    stitcher.announce(exchange(2, CLIENT, start=1001, parent_id=1, end=int(End.OPEN), response_end_ns=0), call())
    [opening] = tell(stitcher, 2000)
    assert opening.parent_span_id == id_bytes(1)
    stitcher.announce(exchange(1, end=int(End.QUIET), end_ms=2500), call(INBOUND))
    [opening] = tell(stitcher, 3000)
    assert (opening.trace_id, opening.parent_span_id) == (TRACE, id_bytes(2))
    assert ("spanloom.opened", "client") in opening.attributes


def test_telling_is_switched_on_and_off():
    """What is open by then is told of, and nothing twice."""
    stitcher = make_stitcher()
    stitcher.announce(OPEN, call())
    assert tell(stitcher, 60_000) == []
    numbers: list[int] = []
    for announce_open_ns in (MILLISECOND, 0, MILLISECOND):
        stitcher.reconfigure(Sampler(), hold_ns=5 * 10**9, hold_spans=100, announce_open_ns=announce_open_ns)
        numbers.append(len(tell(stitcher, 61_000)))
    assert numbers == [1, 0, 0]


def test_a_call_that_forwards_a_header_need_not_wait_for_the_answer():
    """Where one request only came with the context that a call carries, threads are of no interest."""
    stitcher = make_stitcher()
    stitcher.announce(OPEN, call(INBOUND))
    stitcher.add(*called(2, thread=1, carried=INBOUND))
    stitcher.advance(1200 * MILLISECOND, 1200 * MILLISECOND)
    [span] = stitcher.take()
    assert (span.parent_span_id, span.link_method) == (id_bytes(1), "forwarded")


@pytest.mark.parametrize("what", ["context", "request_id"])
def test_candidates_are_kept_for_a_call_that_waits(what):
    """When it turns out that the thread says nothing, all that could be the cause is still known."""
    asked = {"carried": INBOUND} if what == "context" else {"request_id": "r"}
    stitcher = make_stitcher()
    stitcher.announce(OPEN, call())
    for number in (5, 6):
        stitcher.add(*served(number, **asked))
    stitcher.add(*called(2, thread=1, **asked))
    for now in range(1200, 5000, 200):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    stitcher.add(exchange(1, end_ms=5000, response_tid=9), call())
    stitcher.advance(5100 * MILLISECOND, 5100 * MILLISECOND)
    found = {span.span_id: span for span in stitcher.take()}
    assert (found[id_bytes(2)].parent_span_id, found[id_bytes(2)].link_method) == (b"", "ambiguous")


@pytest.mark.parametrize(("is_proven", "parent"), [(True, 1), (False, 0)])
def test_the_wait_for_an_answer_is_bounded(is_proven, parent):
    """After the limit a process is believed if it has always answered on the thread that had read, and only then."""
    stitcher = make_stitcher(hold_ns=5000 * MILLISECOND)
    if is_proven:
        prove_threads(stitcher)
    stitcher.announce(OPEN, call())
    stitcher.add(*called(2, thread=1))
    stitcher.advance(6000 * MILLISECOND, 6001 * MILLISECOND)
    assert stitcher.take() == []
    stitcher.advance(6000 * MILLISECOND, 6002 * MILLISECOND)
    [span] = stitcher.take()
    assert int.from_bytes(span.parent_span_id, "big") == parent
    assert (stitcher.held, stitcher.released_early) == (0, 1)


@pytest.mark.parametrize(("is_proven", "parent"), [(True, 1), (False, 0)])
def test_a_request_that_nobody_answers(is_proven, parent):
    """A client that left: the call is its request's where the process is known, and nobody's where it is not."""
    stitcher = make_stitcher()
    if is_proven:
        prove_threads(stitcher)
    stitcher.add(*called(2, thread=1))
    stitcher.add(exchange(1, response_start_ns=0, response_end_ns=0, response_tid=0, end=int(End.RESET)), call())
    stitcher.advance(1100 * MILLISECOND, 1100 * MILLISECOND)
    found = {span.span_id: span.parent_span_id for span in stitcher.take()}
    assert int.from_bytes(found[id_bytes(2)], "big") == parent


def test_a_long_chain_that_waits_for_an_answer():
    """All that depends on a call waits with it and is placed with it, however long the chain is."""
    stitcher = make_stitcher(hold_ns=10**15)
    stitcher.announce(OPEN, call())
    chain = [called(2, thread=1)]
    for number in range(3, 3001):
        process = (number // 2 + 1000, 1)
        if number % 2:
            chain.append(served(number, peer=number - 1, process=process, start=1001 + number / 10_000))
        else:
            chain.append(called(number, thread=number - 1, process=process, start=1001 + number / 10_000))
    for one in reversed(chain):
        stitcher.add(*one)
    for now in (1500, 2000):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
        assert stitcher.take() == []
    stitcher.add(exchange(1, end_ms=2100), call())
    stitcher.advance(3000 * MILLISECOND, 3000 * MILLISECOND)
    spans = {int.from_bytes(span.span_id, "big"): span for span in stitcher.take()}
    assert parents(spans) == {number: number - 1 for number in range(1, 3001)}
    assert stitcher.parents_lost == 0


def test_the_second_announcement_is_the_first():
    """A request that is announced twice is one node."""
    stitcher = make_stitcher()
    for _ in range(2):
        stitcher.announce(exchange(1, end=int(End.OPEN)), call())
    stitcher.add(*served(1))
    assert len(stitcher.take()) == 1


@pytest.mark.parametrize("late_ms", [100, 900, 3000, 60_000])
def test_a_slow_exchange_remains_a_parent_as_long_as_it_lasts(late_ms):
    """A call that begins long after the request was announced has its thread's parent, however often time moved on."""
    stitcher = make_stitcher()
    stitcher.announce(exchange(1, end=int(End.OPEN), response_start_ns=0, response_end_ns=0), call(INBOUND))
    for now in range(1000, 1000 + late_ms, 100):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    start = 1000 + late_ms
    stitcher.add(*called(2, thread=1, start=start, end_ms=start + 5))
    stitcher.add(*called(3, carried=INBOUND, start=start, end_ms=start + 5))
    stitcher.add(exchange(1, end_ms=start + 6), call(INBOUND))
    stitcher.advance(FAR_NS, FAR_NS)
    assert [span.parent_span_id for span in stitcher.take()] == [id_bytes(7), id_bytes(1), id_bytes(1)]
    assert stitcher.parents_lost == 0


def test_a_slow_exchange_remains_a_candidate_beside_a_fast_one():
    """Of two exchanges with one context, the slow one is not forgotten: a call of either is ambiguous, not wrong."""
    stitcher = make_stitcher()
    stitcher.announce(exchange(1, end=int(End.OPEN), response_start_ns=0, response_end_ns=0), call(INBOUND))
    for now in range(1000, 5000, 100):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    stitcher.add(*served(2, carried=INBOUND, start=5000, end_ms=5100))
    stitcher.add(*called(3, carried=INBOUND, start=5010, end_ms=5020))
    stitcher.advance(FAR_NS, FAR_NS)
    spans = {span.span_id: span for span in stitcher.take()}
    assert spans[id_bytes(3)].parent_span_id == b""
    assert stitcher.ambiguous == 1


def test_a_slow_exchange_that_ended_is_still_there_for_what_it_called():
    """A call that ended just before its slow parent may be reported after it."""
    stitcher = make_stitcher()
    stitcher.announce(exchange(1, end=int(End.OPEN), response_start_ns=0, response_end_ns=0), call(INBOUND))
    for now in range(1000, 5000, 100):
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
    stitcher.add(exchange(1, end_ms=5000), call(INBOUND))
    stitcher.advance(5000 * MILLISECOND, 5000 * MILLISECOND)
    stitcher.add(*called(2, thread=1, start=4990, end_ms=4999))
    stitcher.advance(FAR_NS, FAR_NS)
    assert [span.parent_span_id for span in stitcher.take()] == [id_bytes(7), id_bytes(1)]


def test_a_child_waits_for_its_parent_and_is_counted_as_held():
    """What the kernel named is on its way: the child waits for it, and leaves with it."""
    stitcher = make_stitcher()
    prove_threads(stitcher)
    stitcher.add(*served(3, peer=2, process=BACK))
    stitcher.add(*called(2, thread=1))
    assert (stitcher.take(), stitcher.held) == ([], 2)
    stitcher.add(*served(1))
    assert (len(stitcher.take()), stitcher.held) == (3, 0)


def test_a_lost_parent_is_waited_for_until_the_watermark_only():
    """A parent that was dropped in the kernel is missing once everything that began before is known; it is counted."""
    stitcher = make_stitcher()
    stitcher.add(*served(3, peer=2, carried=INBOUND, process=BACK, start=1000))
    stitcher.advance(1000 * MILLISECOND, 1000 * MILLISECOND)
    assert (stitcher.take(), stitcher.held, stitcher.parents_lost) == ([], 1, 0)
    stitcher.advance(1000 * MILLISECOND + 1, 1001 * MILLISECOND)
    [span] = stitcher.take()
    assert (span.trace_id, span.parent_span_id, span.link_method) == (TRACE, id_bytes(7), "header")
    assert (stitcher.held, stitcher.parents_lost, stitcher.released_early) == (0, 1, 0)
    assert not stitcher._expected


def test_a_parent_that_comes_after_the_decision_is_no_harm():
    """The child keeps its place; the late one gets its own."""
    stitcher = make_stitcher()
    stitcher.add(*called(2, thread=1))
    stitcher.advance(FAR_NS, FAR_NS)
    stitcher.add(*served(1))
    spans = stitcher.take()
    assert [span.parent_span_id for span in spans] == [b"", b""]


def test_waiting_is_bounded_in_time():
    """A watermark that stands still (one slow request that nothing announces) holds nobody longer than the limit."""
    stitcher = make_stitcher(hold_ns=100 * MILLISECOND)
    stitcher.add(*called(2, carried=INBOUND, start=1000))
    stitcher.advance(500 * MILLISECOND, 1100 * MILLISECOND)
    assert (stitcher.take(), stitcher.released_early) == ([], 0)
    stitcher.advance(500 * MILLISECOND, 1101 * MILLISECOND)
    assert (len(stitcher.take()), stitcher.released_early, stitcher.held) == (1, 1, 0)


def test_waiting_is_bounded_in_number():
    """Above the limit the oldest leave, counted, until the limit holds."""
    stitcher = make_stitcher(hold_spans=10)
    for number in range(1, 16):
        stitcher.add(*called(number, carried=INBOUND))
    stitcher.advance(0, 1000 * MILLISECOND)
    assert [int.from_bytes(span.span_id, "big") for span in stitcher.take()] == [1, 2, 3, 4, 5]
    assert (stitcher.held, stitcher.released_early) == (10, 5)


def test_flush_places_everything():
    """At shutdown nothing waits any longer."""
    stitcher = make_stitcher()
    for one in DIAMOND[1:]:
        stitcher.add(*one)
    stitcher.take()
    stitcher.flush()
    assert stitcher.held == 0
    assert parents({int.from_bytes(span.span_id, "big"): span for span in stitcher.take()})[9] == 7


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_very_deep_chain_is_one_trace(is_reversed):
    """A proxy that calls itself makes chains of any depth, the innermost reported first: no limit of recursion."""
    arrivals = []
    depth = 3000
    for number in range(1, depth, 2):
        arrivals.append(served(number, peer=number - 1, start=1000 + number / 100, end_ms=9000))
        arrivals.append(called(number + 1, thread=number, start=1000 + (number + 0.5) / 100, end_ms=8999))
    spans = stitch(arrivals[::-1] if is_reversed else arrivals)
    assert parents(spans) == {number: number - 1 for number in range(1, depth + 1)}


def test_a_very_deep_chain_without_its_root_is_one_trace():
    """The same when the outermost request was lost: decided by the watermark."""
    arrivals = []
    depth = 3000
    for number in range(1, depth, 2):
        arrivals.append(called(number + 1, thread=number, start=1000 + (number + 0.5) / 100, end_ms=8999))
        if number > 1:
            arrivals.append(served(number, peer=number - 1, start=1000 + number / 100, end_ms=9000))
    spans = stitch(arrivals[::-1])
    assert parents(spans) == {number: number - 1 for number in range(3, depth + 1)} | {2: 0}


@pytest.mark.parametrize("cycle", [[(1, 2), (2, 1)], [(1, 1)]])
def test_references_in_a_circle_end(cycle):
    """Numbers that refer to each other, which no sane kernel sends, become spans all the same."""
    arrivals = [
        served(number, peer=target) if number % 2 else called(number, thread=target) for number, target in cycle
    ]
    stitcher = make_stitcher()
    for one in arrivals:
        stitcher.add(*one)
    stitcher.advance(FAR_NS, FAR_NS)
    assert len(stitcher.take()) == len(arrivals)
    assert stitcher.held == 0


# -- memory


def test_memory_is_bounded_by_time():
    """What ended long ago is forgotten as the watermark moves."""
    stitcher = make_stitcher()
    for number in range(1, 5001):
        now = number * 10
        stitcher.add(*served(number, carried=INBOUND, request_id=str(number), start=now, end_ms=now + 1))
        stitcher.advance(now * MILLISECOND, now * MILLISECOND)
        stitcher.take()
    assert len(stitcher._recent) + len(stitcher._previous) <= 200
    assert sum(map(len, stitcher._served.values())) + sum(map(len, stitcher._served_before.values())) <= 400


def test_memory_is_bounded_in_number(monkeypatch):
    """A flood within one generation swaps it early."""
    monkeypatch.setattr(Stitcher, "_GENERATION_NODES", 100)
    stitcher = make_stitcher()
    stitcher.advance(1, 1)
    for number in range(1, 5001):
        stitcher.add(*served(number))
        if number % 10 == 0:
            stitcher.advance(2, 2)
    assert len(stitcher._recent) + len(stitcher._previous) <= 230


def test_processes_that_end_are_forgotten():
    """Nothing is kept of a process that is told to have ended."""
    stitcher = make_stitcher()
    stitcher.add(*served(1, response_tid=7))
    stitcher.forget_process(FRONT)
    assert not stitcher._servers
    assert not stitcher._migrating


def test_processes_are_bounded_even_when_nobody_tells():
    """A host that starts processes all day does not fill the memory."""
    stitcher = make_stitcher()
    for number in range(1, 100_001):
        stitcher.add(*served(number, process=(number, number), response_tid=1))
        if number % 1000 == 0:
            stitcher.advance(number * MILLISECOND, number * MILLISECOND)
            stitcher.take()
    assert len(stitcher._servers) <= 20_000
    assert len(stitcher._migrating) <= 20_000


# -- sampling


@pytest.mark.parametrize(("decision", "ratio"), [(False, 1.0), (True, 0.0)])
def test_a_decision_without_ids_holds_for_the_trace_that_begins(decision, ratio):
    """A request that only says whether to sample is obeyed, and so is everything that follows from it."""
    first, asked = served(1)
    stitcher = make_stitcher(sampler=Sampler(ratio))
    stitcher.add(first, msgspec.structs.replace(asked, decision=decision))
    stitcher.add(*called(2, thread=1))
    stitcher.advance(FAR_NS, FAR_NS)
    assert len(stitcher.take()) == (2 if decision else 0)
    assert stitcher.sampled_out == (0 if decision else 2)


def test_sampling_is_decided_once_per_trace():
    """The root's decision holds for the whole trace, even where a client below carries another flag."""
    unsampled, sampled = context(sampled=False), context(sampled=True)
    stitcher = make_stitcher()
    arrivals = [served(1, carried=unsampled), called(2, thread=1), served(3, peer=2, carried=sampled, process=BACK)]
    for one in arrivals:
        stitcher.add(*one)
    stitcher.advance(FAR_NS, FAR_NS)
    assert (stitcher.take(), stitcher.sampled_out, stitcher.held) == ([], 3, 0)


@settings(max_examples=50)
@given(st.permutations(WITHOUT_HEADERS), st.sampled_from([0.0, 1.0]))
def test_each_span_of_a_trace_is_sampled_out_once(arrivals, ratio):
    """Every exchange is either a span or counted, never both, in any order."""
    stitcher = make_stitcher(sampler=Sampler(ratio))
    for one in arrivals:
        stitcher.add(*one)
    stitcher.advance(FAR_NS, FAR_NS)
    stitcher.flush()
    kept = len(stitcher.take())
    assert (kept, stitcher.sampled_out) == ((9, 0) if ratio else (0, 9))


def test_half_of_the_traces_are_kept_whole():
    """With a ratio, a trace is kept or dropped as a whole."""
    stitcher = make_stitcher(sampler=Sampler(0.5), random_bytes=__import__("random").Random(1).randbytes)
    for number in range(1, 3001, 3):
        stitcher.add(*served(number))
        stitcher.add(*called(number + 1, thread=number))
        stitcher.add(*served(number + 2, peer=number + 1, process=BACK))
    stitcher.advance(FAR_NS, FAR_NS)
    spans = stitcher.take()
    sizes: dict[bytes, int] = {}
    for span in spans:
        sizes[span.trace_id] = sizes.get(span.trace_id, 0) + 1
    assert set(sizes.values()) == {3}
    assert 400 < len(sizes) < 600
    assert len(spans) + stitcher.sampled_out == 3000
