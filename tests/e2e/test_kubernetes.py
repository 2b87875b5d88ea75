"""The agent in a cluster: processes in cgroups as container runtimes name them, and a real HTTPS API server.

The server is tests/apiserver.py; the agent runs in its in-cluster mode with a mounted service account.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from pathlib import Path

from tests.apiserver import make_endpoint_slice, make_pod, make_service
from tests.e2e import servers
from tests.e2e.cluster import NODE, ask, served
from tests.e2e.harness import AgentProcess, free_port, one, wait_until
from tests.e2e.servers import Server
from tests.e2e.test_live import MountedFile, change, events


def test_a_process_is_described_by_its_pod(containers, api, in_cluster, serve, public_path: Path):
    """All resource attributes of Kubernetes, and the names that the conventions derive from them."""
    port, uid = free_port(), str(uuid.uuid4())
    container = containers(uid)
    api.put(
        make_pod(
            "cart-6d4cf56db6-x7k2p",
            "shop",
            NODE,
            {"app": container.id},
            uid=uid,
            owner=("ReplicaSet", "cart-6d4cf56db6"),
            annotations={"resource.opentelemetry.io/team": "blue"},
        )
    )
    tracing = in_cluster([port])
    serve(container.wrap(servers.python_threads(port, public_path)), port)
    ask(port)
    span = one(served(tracing, port))
    resource = span.resource
    expected = {
        "service.name": "cart",
        "service.namespace": "shop",
        "service.version": "1.4.2",
        "service.instance.id": "shop.cart-6d4cf56db6-x7k2p.app",
        "k8s.cluster.name": "test",
        "host.name": NODE,
        "k8s.node.name": NODE,
        "k8s.namespace.name": "shop",
        "k8s.pod.name": "cart-6d4cf56db6-x7k2p",
        "k8s.pod.uid": uid,
        "k8s.deployment.name": "cart",
        "k8s.replicaset.name": "cart-6d4cf56db6",
        "k8s.container.name": "app",
        "container.id": container.id,
        "container.image.name": "registry.example/shop/app",
        "team": "blue",
        "telemetry.sdk.language": "python",
    }
    assert {key: resource.get(key) for key in expected} == expected
    assert resource["k8s.pod.start_time"]
    # The client is a process of the host.
    client = one(tracing.spans(port, "CLIENT"))
    assert not [key for key in client.resource if key.startswith("k8s.")]
    assert client.span_id == span.parent_span_id


def test_a_pod_that_becomes_known_in_time(containers, api, in_cluster, serve, public_path: Path):
    """The first request of a new pod waits for its metadata; nothing leaves without it."""
    port, uid = free_port(), str(uuid.uuid4())
    container = containers(uid)
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 10})
    serve(container.wrap(servers.python_threads(port, public_path)), port)
    ask(port)
    wait_until(lambda: tracing.metrics().get("spanloom_kube_spans_held") == 1, "the span is held")
    assert not tracing.spans(port, "SERVER")
    api.put(make_pod("late", "shop", NODE, {"app": container.id}, uid=uid))
    assert one(served(tracing, port)).resource["k8s.pod.name"] == "late"
    assert tracing.metrics()["spanloom_kube_spans_without_pod_total"] == 0


def test_an_api_server_that_is_away(containers, api, in_cluster, serve, public_path: Path):
    """Tracing goes on; spans carry what is known, and everything once the server is there."""
    port, uid = free_port(), str(uuid.uuid4())
    container = containers(uid)
    api.refuse_connections()
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 0.5})
    serve(container.wrap(servers.python_threads(port, public_path)), port)
    ask(port)
    first = one(served(tracing, port))
    assert (first.resource["k8s.pod.uid"], first.resource["container.id"]) == (uid, container.id)
    assert "k8s.pod.name" not in first.resource
    assert tracing.metrics()["spanloom_kube_spans_without_pod_total"] == 1
    assert tracing.metrics()["spanloom_kube_connected"] == 0
    api.put(make_pod("back", "shop", NODE, {"app": container.id}, uid=uid))
    api.accept_connections()
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 1, "the pods are listed", 60)
    ask(port)
    assert served(tracing, port, 2)[-1].resource["k8s.pod.name"] == "back"


def test_pods_are_selected(containers, api, in_cluster, serve, public_path: Path, tmp_path: Path):
    """By the pod's own annotation, and by namespace, live; also for requests that came before the pod was known."""
    ports = [free_port() for _ in range(3)]
    file = MountedFile(tmp_path / "mounted", {"select": {"host": False}})
    pods = []
    tracing = in_cluster(ports, {"kubernetes.wait_seconds": 10}, file.path)
    for port, (name, namespace, annotated) in zip(
        ports,
        (
            ("wanted", "shop", {}),
            ("unwanted", "shop", {"spanloom.io/trace": "false"}),
            ("other", "bank", {}),
        ),
        strict=True,
    ):
        uid = str(uuid.uuid4())
        container = containers(uid)
        serve(container.wrap(servers.python_threads(port, public_path)), port)
        ask(port)
        pods.append(make_pod(name, namespace, NODE, {"app": container.id}, uid=uid, annotations=annotated))
    for pod in pods:
        api.put(pod)
    assert one(served(tracing, ports[0])).resource["k8s.pod.name"] == "wanted"
    assert one(served(tracing, ports[2])).resource["k8s.pod.name"] == "other"
    change(tracing, file, {"select": {"host": False, "kubernetes": {"namespaces": {"exclude": ["bank"]}}}})
    for port in ports:
        ask(port, "/status/404")
    assert len(served(tracing, ports[0], 2)) == 2
    books = tracing.settle()
    assert not tracing.spans(ports[1])
    assert len(tracing.spans(ports[2])) == 1
    assert not [span for span in tracing.collector.spans() if span.kind == "CLIENT"]
    assert books.dropped.keys() <= {"not_selected"}
    assert books.closed


