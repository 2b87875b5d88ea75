"""A whole node: fifty pods of all kinds described to the last attribute, and pods that come and go by the hundred."""

from __future__ import annotations

import secrets
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.apiserver import Json, make_pod
from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.cluster import LAYOUTS, NODE, Container, ask, number_of, stopped
from tests.e2e.harness import AgentProcess, free_port, one, show, wait_until

DIGEST = "sha256:" + "c0ffee" * 10 + "cafe"

# Owner of the pod -> attributes and the service's name (SEMANTICS.md). "{}" is the pod's number.
WORKLOADS: list[tuple[tuple[str, str] | None, dict[str, str], str]] = [
    (
        ("ReplicaSet", "cart{}-6d4cf56db6"),
        {"k8s.deployment.name": "cart{}", "k8s.replicaset.name": "cart{}-6d4cf56db6"},
        "cart{}",
    ),
    (("ReplicaSet", "lonely{}"), {"k8s.replicaset.name": "lonely{}"}, "lonely{}"),
    (("StatefulSet", "store{}"), {"k8s.statefulset.name": "store{}"}, "store{}"),
    (("DaemonSet", "logs{}"), {"k8s.daemonset.name": "logs{}"}, "logs{}"),
    (("Job", "migrate{}"), {"k8s.job.name": "migrate{}"}, "migrate{}"),
    (
        ("Job", "report{}-29382400"),
        {"k8s.cronjob.name": "report{}", "k8s.job.name": "report{}-29382400"},
        "report{}",
    ),
    (None, {}, "pod-{}"),  # a bare pod
    (("Node", NODE), {}, "pod-{}"),  # the mirror of a static pod
    (("Rollout", "blue{}"), {}, "pod-{}"),  # somebody's own kind of owner
]

# Image -> its name, tags and the version that follows. "%" is the container's name.
IMAGES: list[tuple[str, str, list[str], str]] = [
    ("registry.example/shop/%:1.4.2", "registry.example/shop/%", ["1.4.2"], "1.4.2"),
    (f"registry.example:5000/%@{DIGEST}", "registry.example:5000/%", [], DIGEST),
    (f"registry.example:5000/%:2.0@{DIGEST}", "registry.example:5000/%", ["2.0"], f"2.0@{DIGEST}"),
    ("%", "%", ["latest"], "latest"),
]


class Workload:
    """One of the fifty pods. Which of the kinds it is follows from its number, so that they mix in all ways."""

    def __init__(self, number: int, make) -> None:
        self.number = number
        self.name = f"pod-{number}"
        self.namespace = ("shop", "bank")[number % 2]
        self.uid = str(uuid.uuid4())
        self.owner, self.owners, self.service = WORKLOADS[number % len(WORKLOADS)]
        self.image = IMAGES[number % len(IMAGES)]
        self.annotations: dict[str, str] = {}
        if number % 5 == 0:
            self.annotations = {
                f"resource.opentelemetry.io/{key}": value
                for key, value in (
                    ("service.name", f"annotated{number}"),
                    ("service.namespace", "elsewhere"),
                    ("service.version", "9"),
                    ("team", "blue"),
                )
            }
        runtime_uid = self.uid
        if self.owner is not None and self.owner[0] == "Node":
            runtime_uid = secrets.token_hex(16)  # of a static pod the runtime knows the hash of its manifest
            self.annotations["kubernetes.io/config.mirror"] = runtime_uid
        layout = list(LAYOUTS)[number % len(LAYOUTS)]

        def containers(*names: str) -> dict[str, Container]:
            return {name: make(runtime_uid, layout) for name in names}

        self.main = containers("app", "sidecar") if number % 6 == 0 else containers("app")
        self.init = containers("setup") if number % 4 == 0 else {}
        self.ephemeral = containers("debugger") if number % 10 == 3 else {}
        self.restarted = make(runtime_uid, layout) if number % 9 == 2 else None

    def thing(self, *, before_restart: bool = False) -> Json:
        """The pod as the API server has it."""
        owner = self.owner
        pod = make_pod(
            self.name,
            self.namespace,
            NODE,
            {name: container.id for name, container in self.main.items()},
            init_containers={name: container.id for name, container in self.init.items()},
            ephemeral_containers={name: container.id for name, container in self.ephemeral.items()},
            owner=(owner[0], owner[1].format(self.number)) if owner is not None else None,
            annotations=self.annotations,
            uid=self.uid,
            image=self.image[0].replace("%", "{}"),
            host_network=self.number % 7 == 0,
            start_time=f"2026-01-02T03:04:{self.number:02}Z",
            restarts=0 if before_restart or self.restarted is None else 1,
        )
        if self.restarted is not None:
            [status] = [status for status in pod["status"]["containerStatuses"] if status["name"] == "app"]
            old = f"containerd://{self.restarted.id}"
            if before_restart:
                status["containerID"] = old
            else:
                status["lastState"] = {"terminated": {"exitCode": 1, "reason": "Error", "containerID": old}}
        return pod

    def resource(self, name: str, container: Container) -> dict[str, object]:
        """What SEMANTICS.md says of a process in ``container``: everything in these name spaces, and nothing else."""
        _, image, tags, version = (
            [part.replace("%", name) for part in text] if isinstance(text, list) else text.replace("%", name)
            for text in self.image
        )
        annotated = self.number % 5 == 0
        return {
            "host.name": NODE,
            "k8s.cluster.name": "test",
            "k8s.node.name": NODE,
            "k8s.namespace.name": self.namespace,
            "k8s.pod.name": self.name,
            "k8s.pod.uid": self.uid,
            "k8s.pod.start_time": f"2026-01-02T03:04:{self.number:02}Z",
            "k8s.container.name": name,
            "container.id": container.id,
            "container.image.name": image,
            **({"container.image.tags": tags} if tags else {}),
            **{key: value.format(self.number) for key, value in self.owners.items()},
            "service.name": f"annotated{self.number}" if annotated else self.service.format(self.number),
            "service.namespace": "elsewhere" if annotated else self.namespace,
            "service.version": "9" if annotated else version,
            "service.instance.id": f"{self.namespace}.{self.name}.{name}",
            **({"team": "blue"} if annotated else {}),
        }


