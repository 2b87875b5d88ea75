"""The exporter against a real gRPC collector on 127.0.0.1."""

import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import __version__
from agent.errors import ConfigError
from agent.otlp import exporter as exporter_module
from agent.otlp.encode import encode_request, encode_resource, encode_span
from agent.otlp.exporter import Destination, ExporterSettings, OtlpExporter
from agent.otlp.retry import partial_success, retry_delay_seconds, retry_info_seconds
from agent.otlp.settings import parse_endpoint
from tests.collector import Answer, Collector, status_with_retry_info
from tests.unit.otlp.test_encode import make_span

RETRYABLE = ["CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"]
FINAL = [
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "FAILED_PRECONDITION",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNKNOWN",
    "UNAUTHENTICATED",
]


def make_batch(span_count: int, name: str = "GET") -> tuple[bytes, int]:
    spans = [encode_span(make_span(name=name, span_id=number.to_bytes(8))) for number in range(1, span_count + 1)]
    return encode_request([(encode_resource((("service.name", "shop"),)), spans)]), span_count


@pytest.fixture
def collector():
    with Collector() as collector:
        yield collector


@contextmanager
def running(collector_or_endpoint: Collector | str, **changes: object):
    endpoint = collector_or_endpoint if isinstance(collector_or_endpoint, str) else collector_or_endpoint.endpoint
    fast = {"backoff_initial_seconds": 0.01, "backoff_max_seconds": 0.04, "timeout_seconds": 5.0}
    exporter = OtlpExporter(ExporterSettings(endpoint=endpoint, **(fast | changes)))
    try:
        yield exporter
    finally:
        exporter.close(0.0)
        check_books(exporter)
        assert exporter.in_flight_spans == 0


def check_books(exporter: OtlpExporter) -> None:
    counters = exporter.snapshot()
    settled = sum(count for reason, count in counters.dropped.items() if reason != "queue_full")
    assert counters.accepted == counters.exported + counters.rejected + settled + counters.in_flight


