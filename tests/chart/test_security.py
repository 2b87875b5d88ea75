"""The fields of the objects that security rests on."""

from __future__ import annotations

import json

import pytest

from agent.kernel.check_probes import PROBES
from tests.chart.conftest import CI_FILES
from tests.chart.engine import RefusedError
from tests.chart.manifests import agent_of, config_of, environment_of, objects_of, one, pod_of

MODES = {"default": "privileged", "jaeger": "privileged", "tls-and-headers": "privileged", "minimal": "privileged"} | {
    "capabilities": "capabilities",
    "everything-on": "capabilities",
}
DOCUMENTED = ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH"]
"""tests/e2e/test_capabilities.py shows that each is needed, and nothing else."""


def test_every_values_file_has_its_mode():
    """The table above is complete."""
    assert set(MODES) == {path.name.removesuffix("-values.yaml") for path in CI_FILES}


def test_privileged_in_the_privileged_mode_only(objects, case):
    """The agent is privileged in one mode, and in the other it is not and can gain nothing."""
    context = agent_of(objects)["securityContext"]
    if MODES[case] == "privileged":
        assert context["privileged"] is True
        assert "capabilities" not in context
    else:
        assert context["privileged"] is False
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_capabilities_are_those_documented_and_no_others(renders, helm):
    """The default list is exact; another one is taken as it is."""
    assert agent_of(objects_of(renders["everything-on"]))["securityContext"]["capabilities"]["add"] == DOCUMENTED
    longer = agent_of(objects_of(renders["capabilities"]))["securityContext"]["capabilities"]["add"]
    assert longer == [*DOCUMENTED, "SYS_RESOURCE"]
    values = {"securityContext": {"mode": "capabilities", "capabilities": ["SYS_ADMIN"]}}
    context = agent_of(objects_of(helm.render(values)))["securityContext"]
    assert context["capabilities"]["add"] == ["SYS_ADMIN"]
    assert context["allowPrivilegeEscalation"] is True, "the API server refuses false together with SYS_ADMIN"


def test_capabilities_are_known_to_the_agents_check():
    """`spanloom check` reports every capability that the chart gives."""
    checked = {probe.title for probe in PROBES}
    assert {f"CAP_{name}" for name in [*DOCUMENTED, "SYS_RESOURCE", "SYS_ADMIN"]} <= checked


def test_the_agents_pod_shares_pids_and_nothing_else(objects):
    """The host's pids, but neither its network, nor its IPC, nor any of its directories."""
    spec = pod_of(one(objects, "DaemonSet"))
    assert spec["hostPID"] is True
    assert spec["hostNetwork"] is False
    assert "hostIPC" not in spec
    assert not any("hostPath" in volume for volume in spec["volumes"])
    assert spec["enableServiceLinks"] is False
    assert not any("hostPort" in port for port in agent_of(objects)["ports"])


def test_root_file_systems_are_read_only(objects):
    """Every container of the chart has a read-only root file system, and the config is mounted read-only."""
    for item in objects:
        if item["kind"] in ("DaemonSet", "Deployment", "Pod"):
            for container in pod_of(item)["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_only_the_agent_is_root(objects):
    """Jaeger and the test pod run as somebody else, without capabilities and without a token."""
    others = [item for item in objects if item["kind"] in ("Deployment", "Pod")]
    for item in others:
        spec = pod_of(item)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_service_account_token_is_mounted_by_the_agent_only(objects, case):
    """The pod asks for the token; the service account by itself gives it to nobody."""
    spec = pod_of(one(objects, "DaemonSet"))
    assert spec["automountServiceAccountToken"] is True
    accounts = [item for item in objects if item["kind"] == "ServiceAccount"]
    if case == "minimal":
        assert accounts == []
        assert spec["serviceAccountName"] == "tracing"
    else:
        assert [item["metadata"]["name"] for item in accounts] == [spec["serviceAccountName"]]
        assert accounts[0]["automountServiceAccountToken"] is False


PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
SERVICES = {"apiGroups": [""], "resources": ["services"], "verbs": ["list", "watch"]}
SLICES = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
EVENTS = {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}


def test_rights_are_exactly_those_documented(objects, case):
    """Pods to read, events to create; services and endpoint slices only with peers.enabled; no roles on demand."""
    roles = {item["kind"]: item["rules"] for item in objects if item["kind"] in ("Role", "ClusterRole")}
    if case == "minimal":
        assert not any("Role" in item["kind"] for item in objects)
    else:
        peers = [SERVICES, SLICES] if case == "everything-on" else []
        assert roles == {"ClusterRole": [PODS, *peers], "Role": [EVENTS]}


def test_headers_come_from_the_secret(renders):
    """The header variable refers to the Secret and its key; the ConfigMap has nothing of it."""
    objects = objects_of(renders["tls-and-headers"])
    variable = environment_of(agent_of(objects))["OTEL_EXPORTER_OTLP_HEADERS"]
    reference = {"name": "collector-token", "key": "headers"}
    assert variable == {"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": reference}}
    assert "collector-token" not in config_of(objects)


def test_the_tls_secret_is_readable_by_the_agent_only(renders):
    """The certificates are mounted read-only, for their owner."""
    objects = objects_of(renders["tls-and-headers"])
    volume = next(item for item in pod_of(one(objects, "DaemonSet"))["volumes"] if item["name"] == "otlp-tls")
    assert volume["secret"] == {"secretName": "collector-tls", "defaultMode": 0o400}
    assert all(mount["readOnly"] for mount in agent_of(objects)["volumeMounts"])


@pytest.mark.parametrize(
    "values",
    [
        {"config": {"export": {"otlp": {"headers": {"authorization": "hunter2"}}}}},
        {"otlp": {"env": {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=hunter2"}}},
        {"otlp": {"env": {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=hunter2"}}},
    ],
    ids=json.dumps,
)
def test_credentials_outside_of_secrets_are_refused(helm, values):
    """Headers in the values would end up in a ConfigMap or in the pod: refused, with the way that is right."""
    with pytest.raises(RefusedError, match=r"otlp\.headersSecret") as refused:
        helm.render(values)
    assert "hunter2" not in str(refused.value)


def test_nothing_is_open_by_default(renders):
    """The default has no Service that is reachable from outside of the cluster, and no ingress."""
    kinds = {item["kind"] for item in objects_of(renders["default"])}
    assert kinds == {
        "ConfigMap", "DaemonSet", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Service",
        "ServiceAccount", "Pod",
    }  # fmt: skip
    for case in renders.values():
        for item in objects_of(case):
            assert item["kind"] != "Service" or item["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_the_network_policy_lets_in_who_is_named(renders, helm):
    """Only the named peers and the test pod reach the agents; by default the release's own namespace does."""
    policy = one(objects_of(renders["everything-on"]), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert policy["ingress"][0]["from"][1:] == [monitoring]
    assert [port["port"] for port in policy["ingress"][0]["ports"]] == ["metrics"]
    policy = one(objects_of(helm.render({"networkPolicy": {"enabled": True}})), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"][0]["from"][1:] == [{"podSelector": {}}]
