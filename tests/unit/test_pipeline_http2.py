"""agent.pipeline and HTTP/2: segments of one connection, or of both of its ends, -> spans, parents and books."""

from __future__ import annotations

from agent.model import ConnectionClosed, End, PeerFound, Role, Segment
from agent.process import Selector
from agent.protocols.http1 import Http1
from agent.protocols.http2 import Http2
from agent.sampling import Sampler
from tests.unit.exchanges import BACK, CLIENT, FRONT, MILLISECOND, SERVER, exchange
from tests.unit.http2_traffic import AT_FRAME, HTTP2, OK, PREFACE, REQUEST, RESPONSE, Raw, get, raw
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
