"""The real watcher against the real server, with short back-offs."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.kube import watch as watch_module
from agent.kube.api import MAX_LINE_BYTES, ApiClient, ApiError, InClusterConfig
from agent.kube.watch import PodWatcher, WatchSettings, _Backoff
from tests.apiserver import ApiServer, Failure, make_pod

FAST = {
    "backoff_initial_seconds": 0.01,
    "backoff_max_seconds": 0.05,
    "healthy_seconds": 0.02,
    "relist_calm_seconds": 0.0,
}


class Seen:
    """The consumer: the pods as the callbacks left them, and what was called."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.pods: dict[str, dict] = {}
        self.replaces: list[int] = []
        self.changes: list[tuple[str, str]] = []

    def replace(self, pods: list[dict]) -> None:
        with self._changed:
            self.pods = {pod["metadata"]["name"]: pod for pod in pods}
            self.replaces.append(len(pods))
            self._changed.notify_all()

    def change(self, kind: str, pod: dict) -> None:
        with self._changed:
            name = pod["metadata"]["name"]
            self.changes.append((kind, name))
            if kind == "DELETED":
                self.pods.pop(name, None)
            else:
                self.pods[name] = pod
            self._changed.notify_all()

    def wait_for(self, what, timeout_seconds: float = 10.0) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: what(self), timeout_seconds))

    def has(self, *names: str) -> bool:
        return self.wait_for(lambda seen: set(seen.pods) == set(names))


