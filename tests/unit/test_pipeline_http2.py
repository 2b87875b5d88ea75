"""agent.pipeline and HTTP/2: segments of one connection, or of both of its ends, -> spans, parents and books."""

from __future__ import annotations

import msgspec

from agent.model import ConnectionClosed, ConnectionUpgraded, End, Exchange, PeerFound, Role, Segment
from agent.process import Selector
from agent.protocols.http1 import Http1
from agent.protocols.http2 import Http2
from agent.sampling import Sampler
from tests.unit.exchanges import BACK, CLIENT, FRONT, MILLISECOND, SERVER, exchange
from tests.unit.http2_traffic import (
    AT_FRAME,
    HTTP2,
    OK,
    PREFACE,
    REQUEST,
    RESPONSE,
    Raw,
    asks,
    get,
    raw,
    upgraded,
)
from tests.unit.test_pipeline import OWN_TGID, Bench, segment, streamed

LOCAL, REMOTE = bytes(10) + b"\xff\xff\x0a\0\0\x01", bytes(10) + b"\xff\xff\x0a\0\0\x02"
TRACE, PARENT = "0123456789abcdef0123456789abcdef", "00f067aa0ba902b7"
INBOUND = ("traceparent", f"00-{TRACE}-{PARENT}-01")


def bench(**options: object) -> Bench:
    """One that reads HTTP/2, too."""
    made = Bench(**options)
    made.pipeline.reconfigure(_protocols(made), Selector(("*",), (), OWN_TGID))
    return made


def _protocols(made: Bench) -> list[Http1 | Http2]:
    return [Http1(extractor=made.extractor), Http2(extractor=made.extractor)]


class Side:
    """One end of a connection, and what the kernel tells of it."""

    def __init__(self, role: int, connection: int, process: tuple[int, int]) -> None:
        self.role, self.connection, self.process = role, connection, process
        self.offsets = {REQUEST: 0, RESPONSE: 0}

    def sees(self, direction: int, data: bytes, at_ms: int) -> Segment:
        """The next bytes of a direction."""
        client, server = (LOCAL, 40000), (REMOTE, 80)
        (local, local_port), (remote, remote_port) = (client, server) if self.role == CLIENT else (server, client)
        offset = self.offsets[direction]
        self.offsets[direction] += len(data)
        return segment(
            direction,
            data,
            offset,
            self.connection,
            role=self.role,
            flags=int(HTTP2 | AT_FRAME) if not data.startswith(PREFACE) else int(HTTP2),
            time_ns=at_ms * MILLISECOND,
            tgid=self.process[0],
            process_start_ns=self.process[1],
            local_address=local,
            local_port=local_port,
            remote_address=remote,
            remote_port=remote_port,
        )


def closes(connection: int, end: End = End.CLOSED) -> ConnectionClosed:
    return ConnectionClosed(4, int(Role.SERVER), int(end), 0, connection, 0, 9000 * MILLISECOND)


def test_the_two_ends_of_a_stream_are_parent_and_child() -> None:
    """Whichever end is told of first, and although the client's ends last."""
    for client_first in (True, False):
        made, server, client = Raw(), Side(SERVER, 50, BACK), Side(CLIENT, 60, FRONT)
        opening = PREFACE + raw(4, 0, 0, b"")
        asked = [made.headers(REQUEST, stream, get(f"/{stream}"), "END_STREAM") for stream in (1, 3)]
        answered = [made.headers(RESPONSE, stream, OK, "END_STREAM") for stream in (3, 1)]
        data = opening + b"".join(asked)
        ends = [client.sees(REQUEST, data, 1000), server.sees(REQUEST, data, 1001)]
        running = bench()
        running.send(PeerFound(50, 60))
        streamed(running, ends[not client_first])
        streamed(running, ends[client_first])
        running.send(server.sees(RESPONSE, b"".join(answered), 1050))
        running.sweep(100)
        assert running.sink.spans == []  # the client's streams are open, and say where these belong
        running.assert_balanced(in_flight=4)
        running.send(client.sees(RESPONSE, b"".join(answered), 1051))
        running.sweep(100)
        spans = running.sink.spans
        parents = {span.span_id: span for span in spans if span.kind == 3}
        servers = [span for span in spans if span.kind == 2]
        assert (len(parents), len(servers)) == (2, 2)
        assert {span.parent_span_id for span in servers} == parents.keys()
        for span in servers:
            shown = dict(span.all_attributes())["url.path"]
            assert dict(parents[span.parent_span_id].all_attributes())["url.full"].endswith(shown)
        running.assert_balanced(in_flight=0)