def wait_until(condition, timeout_seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_spans_arrive_with_headers_and_user_agent(collector):
    """Submitted batches arrive decoded and complete, with the configured headers and our user agent."""
    with running(collector, headers={"X-Tenant": "blue", "token-bin": "secret"}) as exporter:
        assert exporter.submit(*make_batch(3))
        assert exporter.submit(*make_batch(2, name="POST"))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == exporter.snapshot().accepted == 5
    assert sorted(span.name for span in collector.spans()) == ["GET"] * 3 + ["POST"] * 2
    assert all(span.resource == {"service.name": "shop"} for span in collector.spans())
    metadata = collector.requests[0].metadata
    assert metadata["x-tenant"] == "blue"
    assert metadata["token-bin"] == b"secret"
    assert metadata["user-agent"].startswith(f"spanloom/{__version__} ")


@pytest.mark.parametrize("code", RETRYABLE)
def test_retryable_codes_are_retried_until_success(collector, code):
    """Each retryable code is retried with the same payload, which is exported once and counted once."""
    collector.answer(*[Answer(code=grpc.StatusCode[code])] * 2)
    with running(collector) as exporter:
        payload, count = make_batch(4)
        assert exporter.submit(payload, count)
        assert exporter.flush(5)
        counters = exporter.snapshot()
    assert (counters.exported, counters.retries, counters.dropped) == (4, 2, {})
    assert [request.payload for request in collector.requests] == [payload] * 3
    assert collector.span_count == 4


@pytest.mark.parametrize("code", FINAL)
def test_other_codes_drop_the_batch(collector, code):
    """A code that is not retryable is tried once; its spans are counted under the code and the next batch goes on."""
    collector.answer(Answer(code=grpc.StatusCode[code], message="no"))
    with running(collector) as exporter:
        exporter.submit(*make_batch(4))
        assert exporter.flush(5)
        exporter.submit(*make_batch(1))
        assert exporter.flush(5)
        counters = exporter.snapshot()
    assert counters.dropped == {code.lower(): 4}
    assert (counters.exported, counters.retries, collector.request_count) == (1, 0, 2)


def test_resource_exhausted_without_retry_info_is_final(collector):
    """RESOURCE_EXHAUSTED alone drops the batch."""
    collector.answer(Answer(code=grpc.StatusCode.RESOURCE_EXHAUSTED))
    with running(collector) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().dropped == {"resource_exhausted": 2}


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_retry_info_delay_is_honoured(collector, code):
    """With RetryInfo the batch is retried, and not before the delay that the collector asked for."""
    collector.answer(Answer(code=grpc.StatusCode[code], retry_delay_seconds=0.15))
    with running(collector) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == 2
    first, second = collector.requests
    assert second.time_seconds - first.time_seconds >= 0.15


def test_retry_gives_up_at_the_elapsed_bound(collector):
    """A batch whose next attempt would begin after the bound is dropped at once, also for a long RetryInfo."""
    collector.answer(Answer(code=grpc.StatusCode.UNAVAILABLE, retry_delay_seconds=3600))
    with running(collector, retry_elapsed_seconds=30.0) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().dropped == {"retry_exhausted": 2}
        assert exporter.snapshot().retries == 0
    collector.answer(*[Answer(code=grpc.StatusCode.UNAVAILABLE)] * 1000)
    with running(collector, retry_elapsed_seconds=0.1) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().dropped == {"retry_exhausted": 2}
        assert exporter.snapshot().retries > 0


def test_partial_success_is_counted_and_never_retried(collector, caplog):
    """Rejected spans are counted beside the exported ones, the message is logged, and nothing is sent again."""
    collector.answer(Answer(rejected_spans=3, message="too\nold"), Answer(rejected_spans=99), Answer(message="hm"))
    with caplog.at_level(logging.INFO), running(collector) as exporter:
        for _ in range(3):
            exporter.submit(*make_batch(10))
            assert exporter.flush(5)
        counters = exporter.snapshot()
    assert (counters.exported, counters.rejected, counters.retries) == (17, 13, 0)
    assert collector.request_count == 3
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("otlp.partial_success") and r"'too\nold'" in line for line in lines)
    assert any(line.startswith("otlp.collector_warning") and "hm" in line for line in lines)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_log_speaks_of_state_changes_only(collector, caplog, monkeypatch):
    """Eight failed attempts and one recovery are two lines."""
    monkeypatch.setattr(exporter_module, "LOG_INTERVAL_SECONDS", 0.0)
    collector.answer(*[Answer(code=grpc.StatusCode.UNAVAILABLE, message="down")] * 8)
    with caplog.at_level(logging.INFO), running(collector) as exporter:
        exporter.submit(*make_batch(1))
        assert exporter.flush(10)
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["otlp.export_failing", "otlp.export_recovered"]


def test_a_flapping_collector_does_not_fill_the_log(collector, caplog):
    """States that alternate quickly are logged once each in the interval."""
    with caplog.at_level(logging.INFO), running(collector) as exporter:
        for _ in range(4):
            collector.answer(Answer(code=grpc.StatusCode.UNAVAILABLE))
            exporter.submit(*make_batch(1))
            assert exporter.flush(5)
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["otlp.export_failing", "otlp.export_recovered"]


def test_submit_refuses_beyond_the_span_bound_and_does_not_block(collector):
    """Spans that are not settled never exceed the bound; the refused ones are counted as such."""
    collector.answer(*[Answer(hang=True)] * 2)
    with running(collector, queue_spans=10, max_in_flight=1) as exporter:
        taken = [exporter.submit(*make_batch(4)) for _ in range(5)]
        assert taken == [True, True, False, False, False]
        assert exporter.submit(*make_batch(2))
        assert exporter.in_flight_spans == 10
        check_books(exporter)
        counters = exporter.snapshot()
        assert (counters.accepted, counters.dropped) == (10, {"queue_full": 12})
    assert exporter.snapshot().dropped == {"queue_full": 12, "shutdown": 10}