class Naps:
    """In place of the watcher's sleep: notes how long each was to be, and takes a moment only."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        time.sleep(0.001)


@pytest.fixture
def server():
    with ApiServer() as server:
        yield server


@pytest.fixture
def watching(tmp_path: Path):
    """``watching(server, **settings)`` -> a started watcher and what it saw; stopped, and checked, at the end."""
    watchers = []

    def start(server: ApiServer, on_change=None, sleep=None, **settings) -> tuple[PodWatcher, Seen]:
        account = tmp_path / f"account-{len(watchers)}"
        client = ApiClient(InClusterConfig.load(server.write_service_account(account), server.environ))
        seen = Seen()
        watcher = PodWatcher(
            client, "node-a", seen.replace, on_change or seen.change, WatchSettings(**(FAST | settings)), sleep=sleep
        )
        watchers.append(watcher)
        watcher.start()
        return watcher, seen

    yield start
    for watcher in watchers:
        assert watcher.stop(2.0)
        assert not watcher.failures["internal"], watcher.failures


def eventually(what, timeout_seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def watches(server: ApiServer) -> list:
    return [request for request in server.requests if request.verb == "watch"]


def lists(server: ApiServer) -> list:
    return [request for request in server.requests if request.verb == "list"]


# --------------------------------------------------------------------------------------------- the normal course


def test_lists_then_follows_changes(server, watching):
    """Pods that are there, that come, change and go; those of other nodes are not asked for."""
    server.put(make_pod("first"))
    server.put(make_pod("elsewhere", node="node-b"))
    watcher, seen = watching(server)
    assert seen.has("first")
    assert eventually(lambda: watcher.connected)
    server.put(make_pod("second"))
    server.put(make_pod("third", node="node-b"))
    assert seen.has("first", "second")
    server.put(make_pod("second", labels={"version": "2"}))
    server.delete("default", "first")
    assert seen.has("second")
    assert seen.pods["second"]["metadata"]["labels"]["version"] == "2"
    assert seen.pods["second"]["metadata"]["managedFields"], "the object is handed on whole"
    assert seen.changes == [("ADDED", "second"), ("MODIFIED", "second"), ("DELETED", "first")]
    assert (watcher.lists, watcher.watches, watcher.events, watcher.relists) == (1, 1, 3, 0)
    assert not watcher.failures
    assert watcher.last_success is not None
    assert time.monotonic() - watcher.last_success < 10.0


def test_a_pod_that_is_scheduled_later_is_added(server, watching):
    server.put(make_pod("late", node=""))
    _, seen = watching(server)
    assert seen.wait_for(lambda seen: seen.replaces == [0])
    server.put(make_pod("late"))
    assert seen.has("late")
    assert seen.changes == [("ADDED", "late")]


def test_the_first_list_is_from_the_cache_and_the_watch_says_what_it_takes(server, watching):
    server.put(make_pod("first"))
    listed_version = str(server.version)
    watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    (listed,), (watched,) = lists(server), watches(server)
    assert listed.query == {"fieldSelector": "spec.nodeName=node-a", "limit": "500", "resourceVersion": "0"}
    assert watched.query["resourceVersion"] == listed_version
    assert watched.query["allowWatchBookmarks"] == "true"
    assert watched.query["fieldSelector"] == "spec.nodeName=node-a"
    assert 240 <= int(watched.query["timeoutSeconds"]) <= 480


@pytest.mark.parametrize(("pods", "pages_from_cache", "pages"), [(1001, True, 3), (501, False, 1)])
def test_many_pods_come_in_pages(watching, pods, pages_from_cache, pages):
    """Pages of 500, or one answer where the server ignores the limit; the consumer gets them in one call."""
    with ApiServer(pages_from_cache=pages_from_cache) as server:
        for number in range(pods):
            server.put(make_pod(f"pod-{number:04}"))
        server.put(make_pod("elsewhere", node="node-b"))
        watcher, seen = watching(server)
        assert seen.wait_for(lambda seen: seen.replaces == [pods])
        assert len(seen.pods) == pods
        assert server.wait_for(lambda server: server.open_watches == 1)
        assert len(lists(server)) == pages
        assert watcher.lists == 1


def test_a_continue_token_that_expires_between_pages(server, watching, monkeypatch):
    """Takes everything in one answer then, rather than pages that would expire again."""
    for number in range(30):
        server.put(make_pod(f"pod-{number:02}"))
    get = ApiClient.get

    def compacting(self, path, query=None, **options):
        if query and "continue" in query:
            server.compact()
        return get(self, path, query, **options)

    monkeypatch.setattr(ApiClient, "get", compacting)
    watcher, seen = watching(server, page_objects=10)
    assert seen.wait_for(lambda seen: seen.replaces == [30])
    assert [request.query.get("limit") for request in lists(server)] == ["10", "10", None]
    assert not watcher.failures


def test_bookmarks_move_the_version_on(server, watching):
    """After other nodes' changes and a compaction the watch goes on without a list, thanks to a bookmark."""
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    for number in range(5):
        server.put(make_pod(f"elsewhere-{number}", node="node-b"))
    server.compact()
    server.bookmark()
    assert eventually(lambda: watcher.events == 1)
    assert seen.changes == []
    server.drop_connections()
    assert eventually(lambda: watcher.watches == 2)
    assert watches(server)[-1].query["resourceVersion"] == str(server.version)
    server.put(make_pod("new"))
    assert seen.has("new")
    assert (watcher.lists, watcher.relists) == (1, 0)


def test_a_watch_that_ends_as_agreed_is_followed_by_the_next(server, watching):
    server.watch_second = 0.1
    watcher, seen = watching(server, watch_min_seconds=0.6, watch_max_seconds=0.6)
    assert eventually(lambda: watcher.watches >= 2)
    server.put(make_pod("new"))
    assert seen.has("new")
    assert (watcher.lists, watcher.relists, +watcher.failures) == (1, 0, {})
    assert watcher.connected


# --------------------------------------------------------------------------------------------- 410


@pytest.mark.parametrize("gone_as_event", [True, False])
def test_gone_leads_to_a_list(watching, gone_as_event):
    """As an ERROR event and as an HTTP status; what was missed meanwhile is in the list."""
    with ApiServer(gone_as_event=gone_as_event) as server:
        server.put(make_pod("first"))
        server.put(make_pod("second"))
        watcher, seen = watching(server)
        assert server.wait_for(lambda server: server.open_watches == 1)
        old_version = watches(server)[0].query["resourceVersion"]
        server.refuse_connections()
        server.delete("default", "first")
        server.put(make_pod("third"))
        server.compact()
        server.accept_connections()
        assert seen.has("second", "third")
        assert seen.replaces == [2, 2]
        assert (watcher.lists, watcher.relists) == (2, 1)
        listed = lists(server)[-1].query
        assert (listed["resourceVersion"], listed["resourceVersionMatch"]) == (old_version, "NotOlderThan")
        assert eventually(lambda: watcher.connected)
        assert not watcher.failures["gone"]
        server.put(make_pod("fourth"))
        assert seen.has("second", "third", "fourth")


