"""The API client against a real HTTPS server on the loopback."""

import os
import socket
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import __version__
from agent.errors import ConfigError, SpanloomError
from agent.kube import api
from agent.kube.api import ApiClient, ApiError, InClusterConfig, Interrupt, missing_rule, parse_retry_after, split_lines
from tests.apiserver import ApiServer, Failure, make_certificates, make_pod

PODS = "/api/v1/pods"


@pytest.fixture(scope="module")
def shared_server():
    with ApiServer() as server:
        yield server


@pytest.fixture
def server(shared_server: ApiServer):
    """One server for the module, as new for each test: certificates take a while."""
    shared_server.deny = set()
    shared_server.delay = 0.0
    shared_server.watch_second = 1.0
    shared_server._failures.clear()
    shared_server._accounts.clear()
    shared_server._account_token = ""  # each test has a token of its own
    shared_server.requests.clear()
    shared_server.recorded_events.clear()
    return shared_server


@pytest.fixture
def account(server: ApiServer, tmp_path: Path):
    return server.write_service_account(tmp_path / "account")


@pytest.fixture
def client(server: ApiServer, account: Path):
    return ApiClient(InClusterConfig.load(account, server.environ))


def failure_of(call) -> ApiError:
    with pytest.raises(ApiError) as raised:
        call()
    return raised.value


