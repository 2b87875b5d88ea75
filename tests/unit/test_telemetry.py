"""Telemetry: what is exposed, how the endpoint treats good and hostile clients, and how log lines look."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import telemetry
from agent.errors import ConfigError
from agent.telemetry import Metric, Source, Telemetry, configure_logging, event, parse_listen
from tests.fuzz import fuzz_telemetry

DROPPED = Metric("spanloom_dropped_total", "Exchanges that were dropped.", "counter", ("reason",))
HELD = Metric("spanloom_held_spans", "Spans that wait for their root.", "gauge")
PAIRS = Metric("spanloom_pairs", "By two labels.", "gauge", ("a", "b"))


class State:
    """What the fake agent would answer."""

    def __init__(self) -> None:
        self.ready = False
        self.healthy = True
        self.readings: dict[str, object] = {"spanloom_held_spans": 3}

    def is_ready(self) -> bool:
        return self.ready

    def is_healthy(self) -> bool:
        return self.healthy

    def read(self) -> dict[str, object]:
        return self.readings


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def server(state: State) -> Iterator[Telemetry]:
    server = Telemetry([Source((DROPPED, HELD, PAIRS), state.read)], state.is_ready, state.is_healthy)
    server.start("127.0.0.1:0")
    yield server
    server.stop()


def connect(server: Telemetry) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def read_all(client: socket.socket) -> bytes:
    data = b""
    while chunk := client.recv(65536):
        data += chunk
    return data


def ask(server: Telemetry, request: bytes) -> tuple[int, dict[str, str], str]:
    """Status, headers in lower case, body of the response to raw request bytes."""
    with connect(server) as client:
        client.sendall(request)
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status_line.split()[1]), headers, body.decode()


def get(server: Telemetry, path: str, accept: str = "", method: str = "GET") -> tuple[int, dict[str, str], str]:
    return ask(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("the condition never came true")


def test_counters_are_exposed_with_their_declaration(server: Telemetry, state: State) -> None:
    """HELP, TYPE and one sample per label value, read at the time of the scrape."""
    state.readings = {
        "spanloom_dropped_total": {"ring_full": 7, ("evicted",): 2},
        "spanloom_held_spans": 3,
        "spanloom_pairs": {("x", "y"): 1.5},
    }
    status, headers, body = get(server, "/metrics")
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["content-length"]) == len(body)
    assert "# HELP spanloom_dropped_total Exchanges that were dropped.\n# TYPE spanloom_dropped_total counter\n" in body
    assert 'spanloom_dropped_total{reason="ring_full"} 7.0\nspanloom_dropped_total{reason="evicted"} 2.0\n' in body
    assert "# TYPE spanloom_held_spans gauge\nspanloom_held_spans 3.0\n" in body
    assert 'spanloom_pairs{a="x",b="y"} 1.5\n' in body
    state.readings = {"spanloom_held_spans": 4}
    body = get(server, "/metrics")[2]
    assert "spanloom_held_spans 4.0\n" in body
    assert "spanloom_dropped_total" not in body


def test_the_agents_own_process_is_exposed(server: Telemetry) -> None:
    """CPU seconds, resident bytes and open descriptors under the names every dashboard knows."""
    body = get(server, "/metrics")[2]
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert re.search(rf"^{name} [0-9.e+]+$", body, re.MULTILINE)


def test_openmetrics_is_negotiated(server: Telemetry) -> None:
    """Prometheus asks for it; the format ends with its own mark."""
    status, headers, body = get(server, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=x.y",
        "text/plain;version=;escaping=?",
        ",;=,",
        "application/openmetrics-text;version=\n1.0.0",
        "application/openmetrics-text;version=\x0b1.0.0",
        "application/openmetrics-text;version=" + "9" * 5000,
    ],
)
def test_a_strange_accept_header_still_gets_metrics(server: Telemetry, accept: str) -> None:
    """The negotiation of the library may not know it, or may repeat what must not be in a header."""
    status, headers, body = get(server, "/metrics", accept)
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "spanloom_held_spans 3.0\n" in body


def test_a_failing_source_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """It is left out, logged once and counted; a source with wrong labels is one of them."""

    def fail() -> dict[str, float]:
        raise RuntimeError("boom")

    wrong_labels = Source((DROPPED,), lambda: {DROPPED.name: 1.0})
    sources = [Source((PAIRS,), fail), wrong_labels, Source((HELD,), lambda: {HELD.name: 1})]
    server = Telemetry(sources, lambda: True, lambda: True)
    server.start("127.0.0.1:0")
    try:
        with caplog.at_level(logging.ERROR, "spanloom.telemetry"):
            get(server, "/metrics")
            body = get(server, "/metrics")[2]
    finally:
        server.stop()
    assert "spanloom_held_spans 1.0\n" in body
    assert "spanloom_telemetry_source_errors_total 4.0\n" in body
    assert [record.getMessage() for record in caplog.records] == ["metric_source_failed"] * 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("spanloom_x", "counter"),
        ("spanloom_x_total", "gauge"),
        ("spanloom_x", "histogram"),
        ("Bad-Name", "gauge"),
        ("", "gauge"),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(name: str, kind: str) -> None:
    """At import time of the declaring module and not at the first scrape."""
    with pytest.raises(ValueError, match=r"counter|lower case"):
        Metric(name, "help", kind)


def test_readiness_and_health_follow_the_agent(server: Telemetry, state: State) -> None:
    """200 or 503, with a one-line reason."""
    status, _, body = get(server, "/readyz")
    assert (status, body) == (503, "not ready: the probes are not attached\n")
    state.ready = True
    assert get(server, "/readyz?verbose=1")[::2] == (200, "ready\n")
    assert get(server, "/healthz")[::2] == (200, "ok\n")
    state.healthy = False
    assert get(server, "/healthz")[0] == 503


def test_head_has_the_headers_of_get_without_a_body(server: Telemetry) -> None:
    """RFC 9110, 9.3.2."""
    status, headers, body = get(server, "/healthz", method="HEAD")
    assert (status, headers["content-length"], body) == (200, "3", "")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /other HTTP/1.1\r\n\r\n", 404),
        (b"GET / HTTP/1.0\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"y" * 9000, 431),
        (b"\xff" * 100_000, 431),
        (b"POST /metrics HTTP/1.1\r\n\r\n" + b"z" * 200_000, 405),
    ],
)
def test_other_requests_get_a_plain_answer(server: Telemetry, request_bytes: bytes, status: int) -> None:
    """Unknown path, other method, garbage, TLS, a head beyond 8 KiB, an unread body: an answer and an orderly close."""
    got, headers, _ = ask(server, request_bytes)
    assert got == status
    assert headers["connection"] == "close"
    assert ("allow" in headers) == (status == 405)
    assert get(server, "/healthz")[0] == 200


def test_a_request_may_come_byte_by_byte(server: Telemetry) -> None:
    """Segments do not matter."""
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\n\r\n":
            client.sendall(bytes([byte]))
        assert read_all(client).endswith(b"ok\n")


@pytest.mark.parametrize(("over", "status"), [(-1, 200), (0, 200), (1, 431), (800, 431)])
@pytest.mark.parametrize("segment_bytes", [1, 1000, 8192, 100_000])
def test_the_bound_of_a_head_does_not_depend_on_its_segments(over: int, status: int, segment_bytes: int) -> None:
    """8192 bytes with the empty line, however many arrive at once."""
    start, end = b"GET /metrics HTTP/1.1\r\nX: ", b"\r\n\r\n"
    head = start + b"y" * (8192 - len(start) - len(end) + over) + end
    segments = [head[position : position + segment_bytes] for position in range(0, len(head), segment_bytes)]
    response = fuzz_telemetry.answer(segments)
    assert response is not None
    assert response.startswith(b"HTTP/1.1 %d " % status)


METHODS = st.sampled_from([b"GET", b"HEAD", b"POST", b"get", b"G\0T", b""])
TARGETS = st.sampled_from([b"/healthz", b"/readyz?a", b"/metrics", b"/other", b"*", b"http://a/metrics", b"/\xff", b""])
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.1\n", b"HTTP/2.0", b"http/1.1", b""])
PARAMETERS = st.sampled_from(
    [b"version=", b"escaping=", b"1.0.0", b"0.0.4", b"\n", b"\x0b", b"x", b"=", b"dots", b"9" * 20]
)
RANGES = st.tuples(
    st.sampled_from([b"application/openmetrics-text", b"text/plain", b"*/*", b""]), st.lists(PARAMETERS, max_size=4)
).map(lambda parts: b";".join([parts[0], b"".join(parts[1])]))
FIELDS = (
    st.lists(RANGES, max_size=3).map(lambda ranges: b"Accept: " + b",".join(ranges))
    | st.binary(max_size=20)
    | st.sampled_from([b"Host: a", b"Accept:", b": ", b"X: " + b"y" * 8150])
)
REQUESTS = st.tuples(METHODS, TARGETS, VERSIONS, st.lists(FIELDS, max_size=3), st.binary(max_size=8)).map(
    lambda parts: b"\r\n".join([b" ".join(parts[:3]), *parts[3], b"", parts[4]])
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 255), REQUESTS | st.binary(max_size=60))
def test_any_request_gets_one_well_formed_answer(segment_bytes: int, request: bytes) -> None:
    """Or waits for more; in any segments the same."""
    fuzz_telemetry.check(bytes([segment_bytes]) + request)


def test_clients_that_hold_connections_cannot_lock_out_a_probe(server: Telemetry) -> None:
    """Of more than eight connections the oldest is closed, so the newest is always served."""
    held = [connect(server) for _ in range(14)]
    assert get(server, "/healthz")[0] == 200
    assert held[0].recv(1) == b""
    assert len(server._connections) <= 8
    for client in held:
        client.close()
    wait_until(lambda: not server._connections)


def test_a_slow_client_is_cut_off(server: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte now and then does not extend the time a connection has."""
    monkeypatch.setattr(telemetry, "_CONNECTION_SECONDS", 0.05)
    with connect(server) as client:
        client.sendall(b"GET /hea")
        assert client.recv(100) == b""


