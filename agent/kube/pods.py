"""Pods: what the API server says of them, the resource attributes that follow from it, and an index to find them by.

In: JSON objects of kind Pod (v1), and ``ContainerRef`` from the cgroup of a process. Out: ``Pod`` records and resource
attributes. Never: talks to the API server, reads a clock, keeps an annotation that nobody asks for (250 pods with a
``last-applied-configuration`` each would cost more than everything else), or takes one pod for another.

Rules for the attributes: OpenTelemetry semantic conventions, page "Specify resource attributes using Kubernetes
annotations". The reader, the rules and the index stand together: they alone know what the fields of ``Pod`` hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from agent.kube.cgroups import ContainerRef
from agent.model import Attributes
from agent.process import parse_resource_attributes

TRACE_ANNOTATION = "spanloom.io/trace"
RESOURCE_PREFIX = "resource.opentelemetry.io/"
"""A pod annotation ``resource.opentelemetry.io/<key>`` is the resource attribute ``<key>``."""

_MIRROR = "kubernetes.io/config.mirror"
_OWN_PREFIX = "spanloom.io/"

# Bounds on one pod, far above what the API server lets through or a node can run. What is over is left out, a longer
# text is cut.
_CONTAINERS = 256
_PAIRS = 256
_ANNOTATIONS = 64
_LIST_ITEMS = 16
_PREVIOUS_IDS = 2
_TEXT_CHARS = 1024

# Container ids that are remembered of one pod beyond those in its latest version.
_FORMER_IDS = 16


class Container(msgspec.Struct, frozen=True, gc=False):
    """A container of a pod.

    ``id`` has no scheme in front and is empty before the container started. ``image`` is the reference as the pod
    names it, ``image_id`` what the runtime made of it. ``kind`` is "container", "init" or "ephemeral".
    ``previous_ids`` are those from before the last restart.
    """

    name: str
    id: str = ""
    image: str = ""
    image_id: str = ""
    kind: str = "container"
    restart_count: int = 0
    previous_ids: tuple[str, ...] = ()


class Owner(msgspec.Struct, frozen=True, gc=False):
    """An entry of ``ownerReferences``."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool


class Pod(msgspec.Struct, frozen=True, gc=False):
    """A pod.

    ``start_time`` is RFC 3339 as the API writes it, empty until the kubelet has seen the pod. ``annotations`` hold only
    those that mean something here. ``config_hash`` is not empty for the mirror of a static pod: the cgroups of a static
    pod are named by this hash and not by ``uid``, which is that of the mirror.
    """

    uid: str
    namespace: str
    name: str
    node_name: str = ""
    start_time: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owners: tuple[Owner, ...] = ()
    host_network: bool = False
    ips: tuple[str, ...] = ()
    containers: tuple[Container, ...] = ()
    is_static: bool = False
    config_hash: str = ""


# ---- The API's object -> Pod


def read_pod(item: object) -> Pod:
    """The pod in a JSON object of the API. What is missing or malformed in it is as if absent.

    Raises ValueError when ``metadata`` does not tell which pod it is.
    """
    metadata, spec, status = (_map(_map(item).get(part)) for part in ("metadata", "spec", "status"))
    identity = [_text(metadata.get(key)) for key in ("uid", "namespace", "name")]
    if not all(identity):
        raise ValueError("a pod needs metadata.uid, metadata.namespace and metadata.name, each a text")
    annotations = _map(metadata.get("annotations"))
    config_hash = _text(annotations.get(_MIRROR))
    return Pod(
        *identity,
        node_name=_text(spec.get("nodeName")),
        start_time=_text(status.get("startTime")),
        labels=_pairs(metadata.get("labels"), _PAIRS, lambda key: True),
        annotations={
            # Apart, so that however many of the others cannot push "do not trace" over the bound.
            **_pairs(annotations, _ANNOTATIONS, lambda key: key.startswith(_OWN_PREFIX)),
            **_pairs(annotations, _ANNOTATIONS, lambda key: key.startswith(RESOURCE_PREFIX)),
        },
        owners=tuple(
            Owner(
                _text(owner.get("apiVersion")),
                _text(owner.get("kind")),
                _text(owner.get("name")),
                _text(owner.get("uid")),
                owner.get("controller") is True,
            )
            for owner in _maps(metadata.get("ownerReferences"), _LIST_ITEMS)
        ),
        host_network=spec.get("hostNetwork") is True,
        ips=_ips(status),
        containers=tuple(_containers(spec, status)),
        is_static=config_hash != "",
        config_hash=config_hash,
    )