# --------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("host", "expected"), [("10.96.0.1", "10.96.0.1"), ("fd00::1", "fd00::1"), ("[fd00::1]", "fd00::1")]
)
def test_load_reads_environment_and_namespace(account, host, expected):
    """Hosts may be names, IPv4 and IPv6 addresses, the latter with or without brackets."""
    config = InClusterConfig.load(account, {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "443"})
    assert (config.host, config.port, config.namespace) == (expected, 443, "spanloom")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "KUBERNETES_SERVICE_HOST"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "KUBERNETES_SERVICE_PORT"),
        ({"KUBERNETES_SERVICE_HOST": "", "KUBERNETES_SERVICE_PORT": "443"}, "KUBERNETES_SERVICE_HOST"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "tcp://10.0.0.1:443"}, "no port"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "0"}, "no port"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "65536"}, "no port"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "٤٤٣"}, "no port"),
        ({"KUBERNETES_SERVICE_HOST": "a\r\nb", "KUBERNETES_SERVICE_PORT": "443"}, "no host"),
    ],
)
def test_load_says_what_the_environment_lacks(account, environ, said):
    with pytest.raises(ConfigError, match=r"^not in a cluster: ") as raised:
        InClusterConfig.load(account, environ)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["ca.crt", "token", "namespace"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_load_says_which_file_is_missing_or_empty(server, account, name, is_empty):
    path = account / name
    path.unlink()
    if is_empty:
        path.write_text("\n")
    with pytest.raises(ConfigError, match=rf"^not in a cluster: .*{name}"):
        InClusterConfig.load(account, server.environ)


def test_load_outside_of_a_cluster_is_a_config_error(tmp_path):
    """The directory that is not mounted at all."""
    with pytest.raises(ConfigError, match=r"automountServiceAccountToken"):
        InClusterConfig.load(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"})


# --------------------------------------------------------------------------------------------- requests


def test_get_returns_the_decoded_object(server, client):
    server.put(make_pod("got", "shop"))
    answer = client.get("/api/v1/namespaces/shop/pods/got")
    assert (answer["kind"], answer["metadata"]["name"]) == ("Pod", "got")
    assert server.requests[-1].user_agent == f"spanloom/{__version__}"


def test_the_query_is_encoded(server, client):
    server.put(make_pod("here", node="node-é&b"))
    answer = client.get(PODS, {"fieldSelector": "spec.nodeName=node-é&b", "limit": 5})
    assert [item["metadata"]["name"] for item in answer["items"]] == ["here"]
    assert server.requests[-1].query["limit"] == "5"


def test_ipv6(tmp_path):
    with ApiServer("::1") as server:
        client = ApiClient(InClusterConfig.load(server.write_service_account(tmp_path / "a"), server.environ))
        assert client.get(PODS)["kind"] == "PodList"


def test_no_descriptor_is_left_open(server, client):
    """After answers, refusals, broken ones, and watches that were closed before their end.

    Stands before the tests that leave connections behind which the server still delays: here it waits for all to go.
    """

    def sockets() -> int:
        assert server.wait_for(lambda server: not server._connections, 5.0)
        return len([name for name in os.listdir("/proc/self/fd") if is_socket(name)])

    def is_socket(name: str) -> bool:
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        return False

    before = sockets()
    for _ in range(5):
        client.get(PODS)
        client.stream(PODS, {"watch": "true", "resourceVersion": str(server.version)}, 10.0).close()
        server.fail_next(Failure(status=500), Failure(raw=b"garbage\r\n\r\n"), Failure(raw=b""))
        for _ in range(3):
            failure_of(lambda: client.get(PODS))
    assert sockets() == before


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "http_error"),
        (401, "unauthorized"),
        (403, "forbidden"),
        (404, "not_found"),
        (409, "conflict"),
        (410, "gone"),
        (418, "http_error"),
        (429, "too_many_requests"),
        (500, "server_error"),
        (503, "server_error"),
        (302, "http_error"),
    ],
)
def test_a_status_becomes_an_error_with_reason_and_retry_after(server, client, status, reason):
    """Redirects are not followed: the token must not travel."""
    server.fail_next(Failure(status=status, message="said\nso", retry_after="7"))
    error = failure_of(lambda: client.get(PODS))
    assert (error.status, error.reason, error.retry_after_seconds) == (status, reason, 7.0)
    assert "\n" not in str(error)
    assert isinstance(error, SpanloomError)
    assert len(server.requests) == 1
    if status not in (401, 403):
        assert "said so" in error.message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("1", 1.0), (" 30 ", 30.0), ("0", 0.0)]
    + [(value, None) for value in ("", "-1", "1.5", "inf", "٣", "9" * 30, "Wed, 21 Oct 2026 07:28:00 GMT")],
)
def test_retry_after(value, seconds):
    assert parse_retry_after(value) == seconds


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed"),
        (b"\x00" * 70_000, "malformed"),
        (OK + b"A: b\r\n" * 200 + b"\r\n", "malformed"),
        (OK + b"Content-Length: 2\r\n\r\n{]", "malformed"),
        (OK + b"Content-Length: 0\r\n\r\n", "malformed"),
        (OK + b"Content-Length: 2\r\n\r\n[]", "malformed"),
        (OK + b'Content-Length: 9\r\n\r\n{"a":"\xff"}', "malformed"),
        (OK + b'\r\n{"a":' + b"[" * 200_000, "malformed"),
        (OK + b"Content-Length: 100\r\n\r\n{}", "disconnected"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", "disconnected"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{}", "disconnected"),
        (b"", "disconnected"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\n{]}", "server_error"),
        (b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 200_000, "server_error"),
        (b'HTTP/1.1 500 No\r\n\r\n{"message": 3}', "server_error"),
    ],
)
def test_hostile_answers_are_errors(server, client, raw, reason):
    server.fail_next(Failure(raw=raw))
    assert failure_of(lambda: client.get(PODS)).reason == reason


def test_an_answer_over_the_bound_is_refused(server, client, monkeypatch):
    monkeypatch.setattr(api, "MAX_RESPONSE_BYTES", 100_000)
    server.fail_next(Failure(raw=OK + b"\r\n" + b" " * 200_000))
    assert failure_of(lambda: client.get(PODS)).reason == "too_large"


def test_a_slow_server_is_a_timeout(server, client, monkeypatch):
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.1)
    server.fail_next(Failure(delay_seconds=3.0))
    started = time.monotonic()
    assert failure_of(lambda: client.get(PODS)).reason == "timeout"
    assert time.monotonic() - started < 2.0