def test_a_client_that_does_not_read_does_not_stop_the_others(server: Telemetry, state: State) -> None:
    """A response larger than the socket buffers waits for its reader while another request is served."""
    state.readings = {"spanloom_dropped_total": {f"r{i}" * 500: 1.0 for i in range(4000)}}
    with connect(server) as lazy:
        lazy.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert get(server, "/healthz")[0] == 200
        body = read_all(lazy)
    assert body.count(b"spanloom_dropped_total{") == 4000


def test_a_reset_connection_is_harmless(server: Telemetry) -> None:
    """RST in the middle of a request."""
    client = connect(server)
    client.sendall(b"GET /")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert get(server, "/healthz")[0] == 200


def test_a_defect_in_a_callback_is_a_500() -> None:
    """The endpoint goes on answering."""

    def fail() -> bool:
        raise RuntimeError("boom")

    server = Telemetry([], fail, lambda: True)
    server.start("127.0.0.1:0")
    try:
        assert get(server, "/readyz")[0] == 500
        assert get(server, "/healthz")[0] == 200
    finally:
        server.stop()


def test_an_address_in_use_is_a_configuration_error(server: Telemetry) -> None:
    """It names the setting."""
    second = Telemetry([], lambda: True, lambda: True)
    with pytest.raises(ConfigError, match=rf"telemetry\.listen: cannot listen on 127\.0\.0\.1:{server.port}: "):
        second.start(f"127.0.0.1:{server.port}")
    second.stop()


