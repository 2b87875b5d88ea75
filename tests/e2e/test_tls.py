"""TLS without certificates or changes: what real programs say to each other over it, and what is said of those that
cannot be seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import ssl
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from h2.connection import H2Connection
from h2.events import StreamEnded

from agent.kernel import uprobes
from agent.protocols.tls import CIPHER_SUITES
from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.harness import (
    NOBODY,
    AgentProcess,
    clean_environment,
    curl,
    free_port,
    one,
    show,
    wait_until,
)
from tests.e2e.load import run_wrk
from tests.e2e.scripted import close_with_reset
from tests.e2e.servers import APPS, STATUSES, Server
from tests.e2e.test_capabilities import dropping_all_but

SYSTEM_PYTHON = "/usr/bin/python3"


def nginx(
    port: int, directory: Path, pem: Path, extra: str = "", version: str = "TLSv1.3", http: str = "", alpn: str = ""
) -> Server:
    """nginx on ``port`` with TLS of one version; without TLS it answers on a port of its own that nobody asks."""
    secured = f"""
    listen 127.0.0.1:{port} ssl {alpn} backlog=512;
    ssl_certificate {pem};
    ssl_certificate_key {pem};
    ssl_protocols {version};
    {extra}"""
    plain = free_port()
    made = servers.nginx(plain, directory, extra=secured, http=http)
    return made


def serving(name: str, port: int, directory: Path, pem: Path) -> Server:
    """One of SERVERS."""
    python = Path(SYSTEM_PYTHON).resolve().name
    match name:
        case "nginx-1.2":
            return nginx(port, directory, pem, version="TLSv1.2")
        case "nginx-1.3":
            return nginx(port, directory, pem)
        case "python-ssl":
            return Server(
                arguments=[SYSTEM_PYTHON, APPS / "tls_threads.py", str(port), pem], executable=python, language="python"
            )
        case "python-asyncio":
            arguments = [SYSTEM_PYTHON, APPS / "tls_asyncio.py", "serve", str(port), pem]
            return Server(arguments=arguments, executable=python, language="python")
        case _:
            arguments = ["node", APPS / "tls_node.mjs", "serve", str(port), pem]
            return Server(arguments=arguments, executable="node", language="nodejs")


SERVERS = ("nginx-1.2", "nginx-1.3", "python-ssl", "python-asyncio", "node")


def secure_curl(*arguments: str, pem: Path) -> subprocess.CompletedProcess[bytes]:
    command = ["curl", "-q", "-sS", "--noproxy", "*", "--http1.1", "--cacert", str(pem), *arguments]
    return subprocess.run(command, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def wait_for_libraries(tracing: AgentProcess, files: int = 1) -> None:
    """Wait until so many files are watched."""
    wait_until(
        lambda: tracing.metrics()["spanloom_tls_files"] >= files,
        lambda: f"{files} files are watched{tracing.state()}",
    )


def warm_up(tracing: AgentProcess, port: int, pem: Path) -> None:
    """Let the server's executable be found, if it is one that has the library in itself: its first connection, which
    may come before the probes, is what tells of it. No request is made.
    """
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(pem)]
    subprocess.run(command, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    linked = subprocess.run(["ldd", shutil.which("node")], capture_output=True, text=True, check=True).stdout
    if "libssl" in linked:  # Debian's since 13
        wait_for_libraries(tracing)
        return
    wait_until(lambda: '"library":"node"' in tracing.stderr(), lambda: f"the server is watched{tracing.state()}")


def assert_pairs(spans: list[CollectedSpan], count: int) -> None:
    """So many exchanges, each seen from both ends and linked by the connection they share."""
    clients = {span.span_id: span for span in spans if span.kind == "CLIENT"}
    served = [span for span in spans if span.kind == "SERVER"]
    assert (len(clients), len(served)) == (count, count), show(spans)
    for span in served:
        client = clients.pop(span.parent_span_id, None)
        assert client is not None, show([span, *clients.values()])
        assert client.trace_id == span.trace_id
        assert span.attributes["spanloom.link.method"] == "peer"
        path = span.attributes["url.path"] + f"?{span.attributes['url.query']}"
        assert client.attributes["url.full"].endswith(path), show([client, span])
        assert client.attributes["http.response.status_code"] == span.attributes["http.response.status_code"]


def assert_agreed(spans: list[CollectedSpan], version: str) -> None:
    """All name this version of TLS, and one cipher suite of it."""
    agreed = {(span.attributes.get("tls.protocol.version"), span.attributes.get("tls.cipher")) for span in spans}
    assert len(agreed) == 1, show(spans)
    assert {span.attributes["tls.protocol.name"] for span in spans} == {"tls"}
    named, suite = agreed.pop()
    assert named == version
    assert suite in CIPHER_SUITES.values()
    assert ("_WITH_" in suite) == (version != "1.3")


@pytest.mark.parametrize(
    ("version", "suite", "option"),
    [
        ("1.2", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", ["--ciphers", "ECDHE-RSA-CHACHA20-POLY1305"]),
        ("1.2", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", ["--ciphers", "ECDHE-RSA-AES128-GCM-SHA256"]),
        ("1.3", "TLS_CHACHA20_POLY1305_SHA256", ["--tls13-ciphers", "TLS_CHACHA20_POLY1305_SHA256"]),
        ("1.3", "TLS_AES_128_GCM_SHA256", ["--tls13-ciphers", "TLS_AES_128_GCM_SHA256", "--curves", "P-521"]),
    ],
)
def test_what_the_ends_agreed_on(version, suite, option, tls_agent, serve, public_path: Path, pem: Path):
    """The version and the cipher suite are those that the client insists on, behind a HelloRetryRequest, too."""
    port = free_port()
    tracing = tls_agent([port])
    serve(nginx(port, public_path, pem, version="TLSv1.2 TLSv1.3", extra="ssl_ecdh_curve X25519:P-521;"), port)
    wait_for_libraries(tracing)
    limits = ["--tls-max", version] if version == "1.2" else []
    urls = [f"https://localhost:{port}/status/200?id={number}" for number in range(3)]
    outputs = [argument for _ in urls for argument in ("-o", "/dev/null")]
    done = secure_curl(*limits, *option, *outputs, *urls, pem=pem)
    assert done.returncode == 0, done.stderr
    spans = tracing.exact_spans(6, port=port)
    assert_agreed(spans, version)
    assert {span.attributes["tls.cipher"] for span in spans} == {suite}


def test_http2_over_tls(tls_agent, serve, public_path: Path, pem: Path):
    """What ALPN chose is followed as it is in the clear: requests of one connection, many at once, from both ends."""
    port = free_port()
    serve(nginx(port, public_path, pem, alpn="http2"), port)
    tracing = tls_agent([port])
    wait_for_libraries(tracing)
    urls = [f"https://localhost:{port}/status/{status}?number={status}" for status in STATUSES]
    outputs = [argument for _ in urls for argument in ("-o", "/dev/null")]
    done = secure_curl("--http2", *outputs, "-w", "%{http_code}/%{http_version} ", *urls, pem=pem)
    assert done.stdout.split() == [f"{status}/2".encode() for status in STATUSES], done.stderr
    spans = tracing.exact_spans(2 * len(STATUSES), port=port)
    assert_pairs(spans, len(STATUSES))
    assert_agreed(spans, "1.3")
    for span in spans:
        assert span.attributes["network.protocol.version"] == "2"
        if span.kind == "SERVER":
            assert span.attributes["url.scheme"] == "https"
    load = ["h2load", "-n", "2000", "-c", "8", "-m", "20", f"https://127.0.0.1:{port}/status/200"]
    done = subprocess.run(load, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert b"2000 succeeded" in done.stdout, done
    tracing.wait_for_spans(2000 + len(STATUSES), 60, port=port, kind="SERVER")
    books = tracing.settle()
    served = [span for span in tracing.spans(port, "SERVER") if span.attributes["url.path"] == "/status/200"]
    assert len(served) == 2000 + STATUSES.count(200)
    assert books.begun == books.handed_over + sum(books.dropped.values())
    assert not set(books.dropped) - {"no_request"}, books


def test_what_was_written_before_the_connection_ended_is_seen(tls_agent, serve, public_path: Path, pem: Path):
    """A client has the last bytes, and has reset the connection, before the server's call that wrote them returns."""
    library = public_path / "slow_write.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, APPS / "slow_write.c", "-ldl"], check=True, timeout=60)
    port = free_port()
    server = nginx(port, public_path, pem, alpn="http2")
    server.environment["LD_PRELOAD"] = str(library)
    serve(server, port)
    tracing = tls_agent([port])
    wait_for_libraries(tracing)
    context = ssl.create_default_context(cafile=pem)
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 30), server_hostname="localhost") as secure:
        client = H2Connection()
        client.initiate_connection()
        fields = [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", f"localhost:{port}"),
            (":path", "/status/200"),
        ]
        client.send_headers(1, fields, end_stream=True)
        secure.sendall(client.data_to_send())
        while not any(isinstance(event, StreamEnded) for event in client.receive_data(secure.recv(65536))):
            pass
        close_with_reset(secure)
    (span,) = tracing.exact_spans(1, port=port, kind="SERVER")
    assert span.attributes["http.response.status_code"] == 200
    assert "error.type" not in span.attributes


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_s_requests_are_spans(name: str, tls_agent, serve, public_path: Path, pem: Path):
    """Each request over TLS is a span of the server and one of the client, linked, as it would be without TLS."""
    port = free_port()
    server = serving(name, port, public_path, pem)
    tracing = tls_agent([port])
    serve(server, port)
    if name == "node":
        warm_up(tracing, port, pem)
    wait_for_libraries(tracing)
    urls = [f"https://localhost:{port}/status/{status}?number={status}" for status in STATUSES]
    outputs = [argument for _ in urls for argument in ("-o", "/dev/null")]
    result = secure_curl(*outputs, "-w", "%{http_code} ", *urls, pem=pem)
    assert result.stdout.split() == [str(status).encode() for status in STATUSES], result.stderr
    spans = tracing.exact_spans(2 * len(STATUSES), port=port)
    assert_pairs(spans, len(STATUSES))
    assert_agreed(spans, "1.2" if name == "nginx-1.2" else "1.3")
    for span in spans:
        attributes = span.attributes
        status = attributes["http.response.status_code"]
        assert attributes["server.address"] == "localhost"
        assert attributes["server.port"] == port
        assert attributes["network.peer.address"] == "127.0.0.1"
        assert attributes["network.protocol.version"] == "1.1"
        if span.kind == "SERVER":
            assert attributes["url.scheme"] == "https"
            assert attributes["url.query"] == f"number={status}"
            assert span.status == ("ERROR" if status >= 500 else "UNSET")
            assert span.resource["process.executable.name"] == server.executable
            assert 0 < span.start_time_ns < span.end_time_ns
        else:
            assert attributes["url.full"] == f"https://localhost:{port}/status/{status}?number={status}"
            assert span.resource["process.executable.name"] == "curl"
    books = tracing.books()
    assert books.dropped == {}
    assert books.begun == books.handed_over == len(spans)
    metrics = tracing.metrics()
    assert metrics["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


CLIENTS = {
    "python-ssl": (lambda port, pem: [SYSTEM_PYTHON, APPS / "tls_client.py", port, pem, "20"], 20),
    "python-asyncio": (lambda port, pem: [SYSTEM_PYTHON, APPS / "tls_asyncio.py", "ask", port, pem, "5", "8"], 40),
    "node": (lambda port, pem: ["node", APPS / "tls_node.mjs", "ask", port, pem, "24", "6"], 24),
    "wget": (
        lambda port, pem: [
            *("wget", "-q", "-O", "/dev/null", f"--ca-certificate={pem}", "--no-proxy"),
            *(f"https://localhost:{port}/status/200?id={number}" for number in range(10)),
        ],
        10,
    ),
}
"""Clients, and how many requests they make. wget uses GnuTLS."""


@pytest.mark.parametrize("server", ["nginx-1.2", "nginx-1.3", "python-asyncio"])
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_s_requests_are_spans(name: str, server: str, tls_agent, serve, public_path: Path, pem: Path):
    """Clients of all kinds, on several connections at a time: every request is seen from both ends."""
    port = free_port()
    tracing = tls_agent([port])
    serve(serving(server, port, public_path, pem), port)
    wait_for_libraries(tracing)
    command, count = CLIENTS[name]
    arguments = [str(part) for part in command(str(port), pem)]

    def run() -> None:
        done = subprocess.run(arguments, env=clean_environment(), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        tracing.settle()

    def is_seen() -> bool:
        run()
        return bool(tracing.spans(port, "CLIENT"))

    # Its first runs let its library be found, and may be over before it is.
    wait_until(is_seen, lambda: f"{name} is seen{tracing.state()}")
    earlier = len(tracing.spans(port))
    run()
    spans = tracing.exact_spans(earlier + 2 * count, port=port)[earlier:]
    assert_pairs(spans, count)
    assert_agreed(spans, "1.2" if server == "nginx-1.2" else "1.3")
    assert {span.attributes.get("url.scheme", "https") for span in spans} == {"https"}
    assert tracing.metrics()["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


def test_requests_of_a_load_generator_are_counted_one_by_one(tls_agent, serve, public_path: Path, pem: Path):
    """2000 requests on 64 keep-alive connections at full speed: as many spans as nginx's log has lines, by status."""
    port = free_port()
    tracing = tls_agent([port])
    server = nginx(port, public_path, pem)
    serve(server, port)
    wait_for_libraries(tracing)
    # Its first handshakes come before wrk's own library is found, if it has one: they are kept out of the count.
    run_wrk(port, ["/status/200", "/status/404", "/status/500"], 2000, scheme="https")
    log = next(public_path.glob("nginx-*.log"))
    tracing.settle()
    asked = Counter(int(line.split()[0]) for line in log.read_text().splitlines())
    assert sum(asked.values()) >= 2000

    def answered(kind: str) -> Counter[int]:
        return Counter(span.attributes.get("http.response.status_code") for span in tracing.spans(port, kind))

    wait_until(lambda: answered("SERVER") == asked, lambda: f"{answered('SERVER')} of {asked}{tracing.state()}")
    books = tracing.settle()
    assert books.closed
    served = tracing.spans(port, "SERVER")
    assert len({span.attributes["url.query"] for span in served}) == len(served)


def test_a_proxy_to_a_server_over_tls_is_one_trace(tls_agent, serve, public_path: Path, pem: Path):
    """nginx is a TLS server and a TLS client; it passes ``traceparent`` on, and caller, proxy, its call and the
    upstream are one chain.
    """
    front, back = free_port(), free_port()
    tracing = tls_agent([front, back])
    serve(serving("python-ssl", back, public_path, pem), back)
    upstream = f"upstream behind {{ server 127.0.0.1:{back}; keepalive 4; }}"
    proxy = f"""
    location / {{
      proxy_pass https://behind;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host localhost:{back};
    }}"""
    serve(nginx(front, public_path, pem, extra=proxy, http=upstream), front)
    wait_for_libraries(tracing)
    traces = [f"{number + 1:032x}" for number in range(5)]
    caller = "00f067aa0ba902b7"
    for trace in traces:
        header = f"traceparent: 00-{trace}-{caller}-01"
        result = secure_curl("-H", header, f"https://localhost:{front}/headers", pem=pem)
        assert result.returncode == 0, result.stderr
    spans = tracing.exact_spans(4 * len(traces))
    for trace in traces:
        chain = [span for span in spans if span.trace_id == trace]
        assert len(chain) == 4, show(spans)
        parts = {(span.kind, span.resource["process.executable.name"]): span for span in chain}
        outside, proxied, onward = parts["CLIENT", "curl"], parts["SERVER", "nginx"], parts["CLIENT", "nginx"]
        asked = one(span for span in chain if span.resource.get("telemetry.sdk.language") == "python")
        assert outside.parent_span_id == caller
        assert proxied.parent_span_id == outside.span_id
        assert onward.parent_span_id == proxied.span_id
        assert onward.attributes["spanloom.link.method"] == "forwarded"
        assert asked.parent_span_id == onward.span_id
        assert asked.attributes["spanloom.link.method"] == "peer"


@pytest.mark.parametrize("path", ["/copied/status/200", "/status/200"])
def test_a_call_over_tls_has_the_request_it_serves_as_its_parent(
    path: str, tls_agent, serve, public_path: Path, pem: Path
):
    """By the headers that the program copies, and without any by the thread that serves the request."""
    front, back = free_port(), free_port()
    tracing = tls_agent([front, back])
    serve(serving("nginx-1.3", back, public_path, pem), back)
    relay = serving("python-ssl", front, public_path, pem)
    serve(Server(arguments=[*relay.arguments, str(back)], executable="", language="python"), front)
    wait_for_libraries(tracing)
    header = f"traceparent: 00-{7:032x}-00f067aa0ba902b7-01"
    for _ in range(5):
        result = secure_curl("-o", "/dev/null", "-H", header, f"https://localhost:{front}{path}", pem=pem)
        assert result.returncode == 0, result.stderr
    spans = tracing.exact_spans(20)
    by_id = {span.span_id: span for span in spans}
    calls = [span for span in spans if span.kind == "CLIENT" and span.resource["process.executable.name"] != "curl"]
    assert len(calls) == 5, show(spans)
    for call in calls:
        served = by_id[call.parent_span_id]
        assert served.kind == "SERVER"
        assert served.resource["process.pid"] == call.resource["process.pid"]
        assert served.trace_id == f"{7:032x}"
        expected = "forwarded" if "copied" in path else "thread"
        assert call.attributes["spanloom.link.method"] == expected, show(spans)


def test_java_is_reported(tls_agent, serve, start, public_path: Path, pem: Path):
    """Java's own TLS cannot be seen: the process is named in the log, with the reason, and counted."""
    port = free_port()
    tracing = tls_agent([port])
    serve(serving("nginx-1.3", port, public_path, pem), port)
    wait_for_libraries(tracing)
    source = public_path / "Ask.java"
    source.write_text(
        """
import java.net.*;
import javax.net.ssl.*;
import java.security.cert.X509Certificate;
class Ask {
  public static void main(String[] arguments) throws Exception {
    TrustManager[] all = { new X509TrustManager() {
      public void checkClientTrusted(X509Certificate[] chain, String type) {}
      public void checkServerTrusted(X509Certificate[] chain, String type) {}
      public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
    } };
    SSLContext context = SSLContext.getInstance("TLS");
    context.init(null, all, null);
    HttpsURLConnection.setDefaultSSLSocketFactory(context.getSocketFactory());
    URL url = new URL("https://localhost:" + arguments[0] + "/status/200");
    System.out.println(((HttpsURLConnection) url.openConnection()).getResponseCode());
    Thread.sleep(60000);
  }
}
"""
    )
    java = start(["java", "-XX:TieredStopAtLevel=1", "-Xshare:auto", source, str(port)])
    wait_until(lambda: "200" in java.output(), java.output, 60)
    named = f'"executable":"java","pid":{java.pid}'
    wait_until(lambda: named in tracing.stderr(), lambda: f"java is named{tracing.state()}")
    line = one(line for line in tracing.stderr().splitlines() if named in line)
    assert '"event":"tls_not_seen"' in line
    assert '"reason":"java"' in line
    assert tracing.metrics()["spanloom_tls_unseen_processes_total{reason=java}"] >= 1
    served = one(tracing.exact_spans(1, port=port))
    assert served.kind == "SERVER", "the other end is seen"


def own_library(directory: Path, library: str = "libssl.so.3") -> dict[str, str]:
    """An environment in which programs use a copy of OpenSSL that nobody else has: another file, of this name."""
    directory.mkdir()
    for name, copy in (("libssl.so.3", library), ("libcrypto.so.3", "libcrypto.so.3")):
        source = next(Path("/usr/lib").glob(f"*-linux-gnu/{name}"))
        shutil.copy(source, directory / copy)
        if copy != name:
            (directory / name).symlink_to(copy)
    return clean_environment(LD_LIBRARY_PATH=str(directory))


def open_files(tracing: AgentProcess) -> Counter[str]:
    """The agent's probes and files by what they are; what gRPC opens for its connections is not among them."""
    found: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{tracing.pid}/fd"):
        with contextlib.suppress(OSError):
            found[os.readlink(entry.path)] += 1
    ours = ("anon_inode:[perf_event]", "anon_inode:bpf", "/")
    return Counter({name: count for name, count in found.items() if name.startswith(ours)})


def test_tls_is_switched_off_and_on_while_the_agent_runs(
    tls_agent, serve, public_path: Path, pem: Path, tmp_path: Path
):
    """``capture.tls`` false takes all probes off the libraries; true puts them back, also for open connections."""
    port, plain = free_port(), free_port()
    config = tmp_path / "spanloom.yaml"
    config.write_text("capture:\n  tls: true\n")
    tracing = tls_agent([port, plain], config=config)
    serve(serving("nginx-1.3", port, public_path, pem), port)
    wait_for_libraries(tracing)

    def switch(wanted: str, files: int) -> None:
        config.write_text(f"capture:\n  tls: {wanted}\n")
        wait_until(
            lambda: bool(tracing.metrics()["spanloom_tls_files"]) == bool(files),
            lambda: f"tls is {wanted}{tracing.state()}",
        )

    assert secure_curl(f"https://localhost:{port}/status/200?id=1", pem=pem).returncode == 0
    tracing.exact_spans(2, port=port)
    switch("false", 0)
    assert secure_curl(f"https://localhost:{port}/status/200?id=2", pem=pem).returncode == 0
    tracing.exact_spans(2, port=port)
    switch("true", 1)
    assert secure_curl(f"https://localhost:{port}/status/200?id=3", pem=pem).returncode == 0
    assert_pairs(tracing.exact_spans(4, port=port), 2)


def test_a_traced_program_under_a_debugger_goes_on(tls_agent, serve, public_path: Path, pem: Path):
    """A program that strace follows call by call works as ever, and is seen."""
    port = free_port()
    tracing = tls_agent([port])
    serve(serving("nginx-1.3", port, public_path, pem), port)
    wait_for_libraries(tracing)
    command = ["strace", "-f", "-o", str(public_path / "strace"), SYSTEM_PYTHON, str(APPS / "tls_client.py")]
    done = subprocess.run(
        [*command, str(port), str(pem), "5"], env=clean_environment(), capture_output=True, timeout=60, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["200"] * 5), done.stderr
    assert_pairs(tracing.exact_spans(10, port=port), 5)


def test_a_program_under_a_seccomp_filter_goes_on(tls_agent, serve, public_path: Path, pem: Path):
    """Filters that allow no system call that they do not know: the return probes' own must not crash the program."""
    port = free_port()
    tracing = tls_agent([port])
    serve(serving("nginx-1.3", port, public_path, pem), port)
    wait_for_libraries(tracing)
    program = public_path / "filtered.py"
    # Numbers 330 to 420 are refused; that of the probes is 335 or 336.
    program.write_text(
        """
import ctypes, runpy, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
code = struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 0x35, 0, 2, 330)
code += struct.pack("<HBBI", 0x35, 1, 0, 420) + struct.pack("<HBBI", 6, 0, 0, 0x80000000)
code += struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
filtered = Program(5, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(filtered)) == 0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    )
    command = [SYSTEM_PYTHON, program, APPS / "tls_client.py", port, pem, "5"]
    done = subprocess.run([*map(str, command)], env=clean_environment(), capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["200"] * 5), done.stderr
    assert_pairs(tracing.exact_spans(10, port=port), 5)


def test_a_program_that_switches_stacks_goes_on(tls_agent, serve, public_path: Path, pem: Path):
    """Probes on returns crash a program that leaves a call half-way for another stack. What such a program runs is not
    watched any more as soon as it calls the library on a stack that is not its thread's own.
    """
    port = free_port()
    tracing = tls_agent([port])
    serve(serving("nginx-1.3", port, public_path, pem), port)
    wait_for_libraries(tracing)
    environment = own_library(public_path / "library")
    program = public_path / "tls_stacks"
    libraries = [public_path / "library" / name for name in ("libssl.so.3", "libcrypto.so.3")]
    subprocess.run(["cc", "-O1", "-o", program, APPS / "tls_stacks.c", *libraries], check=True, timeout=60)
    for pause_seconds in (4, 0):
        done = subprocess.run(
            [program, str(port), str(pause_seconds), "20"], env=environment, capture_output=True, timeout=60, text=True
        )
        assert (done.returncode, done.stdout) == (0, "40 answered\n"), f"{done}{tracing.state()}"
        assert tracing.metrics()["spanloom_tls_refused_total{reason=stacks}"] == 1, tracing.state()
    named = [line for line in tracing.stderr().splitlines() if '"executable":"tls_stacks"' in line]
    assert named, tracing.stderr()
    assert '"reason":"stacks"' in named[0]


@pytest.mark.parametrize("admin", [("SYS_ADMIN",), ("BPF", "PERFMON")])
def test_the_capabilities_that_tls_needs(admin, collector, serve, public_path: Path, pem: Path, tmp_path: Path):
    """CAP_SYS_ADMIN and two more, or where probes are links, what the agent needs anyway. If that is not enough it says
    so, and traces what is in the clear.
    """
    port, plain = free_port(), free_port()
    serve(serving("nginx-1.3", port, public_path, pem), port)
    serve(servers.python_threads(plain, public_path), plain)
    within = dropping_all_but([*admin, "SYS_PTRACE", "DAC_READ_SEARCH"])
    is_seen = "SYS_ADMIN" in admin or uprobes.has_links()
    with AgentProcess(tmp_path, collector, [port, plain], within=within) as tracing:
        if is_seen:
            wait_for_libraries(tracing)
        else:
            wait_until(lambda: '"event":"tls_off"' in tracing.stderr(), tracing.state)
            said = one(line for line in tracing.stderr().splitlines() if '"event":"tls_off"' in line)
            assert "CAP_SYS_ADMIN" in said
            assert tracing.metrics()["spanloom_tls_refused_total{reason=privilege}"] == 1
        assert secure_curl(f"https://localhost:{port}/status/200?id=1", pem=pem).returncode == 0
        assert curl(f"http://127.0.0.1:{plain}/status/200?id=2").returncode == 0
        assert_pairs(tracing.exact_spans(4 if is_seen else 2), 2 if is_seen else 1)


@pytest.mark.skipif(not uprobes.has_links(), reason="HTTPS needs CAP_SYS_ADMIN here, which is tested above")
@pytest.mark.parametrize(
    ("missing", "seen"),
    [
        ("", {"root's", "another user's", "closed"}),
        ("DAC_READ_SEARCH", {"root's", "another user's"}),
        ("SYS_PTRACE", set()),
    ],
)
def test_the_capabilities_that_open_processes_for_tls(
    missing: str, seen: set[str], collector, serve, public_path: Path, pem: Path, tmp_path: Path
):
    """Without CAP_SYS_PTRACE no memory map can be read, and no HTTPS is seen. Without CAP_DAC_READ_SEARCH all is seen
    but that of a library that only another user may read. What is in the clear is seen all the same.
    """
    ports = {name: free_port() for name in ("root's", "another user's", "closed")}
    plain = free_port()
    processes = {}
    apps = Path(shutil.copytree(APPS, public_path / "apps"))  # another user may not read what lies below /root
    for name, port in ports.items():
        # Each has a copy of the library that nobody else on the host uses.
        library = public_path / f"library-{port}"
        environment = own_library(library)
        if name == "closed":
            shutil.chown(library, NOBODY)
            library.chmod(0o700)
        if name == "root's":
            made = serving("nginx-1.3", port, public_path, pem)
        else:
            made = serving("python-ssl", port, public_path, pem)
            copied = [apps / one.name if one == APPS / "tls_threads.py" else one for one in made.arguments]
            made = dataclasses.replace(made, arguments=["setpriv", "--reuid", str(NOBODY), *copied])
        processes[name] = serve(dataclasses.replace(made, environment=environment), port)
    serve(servers.python_threads(plain, public_path), plain)
    kept = [name for name in ("BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH") if name != missing]
    within = dropping_all_but(kept)
    with AgentProcess(tmp_path, collector, [*ports.values(), plain], within=within) as tracing:
        wait_until(lambda: '"event":"tls_on"' in tracing.stderr(), tracing.state)  # and what runs already is watched
        for port in ports.values():
            assert secure_curl(f"https://localhost:{port}/status/200", pem=pem).returncode == 0
        assert curl(f"http://127.0.0.1:{plain}/status/200").returncode == 0
        tracing.wait_for_spans(1, port=plain, kind="SERVER")
        executable = Path(SYSTEM_PYTHON).resolve().name
        named = f'"event":"tls_not_seen","executable":"{executable}","pid":{processes["closed"].pid},'
        wait_until(
            lambda: tracing.spans(ports["closed"], "SERVER") or named in tracing.stderr(),
            lambda: f"what is closed is seen, or it is said that it is not{tracing.state()}",
        )
        tracing.settle()
        assert {name for name, port in ports.items() if tracing.spans(port, "SERVER")} == seen, tracing.state()
        unseen = {name: count for name, count in tracing.metrics().items() if "tls_unseen" in name and count}
        closed = "spanloom_tls_unseen_processes_total{reason=privilege}"
        assert (closed in unseen) == (missing == "SYS_PTRACE"), unseen


def test_what_is_no_http_over_tls_is_left_alone(tls_agent, start, public_path: Path, pem: Path):
    """Another protocol over TLS makes no span and no drop, on both ends."""
    port = free_port()
    tracing = tls_agent([port])
    server = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(pem), "-quiet", "-rev"]
    start(server, port=port)
    wait_for_libraries(tracing)
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-quiet", "-no_ign_eof", "-CAfile", str(pem)],
        input=b"hello there\nQ\n",
        env=clean_environment(),
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    books = tracing.settle()
    assert (books.begun, books.dropped) == (0, {})


def test_connections_in_the_clear_behind_such_over_tls(tls_agent, serve, tls_any: Path, public_path: Path, pem: Path):
    """The kernel gives a new connection the memory of one that has just ended: what is sent on it is not TLS."""
    port, plain = free_port(), free_port()
    serve(servers.python_threads(plain, public_path), plain)
    library = next(Path("/usr/lib").glob("*-linux-gnu/libssl.so.3"))
    serve(Server(arguments=[tls_any, library, str(port), pem], executable="tls_any", language=""), port)
    tracing = tls_agent([port, plain])
    wait_for_libraries(tracing)
    context = ssl.create_default_context(cafile=pem)
    for number in range(30):
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 30), server_hostname="localhost") as tls:
            tls.sendall(f"GET /secure?id={number} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
            assert tls.recv(65536).startswith(b"HTTP/1.1 200")
            assert not tls.recv(65536)
            with contextlib.suppress(OSError):
                tls.unwrap()  # the other end has closed, and resets the connection
        with socket.create_connection(("127.0.0.1", plain), 30) as clear:
            clear.sendall(f"GET /status/200?id={number} HTTP/1.1\r\nHost: localhost:{plain}\r\n\r\n".encode())
            assert clear.recv(65536).startswith(b"HTTP/1.1 200")
    assert_pairs(tracing.exact_spans(60, port=plain), 30)