def described(span: CollectedSpan) -> dict[str, object]:
    """What the span's resource says of pod, container, service and host."""
    about = ("k8s.", "service.", "container.", "host.", "team")
    return {key: value for key, value in span.resource.items() if key.startswith(about)}


def test_fifty_pods_are_complete(containers, api, in_cluster, serve, start, public_path: Path):
    """Every attribute of every container is what its pod says: all runtimes, owners, kinds of containers and images.

    Some pods are known before the agent starts, some before their processes do, some after their first requests.
    """
    workloads = [Workload(number, containers) for number in range(50)]
    ports: dict[int, tuple[Workload, str, Container]] = {}
    for workload in workloads:
        before = [("app", workload.restarted)] if workload.restarted else []
        ports |= {free_port(): (workload, *serving) for serving in [*before, *workload.main.items()]}
    target = free_port()  # what the short-lived clients call
    start(servers.python_threads(target, public_path).arguments, port=target)
    for workload in workloads[:20]:
        api.put(workload.thing(before_restart=True))
    tracing = in_cluster([*ports, target], {"kubernetes.wait_seconds": 30})
    for workload in workloads[20:35]:
        api.put(workload.thing(before_restart=True))
    clients: dict[int, tuple[Workload, str, Container]] = {}
    declared: dict[int, str] = {}
    for workload in workloads:
        for name, container in {**workload.init, **workload.ephemeral}.items():
            number = len(clients)
            clients[number] = workload, name, container
            assert start(container.enter(fetch(target, number))).popen.wait(20) == 0
        for port, (_, name, container) in (
            (port, serving) for port, serving in ports.items() if serving[0] is workload
        ):
            if name == "sidecar":  # nginx overwrites its environment, Python does not
                declared[port] = f"declared{port}"
                serve(container.wrap(servers.python_threads(port, public_path)), port, declared[port])
            else:
                serve(container.wrap(servers.nginx(port, public_path)), port)
            ask(port)
        if workload.number >= 35 or workload.restarted is not None:
            api.put(workload.thing())
    tracing.wait_for_spans(len(clients), port=target, kind="CLIENT", timeout_seconds=60)
    for port, (workload, name, container) in ports.items():
        expected = workload.resource(name, container)
        if port in declared:
            expected["service.name"] = declared[port]
        span = one(tracing.wait_for_spans(1, port=port, kind="SERVER"))
        assert described(span) == expected, f"pod {workload.number}, {container.path}"
    for span in tracing.spans(target, "CLIENT"):
        workload, name, container = clients.pop(number_of(span))
        assert described(span) == workload.resource(name, container), f"pod {workload.number}, {container.path}"
    assert not clients
    assert {*LAYOUTS} == {list(LAYOUTS)[workload.number % len(LAYOUTS)] for workload in workloads}
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_pods"] == 50
    assert metrics["spanloom_kube_spans_without_pod_total"] == 0