def test_a_server_that_drips_is_a_timeout(account, server, monkeypatch):
    """Each byte in time, the whole never: the deadline is of the request, not of a read."""
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.3)
    stopped = threading.Event()

    def drip(connection):
        connection.sendall(OK + b"\r\n")
        while not stopped.wait(0.02):
            connection.sendall(b" ")

    with tls_listener(server, drip) as environ:
        client = ApiClient(InClusterConfig.load(account, environ))
        started = time.monotonic()
        assert failure_of(lambda: client.get(PODS)).reason == "timeout"
        assert time.monotonic() - started < 3.0
        stopped.set()


class tls_listener:
    """One connection with the server's certificate, for what no HTTP server would do."""

    def __init__(self, server, serve) -> None:
        self._server, self._serve = server, serve

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._run, daemon=True).start()
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._listener.getsockname()[1])}

    def _run(self):
        with suppress(OSError):
            plain, _ = self._listener.accept()
            with self._server._tls.wrap_socket(plain, server_side=True) as connection:
                connection.recv(65536)
                self._serve(connection)

    def __exit__(self, *_):
        self._listener.close()


def test_a_server_that_is_not_there(account, server):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(reserved.getsockname()[1])}
        error = failure_of(lambda: ApiClient(InClusterConfig.load(account, environ)).get(PODS))
    assert (error.status, error.reason) == (0, "connect")
    assert "Connection refused" in error.message