def test_submit_refuses_beyond_the_byte_bound(collector):
    """Few but large spans are bounded by their bytes, which settled batches give back."""
    collector.answer(Answer(delay_seconds=0.1))
    payload, count = make_batch(1, name="n" * 1000)
    with running(collector, queue_bytes=2 * len(payload) + 10) as exporter:
        assert [exporter.submit(payload, count) for _ in range(3)] == [True, True, False]
        assert exporter.snapshot().dropped == {"queue_full": 1}
        assert exporter.flush(5)
        assert [exporter.submit(payload, count) for _ in range(2)] == [True, True]


def test_close_does_not_hang_on_a_hanging_collector(collector):
    """close gives up in time, cancels the calls and accounts for the spans; later batches are dropped too."""
    collector.answer(*[Answer(hang=True)] * 2)
    with running(collector, timeout_seconds=60.0) as exporter:
        for _ in range(3):
            exporter.submit(*make_batch(2))
        assert collector.wait_for_requests(2)
        assert not exporter.flush(0.05)
        exporter.close(0.05)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("otlp-export")]
        assert exporter.snapshot().dropped == {"shutdown": 6}
        assert not exporter.submit(*make_batch(1))
        assert exporter.snapshot().dropped == {"shutdown": 7}
        exporter.close(0.0)


def test_close_does_not_hang_on_a_dead_or_silent_endpoint():
    """Neither a refused connection nor a peer that accepts and never speaks holds close up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (unused_port(), silent.getsockname()[1]):
            with running(f"http://127.0.0.1:{port}", timeout_seconds=60.0) as exporter:
                exporter.submit(*make_batch(2))
                exporter.close(0.1)
                assert exporter.snapshot().dropped == {"shutdown": 2}


def test_close_flushes_what_the_collector_still_takes(collector):
    """A slow collector gets everything within the time given to close."""
    collector.answer(Answer(delay_seconds=0.1))
    with running(collector, max_in_flight=1) as exporter:
        for _ in range(3):
            exporter.submit(*make_batch(2))
        exporter.close(5.0)
        assert exporter.snapshot().exported == 6


def test_close_tries_again_at_once_when_a_batch_waits_for_its_backoff(collector):
    """A long backoff does not cost the batch when the collector is back at the time of close."""
    collector.answer(Answer(code=grpc.StatusCode.UNAVAILABLE))
    with running(collector, backoff_initial_seconds=30.0) as exporter:
        exporter.submit(*make_batch(2))
        assert collector.wait_for_requests(1)
        exporter.close(5.0)
        assert exporter.snapshot().exported == 2


def test_an_attempt_without_answer_times_out_and_is_retried(collector):
    """The attempt's timeout is DEADLINE_EXCEEDED, which is retryable."""
    collector.answer(Answer(hang=True))
    with running(collector, timeout_seconds=0.2) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert (exporter.snapshot().exported, exporter.snapshot().retries) == (2, 1)


def test_a_collector_that_dies_and_comes_back_gets_everything(collector):
    """Batches submitted while the collector is down arrive after it is back on the same port."""
    with running(collector) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        collector.stop()
        for _ in range(4):
            exporter.submit(*make_batch(2))
        assert wait_until(lambda: exporter.snapshot().retries > 1)
        check_books(exporter)
        collector.start()
        assert exporter.flush(10)
        assert exporter.snapshot().exported == 10
    assert collector.span_count == 10


def test_the_books_balance_at_any_moment(collector):
    """accepted = exported + rejected + dropped + in flight holds in every snapshot while everything goes wrong."""
    failures = [
        Answer(code=grpc.StatusCode.UNAVAILABLE),
        Answer(code=grpc.StatusCode.INTERNAL),
        Answer(rejected_spans=2, message="old"),
        Answer(delay_seconds=0.01),
    ]
    collector.answer(*failures * 10)
    payload, count = make_batch(5)
    with running(collector, queue_spans=40) as exporter:
        submitted = 0
        while exporter.accepted < 300:
            submitted += count
            if not exporter.submit(payload, count):
                time.sleep(0.001)
            check_books(exporter)
            counters = exporter.snapshot()
            assert submitted == counters.accepted + counters.dropped.get("queue_full", 0)
        assert exporter.flush(10)
        counters = exporter.snapshot()
        assert counters.in_flight == 0
        assert counters.exported + counters.rejected == collector.span_count
        assert counters.dropped["internal"] > 0


