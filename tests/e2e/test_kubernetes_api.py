"""The API server refuses, forgets, dawdles and goes away: tracing goes on, and what was missed is made good."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.apiserver import ApiServer, make_pod
from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.cluster import NODE, Container, ask
from tests.e2e.harness import AgentProcess, free_port, wait_until
from tests.e2e.test_live import events

CONNECT_SECONDS = 60.0
"""Back-offs double up to a minute, with jitter; what these tests let fail does not lead that far."""


class Application:
    """A pod with one server in it, which runs whether the API server knows of it or not."""

    def __init__(self, name: str, containers, serve, directory: Path) -> None:
        self.name, self.uid, self.port = name, str(uuid.uuid4()), free_port()
        self.container: Container = containers(self.uid)
        self._run = lambda: serve(self.container.wrap(servers.python_threads(self.port, directory)), self.port)

    def put(self, api: ApiServer) -> None:
        api.put(make_pod(self.name, "shop", NODE, {"app": self.container.id}, uid=self.uid))

    def run(self) -> None:
        self._run()

    def request(self, tracing: AgentProcess) -> CollectedSpan:
        """The server's span of one more request."""
        count = len(tracing.spans(self.port, "SERVER"))
        ask(self.port)
        return tracing.wait_for_spans(count + 1, port=self.port, kind="SERVER")[-1]

    def is_complete(self, span: CollectedSpan) -> bool:
        return (span.resource.get("k8s.pod.name"), span.resource["service.name"]) == (self.name, self.name)

    def is_bare(self, span: CollectedSpan) -> bool:
        """Only what the cgroup tells is there."""
        own = span.resource["k8s.pod.uid"], span.resource["container.id"]
        return own == (self.uid, self.container.id) and "k8s.pod.name" not in span.resource


@pytest.fixture
def application(containers, serve, public_path: Path):
    return lambda name: Application(name, containers, serve, public_path)


def failures(tracing: AgentProcess, reason: str) -> float:
    return tracing.metrics().get(f"spanloom_kube_failures_total{{reason={reason}}}", 0)


def wait_until_connected(tracing: AgentProcess) -> None:
    wait_until(lambda: tracing.metrics()["spanloom_kube_connected"] == 1, tracing.state, CONNECT_SECONDS)


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_rule_is_missing(api: ApiServer, in_cluster, application, verb: str):
    """The log names it, once; spans leave without their pod; once it is there they are complete, without a restart."""
    shop = application("shop")
    shop.put(api)
    api.deny = {(verb, "pods")}
    tracing = in_cluster([shop.port], {"kubernetes.wait_seconds": 0.5})
    wait_until(lambda: failures(tracing, "forbidden") >= 3, tracing.state, CONNECT_SECONDS)
    shop.run()
    span = shop.request(tracing)
    # What was listed is known although it cannot be watched.
    assert shop.is_bare(span) if verb == "list" else shop.is_complete(span)
    [said] = events(tracing, "kube_unavailable")
    assert said["reason"] == "forbidden"
    assert f"may not {verb} pods at cluster scope" in said["error"]
    assert "it needs list, watch on pods (ClusterRole)" in said["error"]
    api.deny = set()
    wait_until_connected(tracing)
    assert shop.is_complete(shop.request(tracing))
    assert events(tracing, "kube_connected")


def test_the_token_is_replaced(api: ApiServer, in_cluster, application):
    """The kubelet writes a new one before the old one expires: no request is refused, and the watch goes on."""
    shop = application("shop")
    tracing = in_cluster([shop.port], {"kubernetes.wait_seconds": 30})
    wait_until_connected(tracing)
    old = api.requests[-1].token
    for _ in range(3):
        new = api.rotate_token()
        before = len(api.requests)
        api.drop_connections()
        assert api.wait_for(lambda api, before=before: api.open_watches and len(api.requests) > before, 30)
        assert {request.token for request in api.requests[before:]} == {new} != {old}
    assert not [request for request in api.requests if request.status == 401]
    shop.put(api)
    shop.run()
    assert shop.is_complete(shop.request(tracing))


