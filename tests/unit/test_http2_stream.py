"""agent.protocols.http2_stream and http2_frames: segments in any cut, gaps, late starts, limits; traffic made by h2."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, HeadersFrame, PushPromiseFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import End, Flag
from agent.propagation import FORMATS, Extractor
from agent.protocols import http2_frames, http2_stream
from agent.protocols.http2 import Http2
from tests.unit.frame_walk import FrameWalk
from tests.unit.http2_traffic import (
    CLIENT,
    GRPC_OK,
    OK,
    PREFACE,
    REQUEST,
    RESPONSE,
    SERVER,
    Conversation,
    Observed,
    Raw,
    asks,
    frames_of,
    get,
    grpc,
    message,
    raw,
    upgraded,
)

Log = list[tuple[int, bytes]]


# ---- Random conversations


class Expected:
    """What one request is, by its path, which no other request has."""

    def __init__(self, number: int, is_rpc: bool) -> None:
        self.path = f"/r.{number}/M"
        self.trace_id = random.Random(number).getrandbits(127) + 1
        self.is_rpc = is_rpc
        self.status: int | None = None
        self.asked_bytes = self.answered_bytes = 0
        self.asked_messages = self.answered_messages = 0
        self.reset = False


def converse(choice: random.Random, requests: int) -> tuple[Log, dict[str, Expected]]:
    """Multiplexed requests with bodies under flow control, padding, priorities, trailers, 1xx and resets."""
    conversation = Conversation()
    client, server = conversation.client, conversation.server
    if choice.random() < 0.5:
        size = choice.choice([0, 100, 4096, 16384])
        server.update_settings({SettingCodes.HEADER_TABLE_SIZE: size, SettingCodes.MAX_FRAME_SIZE: 20000})
        client.update_settings({SettingCodes.HEADER_TABLE_SIZE: choice.choice([0, 100, 8192])})
        conversation.exchange()
    expected: dict[str, Expected] = {}
    waiting: list[tuple[int, Expected]] = []
    number = 0
    while number < requests or waiting:
        if number < requests and (not waiting or choice.random() < 0.5):
            number += 1
            made = Expected(number, choice.random() < 0.5)
            expected[made.path] = made
            headers = grpc(made.path) if made.is_rpc else get(made.path, "POST")
            headers.append(("traceparent", f"00-{made.trace_id:032x}-{number:016x}-01"))
            for _ in range(choice.randrange(4)):
                headers.append((f"x-{choice.randrange(20)}", "v" * choice.choice([1, 30, 300])))
            if choice.random() < 0.05:
                headers.append(("x-large", "".join(choice.choices("abcdefgh", k=20000))))  # takes CONTINUATION
            stream = client.get_next_available_stream_id()
            priority = {"priority_weight": 7, "priority_depends_on": 0} if choice.random() < 0.3 else {}
            client.send_headers(stream, headers, **priority)
            for _ in range(choice.randrange(3)):
                body = message(choice.choice([0, 1, 300, 3000]))
                made.asked_messages += 1
                made.asked_bytes += len(body)
                cut = choice.randrange(len(body) + 1)
                pad = choice.choice([None, 0, 17])
                client.send_data(stream, body[:cut], pad_length=pad)
                client.send_data(stream, body[cut:], pad_length=pad)
                conversation.flush_client()
                server.acknowledge_received_data(2 * (pad or 0) + len(body) + 2 * (pad is not None), stream)
            if choice.random() < 0.2:
                client.send_headers(stream, [("x-trailer", "1")], end_stream=True)
            else:
                client.end_stream(stream)
            waiting.append((stream, made))
        else:
            stream, made = waiting.pop(choice.randrange(len(waiting)))
            conversation.flush_client()
            if choice.random() < 0.1:
                made.reset = True
                (client if choice.random() < 0.5 else server).reset_stream(stream, ErrorCodes.INTERNAL_ERROR)
                conversation.exchange()
                continue
            if choice.random() < 0.2:
                server.send_headers(stream, [(":status", "103"), ("link", "</a>")])
            made.status = choice.choice([200, 200, 201, 404, 503])
            server.send_headers(stream, [(":status", str(made.status)), ("server", f"s{choice.randrange(9)}")])
            for _ in range(choice.randrange(3)):
                body = message(choice.choice([0, 1, 700, 3000]))
                made.answered_messages += 1
                made.answered_bytes += len(body)
                server.send_data(stream, body, pad_length=choice.choice([None, 0, 100]))
                if choice.random() < 0.5:
                    conversation.flush_server()
            if choice.random() < 0.5:
                server.send_headers(stream, [("grpc-status", "0"), ("x-sum", str(number))], end_stream=True)
            else:
                server.end_stream(stream)
            conversation.flush_server()
            for connection in (client, server):  # open the windows again
                connection.increment_flow_control_window(20000)
        if choice.random() < 0.4:
            conversation.exchange()
    conversation.exchange()
    return conversation.log, expected


def summary(observed: Observed) -> list[tuple[object, ...]]:
    """What must not depend on how the bytes were cut."""
    return [
        (exchange.request_bytes, exchange.response_bytes, exchange.end, call.name, call.context, call.all_attributes())
        for exchange, call in observed.results
    ]


def check_all(observed: Observed, expected: dict[str, Expected]) -> None:
    """Every request is there with exactly what it had."""
    assert observed.losses.reasons == {}
    assert (observed.connection.lost, observed.connection.outstanding) == (0, 0)
    assert len(observed.results) == len(expected)
    check_some(observed, expected)
    for exchange, call in observed.results:
        made = expected[path_of(call)]
        values = dict(call.all_attributes())
        assert exchange.request_bytes == made.asked_bytes
        assert exchange.response_bytes == made.answered_bytes
        assert call.context is not None
        if made.is_rpc:
            assert values["spanloom.rpc.request.messages"] == made.asked_messages
            assert values["spanloom.rpc.response.messages"] == made.answered_messages
        elif not made.reset:
            assert values["http.response.status_code"] == made.status
            assert values["http.response.body.size"] == made.answered_bytes


def check_some(observed: Observed, expected: dict[str, Expected]) -> None:
    """Whatever was lost: what is stated is true, and no request is there twice."""
    paths = [path_of(call) for call in observed.calls]
    assert len(set(paths)) == len(paths)
    for (exchange, call), path in zip(observed.results, paths, strict=True):
        made = expected[path]
        values = dict(call.all_attributes())
        if call.context is not None:
            assert int.from_bytes(call.context.trace_id) == made.trace_id
        assert values.get("http.response.status_code") in (None, made.status)
        assert values.get("http.response.body.size") in (None, made.answered_bytes)
        assert values.get("http.request.body.size") in (None, made.asked_bytes)
        if not made.reset and call.complete:
            assert values.get("spanloom.rpc.request.messages") in (None, made.asked_messages)
            assert values.get("spanloom.rpc.response.messages") in (None, made.answered_messages)
        assert exchange.request_bytes <= made.asked_bytes
        assert exchange.response_bytes <= made.answered_bytes


def path_of(call) -> str:
    values = dict(call.all_attributes())
    if "rpc.method" in values:
        return "/" + values.get("rpc.method_original", values["rpc.method"])
    return values["url.path"]


def cut(log: Log, choice: random.Random, largest: int) -> Log:
    """The same bytes in other segments; the order of the directions stays."""
    pieces = []
    for direction, data in log:
        while data:
            size = choice.randint(1, largest)
            pieces.append((direction, data[:size]))
            data = data[size:]
    return pieces


def check_within_limits(observed: Observed) -> None:
    connection = observed.connection
    assert connection.outstanding <= http2_stream.OPEN_STREAMS
    for reader in (connection._requests, connection._responses):
        assert reader.buffered_bytes <= 2 * http2_frames.BLOCK_BYTES + 300
    for decoder in (connection._request_fields, connection._response_fields):
        assert decoder.table_bytes <= 16384
        assert len(decoder.repeats) <= 64


@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1, 5, 9, 40, 1000]))
@settings(max_examples=80, deadline=None)
def test_any_segmentation_reads_the_same(seed, requests, largest) -> None:
    """Whole, or cut at any byte, every request is read with all that it had."""
    log, expected = converse(random.Random(seed), requests)
    whole, pieces = Observed(), Observed()
    for direction, data in log:
        whole.see(direction, data)
    check_all(whole, expected)
    for direction, data in cut(log, random.Random(seed), largest):
        pieces.see(direction, data)
        check_within_limits(pieces)
    check_all(pieces, expected)
    assert summary(pieces) == summary(whole)


@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_what_the_kernel_leaves_out_does_no_harm(seed, requests) -> None:
    """With every DATA payload left out but its first bytes, only the counts of messages may be missing."""
    choice = random.Random(seed)
    log, expected = converse(choice, requests)
    observed = Observed()
    whole: dict[int, bytes] = {REQUEST: b"", RESPONSE: b""}
    for direction, data in log:
        whole[direction] += data
    assert all(b"".join(frames_of(data)) == data for data in whole.values())
    for direction, data in log:
        for frame in frames_of(data):
            is_data = frame[3] == 0 and frame != PREFACE
            kept = 9 + choice.choice([0, 1, 5, 6, 14]) if is_data else len(frame)
            observed.see(direction, frame[:kept], max(len(frame) - kept, 0))
    assert observed.losses.reasons == {}
    assert observed.connection.lost == 0
    assert len(observed.results) == len(expected)
    for call in observed.calls:
        made = expected[path_of(call)]
        values = dict(call.all_attributes())
        if not made.is_rpc and not made.reset:
            assert values["http.response.status_code"] == made.status
            assert values.get("http.response.body.size") in (None, made.answered_bytes)
        for name, count in (("request", made.asked_messages), ("response", made.answered_messages)):
            assert values.get(f"spanloom.rpc.{name}.messages") in (None, count)


@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([9, 40, 300, 5000]), st.sampled_from([0.02, 0.2]))
@settings(max_examples=150, deadline=None)
def test_gaps_never_make_anything_up(seed, requests, largest, rate) -> None:
    """Bytes are missing anywhere: no exception, nothing false, no request twice, nothing beyond the limits."""
    choice = random.Random(seed)
    log, expected = converse(choice, requests)
    observed = Observed()
    missing = {REQUEST: 0, RESPONSE: 0}
    for direction, data in cut(log, choice, largest):
        if choice.random() < rate:
            if choice.random() < 0.5:  # the segment's end was not captured
                kept = choice.randrange(len(data))
                observed.see(direction, data[:kept], len(data) - kept, before=missing[direction])
                missing[direction] = 0
            else:  # the segment was lost
                missing[direction] += len(data)
        else:
            observed.see(direction, data, before=missing[direction])
            missing[direction] = 0
        check_within_limits(observed)
    observed.close()
    check_some(observed, expected)
    assert len(observed.results) + observed.connection.lost <= len(expected)


@given(st.integers(0, 2**32), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_a_connection_that_is_older_than_the_agent(seed, requests) -> None:
    """The log begins anywhere: what is read is true, and the rest is counted."""
    choice = random.Random(seed)
    log, expected = converse(choice, requests)
    observed = Observed()
    for direction, data in log[choice.randrange(len(log)) :]:
        observed.see(direction, data)
        check_within_limits(observed)
    observed.close()
    check_some(observed, expected)


def walked(log: Log, choice: random.Random, largest: int) -> Iterator[tuple[int, bytes, int, int, int]]:
    """(direction, offset, data, length, flags) of the segments that the kernel makes of the log, cut into transfers."""
    walks = {REQUEST: FrameWalk(begins=True), RESPONSE: FrameWalk(begins=False)}
    for direction, data in cut(log, choice, largest):
        for offset, captured, length, flags in walks[direction].transfer(data):
            yield direction, offset, captured, length, flags


@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1, 7, 40, 600, 5000, 100_000]))
@settings(max_examples=100, deadline=None)
def test_what_the_kernel_forwards_is_enough(seed, requests, largest) -> None:
    """Whatever the transfers are, nothing is lost, and sizes are exact; only the counts of messages may be missing."""
    log, expected = converse(random.Random(seed), requests)
    observed = Observed()
    for direction, offset, data, length, flags in walked(log, random.Random(seed), largest):
        before = offset - observed.offsets[direction]
        observed.see(direction, data, length - len(data), before, flags)
        check_within_limits(observed)
    assert observed.losses.reasons == {}
    assert observed.connection.lost == 0
    assert len(observed.results) == len(expected)
    for call in observed.calls:
        made = expected[path_of(call)]
        values = dict(call.all_attributes())
        if not made.is_rpc and not made.reset:
            assert values["http.response.status_code"] == made.status
            assert values.get("http.response.body.size") in (None, made.answered_bytes)
        for name, count in (("request", made.asked_messages), ("response", made.answered_messages)):
            assert values.get(f"spanloom.rpc.{name}.messages") in (None, count)


@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([40, 600, 5000]), st.sampled_from([0.02, 0.2]))
@settings(max_examples=100, deadline=None)
def test_lost_segments_never_make_anything_up(seed, requests, largest, rate) -> None:
    """Where the ring buffer was full, what is handed out is true, and no request is counted twice."""
    choice = random.Random(seed)
    log, expected = converse(choice, requests)
    observed = Observed()
    for direction, offset, data, length, flags in walked(log, choice, largest):
        if choice.random() >= rate:
            before = offset - observed.offsets[direction]
            observed.see(direction, data, length - len(data), before, flags)
            check_within_limits(observed)
    observed.close()
    check_some(observed, expected)
    assert len(observed.results) + observed.connection.lost <= len(expected)


# ---- Late starts and gaps, one by one


def late(requests: list, skip: int, answered=OK) -> Observed:
    """A conversation of which the first ``skip`` requests were not seen."""
    conversation = Conversation()
    for headers in requests[:skip]:
        conversation.answer(conversation.ask(headers), answered)
    conversation.log.clear()
    for headers in requests[skip:]:
        conversation.answer(conversation.ask(headers), answered)
    return conversation.show(Observed())


def test_a_late_start_drops_what_it_cannot_know_and_recovers() -> None:
    """A path that is only in the unseen table is not known; a new path is, and is from then on."""
    observed = late([get("/old"), get("/old"), get("/new"), get("/old"), get("/new")], 1)
    assert [value["url.path"] for value in observed.values] == ["/new", "/new"]
    assert observed.connection.lost == 2
    assert observed.losses.reasons == {"header_unknown": 2}


def test_a_late_start_leaves_out_what_it_cannot_know() -> None:
    """The authority is in the unseen table: neither a server nor a URL is made up."""
    values = late([get("/a"), get("/b")], 1).only()[2]
    assert values["url.path"] == "/b"
    assert "server.address" not in values
    conversation = Conversation()
    conversation.answer(conversation.ask(get("/a")), OK)
    conversation.log.clear()
    conversation.answer(conversation.ask(get("/b")), OK)
    values = conversation.show(Observed(CLIENT)).only()[2]
    assert "url.full" not in values
    assert values["server.address"] == "10.0.0.9"
    assert values["network.peer.address"] == "10.0.0.9"


def test_a_late_start_knows_a_call_by_its_response() -> None:
    """The request's content-type is unknown; trailers with grpc-status make it a call of gRPC."""
    conversation = Conversation()
    conversation.answer(conversation.ask(grpc("/a.B/Old"), message(1)), OK)
    conversation.log.clear()
    stream = conversation.ask(grpc("/a.B/New"), message(1))
    conversation.answer(stream, GRPC_OK, message(2), [("grpc-status", "5")])
    _, call, values = conversation.show(Observed()).only()
    assert (call.name, values["rpc.response.status_code"]) == ("a.B/New", "NOT_FOUND")
    assert values["spanloom.rpc.request.messages"] == 1
    assert "server.address" not in values