@pytest.mark.parametrize("code", [500, "500", None])
def test_another_error_event_leads_to_a_list_too(server, watching, code):
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    status = {"kind": "Status", "code": code, "message": "etcd event received with PrevKv=nil"}
    server.inject(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
    assert seen.wait_for(lambda seen: len(seen.replaces) == 2)
    assert watcher.failures == {"watch_error": 1}


def test_a_server_that_was_restored_from_a_backup(server, watching, tmp_path):
    """It does not know our version yet: it is asked for what it has, whatever its version."""
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.refuse_connections()
    with server._changed:
        server._version -= 500
        server._objects["pods"].clear()
        server.put(make_pod("restored"))
    server.fail_next(Failure(status=410))  # of the watch
    server.accept_connections()
    assert seen.has("restored")
    assert "resourceVersion" not in lists(server)[-1].query
    assert watcher.failures["server_error"] == 1


def test_lists_are_spaced_when_the_server_asks_for_them_all_the_time(server, watching):
    """A watch that is Gone each time must not become a loop of lists: before each there is a wait, and they grow."""
    naps = Naps()
    watcher, _ = watching(
        server,
        sleep=naps,
        relist_calm_seconds=60.0,
        backoff_initial_seconds=0.1,
        backoff_max_seconds=60.0,
        healthy_seconds=0.0,
    )
    for number in range(1, 13):
        assert eventually(lambda number=number: watcher.watches == number)
        assert eventually(lambda: server.inject(b'{"type":"ERROR","object":{"code":410,"message":"too old"}}\n') == 1)
        assert eventually(lambda number=number: watcher.relists == number)
    assert eventually(lambda: watcher.lists == 13)
    assert len(naps.seconds) == 12
    assert all(seconds <= min(0.1 * 2**number, 60.0) for number, seconds in enumerate(naps.seconds))
    assert sum(naps.seconds) > 5.0


# --------------------------------------------------------------------------------------------- broken connections


@pytest.mark.parametrize("reset", [False, True])
def test_a_disconnect_goes_on_from_the_last_version(server, watching, reset):
    """Changes made while disconnected arrive once, in order, without a list."""
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.put(make_pod("second"))
    assert seen.has("first", "second")
    server.refuse_connections() if not reset else server.drop_connections(reset=True)
    server.put(make_pod("third"))
    server.delete("default", "first")
    if not reset:
        server.accept_connections()
    assert seen.has("second", "third")
    assert seen.changes == [("ADDED", "second"), ("ADDED", "third"), ("DELETED", "first")]
    assert watcher.lists == 1
    assert watcher.failures["disconnected"] == 1


def test_a_disconnect_within_an_event(server, watching):
    """The half of an event is nothing; the event comes whole with the next watch."""
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    head_bytes = watches(server)[0].bytes_out
    server.inject(b'{"type":"ADDED","object":{"metadata":{"na')
    assert eventually(lambda: watches(server)[0].bytes_out > head_bytes)
    server.drop_connections()
    server.put(make_pod("whole"))
    assert seen.has("whole")
    assert (watcher.lists, seen.changes) == (1, [("ADDED", "whole")])


def test_silence_is_noticed(server, watching):
    """A server that neither sends nor ends the watch: it is given up after its time and the grace."""
    watcher, seen = watching(server, watch_min_seconds=0.05, watch_max_seconds=0.05, grace_seconds=0.1)
    assert eventually(lambda: watcher.failures["timeout"] >= 2)  # the server was asked for a whole second
    server.put(make_pod("new"))
    assert seen.has("new")
    assert watcher.lists == 1


def test_a_watch_that_never_ends_is_ended(server, watching):
    """Events go on beyond the time that was asked for; a fresh watch goes on from the last."""
    server.watch_second = 3600.0
    watcher, seen = watching(server, watch_min_seconds=0.05, watch_max_seconds=0.05, grace_seconds=0.05)
    assert server.wait_for(lambda server: server.open_watches == 1)
    number = 0
    while number < 10 or (watcher.watches < 3 and number < 500):
        server.put(make_pod(f"pod-{number}"))
        number += 1
        time.sleep(0.01)
    assert watcher.watches >= 3
    assert seen.wait_for(lambda seen: len(seen.pods) == number)
    assert (watcher.lists, len(seen.changes)) == (1, number)


def test_a_server_that_ends_each_watch_at_once_is_not_asked_in_a_loop(server, watching):
    ended = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    naps = Naps()
    watcher, seen = watching(
        server, sleep=naps, healthy_seconds=60.0, backoff_initial_seconds=0.1, backoff_max_seconds=0.4
    )
    assert seen.wait_for(lambda seen: seen.replaces)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.fail_next(*[Failure(raw=ended)] * 20)
    server.drop_connections()
    assert eventually(lambda: watcher.failures["short_watch"] == 20)
    assert server.wait_for(lambda server: server.open_watches == 1)
    assert len(naps.seconds) == 21, "one after the disconnect, and one after each short watch"
    assert all(seconds <= bound for seconds, bound in zip(naps.seconds, [0.1, 0.2, *[0.4] * 19], strict=True))
    assert sum(naps.seconds) > 1.0


# --------------------------------------------------------------------------------------------- hostile streams


GOOD = {"type": "ADDED", "object": {"metadata": {"name": "x", "resourceVersion": "7"}}}


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"type":"ADDED"}',
        b'{"type":"ADDED","object":[]}',
        b'{"type":"ADDED","object":{}}',
        b'{"type":"ADDED","object":{"metadata":"x"}}',
        b'{"type":"ADDED","object":{"metadata":{"name":"x"}}}',
        b'{"type":"ADDED","object":{"metadata":{"name":"x","resourceVersion":7}}}',
        b'{"type":"ADDED","object":{"metadata":{"name":"x","resourceVersion":""}}}',
        b'{"type":["ADDED"],"object":{"metadata":{"name":"x","resourceVersion":"7"}}}',
        b'{"type":"EXPLODED","object":{"metadata":{"name":"x","resourceVersion":"7"}}}',
        b'{"a":' * 100_000,
    ],
)
def test_garbage_is_counted_and_the_state_read_anew(server, watching, line):
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.inject(line + b"\n")
    assert seen.wait_for(lambda seen: len(seen.replaces) == 2)
    assert watcher.failures == {"malformed": 1}
    server.put(make_pod("second"))
    assert seen.has("first", "second")
    assert ("ADDED", "x") not in seen.changes