class Caller:
    """Asks a server without a pause; each request has a number of its own."""

    def __init__(self, port: int) -> None:
        self.begun = 0
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=30) as connection:
            while not self._stop.is_set():
                self.begun += 1
                request = f"GET /status/204?number={self.begun} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n"
                connection.sendall(request.encode())
                assert connection.recv(4096).startswith(b"HTTP/1.1 204")
                time.sleep(0.001)

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)


def test_a_change_holds_for_the_first_request(containers, api, in_cluster, serve, public_path: Path, tmp_path: Path):
    """A pod is taken out of the selection and in again, under traffic: requests are judged by what held in their time.

    Those whose answer came before the change are traced although they are read after it; those that began behind
    `config_applied` are judged by it, the first one included.
    """
    port, uid = free_port(), str(uuid.uuid4())
    container = containers(uid)
    api.put(make_pod("cart", "shop", NODE, {"app": container.id}, uid=uid))

    def config(**namespaces: list[str]) -> dict:
        return {"select": {"host": False, "kubernetes": {"namespaces": namespaces}}}

    file = MountedFile(tmp_path / "mounted", config())
    tracing = in_cluster([port], config=file.path)
    serve(container.wrap(servers.python_threads(port, public_path)), port)
    ask(port)
    served(tracing, port)
    wanted, unwanted = set(), set()
    with Caller(port) as caller:
        time.sleep(0.3)
        wanted.update(range(1, caller.begun))
        for _ in range(3):
            for namespaces, numbers in (({"exclude": ["shop"]}, unwanted), ({"include": ["*"]}, wanted)):
                change(tracing, file, config(**namespaces))
                first = caller.begun + 1
                time.sleep(0.3)
                numbers.update(range(first, caller.begun))
    books = tracing.settle()
    assert books.dropped.keys() <= {"not_selected"}
    found = {int(str(span.attributes.get("url.query", "number=0")).rpartition("=")[2]) for span in tracing.spans(port)}
    assert len(wanted) > 50 < len(unwanted)
    assert not wanted - found, f"{len(wanted - found)} of {len(wanted)} are missing"
    assert not unwanted & found, f"{len(unwanted & found)} of {len(unwanted)} are there"


