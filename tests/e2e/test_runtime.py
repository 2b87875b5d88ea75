"""The agent as a program: start, readiness, errors, output, selection, sampling, secrets, shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest

from agent.kernel import _libbpf
from agent.kernel.capture import Capture, CaptureSettings
from tests.collector import Collector
from tests.e2e import servers
from tests.e2e.harness import (
    AS_NOBODY,
    REPOSITORY,
    AgentFailedError,
    AgentProcess,
    Process,
    clean_environment,
    curl,
    free_port,
    one,
    show,
    wait_until,
)
from tests.e2e.scripted import Peer, accept, close_with_reset, connect, listen, receive, send_all
from tests.e2e.scripted import request as make_request
from tests.e2e.scripted import response as make_response

ffi, lib = _libbpf.ffi, _libbpf.lib

STOP_SECONDS = 5.0
"""What the agent promises: SIGTERM drains and flushes within this time."""


# ---------------------------------------------------------------------------------------------------- telemetry


def test_readyz_turns_200_when_the_probes_are_attached(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """Before that it is 503 or nobody listens; from the first 200 on no request is missed."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = AgentProcess(tmp_path, collector, [port])
    tracing.start(wait=False)
    answers: list[int] = []
    try:

        def ready() -> bool:
            tracing.check_alive()
            answers.append(tracing.probe("/readyz"))
            return answers[-1] == 200

        wait_until(ready, "/readyz is 200", 30, interval_seconds=0.001)
        assert curl(f"http://127.0.0.1:{port}/status/200").returncode == 0
        tracing.exact_spans(2, port=port)
        assert set(answers[:-1]) <= {0, 503}, answers
        assert answers[0] != 200, "the test looked too late to see anything but 200"
        assert tracing.probe("/healthz") == 200
        assert tracing.probe("/nothing") == 404
    except BaseException:
        tracing.kill()
        raise
    tracing.stop()
    assert tracing.probe("/readyz") == 0


def test_metrics_are_prometheus_text_with_the_books(agent, serve, public_path: Path):
    """A real Prometheus parser reads them; the books count what happened and close."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port])
    for _ in range(3):
        curl(f"http://127.0.0.1:{port}/status/200")
    tracing.exact_spans(6, port=port)
    metrics = tracing.metrics()
    assert metrics["spanloom_exchanges_begun_total"] == 6
    assert metrics["spanloom_spans_handed_over_total"] == 6
    assert metrics["spanloom_export_spans_total{outcome=exported}"] == 6
    assert metrics["spanloom_kernel_events_total{event=begun}"] == 6
    assert metrics["spanloom_telemetry_source_errors_total"] == 0
    assert metrics["process_resident_memory_bytes"] > 1_000_000
    assert any(key.startswith("spanloom_build_info{version=") for key in metrics)
    types = [line for line in tracing.metrics_text().splitlines() if line.startswith("# TYPE spanloom_")]
    assert all(line.split()[3] in ("counter", "gauge") for line in types)
    assert all((line.split()[3] == "counter") == line.split()[2].endswith("_total") for line in types)


def test_counters_may_be_read_by_several_threads():
    """A scrape while another thread reads the counters, as at shutdown, gives each of them its own numbers."""
    threads_count, rounds = 4, 3000
    with Capture(CaptureSettings(connections=64, ring_buffer_bytes=64 << 10)) as capture:
        expected = {name: 1000 + index for index, name in enumerate(capture.layout.counters)}
        values = ffi.new("uint64_t[]", lib.libbpf_num_possible_cpus())
        for index, value in enumerate(expected.values()):
            values[0] = value
            assert lib.bpf_map_update_elem(capture.map_fd("counters"), ffi.new("uint32_t *", index), values, 0) == 0
        wrong: list[dict[str, int]] = []

        def read() -> None:
            wrong.extend(found for _ in range(rounds) if (found := capture.counters()) != expected)

        interval_seconds = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=read) for _ in range(threads_count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        finally:
            sys.setswitchinterval(interval_seconds)
    assert not wrong, f"{len(wrong)} of {threads_count * rounds} readings, such as {wrong[0]}"


# ---------------------------------------------------------------------------------------------------- shutdown


def test_sigterm_exports_what_is_complete(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """What ended before SIGTERM is at the collector when the agent has ended, however long batches may wait."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    settings = {"export.batch.max_delay_seconds": 60, "export.batch.max_spans": 8192}
    with AgentProcess(tmp_path, collector, [port], settings) as tracing:
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-50]")
        began = time.monotonic()
        assert tracing.stop(timeout_seconds=30) == 0
        took_seconds = time.monotonic() - began
    assert len(tracing.spans(port)) == 100, show(tracing.spans(port)[:10])
    assert took_seconds < STOP_SECONDS
    stopped = json.loads(tracing.stderr().splitlines()[-1])
    assert stopped["event"] == "stopped"
    assert (stopped["begun"], stopped["handed_over"], stopped["in_flight"], stopped["dropped"]) == (100, 100, 0, 0)


