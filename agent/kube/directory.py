"""The pods of this node, for the stages that know processes: container -> placement.

In: pods from the watch (or from a test), the rules of selection. Out: what ``agent.process`` asks for. Never: a request
to the API server, a wait, an exception for a pod that makes no sense (counted).

One thread writes (the watch), one reads (the pipeline): see ``PodIndex``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agent.kube.cgroups import ContainerRef, container_of
from agent.kube.pods import Pod, PodIndex, pod_attributes, read_pod
from agent.kube.select import PodRules
from agent.process import Placement

_UID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


class PodDirectory:
    """What is known of the node's pods, and the operator's rules for them.

    ``generation`` changes whenever an answer of ``place`` may have changed.
    """

    def __init__(
        self,
        rules: PodRules,
        *,
        node_name: str,
        cluster_name: str = "",
        use_labels: bool = False,
    ) -> None:
        self._index = PodIndex()
        self._node_name = node_name
        self._configured = 0
        self.configure(rules, cluster_name=cluster_name, use_labels=use_labels)
        self.malformed = 0
        """Objects of the API server that are no pods."""

    def configure(self, rules: PodRules, *, cluster_name: str, use_labels: bool) -> None:
        """Describe and select by other rules from now on."""
        self._rules = rules
        self._cluster_name = cluster_name
        self._use_labels = use_labels
        self._configured += 1

    @property
    def generation(self) -> tuple[int, int]:
        return self._configured, self._index.generation

    @property
    def pods(self) -> int:
        """Pods that are known."""
        return self._index.pods

    # -- for the watch

    def replace(self, items: list[dict[str, Any]]) -> None:
        """All pods of the node, as a list gave them."""
        self._index.replace([pod for item in items if (pod := self._read(item)) is not None])

    def change(self, kind: str, item: dict[str, Any]) -> None:
        """One event of a watch: ADDED, MODIFIED or DELETED."""
        pod = self._read(item)
        if pod is None:
            return
        if kind == "DELETED":
            self._index.remove(pod.uid)
        else:
            self._index.put(pod)

    def _read(self, item: dict[str, Any]) -> Pod | None:
        try:
            return read_pod(item)
        except ValueError:
            self.malformed += 1
            return None

    # -- for the processes

    def container_of(self, cgroup: bytes) -> ContainerRef | None:
        """The container of a pod; None for host processes, and for containers outside of Kubernetes."""
        found = container_of(cgroup.decode("utf-8", "replace"))
        return found if found is not None and (found.pod_uid or self._index.find(found) is not None) else None

    def is_current(self, placement: Placement) -> bool:
        """Whether the pod, its container and the rules are still those that a placement was made of."""
        configured, pod, one = placement.basis
        found = self._index.find(placement.container) or (None, None)
        return configured == self._configured and found[0] is pod and found[1] is one

    def place(self, container: ContainerRef, declared: Mapping[str, str]) -> Placement:
        """What is known of the container's pod at this moment."""
        configured = self._configured
        pod, one = self._index.find(container) or (None, None)
        if pod is None:
            attributes = (
                ("k8s.node.name", self._node_name),
                # Of a static pod the path has the hash of its manifest, which is no uid.
                ("k8s.pod.uid", container.pod_uid if _UID.fullmatch(container.pod_uid) else ""),
                ("container.id", container.container_id),
            )
            known = tuple(pair for pair in attributes if pair[1])
            return Placement(container, False, True, known, (), (configured, None, None))
        name = one.name if one is not None else ""
        own = () if one is not None or not container.container_id else (("container.id", container.container_id),)
        return Placement(
            container,
            one is not None,
            self._rules.selects(pod, name),
            own
            + pod_attributes(
                pod,
                one,
                declared=declared,
                node_name=self._node_name,
                cluster_name=self._cluster_name,
                use_labels=self._use_labels,
            ),
            (("namespace", pod.namespace), ("pod", pod.name), ("container", name)),
            (configured, pod, one),
        )