def test_a_peer_that_accepts_and_says_nothing(account, monkeypatch):
    monkeypatch.setattr(api, "CONNECT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(silent.getsockname()[1])}
        error = failure_of(lambda: ApiClient(InClusterConfig.load(account, environ)).get(PODS))
    assert error.reason == "timeout"


def test_a_name_that_does_not_resolve(account):
    environ = {"KUBERNETES_SERVICE_HOST": "a" * 64 + ".invalid", "KUBERNETES_SERVICE_PORT": "443"}
    error = failure_of(lambda: ApiClient(InClusterConfig.load(account, environ)).get(PODS))
    assert error.reason == "name_resolution"


# --------------------------------------------------------------------------------------------- credentials


def test_a_rotated_token_is_used_from_the_next_request_on(server, client):
    """The kubelet swaps a link: neither the name nor the open file changes."""
    client.get(PODS)
    new = server.rotate_token()
    client.get(PODS)
    assert server.requests[-1].token == new
    assert server.requests[-2].token != new


def test_after_401_the_token_is_read_whatever_the_file_times_say(server, client, account):
    """A token of the same size written in place with its old times is not seen, until the server refuses."""
    client.get(PODS)
    path = (account / "token").resolve()
    status = path.stat()
    good = path.read_text()
    bad = "x" * len(good)
    path.write_text(bad)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert client.get(PODS)["kind"] == "PodList"
    server.tokens.discard(good)
    assert failure_of(lambda: client.get(PODS)).status == 401
    server.tokens.add(bad)
    assert client.get(PODS)["kind"] == "PodList"


def test_401_is_said_in_a_way_to_act_on(server, client):
    server.tokens.clear()
    error = failure_of(lambda: client.get(PODS))
    assert (error.status, error.reason) == (401, "unauthorized")
    assert "token" in error.message


@pytest.mark.parametrize("content", [b"", b"a b", b"line\nbreak", b"\xff\xfe", "ä".encode()])
def test_a_token_file_that_holds_none(account, client, content):
    (account / "token").resolve().write_bytes(content)
    assert failure_of(lambda: client.get(PODS)).reason == "token"


def test_a_token_file_that_vanished_and_came_back(account, client, server):
    (account / "token").unlink()
    assert failure_of(lambda: client.get(PODS)).reason == "token"
    server.write_service_account(account)
    assert client.get(PODS)["kind"] == "PodList"


def test_another_authority_is_refused_until_it_is_mounted(server, account, tmp_path):
    (tmp_path / "other").mkdir()
    other_ca, _, _ = make_certificates(tmp_path / "other")
    (account / "ca.crt").resolve().write_text(other_ca)
    client = ApiClient(InClusterConfig.load(account, server.environ))
    error = failure_of(lambda: client.get(PODS))
    assert error.reason == "tls"
    assert "ca.crt" in error.message
    assert not server.requests, "the token must not be sent"
    server.rotate_token()  # writes the volume anew, with the right authority
    assert client.get(PODS)["kind"] == "PodList"


def test_a_certificate_for_another_host_is_refused(tmp_path):
    with ApiServer("127.0.0.2") as server:
        account = server.write_service_account(tmp_path / "account")
        client = ApiClient(InClusterConfig.load(account, server.environ))
        assert failure_of(lambda: client.get(PODS)).reason == "tls"


@pytest.mark.parametrize("content", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ä"])
def test_an_authority_file_that_holds_none(account, client, content):
    (account / "ca.crt").resolve().write_text(content)
    assert failure_of(lambda: client.get(PODS)).reason == "ca"


# --------------------------------------------------------------------------------------------- RBAC


@pytest.mark.parametrize(
    ("method", "path", "query", "expected"),
    [
        (
            "GET",
            PODS,
            {"limit": 500},
            "forbidden: the service account may not list pods at cluster scope: it needs list, watch on pods "
            "(ClusterRole)",
        ),
        (
            "GET",
            PODS,
            {"watch": "true"},
            "forbidden: the service account may not watch pods at cluster scope: it needs list, watch on pods "
            "(ClusterRole)",
        ),
        (
            "GET",
            "/api/v1/namespaces/shop/pods/cart",
            None,
            "forbidden: the service account may not get pods in namespace shop: it needs get on pods (Role)",
        ),
        (
            "POST",
            "/api/v1/namespaces/shop/events",
            None,
            "forbidden: the service account may not create events in namespace shop: it needs create on events (Role)",
        ),
        (
            "GET",
            "/apis/apps/v1/replicasets",
            None,
            "forbidden: the service account may not list replicasets.apps at cluster scope: it needs list, watch "
            "on replicasets.apps (ClusterRole)",
        ),
        (
            "GET",
            "/api/v1/nodes/node-a/metrics",
            None,
            "forbidden: the service account may not get nodes/metrics at cluster scope: it needs get on "
            "nodes/metrics (ClusterRole)",
        ),
        (
            "GET",
            "/api/v1/namespaces/shop",
            None,
            "forbidden: the service account may not get namespaces at cluster scope: it needs get on "
            "namespaces (ClusterRole)",
        ),
    ],
)
def test_a_missing_rule_is_named(method, path, query, expected):
    assert missing_rule(method, path, query) == expected


@given(st.text(max_size=40), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_naming_a_rule_never_fails(path, query):
    assert missing_rule("GET", path, query).isprintable()


def test_403_names_the_rule(server, client):
    server.deny = {("list", "pods")}
    error = failure_of(lambda: client.get(PODS))
    assert (error.status, error.message) == (403, missing_rule("GET", PODS, None))
    assert client.get("/api/v1/services")["kind"] == "ServiceList"


# --------------------------------------------------------------------------------------------- events


def test_an_event_is_written(server, client):
    assert client.post_event("spanloom", "spanloom-x7k2p", "uid-1", "ConfigRejected", "sampling.ratio: 2") is None
    (written,) = server.recorded_events
    assert written["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "spanloom",
        "name": "spanloom-x7k2p",
        "uid": "uid-1",
    }
    assert (written["type"], written["reason"]) == ("Warning", "ConfigRejected")
    assert written["message"] == "sampling.ratio: 2"
    assert written["firstTimestamp"] == written["lastTimestamp"]


def test_two_events_have_two_names_and_long_ones_fit(server, client):
    for _ in range(2):
        assert client.post_event("spanloom", "p" * 253, "uid", "ConfigRejected", "ä" * 5000, "Normal") is None
    first, second = server.recorded_events
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert len(first["message"]) == 1024


def test_the_failure_of_an_event_is_returned(server, client):
    server.deny = {("create", "events")}
    error = client.post_event("spanloom", "pod", "uid", "Reason", "text")
    assert error is not None
    assert (error.status, "needs create on events (Role)" in error.message) == (403, True)


def test_an_event_without_a_server_is_returned_too(account):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(reserved.getsockname()[1])}
        error = ApiClient(InClusterConfig.load(account, environ)).post_event("a", "b", "c", "D", "e")
    assert error is not None
    assert error.reason == "connect"


# --------------------------------------------------------------------------------------------- streams


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.lists(st.integers(0, 300)))
def test_lines_do_not_depend_on_how_they_are_cut(lines, cuts):
    data = b"".join(line + b"\n" for line in lines)
    bounds = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    chunks = [data[start:end] for start, end in pairwise(bounds)]
    expected = [line for line in lines if line.strip()]
    assert list(split_lines(chunks)) == expected
    assert list(split_lines(data[i : i + 1] for i in range(len(data)))) == expected


@pytest.mark.parametrize("piece_bytes", [1 << 16, 9 << 20])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_over_the_bound_is_refused_and_those_before_it_are_not_lost(piece_bytes, end):
    data = b"first\n" + b"x" * (api.MAX_LINE_BYTES + 1) + end
    lines = split_lines(data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes))
    assert next(lines) == b"first"
    assert failure_of(lambda: next(lines)).reason == "too_large"