@pytest.mark.parametrize("seconds", [0.0, 0.8, 1.6])
def test_sigterm_while_probes_are_loaded(seconds: float, tmp_path: Path):
    """Wherever the thread is that loads the probes for TLS, the end is a clean one."""
    with AgentProcess(tmp_path, None, settings={"export.console": "off"}) as tracing:
        time.sleep(seconds)
        assert tracing.stop(timeout_seconds=30) == 0
    assert '"event":"stopped"' in tracing.stderr()
    assert "Traceback" not in tracing.stderr()


TAKES_PROBES_BACK_LATE = """
    import sys, threading, time
    threading._register_atexit(time.sleep, 0.5)  # called behind the one that the next line registers
    import concurrent.futures.thread as threads
    from agent.cli import main
    from agent.kernel.capture import Capture

    unwatch = Capture.unwatch

    def late(self, links):
        while not threads._shutdown:  # until the interpreter is at its end
            time.sleep(0.001)
        unwatch(self, links)

    Capture.unwatch = late
    sys.exit(main(sys.argv[1:]))
"""


def test_a_thread_that_outlives_the_interpreter(tmp_path: Path):
    """Probes that come off slower than the agent has time are left to the kernel: no word, no other exit code."""
    port = free_port()
    arguments = ["run", "--set", f"telemetry.listen=127.0.0.1:{port}", "--set", "export.console=off"]
    command = [sys.executable, "-c", textwrap.dedent(TAKES_PROBES_BACK_LATE), *arguments]
    log = tmp_path / "log"
    with Process(command, log=log) as process:
        wait_until(lambda: '"event":"tls_on"' in process.output(), process.output, 30)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0, process.output()
    assert '"event":"stopped"' in process.output()
    assert "Traceback" not in process.output()


def test_sigterm_behind_a_reset(tmp_path: Path, collector: Collector):
    """A process may come with more of a connection that has just been closed; not so once the agent ends."""
    port = free_port()
    request, answer = make_request("/reset"), make_response()
    with AgentProcess(tmp_path, collector, [port]) as tracing, Peer() as server:
        server.start(_answer_all_but_one_byte, port, len(request))
        connection = connect(port)
        send_all(connection, request)
        receive(connection, len(answer) - 1)
        close_with_reset(connection)
        server.result()
        assert tracing.stop(timeout_seconds=30) == 0
    stopped = json.loads(tracing.stderr().splitlines()[-1])
    assert (stopped["begun"], stopped["handed_over"], stopped["in_flight"]) == (2, 2, 0), stopped
    (span,) = tracing.spans(kind="SERVER")
    assert span.attributes["error.type"] == "client_disconnect"


def _answer_all_but_one_byte(port: int, length: int) -> None:
    answer = make_response()
    with listen(port) as listener, accept(listener) as connection:
        receive(connection, length)
        send_all(connection, answer[:-1])
        with contextlib.suppress(ConnectionError):
            connection.recv(1)
        with contextlib.suppress(ConnectionError):
            connection.sendall(answer[-1:])