def test_calls_run_side_by_side(collector):
    """One slow call does not hold up the other of two."""
    collector.answer(Answer(hang=True))
    with running(collector, max_in_flight=2, timeout_seconds=30.0) as exporter:
        exporter.submit(*make_batch(1))
        assert collector.wait_for_requests(1)
        exporter.submit(*make_batch(2))
        assert wait_until(lambda: exporter.exported == 2)
        assert exporter.in_flight_spans == 1


def test_gzip_reaches_the_collector_whole_and_smaller(collector):
    """With compression the same bytes are decoded from a much smaller message on the wire."""
    sizes = {}
    for compression in ("none", "gzip"):
        with relay(collector.port) as (port, received):
            with running(f"http://127.0.0.1:{port}", compression=compression) as exporter:
                payload, count = make_batch(500)
                exporter.submit(payload, count)
                assert exporter.flush(5)
            sizes[compression] = received[0]
        assert collector.requests[-1].payload == payload
    assert sizes["gzip"] < len(payload) / 4 < len(payload) <= sizes["none"]


@contextmanager
def relay(port: int):
    """``(port, [bytes from the client])`` of a TCP relay to a local port; for one connection."""
    received = [0]
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(65536):
                if counted:
                    received[0] += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        client, _ = server.accept()
        with client, socket.create_connection(("127.0.0.1", port)) as upstream:
            back = threading.Thread(target=pump, args=(upstream, client, False))
            back.start()
            pump(client, upstream, True)
            back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1], received
    finally:
        thread.join(5)
        server.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: paths of key and certificate."""
    directory = tmp_path_factory.mktemp("tls")
    key, cert = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    return key, cert


def test_tls_with_client_certificate(certificate):
    """https verifies the collector with the given CA and presents the client certificate."""
    key, cert = certificate
    pair = (key.read_bytes(), cert.read_bytes())
    with Collector(tls=pair, client_ca=cert.read_bytes()) as collector:
        files = {"certificate": str(cert), "client_key": str(key), "client_certificate": str(cert)}
        # ``insecure`` says otherwise, and the scheme wins.
        with running(collector, insecure=True, **files) as exporter:
            exporter.submit(*make_batch(2))
            assert exporter.flush(5)
            assert exporter.snapshot().exported == 2


def test_the_authorities_of_the_system_are_trusted_by_default(certificate, monkeypatch):
    """Without a CA of its own the exporter trusts what OpenSSL on this system trusts."""
    key, cert = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with Collector(tls=(key.read_bytes(), cert.read_bytes())) as collector, running(collector) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == 2


def test_an_unknown_certificate_is_not_accepted(certificate):
    """Without the CA the collector gets nothing, and the batch ends as not deliverable."""
    key, cert = certificate
    with Collector(tls=(key.read_bytes(), cert.read_bytes())) as collector:
        with running(collector, retry_elapsed_seconds=0.0) as exporter:
            exporter.submit(*make_batch(2))
            assert exporter.flush(10)
            assert exporter.snapshot().dropped == {"retry_exhausted": 2}
        assert collector.request_count == 0


def test_the_default_is_tls_without_a_scheme(collector):
    """host:port without a scheme is plaintext only when ``insecure`` says so."""
    with running(collector.address, insecure=True) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == 2
    with running(collector.address, retry_elapsed_seconds=0.0) as exporter:
        exporter.submit(*make_batch(2))
        assert exporter.flush(10)
        assert exporter.snapshot().exported == 0


@pytest.mark.parametrize(
    ("endpoint", "insecure", "expected"),
    [
        ("http://localhost:4317", False, ("localhost:4317", False)),
        ("http://collector", False, ("collector:4317", False)),
        ("HTTPS://Collector:443/", True, ("collector:443", True)),
        ("collector:4317", False, ("collector:4317", True)),
        ("collector:4317", True, ("collector:4317", False)),
        ("http://[::1]:55680", False, ("[::1]:55680", False)),
        ("[::1]", True, ("[::1]:4317", False)),
    ],
)
def test_endpoint_forms(endpoint, insecure, expected):
    """The scheme decides about TLS, over ``insecure``; the port defaults to 4317."""
    assert parse_endpoint(endpoint, insecure) == expected


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "http://",
        "ftp://host:1",
        "http://host:99999",
        "http://host:port",
        "http://host:0",
        "http://user:pass@host",
        "a b:1",
        "http://host:4318/v1/traces",
        "http://host?x=1",
        "http://[::1",
        "unix:///run/otlp.sock",
    ],
)
def test_bad_endpoints_are_config_errors(endpoint):
    """An endpoint that can never work is refused at the start, in one line, without showing a password."""
    with pytest.raises(ConfigError) as caught:
        OtlpExporter(ExporterSettings(endpoint=endpoint))
    assert "endpoint" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pass" not in str(caught.value)


def test_certificate_problems_are_config_errors_with_the_path(certificate, tmp_path):
    """Missing, unreadable, malformed and half-given certificate files are refused at the start."""
    key, cert = map(str, certificate)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    missing = str(tmp_path / "missing.pem")
    for files, named in [
        ({"certificate": missing}, missing),
        ({"certificate": str(tmp_path)}, str(tmp_path)),
        ({"certificate": str(garbage)}, str(garbage)),
        ({"client_key": missing, "client_certificate": cert}, missing),
        ({"client_key": str(garbage), "client_certificate": cert}, str(garbage)),
        ({"client_certificate": cert}, "client_key"),
        ({"client_key": key}, "client_certificate"),
    ]:
        with pytest.raises(ConfigError) as caught:
            OtlpExporter(ExporterSettings(endpoint="https://collector", **files))
        assert named in str(caught.value)


@pytest.mark.parametrize(
    "headers", [{"bad name": "v"}, {"": "v"}, {"grpc-timeout": "v"}, {"x": "s3cret\n"}, {"x": "s3cretü"}]
)
def test_bad_headers_are_config_errors(headers):
    """Headers that gRPC cannot send are refused at the start; the error does not show a value."""
    with pytest.raises(ConfigError, match="headers") as caught:
        OtlpExporter(ExporterSettings(headers=headers))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["timeout_seconds", "queue_spans", "max_in_flight"])
def test_bounds_must_be_positive(name):
    """A bound of 0 would export nothing and is refused with the setting's name."""
    with pytest.raises(ConfigError, match=name):
        OtlpExporter(ExporterSettings(**{name: 0}))


