"""agent.kube.cluster: when there is a cluster, and what is missing when there should be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import load
from agent.errors import ConfigError, PrivilegeError, SpanloomError
from agent.kube.cluster import Cluster, report_failure
from tests.apiserver import ApiServer

POD = {"KUBERNETES_SERVICE_HOST": "192.0.2.1", "KUBERNETES_SERVICE_PORT": "443"}


def config(directory: Path, *overrides: str):
    return load(None, [f"kubernetes.service_account={directory}", *overrides], {})


@pytest.fixture
def account(tmp_path: Path) -> Path:
    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).write_text("x")
    return tmp_path


def test_outside_of_a_pod_there_is_none(account: Path):
    """And none is wanted when it is off."""
    assert Cluster.of(config(account), {}) is None
    assert Cluster.of(config(account, 'kubernetes.enabled="off"'), POD | {"NODE_NAME": "a"}) is None


def test_in_a_pod_of_the_chart_there_is_one(account: Path):
    """The node's name comes from the environment, or from the configuration."""
    assert Cluster.of(config(account), POD | {"NODE_NAME": "a"}) is not None
    assert Cluster.of(config(account, "kubernetes.node_name=a"), POD) is not None


def test_another_pod_goes_on_without(account: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Auto never keeps an agent from starting; the log says what is missing."""
    assert Cluster.of(config(account), POD) is None
    assert "kubernetes_off" in caplog.text
    assert "NODE_NAME" in str(caplog.records[0].__dict__)
    assert Cluster.of(config(tmp_path / "absent"), POD | {"NODE_NAME": "a"}) is None


def test_what_is_asked_for_and_missing_is_an_error(account: Path):
    """With its remedy."""
    with pytest.raises(ConfigError, match="NODE_NAME"):
        Cluster.of(config(account, 'kubernetes.enabled="on"'), POD)
    with pytest.raises(ConfigError, match="not in a cluster"):
        Cluster.of(config(account, 'kubernetes.enabled="on"', "kubernetes.node_name=a"), {})


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConfigError("sampling.ratio: too high"), "ConfigRefused"), (PrivilegeError("not root"), "AgentFailed")],
)
def test_what_ends_the_agent_is_an_event(tmp_path: Path, error: SpanloomError, reason: str):
    """A pod that cannot start says why where operators look."""
    with ApiServer() as api:
        account = api.write_service_account(tmp_path / "account")
        pod = {"POD_NAMESPACE": "spanloom", "POD_NAME": "spanloom-x", "POD_UID": "1"}
        report_failure(error, api.environ | pod, account)
        [event] = api.recorded_events
    assert (event["reason"], event["message"]) == (reason, str(error))
    assert event["involvedObject"]["name"] == "spanloom-x"


def test_a_failure_without_a_cluster_is_no_other_failure(tmp_path: Path, account: Path):
    """No account, no name of the pod, no API server: the error itself is what counts."""
    error = PrivilegeError("not root")
    report_failure(error, POD, account)
    report_failure(error, POD | {"POD_NAMESPACE": "a", "POD_NAME": "b"}, tmp_path / "absent")
    nobody = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1", "POD_NAMESPACE": "a"}
    report_failure(error, nobody | {"POD_NAME": "b"}, account)