def test_sigterm_is_obeyed_under_overload(tmp_path: Path, collector: Collector, start, serve, public_path: Path):
    """Traffic that comes faster than it can be taken does not keep the agent from ending; its books close."""
    port = free_port()
    serve(servers.nginx(port, public_path, workers=4), port)
    with AgentProcess(tmp_path, collector, [port]) as tracing:
        load = start(["wrk", "-t4", "-c128", "-d60s", f"http://127.0.0.1:{port}/status/200"])
        lost = "spanloom_exchanges_dropped_total{reason=ring_full}"
        wait_until(lambda: tracing.metrics().get(lost, 0) > 1000, "the agent is overloaded", 40)
        began = time.monotonic()
        assert tracing.stop(timeout_seconds=30) == 0
        took_seconds = time.monotonic() - began
        load.check_alive()
    assert took_seconds < STOP_SECONDS
    stopped = json.loads(tracing.stderr().splitlines()[-1])
    left = stopped["handed_over"] + stopped["sampled_out"] + stopped["dropped"] + stopped["in_flight"]
    assert stopped["begun"] == left, stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_well_while_it_is_idle(number: signal.Signals, tmp_path: Path, collector: Collector):
    """SIGTERM and SIGINT end an idle agent with exit code 0."""
    with AgentProcess(tmp_path, collector, [free_port()]) as tracing:
        os.kill(tracing.pid, number)
        assert tracing.stop(timeout_seconds=STOP_SECONDS + 5) == 0


def test_a_collector_that_hangs_does_not_hold_up_the_end(tmp_path: Path, serve, public_path: Path):
    """With a collector that never answers the agent still ends in time, and counts what it could not deliver."""
    from tests.collector import Answer

    port = free_port()
    serve(servers.nginx(port, public_path), port)
    with Collector() as stuck:
        stuck.answer(*[Answer(hang=True)] * 100)
        with AgentProcess(tmp_path, stuck, [port]) as tracing:
            curl(f"http://127.0.0.1:{port}/status/200")
            assert stuck.wait_for_requests(1, 20)
            began = time.monotonic()
            assert tracing.stop(timeout_seconds=30) == 0
            assert time.monotonic() - began < STOP_SECONDS


# ---------------------------------------------------------------------------------------------------- errors