# -- another destination while it runs


def test_what_waits_for_a_dead_endpoint_goes_to_the_next_one(collector):
    """Queued batches and those between two attempts; each once, and the counters go on."""
    slow = {"backoff_initial_seconds": 30.0, "backoff_max_seconds": 30.0}
    with running(f"http://127.0.0.1:{unused_port()}", **slow) as exporter:
        for _ in range(20):
            exporter.submit(*make_batch(3))
        assert wait_until(lambda: exporter._state == "retrying")
        exporter.redirect(Destination(ExporterSettings(endpoint=collector.endpoint)))
        assert exporter.flush(5)
        counters = exporter.snapshot()
        assert (counters.accepted, counters.exported, counters.dropped) == (60, 60, {})
        exporter.submit(*make_batch(1))
        assert exporter.flush(5)
    assert collector.span_count == 61


def test_a_call_under_way_ends_where_it_began(collector):
    """It is neither cut off nor repeated when it succeeds."""
    collector.answer(Answer(delay_seconds=0.3))
    with Collector() as other, running(collector, max_in_flight=1) as exporter:
        exporter.submit(*make_batch(2))
        assert collector.wait_for_requests(1)
        exporter.submit(*make_batch(3))
        exporter.redirect(Destination(ExporterSettings(endpoint=other.endpoint)))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == 5
        assert (collector.span_count, other.span_count) == (2, 3)


