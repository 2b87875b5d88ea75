"""agent.protocols.http1_stream: segments of a pipelined connection -> exchanges."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import ConnectionClosed, End, Exchange, Flag
from agent.propagation import FORMATS, Extractor
from agent.protocols import http1_reader, http1_stream
from agent.protocols.http1 import Http1
from agent.protocols.http1_stream import PipelinedConnection

FUZZ_DIRECTORY = Path(__file__).resolve().parents[1] / "fuzz"
REQUEST, RESPONSE = 1, 2


def load_fuzz_target():
    spec = importlib.util.spec_from_file_location("fuzz_http1_stream", FUZZ_DIRECTORY / "fuzz_http1_stream.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = load_fuzz_target()


class Wire:
    """Feeds a connection with segments that follow each other, one time unit each."""

    def __init__(self) -> None:
        self.connection = PipelinedConnection()
        self.exchanges: list[Exchange] = []
        self.offsets = {REQUEST: 0, RESPONSE: 0}
        self.time_ns = 0

    def send(self, direction: int, data: bytes, gap: int = 0) -> Wire:
        self.time_ns += 1
        total = len(data) + gap
        segment = FUZZ.segment(direction, data, self.offsets[direction], total, self.time_ns)
        self.offsets[direction] += total
        self.exchanges += self.connection.feed(segment)
        return self

    def ask(self, data: bytes, gap: int = 0) -> Wire:
        return self.send(REQUEST, data, gap)

    def answer(self, data: bytes, gap: int = 0) -> Wire:
        return self.send(RESPONSE, data, gap)

    def expire(self) -> Wire:
        self.exchanges += self.connection.expire(self.time_ns)
        return self

    def close(self, end: End | None = End.CLOSED, flags: int = 0) -> Wire:
        record = None if end is None else ConnectionClosed(4, 1, int(end), int(flags), 7, 0, self.time_ns + 5)
        self.exchanges += self.connection.close(record)
        return self

    def calls(self) -> list[tuple[str, int | None, bool]]:
        """(path, status, complete) of each exchange, as the record parser sees it."""
        parser = Http1(extractor=Extractor(FORMATS))
        calls = [parser.parse(exchange) for exchange in self.exchanges]
        values = [dict(call.attributes) for call in calls]
        return [
            (value["url.path"], value.get("http.response.status_code"), call.complete)
            for value, call in zip(values, calls, strict=True)
        ]


def get(path: str, method: str = "GET", fields: str = "") -> bytes:
    return f"{method} /{path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode()


def ok(body: bytes = b"", status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = (
    get("1"),
    get("2", "POST", "Content-Length: 3\r\n") + b"abc",
    b"\r\n" + get("3", "HEAD"),
    get("4", "POST", "Transfer-Encoding: chunked\r\n") + b"2;x=y\r\nhi\r\n0\r\nT: u\r\n\r\n",
    get("5"),
    b"GET /6 HTTP/1.1\nHost: a\n\n",
    get("7"),
)
RESPONSES = (
    ok(b"HTTP/1.1 9"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n",
    CHUNKED + b"1\r\nx\r\n0\r\nTrailer: y\r\nOther: z\r\n\r\n",
    b"HTTP/1.1 204 No\r\n\r\n",
    b"HTTP/1.1 304 NM\nContent-Length: 5\n\n",
    ok(b"", 404),
)
EXPECTED = [
    ("/1", 200, True),
    ("/2", 200, True),
    ("/3", 200, True),
    ("/4", 200, True),
    ("/5", 204, True),
    ("/6", 304, True),
    ("/7", 404, True),
]


def shape(exchange: Exchange) -> tuple[object, ...]:
    """What does not depend on how the bytes were split."""
    flags = Flag(exchange.flags)
    return (
        *(exchange.request, exchange.response, exchange.request_bytes, exchange.response_bytes),
        *(exchange.tail, flags, exchange.end),
    )


WHOLE = [shape(exchange) for exchange in Wire().ask(b"".join(REQUESTS)).answer(b"".join(RESPONSES)).exchanges]


def test_a_batch_is_paired_in_order() -> None:
    """Every kind of framing in one batch: each response meets its request, is complete, and nothing is lost."""
    wire = Wire().ask(b"".join(REQUESTS)).answer(b"".join(RESPONSES))
    assert wire.calls() == EXPECTED
    assert (wire.connection.lost, wire.connection.losses.reasons) == (0, {})
    assert len({exchange.exchange_id for exchange in wire.exchanges}) == len(EXPECTED)
    for exchange, request, response in zip(wire.exchanges, REQUESTS, RESPONSES, strict=True):
        final = response.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert exchange.request_bytes == len(request.lstrip())
        assert exchange.response_bytes == len(final)
        assert exchange.tail == final[-8:]
        assert exchange.end == End.NEXT
        assert bool(exchange.flags & Flag.INTERIM) == (final != response)
        assert exchange.flags & Flag.FIRST
        assert exchange.flags & Flag.TAIL_VALID
    assert wire.close().connection.lost == 0
    assert len(wire.exchanges) == len(EXPECTED)


def test_byte_by_byte() -> None:
    """One byte per segment gives the same exchanges, each with the times of its own first and last bytes."""
    wire = Wire()
    for value in b"".join(REQUESTS):
        wire.ask(bytes((value,)))
    begin = wire.time_ns
    for value in b"".join(RESPONSES):
        wire.answer(bytes((value,)))
    assert [shape(exchange) for exchange in wire.exchanges] == WHOLE
    end = 0
    for exchange, request, response in zip(wire.exchanges, REQUESTS, RESPONSES, strict=True):
        stripped = len(request) - len(request.lstrip())
        interim = len(response) - exchange.response_bytes
        assert exchange.request_start_ns == end + stripped + 1
        end += len(request)
        assert exchange.request_end_ns == end
        assert exchange.response_start_ns == begin + interim + 1
        begin += len(response)
        assert exchange.response_end_ns == exchange.end_ns == begin
        assert (exchange.request_tid, exchange.response_tid) == (11, 12)


@pytest.mark.parametrize("size", [2, 3, 7, 16, 61])
def test_pieces(size: int) -> None:
    """Pieces of any size give the same exchanges."""
    wire = Wire()
    for direction, data in ((REQUEST, b"".join(REQUESTS)), (RESPONSE, b"".join(RESPONSES))):
        for start in range(0, len(data), size):
            wire.send(direction, data[start : start + size])
    assert [shape(exchange) for exchange in wire.exchanges] == WHOLE


def test_every_split_in_two() -> None:
    """Split in two, the exchanges are the same; a finished one does not wait for what follows it."""
    requests, responses = b"".join(REQUESTS), b"".join(RESPONSES)
    for cut in range(len(responses)):
        wire = Wire().ask(requests).answer(responses[:cut])
        ends = [len(b"".join(RESPONSES[: count + 1])) for count in range(len(RESPONSES))]
        assert len(wire.exchanges) == sum(end <= cut for end in ends)
        assert [shape(exchange) for exchange in wire.answer(responses[cut:]).exchanges] == WHOLE
    for cut in range(0, len(requests), 2):
        wire = Wire().ask(requests[:cut]).ask(requests[cut:]).answer(responses)
        assert [shape(exchange) for exchange in wire.exchanges] == WHOLE


def test_requests_and_responses_interleave() -> None:
    """A response is handed out as soon as it and its request are whole, also when it came before the upload ended."""
    wire = Wire().ask(get("1") + get("2", "PUT", "Content-Length: 4\r\n") + b"a").answer(ok(b"x"))
    assert wire.calls() == [("/1", 200, True)]
    wire.answer(ok(b"", 413))
    assert len(wire.exchanges) == 1
    wire.ask(b"bcd" + get("3")).answer(ok())
    assert wire.calls() == [("/1", 200, True), ("/2", 413, True), ("/3", 200, True)]
    assert wire.exchanges[1].request_end_ns > wire.exchanges[1].response_end_ns


def test_a_gap_inside_a_body_of_known_length_is_fine() -> None:
    """Content-Length and chunk sizes carry over bytes that were not captured; byte counts stay right."""
    wire = Wire().ask(get("1", "POST", "Content-Length: 100\r\n") + b"a", gap=99).ask(get("2") + get("3"))
    wire.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", gap=1000)
    wire.answer(CHUNKED + b"64\r\nxx", gap=90).answer(b"y" * 8 + b"\r\n0\r\n\r\n" + ok(b"z"))
    assert wire.calls() == [("/1", 200, True), ("/2", 200, True), ("/3", 200, True)]
    first, second, _ = wire.exchanges
    assert first.request_bytes == len(first.request) + 100
    assert first.response_bytes == len(first.response) + 1000
    assert not first.flags & Flag.TAIL_VALID
    assert second.response_bytes == len(CHUNKED) + 4 + 100 + 2 + 5
    assert second.tail == b"y\r\n0\r\n\r\n"
    assert wire.connection.losses.reasons == {}


def test_a_missing_segment_is_a_gap() -> None:
    """A jump of the offset counts like bytes that were not captured."""
    wire = Wire().ask(get("1") + get("2")).answer(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n")
    wire.offsets[RESPONSE] += 50
    assert wire.answer(ok()).calls() == [("/1", 200, True), ("/2", 200, True)]


def test_repeated_bytes_are_ignored() -> None:
    """Bytes below the offset that was reached already are not read twice; they are counted."""
    wire = Wire().ask(get("1"))
    wire.offsets[REQUEST] -= 5
    wire.ask(get("1")[-5:] + get("2")).answer(ok() + ok())
    assert wire.calls() == [("/1", 200, True), ("/2", 200, True)]
    assert wire.connection.losses.overlapping_bytes == 5


@pytest.mark.parametrize(
    "lose",
    [
        lambda wire: wire.ask(b"", gap=10),
        lambda wire: wire.ask(get("x")[:10], gap=3),
        lambda wire: wire.answer(b"", gap=10),
        lambda wire: wire.answer(b"HTTP/1.1 2", gap=10),
        lambda wire: wire.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", gap=6),
        lambda wire: wire.answer(CHUNKED + b"5\r\n", gap=8),
    ],
)
def test_a_gap_elsewhere_loses_what_is_outstanding_and_reading_starts_again(lose) -> None:
    """Nothing is paired across lost framing: what was outstanding is counted, later exchanges are whole again."""
    wire = Wire().ask(get("1") + get("2"))
    lose(wire)
    assert wire.connection.losses.reasons == {"gap": 1}
    lost = wire.connection.lost
    assert lost == 2 - len(wire.exchanges)
    wire.answer(b"rest of something\r\n").ask(get("3") + get("4")).answer(ok() + ok(b"x"))
    assert wire.calls()[-2:] == [("/3", 200, True), ("/4", 200, True)]
    assert wire.connection.lost == lost


def test_reading_starts_again_only_where_a_request_begins_behind_a_response() -> None:
    """Requests right behind a gap belong to the lost batch: their responses could not be told apart."""
    wire = Wire().ask(get("1"), gap=30).ask(get("2")).answer(ok() + ok() + ok())
    assert wire.exchanges == []
    wire.ask(b" continues a body\r\n").answer(ok()).ask(get("5")).answer(ok(b"", 201))
    assert wire.calls() == [("/5", 201, True)]


def test_ignored_response_bytes_lose_what_they_may_have_answered() -> None:
    """A stray response and the beginning of an awaited one in the same segment: the next response is not shifted."""
    wire = Wire().answer(b"stray").ask(get("1") + get("2")).answer(b"more of it" + ok(b"", 201)).answer(ok(b"", 202))
    assert wire.exchanges == []
    assert wire.connection.losses.reasons == {"unmatched": 1}
    assert (wire.connection.lost, wire.connection.losses.unmatched_responses) == (2, 1)
    assert wire.ask(get("3")).answer(ok()).calls() == [("/3", 200, True)]


@pytest.mark.parametrize(
    ("request_bytes", "response_bytes"),
    [
        (b"\x16\x03\x01\r\n\r\n", b""),
        (b"GET / HTTP/1.1\r\nBad Name: x\r\n\r\n", b""),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b""),
        (b"GET relative HTTP/1.1\r\n\r\n", b""),
        (get("2", "POST", "Transfer-Encoding: chunked\r\n") + b"zz\r\n", b""),
        (b"", b"garbage\r\n\r\n"),
        (b"", CHUNKED + b"xyz\r\n"),
        (b"", CHUNKED + b"1234567890123456\r\n"),
    ],
)
def test_malformed_bytes_lose_the_connection(request_bytes: bytes, response_bytes: bytes) -> None:
    """Hostile bytes never raise; they are counted, and reading starts again behind them."""
    wire = Wire().ask(get("1") + request_bytes).answer(response_bytes)
    assert wire.connection.losses.reasons == {"malformed": 1}
    assert wire.connection.lost >= 1
    assert wire.answer(b"x").ask(get("9")).answer(ok()).calls() == [("/9", 200, True)]


def test_a_response_until_the_close_ends_with_it() -> None:
    """Without a length the body lasts until the close, whose end and flags the exchange carries."""
    wire = Wire().ask(get("1")).answer(b"HTTP/1.1 200 OK\r\n\r\nabc").answer(b"def", gap=100)
    assert wire.exchanges == []
    wire.close(End.CLOSED, Flag.PEER_CLOSED)
    assert wire.calls() == [("/1", 200, True)]
    (exchange,) = wire.exchanges
    assert exchange.response_bytes == len(exchange.response) + 106
    assert (exchange.end, exchange.end_ns) == (End.CLOSED, wire.time_ns + 5)
    assert exchange.flags & Flag.PEER_CLOSED


@pytest.mark.parametrize("end", [End.CLOSED, End.RESET, End.TIMED_OUT])
def test_the_close_hands_out_what_was_outstanding(end: End) -> None:
    """Requests without a whole response are exchanges too, with the close's end, and so errors."""
    wire = Wire().ask(get("1") + get("2") + get("3")).answer(ok(b"abc") + ok(b"abc")[:-1]).close(end)
    assert wire.calls() == [("/1", 200, True), ("/2", 200, False), ("/3", None, False)]
    assert [exchange.end for exchange in wire.exchanges] == [End.NEXT, end, end]
    assert wire.exchanges[2].response_start_ns == wire.exchanges[2].response_bytes == 0
    assert wire.connection.lost == 0