def run_agent(*overrides: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run an agent that is expected to end by itself."""
    arguments = [sys.executable, "-m", "agent", "run"]
    for override in overrides:
        arguments += ["--set", override]
    options = {"env": clean_environment(), "cwd": REPOSITORY, **options}
    return subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, **options)


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, and an error of one line that says these words, with no event of the log beside it."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("spanloom: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_not_root(tmp_path: Path):
    """Without privileges: exit code 3 and a line that names the remedy."""
    result = subprocess.run(
        [*AS_NOBODY, sys.executable, "-m", "agent", "run", "--set", f"telemetry.listen=127.0.0.1:{free_port()}"],
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_one_line(result, 3, "root", "CAP_BPF", "sudo")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.ration=0.5", ("sampling.ratio",)),
        ("sampling.ratio=2", ("sampling.ratio", "0", "1")),
        ("telemetry.listen=nonsense", ("telemetry.listen",)),
        ("export.otlp.endpoint=ftp://somewhere", ("endpoint",)),
        ("capture.request_headers=[authorization]", ("authorization",)),
    ],
)
def test_bad_configuration(override: str, words: tuple[str, ...]):
    """Exit code 2 and a line that names the setting."""
    assert_one_line(run_agent(override), 2, *words)


def test_missing_configuration_file(tmp_path: Path):
    """Exit code 2 and a line that names the file."""
    result = subprocess.run(
        [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "nowhere.yaml")],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_one_line(result, 2, "nowhere.yaml")


def test_listen_address_in_use():
    """Exit code 2 and a line that names the setting and the address; nothing is traced by such an agent."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_agent(f"telemetry.listen={address}", "export.console=off")
    assert_one_line(result, 2, "telemetry.listen", address)


def test_an_agent_that_cannot_start_says_so_to_the_tests(tmp_path: Path, collector: Collector):
    """The harness reports the agent's own words and exit code, which is how a refusing kernel fails this suite."""
    with pytest.raises(AgentFailedError, match=r"telemetry\.listen") as caught:
        AgentProcess(tmp_path, collector, settings={"telemetry.listen": "nonsense"}).start()
    assert caught.value.code == 2


# ---------------------------------------------------------------------------------------------------- output


def test_json_lines_without_an_endpoint(tmp_path: Path, serve, public_path: Path):
    """Without an endpoint and a terminal each span is one JSON object on standard output, and nothing else is there."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    with AgentProcess(tmp_path, None, [port]) as tracing:
        curl(f"http://127.0.0.1:{port}/status/404?a=1")
        wait_until(lambda: tracing.stdout().count("\n") >= 2, lambda: f"two lines, not {tracing.stdout()!r}")
    spans = [json.loads(line) for line in tracing.stdout().splitlines()]
    assert len(spans) == 2
    text = json.dumps(spans)
    assert "/status/404" in text
    assert "404" in text
    assert len({span["trace_id"] for span in spans}) == 1
    assert {span["kind"].lower() for span in spans} == {"server", "client"}


def test_waterfall_on_a_terminal(tmp_path: Path, serve, public_path: Path):
    """Without an endpoint and on a terminal each trace is drawn: its id, then a row for the client and the server."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    ours, theirs = pty.openpty()
    terminal = os.ttyname(theirs)
    termios.tcsetwinsize(theirs, (24, 120))
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while piece := os.read(ours, 65536):
                drawn.append(piece)

    def lines() -> list[str]:
        return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(drawn).decode("utf-8", "replace")).splitlines()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        within = ["sh", "-c", 'exec "$@" > "$0"', terminal]
        with AgentProcess(tmp_path, None, [port], environment={"TERM": "xterm"}, within=within) as tracing:
            curl(f"http://127.0.0.1:{port}/status/404?a=1")
            wait_until(lambda: len(lines()) >= 4, lambda: f"a trace, not {lines()}{tracing.state()}")
    finally:
        os.close(theirs)  # the last one: the reader ends
        reader.join(20)
        os.close(ours)
    header, _, *rows = [line for line in lines() if line]
    assert re.match(r"trace [0-9a-f]{32}  .* 2 spans  2 services", header), lines()
    assert len(rows) == 2, lines()
    for row, service in zip(rows, ("curl", "nginx"), strict=True):
        assert re.match(rf"{service} .*GET.* 404 .* \d+(\.\d+)? ?(ns|µs|ms|s)\b", row), lines()
    assert b"\x1b[" in b"".join(drawn), "in colour"


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_endpoint_from_the_environment(name: str, tmp_path: Path, collector: Collector, serve, public_path: Path):
    """The OpenTelemetry variables alone turn the export on, and the console off."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = AgentProcess(tmp_path, collector, [port], environment={name: collector.endpoint})
    del tracing.settings["export.otlp.endpoint"]
    with tracing:
        curl(f"http://127.0.0.1:{port}/status/200")
        tracing.exact_spans(2, port=port)
    assert tracing.stdout() == ""


# ---------------------------------------------------------------------------------------------------- selection


def test_executables_can_be_excluded(agent, serve, public_path: Path):
    """An excluded program has no span, the other end of its exchanges has, and the books name the reason."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port], {"select.executables.exclude": ["cur?"]})
    curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-5]")
    tracing.wait_for_spans(5, kind="SERVER", port=port)
    books = tracing.settle()
    spans = tracing.spans(port)
    assert {span.resource["process.executable.name"] for span in spans} == {"nginx"}
    assert len(spans) == 5
    assert set(books.dropped) <= {"not_selected"}
    assert books.begun == 5 + sum(books.dropped.values())


def test_executables_can_be_selected_by_path(agent, serve, public_path: Path):
    """Globs with a slash are matched with the path; what is not included is not traced."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port], {"select.executables.include": ["/usr/*bin/nginx"]})
    curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-5]")
    tracing.wait_for_spans(5, kind="SERVER", port=port)
    tracing.settle()
    assert {span.resource["process.executable.name"] for span in tracing.spans(port)} == {"nginx"}
    assert len(tracing.spans(port)) == 5


def test_ports_can_be_included_and_excluded(agent, serve, public_path: Path):
    """Traffic of other ports is not begun at all; ``exclude`` wins over ``include``."""
    chosen, other, excluded = free_port(), free_port(), free_port()
    for port in (chosen, other, excluded):
        serve(servers.nginx(port, public_path), port)
    tracing = agent([chosen, excluded], {"select.ports.exclude": [excluded]})
    for port in (other, excluded, chosen):
        curl(f"http://127.0.0.1:{port}/status/200")
    spans = tracing.exact_spans(2)
    assert {span.attributes["server.port"] for span in spans} == {chosen}
    assert tracing.books().begun == 2


def test_ratio_zero_exports_nothing(agent, serve, public_path: Path):
    """New traces are sampled out and counted; a trace that its caller decided to sample is kept (parent-based)."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port], {"sampling.ratio": 0.0})
    curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-10]")
    wait_until(lambda: tracing.books().sampled_out == 20, lambda: f"20 sampled out: {tracing.books()}")
    books = tracing.settle()
    assert (books.begun, books.handed_over, books.dropped) == (20, 0, {})
    assert tracing.spans() == []
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    for flags in ("00", "01"):
        curl("-H", f"traceparent: 00-{trace}-00f067aa0ba902b7-{flags}", f"http://127.0.0.1:{port}/status/200")
    spans = tracing.exact_spans(2)
    assert {span.trace_id for span in spans} == {trace}
    assert tracing.books().sampled_out == 22