def test_an_oversized_event_is_refused_without_being_held(server, watching):
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    for _ in range(MAX_LINE_BYTES // (1 << 20) + 1):
        server.inject(b"x" * (1 << 20))
    assert seen.wait_for(lambda seen: len(seen.replaces) == 2)
    assert watcher.failures["too_large"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"metadata": {}, "items": []},
        {"metadata": [], "items": []},
        {"metadata": {"resourceVersion": 7}, "items": []},
        {"metadata": {"resourceVersion": "7"}, "items": {"a": 1}},
        {"metadata": {"resourceVersion": "7"}, "items": [1]},
        {"metadata": {"resourceVersion": "7", "continue": 3}, "items": []},
        {"metadata": {"resourceVersion": "7", "continue": "more"}, "items": []},
    ],
)
def test_a_malformed_list_is_tried_again(server, watching, body):
    data = json.dumps(body).encode()
    server.fail_next(Failure(raw=b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)))
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert seen.has("first")
    assert watcher.failures == {"malformed": 1}


def test_a_list_without_end_is_given_up(server, watching, monkeypatch):
    """Tokens that repeat, and pods without number."""
    page = {"metadata": {"resourceVersion": "7", "continue": "again"}, "items": [{"metadata": {"name": "x"}}]}
    data = json.dumps(page).encode()
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    server.fail_next(Failure(raw=raw), Failure(raw=raw))
    monkeypatch.setattr(watch_module, "MAX_PODS", 3)
    watcher, seen = watching(server)
    assert seen.wait_for(lambda seen: seen.replaces == [0])
    assert watcher.failures == {"malformed": 1}
    for number in range(4):
        server.put(make_pod(f"pod-{number}"))
    assert eventually(lambda: len(seen.pods) == 4)
    assert server.inject(b"garbage\n") == 1
    assert eventually(lambda: watcher.failures["too_large"] >= 2)


