"""The agent as the chart installs it, against a real API server: what its account may, what it watches and writes.

The pods are objects of the API server; their processes run in cgroups as the kubelet would have named them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import ask
from tests.e2e.harness import free_port, one, wait_until
from tests.e2e.test_kubernetes_api import failures, wait_until_connected
from tests.e2e.test_live import MountedFile, change, events
from tests.real.cluster import IMAGE
from tests.real.programs import NODE, ControlPlane, Json

CHURNING_PODS = 100


def test_pods_are_named(install, as_pod, application):
    """Listed, seen when they come, change and go; with every attribute that the server's own object gives."""
    early, late, other = application("early"), application("late"), application("elsewhere")
    early.begin(annotations={"resource.opentelemetry.io/team": "blue"})
    tracing = as_pod(install().pod(), [early.port, late.port], {"kubernetes.wait_seconds": 20})
    wait_until_connected(tracing)
    span = early.request(tracing)
    expected = {
        "service.name": "early",
        "service.namespace": early.namespace,
        "service.version": "1.4.2",
        "host.name": NODE,
        "k8s.node.name": NODE,
        "k8s.namespace.name": early.namespace,
        "k8s.pod.name": "early",
        "k8s.pod.uid": early.uid,
        "k8s.pod.start_time": "2026-01-01T00:00:00Z",
        "k8s.container.name": "app",
        "container.id": early.container.id,
        "container.image.name": "registry.example/shop/app",
        "team": "blue",
    }
    assert {key: span.resource.get(key) for key in expected} == expected
    pods = tracing.metrics()["spanloom_kube_pods"]
    # A pod of another node is nothing to this agent.
    other.create("node-b")
    # The process is there before the status with its container's id is.
    late.create()
    late.run()
    ask(late.port)
    late.report()
    [span] = tracing.wait_for_spans(1, port=late.port, kind="SERVER")
    assert late.is_complete(span)
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == pods + 1, tracing.state)
    late.plane.delete(late.path)
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == pods, tracing.state)
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_spans_without_pod_total"] == 0
    assert metrics["spanloom_kube_relists_total"] == 0
    assert not [name for name in metrics if name.startswith("spanloom_kube_failures_total")]


def test_a_workload_of_real_controllers(plane: ControlPlane, install, as_pod, application, shop: str):
    """A Deployment's pods have the names that its controllers give: the service is the Deployment."""
    template = {
        "metadata": {"labels": {"app": "cart"}},
        "spec": {"nodeName": NODE, "containers": [{"name": "app", "image": IMAGE}]},
    }
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": "cart"}}, "template": template}
    plane.create(
        f"/apis/apps/v1/namespaces/{shop}/deployments",
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "cart"}, "spec": spec},
    )
    path = f"/api/v1/namespaces/{shop}/pods"
    wait_until(lambda: plane.items(path), "a pod of the Deployment", 30)
    [pod] = plane.items(path)
    cart = application(pod["metadata"]["name"])
    cart.adopt(pod)
    cart.report()
    cart.run()
    tracing = as_pod(install().pod(), [cart.port], {"kubernetes.wait_seconds": 20})
    span = cart.request(tracing)
    replica_set = pod["metadata"]["ownerReferences"][0]["name"]
    named = {key: span.resource.get(key) for key in ("service.name", "k8s.deployment.name", "k8s.replicaset.name")}
    assert named == {"service.name": "cart", "k8s.deployment.name": "cart", "k8s.replicaset.name": replica_set}


def test_without_the_role(install, as_pod, application):
    """RBAC refuses, the log names the rule; an upgrade that creates it is enough."""
    app = application("app")
    app.begin()
    release = install({"rbac": {"create": False}})
    tracing = as_pod(release.pod(), [app.port], {"kubernetes.wait_seconds": 0.5})
    wait_until(lambda: failures(tracing, "forbidden") >= 2, tracing.state, 60)
    [said] = events(tracing, "kube_unavailable")
    assert "may not list pods at cluster scope" in said["error"]
    span = app.request(tracing)
    assert (span.resource["k8s.pod.uid"], "k8s.pod.name" in span.resource) == (app.uid, False)
    release.act("upgrade", {"rbac": {"create": True}})
    wait_until_connected(tracing)
    assert app.is_complete(app.request(tracing))


