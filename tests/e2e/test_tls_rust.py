"""rustls: every request of Rust programs over it is seen, with tokio and with threads, on its own connection."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.harness import AgentProcess, clean_environment, free_port, show, wait_until
from tests.e2e.servers import HAS_RUST, Server, rust_program
from tests.e2e.test_tls import assert_pairs, secure_curl, serving, wait_for_libraries
from tests.e2e.test_tls_go import assert_statuses_are_spans, assert_streams_are_spans, watch

pytestmark = [
    pytest.mark.skipif(not HAS_RUST, reason="there is no Rust toolchain of 1.85 or later"),
    pytest.mark.timeout(500),  # the first one may have to build the program
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the executable: what an earlier test had watched is another file."""
    return shutil.copy(rust_program(), tmp_path_factory.mktemp("rust") / "rust_tls")


def rust_server(program: Path, mode: str, port: int, pem: Path, *options: str) -> Server:
    return Server(arguments=[program, mode, str(port), pem, *options], executable=program.name, language="rust")


def ask(program: Path, mode: str, port: int, pem: Path, count: int, workers: int, version: str = "1.3") -> None:
    """Let a client make so many requests, all of which must be answered rightly."""
    command = [program, mode, str(port), pem, str(count), str(workers), version]
    done = subprocess.run(
        command, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False
    )
    assert done.stdout.decode() == f"{count} right 0 wrong\n", done


def assert_nothing_is_doubtful(tracing: AgentProcess) -> None:
    metrics = tracing.metrics()
    assert metrics["spanloom_kernel_events_total{event=tls_contradicted}"] == 0
    assert metrics["spanloom_kernel_events_total{event=tls_untied}"] == 0


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_server_s_requests_are_spans(version: str, tls_agent, serve, pem: Path, program: Path):
    """The first request of a connection, too: what was decrypted tells which socket it came from."""
    port = free_port()
    serve(rust_server(program, "serve", port, pem, "http1"), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    wait_for_libraries(tracing, 2)
    assert_statuses_are_spans(tracing, port, pem, version, program, "rust")


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_large_bodies(size: int, tls_agent, serve, public_path: Path, pem: Path, program: Path):
    """What is written in many records, and read in many pieces, is one exchange, with its sizes."""
    port = free_port()
    serve(rust_server(program, "serve", port, pem, "http1"), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    wait_for_libraries(tracing, 2)
    upload = public_path / "upload"
    upload.write_bytes(bytes(size))
    url = f"https://localhost:{port}/bytes/{size}"
    options = ("-H", "Expect:", "-T", str(upload), "-o", "/dev/null", "-w", "%{size_download}")
    result = secure_curl(*options, url, pem=pem)
    assert result.stdout == str(size).encode(), result
    spans = tracing.exact_spans(2, port=port)
    for span in spans:
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["http.response.body.size"] == size, show(spans)
        assert span.attributes["http.request.body.size"] == size, show(spans)
    assert_nothing_is_doubtful(tracing)


def test_http2_of_a_server(tls_agent, serve, pem: Path, program: Path):
    """What hyper speaks over TLS with who can, with many streams at once."""
    port = free_port()
    serve(rust_server(program, "serve", port, pem), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    assert_streams_are_spans(tracing, port)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize(("server", "client"), [("serve", "ask"), ("threads", "ask-plainly")])
def test_both_ends(server: str, client: str, version: str, tls_agent, serve, pem: Path, program: Path):
    """Twenty connections at a time, on two threads or one each: spans = requests, each with its path, and linked."""
    port = free_port()
    serve(rust_server(program, server, port, pem), port)
    tracing = tls_agent([port])
    watch(tracing, program)
    for _ in range(2):  # the second time in the memory and with the descriptors of the first
        earlier = len(tracing.spans(port))
        ask(program, client, port, pem, 400, 20, version)
        spans = tracing.exact_spans(earlier + 800, port=port)[earlier:]
        assert_pairs(spans, 400)
        asked = Counter(span.attributes["url.query"] for span in spans if span.kind == "SERVER")
        assert asked == Counter(f"id=first-{number}" for number in range(400))
    assert_nothing_is_doubtful(tracing)


@pytest.mark.parametrize("server", ["nginx-1.2", "nginx-1.3", "python-ssl"])
def test_a_client_s_requests_are_spans(server: str, tls_agent, serve, public_path: Path, pem: Path, program: Path):
    """To servers that use OpenSSL, the first request of each connection among them."""
    port, other = free_port(), free_port()
    tracing = tls_agent([port])
    serve(serving(server, port, public_path, pem), port)
    serve(rust_server(program, "serve", other, pem), other)
    secure_curl(f"https://localhost:{other}/status/200", pem=pem)  # its connection tells of the program
    watch(tracing, program)
    wait_for_libraries(tracing, 2)
    ask(program, "ask", port, pem, 40, 8, "1.2" if server == "nginx-1.2" else "1.3")
    spans = tracing.exact_spans(80, port=port)
    assert_pairs(spans, 40)
    assert {span.attributes["url.scheme"] for span in spans if span.kind == "SERVER"} == {"https"}
    assert tracing.metrics()["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


def test_a_program_without_symbols_is_reported(tls_agent, serve, public_path: Path, pem: Path, program: Path):
    """It runs as ever, and is named in the log with the reason; the other end is seen."""
    port = free_port()
    stripped = public_path / "rust_tls-stripped"
    subprocess.run(["strip", "-o", stripped, program], check=True)
    tracing = tls_agent([port])
    server = serve(rust_server(stripped, "serve", port, pem, "http1"), port)
    urls = [f"https://localhost:{port}/status/200"] * 2
    assert secure_curl(*urls, pem=pem).stdout == b"x" * 10
    named = f'"executable":"{stripped.name}","pid":{server.pid}'
    wait_until(lambda: named in tracing.stderr(), lambda: f"it is named{tracing.state()}")
    line = next(line for line in tracing.stderr().splitlines() if named in line)
    assert '"event":"tls_not_seen"' in line
    assert '"reason":"rust"' in line
    assert tracing.metrics()["spanloom_tls_unseen_processes_total{reason=rust}"] >= 1
    tracing.settle()
    assert {span.kind for span in tracing.spans(port)} <= {"CLIENT"}
