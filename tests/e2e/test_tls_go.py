"""Go's own TLS: every request of net/http over it is seen, on whatever thread its goroutines run, and no probe harms
the program.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.harness import AgentProcess, Process, clean_environment, free_port, show, wait_until
from tests.e2e.servers import APPS, HAS_GO, STATUSES, Server, go_build
from tests.e2e.test_tls import (
    assert_agreed,
    assert_pairs,
    secure_curl,
    serving,
    wait_for_libraries,
)

pytestmark = pytest.mark.skipif(not HAS_GO, reason="there is no Go toolchain")

BUILDS = {
    "plain": {},
    "stripped": {"ldflags": "-s -w"},
    "pie-stripped": {"ldflags": "-s -w", "mode": "pie"},
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one executable of each of BUILDS, which other users may run."""
    directory = tmp_path_factory.mktemp("go")
    for name, options in BUILDS.items():
        go_build(APPS / "go_tls", directory / f"go_tls-{name}", **options)
    return directory


def watch(tracing: AgentProcess, program: Path) -> None:
    """Wait until a program that runs already is watched."""
    wait_until(
        lambda: f'"library":"{program.name}"' in tracing.stderr(),
        lambda: f"{program.name} is watched{tracing.state()}",
    )


def go_server(program: Path, port: int, pem: Path, **environment: str) -> Server:
    return Server(
        arguments=[program, "serve", str(port), pem],
        executable=program.name,
        language="go",
        environment={"GOMAXPROCS": "2", **environment},
    )


def ask(program: Path, port: int, pem: Path, count: int, workers: int, version: str = "1.3") -> None:
    """Let a Go client make so many requests, all of which must be answered rightly."""
    command = [program, "ask", str(port), pem, str(count), str(workers), version]
    done = subprocess.run(
        command, env=clean_environment(GOMAXPROCS="2"), stdin=subprocess.DEVNULL, capture_output=True, timeout=90
    )
    assert done.stdout.decode() == f"{count} right 0 wrong\n", done