def test_a_token_that_is_no_longer_accepted(plane: ControlPlane, install, as_pod, application, tmp_path):
    """The pod that it is bound to is gone; the next one that is mounted is taken up."""
    app = application("app")
    release = install()
    pod = release.pod()
    tracing = as_pod(pod, [app.port], {"kubernetes.wait_seconds": 30})
    wait_until_connected(tracing)
    plane.delete(f"/api/v1/namespaces/{release.namespace}/pods/{pod['metadata']['name']}")
    plane.stop_api()
    plane.start_api()
    wait_until(lambda: failures(tracing, "unauthorized") >= 2, tracing.state, 90)
    wait_until(lambda: [one for one in release.pods() if one["metadata"]["uid"] != pod["metadata"]["uid"]], "a pod", 60)
    plane.write_account(tmp_path / "account", release.namespace, pod["spec"]["serviceAccountName"], release.pod())
    wait_until_connected(tracing)
    app.begin()
    assert app.is_complete(app.request(tracing))


def test_the_past_is_forgotten(plane: ControlPlane, install, as_pod, application):
    """Pods come and go while the agent does not hear of it, and etcd is compacted: 410, and everything is listed."""
    goes, comes = application("goes"), application("comes")
    goes.begin()
    tracing = as_pod(install().pod(), [comes.port], {"kubernetes.wait_seconds": 30})
    wait_until_connected(tracing)
    pods = tracing.metrics()["spanloom_kube_pods"]
    with plane.elsewhere():
        plane.delete(goes.path)
        comes.begin()
    assert comes.is_complete(comes.request(tracing))
    wait_until_connected(tracing)
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_pods"] == pods
    assert metrics["spanloom_kube_relists_total"] == 1, tracing.state()
    assert [said["reason"] for said in events(tracing, "kube_unavailable")] == ["connect"], tracing.stderr()


def test_bookmarks(install, as_pod):
    """They come about once a minute although nothing happens."""
    tracing = as_pod(install().pod(), [free_port()])
    wait_until_connected(tracing)
    taken = tracing.metrics()["spanloom_kube_events_total"]
    wait_until(lambda: tracing.metrics()["spanloom_kube_events_total"] > taken, tracing.state, 100, 1.0)
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_objects_malformed_total"] == 0
    assert metrics["spanloom_kube_relists_total"] == 0, tracing.state()
    assert not [name for name in metrics if name.startswith("spanloom_kube_failures_total")]


def test_many_pods_come_and_go(plane: ControlPlane, install, as_pod, application):
    """Hundreds of changes in seconds: the agent ends up with the pods that there are, from the one watch."""
    app = application("stays")
    app.begin()
    tracing = as_pod(install().pod(), [app.port])
    wait_until_connected(tracing)
    before = tracing.metrics()["spanloom_kube_pods"]
    others = [application(f"other-{number}") for number in range(CHURNING_PODS)]
    for one_ in others:
        one_.create()
        one_.report()
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == before + CHURNING_PODS, tracing.state)
    for one_ in others:
        plane.delete(one_.path)
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == before, tracing.state)
    assert app.is_complete(app.request(tracing))
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_events_total"] >= 3 * CHURNING_PODS
    assert (metrics["spanloom_kube_requests_total{kind=watch}"], metrics["spanloom_kube_relists_total"]) == (1, 0)


POD_ADDRESS = "10.244.1.17"