def test_a_long_request_is_the_parent_of_what_ends_before_it() -> None:
    """It is told of when it has been open for a while, so that its calls need not wait for its end."""
    running = bench()
    made, server = Raw(), Side(SERVER, 50, FRONT)
    asked = made.headers(REQUEST, 1, get("/long", "GET", INBOUND))
    streamed(running, server.sees(REQUEST, PREFACE + asked, 1000))
    onward = f"GET /onward HTTP/1.1\r\nHost: b\r\ntraceparent: {INBOUND[1]}\r\n\r\n".encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    running.send(
        exchange(
            7,
            CLIENT,
            start=1010,
            request=onward,
            response=answer,
            request_bytes=len(onward),
            response_bytes=len(answer),
            request_captured=len(onward),
            response_captured=len(answer),
        )
    )
    running.sweep(100)
    assert running.sink.spans == []
    running.sweep(300)
    [child] = running.sink.spans
    running.assert_balanced(in_flight=1)
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"), 5000))
    running.sweep(5000)
    [_, parent] = running.sink.spans
    assert child.parent_span_id == parent.span_id
    assert dict(child.all_attributes())["url.full"].endswith("/onward")
    running.assert_balanced(in_flight=0)


def test_a_stream_that_stays_open_is_told_of() -> None:
    """Before it ends, by a span that is in the books as well; of its status nothing is said before it is known."""
    running = bench()
    running.stitcher.reconfigure(Sampler(), hold_ns=10**9, hold_spans=100, announce_open_ns=3000 * MILLISECOND)
    made, server = Raw(), Side(SERVER, 50, FRONT)
    asked = made.headers(REQUEST, 1, [*get("/pkg.Echo/Tick", "POST", INBOUND), ("content-type", "application/grpc")])
    streamed(running, server.sees(REQUEST, PREFACE + asked, 1000))
    begun = made.headers(RESPONSE, 1, [*OK, ("content-type", "application/grpc")])
    running.send(server.sees(RESPONSE, begun + raw(0, 0, 1, b"\0\0\0\0\1x"), 1010))
    running.sweep(2900)
    assert running.sink.spans == []
    running.assert_balanced(in_flight=1)
    running.sweep(200)
    running.sweep(200)
    [opening] = running.sink.spans
    assert (opening.name, opening.trace_id.hex()) == ("pkg.Echo/Tick (opened)", TRACE)
    told = dict(opening.all_attributes())
    assert (told["rpc.method"], told["spanloom.opened"]) == ("pkg.Echo/Tick", "server")
    assert not {name for name in told if "response" in name or "messages" in name}
    running.assert_balanced(in_flight=1)
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 1, [("grpc-status", "0")], "END_STREAM"), 9000))
    running.sweep(9000)
    [_, final] = running.sink.spans
    assert (final.span_id, opening.start_time_ns) == (opening.parent_span_id, final.start_time_ns)
    assert dict(final.all_attributes())["rpc.response.status_code"] == "OK"
    running.assert_balanced(in_flight=0)
    assert running.pipeline.books().handed_over == 2


def test_what_was_told_of_and_lost_is_forgotten() -> None:
    """Nothing refers to it any more, and it is dropped with its reason."""
    running = bench()
    made, server = Raw(), Side(SERVER, 50, FRONT)
    streamed(running, server.sees(REQUEST, PREFACE + made.headers(REQUEST, 1, get("/a")), 1000))
    running.sweep(1000)
    assert len(running.stitcher._announced) == 1
    running.send(server.sees(REQUEST, raw(6, 0, 1, bytes(8)), 1500))  # PING is none of a stream
    assert len(running.stitcher._announced) == 0
    assert running.pipeline.dropped == {"stream_lost": 1}
    running.assert_balanced(in_flight=0)