def assert_statuses_are_spans(
    tracing: AgentProcess, port: int, pem: Path, version: str, program: Path, language: str
) -> None:
    """Requests on one kept connection to a server, one for each status, are spans on both ends, and nothing else is."""
    urls = [f"https://localhost:{port}/status/{status}?number={status}" for status in STATUSES]
    outputs = [argument for _ in urls for argument in ("-o", "/dev/null")]
    flags = (f"--tlsv{version}", "--tls-max", version)
    result = secure_curl(*flags, *outputs, "-w", "%{http_code} ", *urls, pem=pem)
    assert result.stdout.split() == [str(status).encode() for status in STATUSES], result.stderr
    spans = tracing.exact_spans(2 * len(STATUSES), port=port)
    assert_pairs(spans, len(STATUSES))
    assert_agreed(spans, version)
    for span in spans:
        if span.kind == "SERVER":
            status = span.attributes["http.response.status_code"]
            assert span.attributes["url.scheme"] == "https"
            assert span.attributes["url.path"] == f"/status/{status}"
            assert span.attributes["url.query"] == f"number={status}"
            assert span.resource["process.executable.name"] == program.name
            assert span.resource["telemetry.sdk.language"] == language
    books = tracing.books()
    assert books.dropped == {}
    assert books.begun == books.handed_over == len(spans)
    metrics = tracing.metrics()
    assert metrics["spanloom_kernel_events_total{event=tls_contradicted}"] == 0
    assert metrics["spanloom_kernel_events_total{event=tls_untied}"] == 0


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_go_server_s_requests_are_spans(
    build: str, version: str, tls_agent, serve, public_path: Path, pem: Path, programs: Path
):
    """With and without symbols, at a fixed address or not: each request on a kept connection is a span on both ends."""
    port = free_port()
    program = programs / f"go_tls-{build}"
    serve(go_server(program, port, pem), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    wait_for_libraries(tracing, 2)
    assert_statuses_are_spans(tracing, port, pem, version, program, "go")


def assert_streams_are_spans(tracing: AgentProcess, port: int) -> None:
    """500 requests over HTTP/2, ten at a time on each of four connections, are as many spans of the server."""
    load = ["h2load", "-n", "500", "-c", "4", "-m", "10", f"https://127.0.0.1:{port}/status/200"]
    done = subprocess.run(load, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert b"500 succeeded" in done.stdout, done
    tracing.wait_for_spans(500, 60, port=port, kind="SERVER")
    books = tracing.settle()
    served = tracing.spans(port, "SERVER")
    assert len(served) == 500
    assert {(span.attributes["http.response.status_code"], span.attributes["url.scheme"]) for span in served} == {
        (200, "https")
    }
    assert {span.attributes["network.protocol.version"] for span in served} == {"2"}
    assert books.begun == books.handed_over + sum(books.dropped.values())


def test_http2_of_a_go_server(tls_agent, serve, pem: Path, programs: Path):
    """What Go's server speaks over TLS unless it is told otherwise, with many streams at once."""
    port = free_port()
    program = programs / "go_tls-stripped"
    serve(go_server(program, port, pem, HTTP2="1"), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    assert_streams_are_spans(tracing, port)


@pytest.mark.parametrize(
    ("server", "version"), [("nginx-1.2", "1.3"), ("nginx-1.3", "1.3"), ("python-ssl", "1.2"), ("python-ssl", "1.3")]
)
def test_a_go_client_s_requests_are_spans(
    server: str, version: str, tls_agent, serve, public_path: Path, pem: Path, programs: Path
):
    """Several connections at a time, to servers that use OpenSSL: every request is seen from both ends."""
    port = free_port()
    tracing = tls_agent([port])
    program = programs / "go_tls-stripped"
    serve(serving(server, port, public_path, pem), port)
    wait_for_libraries(tracing)
    command = [program, "ask", str(port), pem, "40", "8", version, "again"]
    with Process(command, log=public_path / "client.log", env=clean_environment(), stdin=subprocess.PIPE) as client:
        wait_until(lambda: "right" in client.output(), client.output)
        watch(tracing, program)  # its first requests tell of it
        client.popen.communicate(b"\n", timeout=60)
        assert client.output() == "40 right 0 wrong\n" * 2
    tracing.settle()

    def is_second(span) -> bool:
        return "id=again-" in str(span.attributes.get("url.full", span.attributes.get("url.query")))

    # Their connections are older than the probes, and each had a read under way.
    spans = [span for span in tracing.spans(port) if is_second(span)]
    clients = [span for span in spans if span.kind == "CLIENT"]
    asked = Counter(span.attributes["url.full"] for span in clients)
    assert asked == Counter(f"https://localhost:{port}/status/200?id=again-{number}" for number in range(40))
    assert {span.attributes["http.response.status_code"] for span in clients} == {200}
    assert len(spans) == 80, show(spans)
    # New ones are seen from both ends, and the ends belong together.
    earlier = len(tracing.spans(port))
    ask(program, port, pem, 40, 8, version)
    spans = tracing.exact_spans(earlier + 80, port=port)[earlier:]
    assert_pairs(spans, 40)
    assert {span.attributes.get("url.scheme", "https") for span in spans} == {"https"}
    assert tracing.metrics()["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_goroutines_on_few_threads_are_told_apart(
    wrapped: bool, tls_agent, serve, public_path: Path, pem: Path, programs: Path
):
    """50 goroutines at a time on two threads, Go on both ends: spans = requests, each with its own path, and linked.
    Connections may be wrapped, as by a listener that limits them.
    """
    port = free_port()
    program = programs / "go_tls-plain"
    serve(go_server(program, port, pem, **({"WRAPPED": "1"} if wrapped else {})), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    ask(program, port, pem, 1000, 50)
    spans = tracing.exact_spans(2000, port=port)
    assert_pairs(spans, 1000)
    asked = Counter(span.attributes["url.query"] for span in spans if span.kind == "SERVER")
    assert asked == Counter(f"id=first-{number}" for number in range(1000))
    metrics = tracing.metrics()
    assert metrics["spanloom_kernel_events_total{event=tls_untied}"] == 0
    assert metrics["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


@pytest.mark.timeout(400)
def test_probes_come_and_go_under_load(tls_agent, serve, start, public_path: Path, pem: Path, programs: Path, tmp_path):
    """20 times on and off while 32 goroutines ask: nobody crashes, no answer is wrong, and afterwards all is seen."""
    port = free_port()
    program = programs / "go_tls-stripped"
    config = tmp_path / "spanloom.yaml"
    config.write_text("capture:\n  tls: true\n")
    server = serve(go_server(program, port, pem), port)
    tracing = tls_agent([port], config=config)
    watch(tracing, program)
    command = [program, "flood", str(port), pem, "32"]
    environment = clean_environment(GOMAXPROCS="2")
    with Process(command, log=public_path / "client.log", env=environment, stdin=subprocess.PIPE) as client:
        for number in range(20):
            before = tracing.metrics()["spanloom_tls_attached_total"]
            config.write_text("capture:\n  tls: false\n")
            wait_until(lambda: tracing.metrics()["spanloom_tls_files"] == 0, lambda: f"off{tracing.state()}", 60)
            config.write_text("capture:\n  tls: true\n")
            wait_until(
                lambda before=before: (
                    tracing.metrics()["spanloom_tls_attached_total"] > before
                    and tracing.stderr().rfind(f'tls_attached","library":"{program.name}"')
                    > tracing.stderr().rfind(f'tls_detached","library":"{program.name}"')
                ),
                lambda number=number: f"on for the {number + 1}th time{tracing.state()}",
                60,
            )
            assert client.popen.poll() is None, client.output()
            assert server.popen.poll() is None, server.output()
        client.popen.communicate(b"\n", timeout=60)
        words = client.output().split()
    assert client.popen.returncode == 0, words
    assert int(words[0]) > 0
    assert words[1:] == ["right", "0", "wrong"]
    assert server.popen.poll() is None
    tracing.settle()
    earlier = len(tracing.spans(port))
    ask(program, port, pem, 50, 5)
    assert_pairs(tracing.exact_spans(earlier + 100, port=port)[earlier:], 50)


def test_a_program_is_watched_while_it_runs(tls_agent, serve, start, public_path: Path, pem: Path):
    """The probes are on a file as long as somebody runs it, and only once however many do."""
    port = free_port()
    tracing = tls_agent([port], {"capture.tls_idle_seconds": 0})
    program = go_build(APPS / "go_tls", public_path / "go_tls-mine", ldflags="-s -w -X main.unused=1")
    serve(serving("nginx-1.3", port, public_path, pem), port)
    clients = []
    for number in range(2):
        command = [program, "ask", str(port), pem, "2", "1", "1.3", "again"]
        log = public_path / f"client-{number}.log"
        clients.append(Process(command, log=log, env=clean_environment(), stdin=subprocess.PIPE))
    with clients[0] as first, clients[1] as second:
        for client in (first, second):
            wait_until(lambda client=client: "2 right" in client.output(), client.output)
        watch(tracing, program)
        first.popen.communicate(b"\n", timeout=60)
        tracing.settle()
        assert tracing.stderr().count('tls_attached","library":"go_tls-mine"') == 1
        assert 'tls_detached","library":"go_tls-mine"' not in tracing.stderr()
        second.popen.communicate(b"\n", timeout=60)
    wait_until(
        lambda: 'tls_detached","library":"go_tls-mine"' in tracing.stderr(),
        lambda: f"nobody runs it{tracing.state()}",
        60,
    )
    seen = [span for span in tracing.spans(port, "CLIENT") if "id=again-" in span.attributes["url.full"]]
    assert len(seen) == 4, show(seen)


def test_a_go_program_that_cannot_be_seen_is_reported(tls_agent, serve, start, public_path: Path, pem: Path):
    """A program whose functions have other names runs as ever; it is named in the log with the reason, and counted."""
    port = free_port()
    tracing = tls_agent([port])
    serve(serving("nginx-1.3", port, public_path, pem), port)
    program = go_build(APPS / "go_tls", public_path / "go_tls-renamed", ldflags="-s -w")
    data = program.read_bytes()
    name = b"\0crypto/tls.(*Conn).Read\0"
    assert data.count(name) == 1
    program.write_bytes(data.replace(name, name.replace(b"tls", b"xyz")))
    command = [program, "ask", str(port), pem, "2", "1", "1.3", "again"]
    with Process(command, log=public_path / "client.log", env=clean_environment(), stdin=subprocess.PIPE) as client:
        wait_until(lambda: "2 right" in client.output(), client.output)
        named = f'"executable":"go_tls-renamed","pid":{client.pid}'
        wait_until(lambda: named in tracing.stderr(), lambda: f"it is named{tracing.state()}")
        client.popen.communicate(b"\n", timeout=60)
        assert client.popen.returncode == 0
    line = next(line for line in tracing.stderr().splitlines() if named in line)
    assert '"event":"tls_not_seen"' in line
    assert '"reason":"go_no_tls"' in line
    assert tracing.metrics()["spanloom_tls_unseen_processes_total{reason=go_no_tls}"] >= 1
    spans = tracing.exact_spans(4, port=port)
    assert {span.kind for span in spans} == {"SERVER"}, "the other end is seen"
