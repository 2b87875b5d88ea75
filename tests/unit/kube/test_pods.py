"""Pods: reading the API's objects, workloads, resource attributes and their precedence, and the index."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import container_attributes, k8s_attributes, service_attributes

from agent.kube.cgroups import ContainerRef, container_of
from agent.kube.pods import Container, Owner, Pod, PodIndex, pod_attributes, read_pod, workload
from agent.model import Attributes

UID = "2ca4a155-3599-498d-bb9d-4446693fa3ea"
OTHER_UID = "91a8fc3a-0ecf-48b4-81bf-78a7275d348c"
HASH = "7a1e3c5f9b2d4068a1c3e5f708192a3b"
WEB_ID, OLD_ID, PROXY_ID, SETUP_ID, DEBUG_ID = (digit * 64 for digit in "12345")
DIGEST = "sha256:" + "e" * 64

ITEM = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "uid": UID,
        "namespace": "shop",
        "name": "cart-6d4cf56db6-x2x7q",
        "labels": {"app": "cart", "pod-template-hash": "6d4cf56db6"},
        "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": "{" * 10_000,
            "resource.opentelemetry.io/service.version": "7.1",
            "spanloom.io/trace": "true",
        },
        "ownerReferences": [
            {"apiVersion": "example.org/v1", "kind": "Watcher", "name": "w", "uid": "u-w"},
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "name": "cart-6d4cf56db6",
                "uid": "u-rs",
                "controller": True,
                "blockOwnerDeletion": True,
            },
        ],
    },
    "spec": {
        "nodeName": "node-1",
        "hostNetwork": True,
        "initContainers": [{"name": "setup", "image": "busybox"}],
        "containers": [
            {"name": "web", "image": "registry.example.org:5000/shop/cart:1.4.2"},
            {"name": "proxy", "image": f"proxy@{DIGEST}"},
            {"name": "late", "image": "late:1"},
        ],
        "ephemeralContainers": [{"name": "debugger", "image": "tools:2"}],
    },
    "status": {
        "phase": "Running",
        "startTime": "2026-03-01T10:00:00Z",
        "podIP": "10.1.0.7",
        "podIPs": [{"ip": "10.1.0.7"}, {"ip": "fd00::7"}],
        "initContainerStatuses": [
            {"name": "setup", "containerID": f"containerd://{SETUP_ID}", "restartCount": 0, "image": "busybox:latest"}
        ],
        "containerStatuses": [
            {
                "name": "proxy",
                "containerID": f"cri-o://{PROXY_ID}",
                "image": "sha256:77",
                "imageID": f"proxy@{DIGEST}",
                "restartCount": 0,
            },
            {
                "name": "web",
                "containerID": f"containerd://{WEB_ID}",
                "image": "registry.example.org:5000/shop/cart:same-image-other-tag",
                "imageID": f"registry.example.org:5000/shop/cart@{DIGEST}",
                "restartCount": 3,
                "lastState": {"terminated": {"containerID": f"containerd://{OLD_ID}", "exitCode": 137}},
                "state": {"running": {"startedAt": "2026-03-01T10:00:05Z"}},
            },
            {"name": "late", "state": {"waiting": {"reason": "ContainerCreating"}}, "restartCount": 0},
        ],
        "ephemeralContainerStatuses": [{"name": "debugger", "containerID": f"docker://{DEBUG_ID}"}],
    },
}

# ---- Reading


def test_a_pod_is_read_whole() -> None:
    """Every field; init and ephemeral containers, one that has not started yet, one that restarted."""
    assert read_pod(ITEM) == Pod(
        uid=UID,
        namespace="shop",
        name="cart-6d4cf56db6-x2x7q",
        node_name="node-1",
        start_time="2026-03-01T10:00:00Z",
        labels={"app": "cart", "pod-template-hash": "6d4cf56db6"},
        annotations={"resource.opentelemetry.io/service.version": "7.1", "spanloom.io/trace": "true"},
        owners=(
            Owner("example.org/v1", "Watcher", "w", "u-w", False),
            Owner("apps/v1", "ReplicaSet", "cart-6d4cf56db6", "u-rs", True),
        ),
        host_network=True,
        ips=("10.1.0.7", "fd00::7"),
        containers=(
            Container(
                "web",
                WEB_ID,
                "registry.example.org:5000/shop/cart:1.4.2",
                f"registry.example.org:5000/shop/cart@{DIGEST}",
                restart_count=3,
                previous_ids=(OLD_ID,),
            ),
            Container("proxy", PROXY_ID, f"proxy@{DIGEST}", f"proxy@{DIGEST}"),
            Container("late", "", "late:1"),
            Container("setup", SETUP_ID, "busybox", kind="init"),
            Container("debugger", DEBUG_ID, "tools:2", kind="ephemeral"),
        ),
    )


def test_a_pod_that_was_just_created_is_read() -> None:
    """Not scheduled, no status: what is there is used."""
    pod = read_pod(
        {
            "metadata": {"uid": UID, "namespace": "shop", "name": "cart"},
            "spec": {"containers": [{"name": "web", "image": "a"}]},
        }
    )
    assert pod == Pod(UID, "shop", "cart", containers=(Container("web", image="a"),))


def test_a_mirror_pod_is_known_as_static() -> None:
    """Its annotation is the hash that names the cgroups."""
    item = {
        "metadata": {
            "uid": UID,
            "namespace": "kube-system",
            "name": "etcd-node-1",
            "annotations": {"kubernetes.io/config.mirror": HASH, "kubernetes.io/config.source": "file"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "n", "controller": True}],
        }
    }
    pod = read_pod(item)
    assert (pod.is_static, pod.config_hash, workload(pod)) == (True, HASH, ())


def test_a_container_that_ended_for_good_keeps_its_id() -> None:
    """state.terminated names the same container as containerID does."""
    status = {"name": "web", "containerID": "a://1", "state": {"terminated": {"containerID": "a://1"}}}
    (container,) = read_pod(with_status({"containerStatuses": [status]})).containers
    assert (container.id, container.previous_ids) == ("1", ())


def test_a_container_waiting_for_its_restart_is_known_by_the_one_before() -> None:
    """Some runtimes leave containerID empty then."""
    status = {"name": "web", "containerID": "", "lastState": {"terminated": {"containerID": "a://1"}}}
    (container,) = read_pod(with_status({"containerStatuses": [status]})).containers
    assert (container.id, container.previous_ids) == ("", ("1",))


def with_status(status: object) -> dict[str, object]:
    return {"metadata": {"uid": UID, "namespace": "shop", "name": "cart"}, "status": status}


@pytest.mark.parametrize(
    "item",
    [
        None,
        [],
        {},
        {"metadata": None},
        {"metadata": {"uid": UID, "namespace": "shop"}},
        {"metadata": {"uid": UID, "name": "cart"}},
        {"metadata": {"namespace": "shop", "name": "cart"}},
        {"metadata": {"uid": 7, "namespace": "shop", "name": "cart"}},
        {"metadata": {"uid": UID, "namespace": ["shop"], "name": "cart"}},
        {"metadata": {"uid": UID, "namespace": "shop", "name": ""}},
    ],
)
def test_a_pod_without_identity_is_refused(item: object) -> None:
    """The only error of the reader."""
    with pytest.raises(ValueError, match=r"metadata\.uid, metadata\.namespace and metadata\.name"):
        read_pod(item)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


def paths(value: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [prefix] if prefix else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += paths(child, (*prefix, key))
    return found


@given(st.lists(st.tuples(st.sampled_from(paths(ITEM)), JSON), min_size=1, max_size=4))
def test_a_pod_with_any_part_replaced_by_anything_is_read(changes: list[tuple[tuple[str | int, ...], object]]) -> None:
    """It is a pod of the declared types, or the one error; attributes and index take it."""
    item = json.loads(json.dumps(ITEM))
    for path, value in changes:
        parent = item
        try:
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    try:
        pod = read_pod(item)
    except ValueError:
        return
    assert msgspec.convert(msgspec.to_builtins(pod), Pod) == pod
    for container in (None, *pod.containers):
        check_attributes(attributes_of(pod, container))
    index = PodIndex()
    index.put(pod)
    assert index.find(ContainerRef("", pod.uid)) == (pod, None)


def test_a_huge_pod_stays_small() -> None:
    """Lists, maps and texts are bounded, whatever the API server lets through."""
    long = "x" * 100_000
    many = [{"name": f"c{number}", "image": long, "containerID": f"a://{number}"} for number in range(5000)]
    pairs = {f"resource.opentelemetry.io/k{number}": long for number in range(5000)}
    item = {
        "metadata": {
            "uid": UID,
            "namespace": "shop",
            "name": "cart",
            "labels": {**pairs, long: "x"},
            "annotations": pairs,
            "ownerReferences": [{"kind": long, "name": long}] * 5000,
        },
        "spec": {"containers": many, "nodeName": long},
        "status": {"containerStatuses": many, "podIPs": [{"ip": str(number)} for number in range(5000)]},
    }
    pod = read_pod(item)
    assert len(msgspec.json.encode(pod)) < 2_000_000
    assert (len(pod.labels), len(pod.annotations), len(pod.containers)) == (256, 64, 256)
    assert (len(pod.ips), len(pod.owners)) == (16, 16)


def test_other_annotations_cannot_hide_that_a_pod_is_not_to_be_traced() -> None:
    """The bound on resource annotations is apart from that on ours."""
    annotations = {f"resource.opentelemetry.io/k{number}": "x" for number in range(500)}
    annotations["spanloom.io/trace"] = "false"
    item = {"metadata": {"uid": UID, "namespace": "shop", "name": "cart", "annotations": annotations}}
    assert read_pod(item).annotations["spanloom.io/trace"] == "false"


# ---- Workloads


def owned(kind: str, name: str, api_version: str = "apps/v1", controller: bool = True, **labels: str) -> Pod:
    pairs = {key.replace("_", "-"): value for key, value in labels.items()}
    return Pod(UID, "shop", "p-1", labels=pairs, owners=(Owner(api_version, kind, name, "u", controller),))


RS = ("k8s.replicaset.name", "cart-6d4cf56db6")
WORKLOADS = {
    "deployment": (
        owned("ReplicaSet", "cart-6d4cf56db6", pod_template_hash="6d4cf56db6"),
        (("k8s.deployment.name", "cart"), RS),
    ),
    "deployment with dashes": (
        owned("ReplicaSet", "my-cart-v2-abc", pod_template_hash="abc"),
        (("k8s.deployment.name", "my-cart-v2"), ("k8s.replicaset.name", "my-cart-v2-abc")),
    ),
    "replica set of its own": (owned("ReplicaSet", "cart-6d4cf56db6"), (RS,)),
    "replica set with another hash": (owned("ReplicaSet", "cart-6d4cf56db6", pod_template_hash="56db6"), (RS,)),
    "replica set named by the hash only": (
        owned("ReplicaSet", "-abc", pod_template_hash="abc"),
        (("k8s.replicaset.name", "-abc"),),
    ),
    "replica set, empty hash": (
        owned("ReplicaSet", "cart-", pod_template_hash=""),
        (("k8s.replicaset.name", "cart-"),),
    ),
    "Argo Rollout": (owned("ReplicaSet", "cart-6d4cf56db6", rollouts_pod_template_hash="6d4cf56db6"), (RS,)),
    "stateful set": (owned("StatefulSet", "db"), (("k8s.statefulset.name", "db"),)),
    "daemon set": (owned("DaemonSet", "logs"), (("k8s.daemonset.name", "logs"),)),
    "daemon set, old group": (owned("DaemonSet", "logs", "extensions/v1beta1"), (("k8s.daemonset.name", "logs"),)),
    "group not told": (owned("DaemonSet", "logs", ""), (("k8s.daemonset.name", "logs"),)),
    "job": (owned("Job", "import", "batch/v1"), (("k8s.job.name", "import"),)),
    "cron job": (
        owned("Job", "report-29154321", "batch/v1"),
        (("k8s.cronjob.name", "report"), ("k8s.job.name", "report-29154321")),
    ),
    "cron job, old names": (
        owned("Job", "daily-report-1612345678", "batch/v1"),
        (("k8s.cronjob.name", "daily-report"), ("k8s.job.name", "daily-report-1612345678")),
    ),
    "job with a short number": (owned("Job", "import-1234567", "batch/v1"), (("k8s.job.name", "import-1234567"),)),
    "job with a date": (owned("Job", "import-20260314", "batch/v1"), (("k8s.job.name", "import-20260314"),)),
    "job with a date and time": (
        owned("Job", "import-202603140915", "batch/v1"),
        (("k8s.job.name", "import-202603140915"),),
    ),
    "job of digits only": (owned("Job", "29154321", "batch/v1"), (("k8s.job.name", "29154321"),)),
    "job with other digits": (owned("Job", "import-٢٩١٥٤٣٢١", "batch/v1"), (("k8s.job.name", "import-٢٩١٥٤٣٢١"),)),
    "job of another group": (owned("Job", "train", "batch.volcano.sh/v1alpha1"), ()),
    "stateful set of another group": (owned("StatefulSet", "db", "apps.kruise.io/v1beta1"), ()),
    "core group": (owned("ReplicationController", "rc", "v1"), ()),
    "kind in the core group": (owned("DaemonSet", "logs", "v1"), ()),
    "a node, for static pods": (owned("Node", "node-1", "v1"), ()),
    "an owner that does not control": (owned("DaemonSet", "logs", controller=False), ()),
    "a name that is missing": (owned("DaemonSet", ""), ()),
    "a bare pod": (Pod(UID, "shop", "p-1"), ()),
}


@pytest.mark.parametrize(("pod", "expected"), WORKLOADS.values(), ids=WORKLOADS.keys())
def test_the_workload_is_told_from_the_controlling_owner(pod: Pod, expected: tuple[tuple[str, str], ...]) -> None:
    """Deployments and CronJobs by how they name what they own; nothing is guessed beyond that."""
    assert workload(pod) == expected


# ---- Attributes


def attributes_of(
    pod: Pod,
    container: Container | None,
    environment: Mapping[str, str] | None = None,
    cluster_name: str = "",
    use_labels: bool = False,
) -> Attributes:
    return pod_attributes(
        pod,
        container,
        environment=environment or {},
        node_name="node-of-the-agent",
        cluster_name=cluster_name,
        use_labels=use_labels,
    )


def check_attributes(attributes: Attributes) -> None:
    """Each key once, values of the two types, nothing of the process."""
    keys = [key for key, _ in attributes]
    assert len(keys) == len(set(keys)) <= 200
    assert not {"process.pid", "process.executable.name", "telemetry.sdk.name"} & set(keys)
    for key, value in attributes:
        assert key
        assert type(value) is str or (type(value) is tuple and all(type(item) is str for item in value))


def test_a_container_of_a_deployment_has_every_attribute() -> None:
    """The list of the conventions, in a fixed order."""
    pod = read_pod(ITEM)
    assert attributes_of(pod, pod.containers[0], cluster_name="prod-1") == (
        ("service.name", "cart"),
        ("service.namespace", "shop"),
        ("service.version", "7.1"),
        ("service.instance.id", "shop.cart-6d4cf56db6-x2x7q.web"),
        ("k8s.cluster.name", "prod-1"),
        ("k8s.node.name", "node-1"),
        ("k8s.namespace.name", "shop"),
        ("k8s.pod.name", "cart-6d4cf56db6-x2x7q"),
        ("k8s.pod.uid", UID),
        ("k8s.pod.start_time", "2026-03-01T10:00:00Z"),
        ("k8s.deployment.name", "cart"),
        ("k8s.replicaset.name", "cart-6d4cf56db6"),
        ("k8s.container.name", "web"),
        ("container.id", WEB_ID),
        ("container.image.name", "registry.example.org:5000/shop/cart"),
        ("container.image.tags", ("1.4.2",)),
    )


def test_names_are_those_of_the_conventions() -> None:
    """Compared with the released package, for every workload."""
    modules = (container_attributes, k8s_attributes, service_attributes)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    for pod, _ in WORKLOADS.values():
        full = msgspec.structs.replace(pod, node_name="n", start_time="2026-03-01T10:00:00Z")
        for key, _ in attributes_of(full, Container("web", WEB_ID, "a:1"), cluster_name="c"):
            assert key in known


def test_a_container_that_is_not_known_leaves_out_what_depends_on_it() -> None:
    """No instance id, which all containers of the pod would share; the rest is there."""
    bare = Pod(UID, "shop", "cart")
    assert attributes_of(bare, None) == (
        ("service.name", "cart"),
        ("service.namespace", "shop"),
        ("k8s.node.name", "node-of-the-agent"),
        ("k8s.namespace.name", "shop"),
        ("k8s.pod.name", "cart"),
        ("k8s.pod.uid", UID),
    )


IMAGES = [
    ("nginx", "nginx", ("latest",), "latest"),
    ("nginx:1.27", "nginx", ("1.27",), "1.27"),
    ("library/nginx:1.27", "library/nginx", ("1.27",), "1.27"),
    ("registry:5000/nginx", "registry:5000/nginx", ("latest",), "latest"),
    ("registry:5000/a/b/nginx:1.27", "registry:5000/a/b/nginx", ("1.27",), "1.27"),
    (f"registry:5000/nginx:1.27@{DIGEST}", "registry:5000/nginx", ("1.27",), f"1.27@{DIGEST}"),
    (f"registry:5000/nginx@{DIGEST}", "registry:5000/nginx", None, DIGEST),
    (f"nginx@{DIGEST}", "nginx", None, DIGEST),
    ("[fd00::1]:5000/nginx:1", "[fd00::1]:5000/nginx", ("1",), "1"),
    (DIGEST, None, None, DIGEST),
    ("", None, None, None),
    (":", None, None, None),
    ("@", None, None, None),
    ("a/", "a/", ("latest",), "latest"),
]


@pytest.mark.parametrize(("image", "name", "tags", "version"), IMAGES)
def test_an_image_reference_is_taken_apart(
    image: str, name: str | None, tags: tuple[str, ...] | None, version: str | None
) -> None:
    """The port of a registry is no tag; without tag and digest it is ``latest``; version is tag@digest, digest, tag."""
    attributes = dict(attributes_of(Pod(UID, "shop", "cart"), Container("web", image=image)))
    assert attributes.get("container.image.name") == name
    assert attributes.get("container.image.tags") == tags
    assert attributes.get("service.version") == version


LABELS = {
    "app.kubernetes.io/instance": "label-instance",
    "app.kubernetes.io/name": "label-name",
    "app.kubernetes.io/version": "label-version",
}
ANNOTATIONS = {
    "resource.opentelemetry.io/service.name": "annotated",
    "resource.opentelemetry.io/service.namespace": "annotated-namespace",
    "resource.opentelemetry.io/service.version": "annotated-version",
    "resource.opentelemetry.io/service.instance.id": "annotated-id",
}
CRON = (Owner("batch/v1", "Job", "report-29154321", "u", True),)
DEPLOYED = {"pod-template-hash": "h"}
DEPLOYMENT = (Owner("apps/v1", "ReplicaSet", "cart-h", "u", True),)
DECLARES = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=declared"}

NAMES = [
    ("the variable", {"OTEL_SERVICE_NAME": " env ", **DECLARES}, True, LABELS, ANNOTATIONS, DEPLOYMENT, "env"),
    ("the attributes", DECLARES, True, LABELS, ANNOTATIONS, DEPLOYMENT, "declared"),
    ("an empty variable", {"OTEL_SERVICE_NAME": " ", **DECLARES}, True, LABELS, ANNOTATIONS, DEPLOYMENT, "declared"),
    ("an empty attribute", {"OTEL_RESOURCE_ATTRIBUTES": "service.name="}, True, LABELS, ANNOTATIONS, (), "annotated"),
    ("the annotation", {}, True, LABELS, ANNOTATIONS, DEPLOYMENT, "annotated"),
    ("an empty annotation", {}, False, {}, {"resource.opentelemetry.io/service.name": ""}, DEPLOYMENT, "cart-h"),
    ("the label instance", {}, True, LABELS, {}, DEPLOYMENT, "label-instance"),
    ("the label name", {}, True, {"app.kubernetes.io/name": "label-name"}, {}, DEPLOYMENT, "label-name"),
    ("labels only on request", {}, False, {**LABELS, **DEPLOYED}, {}, DEPLOYMENT, "cart"),
    ("the replica set", {}, False, {}, {}, DEPLOYMENT, "cart-h"),
    ("the stateful set", {}, False, {}, {}, (Owner("apps/v1", "StatefulSet", "db", "u", True),), "db"),
    ("the daemon set", {}, False, {}, {}, (Owner("apps/v1", "DaemonSet", "logs", "u", True),), "logs"),
    ("the cron job before the job", {}, False, {}, {}, CRON, "report"),
    ("the job", {}, False, {}, {}, (Owner("batch/v1", "Job", "import", "u", True),), "import"),
    ("the pod", {}, False, {}, {}, (), "p-1"),
]


@pytest.mark.parametrize(
    ("environment", "use_labels", "labels", "annotations", "owners", "expected"),
    [row[1:] for row in NAMES],
    ids=[row[0] for row in NAMES],
)
def test_the_first_service_name_that_exists_wins(
    environment: dict[str, str],
    use_labels: bool,
    labels: dict[str, str],
    annotations: dict[str, str],
    owners: tuple[Owner, ...],
    expected: str,
) -> None:
    """Environment, annotation, labels if wanted, workload, pod."""
    pod = Pod(UID, "shop", "p-1", labels=labels, annotations=annotations, owners=owners)
    attributes = attributes_of(pod, Container("web"), environment, use_labels=use_labels)
    check_attributes(attributes)
    assert dict(attributes)["service.name"] == expected


SERVICES = [
    ("service.namespace", {}, {}, "shop"),
    ("service.namespace", {}, ANNOTATIONS, "annotated-namespace"),
    ("service.namespace", {"OTEL_RESOURCE_ATTRIBUTES": "service.namespace=own"}, ANNOTATIONS, "own"),
    ("service.version", {}, {}, "label-version"),
    ("service.version", {}, ANNOTATIONS, "annotated-version"),
    ("service.version", {"OTEL_RESOURCE_ATTRIBUTES": "service.version=own"}, ANNOTATIONS, "own"),
    ("service.instance.id", {}, {}, "shop.p-1.web"),
    ("service.instance.id", {}, ANNOTATIONS, "annotated-id"),
    ("service.instance.id", {"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=own"}, ANNOTATIONS, "own"),
]


@pytest.mark.parametrize(("key", "environment", "annotations", "expected"), SERVICES)
def test_the_other_service_attributes_follow_the_same_order(
    key: str, environment: dict[str, str], annotations: dict[str, str], expected: str
) -> None:
    """What the container declares, the annotation, what follows from the pod."""
    pod = Pod(UID, "shop", "p-1", labels=LABELS, annotations=annotations)
    attributes = dict(attributes_of(pod, Container("web", image="a:1"), environment, use_labels=True))
    assert attributes[key] == expected


def test_the_version_label_counts_only_on_request() -> None:
    """Else it is the image's tag."""
    pod = Pod(UID, "shop", "p-1", labels=LABELS)
    assert dict(attributes_of(pod, Container("web", image="a:1")))["service.version"] == "1"