def test_a_token_that_is_replaced_too_late(api: ApiServer, in_cluster, application):
    """It is refused for a while, and the log says so; the file is read again until it is accepted."""
    shop = application("shop")
    tracing = in_cluster([shop.port], {"kubernetes.wait_seconds": 30})
    wait_until_connected(tracing)
    api.tokens.clear()
    api.drop_connections()
    wait_until(lambda: failures(tracing, "unauthorized") >= 2, tracing.state, CONNECT_SECONDS)
    assert [said["reason"] for said in events(tracing, "kube_unavailable")] == ["unauthorized"]
    shop.put(api)
    api.rotate_token()
    shop.run()
    assert shop.is_complete(shop.request(tracing))


@pytest.mark.parametrize("gone_as_event", [True, False], ids=["410 in the watch", "410 in the head"])
def test_the_past_is_forgotten(api: ApiServer, in_cluster, application, gone_as_event: bool):
    """Pods came and went while the connection was down, and the server knows no more: everything is listed again."""
    api.gone_as_event = gone_as_event
    stays, goes, comes = application("stays"), application("goes"), application("comes")
    stays.put(api)
    goes.put(api)
    tracing = in_cluster([stays.port, comes.port], {"kubernetes.wait_seconds": 30})
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 2, tracing.state)
    wait_until_connected(tracing)
    api.refuse_connections()
    api.delete("shop", "goes")
    comes.put(api)
    application("another").put(api)
    api.compact()
    api.accept_connections()
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 3, tracing.state, CONNECT_SECONDS)
    for application_ in (stays, comes):
        application_.run()
        assert application_.is_complete(application_.request(tracing))
    assert tracing.metrics()["spanloom_kube_relists_total"] == 1
    assert [request.verb for request in api.requests].count("list") == 2


def test_bookmarks_save_lists(api: ApiServer, in_cluster, application):
    """Nothing of the own node changes, and the version that is known stays young all the same."""
    shop = application("shop")
    tracing = in_cluster([shop.port], {"kubernetes.wait_seconds": 30})
    wait_until(lambda: api.open_watches == 1, tracing.state)
    for number in range(5):
        api.put(make_pod(f"elsewhere-{number}", "shop", "node-b"))
    api.compact()
    api.bookmark()
    version = api.version
    wait_until(lambda: tracing.metrics()["spanloom_kube_events_total"] == 1, tracing.state)
    before = len(api.requests)
    api.drop_connections()
    shop.put(api)
    shop.run()
    assert shop.is_complete(shop.request(tracing))
    again = api.requests[before:]
    assert {(request.verb, request.query["resourceVersion"]) for request in again} == {("watch", str(version))}
    assert tracing.metrics()["spanloom_kube_relists_total"] == 0


def test_a_slow_server(api: ApiServer, in_cluster, application):
    """Every answer takes seconds: the agent starts without waiting for it, spans wait for their pods, none is lost."""
    shop = application("shop")
    shop.put(api)
    api.delay = 4.0
    tracing = in_cluster([shop.port], {"kubernetes.wait_seconds": 30})
    assert tracing.metrics()["spanloom_kube_pods"] == 0
    shop.run()
    assert shop.is_complete(shop.request(tracing))
    late = application("late")
    wait_until_connected(tracing)
    late.put(api)  # through a watch that is open already nothing is slow
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 2, tracing.state)
    assert tracing.metrics()["spanloom_kube_spans_without_pod_total"] == 0
    assert failures(tracing, "timeout") == 0


def test_an_outage(api: ApiServer, in_cluster, application):
    """Longer than several back-offs: what was known stays known, new pods are bare, and complete when it is over."""
    known, new, gone = application("known"), application("new"), application("gone")
    known.put(api)
    gone.put(api)
    tracing = in_cluster([known.port, new.port], {"kubernetes.wait_seconds": 0.5})
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 2, tracing.state)
    known.run()
    api.refuse_connections()
    new.put(api)
    api.delete("shop", "gone")
    new.run()
    wait_until(lambda: failures(tracing, "connect") >= 4, tracing.state, CONNECT_SECONDS)
    for _ in range(3):
        assert known.is_complete(known.request(tracing))
        assert new.is_bare(new.request(tracing))
    metrics = tracing.metrics()
    assert (metrics["spanloom_kube_connected"], metrics["spanloom_kube_spans_without_pod_total"]) == (0, 3)
    assert [said["reason"] for said in events(tracing, "kube_unavailable")] == ["connect"]
    api.accept_connections()
    wait_until_connected(tracing)
    wait_until(lambda: new.is_complete(new.request(tracing)), tracing.state)
    assert known.is_complete(known.request(tracing))
    assert tracing.metrics()["spanloom_kube_pods"] == 2
    assert tracing.settle().closed
