"""What the operator does: ``helm install`` with an endpoint, and a look at Jaeger.

Real are Helm, the API server with its controllers, the account's token, the ConfigMap, the environment that the pod
asks for, the probes, the traces, and Jaeger. Instead of a kubelet, the test mounts, and starts the agent from here.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.e2e.cluster import ask
from tests.e2e.harness import AgentProcess, free_port, wait_until
from tests.e2e.test_kubernetes_api import wait_until_connected
from tests.e2e.test_live import MountedFile, events
from tests.real.programs import NODE, ControlPlane, Jaeger, Json

_FIELDS = {
    "spec.nodeName": lambda pod: NODE,
    "status.hostIP": lambda pod: "192.0.2.10",
    "metadata.name": lambda pod: pod["metadata"]["name"],
    "metadata.namespace": lambda pod: pod["metadata"]["namespace"],
    "metadata.uid": lambda pod: pod["metadata"]["uid"],
}


def environment_of(pod: Json) -> dict[str, str]:
    """What the kubelet gives the agent's container."""
    [container] = pod["spec"]["containers"]
    return {
        one["name"]: one["value"] if "value" in one else _FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]](pod)
        for one in container["env"]
    }


def configuration_of(plane: ControlPlane, pod: Json) -> str:
    """The file that the pod's volume has at the path that its command line names."""
    [container] = pod["spec"]["containers"]
    assert container["args"] == ["run", "--config", "/etc/spanloom/spanloom.yaml"]
    [mount] = [one for one in container["volumeMounts"] if one["mountPath"] == "/etc/spanloom"]
    [volume] = [one for one in pod["spec"]["volumes"] if one["name"] == mount["name"]]
    path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/configmaps/{volume['configMap']['name']}"
    return plane.get(path)["data"]["spanloom.yaml"]


def test_traces_of_pods_in_jaeger(
    plane: ControlPlane,
    jaeger: Jaeger,
    install,
    application,
    shop: str,
    tmp_path: Path,
):
    cart, stock = application("cart"), application("stock")
    port = free_port()
    values = {
        "otlp": {"endpoint": jaeger.endpoint},
        "telemetry": {"port": port},
        # Of this machine only what is the test's.
        "config": {"select": {"host": False, "kubernetes": {"namespaces": {"include": [shop]}}}},
    }
    release = install(values)
    pod = release.pod()
    account = plane.write_account(tmp_path / "account", release.namespace, pod["spec"]["serviceAccountName"], pod)
    file = MountedFile(tmp_path / "mounted", configuration_of(plane, pod))
    agent = AgentProcess(tmp_path, None, environment=plane.environ | environment_of(pod), config=file.path)
    agent.telemetry_port = port
    agent.settings = {"kubernetes.service_account": str(account)}
    with agent:
        wait_until_connected(agent)
        for one in (cart, stock):
            one.begin()
            ask(one.port, "/status/200")
        ask(cart.port, "/status/500")
        wait_until(lambda: {"cart", "stock"} <= set(jaeger.query("services") or []), agent.state)
        wait_until(lambda: len(jaeger.query("traces?service=cart&lookback=1h")) == 2, agent.state)
        # An operator retunes it: the ConfigMap changes, the kubelet swaps the file.
        values["config"]["sampling"] = {"ratio": 0.0}
        release.act("upgrade", values)
        assert release.pod()["metadata"]["uid"] == pod["metadata"]["uid"]
        file.write(configuration_of(plane, pod))
        wait_until(lambda: events(agent, "config_applied"), agent.state)
        ask(cart.port, "/status/204")
    traces = jaeger.query("traces?service=cart&lookback=1h")
    assert len(traces) == 2
    for trace in traces:
        [span] = trace["spans"]
        [process] = trace["processes"].values()
        tags = {tag["key"]: tag["value"] for tag in span["tags"]}
        resource = {tag["key"]: tag["value"] for tag in process["tags"]}
        assert process["serviceName"] == "cart"
        assert (tags["span.kind"], span["warnings"]) == ("server", None)
        assert (tags.get("error") is True) == (tags["http.response.status_code"] == 500)
        expected = {
            "service.namespace": shop,
            "k8s.pod.name": "cart",
            "k8s.pod.uid": cart.uid,
            "k8s.namespace.name": shop,
            "k8s.node.name": NODE,
            "k8s.container.name": "app",
            "container.id": cart.container.id,
            "container.image.name": "registry.example/shop/app",
        }
        assert {key: resource.get(key) for key in expected} == expected
    assert yaml.safe_load(configuration_of(plane, pod))["export"]["otlp"]["endpoint"] == jaeger.endpoint
