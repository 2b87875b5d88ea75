"""HTTP/2 without TLS and gRPC, between programs that nobody here wrote: nghttp2's, nginx, Go's net/http, grpcio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.books import BooksWatcher
from tests.e2e.harness import AgentProcess, Process, clean_environment, free_port, show, wait_until
from tests.e2e.test_live import MountedFile, change

MEGABYTE = 1 << 20
GRPC = servers.APPS / "grpc_calls.py"
CONTEXT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the servers have: a small file, and one that no window and no segment holds."""
    directory = tmp_path / "root"
    directory.mkdir()
    (directory / "small").write_text("hello")
    (directory / "large").write_bytes(os.urandom(MEGABYTE + 4321))
    return directory


@pytest.fixture
def nghttpd(start: Callable[..., Process], root: Path) -> int:
    """The port of nghttp2's server."""
    port = free_port()
    start(["nghttpd", "--no-tls", "--echo-upload", "-d", root, str(port)], port=port)
    return port


def run(*arguments: str | Path) -> str:
    """Run a client to its end; return what it prints."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def h2load(port: int, path: str, requests: int, connections: int, streams: int, *more: str | Path) -> None:
    """Make requests, so many at a time on each connection; all of them succeed."""
    url = f"http://127.0.0.1:{port}{path}"
    said = run("h2load", "-n", str(requests), "-c", str(connections), "-m", str(streams), *more, url)
    assert f"{requests} succeeded, 0 failed" in said, said


def exactly(tracing: AgentProcess, each: int) -> tuple[list[CollectedSpan], list[CollectedSpan]]:
    """So many spans of servers and as many of clients, each server's the child of its client's; nothing dropped."""
    spans = tracing.exact_spans(2 * each)
    ends = [[span for span in spans if span.kind == kind] for kind in ("SERVER", "CLIENT")]
    clients = {span.span_id: span for span in ends[1]}
    assert [len(end) for end in ends] == [each, each]
    for server in ends[0]:
        client = clients.pop(server.parent_span_id, None)
        assert client is not None, show([server])
        assert server.attributes["spanloom.link.method"] == "peer"
        assert server.trace_id == client.trace_id
        assert client.start_time_ns <= server.start_time_ns
    books = tracing.books()
    assert books.closed
    assert books.dropped == {}
    return ends[0], ends[1]


def values(spans: list[CollectedSpan], *names: str) -> Counter[tuple[object, ...]]:
    """How often the spans have which values of these attributes."""
    return Counter(tuple(span.attributes.get(name) for name in names) for span in spans)


# -- nghttp2


@pytest.mark.parametrize(("connections", "streams"), [(1, 100), (8, 100), (3, 1)])
def test_every_request_is_a_span_on_either_side(agent, nghttpd, connections: int, streams: int):
    """However many are under way on one connection at a time."""
    tracing = agent([nghttpd])
    h2load(nghttpd, "/small", 3000, connections, streams)
    spans, clients = exactly(tracing, 3000)
    names = ("http.response.status_code", "http.response.body.size", "network.protocol.version", "error.type")
    assert values(spans, "url.path", *names) == {("/small", 200, 5, "2", None): 3000}
    assert values(clients, "url.full", *names) == {(f"http://127.0.0.1:{nghttpd}/small", 200, 5, "2", None): 3000}


def test_statuses(agent, nghttpd):
    """An error is the client's from 400 on, the server's from 500."""
    tracing = agent([nghttpd])
    said = run("nghttp", "-v", f"http://127.0.0.1:{nghttpd}/small", f"http://127.0.0.1:{nghttpd}/missing")
    assert ":status: 404" in said
    spans, clients = exactly(tracing, 2)
    names = ("http.response.status_code", "error.type")
    assert values(spans, "url.path", *names) == {("/small", 200, None): 1, ("/missing", 404, None): 1}
    assert values(clients, *names) == {(200, None): 1, (404, "404"): 1}


@pytest.mark.parametrize("window", [16, 30], ids=["small_windows", "large_windows"])
def test_large_downloads_lose_no_request(agent, nghttpd, root: Path, window: int):
    """Bodies of many frames and more transfers, on many streams at a time: their sizes are exact."""
    tracing = agent([nghttpd])
    h2load(nghttpd, "/large", 200, 4, 20, "-w", str(window), "-W", str(window))
    spans, clients = exactly(tracing, 200)
    size = (root / "large").stat().st_size
    for end in (spans, clients):
        assert values(end, "http.response.status_code", "http.response.body.size") == {(200, size): 200}
    assert tracing.metrics().get("spanloom_kernel_events_total{event=frames_lost}", 0) == 0


def test_large_uploads_lose_no_request(agent, nghttpd, root: Path):
    """Flow-controlled uploads on many streams at a time, each of which comes back."""
    tracing = agent([nghttpd])
    h2load(nghttpd, "/small", 100, 2, 20, "-d", root / "large")
    spans, clients = exactly(tracing, 100)
    size = (root / "large").stat().st_size
    for end in (spans, clients):
        names = ("http.request.method", "http.request.body.size", "http.response.body.size")
        assert values(end, *names) == {("POST", size, size): 100}
    assert tracing.metrics().get("spanloom_kernel_events_total{event=frames_lost}", 0) == 0


def test_all_that_frames_can_be(agent, nghttpd):
    """Header blocks in several frames, padding, priorities, trailers, and headers as large as the table and larger."""
    tracing = agent([nghttpd], {"capture.request_headers": ["x-large"]})
    large = "x" * 20_000
    url = f"http://127.0.0.1:{nghttpd}/small"
    arguments = (
        "--continuation",
        "-p",
        "200",
        "-b",
        "100",
        "-H",
        f"x-large: {large}",
        "--trailer",
        "x-sum: 1",
        "-m",
        "7",
    )
    run("nghttp", "-n", *arguments, "-d", "/etc/passwd", url)
    spans, clients = exactly(tracing, 7)
    size = Path("/etc/passwd").stat().st_size
    for end in (spans, clients):
        names = ("http.response.status_code", "http.request.body.size", "http.response.body.size")
        assert values(end, *names) == {(200, size, size): 7}
        assert {tuple(span.attributes["http.request.header.x-large"]) for span in end} == {(large,)}


def test_a_client_that_goes_away(agent, start, tmp_path: Path):
    """What is open then ends with the connection, on both sides, and nothing stays in flight."""
    port = free_port()
    start([sys.executable, GRPC, "serve", str(port)], port=port, env=clean_environment())
    tracing = agent([port])
    client = start([sys.executable, GRPC, "call", str(port)], env=clean_environment())
    tracing.wait_for_spans(4)
    client.popen.kill()
    wait_until(lambda: tracing.books().in_flight == 0, lambda: tracing.state())
    assert tracing.books().closed


def test_the_books_close_at_full_speed(agent, nghttpd):
    """begun = exported + dropped + in flight in every reading, while streams come and go."""
    tracing = agent([nghttpd])
    with BooksWatcher(tracing, 60_000) as watcher:
        h2load(nghttpd, "/small", 30_000, 8, 50)
        wait_until(lambda: tracing.books().on_the_way == 0, lambda: tracing.state(), 60)
    watcher.assert_right(readings=5)
    exactly(tracing, 30_000)


# -- other servers


def test_nginx_sends_files(agent, serve, root: Path, public_path: Path):
    """The payload of its frames does not come from user memory, but for their headers."""
    port, h2_port = free_port(), free_port()
    root.chmod(0o755)
    (public_path / "large").write_bytes((root / "large").read_bytes())
    (public_path / "large").chmod(0o644)
    listen = f"listen 127.0.0.1:{h2_port} http2; http2_chunk_size 64k;"
    serve(servers.nginx(port, public_path, listen, root=public_path), h2_port)
    tracing = agent([h2_port])
    h2load(h2_port, "/large", 60, 2, 10)
    spans, clients = exactly(tracing, 60)
    size = (root / "large").stat().st_size
    for end in (spans, clients):
        assert values(end, "http.response.status_code", "http.response.body.size") == {(200, size): 60}


@pytest.mark.skipif(not servers.HAS_GO, reason="no Go here")
def test_go(agent, start, tmp_path: Path):
    """net/http on both ends, by prior knowledge."""
    port = free_port()
    program = servers.go_program(tmp_path)
    environment = clean_environment(H2C="1")
    start([program, "serve", str(port)], port=port, env=environment)
    tracing = agent([port])
    urls = [f"http://127.0.0.1:{port}/status/{status}" for status in (200, 204, 404, 500)]
    subprocess.run([program, "get", *urls], env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    spans, _ = exactly(tracing, 4)
    names = ("url.path", "http.response.status_code", "network.protocol.version")
    assert values(spans, *names) == {(f"/status/{status}", status, "2"): 1 for status in (200, 204, 404, 500)}


# -- HTTP/1 that is upgraded


@pytest.fixture(params=["apache", "nghttpx"])
def upgrading(request: pytest.FixtureRequest, start, serve, public_path: Path, root: Path) -> int:
    """The port of a server of HTTP/1 that upgrades to HTTP/2."""
    port = free_port()
    if request.param == "apache":
        extra = "Protocols h2c http/1.1\nH2Upgrade on"
        serve(servers.apache(port, public_path, modules=["http2"], extra=extra), port)
        files = public_path / f"apache-{port}" / "root"
    else:
        behind = free_port()
        files = public_path / "files"
        files.mkdir()
        serve(servers.nginx(behind, public_path, root=files), behind)
        frontend = f"--frontend=127.0.0.1,{port};no-tls"
        start(["nghttpx", frontend, f"--backend=127.0.0.1,{behind}", "--conf=/dev/null", "--no-ocsp"], port=port)
    for name in ("small", "large"):
        (files / name).write_bytes((root / name).read_bytes())
        (files / name).chmod(0o644)
    return port


def test_a_request_that_upgrades_is_one_span(agent, upgrading: int):
    """Its answer is that of stream 1, whose status, size and end it has; 101 is not."""
    tracing = agent([upgrading])
    run("curl", "-sS", "--http2", "-o", "/dev/null", f"http://127.0.0.1:{upgrading}/small")
    run("curl", "-sS", "--http2", "-o", "/dev/null", f"http://127.0.0.1:{upgrading}/missing")
    spans, clients = exactly(tracing, 2)
    names = ("http.response.status_code", "network.protocol.version", "error.type")
    assert values(spans, "url.path", *names) == {("/small", 200, "2", None): 1, ("/missing", 404, "2", None): 1}
    assert values(clients, *names) == {(200, "2", None): 1, (404, "2", "404"): 1}
    for end in (spans, clients):
        [found] = [span for span in end if span.attributes["http.response.status_code"] == 200]
        assert found.attributes["http.response.body.size"] == 5
        assert found.attributes["user_agent.original"].startswith("curl/")


# Apache ends an upgraded connection behind stream 1, whatever its clients have asked for meanwhile.
with_nghttpx = pytest.mark.parametrize("upgrading", ["nghttpx"], indirect=True)


@with_nghttpx
def test_streams_behind_an_upgrade(agent, upgrading: int, root: Path):
    """The first request is HTTP/1's, the others are streams like any other; the context and the sizes are exact."""
    tracing = agent([upgrading])
    url = f"http://127.0.0.1:{upgrading}"
    urls = [f"{url}/large", *(f"{url}/small?{number}" for number in range(3))]
    said = run("nghttp", "-nv", "-u", "-H", f"traceparent: {CONTEXT}", *urls)
    assert "HTTP Upgrade success" in said
    spans, clients = exactly(tracing, 4)
    size = (root / "large").stat().st_size
    names = ("http.response.status_code", "http.response.body.size", "network.protocol.version", "error.type")
    assert values(spans, "url.path", *names) == {("/small", 200, 5, "2", None): 3, ("/large", 200, size, "2", None): 1}
    assert values(clients, *names) == {(200, 5, "2", None): 3, (200, size, "2", None): 1}
    assert {span.trace_id for span in (*spans, *clients)} == {CONTEXT.split("-")[1]}
    assert tracing.metrics().get("spanloom_kernel_events_total{event=frames_lost}", 0) == 0