def test_annotations_and_declarations_become_attributes() -> None:
    """Sorted, behind the others; what the container declares wins over the annotation of the pod."""
    annotations = {
        "resource.opentelemetry.io/team": "payments",
        "resource.opentelemetry.io/deployment.environment.name": "prod",
        "resource.opentelemetry.io/empty": "",
        "resource.opentelemetry.io/": "no key",
        "spanloom.io/trace": "true",
    }
    environment = {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=dev,zone=a%20b", "SECRET": "x"}
    attributes = attributes_of(Pod(UID, "shop", "p-1", annotations=annotations), None, environment)
    assert attributes[-4:] == (
        ("deployment.environment.name", "dev"),
        ("zone", "a b"),
        ("empty", ""),
        ("team", "payments"),
    )
    assert len(attributes) == 10


def test_declarations_that_were_read_already_count_the_same() -> None:
    """``declared`` is what ``environment`` says, by attribute; it is not changed."""
    pod = Pod(UID, "shop", "p-1", annotations=ANNOTATIONS)
    environment = {"OTEL_SERVICE_NAME": "env", "OTEL_RESOURCE_ATTRIBUTES": "service.name=declared,zone=a%20b"}
    declared = {"service.name": "env", "zone": "a b"}
    common = {"node_name": "n", "cluster_name": "", "use_labels": False}
    attributes = pod_attributes(pod, Container("web"), declared=declared, **common)
    assert attributes == pod_attributes(pod, Container("web"), environment=environment, **common)
    assert dict(attributes)["service.name"] == "env"
    assert declared == {"service.name": "env", "zone": "a b"}


def test_nobody_can_declare_what_the_agent_knows() -> None:
    """A pod cannot pose as another one, nor a process."""
    lies = {
        "k8s.pod.uid": OTHER_UID,
        "k8s.namespace.name": "kube-system",
        "k8s.cluster.name": "other",
        "k8s.node.name": "other",
        "container.id": OLD_ID,
        "process.pid": "1",
        "process.executable.name": "init",
        "telemetry.sdk.name": "other",
    }
    pod = Pod(UID, "shop", "p-1", annotations={f"resource.opentelemetry.io/{key}": lie for key, lie in lies.items()})
    environment = {"OTEL_RESOURCE_ATTRIBUTES": ",".join(f"{key}={lie}" for key, lie in lies.items())}
    for attributes in (
        attributes_of(pod, Container("web", WEB_ID), cluster_name="prod-1"),
        attributes_of(Pod(UID, "shop", "p-1"), Container("web", WEB_ID), environment, cluster_name="prod-1"),
    ):
        check_attributes(attributes)
        assert not set(attributes) & set(lies.items())


def test_attributes_do_not_depend_on_the_order_of_annotations() -> None:
    """Two versions of a pod that say the same give equal tuples."""
    keys = [f"resource.opentelemetry.io/k{number}" for number in range(20)]
    one, other = (
        Pod(UID, "shop", "p", annotations=dict.fromkeys(order, "x")) for order in (keys, list(reversed(keys)))
    )
    assert attributes_of(one, None) == attributes_of(other, None)


# ---- The index


def running(uid: str, container_id: str, *, name: str = "cart", config_hash: str = "", **fields: object) -> Pod:
    container = Container("web", container_id, "cart:1", **fields)
    return Pod(uid, "shop", name, containers=(container,), is_static=bool(config_hash), config_hash=config_hash)


def index_of(*pods: Pod, grace_pods: int = 1024) -> PodIndex:
    index = PodIndex(grace_pods)
    for pod in pods:
        index.put(pod)
    return index


def test_a_process_is_found_from_its_cgroup_to_its_container() -> None:
    """The whole way, for each kind of container."""
    pod = read_pod(ITEM)
    index = index_of(pod)
    names = {WEB_ID: "web", PROXY_ID: "proxy", SETUP_ID: "setup", DEBUG_ID: "debugger"}
    for container_id, name in names.items():
        ref = container_of(f"0::/kubepods/burstable/pod{UID}/{container_id}\n")
        found = index.find(ref)
        assert found is not None
        assert (found[0], found[1].name, found[1].id) == (pod, name, container_id)


def test_a_container_of_before_the_restart_is_found_with_its_own_id() -> None:
    """Its spans come late and must not carry the id of the new one."""
    _, container = index_of(read_pod(ITEM)).find(ContainerRef(OLD_ID, UID))
    assert (container.name, container.id, container.previous_ids) == ("web", OLD_ID, ())


def test_a_container_that_the_status_does_not_show_yet_is_found_by_its_pod() -> None:
    """The sandbox, and a container in its first second; without the pod's uid there is nothing to go by."""
    pod = running(UID, "")
    index = index_of(pod)
    assert index.find(ContainerRef(WEB_ID, UID)) == (pod, None)
    assert index.find(ContainerRef(WEB_ID, "")) is None
    assert index.find(ContainerRef("", "")) is None
    index.put(running(UID, WEB_ID))
    assert index.find(ContainerRef(WEB_ID, ""))[1].name == "web"


def test_a_static_pod_is_found_by_the_hash_in_its_cgroup() -> None:
    """By container and, before the mirror pod has a status, by the hash."""
    pod = running(UID, WEB_ID, config_hash=HASH)
    index = index_of(pod)
    assert index.find(ContainerRef(WEB_ID, HASH)) == (pod, pod.containers[0])
    assert index.find(ContainerRef(OLD_ID, HASH)) == (pod, None)
    assert index.find(ContainerRef(OLD_ID, UID)) == (pod, None)


def test_a_mirror_pod_that_is_made_again_takes_over() -> None:
    """The containers stay, the uid of the mirror is another; the end of the old one takes nothing away."""
    old = running(UID, WEB_ID, config_hash=HASH)
    new = running(OTHER_UID, WEB_ID, config_hash=HASH)
    for order in ("new first", "old first"):
        index = index_of(old, grace_pods=0)
        if order == "new first":
            index.put(new)
            index.remove(UID)
        else:
            index.remove(UID)
            index.put(new)
        assert index.find(ContainerRef(WEB_ID, HASH)) == (new, new.containers[0])
        assert index.find(ContainerRef(OLD_ID, HASH)) == (new, None)
        assert index.find(ContainerRef(OLD_ID, UID)) is None
        assert index.pods == 1


def test_a_pod_that_is_made_again_under_its_name_is_another_one() -> None:
    """A StatefulSet's pod: the same name, a new uid; each finds its own, also after the first one is gone."""
    old, new = running(UID, OLD_ID, name="db-0"), running(OTHER_UID, WEB_ID, name="db-0")
    index = index_of(old)
    index.remove(UID)
    index.put(new)
    assert index.find(ContainerRef(OLD_ID, UID)) == (old, old.containers[0])
    assert index.find(ContainerRef(WEB_ID, OTHER_UID)) == (new, new.containers[0])
    assert index.find(ContainerRef(SETUP_ID, UID)) == (old, None)


def test_an_id_that_the_cgroup_puts_into_another_pod_is_not_believed() -> None:
    """The pod of the path decides: found there without its container, or not at all."""
    mine, other = running(UID, WEB_ID), running(OTHER_UID, OLD_ID)
    index = index_of(mine, other)
    assert index.find(ContainerRef(WEB_ID, OTHER_UID)) == (other, None)
    assert index.find(ContainerRef(WEB_ID, HASH)) is None


def test_a_removed_pod_stays_findable_for_a_grace() -> None:
    """So many further removals; then nothing of it is left."""
    index = PodIndex(grace_pods=3)
    pods = [running(f"u{number}", f"{number:064x}", config_hash=f"h{number}") for number in range(10)]
    for pod in pods:
        index.put(pod)
    for pod in pods[:5]:
        index.remove(pod.uid)
    assert index.pods == 5
    for number, pod in enumerate(pods):
        found = index.find(ContainerRef(f"{number:064x}", f"h{number}"))
        assert found == (None if number < 2 else (pod, pod.containers[0]))
    assert sizes(index) == (8, 8, 8, 8, 3)


def sizes(index: PodIndex) -> tuple[int, ...]:
    return tuple(map(len, (index._by_uid, index._by_hash, index._by_container, index._ids, index._removed)))


def test_memory_is_bounded_under_churn() -> None:
    """Many pods that come and go, containers that crash all the time: only the graces are kept."""
    index = PodIndex(grace_pods=10)
    for number in range(1000):
        index.put(running(f"u{number}", f"{number:064x}", config_hash=f"h{number}"))
        index.remove(f"u{number}")
    assert index.pods == 0
    assert sizes(index) == (10, 10, 10, 10, 10)
    for number in range(1000):
        index.put(running(UID, f"{number:#064x}", restart_count=number))
    assert len(index._ids[UID]) == len(index._by_container) - 10 == 17
    assert index.find(ContainerRef(f"{999:#064x}", UID))[1].restart_count == 999
    assert index.find(ContainerRef(f"{983:#064x}", UID))[1].restart_count == 983
    assert index.find(ContainerRef(f"{982:#064x}", UID))[1] is None


def test_a_former_container_comes_with_what_its_pod_is_now() -> None:
    """Labels and the image may change while late spans are on their way; the container is as it was."""
    index = index_of(running(UID, OLD_ID))
    now = Pod(
        UID,
        "shop",
        "cart",
        labels={"a": "b"},
        containers=(Container("web", WEB_ID, "cart:2", "", "container", 1, (OLD_ID,)),),
    )
    index.put(now)
    assert index.find(ContainerRef(OLD_ID, UID)) == (now, Container("web", OLD_ID, "cart:1"))


def test_a_list_replaces_everything() -> None:
    """What is not in it is removed, with the grace; what did not change is left alone."""
    stays, goes, comes = running("u1", "1" * 64), running("u2", "2" * 64), running("u3", "3" * 64)
    index = index_of(stays, goes, grace_pods=1)
    index.replace(iter([stays, comes]))
    assert index.pods == 2
    assert index.find(ContainerRef("2" * 64, "u2")) == (goes, goes.containers[0])
    index.replace([])
    assert (index.pods, sizes(index)) == (0, (1, 0, 1, 1, 1))
    index.replace([stays])
    assert index.pods == 1
    assert index.find(ContainerRef("1" * 64, "")) == (stays, stays.containers[0])


def test_a_list_that_breaks_off_changes_nothing() -> None:
    """The items may come from a reader that raises."""
    index = index_of(running("u1", "1" * 64))

    def items():
        yield running("u2", "2" * 64)
        raise ValueError("a pod needs metadata")

    with pytest.raises(ValueError, match="metadata"):
        index.replace(items())
    assert (index.pods, index.generation) == (1, 1)
    assert index.find(ContainerRef("2" * 64, "u2")) is None


def test_the_generation_moves_with_every_change_and_only_then() -> None:
    """Caches that depend on it stay valid through repeated lists and events without news."""
    index = PodIndex()
    pod, changed = running(UID, ""), running(UID, WEB_ID)
    steps = (
        (lambda: index.put(pod), True),
        (lambda: index.put(pod), False),
        (lambda: index.replace([pod]), False),
        (lambda: index.put(changed), True),
        (lambda: index.replace([pod]), True),
        (lambda: index.remove("unknown"), False),
        (lambda: index.remove(UID), True),
        (lambda: index.remove(UID), False),
        (lambda: index.replace([]), False),
        (lambda: index.put(pod), True),
        (lambda: index.replace([]), True),
    )
    for number, (step, moves) in enumerate(steps):
        before = index.generation
        step()
        assert (index.generation != before) is moves, number


def test_a_hash_that_is_no_longer_the_pods_does_not_find_it() -> None:
    """An annotation that was changed or taken away."""
    index = index_of(running(UID, WEB_ID, config_hash=HASH))
    index.put(running(UID, WEB_ID))
    assert index.find(ContainerRef(OLD_ID, HASH)) is None


def test_readers_always_find_a_pod_that_stays() -> None:
    """One thread writes lists, updates and removals, another reads: it never misses, never mixes, never fails."""
    stays = [running(UID, WEB_ID, restart_count=number, previous_ids=(OLD_ID,)) for number in range(2)]
    others = [running(f"u{number}", f"{number:064x}") for number in range(50)]
    index = index_of(stays[0], grace_pods=5)
    failures: list[object] = []
    done = threading.Event()
    rounds = 0

    def read() -> None:
        nonlocal rounds
        while not done.is_set():
            for ref in (ContainerRef(WEB_ID, UID), ContainerRef(OLD_ID, UID), ContainerRef(SETUP_ID, UID)):
                found = index.find(ref)
                if found is None or found[0].uid != UID or (ref.container_id != SETUP_ID and found[1] is None):
                    failures.append((ref, found))
            rounds += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        end = time.monotonic() + 0.5
        number = 0
        while time.monotonic() < end or rounds < 10:
            number += 1
            index.replace([*others, stays[number % 2]])
            index.remove(f"u{number % 50}")
            index.replace([stays[(number + 1) % 2]])
            index.put(stays[number % 2])
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert failures == []