def test_http2_that_is_switched_off_ends_what_is_open() -> None:
    """Open requests are dropped as those of a protocol that is off."""
    running = bench()
    made, server = Raw(), Side(SERVER, 50, FRONT)
    asked = [made.headers(REQUEST, stream, get("/a"), "END_STREAM") for stream in (1, 3, 5)]
    streamed(running, server.sees(REQUEST, PREFACE + b"".join(asked), 1000))
    running.sweep(1000)
    running.pipeline.reconfigure([Http1(extractor=running.extractor)], Selector(("*",), (), OWN_TGID))
    assert running.pipeline.dropped == {"protocol_off": 3}
    assert running.pipeline.streams_outstanding == 0
    running.send(closes(50))
    running.assert_balanced(in_flight=0)


def test_a_connection_without_a_request_is_counted_as_such() -> None:
    """The kernel took its preface for the beginning of one."""
    running = bench()
    streamed(running, Side(SERVER, 50, FRONT).sees(REQUEST, PREFACE + raw(4, 0, 0, b""), 1000))
    running.assert_balanced(in_flight=1)
    running.send(closes(50))
    assert running.pipeline.dropped == {"no_request": 1}
    running.assert_balanced(in_flight=0)


def test_requests_whose_segments_were_lost_are_counted() -> None:
    """Streams are numbered: those between the last one seen and the next one were in the gap."""
    running = bench()
    made, server = Raw(), Side(SERVER, 50, FRONT)
    asked = {stream: made.headers(REQUEST, stream, get("/a"), "END_STREAM") for stream in (1, 3, 5, 7, 9)}
    streamed(running, server.sees(REQUEST, PREFACE + asked[1], 1000))
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"), 1001))
    for stream in (3, 5, 7):
        server.sees(REQUEST, asked[stream], 1002)  # the ring buffer is full
    running.send(server.sees(REQUEST, made.headers(REQUEST, 9, get("/new"), "END_STREAM"), 1003))
    assert running.pipeline.dropped == {"stream_lost": 3}
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 9, OK, "END_STREAM"), 1004))
    running.sweep(1000)
    assert len(running.sink.spans) == 2
    running.assert_balanced(in_flight=0)


# -- behind an upgrade


def switches(number: int, side: Side, at_ms: int = 1000, head: bytes = asks(), **fields: object) -> ConnectionUpgraded:
    """The exchange of HTTP/1 that is answered by a switch, as the end of a connection sees it, 5 ms after its begin."""
    values: dict[str, object] = {
        "exchange_id": number,
        "connection_id": side.connection,
        "tgid": side.process[0],
        "process_start_ns": side.process[1],
        "request_start_ns": at_ms * MILLISECOND,
        "request_end_ns": at_ms * MILLISECOND,
    }
    values |= dict.fromkeys(("response_start_ns", "response_end_ns", "end_ns"), (at_ms + 5) * MILLISECOND)
    return ConnectionUpgraded(upgraded(head, side.role, **values | fields))


def waits(switch: ConnectionUpgraded) -> Exchange:
    """The same before its response, as the kernel announces what has waited for a while."""
    values = dict.fromkeys(("response_start_ns", "response_end_ns", "response_bytes", "response_captured"), 0)
    return msgspec.structs.replace(switch.exchange, end=int(End.OPEN), response=b"", **values)


ANSWER = raw(4, 0, 0, b"") + Raw().headers(RESPONSE, 1, OK, "END_STREAM")