@pytest.mark.parametrize("answer", [Answer(code=grpc.StatusCode.UNAUTHENTICATED, delay_seconds=0.2), Answer(hang=True)])
def test_a_call_under_way_that_fails_is_made_again_at_the_new_destination(collector, answer):
    """Whatever the code: the next settings may be those that were missing."""
    collector.answer(answer)
    with Collector() as other, running(collector, max_in_flight=1, timeout_seconds=0.5) as exporter:
        exporter.submit(*make_batch(2))
        assert collector.wait_for_requests(1)
        exporter.redirect(Destination(ExporterSettings(endpoint=other.endpoint)))
        assert exporter.flush(5)
        counters = exporter.snapshot()
        assert (counters.exported, counters.dropped, counters.in_flight) == (2, {}, 0)
        assert other.span_count == 2


def test_close_waits_for_what_comes_back_from_the_old_destination(collector):
    """A call that fails at the old one after close was called is still made at the new one."""
    collector.answer(Answer(code=grpc.StatusCode.UNAVAILABLE, delay_seconds=0.3))
    with Collector() as other, running(collector, max_in_flight=1) as exporter:
        exporter.submit(*make_batch(2))
        assert collector.wait_for_requests(1)
        exporter.redirect(Destination(ExporterSettings(endpoint=other.endpoint)))
        exporter.submit(*make_batch(1))
        assert other.wait_for_requests(1)
        exporter.close(5.0)
        assert exporter.snapshot().exported == other.span_count == 3


def test_threads_and_channels_of_old_destinations_end(collector):
    """However often it is changed, also while they are busy."""
    with running(f"http://127.0.0.1:{unused_port()}") as exporter:
        for _ in range(10):
            exporter.submit(*make_batch(1))
            exporter.redirect(Destination(ExporterSettings(endpoint=f"http://127.0.0.1:{unused_port()}")))
        exporter.redirect(Destination(ExporterSettings(endpoint=collector.endpoint)))
        assert exporter.flush(5)
        assert wait_until(lambda: not any(line.running for line in exporter._retired))
        exporter.close(1.0)
    assert collector.span_count == 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("otlp-export")]


def test_the_books_balance_while_the_destination_changes(collector):
    """Several threads submit, both collectors fail at times, and every span is counted and arrives exactly once."""
    for _ in range(30):
        collector.answer(Answer(code=grpc.StatusCode.UNAVAILABLE), Answer())
    with Collector() as other, running(collector) as exporter:
        other.answer(*[Answer(code=grpc.StatusCode.ABORTED)] * 5)

        def submit() -> None:
            for _ in range(100):
                exporter.submit(*make_batch(2))
                time.sleep(0.002)

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        fast = {"backoff_initial_seconds": 0.01, "backoff_max_seconds": 0.04}
        last = 0
        while any(thread.is_alive() for thread in threads):
            for target in (other, collector):
                exporter.redirect(Destination(ExporterSettings(endpoint=target.endpoint, **fast)))
                time.sleep(0.02)
                check_books(exporter)
                assert exporter.snapshot().exported >= last
                last = exporter.snapshot().exported
        assert exporter.flush(10)
        counters = exporter.snapshot()
        assert (counters.exported, counters.dropped, counters.in_flight) == (600, {}, 0)
        assert collector.span_count + other.span_count == 600
        assert other.span_count > 0


def test_other_bounds_hold_from_the_next_batch_on(collector):
    """What was accepted stays accepted."""
    collector.answer(*[Answer(hang=True)] * 2)
    with running(collector, queue_spans=10, max_in_flight=1) as exporter:
        assert exporter.submit(*make_batch(10))
        assert collector.wait_for_requests(1)
        assert not exporter.submit(*make_batch(1))
        exporter.redirect(Destination(ExporterSettings(endpoint=collector.endpoint, queue_spans=20)))
        assert exporter.submit(*make_batch(1))
        exporter.redirect(Destination(ExporterSettings(endpoint=collector.endpoint, queue_spans=5)))
        assert not exporter.submit(*make_batch(1))
        assert exporter.snapshot().in_flight == 11