def _map(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _maps(value: object, limit: int) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value[:limit] if isinstance(item, dict))


def _text(value: object) -> str:
    return value[:_TEXT_CHARS] if isinstance(value, str) else ""


def _pairs(value: object, limit: int, wanted: Callable[[str], bool]) -> dict[str, str]:
    """The texts of a map of labels or annotations."""
    pairs: dict[str, str] = {}
    for key, text in _map(value).items():
        if isinstance(key, str) and isinstance(text, str) and len(key) <= _TEXT_CHARS and wanted(key):
            if len(pairs) >= limit:
                break
            pairs[key] = text[:_TEXT_CHARS]
    return pairs


def _ips(status: dict[str, Any]) -> tuple[str, ...]:
    listed = (_text(item.get("ip")) for item in _maps(status.get("podIPs"), _LIST_ITEMS))
    return tuple(dict.fromkeys(ip for ip in (_text(status.get("podIP")), *listed) if ip))


def _containers(spec: dict[str, Any], status: dict[str, Any]) -> Iterator[Container]:
    """First the containers that serve; each from its part of ``spec``, and of ``status`` once the kubelet wrote one."""
    for kind, spec_key, status_key in (
        ("container", "containers", "containerStatuses"),
        ("init", "initContainers", "initContainerStatuses"),
        ("ephemeral", "ephemeralContainers", "ephemeralContainerStatuses"),
    ):
        parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for item in _maps(spec.get(spec_key), _CONTAINERS):
            parts[_text(item.get("name"))] = (item, {})
        for item in _maps(status.get(status_key), _CONTAINERS):
            name = _text(item.get("name"))
            parts[name] = (parts[name][0] if name in parts else {}, item)
        for name, (wish, fact) in parts.items():
            if name:
                yield _container(name, kind, wish, fact)


def _container(name: str, kind: str, wish: dict[str, Any], fact: dict[str, Any]) -> Container:
    container_id = _without_scheme(_text(fact.get("containerID")))
    previous = (
        _without_scheme(_text(_map(_map(fact.get(state)).get("terminated")).get("containerID")))
        for state in ("lastState", "state")
    )
    restarts = fact.get("restartCount")
    return Container(
        name=name,
        id=container_id,
        # The status may show another name of the same image, or only its hash.
        image=_text(wish.get("image")) or _text(fact.get("image")),
        image_id=_text(fact.get("imageID")),
        kind=kind,
        restart_count=restarts if type(restarts) is int and 0 <= restarts < 2**31 else 0,
        previous_ids=tuple(dict.fromkeys(old for old in previous if old and old != container_id))[:_PREVIOUS_IDS],
    )


def _without_scheme(container_id: str) -> str:
    return container_id.rpartition("://")[2]


# ---- Pod -> attributes

# Kind of the owner -> its API groups. Other groups have kinds of the same name that are something else.
_GROUPS = {
    "ReplicaSet": ("apps", "extensions"),
    "StatefulSet": ("apps",),
    "DaemonSet": ("apps", "extensions"),
    "Job": ("batch",),
}
# A CronJob calls its jobs <name>-<minutes since 1970>, before Kubernetes 1.21 <name>-<seconds since 1970>. Digits that
# read as a date of this century are somebody's own naming: as minutes they were before there were CronJobs.
_SCHEDULED = re.compile(r"(.+)-(?!20[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01]))[0-9]{8,}")

_NAME_ORDER = ("deployment", "replicaset", "statefulset", "daemonset", "cronjob", "job")

# What the agent knows better than whoever writes annotations or sets an environment.
_FACTS = frozenset(("process.pid", "process.executable.name"))
_FACT_PREFIX = "telemetry.sdk."


def workload(pod: Pod) -> tuple[tuple[str, str], ...]:
    """The ``k8s.<kind>.name`` attributes of what controls the pod, the nearest last. Bare and static pods have none.

    A Deployment and a CronJob do not own pods themselves: they are told from how they name what they own.
    """
    owner = next((owner for owner in pod.owners if owner.controller), None)
    if owner is None or not owner.name or owner.kind not in _GROUPS:
        return ()
    group, separator, _ = owner.api_version.partition("/")
    if owner.api_version and (not separator or group not in _GROUPS[owner.kind]):
        return ()
    own = (f"k8s.{owner.kind.lower()}.name", owner.name)
    if owner.kind == "ReplicaSet":
        template_hash = pod.labels.get("pod-template-hash")
        deployment, _, suffix = owner.name.rpartition("-")
        if template_hash and suffix == template_hash and deployment:
            return ("k8s.deployment.name", deployment), own
    elif owner.kind == "Job" and (match := _SCHEDULED.fullmatch(owner.name)):
        return ("k8s.cronjob.name", match[1]), own
    return (own,)