def test_a_list_may_have_null_for_no_items(server, watching):
    data = b'{"metadata":{"resourceVersion":"%d"},"items":null}' % server.version
    server.fail_next(Failure(raw=b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)))
    watcher, seen = watching(server)
    assert seen.wait_for(lambda seen: seen.replaces == [0])
    assert not watcher.failures


def test_a_consumer_that_raises_does_not_end_the_watch(server, watching):
    def failing(kind: str, pod: dict) -> None:
        raise KeyError(kind)

    watcher, _ = watching(server, on_change=failing)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.put(make_pod("first"))
    server.put(make_pod("second"))
    assert eventually(lambda: watcher.failures["callback"] == 2)
    assert (watcher.events, watcher.watches, watcher.connected) == (2, 1, True)


# --------------------------------------------------------------------------------------------- refusals


def test_a_token_rotated_while_running(server, watching):
    """The open watch goes on; the next request has the new token, and nothing fails."""
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    new = server.rotate_token()
    server.put(make_pod("first"))
    assert seen.has("first")
    server.drop_connections()
    assert eventually(lambda: watcher.watches == 2)
    assert watches(server)[-1].token == new
    assert not watcher.failures["unauthorized"]


def test_401_is_tried_again_with_the_token_of_then(server, watching, caplog):
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.tokens.clear()
    with caplog.at_level(logging.INFO, "spanloom.kube"):
        server.drop_connections()
        assert eventually(lambda: watcher.failures["unauthorized"] >= 3)
        assert not watcher.connected
        server.rotate_token()
        server.put(make_pod("after"))
        assert seen.has("after")
    assert eventually(lambda: watcher.connected)
    assert watcher.lists == 1


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_403_says_what_is_missing_once(server, watching, caplog, verb):
    """Once per change of state, not per try; the recovery is told too."""
    server.deny = {(verb, "pods")}
    with caplog.at_level(logging.INFO, "spanloom.kube"):
        watcher, seen = watching(server)
        assert eventually(lambda: watcher.failures["forbidden"] >= 5)
        assert not watcher.connected
        server.deny = set()
        server.put(make_pod("after"))
        assert seen.has("after")
        assert eventually(lambda: watcher.connected)
    said = [(record.getMessage(), record.fields) for record in caplog.records]
    assert [name for name, _ in said] == ["kube_unavailable", "kube_connected"]
    assert said[0][1]["reason"] == "forbidden"
    assert said[0][1]["error"] == (
        f"forbidden: the service account may not {verb} pods at cluster scope: it needs list, watch on pods "
        "(ClusterRole)"
    )


def test_403_of_a_server_that_has_just_started(server, watching, caplog):
    """It has not read the roles yet: counted, and no warning of a rule that is there. Later ones are told again."""
    with caplog.at_level(logging.INFO, "spanloom.kube"):
        watcher, seen = watching(server)
        assert eventually(lambda: watcher.connected)
        for number in (1, 2):
            server.fail_next(Failure(status=403))
            server.drop_connections()
            assert eventually(lambda number=number: watcher.failures["forbidden"] == number)
            server.put(make_pod(f"after-{number}"))
            assert seen.wait_for(lambda seen, number=number: f"after-{number}" in seen.pods)
        assert [record.getMessage() for record in caplog.records] == ["kube_connected"]
        server.fail_next(Failure(status=403), Failure(status=403))
        server.drop_connections()
        assert eventually(lambda: len(caplog.records) == 3)
    assert [record.getMessage() for record in caplog.records[1:]] == ["kube_unavailable", "kube_connected"]
    assert caplog.records[1].fields["reason"] == "forbidden"
    assert watcher.failures["forbidden"] == 4