def test_no_thread_and_no_channel_before_the_first_submit():
    """Until the first batch the process may fork."""
    before = threading.active_count()
    exporter = OtlpExporter(ExporterSettings())
    assert threading.active_count() == before
    assert exporter._line is None
    exporter.close(0.0)


def test_process_exits_without_close(collector):
    """A process that never closes its exporter ends all the same, also with a call in progress."""
    collector.answer(*[Answer(hang=True)] * 4)
    program = (
        "import sys; from agent.otlp.exporter import *\n"
        f"exporter = OtlpExporter(ExporterSettings(endpoint={collector.endpoint!r}, timeout_seconds=60))\n"
        f"exporter.submit({make_batch(1)[0]!r}, 1)\n"
        "sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True)
    assert collector.wait_for_requests(1)
    process.communicate("\n", timeout=10)
    assert process.returncode == 0


def test_retry_info_is_found_among_other_details():
    """Only the RetryInfo detail counts, with its delay; without a delay it is 0, without RetryInfo None."""
    status = status_with_retry_info(8, "slow down", 1.25)
    other_detail = b"\x1a\x0a\x0a\x08type/Foo"
    assert retry_info_seconds(other_detail + status) == 1.25
    assert retry_info_seconds(status_with_retry_info(8, "", 0)) == 0.0
    assert retry_info_seconds(other_detail) is None
    assert retry_info_seconds(b"") is None
    assert retry_info_seconds(status_with_retry_info(8, "", -5.5)) == 0.0


@given(st.binary(max_size=80), st.integers(0, 80))
def test_hostile_trailers_and_responses_never_raise(noise, cut):
    """Any bytes in the trailer or the response are read as something or as absent."""
    status = status_with_retry_info(14, "x", 2)
    for data in (noise, status[:cut] + noise, noise + status):
        seconds = retry_info_seconds(data)
        assert seconds is None or seconds >= 0
        rejected, message = partial_success(data)
        assert rejected >= 0
        assert isinstance(message, str)


def test_backoff_is_spread_and_the_server_delay_is_a_minimum():
    """Own backoff varies to both sides; a delay that the server asks for is never undercut."""
    own = {retry_delay_seconds("unavailable", b"", 8.0) for _ in range(200)}
    assert all(6.0 <= delay <= 10.0 and not asked for delay, asked in own)
    assert len(own) > 100
    asked = {retry_delay_seconds("unavailable", status_with_retry_info(14, "", 20), 8.0) for _ in range(200)}
    assert all(20.0 <= delay <= 22.0 and asked for delay, asked in asked)
    assert retry_delay_seconds("internal", status_with_retry_info(13, "", 20), 8.0) == (None, False)


def test_a_defect_in_delivery_costs_one_batch_only(collector, monkeypatch, caplog):
    """An unexpected exception is counted and logged, and the thread goes on with the next batch."""
    calls = []

    def broken_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("defect")
        return partial_success(*arguments)

    monkeypatch.setattr(exporter_module, "partial_success", broken_once)
    with running(collector, max_in_flight=1) as exporter:
        exporter.submit(*make_batch(2))
        exporter.submit(*make_batch(3))
        assert exporter.flush(5)
        assert exporter.snapshot().exported == 3
        assert exporter.snapshot().dropped == {"exporter_error": 2}
    assert any("otlp.internal_error" in record.getMessage() for record in caplog.records)


def test_the_collector_command_counts_without_keeping():
    """``python -m tests.collector --count-only`` prints its port first and the number of spans last."""
    command = [sys.executable, "-m", "tests.collector", "--port", "0", "--count-only"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        with running(f"http://127.0.0.1:{port}") as exporter:
            for _ in range(3):
                exporter.submit(*make_batch(40))
            assert exporter.flush(5)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=10)
    assert output == "120\n"
    assert process.returncode == 0