def test_spans_that_wait_for_their_pod_wait_through_a_change(
    containers, api, in_cluster, serve, public_path: Path, tmp_path: Path
):
    """Of the wait itself, and of the export: nothing leaves before its time, and the counters go on."""
    ports = [free_port(), free_port()]
    uids = [str(uuid.uuid4()) for _ in ports]
    made = [containers(uid) for uid in uids]
    file = MountedFile(tmp_path / "mounted", {"kubernetes": {"wait_seconds": 0.1}})
    tracing = in_cluster(ports, {"select.host": False}, config=file.path)
    for port, container in zip(ports, made, strict=True):
        serve(container.wrap(servers.python_threads(port, public_path)), port)
    ask(ports[0])
    assert "k8s.pod.name" not in one(served(tracing, ports[0])).resource
    change(tracing, file, {"kubernetes": {"wait_seconds": 20}})
    ask(ports[1])
    wait_until(lambda: tracing.metrics()["spanloom_kube_spans_held"] == 1, "the span is held")
    changes = [
        {"kubernetes": {"wait_seconds": 25}},
        {"kubernetes": {"wait_seconds": 30}, "export": {"otlp": {"timeout_seconds": 7}}},
        {"kubernetes": {"wait_seconds": 30}, "export": {"otlp": {"timeout_seconds": 7}, "batch": {"max_spans": 9}}},
    ]
    for config in changes:
        change(tracing, file, config)
        ask(ports[1])
    metrics = tracing.metrics()
    wait_until(lambda: tracing.metrics()["spanloom_kube_spans_held"] == 4, "the spans are held")
    assert metrics["spanloom_kube_spans_without_pod_total"] == 1
    assert not tracing.spans(ports[1])
    assert tracing.books().closed
    api.put(make_pod("late", "shop", NODE, {"app": made[1].id}, uid=uids[1]))
    assert {span.resource["k8s.pod.name"] for span in served(tracing, ports[1], 4)} == {"late"}
    assert tracing.settle().handed_over == 5


def test_the_console_waits_for_the_pod_as_well(containers, api, serve, public_path: Path, tmp_path: Path):
    """Without an endpoint, too: spans are printed with their pod, and those of pods that are not selected never."""
    ports = [free_port(), free_port()]
    made = []
    account = str(tmp_path / "account")
    settings = {"kubernetes.service_account": account, "kubernetes.wait_seconds": 30, "select.host": False}
    environment = {**api.environ, "NODE_NAME": NODE}
    with AgentProcess(tmp_path, None, ports, settings, environment) as tracing:
        for port in ports:
            uid = str(uuid.uuid4())
            container = containers(uid)
            made.append((uid, container.id))
            serve(container.wrap(servers.python_threads(port, public_path)), port)
            ask(port)
        wait_until(lambda: tracing.metrics()["spanloom_kube_spans_held"] == 2, lambda: tracing.state())
        assert tracing.stdout() == ""
        for name, (uid, container_id) in zip(("wanted", "unwanted"), made, strict=True):
            annotations = {"spanloom.io/trace": "false"} if name == "unwanted" else {}
            api.put(make_pod(name, "shop", NODE, {"app": container_id}, uid=uid, annotations=annotations))
        wait_until(lambda: tracing.books().in_flight == 0, lambda: tracing.state())
        books = tracing.books()
        assert books.closed
        assert books.not_exported == 1
        assert books.dropped.keys() == {"not_selected"}
    printed = [json.loads(line) for line in tracing.stdout().splitlines()]
    assert [span["resource"]["service.name"] for span in printed] == ["wanted"]


def test_an_invalid_file_is_an_event_of_the_pod(api, in_cluster, tmp_path: Path):
    """`kubectl describe` shows what is wrong with it."""
    file = MountedFile(tmp_path / "mounted", {})
    tracing = in_cluster([free_port()], config=file.path)
    tracing.expects_errors = True
    change(tracing, file, {"sampling": {"ratio": 7}}, "config_refused")
    wait_until(lambda: api.recorded_events, "an event")
    event = api.recorded_events[0]
    assert event["involvedObject"]["name"] == "spanloom-x"
    assert event["reason"] == "ConfigRefused"
    assert "sampling.ratio" in event["message"]