def test_an_unfinished_response_head_is_kept_for_its_status() -> None:
    """A server that dies inside the head leaves a status when its line was whole."""
    wire = Wire().ask(get("1")).answer(b"HTTP/1.1 200 OK\r\nServ").close()
    assert wire.calls() == [("/1", 200, False)]
    assert wire.exchanges[0].response_bytes == 21


def test_without_a_close_record_the_outstanding_requests_are_lost() -> None:
    """Nothing is known of how they ended, so nothing is said; they are counted."""
    wire = Wire().ask(get("1") + get("2")).close(None)
    assert wire.exchanges == []
    assert (wire.connection.lost, wire.connection.losses.reasons) == (2, {"forgotten": 1})
    assert Wire().ask(get("1")).answer(ok()).close(None).connection.losses.reasons == {}


def test_what_waits_for_too_long_is_timed_out_once_and_keeps_its_place() -> None:
    """Late responses belong to the requests that timed out, and a later request gets its own."""
    wire = Wire().ask(get("1") + get("2") + get("3")).answer(ok(b"abc") + ok(b"abc")[:-1]).expire()
    assert wire.calls() == [("/1", 200, True), ("/2", 200, False), ("/3", None, False)]
    assert [exchange.end for exchange in wire.exchanges] == [End.NEXT, End.TIMED_OUT, End.TIMED_OUT]
    assert wire.connection.outstanding == wire.connection._head_bytes == 0
    wire.expire().ask(get("4"))
    assert wire.connection.outstanding == 1
    wire.answer(b"c" + ok(status=503)).answer(ok(status=201)).expire().close()
    assert wire.calls()[3:] == [("/4", 201, True)]
    assert wire.connection.lost == 0