def pod_attributes(
    pod: Pod,
    container: Container | None,
    *,
    environment: Mapping[str, str] | None = None,
    declared: Mapping[str, str] | None = None,
    node_name: str,
    cluster_name: str,
    use_labels: bool,
) -> Attributes:
    """The resource attributes of a process in ``container`` of ``pod``; each key once, always in the same order.

    They are meant to be laid over those that are known of the process alone. ``environment`` is that of the container:
    ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` count; whoever has read them already gives ``declared``, the
    resource attributes in them, instead. ``container`` is None while it is not known which it is; then there is no
    ``service.instance.id``, as it would be the same for all containers of the pod.

    First value that exists: what the container declares, the annotation, what follows from the pod. Neither of the
    first two can change what the API server says (``k8s.*``, ``container.*``), or what the agent knows of the process.
    """
    name, tag, digest = _image_parts(container.image) if container is not None else ("", "", "")
    owners = workload(pod)
    facts: dict[str, str | tuple[str, ...]] = {
        "k8s.cluster.name": cluster_name,
        "k8s.node.name": pod.node_name or node_name,
        "k8s.namespace.name": pod.namespace,
        "k8s.pod.name": pod.name,
        "k8s.pod.uid": pod.uid,
        "k8s.pod.start_time": pod.start_time,
        **dict(owners),
        "k8s.container.name": container.name if container is not None else "",
        "container.id": container.id if container is not None else "",
        "container.image.name": name,
        "container.image.tags": (tag,) if tag else (),
    }
    own = dict(declared) if declared is not None else _declared(environment or {})
    annotated = {
        key.removeprefix(RESOURCE_PREFIX): value
        for key, value in pod.annotations.items()
        if key.startswith(RESOURCE_PREFIX) and key != RESOURCE_PREFIX
    }
    derived = {
        "service.name": _service_name(pod, owners, use_labels),
        "service.namespace": pod.namespace,
        "service.version": (use_labels and pod.labels.get("app.kubernetes.io/version")) or _version(tag, digest),
        "service.instance.id": f"{pod.namespace}.{pod.name}.{container.name}" if container is not None else "",
    }
    attributes: dict[str, str | tuple[str, ...]] = {}
    for key, value in derived.items():
        if chosen := own.pop(key, "") or annotated.pop(key, "") or value:
            attributes[key] = chosen
        annotated.pop(key, None)
    attributes.update((key, value) for key, value in facts.items() if value)
    for source in (own, annotated):
        for key in sorted(source):
            if key not in attributes and key not in _FACTS and not key.startswith(_FACT_PREFIX):
                attributes[key] = source[key]
    return tuple(attributes.items())