def test_stop_frees_the_port_and_may_be_repeated(server: Telemetry) -> None:
    """Open connections are closed, and the same address can be listened on again."""
    port = server.port
    with connect(server) as client:
        server.stop()
        server.stop()
        assert client.recv(1) == b""
    server.start(f"127.0.0.1:{port}")
    assert get(server, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:9469", ("127.0.0.1", 9469)),
        (":9469", ("", 9469)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_listen_addresses(listen: str, expected: tuple[str, int]) -> None:
    """Host and port; IPv6 in brackets; no host means all addresses."""
    assert parse_listen(listen) == expected


@pytest.mark.parametrize("listen", ["", "9469", "host", "host:", "host:x", "host:65536", "::1:9469", "host:-1", "h:٣"])
def test_what_is_no_listen_address(listen: str) -> None:
    """The error names the setting and shows how it should look."""
    with pytest.raises(ConfigError, match=r"telemetry\.listen: .* is not host:port"):
        parse_listen(listen)


def test_an_impossible_host_is_a_configuration_error() -> None:
    """Also one that cannot even be looked up."""
    with pytest.raises(ConfigError, match=r"telemetry\.listen"):
        Telemetry([], lambda: True, lambda: True).start("x" * 80 + ".invalid:80")


def test_the_library_is_imported_at_the_first_scrape_only() -> None:
    """An agent that nobody scrapes does not pay its 9 MB."""
    code = "import sys, agent.telemetry as t; s = t.Telemetry([], bool, bool); s.start('127.0.0.1:0'); s.stop()"
    subprocess.run([sys.executable, "-c", code + "; assert 'prometheus_client' not in sys.modules"], check=True)


# ------------------------------------------------------------------------------------------------ logging


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("spanloom")
    before = (list(root.handlers), root.level, own.level, logging.raiseExceptions)
    yield
    root.handlers[:], level, own_level, logging.raiseExceptions = before
    root.setLevel(level)
    own.setLevel(own_level)


pytestmark = pytest.mark.usefixtures("restored_logging")


def logged(format: str, emit: Callable[[logging.Logger], None], level: str = "info") -> str:
    stream = io.StringIO()
    configure_logging(level, format, stream)
    emit(logging.getLogger("spanloom.test"))
    return stream.getvalue()


def test_json_logs_are_one_object_per_line() -> None:
    """Time in UTC, level, logger, event, then the event's own fields with their types."""
    text = logged("json", lambda log: event(log, "probes_attached", programs=7, names=("a", "b"), ok=True))
    record = json.loads(text)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "info",
        "logger": "spanloom.test",
        "event": "probes_attached",
        "programs": 7,
        "names": ["a", "b"],
        "ok": True,
    }
    assert text.count("\n") == 1


def test_json_fields_cannot_replace_the_record_or_break_it() -> None:
    """Equal names get an underscore; what JSON does not know is shown as text; surrogates do not raise."""
    text = logged("json", lambda log: event(log, "x", event="y", level_=1, thing=object, bad="\ud800", time=5))
    record = json.loads(text)
    assert "x" in record["event"]
    assert "y" in record["event_"]
    assert "class 'object'" in record["thing"]
    assert record["bad"]


def test_text_logs_are_made_for_reading() -> None:
    """HH:MM:SS level event key=value, quoted only where needed."""
    text = logged("text", lambda log: event(log, "export_failed", level=logging.WARNING, status="a b", n=3, empty=""))
    assert re.fullmatch(r'\d\d:\d\d:\d\d warning export_failed status="a b" n=3 empty=""\n', text)


def test_extra_is_shown_as_fields() -> None:
    """Modules that use plain logging need no helper."""
    emit = lambda log: log.info("started with %s", "x", extra={"port": 80})  # noqa: E731 - a one-line emitter
    assert logged("text", emit).endswith(" started with x port=80\n")
    assert json.loads(logged("json", emit))["port"] == 80


def test_nothing_can_inject_a_line_or_an_escape_into_text_logs() -> None:
    """Newlines, escapes and quotes of hostile values are escaped."""
    text = logged("text", lambda log: log.info("bad\nline", extra={"k": '\x1b[2J"\r\n\u202e'}))
    assert text.endswith(r'bad\nline k="\x1b[2J\"\r\n\u202e"' + "\n")
    assert text.count("\n") == 1


@pytest.mark.parametrize("format", ["json", "text"])
def test_exceptions_are_logged_with_their_traceback(format: str) -> None:
    """In the record's own object, or indented below its line."""

    def emit(log: logging.Logger) -> None:
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            log.exception("failed")

    text = logged(format, emit)
    assert "RuntimeError: boom" in text
    if format == "json":
        assert "Traceback" in json.loads(text)["exception"]
    else:
        assert all(line.startswith("    ") for line in text.splitlines()[1:])


def test_levels_hold_for_our_loggers_and_libraries_speak_from_warning_on() -> None:
    """Debug does not switch on the debug output of grpc."""

    def emit(log: logging.Logger) -> None:
        log.debug("ours")
        logging.getLogger("grpc").info("theirs")
        logging.getLogger("grpc").warning("important")

    assert [line.split()[2] for line in logged("text", emit, "debug").splitlines()] == ["ours", "important"]
    assert [line.split()[2] for line in logged("text", emit, "error").splitlines()] == ["important"]


def test_configuring_twice_does_not_double_the_lines() -> None:
    """A reload replaces the handler."""
    configure_logging("info", "json", io.StringIO())
    assert logged("text", lambda log: log.info("once")).count("once") == 1


def test_auto_is_text_on_a_terminal_and_json_elsewhere() -> None:
    """A collector reads stderr when no person does."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    configure_logging("info", "auto", terminal)
    logging.getLogger("spanloom.test").info("hello")
    assert terminal.getvalue().endswith(" hello\n")
    assert json.loads(logged("auto", lambda log: log.info("hello")))["event"] == "hello"


@pytest.mark.parametrize(("level", "format"), [("loud", "json"), ("info", "xml"), ("INFO", "json")])
def test_wrong_logging_settings_are_configuration_errors(level: str, format: str) -> None:
    """The message lists what is allowed."""
    with pytest.raises(ConfigError, match="is not one of"):
        configure_logging(level, format, io.StringIO())
