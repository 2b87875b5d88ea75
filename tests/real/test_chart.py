"""The chart on a real API server: Helm installs it, admission lets its pods in, its account may what it needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import yaml

from tests.chart.conftest import CI_FILES, values_of
from tests.chart.engine import Engine
from tests.chart.manifests import objects_of
from tests.e2e.harness import wait_until
from tests.real.cluster import Release
from tests.real.programs import ControlPlane

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    running = Engine()
    yield running
    running.close()


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_every_object_is_accepted(plane: ControlPlane, install, path):
    """The server validates them, its controllers make a pod of them, which admission lets in."""
    values = values_of(path)
    release = install(values)
    if not values.get("serviceAccount", {}).get("create", True):
        account = {"metadata": {"name": values["serviceAccount"]["name"]}}
        plane.create(f"/api/v1/namespaces/{release.namespace}/serviceaccounts", account)
    kinds = [one["kind"] for one in release.objects()]
    assert "DaemonSet" in kinds
    pod = release.pod()
    [agent] = pod["spec"]["containers"]
    assert agent["name"] == "spanloom"
    # The same again changes nothing: what the server made of an object does not differ from what Helm sends.
    before = release.daemonset()["metadata"]["generation"]
    release.act("upgrade", values)
    assert release.daemonset()["metadata"]["generation"] == before


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_no_object_is_warned_of(plane: ControlPlane, engine: Engine, pod_monitors: None, path):
    """No field that the server does not know, nothing deprecated; the pod of ``helm test`` as well."""
    plane.create_namespace(namespace := f"strict-{next(_numbers)}")
    objects = objects_of(engine.render(values_of(path)))
    for thing in objects:
        if "namespace" in thing["metadata"]:
            thing["metadata"]["namespace"] = namespace
        assert not plane.try_strictly(thing), thing["kind"]
    if values_of(path).get("service", {}).get("enabled", True):
        assert "Pod" in [thing["kind"] for thing in objects]


def test_uninstall_leaves_nothing(plane: ControlPlane):
    """Of what Helm created, in the namespace and in the cluster."""
    release = Release(plane, {"jaeger": {"enabled": True}, "peers": {"enabled": True}})
    release.pod()
    release.act("uninstall")
    left = [
        f"{one['kind']} {one['metadata']['name']}"
        for path in (
            f"/apis/apps/v1/namespaces/{release.namespace}/daemonsets",
            f"/apis/apps/v1/namespaces/{release.namespace}/deployments",
            f"/api/v1/namespaces/{release.namespace}/services",
            f"/api/v1/namespaces/{release.namespace}/secrets",
            f"/api/v1/namespaces/{release.namespace}/serviceaccounts",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        )
        for one in [{"kind": path.rpartition("/")[2], **item} for item in plane.items(path)]
        if release.name in one["metadata"]["name"]
    ]
    assert not left


def test_a_namespace_that_refuses_the_pods(install):
    """As docs/operating.md tells: the install succeeds, and the DaemonSet's events say why there is no pod."""
    release = install(level="baseline")
    wait_until(lambda: any(reason == "FailedCreate" for reason, _ in release.events()), "an event", 30)
    said = next(message for reason, message in release.events() if reason == "FailedCreate")
    assert "violates PodSecurity" in said
    assert not release.pods()


def test_a_change_of_the_configuration_restarts_nothing(install):
    """``helm upgrade`` with other settings changes the ConfigMap; a changed image changes the pods."""
    release = install({"config": {"sampling": {"ratio": 0.5}}})
    uid = release.pod()["metadata"]["uid"]
    generation = release.daemonset()["metadata"]["generation"]
    release.act("upgrade", {"config": {"sampling": {"ratio": 0.25}}})
    [config] = [
        one
        for one in release.plane.items(f"/api/v1/namespaces/{release.namespace}/configmaps")
        if "spanloom.yaml" in one["data"]
    ]
    assert yaml.safe_load(config["data"]["spanloom.yaml"])["sampling"]["ratio"] == 0.25
    assert release.daemonset()["metadata"]["generation"] == generation
    assert release.pod()["metadata"]["uid"] == uid
    release.act("upgrade", {"image": {"tag": "other"}})
    assert release.daemonset()["metadata"]["generation"] == generation + 1
