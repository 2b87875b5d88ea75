"""The console: golden waterfalls, when traces are printed, JSON lines, and hostile names."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.console import JsonConsole, TreeConsole, format_duration, render_trace
from agent.errors import ExportError
from agent.model import Span, SpanKind, SpanLink
from agent.process import ProcessInfo

TRACE_ID = bytes(range(16))
EPOCH_NS = 1_700_000_000_000_000_000
SERVER, CLIENT = SpanKind.SERVER, SpanKind.CLIENT


def make(
    service: str,
    span_id: int,
    parent: int,
    name: str,
    kind: int,
    start_ms: float,
    end_ms: float,
    method: str = "",
    *,
    error: bool = False,
    links: int = 0,
    trace_id: bytes = TRACE_ID,
    **attributes: Any,
) -> tuple[Span, ProcessInfo]:
    """A span and its process; ``url__path="/x"`` becomes the attribute ``url.path``; parent 0 is none."""
    info = ProcessInfo(
        (7, 70),
        service,
        f"/usr/bin/{service}",
        ("--password=secret",),
        "",
        service,
        (("service.name", service), ("process.pid", 7), ("telemetry.sdk.name", "spanloom")),
        True,
    )
    span = Span(
        trace_id,
        span_id.to_bytes(8, "big"),
        parent.to_bytes(8, "big") if parent else b"",
        "",
        name,
        kind,
        EPOCH_NS + int(start_ms * 1e6),
        EPOCH_NS + int(end_ms * 1e6),
        tuple((key.replace("__", "."), value) for key, value in attributes.items()),
        error,
        tuple(SpanLink(TRACE_ID, bytes(8), "", (("k", 1),)) for _ in range(links)),
        method,
        True,
        (7, 70),
    )
    return span, info


def status(code: int) -> dict[str, Any]:
    failed = {"error__type": str(code)} if code >= 500 else {}
    return {"http__response__status_code": code, **failed}


CHECKOUT = [
    make("frontend", 1, 0, "GET", SERVER, 0, 48.2, url__path="/checkout", **status(200)),
    make("frontend", 2, 1, "GET", CLIENT, 1.2, 20.4, "thread", url__full="http://10.0.0.2/cart/17?x=1", **status(200)),
    make("cart", 3, 2, "GET", SERVER, 1.6, 20.1, "peer", url__path="/cart/17", **status(200)),
    make("cart", 4, 3, "GET", CLIENT, 2, 9.1, "header", url__full="http://10.0.0.3:81/price/a", **status(200)),
    make("pricing", 5, 4, "GET /price/{id}", SERVER, 2.3, 8.8, "peer", http__route="/price/{id}", **status(200)),
    make("cart", 6, 3, "GET", CLIENT, 9.2, 19.3, "header", links=1, url__full="http://10.0.0.3/price/b", **status(200)),
    make("pricing", 7, 6, "GET /price/{id}", SERVER, 9.4, 19.2, "peer", http__route="/price/{id}", **status(200)),
    make("frontend", 8, 1, "POST", CLIENT, 21, 47.9, "forwarded", error=True, url__full="http://x/pay", **status(503)),
    make("payments", 9, 8, "POST", SERVER, 21.4, 47.5, "peer", error=True, url__path="/pay", **status(503)),
    make(
        "payments", 10, 9, "POST", CLIENT, 22, 47, "request_id", error=True,
        url__full="https://REDACTED:REDACTED@bank.example.com/authorize", error__type="connection_reset",
    ),
]  # fmt: skip

CHECKOUT_100 = """\
trace 000102030405060708090a0b0c0d0e0f  48.2 ms  10 spans  4 services  3 errors
service   span                           status   0 ─────────────── 48.2 ms     time  linked by
frontend  GET /checkout                  200      ━━━━━━━━━━━━━━━━━━━━━━━━━  48.2 ms  root
frontend  ├╴→ GET /cart/17               200      ╶──────────                19.2 ms  thread
cart      │ ╰╴GET /cart/17               200      ╺━━━━━━━━━╸                18.5 ms  peer
cart      │   ├╴→ GET /price/a           200       ────                      7.10 ms  header
pricing   │   │ ╰╴GET /price/{id}        200       ━━━━                      6.50 ms  peer
cart      │   ╰╴→ GET /price/b           200          ╶─────╴                10.1 ms  header +1 link
pricing   │     ╰╴GET /price/{id}        200          ╺━━━━━                 9.80 ms  peer
frontend  ╰╴→ POST /pay                  503 ✗              ╶──────────────  26.9 ms  forwarded
payments    ╰╴POST /pay                  503 ✗               ━━━━━━━━━━━━━━  26.1 ms  peer
payments      ╰╴→ POST bank.example.co…  reset ✗             ─────────────╴  25.0 ms  request id
"""

CHECKOUT_60_ASCII = """\
trace 000102030405060708090a0b0c0d0e0f
48.2 ms  10 spans  4 services  3 errors
service  span            status              time linked by
frontend GET /checkout   200     ======== 48.2 ms root
frontend |-> GET /cart/~ 200     ----     19.2 ms thread
cart     | `-GET /cart/~ 200     ====     18.5 ms peer
cart     |   |-> GET /p~ 200     --       7.10 ms header
pricing  |   | `-GET /p~ 200     ==       6.50 ms peer
cart     |   `-> GET /p~ 200      ---     10.1 ms header +1~
pricing  |     `-GET /p~ 200      ===     9.80 ms peer
frontend `-> POST /pay   503 !      ----- 26.9 ms forwarded
payments   `-POST /pay   503 !      ===== 26.1 ms peer
payments     `-> POST b~ reset !    ----- 25.0 ms request id
"""

CHECKOUT_COLOUR = """\
^[1mtrace 000102030405060708090a0b0c0d0e0f^[0m  48.2 ms  3 spans  1 service^[31m  1 error^[0m
^[2mservice   span                    status  0 ──────── 48.2 ms     time  linked by^[0m
^[1mfrontend^[0m  GET /checkout           200     ^[32m━━━━━━━━━━━━━━━━━━^[0m  48.2 ms  ^[2mroot^[0m
frontend  ^[2m├╴→ ^[0mGET 10.0.0.2/cart…  200     ^[36m────────          ^[0m  19.2 ms  ^[2mthread^[0m
frontend  ^[2m╰╴→ ^[0mPOST x/pay          ^[31m503 ✗ ^[0m  ^[31m       ╶──────────^[0m  26.9 ms  ^[2mforwarded^[0m
"""

BROKEN = [
    make("api", 1, 99, "GET", SERVER, 5, 9, "header", url__path="/orphan"),
    make("api", 2, 1, "GET", CLIENT, 6, 8, "thread", url__full="http://b/x"),
    make("loop", 3, 4, "GET", SERVER, 1, 4, "peer"),
    make("loop", 4, 3, "GET", CLIENT, 2, 3, "thread"),
    make("self", 5, 5, "GET", SERVER, 0, 10, "header"),
    make("twin", 6, 0, "HTTP", SERVER, 3, 3),
    make("twin", 6, 0, "HTTP", SERVER, 3, 3),
]

BROKEN_80 = """\
trace 000102030405060708090a0b0c0d0e0f  10.0 ms  7 spans  4 services
service  span         status  0 ──────────────── 10.0 ms     time  linked by
twin     HTTP                        ╺                       0 ns  root
twin     HTTP                        ╺                       0 ns  root
api      GET /orphan                       ━━━━━━━━━━╸    4.00 ms  remote parent
api      ╰╴→ GET b/x                         ╶─────       2.00 ms  thread
self     GET                  ━━━━━━━━━━━━━━━━━━━━━━━━━━  10.0 ms  cycle
loop     GET                    ╺━━━━━━━╸                 3.00 ms  cycle
loop     ╰╴→ GET                   ───                    1.00 ms  thread
"""


def test_a_trace_is_drawn_as_a_tree_with_aligned_columns() -> None:
    """Service, indented name, status, bar on the time line, duration and link method stand in columns."""
    assert render_trace(CHECKOUT, 100) == CHECKOUT_100


def test_a_narrow_terminal_without_unicode_gets_ascii_in_sixty_columns() -> None:
    """The least width is 60; the header then takes two lines and the drawing is pure ASCII."""
    assert render_trace(CHECKOUT, 20, ascii_only=True) == CHECKOUT_60_ASCII


def test_colours_tell_server_client_and_error_apart() -> None:
    """Bars are green for servers, cyan for clients, red for errors; without the colours the text is the same."""
    text = render_trace([CHECKOUT[0], CHECKOUT[1], CHECKOUT[7]], 80, colour=True)
    assert text == CHECKOUT_COLOUR.replace("^", "\x1b")


def test_orphans_cycles_and_duplicate_ids_are_all_shown_once() -> None:
    """A span without its parent stands at the top level and says so; a cycle is cut at its earliest span."""
    assert render_trace(BROKEN, 80) == BROKEN_80


def test_the_order_of_arrival_does_not_matter() -> None:
    """Children finish before their parents, so spans come in any order."""
    assert render_trace(CHECKOUT[::-1], 100) == CHECKOUT_100


def test_no_spans_give_no_text() -> None:
    """An empty trace is not an error."""
    assert render_trace([], 100) == ""


def test_a_very_deep_trace_is_drawn_without_recursion() -> None:
    """3000 nested spans give 3000 lines, none of them wider than the terminal."""
    spans = [make("s", i + 1, i, "GET", SERVER, i, 6000 - i, "peer") for i in range(3000)]
    lines = render_trace(spans, 100).splitlines()
    assert len(lines) == 3002
    assert max(map(len, lines)) <= 100
    assert "GET" in lines[-1]


def cells(text: str) -> int:
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 6), st.integers(0, 6), st.text(max_size=40), st.text(max_size=40), st.integers(0, 3),
            st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12), st.text(max_size=30), st.booleans(),
        ),
        min_size=1, max_size=12,
    ),
    st.integers(0, 300),
    st.booleans(),
)  # fmt: skip
def test_anything_renders_within_the_width_and_without_control_characters(
    rows: list[tuple[Any, ...]], width: int, ascii_only: bool
) -> None:
    """Any ids, times and texts: every span has one line, no line is too long, and only newlines are unprintable."""
    spans = [
        make(
            service,
            i,
            parent,
            name,
            kind,
            start / 1e6,
            end / 1e6,
            method,
            error=error,
            url__path=name,
            error__type=name,
        )
        for i, parent, service, name, kind, start, end, method, error in rows
    ]
    text = render_trace(spans, width, False, ascii_only)
    lines = text.split("\n")[:-1]
    assert len(lines) in (len(spans) + 2, len(spans) + 3)
    assert all(line.isprintable() for line in lines)
    assert max(map(cells, lines)) <= max(60, min(width, 160))
    assert text.isascii() or not ascii_only


def test_terminal_escapes_in_names_are_neutralised() -> None:
    """Nothing that traffic or a process name contains can move the cursor, set a title or reverse the text."""
    hostile = "\x1b]0;owned\x07\x9b2J\u202e\r\n"
    spans = [make(hostile, 1, 0, hostile, SERVER, 0, 1, error=True, error__type=hostile, url__path=hostile)]
    text = render_trace(spans, 160)
    assert len(text.splitlines()) == 3
    assert "\ufffd]0;owned\ufffd\ufffd2J" in text
    assert not set(hostile[:1] + "\x07\x9b\u202e\r") & set(text)


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1.00 µs"),
        (12_345, "12.3 µs"),
        (999_499, "999 µs"),
        (999_500, "1.00 ms"),
        (9_994_000, "9.99 ms"),
        (9_996_000, "10.0 ms"),
        (48_200_000, "48.2 ms"),
        (1_204_000_000, "1.20 s"),
        (59_940_000_000, "59.9 s"),
        (59_950_000_000, "1m 00s"),
        (3_723_000_000_000, "62m 03s"),
        (-1500, "-1.50 µs"),
    ],
)
def test_durations_have_three_digits_and_the_unit_that_fits(duration_ns: int, text: str) -> None:
    """Rounding never shows 1000 of a unit or 60 seconds."""
    assert format_duration(duration_ns) == text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 100.0

    def __call__(self) -> float:
        return self.now_seconds


def test_a_trace_is_printed_when_it_has_been_quiet() -> None:
    """A new span starts the wait again; then the whole trace comes at once, followed by an empty line."""
    stream, clock = io.StringIO(), Clock()
    console = TreeConsole(stream, quiet_seconds=0.6, clock=clock, width=100, colour=False)
    console.write(CHECKOUT[5:])
    clock.now_seconds += 0.5
    console.write(CHECKOUT[:5])
    clock.now_seconds += 0.5
    console.tick()
    assert stream.getvalue() == ""
    clock.now_seconds += 0.11
    console.tick()
    assert stream.getvalue() == CHECKOUT_100 + "\n"
    console.flush()
    assert stream.getvalue() == CHECKOUT_100 + "\n"


def test_flush_prints_what_waits() -> None:
    """At the end nothing is kept back."""
    stream = io.StringIO()
    console = TreeConsole(stream, clock=Clock(), width=100, colour=False)
    console.write(CHECKOUT)
    console.flush()
    assert stream.getvalue() == CHECKOUT_100 + "\n"


def test_too_many_traces_print_the_longest_silent_one_early() -> None:
    """The bound is on traces; the trace that just got a span is not the one to go."""
    stream = io.StringIO()
    console = TreeConsole(stream, clock=Clock(), width=100, colour=False, max_traces=2)
    a, b, c = (make("s", 1, 0, "GET", SERVER, 0, 1, trace_id=bytes([n]) * 16) for n in (0xAA, 0xBB, 0xCC))
    console.write([a, b, a, c])
    assert stream.getvalue().count("trace ") == 1
    assert "bb" * 16 in stream.getvalue()
    assert console.printed_early == 1


def test_too_many_spans_print_even_the_only_trace() -> None:
    """One endless trace cannot grow without bound."""
    stream = io.StringIO()
    console = TreeConsole(stream, clock=Clock(), width=100, colour=False, max_spans=3)
    console.write(make("s", i, 0, "GET", SERVER, 0, 1) for i in range(1, 10))
    assert [line for line in stream.getvalue().splitlines() if "4 spans" in line] != []
    assert console.printed_early == 2


def test_colours_need_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets none; NO_COLOR turns them off unless it is empty; so does a dumb terminal."""

    def has_escape(stream: io.StringIO) -> bool:
        console = TreeConsole(stream, width=100)
        console.write(CHECKOUT)
        console.flush()
        return "\x1b[" in stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")
    assert has_escape(Terminal())
    assert not has_escape(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_escape(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_escape(Terminal())


def test_a_stream_that_cannot_encode_the_drawing_gets_ascii() -> None:
    """No UnicodeEncodeError under LANG=C."""
    raw = io.BytesIO()
    console = TreeConsole(io.TextIOWrapper(raw, encoding="ascii"), clock=Clock(), width=60)
    console.write(CHECKOUT)
    console.flush()
    assert raw.getvalue().decode("ascii") == CHECKOUT_60_ASCII + "\n"


def test_json_has_one_object_per_line_with_every_field() -> None:
    """Ids in hex, times as text and as integers, and of the resource only what identifies the process."""
    stream = io.StringIO()
    JsonConsole(stream).write(CHECKOUT[5:7])
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first == {
        "trace_id": "000102030405060708090a0b0c0d0e0f",
        "span_id": "0000000000000006",
        "parent_span_id": "0000000000000003",
        "trace_state": "",
        "name": "GET",
        "kind": "client",
        "start": "2023-11-14T22:13:20.009200000Z",
        "end": "2023-11-14T22:13:20.019300000Z",
        "start_time_ns": 1_700_000_000_009_200_000,
        "end_time_ns": 1_700_000_000_019_300_000,
        "duration_ns": 10_100_000,
        "status": "unset",
        "attributes": {"url.full": "http://10.0.0.3/price/b", "http.response.status_code": 200},
        "links": [{"trace_id": TRACE_ID.hex(), "span_id": "0000000000000000", "attributes": {"k": 1}}],
        "link_method": "header",
        "sampled": True,
        "resource": {"service.name": "cart", "process.pid": 7},
    }
    assert second["kind"] == "server"
    assert "secret" not in stream.getvalue()


def test_json_shows_an_error_status() -> None:
    """The status is the span's, not guessed from the code."""
    stream = io.StringIO()
    JsonConsole(stream).write([CHECKOUT[7]])
    assert json.loads(stream.getvalue())["status"] == "error"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_carries_any_text_on_one_line(encoding: str) -> None:
    """Line separators, C1 controls, lone surrogates and a narrow encoding: one line of valid JSON, equal when read."""
    name = "\x1b[2J\x9b\x7f\u2028é漢\U0001f600\ud800"
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    JsonConsole(stream).write([make("s", 1, 0, name, SERVER, 0, 1), make("s", 2, 0, name[:-1], SERVER, 0, 1)])
    text = raw.getvalue().decode(encoding)
    assert len(text.splitlines()) == 2
    assert [json.loads(line)["name"] for line in text.splitlines()] == [name, name[:-1]]
    assert all(character.isprintable() for character in text if character != "\n")


@pytest.mark.parametrize(("console_class", "options"), [(JsonConsole, {}), (TreeConsole, {"max_spans": 1})])
def test_a_reader_that_went_away_is_an_export_error(console_class: type, options: dict[str, int]) -> None:
    """`spanloom run | head` ends with a reason, not with a traceback."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = console_class(Broken(), **options)
    with pytest.raises(ExportError) as caught:
        console.write(CHECKOUT)
    assert caught.value.reason == "console_closed"