# ---------------------------------------------------------------------------------------------------- processes


def test_short_lived_processes_keep_their_names(agent, serve, public_path: Path):
    """curl lives for a few milliseconds, less than the agent takes to look: its name is right all the same."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port])
    pids = []
    for number in range(20):
        process = subprocess.Popen(
            ["curl", "-q", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number={number}"],
            env=clean_environment(),
        )
        pids.append(process.pid)
        assert process.wait(30) == 0
    clients = [span for span in tracing.exact_spans(40, port=port) if span.kind == "CLIENT"]
    assert {span.resource["process.executable.name"] for span in clients} == {"curl"}
    assert {span.resource["service.name"] for span in clients} == {"curl"}
    assert sorted(int(span.resource["process.pid"]) for span in clients) == sorted(pids)


def test_the_agent_does_not_trace_itself(agent, serve, public_path: Path):
    """Whatever ports are selected: neither its own telemetry endpoint nor its export is a span."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent()  # all ports
    for _ in range(5):
        assert tracing.probe("/healthz") == 200
    curl(f"http://127.0.0.1:{port}/status/200")
    tracing.wait_for_spans(2, port=port)
    assert tracing.pid not in {span.resource["process.pid"] for span in tracing.spans()}
    probes = tracing.spans(tracing.telemetry_port, "CLIENT")
    assert {span.resource["process.pid"] for span in probes} == {os.getpid()}, "whoever asks is a client like any other"


# ---------------------------------------------------------------------------------------------------- secrets

SECRET = "hunter2-3f8a"
SECRET_HEADERS = (
    f"Authorization: Bearer {SECRET}-authorization",
    f"Proxy-Authorization: Basic {SECRET}-proxy",
    f"Cookie: session={SECRET}-cookie",
    f"X-Api-Key: {SECRET}-key",
    f"Api-Key: {SECRET}-key2",
    f"X-Auth-Token: {SECRET}-token",
    f"X-Amz-Security-Token: {SECRET}-amz",
    f"X-Custom: {SECRET}-custom",
)


def exported_bytes(collector: Collector) -> bytes:
    return b"".join(request.payload + repr(request.metadata).encode() for request in collector.requests)