@with_nghttpx
def test_a_client_that_upgrades_by_default(agent, upgrading: int):
    """Java's sends its later requests as streams of the connection that its first one has upgraded."""
    tracing = agent([upgrading])
    urls = [f"http://127.0.0.1:{upgrading}/{name}" for name in ("small", "small", "missing", "small")]
    arguments = ["java", "-XX:TieredStopAtLevel=1", str(servers.APPS / "JavaClient.java"), *urls]
    subprocess.run(arguments, env=clean_environment(H2C="1"), check=True, timeout=100, stdout=subprocess.DEVNULL)
    spans, clients = exactly(tracing, 4)
    for end in (spans, clients):
        names = ("http.response.status_code", "network.protocol.version")
        assert values(end, *names) == {(200, "2"): 3, (404, "2"): 1}


def test_a_refused_upgrade_is_a_request_of_http1(agent, serve, public_path: Path):
    """nginx does not upgrade."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    tracing = agent([port])
    urls = [f"http://127.0.0.1:{port}/status/{status}" for status in (200, 404)]
    run("curl", "-sS", "--http2", *urls)
    spans, clients = exactly(tracing, 2)
    for end in (spans, clients):
        names = ("http.response.status_code", "network.protocol.version")
        assert values(end, *names) == {(200, "1.1"): 1, (404, "1.1"): 1}


def test_an_upgrade_without_http2(agent, upgrading: int):
    """Where HTTP/2 is not to be captured, the switch is all that is told."""
    tracing = agent([upgrading], {"capture.protocols": ["http1"]})
    run("curl", "-sS", "--http2", f"http://127.0.0.1:{upgrading}/small")
    spans, clients = exactly(tracing, 1)
    for end in (spans, clients):
        names = ("http.response.status_code", "network.protocol.version")
        assert values(end, *names) == {(101, "1.1"): 1}


# -- gRPC


def test_every_kind_of_call(agent, start):
    """Unary and streaming calls of all sizes, errors at once and late, a deadline, a cancellation."""
    port = free_port()
    start([sys.executable, GRPC, "serve", str(port)], port=port, env=clean_environment())
    tracing = agent([port], {"capture.request_headers": ["x-number"]})
    made = json.loads(run(sys.executable, GRPC, "call", str(port)))
    spans, clients = exactly(tracing, len(made))
    for end in (spans, clients):
        by_number = {int(span.attributes["rpc.request.metadata.x-number"][0]): span for span in end}
        for number, (method, status, sent, received) in enumerate(made):
            span = by_number[number]
            is_unknown = status == "UNIMPLEMENTED" and end is spans
            assert span.name == ("grpc" if is_unknown else f"pkg.Echo/{method}")
            assert span.attributes["rpc.system.name"] == "grpc"
            assert span.attributes["rpc.method"] == ("_OTHER" if is_unknown else f"pkg.Echo/{method}")
            assert span.attributes["rpc.response.status_code"] == status, show([span])
            assert span.attributes.get("spanloom.rpc.request.messages") in (sent, None), show([span])
            if received >= 0:
                assert span.attributes["spanloom.rpc.response.messages"] == received, show([span])
            assert "http.response.status_code" not in span.attributes
    counted = [span for span in (*spans, *clients) if "spanloom.rpc.request.messages" in span.attributes]
    assert len(counted) >= 1.5 * len(made)


def test_calls_of_calls(agent, start):
    """A server that forwards the context it got is the parent of its own calls; many at a time, on few connections."""
    front, back = free_port(), free_port()
    start([sys.executable, GRPC, "serve", str(back)], port=back, env=clean_environment(OTEL_SERVICE_NAME="back"))
    start([sys.executable, GRPC, "serve", str(front), str(back)], port=front, env=clean_environment())
    tracing = agent([front, back])
    contexts = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 41)]
    for context in contexts:
        run_in_background = [sys.executable, str(GRPC), "calls", str(front), "5", "5", context]
        start(run_in_background, env=clean_environment())
    spans = tracing.exact_spans(4 * 5 * len(contexts))
    by_id = {span.span_id: span for span in spans}
    places = Counter()
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        if parent is not None:
            assert parent.trace_id == span.trace_id
            if span.kind == "SERVER":
                assert parent.kind == "CLIENT"
        places[span.kind, span.attributes["server.port"] == front, parent is not None] += 1
    assert places["SERVER", True, True] == places["SERVER", False, True] == 5 * len(contexts), places
    assert {span.trace_id for span in spans} == {context.split("-")[1] for context in contexts}
    methods = values(spans, "spanloom.link.method")
    assert ("thread",) not in methods
    assert tracing.books().dropped == {}


def test_a_connection_that_is_older_than_the_agent(agent, start):
    """Its requests are read as the header table fills again, and none of them gets what is not its own."""
    port = free_port()
    start([sys.executable, GRPC, "serve", str(port)], port=port, env=clean_environment())
    script = (
        "import grpc, sys\n"
        "channel = grpc.insecure_channel(f'127.0.0.1:{sys.argv[1]}')\n"
        "for line in sys.stdin:\n"
        "    for number in range(100):\n"
        "        try: channel.unary_unary(f'/pkg.{line.strip()}/M{number}')(b'x', timeout=30)\n"
        "        except grpc.RpcError: pass\n"
        "    print(line, flush=True)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for name in ("Before", "After"):
            client.stdin.write(f"{name}\n")
            client.stdin.flush()
            assert client.stdout.readline().strip() == name
            client.stdout.readline()
            if name == "Before":
                tracing = agent([port])
        spans = tracing.wait_for_spans(2)
        client.stdin.close()
        assert client.wait(30) == 0
    finally:
        client.kill()
    books = tracing.settle()
    spans = tracing.spans()
    # What goes before the first header block that says whether it is one of a request is not seen.
    assert 190 <= books.begun <= 200, tracing.state()
    assert set(books.dropped) <= {"stream_lost"}
    assert len(spans) + sum(books.dropped.values()) == books.begun
    for span in spans:
        path = span.attributes.get("url.path") or span.attributes.get("rpc.method_original")
        method = span.attributes.get("rpc.method", "")
        assert "Before" not in f"{span.name} {path} {method} {span.attributes.get('url.full')}"
    assert any(span.attributes.get("rpc.method") == "pkg.After/M99" for span in spans if span.kind == "CLIENT")


# -- settings


def test_http2_is_switched_off_and_on(agent, nghttpd, start, tmp_path: Path):
    """Off, nothing of it is captured, on connections that are open, too; on again, they are picked up."""
    file = MountedFile(tmp_path / "mounted", {"capture": {"protocols": ["http1"]}})
    tracing = agent([nghttpd], config=file.path)
    h2load(nghttpd, "/small", 100, 1, 10)
    assert tracing.settle().begun == 0
    change(tracing, file, {})
    h2load(nghttpd, "/small", 100, 1, 10)
    exactly(tracing, 100)
    change(tracing, file, {"capture": {"protocols": ["http1"]}})
    h2load(nghttpd, "/small", 100, 1, 10)
    assert tracing.settle().begun == 200