@pytest.fixture
def pod_network() -> Iterator[list[str]]:
    """The command that runs another where ``POD_ADDRESS`` is local: the API server refuses endpoints on a loopback."""
    name = "spanloom-real"
    for command in (
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "set", "lo", "up"],
        ["ip", "-n", name, "address", "add", f"{POD_ADDRESS}/32", "dev", "lo"],
    ):
        subprocess.run(command, check=True, timeout=30)
    yield ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)


def test_names_of_peers(
    plane: ControlPlane,
    install,
    as_pod,
    application,
    shop: str,
    pod_network: list[str],
    start,
    public_path: Path,
):
    """A Service of the API server's and the EndpointSlice that its controller makes of it and of a ready pod."""
    cart = application("cart-a")
    cart.create(labels={"app": "cart"})
    cart.report(POD_ADDRESS)
    directory = ["--directory", public_path, "--bind", POD_ADDRESS]
    serving = [sys.executable, "-m", "http.server", str(cart.port), *directory]
    start(cart.container.enter([*pod_network, *serving]))  # in this order: a namespace has a /sys of its own
    ports = [{"name": "http", "port": 80, "targetPort": cart.port}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "cart"}}
    service["spec"] = {"selector": {"app": "cart"}, "ports": ports}
    plane.create(f"/api/v1/namespaces/{shop}/services", service)
    release = install({"peers": {"enabled": True}})
    tracing = as_pod(release.pod(), [cart.port], {"kubernetes.peers": True, "kubernetes.wait_seconds": 20})
    wait_until(lambda: tracing.metrics()["spanloom_kube_peers_connected"] == 1, tracing.state, 60)
    # The API server's own service, this one, and the pod behind it.
    wait_until(lambda: tracing.metrics()["spanloom_kube_peer_addresses"] == 3, tracing.state, 60)
    url = f"http://{POD_ADDRESS}:{cart.port}/"
    curl = [*pod_network, "curl", "-q", "-sS", "--noproxy", "*", "--retry", "20", "--retry-connrefused", url]
    subprocess.run(curl, check=True, timeout=60, stdout=subprocess.DEVNULL)
    span = one(tracing.wait_for_spans(1, port=cart.port, kind="CLIENT"))
    names = {key: value for key, value in span.attributes.items() if "peer" in key and "network" not in key}
    assert names == {
        "service.peer.name": "cart",
        "service.peer.namespace": shop,
        "spanloom.peer.pod.name": "cart-a",
    }
    assert cart.is_complete(one(tracing.wait_for_spans(1, port=cart.port, kind="SERVER")))
    # The service goes, and its names with it.
    plane.delete(f"/api/v1/namespaces/{shop}/services/cart")
    wait_until(lambda: tracing.metrics()["spanloom_kube_peer_addresses"] == 1, tracing.state, 60)
    assert tracing.metrics()["spanloom_kube_objects_malformed_total"] == 0


def test_a_refused_configuration_is_an_event(plane: ControlPlane, install, as_pod, tmp_path: Path):
    """On the agent's own pod, where ``kubectl describe`` shows it."""
    release = install()
    pod = release.pod()
    file = MountedFile(tmp_path / "mounted", {})
    tracing = as_pod(pod, [free_port()], config=file.path)
    tracing.expects_errors = True
    change(tracing, file, {"sampling": {"ratio": 7}}, "config_refused")
    wait_until(lambda: own_events(plane, pod), lambda: f"an event: {release.events()}")
    [said] = own_events(plane, pod)
    assert (said["type"], said["source"]) == ("Warning", {"component": "spanloom"})
    assert "sampling.ratio" in said["message"]
    assert not events(tracing, "kube_event_not_written")


def own_events(plane: ControlPlane, pod: Json) -> list[Json]:
    """Those about the pod that are the agent's."""
    items = plane.items(f"/api/v1/namespaces/{pod['metadata']['namespace']}/events")
    return [
        one
        for one in items
        if one["involvedObject"].get("uid") == pod["metadata"]["uid"] and one["source"].get("component") == "spanloom"
    ]