def _declared(environment: Mapping[str, str]) -> dict[str, str]:
    declared = parse_resource_attributes(environment.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    if name := environment.get("OTEL_SERVICE_NAME", "").strip():
        declared["service.name"] = name[:_TEXT_CHARS]
    return declared


def _service_name(pod: Pod, owners: tuple[tuple[str, str], ...], use_labels: bool) -> str:
    if use_labels:
        for label in ("app.kubernetes.io/instance", "app.kubernetes.io/name"):
            if name := pod.labels.get(label):
                return name
    names = dict(owners)
    return next((names[key] for kind in _NAME_ORDER if (key := f"k8s.{kind}.name") in names), pod.name)


def _version(tag: str, digest: str) -> str:
    return f"{tag}@{digest}" if tag and digest else digest or tag


def _image_parts(image: str) -> tuple[str, str, str]:
    """Name with registry, tag and digest of an image reference. Without tag and digest, ``latest`` is what is run."""
    reference, _, digest = image.partition("@")
    if reference.startswith("sha256:"):
        return "", "", reference  # the id of an image, not a name
    directory, slash, last = reference.rpartition("/")  # a colon before the last slash belongs to the registry's port
    last, _, tag = last.partition(":")
    name = directory + slash + last
    return name, tag or ("" if digest or not name else "latest"), digest


# ---- The index


class PodIndex:
    """The pods of the node, by container and by pod.

    One thread writes (``replace``, ``put``, ``remove``), any others read (``find``, ``pods``, ``generation``) without a
    lock. That is safe in CPython because readers only call ``dict.get`` with text keys, which runs to its end before
    another thread does (and locks the dictionary in builds without the GIL); they never iterate, and each value they
    get is a finished, frozen record. Writers put new entries in before they take old ones out, so that a pod which
    stays is found at any time. ``generation`` moves after the change is in place: whoever sees the new number sees the
    change.

    A removed pod stays findable, as the spans of its last requests come later: until ``grace_pods`` further pods were
    removed. Of a container that restarted, the last 16 ids of its pod are remembered while the pod is. A pod is its
    uid: one that is created again under the same name is another one and shares nothing with it.
    """

    def __init__(self, grace_pods: int = 1024) -> None:
        self._grace_pods = max(0, grace_pods)
        # For readers:
        self._by_uid: dict[str, Pod] = {}
        self._by_hash: dict[str, Pod] = {}
        self._by_container: dict[str, tuple[Pod, Container]] = {}
        # For the writer alone:
        self._ids: dict[str, dict[str, Container]] = {}
        self._removed: dict[str, None] = {}
        self.pods = 0
        self.generation = 0

    def replace(self, items: Iterable[Pod]) -> None:
        """These are all pods there are now. Those that are not among them are removed."""
        listed = {pod.uid: pod for pod in items}
        changed = [self._put(pod) for pod in listed.values()]
        changed += [self._remove(uid) for uid in list(self._by_uid) if uid not in listed]
        self._changed(any(changed))

    def put(self, pod: Pod) -> None:
        """A pod is new or has changed."""
        self._changed(self._put(pod))

    def remove(self, uid: str) -> None:
        """A pod is gone. One that is not known is ignored."""
        self._changed(self._remove(uid))

    def find(self, ref: ContainerRef) -> tuple[Pod, Container | None] | None:
        """The pod and container that ``ref`` names; the container is None while the pod is known and it is not.

        A container of before a restart comes with the id that it had.
        """
        entry = self._by_container.get(ref.container_id)
        if entry is not None and (not ref.pod_uid or ref.pod_uid in (entry[0].uid, entry[0].config_hash)):
            return entry
        if not ref.pod_uid:
            return None
        pod = self._by_uid.get(ref.pod_uid) or self._by_hash.get(ref.pod_uid)
        return (pod, None) if pod is not None else None

    def _put(self, pod: Pod) -> bool:
        uid = pod.uid
        if self._by_uid.get(uid) == pod and uid not in self._removed:
            return False
        before = self._ids.get(uid, {})
        current: dict[str, Container] = {}
        for container in pod.containers:
            for former_id in container.previous_ids:
                current[former_id] = before.get(former_id) or msgspec.structs.replace(
                    container, id=former_id, previous_ids=()
                )
        for container in pod.containers:
            if container.id:
                current[container.id] = container
        former = [(key, container) for key, container in before.items() if key not in current]
        ids = {**dict(former[-_FORMER_IDS:]), **current}
        known = self._by_uid.get(uid)
        self._by_uid[uid] = pod
        if pod.config_hash:
            self._by_hash[pod.config_hash] = pod
        for container_id, container in ids.items():
            self._by_container[container_id] = (pod, container)
        for container_id in before:
            if container_id not in ids:
                self._forget_container(container_id, uid)
        if known is not None and known.config_hash != pod.config_hash:
            self._forget_hash(known)
        self._ids[uid] = ids
        self._removed.pop(uid, None)
        return True

    def _remove(self, uid: str) -> bool:
        if uid not in self._by_uid or uid in self._removed:
            return False
        self._removed[uid] = None
        while len(self._removed) > self._grace_pods:
            self._forget(next(iter(self._removed)))
        return True

    def _forget(self, uid: str) -> None:
        del self._removed[uid]
        pod = self._by_uid.pop(uid)
        self._forget_hash(pod)
        for container_id in self._ids.pop(uid):
            self._forget_container(container_id, uid)

    def _forget_container(self, container_id: str, uid: str) -> None:
        """Unless it belongs to another pod by now: a mirror pod that was made again has the same containers."""
        entry = self._by_container.get(container_id)
        if entry is not None and entry[0].uid == uid:
            del self._by_container[container_id]

    def _forget_hash(self, pod: Pod) -> None:
        known = self._by_hash.get(pod.config_hash)
        if known is not None and known.uid == pod.uid:
            del self._by_hash[pod.config_hash]

    def _changed(self, changed: bool) -> None:
        if changed:
            self.pods = len(self._by_uid) - len(self._removed)
            self.generation += 1