def test_a_line_of_just_the_bound_is_taken():
    assert len(next(split_lines([b"x" * api.MAX_LINE_BYTES, b"\n"]))) == api.MAX_LINE_BYTES


def test_a_last_line_without_end_is_a_disconnect():
    lines = split_lines([b"first\nsec", b"ond"])
    assert next(lines) == b"first"
    assert failure_of(lambda: next(lines)).reason == "disconnected"


def test_a_watch_ends_when_the_server_ends_it(server, client):
    server.watch_second = 0.1
    query = {"watch": "true", "resourceVersion": str(server.version), "timeoutSeconds": 1}
    with client.stream(PODS, query, 10.0) as stream:
        server.put(make_pod("streamed"))
        assert [message["type"] for message in stream] == ["ADDED"]


def test_a_refused_watch_is_raised_when_it_is_opened(server, client):
    server.deny = {("watch", "pods")}
    assert failure_of(lambda: client.stream(PODS, {"watch": "true"}, 10.0)).status == 403


def test_a_silent_watch_is_a_timeout(server, client):
    query = {"watch": "true", "resourceVersion": str(server.version)}
    with client.stream(PODS, query, 0.2) as stream:
        assert failure_of(lambda: next(stream)).reason == "timeout"


@pytest.mark.parametrize("moment", ["before", "slow answer", "silent watch", "silent handshake"])
def test_an_interrupt_ends_every_wait(server, client, account, moment):
    interrupt = Interrupt()
    silent = socket.create_server(("127.0.0.1", 0))
    if moment == "before":
        interrupt.set()
    elif moment == "slow answer":
        server.fail_next(Failure(delay_seconds=2.0))
    elif moment == "silent handshake":
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(silent.getsockname()[1])}
        client = ApiClient(InClusterConfig.load(account, environ))
    timer = threading.Timer(0.0 if moment == "before" else 0.1, interrupt.set)
    timer.start()
    started = time.monotonic()
    query = {"watch": "true", "resourceVersion": str(server.version)}
    if moment == "silent watch":
        with client.stream(PODS, query, 30.0, interrupt=interrupt) as stream:
            error = failure_of(lambda: next(stream))
    else:
        error = failure_of(lambda: client.get(PODS, interrupt=interrupt))
    assert error.reason == "interrupted"
    assert time.monotonic() - started < 1.0
    assert interrupt.wait(10.0)
    timer.join()
    silent.close()