def test_what_timed_out_is_not_lost_again() -> None:
    """A gap behind the timeout loses only what was asked since."""
    wire = Wire().ask(get("1") + get("2")).expire().ask(get("3")).answer(ok()[:5], gap=3)
    assert [path for path, *_ in wire.calls()] == ["/1", "/2"]
    assert wire.connection.lost == 1
    wire.close()
    assert len(wire.exchanges) == 2


def test_the_close_does_not_tell_of_what_timed_out() -> None:
    """It ends what was asked since."""
    wire = Wire().ask(get("1")).expire().ask(get("2")).close(End.RESET)
    assert [exchange.end for exchange in wire.exchanges] == [End.TIMED_OUT, End.RESET]
    assert [path for path, *_ in wire.calls()] == ["/1", "/2"]


def test_upgrade_hands_the_connection_over() -> None:
    """Behind 101 nothing is read; requests that were pipelined behind it are lost."""
    wire = Wire().ask(get("ws", fields="Upgrade: websocket\r\n") + get("2"))
    wire.answer(b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x05hello").ask(get("3")).answer(ok()).close()
    assert wire.calls() == [("/ws", 101, True)]
    assert wire.exchanges[0].end == End.HANDED_OVER
    assert (wire.connection.lost, wire.connection.losses.reasons) == (1, {"handed_over": 1})


def test_connect_hands_over_or_goes_on() -> None:
    """2xx makes a tunnel of the connection; any other answer leaves it HTTP."""
    connect = b"CONNECT db:5432 HTTP/1.1\r\n\r\n"
    wire = Wire().ask(connect).answer(b"HTTP/1.1 200 OK\r\n\r\n").ask(b"\0\0\0\x08").answer(b"N").close()
    assert [exchange.end for exchange in wire.exchanges] == [End.HANDED_OVER]
    assert wire.calls() == [("", 200, True)]
    wire = Wire().ask(connect).answer(ok(b"no", 403)).ask(get("1")).answer(ok())
    assert wire.calls() == [("", 403, True), ("/1", 200, True)]
    assert wire.connection.losses.reasons == {}


def test_too_many_outstanding_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound loses the connection, every request is counted, and reading starts again."""
    monkeypatch.setattr(http1_stream, "OUTSTANDING_REQUESTS", 4)
    wire = Wire().ask(get("x") * 4)
    assert wire.connection.losses.reasons == {}
    wire.ask(get("x"))
    assert (wire.connection.lost, wire.connection.losses.reasons) == (5, {"too_many": 1})
    monkeypatch.setattr(http1_stream, "OUTSTANDING_HEAD_BYTES", 100)
    wire.answer(b"x").ask(get("x") * 5)
    assert wire.connection.losses.reasons == {"too_many": 2}
    assert wire.answer(b"x").ask(get("1")).answer(ok()).calls() == [("/1", 200, True)]


def test_a_head_may_be_as_long_as_the_bound_and_no_longer() -> None:
    """8 KiB of head are read, in one piece or bytewise; one byte more loses the connection; buffers stay bounded."""
    room = http1_reader.HEAD_BYTES - len(get("1", fields="X: \r\n"))
    fits = get("1", fields=f"X: {'x' * room}\r\n")
    assert len(fits) == http1_reader.HEAD_BYTES
    assert Wire().ask(fits).answer(ok()).calls() == [("/1", 200, True)]
    wire = Wire()
    for start in range(0, len(fits), 100):
        wire.ask(fits[start : start + 100])
    assert wire.answer(ok()).calls() == [("/1", 200, True)]
    longer = get("1", fields=f"X: {'x' * (room + 1)}\r\n")
    assert Wire().ask(longer).connection.losses.reasons == {"too_long": 1}
    wire = Wire().ask(b"GET / HTTP/1.1\r\n")
    for _ in range(20):
        wire.ask(b"X: " + b"x" * 1000)
        FUZZ.check_bounds(wire.connection)
    assert wire.connection.losses.reasons == {"too_long": 1}
    endless = Wire().ask(get("1")).answer(CHUNKED + b"1;" + b"x" * 9000)
    assert endless.connection.losses.reasons == {"too_long": 1}


SEEDS = sorted((FUZZ_DIRECTORY / "corpus" / "http1_stream").iterdir())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_the_fuzz_corpus_holds(seed: Path) -> None:
    """Every seed and every crash of the past passes the fuzz target's checks."""
    FUZZ.check(seed.read_bytes())


def test_the_fuzz_corpus_is_there() -> None:
    """An empty corpus would make the test above vacuous; most seeds give exchanges."""
    assert len(SEEDS) >= 8
    assert sum(FUZZ.check(seed.read_bytes()) > 0 for seed in SEEDS) >= 6


PIECES = st.sampled_from((*REQUESTS, *RESPONSES, b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"HTTP/1.1 101 S\r\n\r\n", CHUNKED))
STEPS = st.lists(
    st.tuples(
        st.sampled_from((0, 1)),
        st.sampled_from((0, 0, 0, 0, 2, 4, 8, 16, 32, 48, 112, 128)),
        st.lists(PIECES | st.binary(max_size=6), max_size=4).map(b"".join),
        st.integers(0, 30),
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=80, deadline=None)
def test_hostile_segments_never_raise(steps) -> None:
    """Whatever comes, in whatever order, with whatever gaps: bounds hold and finished exchanges are complete."""
    data = b""
    for direction, extra, piece, cut in steps:
        piece = piece[: len(piece) - cut] if cut > 20 else piece
        data += bytes((direction | extra,)) + len(piece).to_bytes(2, "big") + piece
    FUZZ.check(data)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    """Nor does anything else."""
    FUZZ.check(data)