def test_retry_after_is_honoured(server, watching):
    server.fail_next(Failure(status=429, retry_after="7"))
    naps = Naps()
    watcher, seen = watching(server, sleep=naps)
    assert seen.wait_for(lambda seen: seen.replaces == [0])
    assert len(naps.seconds) == 1
    assert 7.0 <= naps.seconds[0] <= 7.7
    assert watcher.failures == {"too_many_requests": 1}


def test_a_retry_after_without_measure_is_bounded(server, tmp_path):
    client = ApiClient(InClusterConfig.load(server.write_service_account(tmp_path / "a"), server.environ))
    watcher = PodWatcher(client, "node-a", lambda pods: None, lambda kind, pod: None)
    error = ApiError(503, "server_error", "later", retry_after_seconds=9e8)
    assert watcher._failed(error) <= 330.0


@pytest.mark.parametrize("status", [400, 404, 422, 504])
def test_a_watch_that_the_server_cannot_make_sense_of_is_listed_anew(server, watching, status):
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.fail_next(Failure(status=status))
    server.drop_connections()
    assert seen.wait_for(lambda seen: len(seen.replaces) == 2)
    assert watcher.relists == 1


# --------------------------------------------------------------------------------------------- absent and slow servers


def test_a_server_that_comes_later(watching, caplog):
    with ApiServer(listening=False) as server, caplog.at_level(logging.INFO, "spanloom.kube"):
        server.put(make_pod("first"))
        watcher, seen = watching(server)
        assert eventually(lambda: watcher.failures["connect"] >= 5)
        assert (watcher.connected, watcher.last_success, seen.replaces) == (False, None, [])
        server.accept_connections()
        assert seen.has("first")
        assert eventually(lambda: watcher.connected)
        assert [record.getMessage() for record in caplog.records] == ["kube_unavailable", "kube_connected"]


def test_an_hour_without_a_server(server, watching):
    """As the tries of an hour: nothing is kept, nothing ends, and the pods are right again afterwards."""
    server.put(make_pod("first"))
    watcher, seen = watching(server, backoff_initial_seconds=0.001, backoff_max_seconds=0.002)
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.refuse_connections()
    assert eventually(lambda: watcher.failures["connect"] >= 200)
    assert set(seen.pods) == {"first"}, "what was known stays known"
    server.delete("default", "first")
    server.put(make_pod("second"))
    server.compact()
    server.accept_connections()
    assert seen.has("second")


def test_a_slow_server_is_waited_for(server, watching):
    server.delay = 0.1
    server.put(make_pod("first"))
    watcher, seen = watching(server)
    assert seen.has("first")
    assert eventually(lambda: watcher.connected)
    assert not watcher.failures


def test_the_backoff_doubles_up_to_its_bound_and_is_spread_over_all_of_it():
    settings = WatchSettings()
    backoff = _Backoff(settings)
    bounds = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    draws = []
    for _ in range(300):
        draws.append([backoff.next_seconds() for _ in bounds])
        backoff.reset()
    for column, bound in enumerate(bounds):
        values = [draw[column] for draw in draws]
        assert max(values) <= bound
        assert min(values) < bound * 0.1 < bound * 0.9 < max(values)


def test_sleeps_are_those_of_the_backoff_and_start_anew_after_success(tmp_path):
    """With an injected sleep that does not sleep: the bounds grow while the server is away."""
    slept: list[float] = []
    with ApiServer(listening=False) as server:
        client = ApiClient(InClusterConfig.load(server.write_service_account(tmp_path / "account"), server.environ))
        seen = Seen()

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            time.sleep(0.001)

        watcher = PodWatcher(
            client, "node-a", seen.replace, seen.change, WatchSettings(healthy_seconds=0.05), sleep=sleep
        )
        watcher.start()
        assert eventually(lambda: len(slept) >= 40)
        assert all(seconds <= bound for seconds, bound in zip(slept, (1, 2, 4, 8, 16, 32), strict=False))
        assert 20 < max(slept) <= 60
        server.accept_connections()
        assert server.wait_for(lambda server: server.open_watches == 1)
        time.sleep(0.1)
        before = len(slept)
        server.drop_connections()
        assert eventually(lambda: watcher.watches == 2)
        assert slept[before] <= 1.0
        assert watcher.stop()


