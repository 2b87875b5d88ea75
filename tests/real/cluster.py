"""A release of the chart, and pods: objects of the API server with processes that the test runs in their place.

In: a control plane. Out: ``Release`` and ``Application``. Never: a kubelet; what it would mount, report and run, the
test does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.cluster import Container, ask
from tests.e2e.harness import AgentProcess, free_port, wait_until
from tests.real.helm import helm
from tests.real.programs import NODE, ControlPlane, Json

IMAGE = "registry.example/shop/app:1.4.2"

_numbers = itertools.count(1)


class Release:
    """``helm install`` into a namespace of its own."""

    def __init__(self, plane: ControlPlane, values: Json, level: str = "privileged") -> None:
        number = next(_numbers)
        self.plane = plane
        self.namespace = f"tracing-{number}"
        self.name = f"release-{number}"
        plane.create_namespace(self.namespace, level)
        self.installed = self.act("install", values)

    def act(self, action: str, values: Json | None = None) -> dict[str, Any]:
        return helm(self.plane.kubeconfig, action, self.name, self.namespace, values)

    def objects(self) -> list[Json]:
        return [one for one in yaml.safe_load_all(self.installed["manifest"]) if one]

    def daemonset(self) -> Json:
        [one] = self.plane.items(f"/apis/apps/v1/namespaces/{self.namespace}/daemonsets")
        return one

    def pods(self) -> list[Json]:
        """Those that the controller of DaemonSets has made."""
        return [
            pod
            for pod in self.plane.items(f"/api/v1/namespaces/{self.namespace}/pods")
            if pod["metadata"].get("ownerReferences", [{}])[0].get("kind") == "DaemonSet"
        ]

    def pod(self) -> Json:
        """The one on the only node, once it is there."""
        wait_until(self.pods, lambda: f"a pod of the DaemonSet: {self.events()}", 30)
        [pod] = self.pods()
        return pod

    def events(self) -> list[tuple[str, str]]:
        items = self.plane.items(f"/api/v1/namespaces/{self.namespace}/events")
        return [(one["reason"], one.get("message", "")) for one in items]


class Application:
    """A pod with one server: made by the API server, bound to the node and given a status by the test."""

    def __init__(
        self,
        plane: ControlPlane,
        containers: Callable[[str], Container],
        serve: Callable[..., object],
        directory: Path,
        namespace: str,
        name: str,
    ) -> None:
        """``containers`` and ``serve`` are the fixtures of those names, ``directory`` is ``public_path``."""
        self.plane, self.namespace, self.name, self.port = plane, namespace, name, free_port()
        self.path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        self._containers, self._serve, self._directory = containers, serve, directory

    def create(self, node: str = NODE, **metadata: object) -> None:
        """The object, on a node, without a status."""
        pod = self.plane.create(
            f"/api/v1/namespaces/{self.namespace}/pods",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": self.name, "labels": {"app": self.name}, **metadata},
                "spec": {"nodeName": node, "containers": [{"name": "app", "image": IMAGE}]},
            },
        )
        self.adopt(pod)

    def adopt(self, pod: Json) -> None:
        """Stand for a pod that somebody else has created."""
        self.uid: str = pod["metadata"]["uid"]
        self.container = self._containers(self.uid)

    def report(self, address: str = "10.244.1.17") -> None:
        """The status, as the kubelet reports it."""
        status = {
            "name": "app",
            "image": IMAGE,
            "imageID": "registry.example/shop/app@sha256:" + "0" * 64,
            "containerID": f"containerd://{self.container.id}",
            "ready": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }
        condition = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        change = {
            "phase": "Running",
            "startTime": "2026-01-01T00:00:00Z",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [condition],
            "containerStatuses": [status],
        }
        self.plane.patch(f"{self.path}/status", {"status": change})

    def run(self) -> None:
        self._serve(self.container.wrap(servers.python_threads(self.port, self._directory)), self.port)

    def begin(self, **metadata: object) -> None:
        """Everything at once."""
        self.create(**metadata)
        self.report()
        self.run()

    def request(self, tracing: AgentProcess) -> CollectedSpan:
        """The server's span of one more request."""
        count = len(tracing.spans(self.port, "SERVER"))
        ask(self.port)
        return tracing.wait_for_spans(count + 1, port=self.port, kind="SERVER")[-1]

    def is_complete(self, span: CollectedSpan) -> bool:
        resource = span.resource
        return (resource.get("k8s.pod.name"), resource.get("k8s.container.name")) == (self.name, "app")
