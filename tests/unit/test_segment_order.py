"""agent.protocols.segment_order: responses that overtook their requests wait for them, and nothing waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.model import Segment, SegmentFlag
from agent.protocols.segment_order import WAITING_NS, WAITING_SEGMENTS, SegmentOrder
from tests.unit.test_pipeline import segment

REQUEST, RESPONSE = 1, 2
OVERTAKES = int(SegmentFlag.OVERTAKES)


def overtaking(data: bytes, **fields: object) -> Segment:
    return segment(RESPONSE, data, flags=OVERTAKES, **fields)


def test_a_response_waits_for_the_request_that_it_overtook():
    order = SegmentOrder()
    response, rest, request = overtaking(b"r"), overtaking(b"s", offset=1), segment(REQUEST, b"q")
    assert [*order.arrange(response)] == []
    assert [*order.arrange(rest)] == []
    assert [*order.arrange(request)] == [request, response, rest]
    assert not order.waiting


def test_a_response_behind_the_write_ends_the_wait():
    """The write has been told of when a response is not marked any more: it had nothing to tell, or that was lost."""
    order = SegmentOrder()
    first, second = overtaking(b"r"), segment(RESPONSE, b"s", offset=1)
    order.arrange(first)
    assert [*order.arrange(second)] == [first, second]
    assert not order.waiting


def test_connections_wait_for_their_own_requests():
    order = SegmentOrder()
    one, other = overtaking(b"r", connection=1), overtaking(b"s", connection=2)
    order.arrange(one)
    order.arrange(other)
    request = segment(REQUEST, b"q", connection=2)
    assert [*order.arrange(request)] == [request, other]
    assert order.release(1) == [one]
    assert order.release(1) == []


def test_what_waits_is_bounded_in_number_and_time():
    order = SegmentOrder()
    segments = [overtaking(b"r", offset=index, time_ns=index) for index in range(WAITING_SEGMENTS + 1)]
    assert [released for one in segments for released in order.arrange(one)] == segments
    order.arrange(overtaking(b"r", time_ns=7))
    assert order.overdue(7 + WAITING_NS) == []
    assert order.overdue(8 + WAITING_NS) == [50]


@given(st.lists(st.tuples(st.sampled_from((1, 2)), st.sampled_from((REQUEST, RESPONSE)), st.booleans()), max_size=200))
def test_nothing_is_lost_and_no_direction_is_reordered(told):
    """Whatever the kernel says: each direction of each connection comes out as it went in."""
    order = SegmentOrder()
    sent = [
        segment(direction, b"x", offset=index, connection=connection, flags=OVERTAKES * (overtakes and direction == 2))
        for index, (connection, direction, overtakes) in enumerate(told)
    ]
    read = [one for piece in sent for one in order.arrange(piece)]
    for connection in (1, 2):
        read += order.release(connection)
    for connection in (1, 2):
        for direction in (REQUEST, RESPONSE):
            of = (connection, direction)
            assert [one for one in read if (one.connection_id, one.direction) == of] == [
                one for one in sent if (one.connection_id, one.direction) == of
            ]