def test_a_late_start_does_not_make_up_a_status() -> None:
    """A status that is in the unseen table: a span without it, and without an error."""
    observed = late([get("/a"), get("/b")], 1, [(":status", "418")])
    _, call, values = observed.only()
    assert "http.response.status_code" not in values
    assert (call.error, call.complete) == (False, True)


def test_a_late_start_in_the_middle_of_a_frame() -> None:
    """Bytes that begin no frame are passed over, counted once, until a segment that does."""
    made = Raw()
    observed = Observed()
    for _ in range(3):
        observed.see(REQUEST, b"the middle of an upload, in text")
    observed.see_frame(REQUEST, made.headers(REQUEST, 9, get("/x"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 9, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/x"
    assert observed.losses.reasons == {"mid_stream": 1}
    assert observed.connection.lost == 0


def test_responses_to_requests_that_were_not_seen_are_counted() -> None:
    """They make no exchange."""
    made = Raw()
    observed = Observed().see(RESPONSE, made.headers(RESPONSE, 7, OK, "END_STREAM"))
    assert observed.results == []
    assert observed.losses.unmatched_responses == 1


def test_trailers_of_a_request_that_was_not_seen_are_no_request() -> None:
    """A header block without pseudo-header fields begins nothing and loses nothing."""
    made = Raw()
    observed = Observed().see(REQUEST, made.headers(REQUEST, 7, [("x-sum", "1")], "END_STREAM"))
    assert (observed.connection.outstanding, observed.connection.lost, observed.losses.reasons) == (0, 0, {})


def opened(*paths: str) -> tuple[Raw, Observed]:
    """A connection with open requests."""
    made = Raw()
    observed = Observed().see(REQUEST, PREFACE)
    for number, path in enumerate(paths):
        observed.see(REQUEST, made.headers(REQUEST, 2 * number + 1, get(path), "END_STREAM"))
    return made, observed


@pytest.mark.parametrize("direction", [REQUEST, RESPONSE])
def test_a_gap_between_frames_loses_what_is_open(direction) -> None:
    """What ended in the gap cannot be known; later requests are read again, at a segment that begins with a frame."""
    made, observed = opened("/a", "/b")
    observed.see(RESPONSE, raw(4, 0, 0, b""))
    observed.see(direction, b"", gap=50).see(direction, b"\x00\x00\x10 no frame at all")
    assert (observed.connection.lost, observed.connection.outstanding) == (2, 0)
    assert observed.losses.reasons == {"gap": 1}
    observed.see_frame(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert (observed.results, observed.losses.unmatched_responses) == ([], 0)
    observed.see_frame(REQUEST, made.headers(REQUEST, 5, get("/c"), "END_STREAM"))
    observed.see_frame(RESPONSE, made.headers(RESPONSE, 5, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/c"


@pytest.mark.parametrize("way", ["lost", "cut", "passed over"])
def test_requests_are_lost_when_their_responses_may_have_been(way) -> None:
    """A direction that is lost misses more: what is left of a response must not be taken for all of it."""
    made, observed = opened("/a")
    observed.see(RESPONSE, raw(4, 0, 0, b"")).see(RESPONSE, b"", gap=50)
    observed.see(REQUEST, made.headers(REQUEST, 3, get("/b"), "END_STREAM"))
    assert observed.connection.outstanding == 1
    response = made.headers(RESPONSE, 3, OK) + raw(0, 0, 3, b"body")
    if way == "cut":
        observed.see(RESPONSE, b"", gap=len(response))
    elif way == "passed over":
        observed.see(RESPONSE, b"\xff" + response)
    trailers = made.headers(RESPONSE, 3, [("x-sum", "1")], "END_STREAM")
    observed.see(RESPONSE, trailers, before=len(response) if way == "lost" else 0)
    assert (observed.results, observed.connection.lost, observed.connection.outstanding) == ([], 2, 0)


def test_a_lost_segment_is_a_gap_in_front_of_the_next() -> None:
    """The segment behind it may begin with a frame at once."""
    made, observed = opened("/a")
    observed.see_frame(REQUEST, made.headers(REQUEST, 3, get("/b"), "END_STREAM"), before=30)
    observed.see_frame(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/b"
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"gap": 1})


def test_a_segment_that_begins_within_a_frame_is_no_place_to_begin_again() -> None:
    """It may look like a frame all the same: a header block, or what an upload has in it. The kernel knows better."""
    made, observed = opened("/a")
    observed.see(REQUEST, b"", gap=30)
    observed.see(REQUEST, made.headers(REQUEST, 3, get("/no-request"), "END_STREAM"))
    observed.see_frame(REQUEST, made.headers(REQUEST, 5, get("/b"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 5, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/b"]


def test_a_frame_that_begins_where_none_was_due_loses_what_is_open() -> None:
    """Segments were lost that seemed to lie within a frame, and did not: what follows them is read."""
    made, observed = opened("/a")
    observed.see_frame(REQUEST, raw(0, 0, 1, bytes(5000))[:25], gap=3000)
    observed.see_frame(REQUEST, made.headers(REQUEST, 3, get("/b"), "END_STREAM"), before=1900)
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/b"]
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"gap": 1})


def test_a_gap_in_a_header_block_loses_that_request_only() -> None:
    """Framing is kept: other streams go on. What later blocks refer to in the lost one is unknown."""
    made, observed = opened("/a")
    block = made.headers(REQUEST, 3, get("/b"), "END_STREAM")
    observed.see(REQUEST, block[:12], gap=len(block) - 12)
    observed.see(REQUEST, made.headers(REQUEST, 5, get("/b"), "END_STREAM"))
    observed.see(REQUEST, made.headers(REQUEST, 7, get("/c"), "END_STREAM"))
    for stream in (1, 3, 5, 7):
        observed.see(RESPONSE, made.headers(RESPONSE, stream, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/a", "/c"]
    assert observed.connection.lost == 2
    assert observed.losses.reasons == {"gap": 1, "header_unknown": 1}
    assert observed.losses.unmatched_responses == 0


def test_a_gap_in_a_response_block_loses_its_status_only() -> None:
    """The request is known, and that it was answered."""
    made, observed = opened("/a", "/b")
    block = made.headers(RESPONSE, 1, OK, "END_STREAM")
    observed.see(RESPONSE, block[:9], gap=len(block) - 9)
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert [value.get("http.response.status_code") for value in observed.values] == [None, 200]
    assert all(call.complete and not call.error for call in observed.calls)


def test_a_lost_interim_response_is_not_taken_for_the_final_one() -> None:
    """The block that has a status is the response."""
    made, observed = opened("/a")
    block = made.headers(RESPONSE, 1, [(":status", "103")])
    observed.see(RESPONSE, block[:9], gap=len(block) - 9)
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["http.response.status_code"] == 200


def test_a_gap_in_settings_is_taken_for_the_worst() -> None:
    """The other direction may use a larger table and larger frames from then on."""
    made, observed = opened("/a")
    observed.see(RESPONSE, raw(4, 0, 0, bytes(6))[:9], gap=6)
    made.encoders[REQUEST].header_table_size = 9000
    observed.see(REQUEST, made.headers(REQUEST, 3, get("/b"), "END_STREAM"))
    observed.see(REQUEST, raw(0xFE, 0, 0, bytes(17000)))
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/b"
    assert observed.losses.reasons == {}


def test_a_lost_response_block_is_not_in_the_table() -> None:
    """What it added is unknown: later blocks do not get the fields of others."""
    made, observed = opened("/a", "/b", "/c")
    observed.connection.use(Http2(extractor=Extractor(FORMATS), response_headers=["x-a"]))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [*OK, ("x-a", "1")], "END_STREAM"))
    block = made.headers(RESPONSE, 3, [*OK, ("x-a", "2")], "END_STREAM")
    observed.see(RESPONSE, block[:9], gap=len(block) - 9)
    observed.see(RESPONSE, made.headers(RESPONSE, 5, [*OK, ("x-a", "2")], "END_STREAM"))
    assert [value.get("http.response.header.x-a") for value in observed.values] == [("1",), None, None]


def test_settings_in_a_gap_may_have_allowed_anything() -> None:
    """Framing of the responses is lost, and with it perhaps the server's settings."""
    made, observed = opened()
    observed.see(RESPONSE, raw(4, 0, 0, b"")).see(RESPONSE, b"", gap=100)
    made.encoders[REQUEST].header_table_size = 9000
    observed.see_frame(REQUEST, made.headers(REQUEST, 1, get("/a")) + raw(0, 1, 1, bytes(17000)))
    observed.see_frame(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["http.request.body.size"] == 17000


def test_more_settings_than_are_read() -> None:
    """A kilobyte of them is read; what lies behind may have allowed anything."""
    made, observed = opened()
    observed.see(RESPONSE, raw(4, 0, 0, b"\0\x99\0\0\0\0" * 200))
    made.encoders[REQUEST].header_table_size = 9000
    observed.see(REQUEST, made.headers(REQUEST, 1, get("/a"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/a"


def test_an_answer_before_the_end_of_the_request_leaves_its_messages_open() -> None:
    """Whether more was sent is not known; the answer is whole all the same."""
    made = Raw()
    observed = Observed().see(REQUEST, PREFACE + made.headers(REQUEST, 1, grpc()) + raw(0, 0, 1, message(1)))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [*GRPC_OK, ("grpc-status", "0")], "END_STREAM"))
    _, call, values = observed.only()
    assert (call.complete, values["rpc.response.status_code"]) == (True, "OK")
    assert "spanloom.rpc.request.messages" not in values
    assert values["spanloom.rpc.response.messages"] == 0


def test_a_gap_over_the_length_of_padding() -> None:
    """Then nobody knows how many bytes were data: no size is stated, and messages are not counted."""
    made, observed = opened("/a")
    frame = raw(0, 0x9, 1, b"\4abc" + bytes(4))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK) + frame[:9], gap=3).see(RESPONSE, frame[-5:])
    exchange, _, values = observed.only()
    assert exchange.response_bytes == 0
    assert "http.response.body.size" not in values


def test_bytes_that_were_seen_before_are_counted_and_ignored() -> None:
    """A segment that overlaps its predecessor adds only what is new."""
    made, observed = opened()
    block = made.headers(REQUEST, 1, get("/a"), "END_STREAM")
    observed.see(REQUEST, block)
    observed.offsets[REQUEST] -= 10
    observed.see(REQUEST, block[-10:] + made.headers(REQUEST, 3, get("/b"), "END_STREAM"))
    for stream in (1, 3):
        observed.see(RESPONSE, made.headers(RESPONSE, stream, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/a", "/b"]
    assert observed.losses.overlapping_bytes == 10


@pytest.mark.parametrize(
    "frame",
    [
        raw(0, 0, 0, b"x"),  # DATA on stream 0
        raw(4, 0, 1, b""),  # SETTINGS on a stream
        raw(4, 0, 0, b"12345"),
        raw(4, 1, 0, bytes(6)),  # an acknowledgement with settings
        raw(6, 0, 0, b"short"),
        raw(3, 0, 1, b"x"),
        raw(7, 0, 0, b"short"),
        raw(9, 4, 1, b""),  # CONTINUATION of nothing
        raw(1, 0, 3, b"") + raw(0, 0, 1, b"x"),  # something else than CONTINUATION
        raw(1, 0, 3, b"") + raw(9, 4, 5, b""),  # CONTINUATION of another stream
        raw(0, 8, 1, b"\xff123"),  # more padding than payload
        raw(0, 8, 1, b""),
        raw(1, 12, 3, b"\xff123"),
        raw(1, 0x24, 3, b"1234"),  # no room for the priority
        raw(0xFE, 0, 0, bytes(17000)),  # larger than was agreed
        raw(0, 0, 1, bytes(17000)),
    ],
    ids=range(16),
)
def test_a_malformed_frame_loses_the_connections_state(frame) -> None:
    """An endpoint would close the connection (RFC 9113 section 5.4.1); here it is lost, counted, and read again."""
    made, observed = opened("/a")
    observed.see(RESPONSE, raw(4, 0, 0, b""))
    observed.see(REQUEST, frame)
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"malformed": 1})
    observed.see_frame(REQUEST, made.headers(REQUEST, 9, get("/z"), "END_STREAM"))
    observed.see_frame(RESPONSE, made.headers(RESPONSE, 9, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/z"


@pytest.mark.parametrize(
    "headers",
    [
        [(":method", "GET")],
        [(":path", "/")],
        get("no-slash"),
        get("/ "),
        get("/", "G T"),
        get("/", "M" * 33),
        get(scheme="1http"),
        [*get(), (":path", "/two")],
        [(":method", "CONNECT"), (":authority", "no-port")],
        [(":method", "CONNECT")],
    ],
    ids=range(10),
)
def test_a_malformed_request_is_lost_alone(headers) -> None:
    """Neither the connection nor other streams suffer (RFC 9113 section 8.1.1)."""
    made, observed = opened("/a")
    observed.see(REQUEST, made.headers(REQUEST, 3, headers, "END_STREAM"))
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"malformed": 1})
    for stream in (1, 3):
        observed.see(RESPONSE, made.headers(RESPONSE, stream, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/a"
    assert observed.losses.unmatched_responses == 0


def test_a_malformed_block_loses_its_request_and_the_table() -> None:
    """The stream is dropped, framing goes on."""
    _, observed = opened("/a")
    observed.see(REQUEST, raw(1, 5, 3, b"\x80"))
    observed.see(RESPONSE, raw(1, 5, 1, b"\x80"))
    _, call, values = observed.only()
    assert (values["url.path"], "http.response.status_code" in values, call.complete) == ("/a", False, True)
    assert observed.losses.reasons == {"malformed": 2}


# ---- Frames that are read over


def test_other_frames_change_nothing() -> None:
    """PRIORITY, PING, WINDOW_UPDATE, ALTSVC, ORIGIN and what nobody knows yet, also in the server's first segment."""
    made = Raw()
    noise = raw(2, 0, 1, bytes(5)) + raw(6, 0, 0, bytes(8)) + raw(8, 0, 0, bytes(4)) + raw(8, 0, 1, bytes(4))
    noise += raw(10, 0, 0, b"altsvc") + raw(12, 0, 0, b"origin") + raw(0xFA, 0, 77, b"grease")
    observed = Observed().see(REQUEST, PREFACE + raw(4, 0, 0, b"") + noise)
    observed.see(RESPONSE, raw(4, 0, 0, b"") + noise)
    observed.see(REQUEST, noise + made.headers(REQUEST, 1, get("/a"), "END_STREAM") + noise)
    observed.see(RESPONSE, noise + made.headers(RESPONSE, 1, OK, "END_STREAM") + noise)
    assert observed.only()[2]["url.path"] == "/a"
    assert observed.losses.reasons == {}


def test_pushed_responses_make_no_exchange_and_keep_the_table_in_step() -> None:
    """A promise adds to the table of the responses' direction; the pushed stream itself is nobody's request."""
    made, observed = opened("/a")
    promise = PushPromiseFrame(1, 2, made.encoders[RESPONSE].encode([*get("/pushed"), ("x-a", "1")]))
    promise.flags.add("END_HEADERS")
    observed.see(RESPONSE, promise.serialize())
    observed.see(RESPONSE, made.headers(RESPONSE, 2, OK) + raw(0, 1, 2, b"pushed"))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, [*OK, ("x-a", "1")], "END_STREAM"))
    exchange, _, values = observed.only()
    assert (values["url.path"], values["http.response.status_code"], exchange.response_bytes) == ("/a", 200, 0)
    assert observed.losses.reasons == {}


def test_a_servers_settings_may_come_first() -> None:
    """Over TLS servers do not wait for the preface; what they allow holds for the requests."""
    made = Raw()
    observed = Observed().see(RESPONSE, raw(4, 0, 0, b"\0\1\0\0\x40\0" + b"\0\5\0\xff\xff\xff"))
    made.encoders[REQUEST].header_table_size = 16384
    observed.see(REQUEST, PREFACE + made.headers(REQUEST, 1, get("/a")) + raw(0, 1, 1, bytes(70000)))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["http.request.body.size"] == 70000
    assert observed.losses.reasons == {}


def test_an_upgrade_whose_beginning_was_lost() -> None:
    """After 101 (h2c) stream 1 is the request that HTTP/1 carried: its response has no request here."""
    made = Raw()
    observed = Observed().see(RESPONSE, raw(4, 0, 0, b"") + made.headers(RESPONSE, 1, OK, "END_STREAM"))
    observed.see(REQUEST, PREFACE + raw(4, 0, 0, b""))
    observed.see(REQUEST, made.headers(REQUEST, 3, get("/a"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/a"
    assert (observed.losses.unmatched_responses, observed.losses.reasons) == (1, {})


# ---- Behind an upgrade


@pytest.mark.parametrize("first", [REQUEST, RESPONSE])
def test_a_request_that_upgrades_is_stream_1(first: int) -> None:
    """Its answer is the one on stream 1, whichever side begins; ids and times are those of the exchange."""
    made = Raw()
    observed = Observed().take_over(upgraded(asks(), peer_id=5, flags=int(Flag.FIRST | Flag.PROCESS_UNKNOWN)))
    assert observed.connection.outstanding == 1
    answer = raw(4, 0, 0, b"") + made.headers(RESPONSE, 1, OK) + raw(0, 1, 1, b"hello")
    opening = PREFACE + raw(4, 0, 0, b"") + made.headers(REQUEST, 3, get("/b"), "END_STREAM")
    for direction in (first, REQUEST + RESPONSE - first):
        observed.see(direction, opening if direction == REQUEST else answer)
    exchange, call = observed.results[0]
    assert (exchange.exchange_id, exchange.peer_id, exchange.connection_id) == (77, 5, 7)
    assert (exchange.request_start_ns, exchange.request_end_ns) == (10, 12)
    assert exchange.response_start_ns == exchange.end_ns == (22 if first == REQUEST else 21)
    assert exchange.flags & Flag.PROCESS_UNKNOWN
    assert (call.name, call.error, call.complete) == ("GET", False, True)
    values = dict(call.all_attributes())
    assert values["network.protocol.version"] == "2"
    assert (values["url.path"], values["server.address"], values["server.port"]) == ("/a", "a.example", 8080)
    assert (values["http.response.status_code"], values["http.response.body.size"]) == (200, 5)
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert [values["url.path"] for values in observed.values] == ["/a", "/b"]
    assert observed.results[1][0].exchange_id != 77
    assert (observed.losses.unmatched_responses, observed.losses.reasons, observed.connection.lost) == (0, {}, 0)


def test_an_upgrade_that_h2_makes() -> None:
    """A client and a server that are not ours, whose header tables go on from stream 1 to the next ones."""
    conversation = Conversation(upgrades=True)
    conversation.answer(1, [*OK, ("x-a", "1" * 200)])
    stream = conversation.ask(get("/b"))
    conversation.answer(stream, [*OK, ("x-a", "1" * 200)], b"hello")
    settings = conversation.settings.decode()
    for cut in (1, 7, 1 << 20):
        observed = Observed(response_headers=["x-a"]).take_over(upgraded(asks(settings=settings)))
        for direction, data in conversation.log:
            for start in range(0, len(data), cut):
                observed.see(direction, data[start : start + cut])
        assert [values["url.path"] for values in observed.values] == ["/a", "/b"]
        assert {values["http.response.header.x-a"] for values in observed.values} == {("1" * 200,)}
        assert (observed.losses.unmatched_responses, observed.losses.reasons) == (0, {})


def test_the_settings_of_an_upgrade_hold_for_the_response() -> None:
    """HTTP2-Settings counts as the client's first SETTINGS frame (RFC 7540 section 3.2.1)."""
    made = Raw()
    made.encoders[RESPONSE].header_table_size = 16384
    payload = b"\0\1\0\0\x40\0" + b"\0\5\0\xff\xff\xff"
    settings = base64.urlsafe_b64encode(payload).decode().rstrip("=")
    observed = Observed().take_over(upgraded(asks(settings=settings)))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK) + raw(0, 1, 1, bytes(70000)))
    assert observed.only()[2]["http.response.body.size"] == 70000
    assert observed.losses.reasons == {}


@pytest.mark.parametrize("settings", ["!", "AAM", "AAMAAABkAAQ", "\xff"])
def test_settings_that_cannot_be_read_are_unknown(settings: str) -> None:
    """Then everything is allowed, and the request is read all the same."""
    made = Raw()
    made.encoders[RESPONSE].header_table_size = 16384
    observed = Observed().take_over(upgraded(asks(settings=settings)))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK)).see(RESPONSE, raw(0, 1, 1, bytes(70000)))
    assert observed.only()[2]["http.response.body.size"] == 70000


@pytest.mark.parametrize(
    ("head", "body_bytes", "size"),
    [
        (asks(method="POST", target="/p"), 0, None),
        (asks("/p", "Content-Length: 300", method="POST"), 300, 300),
        (asks("/p", "Content-Length: 300", method="POST"), 200, None),
        (asks("/p", "Transfer-Encoding: chunked", method="POST"), 310, None),
        (asks("*", "Content-Length: 7", method="OPTIONS"), 7, 7),
    ],
)
def test_the_body_of_a_request_that_upgrades(head: bytes, body_bytes: int, size: int | None) -> None:
    """Its size is told where Content-Length does and all of it was seen."""
    made = Raw()
    observed = Observed().take_over(upgraded(head, request_bytes=len(head) + body_bytes))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2].get("http.request.body.size") == size


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("/a?b=c", "http://a.example:8080/a?b=c"),
        ("http://b.example/x", "http://b.example/x"),
        ("http://user:word@b.example?x", "http://b.example/?x"),
        ("*", "http://a.example:8080"),
    ],
)
def test_targets_of_requests_that_upgrade(target: str, url: str) -> None:
    """The absolute form names the authority, without whatever user stands in it."""
    made = Raw()
    observed = Observed(CLIENT).take_over(upgraded(asks(target), CLIENT))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[2]["url.full"] == url


def test_a_request_that_upgrades_carries_its_context() -> None:
    """traceparent is read as from any head."""
    head = asks("/a", "Traceparent: 00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01")
    made = Raw()
    observed = Observed().take_over(upgraded(head))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    assert observed.only()[1].context.trace_id.hex() == "0123456789abcdef0123456789abcdef"


def test_a_head_that_was_cut_before_an_upgrade() -> None:
    """What was captured is read, and it is said that there was more; the next one with the same head is not cut."""
    made, head = Raw(), asks("/a", "X-Long: " + "x" * 100)
    cut = upgraded(head[:-50], request_bytes=len(head), flags=int(Flag.FIRST | Flag.REQUEST_TRUNCATED))
    protocol = Http2(extractor=Extractor(FORMATS))
    for exchange, is_cut in ((cut, True), (upgraded(head), None)):
        made = Raw()
        observed = Observed(protocol=protocol).take_over(exchange)
        observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
        values = observed.only()[2]
        assert values["url.path"] == "/a"
        assert values.get("spanloom.request.head_truncated") == is_cut


@pytest.mark.parametrize("request_bytes", [b"", b"\0\1\2\3", b"GET  HTTP/1.1\r\n\r\n", b"GET /a b\r\n\r\n", b"G /a"])
def test_what_is_no_request_is_lost(request_bytes: bytes) -> None:
    """It is counted, and the streams behind it are read; what the client's settings allow is not known."""
    made = Raw()
    made.encoders[RESPONSE].header_table_size = 16384
    observed = Observed().take_over(upgraded(request_bytes), is_announced=True)
    assert (observed.connection.lost, observed.connection.outstanding) == (1, 0)
    assert observed.connection.withdrawn == [77]
    observed.see(RESPONSE, raw(4, 0, 0, b"") + made.headers(RESPONSE, 1, OK, "END_STREAM"))
    observed.see(REQUEST, PREFACE + made.headers(REQUEST, 3, get("/b"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"))
    assert observed.only()[2]["url.path"] == "/b"
    assert list(observed.losses.reasons.values()) == [1]


@pytest.mark.parametrize(
    ("role", "end", "flags", "cause"),
    [
        (SERVER, End.RESET, 0, "client_disconnect"),
        (CLIENT, End.RESET, 0, "connection_reset"),
        (CLIENT, End.CLOSED, Flag.PEER_CLOSED, "incomplete_response"),
        (SERVER, End.TIMED_OUT, 0, "timeout"),
    ],
)
def test_an_upgrade_that_is_never_answered(role: int, end: End, flags: int, cause: str) -> None:
    """The connection ends behind 101: no status, and what cut the answer off."""
    observed = Observed(role).take_over(upgraded(asks(), role))
    observed.see(RESPONSE, raw(4, 0, 0, b"")).see(REQUEST, PREFACE + raw(4, 0, 0, b"")).close(end, flags)
    exchange, call, values = observed.only()
    assert (exchange.exchange_id, exchange.end, call.error) == (77, end, True)
    assert values["error.type"] == cause
    assert "http.response.status_code" not in values


def test_a_reset_answers_a_request_that_upgraded() -> None:
    """RST_STREAM and GOAWAY end stream 1 as they do others."""
    observed = Observed().take_over(upgraded(asks())).see(RESPONSE, raw(3, 0, 1, b"\0\0\0\2"))
    assert observed.only()[2]["error.type"] == "INTERNAL_ERROR"
    observed = Observed().take_over(upgraded(asks())).see(RESPONSE, raw(7, 0, 0, bytes(8)))
    assert observed.only()[2]["error.type"] == "REFUSED_STREAM"


def test_lost_segments_lose_a_request_that_upgraded() -> None:
    """A gap where its answer may have been; who was told of it is told that it is lost."""
    for is_announced in (False, True):
        observed = Observed().take_over(upgraded(asks()), is_announced=is_announced)
        observed.see(RESPONSE, raw(6, 0, 0, bytes(8)), before=100)
        assert (observed.connection.lost, observed.connection.outstanding) == (1, 0)
        assert observed.connection.withdrawn == [77] * is_announced


def test_requests_that_were_lost_behind_an_upgrade_are_counted() -> None:
    """Their streams are numbered from stream 1 on."""
    made = Raw()
    observed = Observed().take_over(upgraded(asks())).see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    observed.see(REQUEST, PREFACE + raw(4, 0, 0, b""))
    observed.see_frame(REQUEST, made.headers(REQUEST, 7, get("/b"), "END_STREAM"), before=100)
    assert (observed.connection.lost, observed.connection.outstanding) == (2, 1)


def test_a_table_that_an_upgrade_does_not_allow() -> None:
    """The connection's beginning was seen, so more than the default size has to be allowed by somebody."""
    block = b"\x3f\xe1\x3f\x88"  # 8192 bytes, status 200
    for offered, is_read in (("", False), (base64.urlsafe_b64encode(b"\0\1\0\0\x20\0").decode(), True)):
        observed = Observed().take_over(upgraded(asks(settings=offered))).see(RESPONSE, raw(1, 5, 1, block))
        assert (observed.only()[2].get("http.response.status_code") == 200) == is_read
        assert observed.losses.reasons == ({} if is_read else {"malformed": 1})


def test_an_open_request_that_upgraded_is_announced_by_its_own_id() -> None:
    """Once, and not when that was done before."""
    observed = Observed().take_over(upgraded(asks()))
    [(exchange, call)], oldest = observed.connection.announce(1000)
    assert (exchange.exchange_id, exchange.end, call.complete, oldest) == (77, End.OPEN, True, 0)
    assert observed.connection.announce(1000) == ([], 0)
    assert Observed().take_over(upgraded(asks()), is_announced=True).connection.announce(1000) == ([], 0)
    assert Observed().take_over(upgraded(asks())).connection.announce(5) == ([], 10)


def test_other_settings_hold_for_what_comes_next() -> None:
    """A block that repeats is read again; what is open keeps what was read."""
    made = Raw()
    headers = get("/u/7")
    observed = Observed().see(REQUEST, PREFACE)
    for stream in (1, 3):
        observed.see(REQUEST, made.headers(REQUEST, stream, headers, "END_STREAM"))
    observed.connection.use(Http2(extractor=Extractor(FORMATS), route_patterns=["/u/{id}"]))
    observed.see(REQUEST, made.headers(REQUEST, 5, headers, "END_STREAM"))
    for stream in (1, 3, 5):
        observed.see(RESPONSE, made.headers(RESPONSE, stream, OK, "END_STREAM"))
    assert [call.name for call in observed.calls] == ["GET", "GET", "GET /u/{id}"]


# ---- Times


def test_times_are_those_of_the_first_and_last_segments() -> None:
    """A request that comes in pieces begins with the first byte of its first frame."""
    made, observed = opened()
    block = made.headers(REQUEST, 1, get("/a"))
    observed.see(REQUEST, block[:3]).see(REQUEST, b"").see(REQUEST, block[3:15]).see(REQUEST, b"").see(
        REQUEST, block[15:]
    )
    observed.see(REQUEST, raw(0, 1, 1, b"body"))
    answer = made.headers(RESPONSE, 1, OK) + raw(0, 1, 1, b"body")
    observed.see(RESPONSE, answer[:4]).see(RESPONSE, answer[4:-1]).see(RESPONSE, answer[-1:])
    exchange = observed.only()[0]
    assert (exchange.request_start_ns, exchange.request_end_ns) == (2, 7)
    assert (exchange.response_start_ns, exchange.response_end_ns, exchange.end_ns) == (8, 10, 10)


def test_continued_blocks_begin_with_their_first_frame() -> None:
    """HEADERS and CONTINUATION in segments of their own."""
    made, observed = opened()
    block = made.encoders[REQUEST].encode(get("/a"))
    observed.see(REQUEST, raw(1, 1, 1, block[:4])).see(REQUEST, raw(9, 0, 1, block[4:9]))
    observed.see(REQUEST, raw(9, 4, 1, block[9:]))
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    exchange, _, values = observed.only()
    assert (exchange.request_start_ns, exchange.request_end_ns, values["url.path"]) == (2, 4, "/a")


# ---- Limits


def test_open_streams_are_bounded(monkeypatch) -> None:
    """What is beyond is lost and counted; the table stays in step, and streams that end make room."""
    monkeypatch.setattr(http2_stream, "OPEN_STREAMS", 3)
    made, observed = opened("/a", "/b", "/c", "/d", "/e")
    assert observed.connection.outstanding == 3
    assert (observed.connection.lost, observed.losses.reasons) == (2, {"too_many": 2})
    observed.see(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"))
    observed.see(REQUEST, made.headers(REQUEST, 11, get("/e"), "END_STREAM"))
    observed.see(RESPONSE, made.headers(RESPONSE, 11, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/a", "/e"]


@pytest.mark.parametrize("parts", [1, 2, 20])
def test_header_blocks_are_bounded(parts) -> None:
    """A block that is too long is skipped in whatever frames it comes; its request is lost, the connection is not."""
    made, observed = opened("/a")
    observed.connection._requests.frame_bytes = 1 << 20
    block = bytes(http2_frames.BLOCK_BYTES + 1000)
    size = len(block) // parts + 1
    pieces = [block[start : start + size] for start in range(0, len(block), size)]
    for number, piece in enumerate(pieces):
        flags = (0 if number < len(pieces) - 1 else 4) | (number == 0)
        frame = raw(9 if number else 1, flags, 3, piece)
        for start in range(0, len(frame), 5000):
            observed.see(REQUEST, frame[start : start + 5000])
            check_within_limits(observed)
    observed.see(REQUEST, made.headers(REQUEST, 5, get("/new"), "END_STREAM"))
    for stream in (1, 3, 5):
        observed.see(RESPONSE, made.headers(RESPONSE, stream, OK, "END_STREAM"))
    assert [value["url.path"] for value in observed.values] == ["/a", "/new"]
    assert (observed.connection.lost, observed.losses.reasons) == (1, {"block_too_long": 1})


def test_unending_continuations_hold_nothing() -> None:
    """The flood of CVE-2024-27316: bounded memory, one loss."""
    _, observed = opened("/a")
    observed.see(REQUEST, raw(1, 0, 3, b"\x82"))
    for _ in range(500):
        observed.see(REQUEST, raw(9, 0, 3, bytes(1000)))
        check_within_limits(observed)
    assert observed.connection.outstanding == 1


def test_rapid_resets_leave_nothing_behind() -> None:
    """Streams that are reset at once are handed out at once (CVE-2023-44487)."""
    made, observed = opened()
    for number in range(3000):
        stream = 2 * number + 1
        observed.see(
            REQUEST, made.headers(REQUEST, stream, get("/a"), "END_STREAM") + raw(3, 0, stream, bytes((0, 0, 0, 8)))
        )
    assert len(observed.results) == 3000
    assert observed.connection.outstanding == observed.connection.lost == 0


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        (raw(1, 5, 1, b"\x82"), True),
        (raw(0, 1, 5, b"abc") + raw(8, 0, 0, bytes(4)), True),
        (raw(0, 1, 5, b"abc")[:10], True),  # the rest of the frame comes later
        (raw(0, 1, 5, b"abc") + b"\0\0", True),  # and of the next header
        (raw(0, 1, 5, b"abc") + raw(0x60, 0, 0, b"new"), True),
        (b"", False),
        (raw(1, 5, 1, b"")[:8], False),
        (bytes(40), False),
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (message(300), False),  # of gRPC
        (message(5) * 3, False),
        (b'{"a": 1, "b": 2}', False),
        (raw(9, 4, 1, b"\x82"), False),
        (raw(0x60, 0, 0, b"new"), False),
        (raw(1, 0x80 | 5, 1, b"\x82"), False),
        (raw(0, 1, 0x80000001, b"abc"), False),
        (raw(0, 1, 500_001, b"abc"), False),
        (raw(0, 1, 5, bytes(17000)), False),
        (raw(0, 1, 5, b"abc") + b"no frame", True),  # too short to tell
        (raw(0, 1, 5, b"abc") + b"no frame at all", False),
    ],
)
def test_what_is_taken_for_the_beginning_of_a_frame(data, likely) -> None:
    """Reading starts again only at bytes that hardly anything else begins with."""
    assert http2_frames.begins_with_frames(data, 16384, 99) is likely


def test_frames_that_h2_writes_are_those_of_the_raw_builder() -> None:
    """The frames by hand are frames: hyperframe writes the same bytes."""
    assert DataFrame(1, b"abc", flags=["END_STREAM"]).serialize() == raw(0, 1, 1, b"abc")
    assert HeadersFrame(3, b"\x82", flags=["END_HEADERS"]).serialize() == raw(1, 4, 3, b"\x82")


@given(st.binary(max_size=60), st.lists(st.integers(0, 255), max_size=200), st.sampled_from([SERVER, CLIENT]))
@settings(max_examples=200, deadline=None)
def test_hostile_bytes_raise_nothing(data, more, role) -> None:
    """Whatever comes, in front of the preface or behind it."""
    for start in (b"", PREFACE):
        observed = Observed(role)
        observed.see(REQUEST, start + data).see(RESPONSE, bytes(more)).see(REQUEST, bytes(more), gap=3)
        check_within_limits(observed)
        observed.close()