def test_ended_processes_of_all_layouts(containers, api, in_cluster, start, public_path: Path):
    """The agent looks when everything is over: the kernel's number of the cgroup tells the container all the same."""
    port = free_port()
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 20})
    start(servers.python_threads(port, public_path).arguments, port=port)
    expected = {}
    with stopped(tracing):
        for number, layout in enumerate(LAYOUTS):
            uid = str(uuid.uuid4())
            container = containers(uid, layout)
            api.put(make_pod(f"short-{number}", "shop", NODE, {"app": container.id}, uid=uid))
            assert start(container.enter(fetch(port, number))).popen.wait(20) == 0
            expected[number] = (layout, f"short-{number}", container.id)
    spans = tracing.wait_for_spans(len(LAYOUTS), port=port, kind="CLIENT")
    found = {number_of(span): span.resource for span in spans}
    assert {
        number: (layout, found[number].get("k8s.pod.name"), found[number].get("container.id"))
        for number, (layout, _, _) in expected.items()
    } == expected


CHURN = """
echo $$ > "$0"
curl -q -s -o /dev/null "$1/status/200?number=$2"
curl -q -s -o /dev/null "$1/status/404?number=$3"
exec curl -q -s -o /dev/null "$1/status/200?number=$4"
"""


def test_two_hundred_pods_in_a_minute(containers, api, in_cluster, start, public_path: Path):
    """Each pod's few requests are its own, made by processes that end at once; cgroup and pod are removed right then.

    Some are known before their first request, some are without the container's id until it has ended, as the kubelet
    is late, and some are told of only when all is over. Nothing of them stays: neither pods nor memory.
    """
    port = free_port()
    tracing = in_cluster([port], {"kubernetes.wait_seconds": 20})
    start(servers.python_threads(port, public_path).arguments, port=port)
    staying = containers(str(uuid.uuid4()))
    api.put(make_pod("staying", "shop", NODE, {"app": staying.id}))
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 1, tracing.state)
    expected: dict[int, tuple[str, str, str]] = {}

    def live(number: int) -> None:
        """One pod from its beginning to its end."""
        uid, name = str(uuid.uuid4()), f"job-{number}"
        container = containers(uid, list(LAYOUTS)[number % len(LAYOUTS)])
        pod = make_pod(name, "churn", NODE, {"app": container.id}, uid=uid, owner=("Job", name))
        if number % 3 == 0:
            api.put(pod)
        elif number % 3 == 1:
            api.put(make_pod(name, "churn", NODE, {"app": None}, uid=uid, owner=("Job", name), phase="Pending"))
        numbers = [3 * number + index for index in range(3)]
        expected.update(dict.fromkeys(numbers, (name, uid, container.id)))
        program = ["sh", "-c", CHURN, container.path / "cgroup.procs", f"http://127.0.0.1:{port}", *map(str, numbers)]
        assert start(program).popen.wait(30) == 0
        if number % 3:
            api.put(pod)
        api.delete("churn", name)
        container.remove()

    def churn(numbers: range) -> int:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(live, number) for number in numbers]:
                done.result()
        tracing.wait_for_spans(3 * numbers.stop, 60, port=port, kind="CLIENT")
        tracing.settle()
        return rss_bytes(tracing)

    warm = churn(range(100))
    began = time.monotonic()
    grown = churn(range(100, 300)) - warm
    assert time.monotonic() - began < 60, "200 pods within a minute"
    wrong = []
    for span in tracing.spans(port, "CLIENT"):
        resource, own = span.resource, expected.pop(number_of(span))
        said = tuple(resource.get(key) for key in ("k8s.pod.name", "k8s.pod.uid", "container.id"))
        if said != own or resource["service.name"] != own[0]:
            wrong.append((own, said, show([span])))
    assert not wrong, f"{len(wrong)} spans: {wrong[:5]}"
    assert not expected
    wait_until(lambda: tracing.metrics()["spanloom_kube_pods"] == 1, tracing.state)
    metrics = tracing.metrics()
    assert metrics["spanloom_kube_spans_without_pod_total"] == metrics["spanloom_kube_spans_held"] == 0
    print(f"RSS: {warm / 1e6:.1f} MB after 100 pods, {grown / 1e6:+.1f} MB after 200 more")
    assert grown < 10e6, f"{grown / 1e6:.1f} MB more after 200 pods"


def fetch(port: int, number: int) -> list[str | Path]:
    return ["curl", "-q", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number={number}"]


def rss_bytes(tracing: AgentProcess) -> int:
    lines = Path(f"/proc/{tracing.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
