"""Which pods and containers are traced, from their labels and names; and what belongs to the node itself."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.apiserver import make_pod
from tests.e2e import servers
from tests.e2e.cluster import NODE, ask, number_of, served
from tests.e2e.harness import AgentProcess, Books, curl, free_port, one, wait_until
from tests.e2e.test_live import MountedFile, change, events


@pytest.fixture
def serve_in(containers, serve, public_path: Path):
    """``serve_in(uid, port)``: a server in a container of that pod; the container's id."""

    def run(uid: str, port: int) -> str:
        container = containers(uid)
        serve(container.wrap(servers.python_threads(port, public_path)), port)
        return container.id

    return run


def numbers(tracing: AgentProcess, port: int) -> list[int]:
    """The requests of which the server's spans are there."""
    return sorted(number_of(span) for span in tracing.spans(port, "SERVER"))


def settle(tracing: AgentProcess) -> Books:
    """Only what was not selected is missing."""
    books = tracing.settle(40)
    assert books.closed
    assert books.dropped.keys() <= {"not_selected"}
    return books


def test_pods_are_selected_by_their_labels(api, in_cluster, serve_in, tmp_path: Path):
    """From the first request on, through changes of the labels, and through changes of the selector."""
    labels = {"web": {"tier": "web"}, "db": {"tier": "db"}, "legacy": {"tier": "web", "legacy": ""}}
    ports = {name: free_port() for name in labels}
    uids = {name: str(uuid.uuid4()) for name in labels}

    def config(selector: str) -> dict:
        return {"select": {"host": False, "kubernetes": {"labels": selector}}}

    file = MountedFile(tmp_path / "mounted", config("tier=web,!legacy"))
    tracing = in_cluster(list(ports.values()), {"kubernetes.wait_seconds": 30}, file.path)
    ids = {name: serve_in(uids[name], port) for name, port in ports.items()}

    def put(name: str, **more: str) -> None:
        pod = make_pod(name, "shop", NODE, {"app": ids[name]}, uid=uids[name], labels=labels[name] | more)
        seen = tracing.metrics()["spanloom_kube_events_total"]
        api.put(pod)
        wait_until(lambda: tracing.metrics()["spanloom_kube_events_total"] > seen, tracing.state)

    def request_all(number: int) -> None:
        for port in ports.values():
            ask(port, f"/status/200?number={number}")

    request_all(0)  # nobody knows them yet
    for name in ports:
        put(name)
    request_all(1)
    settle(tracing)
    assert {name: numbers(tracing, port) for name, port in ports.items()} == {"web": [0, 1], "db": [], "legacy": []}
    put("web", tier="batch")
    put("db", tier="web")
    request_all(2)
    settle(tracing)
    assert {name: numbers(tracing, port) for name, port in ports.items()} == {"web": [0, 1], "db": [2], "legacy": []}
    change(tracing, file, config("tier in (batch),app.kubernetes.io/name"))
    request_all(3)
    settle(tracing)  # an exchange is read under the settings of the moment when it is read
    change(tracing, file, config("legacy"))
    request_all(4)
    settle(tracing)
    assert {name: numbers(tracing, port) for name, port in ports.items()} == {
        "web": [0, 1, 3],
        "db": [2],
        "legacy": [4],
    }


def test_containers_are_selected_by_their_names(api, in_cluster, serve_in, tmp_path: Path):
    """A sidecar is left out, whatever the pod's annotation says; and is all that is traced when that is asked for."""
    uid, ports = str(uuid.uuid4()), {name: free_port() for name in ("app", "istio-proxy", "metrics")}

    def config(**containers: list[str]) -> dict:
        return {"select": {"host": False, "kubernetes": {"containers": containers, "namespaces": {"include": ["x"]}}}}

    file = MountedFile(tmp_path / "mounted", config(exclude=["istio-*"]))
    tracing = in_cluster(list(ports.values()), {"kubernetes.wait_seconds": 30}, file.path)
    ids = {name: serve_in(uid, port) for name, port in ports.items()}
    for port in ports.values():
        ask(port, "/status/200?number=0")
    # The namespace is not selected, and the pod's own annotation is stronger than that.
    api.put(make_pod("cart", "shop", NODE, ids, uid=uid, annotations={"spanloom.io/trace": "true"}))
    settle(tracing)
    change(tracing, file, config(include=["istio-*"]))
    for port in ports.values():
        ask(port, "/status/200?number=1")
    settle(tracing)
    change(tracing, file, config(include=["app", "metrics"], exclude=["m*"]))
    for port in ports.values():
        ask(port, "/status/200?number=2")
    settle(tracing)
    assert {name: numbers(tracing, port) for name, port in ports.items()} == {
        "app": [0, 2],
        "istio-proxy": [1],
        "metrics": [0],
    }
    instances = {span.resource["service.instance.id"] for span in tracing.collector.spans()}
    assert instances == {f"shop.cart.{name}" for name in ports}