def test_a_request_that_upgrades_is_a_span_with_the_answer_of_stream_1() -> None:
    """On both ends, which know each other by the ids that they had before."""
    running, server, client = bench(), Side(SERVER, 50, BACK), Side(CLIENT, 60, FRONT)
    streamed(running, switches(8, server, peer_id=7))
    streamed(running, switches(7, client))
    running.assert_balanced(in_flight=2)
    running.send(server.sees(RESPONSE, ANSWER, 1050), client.sees(RESPONSE, ANSWER, 1051)).sweep()
    running.assert_balanced(in_flight=0)
    [caller, called] = sorted(running.sink.spans, key=lambda span: -span.kind)
    assert [int.from_bytes(span.span_id, "big") for span in (caller, called)] == [7, 8]
    assert (called.parent_span_id, called.link_method) == (caller.span_id, "peer")
    for span, end_ms in ((caller, 1051), (called, 1050)):
        assert span.end_time_ns - span.start_time_ns == (end_ms - 1000) * MILLISECOND
        values = dict(span.all_attributes())
        assert (values["http.response.status_code"], values["network.protocol.version"]) == (200, "2")
    running.send(closes(50), closes(60))
    assert len(running.sink.spans) == 2
    assert running.pipeline.streams == 0
    running.assert_balanced(in_flight=0)


def test_an_announced_request_that_upgrades_stays_known() -> None:
    """What refers to it waits for its place, and gets it."""
    running, server = bench(), Side(SERVER, 50, FRONT)
    switch = switches(7, server, head=asks("/long", f"traceparent: {INBOUND[1]}"))
    running.send(waits(switch))
    onward = f"GET /onward HTTP/1.1\r\nHost: b\r\ntraceparent: {INBOUND[1]}\r\n\r\n".encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    running.source.count["streamed"] += 1  # as well as emitted
    running.send(switch)
    assert running.pipeline.pending == 0
    running.assert_balanced(in_flight=1)
    sizes = {"request_bytes": len(onward), "request_captured": len(onward)}
    sizes |= {"response_bytes": len(answer), "response_captured": len(answer)}
    running.send(exchange(9, CLIENT, start=1002, request=onward, response=answer, **sizes)).sweep(300)
    [child] = running.sink.spans
    running.send(server.sees(RESPONSE, ANSWER, 2000)).sweep()
    [_, parent] = running.sink.spans
    assert child.parent_span_id == parent.span_id == (7).to_bytes(8, "big")
    running.assert_balanced(in_flight=0)


def test_a_report_that_comes_behind_the_upgrade_is_none() -> None:
    """The kernel's sweep may be about to report an exchange when it upgrades: it counts it twice, and tells late."""
    running, server = bench(), Side(SERVER, 50, FRONT)
    switch = switches(7, server)
    running.source.count["begun"] -= 1  # it began once
    streamed(running, switch).send(waits(switch))
    assert (running.pipeline.pending, running.pipeline.superseded) == (0, 1)
    running.assert_balanced(in_flight=1)
    running.send(server.sees(RESPONSE, ANSWER, 1050), closes(50)).sweep()
    assert len(running.sink.spans) == 1
    running.assert_balanced(in_flight=0)


def test_an_announced_request_that_upgrades_and_is_lost_is_forgotten() -> None:
    """Whether its answer was lost, or nothing but the answer was seen."""
    for is_told in (True, False):
        running, server = bench(), Side(SERVER, 50, FRONT)
        switch = switches(7, server)
        running.send(waits(switch))
        assert len(running.stitcher._announced) == 1
        running.source.count["streamed"] += 1
        if is_told:
            running.send(switch)
            server.offsets[RESPONSE] = 100
        running.send(server.sees(RESPONSE, raw(6, 0, 0, bytes(8)), 1500))
        assert len(running.stitcher._announced) == 0
        running.send(closes(50))
        assert running.pipeline.dropped == {"stream_lost" if is_told else "no_request": 1}
        running.assert_balanced(in_flight=0)


def test_a_request_that_upgrades_and_is_not_answered() -> None:
    """The connection's end is its end."""
    running, server = bench(), Side(SERVER, 50, FRONT)
    streamed(running, switches(7, server))
    running.send(server.sees(REQUEST, PREFACE + raw(4, 0, 0, b""), 1010), closes(50, End.RESET)).sweep()
    [span] = running.sink.spans
    assert dict(span.all_attributes())["error.type"] == "client_disconnect"
    running.assert_balanced(in_flight=0)


