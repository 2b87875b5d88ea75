"""One control plane and one Jaeger for all tests here; each test has namespaces of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector
from tests.e2e.cluster import Container, containers  # noqa: F401 - a fixture
from tests.e2e.conftest import collector, probes_attach, public_path, serve, start  # noqa: F401 - fixtures
from tests.e2e.harness import AgentProcess, wait_until
from tests.real.cluster import Application, Release
from tests.real.programs import NODE, ControlPlane, Jaeger, Json


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as running:
        yield running


@pytest.fixture(scope="session")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


@pytest.fixture
def as_pod(tmp_path: Path, collector: Collector, plane: ControlPlane) -> Iterator[Callable[..., AgentProcess]]:  # noqa: F811
    """``as_pod(pod, ports, settings)``: an agent in the place of a pod of the chart's, with its account's token.

    The test's administrator is the kubelet: it gives the environment that the pod's own specification asks for.
    """
    with ExitStack() as agents:

        def begin(
            pod: Json, ports: list[int], settings: dict | None = None, config: Path | None = None
        ) -> AgentProcess:
            namespace, account = pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]
            directory = plane.write_account(tmp_path / "account", namespace, account, pod)
            environment = {
                **plane.environ,
                "NODE_NAME": NODE,
                "POD_NAMESPACE": namespace,
                "POD_NAME": pod["metadata"]["name"],
                "POD_UID": pod["metadata"]["uid"],
            }
            chosen = {"kubernetes.service_account": str(directory)} | (settings or {})
            return agents.enter_context(AgentProcess(tmp_path, collector, ports, chosen, environment, config))

        yield begin


@pytest.fixture(scope="session")
def pod_monitors(plane: ControlPlane) -> None:
    """The custom resource of the Prometheus operator, without a schema."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    names = {"plural": "podmonitors", "singular": "podmonitor", "kind": "PodMonitor", "listKind": "PodMonitorList"}
    plane.create(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "podmonitors.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": names,
                "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
            },
        },
    )
    wait_until(lambda: plane.find("/apis/monitoring.coreos.com/v1/podmonitors"), "PodMonitors are served", 30)


@pytest.fixture
def install(plane: ControlPlane, pod_monitors: None) -> Iterator[Any]:
    """``install(values)``: a release, uninstalled at the end."""
    made: list[Release] = []

    def run(values: Json | None = None, level: str = "privileged") -> Release:
        made.append(Release(plane, values or {}, level))
        return made[-1]

    yield run
    for release in made:
        release.act("uninstall")


@pytest.fixture
def shop(plane: ControlPlane, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own."""
    name = request.node.name.replace("_", "-").translate({ord("["): "-", ord("]"): None, ord(" "): "-"})[-50:]
    plane.create_namespace(name.strip("-"))
    return name.strip("-")


@pytest.fixture
def application(
    plane: ControlPlane,
    containers: Callable[[str], Container],  # noqa: F811
    serve: Callable[..., object],  # noqa: F811
    public_path: Path,  # noqa: F811
    shop: str,
) -> Callable[[str], Application]:
    """Makes pods: ``application(name)``, in the namespace of the test."""
    return lambda name: Application(plane, containers, serve, public_path, shop, name)