def test_an_override_of_a_namespace_ends_by_itself(api, in_cluster, serve_in, tmp_path: Path):
    """The pods of the namespace that it names have its settings until the moment comes, and no others have them."""
    ports = {namespace: free_port() for namespace in ("checkout", "shop")}

    def config(until: datetime) -> dict:
        settings = {"capture": {"request_headers": ["x-order"]}, "routes": {"patterns": ["/status/{code}"]}}
        override = {"until": until.isoformat(), "match": {"namespace": "checkout"}, "set": settings}
        return {"routes": {"patterns": []}, "overrides": [override]}

    file = MountedFile(tmp_path / "mounted", {})
    tracing = in_cluster(list(ports.values()), {"kubernetes.wait_seconds": 30}, file.path)
    for namespace, port in ports.items():
        uid = str(uuid.uuid4())
        api.put(make_pod("cart", namespace, NODE, {"app": serve_in(uid, port)}, uid=uid))
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == len(ports), tracing.state)

    def request_all(number: int) -> None:
        for port in ports.values():
            url = f"http://127.0.0.1:{port}/status/200?number={number}"
            assert curl("-o", "/dev/null", "-H", f"x-order: {number}", url).returncode == 0
        settle(tracing)  # an exchange is read under the settings of the moment when it is read

    def overridden(namespace: str) -> dict[int, bool]:
        """Of each request, whether its header is there and its name has the route."""
        found = {}
        for span in tracing.spans(ports[namespace], "SERVER"):
            assert span.resource["k8s.namespace.name"] == namespace
            number = number_of(span)
            header = span.attributes.get("http.request.header.x-order")
            assert (header, span.name) in (([str(number)], "GET /status/{code}"), (None, "GET"))
            found[number] = header is not None
        return found

    request_all(0)
    change(tracing, file, config(datetime.now(UTC) + timedelta(hours=1)))
    request_all(1)
    until = datetime.now(UTC) + timedelta(seconds=5)
    change(tracing, file, config(until))
    wait_until(lambda: events(tracing, "override_ended"), lambda: f"the override ends{tracing.state()}")
    assert datetime.now(UTC) >= until
    request_all(2)
    assert overridden("checkout") == {0: False, 1: True, 2: False}
    assert overridden("shop") == {0: False, 1: False, 2: False}


def test_the_node_itself_and_pods_in_its_network(api, in_cluster, serve_in, serve, public_path: Path):
    """A process of the host is the node's and no pod's; a pod in the host's network, on its address, is itself."""
    host_port, ports = free_port(), [free_port(), free_port()]
    tracing = in_cluster([host_port, *ports], {"kubernetes.wait_seconds": 30})
    serve(servers.python_threads(host_port, public_path), host_port, "kubelet-helper")
    for name, port in zip(("proxy", "exporter"), ports, strict=True):
        uid = str(uuid.uuid4())
        container_id = serve_in(uid, port)
        pod = f"{name}-x7k2p"
        owner = ("DaemonSet", name)
        api.put(make_pod(pod, "kube-system", NODE, {name: container_id}, owner=owner, uid=uid, host_network=True))
    for port in (host_port, *ports):
        ask(port)
    host = one(served(tracing, host_port)).resource
    assert (host["host.name"], host["service.name"]) == (NODE, "kubelet-helper")
    assert host["service.instance.id"].startswith(f"{NODE}.{host['process.pid']}.")
    assert not [key for key in host if key.startswith(("k8s.", "container."))]
    for name, port in zip(("proxy", "exporter"), ports, strict=True):
        resource = one(served(tracing, port)).resource
        assert (resource["host.name"], resource["k8s.node.name"]) == (NODE, NODE)
        assert (resource["service.name"], resource["k8s.daemonset.name"]) == (name, name)
        assert resource["service.instance.id"] == f"kube-system.{name}-x7k2p.{name}"
    # Their client is a process of the host, on the same addresses.
    for port in ports:
        client = one(tracing.wait_for_spans(1, port=port, kind="CLIENT"))
        assert client.resource["host.name"] == NODE
        assert "k8s.pod.name" not in client.resource