def test_an_upgrade_whose_connection_says_nothing_more() -> None:
    """It times out like any stream whose connection may have ended, and what comes after all makes no span."""
    running, server = bench(exchange_timeout_ns=10**9), Side(SERVER, 50, FRONT)
    streamed(running, switches(7, server))
    running.source.count["closes_lost"] += 1
    running.sweep(2000)
    running.send(server.sees(RESPONSE, ANSWER, 4000), closes(50))
    [span] = running.sink.spans
    assert dict(span.all_attributes())["error.type"] == "timeout"
    running.assert_balanced(in_flight=0)


def test_a_stream_may_be_silent_for_as_long_as_its_connection_lasts() -> None:
    """It has not timed out, however long nothing moves, and has its answer in the end; until a close is lost."""
    made, running, server = Raw(), bench(exchange_timeout_ns=10**9), Side(SERVER, 50, FRONT)
    asked = b"".join(made.headers(REQUEST, stream, get(f"/{stream}"), "END_STREAM") for stream in (1, 3))
    streamed(running, server.sees(REQUEST, PREFACE + raw(4, 0, 0, b"") + asked, 1000))
    for _ in range(10):
        running.sweep(2000)
    assert running.sink.spans == []
    running.assert_balanced(in_flight=2)
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 1, OK, "END_STREAM"), running.now_ms)).sweep()
    [span] = running.sink.spans
    assert "error.type" not in dict(span.all_attributes())
    running.source.count["closes_lost"] += 1
    running.sweep(2000)
    assert dict(running.sink.spans[1].all_attributes())["error.type"] == "timeout"
    running.assert_balanced(in_flight=0)


def test_where_http2_is_not_wanted_the_switch_is_the_answer() -> None:
    """The exchange of HTTP/1 is whole with 101, and the frames behind it are ignored."""
    running, server = Bench(), Side(SERVER, 50, FRONT)
    streamed(running, switches(7, server))
    running.send(server.sees(RESPONSE, ANSWER, 1010), server.sees(REQUEST, PREFACE, 1011), closes(50)).sweep()
    [span] = running.sink.spans
    values = dict(span.all_attributes())
    assert (values["http.response.status_code"], values["network.protocol.version"]) == (101, "1.1")
    assert span.end_time_ns - span.start_time_ns == 5 * MILLISECOND
    assert running.pipeline.stream_losses.reasons == {}
    running.assert_balanced(in_flight=0)


def test_what_is_no_request_before_an_upgrade_is_dropped() -> None:
    """Once, and the streams that follow are spans."""
    running, made, server = bench(), Raw(), Side(SERVER, 50, FRONT)
    streamed(running, switches(7, server, head=b"\0\1\r\n\r\n"))
    running.assert_balanced(in_flight=0)
    running.send(server.sees(REQUEST, PREFACE + made.headers(REQUEST, 3, get("/b"), "END_STREAM"), 1010))
    running.send(server.sees(RESPONSE, made.headers(RESPONSE, 3, OK, "END_STREAM"), 1011), closes(50)).sweep()
    assert running.pipeline.dropped == {"stream_lost": 1}
    assert len(running.sink.spans) == 1
    running.assert_balanced(in_flight=0)


def test_connections_that_upgrade_have_a_bound() -> None:
    """The oldest one is given up; a second switch of one connection is none."""
    running = bench(max_pending=2)
    for number in range(1, 4):
        streamed(running, switches(number, Side(SERVER, 50 + number, FRONT)))
    assert running.pipeline.streams == 2
    assert running.pipeline.dropped == {"stream_lost": 1}
    running.send(switches(4, Side(SERVER, 53, FRONT)))
    assert (running.pipeline.streams, running.pipeline.superseded) == (2, 1)
    running.send(*map(closes, (51, 52, 53))).sweep()
    assert len(running.sink.spans) == 2
    running.assert_balanced(in_flight=0)


def test_an_upgrade_of_a_process_that_is_not_selected_is_dropped() -> None:
    """As its other exchanges are."""
    running, server = bench(), Side(SERVER, 50, FRONT)
    running.pipeline.reconfigure(_protocols(running), Selector((), (), OWN_TGID))
    streamed(running, switches(7, server)).send(server.sees(RESPONSE, ANSWER, 1010), closes(50)).sweep()
    assert running.sink.spans == []
    assert running.pipeline.dropped == {"not_selected": 1}
    running.assert_balanced(in_flight=0)