def test_an_invalid_file_where_events_are_denied(api, in_cluster, tmp_path: Path):
    """The log says that the Event could not be written, and why; the next valid file is applied all the same."""
    api.deny = {("create", "events")}
    file = MountedFile(tmp_path / "mounted", {})
    tracing = in_cluster([free_port()], config=file.path)
    tracing.expects_errors = True
    change(tracing, file, {"sampling": {"ratio": 7}}, "config_refused")
    wait_until(lambda: events(tracing, "kube_event_not_written"), lambda: f"it is said{tracing.state()}")
    (said,) = events(tracing, "kube_event_not_written")
    assert said["level"] == "warning"
    assert "create on events" in said["error"]
    assert not api.recorded_events
    applied = change(tracing, file, {"sampling": {"ratio": 0.5}})
    assert applied["changed"] == ["sampling.ratio"]
    assert tracing.metrics()["spanloom_config_last_reload_successful"] == 1


def test_called_services_are_named(containers, api, in_cluster, serve, public_path: Path):
    """Only when asked for: the client's span says which service and pod it called, and follows when that changes."""
    port, uid = free_port(), str(uuid.uuid4())
    container = containers(uid)
    api.put(make_pod("cart-a", "shop", NODE, {"app": container.id}, uid=uid))
    behind = make_endpoint_slice("cart", "shop", {"cart-a": "127.0.0.1"}, port)
    api.put(behind)
    api.put(make_service("cart", "shop", "10.96.0.7", 80))
    tracing = in_cluster([port], {"kubernetes.peers": True})
    wait_until(lambda: tracing.metrics().get("spanloom_kube_peer_addresses") == 2, lambda: tracing.state())
    serve(container.wrap(servers.python_threads(port, public_path)), port)
    for _ in range(3):
        ask(port)
    wait_until(lambda: len(tracing.spans(port, "CLIENT")) == 3, lambda: tracing.state())
    for span in tracing.spans(port, "CLIENT"):
        names = {key: value for key, value in span.attributes.items() if "peer" in key and "network" not in key}
        assert names == {
            "service.peer.name": "cart",
            "service.peer.namespace": "shop",
            "spanloom.peer.pod.name": "cart-a",
        }
    assert not [key for span in served(tracing, port, 3) for key in span.attributes if key.startswith("service.")]
    assert tracing.metrics()["spanloom_kube_peers_connected"] == 1
    api.delete("shop", behind["metadata"]["name"], "endpointslices")
    wait_until(lambda: tracing.metrics()["spanloom_kube_peer_addresses"] == 1, lambda: tracing.state())
    wait_until(lambda: ask(port) or "service.peer.name" not in tracing.spans(port, "CLIENT")[-1].attributes, "no name")


def test_no_names_of_peers_by_default(api, in_cluster):
    """The cluster's services are not asked for unless the operator wants them."""
    tracing = in_cluster([free_port()])
    wait_until(lambda: tracing.metrics().get("spanloom_kube_connected") == 1, "the watch")
    assert {request.resource for request in api.requests} == {"pods"}


def test_a_process_that_has_ended_already(containers, api, in_cluster, start, public_path: Path):
    """Its container is told by the cgroup that the kernel saw it in: no pod's process passes for one of the host."""
    port = free_port()
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 10, "select.host": False})
    start(servers.python_threads(port, public_path).arguments, port=port)
    uids = [str(uuid.uuid4()) for _ in range(8)]
    for number, uid in enumerate(uids):
        container = containers(uid)
        api.put(make_pod(f"short-{number}", "shop", NODE, {"app": container.id}, uid=uid))
        fetch = ["curl", "-q", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number={number}"]
        command = container.wrap(Server(arguments=fetch, executable="curl", language="")).arguments
        start(command).popen.wait(20)
    wait_until(lambda: len(tracing.spans(port, "CLIENT")) == len(uids), lambda: tracing.state())
    for span in tracing.spans(port, "CLIENT"):
        number = str(span.attributes["url.full"]).rpartition("=")[2]
        assert span.resource["k8s.pod.name"] == f"short-{number}"
        assert span.resource["service.name"] == f"short-{number}"