def test_secrets_never_leave(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """Credentials in headers, in the URL and in signed queries are in none of the exported bytes, nor in the log."""
    port = free_port()
    answer = f'location /secret {{ add_header Set-Cookie "session={SECRET}-set"; return 200 "{SECRET}-body"; }}'
    serve(servers.nginx(port, public_path, extra=answer), port)
    with AgentProcess(tmp_path, collector, [port], {"telemetry.log_level": "debug"}) as tracing:
        headers = [argument for header in SECRET_HEADERS for argument in ("-H", header)]
        url = f"http://{SECRET}:{SECRET}-password@127.0.0.1:{port}/secret"
        query = f"kept=visible&sig={SECRET}-sig&X-Amz-Signature={SECRET}-x&Signature={SECRET}-s&AWSAccessKeyId={SECRET}"
        sent = curl(*headers, "-d", f"{SECRET}-post", f"{url}?{query}")
        assert sent.stdout.decode() == f"{SECRET}-body"
        # The absolute form, as sent to a proxy, carries the credentials in the request line.
        curl(*headers, "--request-target", f"{url}?{query}", f"http://127.0.0.1:{port}/secret")
        curl(*headers, "--proxy", f"http://{SECRET}:{SECRET}@127.0.0.1:{port}", "--noproxy", "", f"{url}?{query}")
        spans = tracing.exact_spans(6)
    assert len(spans) == 6
    everything = exported_bytes(collector)
    assert b"visible" in everything, "the query was exported at all"
    assert b"REDACTED" in everything
    assert SECRET.encode() not in everything, [span.attributes for span in spans if SECRET in repr(span)]
    assert SECRET not in tracing.stderr() + tracing.stdout()


def test_secrets_are_not_on_the_console_either(tmp_path: Path, serve, public_path: Path):
    """The same for JSON lines on standard output."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    with AgentProcess(tmp_path, None, [port]) as tracing:
        headers = [argument for header in SECRET_HEADERS for argument in ("-H", header)]
        curl(*headers, f"http://127.0.0.1:{port}/status/200?kept=visible&sig={SECRET}")
        wait_until(lambda: tracing.stdout().count("\n") >= 2, lambda: f"two lines, not {tracing.stdout()!r}")
    assert "visible" in tracing.stdout()
    assert SECRET not in tracing.stdout() + tracing.stderr()


def test_listed_headers_are_exported_and_only_those(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """A header that was asked for is an attribute; its secret neighbours are not there."""
    port = free_port()
    serve(servers.nginx(port, public_path, extra='location /h { add_header X-Answer yes; return 200 "x"; }'), port)
    settings = {"capture.request_headers": ["x-tenant"], "capture.response_headers": ["x-answer"]}
    with AgentProcess(tmp_path, collector, [port], settings) as tracing:
        headers = [argument for header in SECRET_HEADERS for argument in ("-H", header)]
        curl("-H", "X-Tenant: blue", *headers, f"http://127.0.0.1:{port}/h")
        for span in tracing.exact_spans(2, port=port):
            assert span.attributes["http.request.header.x-tenant"] == ["blue"]
            assert span.attributes["http.response.header.x-answer"] == ["yes"]
    assert SECRET.encode() not in exported_bytes(collector)


# ---------------------------------------------------------------------------------------------------- started late


def read_response(connection: socket.socket) -> bytes:
    """One response whose body has a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        piece = connection.recv(65536)
        assert piece, received
        body += piece
    return head


def test_connections_from_before_the_agent(agent, serve, public_path: Path):
    """A keep-alive connection that was open, and had been used, when the agent started is traced from then on."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as used:
        unused = socket.create_connection(("127.0.0.1", port), timeout=30)
        with unused:
            request = b"GET /status/200?n=%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
            used.sendall(request % (0, port))
            read_response(used)
            tracing = agent([port])
            for number, connection in ((1, used), (2, unused), (3, used)):
                connection.sendall(request % (number, port))
                read_response(connection)
    spans = tracing.exact_spans(6, port=port)
    assert sorted(str(s.attributes["url.query"]) for s in spans if s.kind == "SERVER") == ["n=1", "n=2", "n=3"]
    for server in (span for span in spans if span.kind == "SERVER"):
        client = one(span for span in spans if span.span_id == server.parent_span_id)
        assert client.trace_id == server.trace_id
        assert server.resource["process.executable.name"] == Path(sys.executable).resolve().name
    assert tracing.books().dropped == {}


def test_agent_started_while_a_response_is_under_way(agent, serve, public_path: Path):
    """The exchange whose request nobody saw makes no span and no wrong one; the next on the connection is whole."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        request = b"GET /status/200?n=%d%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
        # The answer must come after the agent is ready; how long that takes depends on the machine.
        connection.sendall(request % (0, b"&sleep=6", port))
        tracing = agent([port])
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)  # the test's own premise: no response yet
        connection.settimeout(60)
        read_response(connection)
        connection.sendall(request % (1, b"", port))
        read_response(connection)
        tracing.wait_for_spans(2, port=port)
        metrics = tracing.metrics()
    spans = tracing.exact_spans(2, port=port)
    server = one(span for span in spans if span.kind == "SERVER")
    assert server.attributes["url.query"] == "n=1"
    assert (server.end_time_ns - server.start_time_ns) < 5_000_000_000
    assert metrics["spanloom_exchanges_begun_total"] == 2
    ignored = [metrics[f"spanloom_kernel_events_total{{event={name}}}"] for name in ("response_alone", "ignored_other")]
    assert sum(ignored) >= 2, "both ends of the response that began before are counted"


def test_two_agents_at_once(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """Each of two agents sees everything; neither disturbs the other."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    url = f"http://127.0.0.1:{port}/status/200?n=[1-10]"
    with (
        Collector() as second_collector,
        AgentProcess(tmp_path, collector, [port]) as first,
        AgentProcess(tmp_path, second_collector, [port]) as second,
    ):
        threads = [threading.Thread(target=curl, args=("-o", "/dev/null", url)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(first.exact_spans(80, port=port)) == len(second.exact_spans(80, port=port)) == 80
