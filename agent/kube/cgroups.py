"""Which container a process runs in, told from its cgroup.

In: the text of ``/proc/<pid>/cgroup`` in any layout (v1, v2, hybrid), as seen from any cgroup namespace. Out: a
``ContainerRef``, or None for a process in no container. Never: reads a file, raises because of what the text holds, or
returns more than an id and a uid of bounded length.

Paths are read from the root down, and the first pod and the first container below it win: what stands further down was
made by the container itself (systemd, Docker, a whole kind cluster), which must not be able to pose as another pod.

Formats: the kubelet's ``pkg/kubelet/cm/cgroup_manager_linux.go`` and ``pod_container_manager_linux.go``; containerd's
"slice:prefix:name" (runc's systemd path, taken as a directory by its cgroupfs driver); CRI-O's and Podman's conmon.
"""

from __future__ import annotations

import re

import msgspec

# Bounds: what is behind them is as if absent. The kernel shows at most a dozen hierarchies, paths of 4 KiB each.
_TEXT_CHARS = 64 * 1024
_LINES = 64


class ContainerRef(msgspec.Struct, frozen=True, gc=False):
    """The container of a process.

    ``container_id`` is the runtime's id, 64 hexadecimal digits nearly always. ``pod_uid`` is the uid in the form of the
    API; empty when the path does not show it (no Kubernetes, or a cgroup namespace inside of the pod). For a static pod
    it is the hash of the manifest, which the mirror pod has in its annotation ``kubernetes.io/config.mirror``.
    """

    container_id: str
    pod_uid: str


def container_of(text: str) -> ContainerRef | None:
    """The container that the content of ``/proc/<pid>/cgroup`` tells, or None.

    A process has a path per hierarchy, and they may differ: one that shows a pod is preferred to one that shows only a
    container, then v2 and systemd's own hierarchy to the controllers of v1.
    """
    found: ContainerRef | None = None
    for path in _paths(text[:_TEXT_CHARS]):
        ref = _container_of_path(path)
        if ref is not None and ref.pod_uid:
            return ref
        found = found or ref
    return found


def _paths(text: str) -> list[str]:
    """The distinct paths of the file, the most trusted first."""
    ranked: dict[str, int] = {}
    for line in text.split("\n", _LINES)[:_LINES]:
        hierarchy, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")  # the path may hold colons itself
        if not separator or not path.startswith("/"):
            continue
        rank = 0 if hierarchy == "0" and not controllers else 1 if controllers == "name=systemd" else 2
        path = path.removesuffix(" (deleted)")
        ranked[path] = min(rank, ranked.get(path, rank))
    return sorted(ranked, key=ranked.__getitem__)


_UID = r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}"
_SURE_UID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9a-f]{32}"

# The systemd driver turns the dashes of a uid into underscores; a cgroup root puts its name in front (kind: kubelet-).
_POD_SLICE = re.compile(
    r"(?:[^:]*-)?kubepods(?:-burstable|-besteffort|-guaranteed)?-pod([0-9A-Za-z][0-9A-Za-z_.]{0,127})\.slice"
    r"(?::([^:]+):([^:]+))?"
)
# The cgroupfs driver. Seen from another cgroup namespace, kubepods and the QoS class may be missing in front: then only
# what looks like a uid is one. Below kubepods it may be any: the manifest of a static pod can set it.
_POD_DIRECTORY = re.compile(rf"pod({_UID})")
_SURE_POD_DIRECTORY = re.compile(rf"pod({_SURE_UID})")
_PODS_PARENT = re.compile(r"(?:.*-)?kubepods(?:-burstable|-besteffort|-guaranteed)?(?:\.slice)?")
_QOS = frozenset(("burstable", "besteffort", "guaranteed"))

_LONG_ID = r"[0-9a-f]{64}"
# Ids of other forms: UUIDs (rkt, Garden), 32 digits and a number (Fargate), shortened ones.
_OTHER_ID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9a-f]{32}-[0-9]{1,20}|[0-9a-f]{12,128}"
_RUNTIME = r"cri-containerd|containerd|crio|docker|libpod|libpod-payload|nerdctl"
_CONTAINER_IN_POD = re.compile(rf"(?:[a-z][a-z_.-]{{0,63}}[-_])?({_LONG_ID}|{_OTHER_ID})(?:\.scope)?")
_CONTAINER = re.compile(
    rf"(?:[a-z][a-z_.-]{{0,63}}-)?({_LONG_ID})(?:\.scope)?|(?:{_RUNTIME})-({_OTHER_ID})(?:\.scope)?"
)
_ID = re.compile(rf"{_LONG_ID}|{_OTHER_ID}")
_ECS_TASK = re.compile(r"[0-9a-f]{32}")


def _container_of_path(path: str) -> ContainerRef | None:
    components = path.split("/")[1:]
    for at, component in enumerate(components):
        uid, container_id = _pod(components, at, component)
        if uid:
            container_id = container_id or _container_below(components[at + 1 :])
            return ContainerRef(container_id, uid) if container_id else None
    return _container_without_pod(components)


def _pod(components: list[str], at: int, component: str) -> tuple[str, str]:
    """The pod's uid if this component is a pod's cgroup, and the container's id if it is named there, too."""
    if match := _POD_SLICE.fullmatch(component):
        prefix, container_id = match[2] or "", match[3] or ""
        if not _ID.fullmatch(container_id) or "conmon" in prefix:
            container_id = ""
        return match[1].replace("_", "-"), container_id
    if match := _SURE_POD_DIRECTORY.fullmatch(component):
        return match[1], ""
    if at > 0 and (match := _POD_DIRECTORY.fullmatch(component)):
        parent = components[at - 1]
        if parent in _QOS and at > 1:
            parent = components[at - 2]
        if _PODS_PARENT.fullmatch(parent):
            return match[1], ""
    return "", ""


def _container_below(components: list[str]) -> str:
    """The first container below a pod's cgroup, or an empty string. conmon watches a container from beside it."""
    for component in components:
        if "conmon" in component:
            return ""
        if match := _CONTAINER_IN_POD.fullmatch(component):
            return match[1]
    return ""


def _container_without_pod(components: list[str]) -> ContainerRef | None:
    """A container outside of Kubernetes, or one of which the cgroup namespace hides the pod."""
    for at, component in enumerate(components):
        if "conmon" in component:
            return None
        if match := _CONTAINER.fullmatch(component):
            return ContainerRef(match[1] or match[2], "")
        is_task = component == "ecs" and at + 2 < len(components) and _ECS_TASK.fullmatch(components[at + 1])
        if is_task and _ID.fullmatch(components[at + 2]):
            return ContainerRef(components[at + 2], "")
        prefix, separator, container_id = component.rpartition(":")
        if separator and ":" in prefix and _ID.fullmatch(container_id):
            return ContainerRef(container_id, "")
    return None
