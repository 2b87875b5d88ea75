"""Real servers under real probes: each request is one span that says what the server did.

The requests come from curl, so every exchange is seen from both ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.harness import curl, free_port, one, show

LARGE_BYTES = 5 * 1024 * 1024


def by_path(spans: list[CollectedSpan], path: str) -> CollectedSpan:
    return one(span for span in spans if span.attributes.get("url.path") == path)


def assert_paired(client: CollectedSpan, server: CollectedSpan) -> None:
    """The server's span is the child of the client's, found through the connection that both ends share."""
    assert server.trace_id == client.trace_id, show([client, server])
    assert server.parent_span_id == client.span_id, show([client, server])
    assert server.attributes["spanloom.link.method"] == "peer", show([client, server])


@pytest.mark.parametrize("name", servers.SERVERS)
def test_a_server_s_requests_are_spans(name: str, agent, serve, public_path: Path):
    """Each request is one server span with method, path, status, port, executable, language and service name."""
    port = free_port()
    server = servers.SERVERS[name](port, public_path)
    tracing = agent([port])
    serve(server, port, service=f"shop-{name}")
    base = f"http://127.0.0.1:{port}"
    answered = {}
    for status in servers.STATUSES:
        result = curl("-o", "/dev/null", "-w", "%{http_code}", f"{base}/status/{status}?number={status}")
        answered[status] = int(result.stdout)
    assert answered == {status: status for status in servers.STATUSES}, "the server itself"
    spans = tracing.exact_spans(2 * len(servers.STATUSES), port=port)
    served = [span for span in spans if span.kind == "SERVER"]
    assert len(served) == len(servers.STATUSES), show(spans)
    for status in servers.STATUSES:
        span = by_path(served, f"/status/{status}")
        attributes = span.attributes
        assert span.name == "GET"
        assert attributes["http.request.method"] == "GET"
        assert attributes["url.query"] == f"number={status}"
        assert attributes["url.scheme"] == "http"
        assert attributes["http.response.status_code"] == status
        assert attributes["server.address"] == "127.0.0.1"
        assert attributes["server.port"] == port
        assert attributes["client.address"] == "127.0.0.1"
        assert attributes["network.peer.address"] == "127.0.0.1"
        assert attributes["network.protocol.version"] == "1.1"
        assert str(attributes["user_agent.original"]).startswith("curl/")
        # A server's 4xx is the client's fault: only 5xx is an error.
        assert span.status == ("ERROR" if status >= 500 else "UNSET")
        assert attributes.get("error.type") == (str(status) if status >= 500 else None)
        assert span.resource["process.executable.name"] == server.executable
        assert span.resource.get("telemetry.sdk.language", "") == server.language
        assert span.resource["telemetry.sdk.name"] == "spanloom"
        assert span.resource["service.name"] == (f"shop-{name}" if server.keeps_environment else server.executable)
        assert 0 < span.start_time_ns < span.end_time_ns
        client = one(
            other
            for other in spans
            if other.kind == "CLIENT" and f"/status/{status}?" in str(other.attributes["url.full"])
        )
        assert_paired(client, span)
        assert client.start_time_ns <= span.start_time_ns
        assert client.status == ("ERROR" if status >= 400 else "UNSET")
    books = tracing.books()
    assert books.dropped == {}
    assert books.begun == books.handed_over == len(spans)


@pytest.mark.parametrize("name", servers.SERVERS)
def test_a_server_s_keep_alive_connection_is_one_span_per_request(name: str, agent, serve, public_path: Path):
    """Requests that share a connection (or, where a server closes it, do not) are counted one by one."""
    port = free_port()
    tracing = agent([port])
    serve(servers.SERVERS[name](port, public_path), port)
    result = curl("-o", "/dev/null", "-w", "%{http_code} ", f"http://127.0.0.1:{port}/status/200?number=[1-25]")
    assert result.stdout.split() == [b"200"] * 25
    spans = tracing.exact_spans(50, port=port)
    queries = sorted(str(span.attributes.get("url.query")) for span in spans if span.kind == "SERVER")
    assert queries == sorted(f"number={number}" for number in range(1, 26))
    assert len({span.trace_id for span in spans}) == 25


def test_plain_python_http_server(agent, serve, public_path: Path):
    """``python -m http.server``, which speaks HTTP/1.0 and ends each body with the connection, is seen whole."""
    port = free_port()
    tracing = agent([port])
    serve(servers.python_plain(port, public_path), port, service="files")
    assert curl(f"http://127.0.0.1:{port}/status/200").stdout == b"as asked\n"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}/missing").stdout == b"404"
    spans = tracing.exact_spans(4, port=port)
    found = by_path([span for span in spans if span.kind == "SERVER"], "/status/200")
    missing = by_path([span for span in spans if span.kind == "SERVER"], "/missing")
    assert (found.attributes["http.response.status_code"], found.status) == (200, "UNSET")
    assert (missing.attributes["http.response.status_code"], missing.status) == (404, "UNSET")
    assert "error.type" not in found.attributes
    assert found.resource["telemetry.sdk.language"] == "python"


@pytest.mark.parametrize("sendfile", ["on", "off"])
def test_nginx_serves_files_of_all_sizes(sendfile: str, agent, serve, public_path: Path):
    """With sendfile and without, the response's size is that of the file and the span ends with its last byte."""
    port = free_port()
    root = public_path / "root"
    root.mkdir()
    small, large = b"small\n", bytes(range(256)) * (LARGE_BYTES // 256)
    (root / "small").write_bytes(small)
    (root / "large").write_bytes(large)
    (root / "empty").write_bytes(b"")
    for path in root.iterdir():
        path.chmod(0o644)
    tracing = agent([port])
    serve(servers.nginx(port, public_path, extra=f"sendfile {sendfile};", root=root), port)
    # A second request on the same connection shows that the end of the first was found.
    base = f"http://127.0.0.1:{port}"
    output = public_path / "got"
    options = ["-w", "%{http_code} %{size_download}\n"]
    got = curl(
        *options, "-o", output, f"{base}/large", "-o", "/dev/null", f"{base}/small", "-o", "/dev/null", f"{base}/empty"
    )
    assert got.stdout.split() == [b"200", str(LARGE_BYTES).encode(), b"200", b"6", b"200", b"0"]
    assert output.read_bytes() == large
    spans = tracing.exact_spans(6, port=port)
    for kind in ("SERVER", "CLIENT"):
        sizes = {}
        for span in spans:
            if span.kind == kind:
                path = span.attributes.get("url.path") or str(span.attributes["url.full"]).removeprefix(base)
                sizes[path] = span.attributes.get("http.response.body.size")
                assert "error.type" not in span.attributes, show([span])
        assert sizes == {"/large": LARGE_BYTES, "/small": 6, "/empty": 0}


def test_a_throttled_download_ends_with_its_last_byte(agent, serve, public_path: Path):
    """A response that takes long is as long as the server itself says, not as short as its head."""
    port = free_port()
    root = public_path / "root"
    root.mkdir()
    (root / "slow").write_bytes(b"s" * 300_000)
    tracing = agent([port])
    serve(servers.nginx(port, public_path, extra="location = /slow { limit_rate 200k; }", root=root), port)
    assert len(curl(f"http://127.0.0.1:{port}/slow").stdout) == 300_000
    server = one(span for span in tracing.exact_spans(2, port=port) if span.kind == "SERVER")
    status, seconds, _, target = (public_path / f"nginx-{port}.log").read_text().split()
    assert (status, target) == ("200", "/slow")
    measured_seconds = float(seconds)
    assert measured_seconds > 0.5, "the test's own premise: nginx did throttle"
    span_seconds = (server.end_time_ns - server.start_time_ns) / 1e9
    assert abs(span_seconds - measured_seconds) <= max(0.002, 0.05 * measured_seconds), (span_seconds, measured_seconds)


def test_reverse_proxy_that_forwards_the_context_is_one_trace(agent, serve, public_path: Path):
    """nginx passes ``traceparent`` on unchanged: caller, proxy, its call and the upstream are one chain (rule 1)."""
    front, back = free_port(), free_port()
    tracing = agent([front, back])
    serve(servers.python_threads(back, public_path), back, service="upstream")
    proxy = f"location / {{ proxy_pass http://127.0.0.1:{back}; proxy_http_version 1.1; }}"
    serve(servers.nginx(front, public_path, extra=proxy), front)
    count = 10
    traces = [f"{number + 1:032x}" for number in range(count)]
    caller = "00f067aa0ba902b7"
    for number, trace in enumerate(traces):
        header = f"traceparent: 00-{trace}-{caller}-01"
        assert curl("-H", header, f"http://127.0.0.1:{front}/headers?number={number}").returncode == 0
    spans = tracing.exact_spans(4 * count)
    for trace in traces:
        chain = [span for span in spans if span.trace_id == trace]
        assert len(chain) == 4, show(chain)
        parts = {(span.kind, span.resource["process.executable.name"]): span for span in chain}
        outside, proxied = parts["CLIENT", "curl"], parts["SERVER", "nginx"]
        onward, upstream = parts["CLIENT", "nginx"], one(s for s in chain if s.resource["service.name"] == "upstream")
        assert outside.parent_span_id == caller, "curl carries the context of whoever called it"
        assert outside.attributes["spanloom.link.method"] == "header"
        assert_paired(outside, proxied)
        assert onward.parent_span_id == proxied.span_id, show(chain)
        assert onward.attributes["spanloom.link.method"] == "forwarded", show(chain)
        assert_paired(onward, upstream)
        assert onward.attributes["server.port"] == back or onward.attributes["network.peer.port"] == back
        assert proxied.resource == onward.resource
        assert proxied.start_time_ns <= onward.start_time_ns <= upstream.start_time_ns
        assert upstream.end_time_ns <= proxied.end_time_ns


def test_reverse_proxy_to_a_dead_upstream(agent, serve, public_path: Path):
    """A 502 of the proxy is an error of its server span, and the call that was refused is no exchange."""
    front, back = free_port(), free_port()
    tracing = agent([front, back])
    serve(servers.nginx(front, public_path, extra=f"location / {{ proxy_pass http://127.0.0.1:{back}; }}"), front)
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{front}/any").stdout == b"502"
    spans = tracing.exact_spans(2)
    assert {span.kind for span in spans} == {"CLIENT", "SERVER"}
    for span in spans:
        assert (span.status, span.attributes["error.type"]) == ("ERROR", "502"), show(spans)


@pytest.mark.parametrize("name", ["nginx", "python-threads", "node"])
def test_methods_and_bodies(name: str, agent, serve, public_path: Path):
    """HEAD has no body whatever its length says, an unknown method is ``_OTHER``, and a body's size is counted."""
    port = free_port()
    tracing = agent([port])
    serve(servers.SERVERS[name](port, public_path), port)
    base = f"http://127.0.0.1:{port}/status/200"
    curl("-I", f"{base}?number=1", "--next", "-q", "-sS", "-X", "DELETE", f"{base}?number=2")
    curl("-X", "POST", "--data-binary", "x" * 3000, f"{base}?number=3")
    curl("-X", "BREW", f"{base}?number=4")
    spans = [span for span in tracing.exact_spans(8, port=port) if span.kind == "SERVER"]
    by_number = {str(span.attributes["url.query"]): span for span in spans}
    head, delete, post, brew = (by_number[f"number={number}"] for number in (1, 2, 3, 4))
    assert (head.name, head.attributes["http.request.method"]) == ("HEAD", "HEAD")
    assert "error.type" not in head.attributes, show([head])
    assert delete.name == "DELETE"
    assert post.attributes["http.request.body.size"] == 3000
    assert brew.name == "HTTP"
    assert brew.attributes["http.request.method"] == "_OTHER"
    assert brew.attributes["http.request.method_original"] == "BREW"
    assert head.attributes["http.response.status_code"] == 200