# --------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("moment", ["silent watch", "back-off", "slow list", "never started"])
def test_stop_ends_at_once(server, tmp_path, moment):
    client = ApiClient(InClusterConfig.load(server.write_service_account(tmp_path / "account"), server.environ))
    seen = Seen()
    settings = WatchSettings(backoff_initial_seconds=60.0)
    watcher = PodWatcher(client, "node-a", seen.replace, seen.change, settings)
    if moment == "back-off":
        server.refuse_connections()
    elif moment == "slow list":
        server.delay = 20.0
    if moment != "never started":
        watcher.start()
    if moment == "silent watch":
        assert server.wait_for(lambda server: server.open_watches == 1)
    elif moment == "back-off":
        assert eventually(lambda: watcher.failures["connect"])
    elif moment == "slow list":
        assert eventually(lambda: server.requests)
    started = time.monotonic()
    assert watcher.stop(2.0)
    assert time.monotonic() - started < 1.0
    assert not watcher.connected
    assert watcher.stop(2.0)
    server.put(make_pod("unseen"))
    time.sleep(0.05)
    assert not seen.changes


def test_stop_tells_when_a_consumer_hangs(server, watching):
    hanging = threading.Event()
    watcher, _ = watching(server, on_change=lambda kind, pod: hanging.wait(10.0))
    assert server.wait_for(lambda server: server.open_watches == 1)
    server.put(make_pod("first"))
    assert eventually(lambda: server.requests[-1].events == 1)
    time.sleep(0.1)
    assert not watcher.stop(0.1)
    hanging.set()


def test_the_stand_in_counts_what_went_over_the_wire(server, watching):
    """The figures of API load rest on it: TLS and TCP payload are more than the HTTP bytes, and not much more."""
    for number in range(200):
        server.put(make_pod(f"pod-{number}"))
    watcher, seen = watching(server)
    assert eventually(lambda: watcher.connected)
    server.put(make_pod("new"))
    assert seen.wait_for(lambda seen: len(seen.pods) == 201)
    assert watcher.stop()
    assert server.wait_for(lambda server: not server._connections)
    for request in (*lists(server), *watches(server)):
        assert request.bytes_out < request.wire_out < request.bytes_out * 1.02 + 4000
        assert request.bytes_in < request.wire_in < request.bytes_in + 2000
    assert server.summary()["list pods"]["bytes_out"] > 200 * 5000
    assert server.summary()["watch pods"]["events"] == 1


def test_the_stand_in_as_a_program(tmp_path):
    """It says where it is, obeys commands, and sums up at its end."""
    account = tmp_path / "account"
    command = [sys.executable, "-m", "tests.apiserver", "--service-account", str(account), "--pods", "3"]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            client = ApiClient(InClusterConfig.load(account, json.loads(program.stdout.readline())))
            for order in ({"put": make_pod("put")}, {"delete": ["default", "made-0"]}, {"delete": ["no", "such"]}):
                program.stdin.write(json.dumps(order) + "\n")
            program.stdin.flush()
            answers = [json.loads(program.stdout.readline()) for _ in range(3)]
            assert [set(answer) for answer in answers] == [{"ok"}, {"ok"}, {"error"}]
            names = {item["metadata"]["name"] for item in client.get("/api/v1/pods")["items"]}
            assert names == {"made-1", "made-2", "put"}
        finally:
            program.terminate()
        assert json.loads(program.stdout.readlines()[-1])["list pods"]["requests"] == 1
        assert program.wait(10.0) == 0


def test_nothing_grows_while_pods_come_and_go(server, watching):
    """A thousand pods through one watch: what the watcher holds afterwards is what it held before."""
    watcher, seen = watching(server)
    assert server.wait_for(lambda server: server.open_watches == 1)
    sizes = set(map(len, (vars(watcher), watcher.failures)))
    for number in range(500):
        server.put(make_pod(f"pod-{number}"))
        server.delete("default", f"pod-{number}")
    assert seen.wait_for(lambda seen: len(seen.changes) == 1000)
    assert eventually(lambda: watcher.events == 1000)
    assert set(map(len, (vars(watcher), watcher.failures))) == sizes
    assert (watcher.lists, watcher.watches) == (1, 1)
