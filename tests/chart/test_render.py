"""Every ci values file: lint, the Kubernetes schemas, references between objects, the agent's own reading, goldens.

``pytest tests/unit/test_replay.py tests/chart/test_render.py --golden`` rewrites golden/ after a change that is meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import __version__
from agent.config import Config, load
from tests.chart.conftest import CI_FILES, values_of
from tests.chart.engine import CHART, RefusedError
from tests.chart.manifests import agent_of, component_of, config_of, environment_of, objects_of, one, pod_of

GOLDEN = Path(__file__).with_name("golden")
OLDEST, NEWEST = "1.25", "1.37"


def agent_config(objects: list[dict[str, Any]], tmp_path: Path, **environ: str) -> Config:
    """What the agent makes of the ConfigMap."""
    path = tmp_path / "spanloom.yaml"
    path.write_text(config_of(objects), encoding="utf-8")
    return load(path, [], environ)


def test_the_ci_files_are_there():
    """The features that have a values file of their own."""
    names = {path.name.removesuffix("-values.yaml") for path in CI_FILES}
    assert names == {"default", "capabilities", "jaeger", "tls-and-headers", "everything-on", "minimal"}


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_lint_has_nothing_to_say(helm, path):
    """`helm lint --strict` is silent, but for the missing icon."""
    findings = [finding for finding in helm.lint(values_of(path)) if finding["severity"] > 1]
    assert findings == []


def test_golden(renders, case, rewrites_golden):
    """The render is the known one, NOTES.txt included."""
    text = "".join(f"# Source: {name}\n{body.strip()}\n---\n" for name, body in renders[case].items())
    path = GOLDEN / f"{case}.yaml"
    if rewrites_golden:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_fit_the_schemas_of_kubernetes(objects, version):
    """Every object is valid without a field the API server does not know, in the oldest and the newest version."""
    assert objects
    for item in objects:
        if item["kind"] == "PodMonitor":
            continue  # not of Kubernetes: test_the_pod_monitor_names_a_port
        if item["kind"] == "DaemonSet" and version == OLDEST:
            agent_of([item])["securityContext"].pop("appArmorProfile", None)  # documented: 1.30 and later
        kubernetes_validate.validate(item, version, strict=True)


def test_the_oldest_version_is_the_one_promised():
    """The schemas are checked from the version on that Chart.yaml asks for."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert about["kubeVersion"] == f">={OLDEST}.0-0"
    assert about["version"] == about["appVersion"] == __version__


def test_names_and_labels(objects):
    """Names are DNS labels, unique by kind; namespaced objects are in the release's; labels say what belongs here."""
    seen = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(seen)) == len(seen)
    for item in objects:
        metadata = item["metadata"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", metadata["name"])
        assert metadata.get("namespace") == (None if item["kind"].startswith("ClusterRole") else "tracing")
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert metadata["labels"]["app.kubernetes.io/instance"] == "spanloom"


def test_selectors_select_their_own_component_only(objects):
    """Workloads, Services, policies and monitors select the pods of their component and of no other."""
    labels = {component_of(item): item["spec"]["template"]["metadata"]["labels"] for item in objects if is_work(item)}
    labels |= {component_of(item): item["metadata"]["labels"] for item in objects if item["kind"] == "Pod"}
    for item in objects:
        spec = item.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is None:
            continue
        selector = selector.get("matchLabels", selector)
        selected = {component for component, have in labels.items() if selector.items() <= have.items()}
        assert selected == {component_of(item)}, item["kind"]


def is_work(item: dict[str, Any]) -> bool:
    return item["kind"] in ("DaemonSet", "Deployment")


def test_references_resolve(objects):
    """Mounts have their volume, probes and Services their port, bindings their role and their subject."""
    by_component = {component_of(item): pod_of(item) for item in objects if is_work(item)}
    for spec in by_component.values():
        volumes = [volume["name"] for volume in spec["volumes"]]
        assert len(set(volumes)) == len(volumes)
        for container in spec["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths)
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            ports = {port["name"] for port in container["ports"]}
            assert all(re.fullmatch("[a-z-]{1,15}", port) for port in ports)
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe := container.get(name):
                    assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in ports
    for service in (item for item in objects if item["kind"] == "Service"):
        (container,) = by_component[component_of(service)]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    agent = by_component["agent"]
    config = next(volume for volume in agent["volumes"] if volume["name"] == "config")
    assert config["configMap"]["name"] == one(objects, "ConfigMap")["metadata"]["name"]
    for binding in (item for item in objects if item["kind"].endswith("RoleBinding")):
        role = binding["kind"].removesuffix("Binding")
        assert binding["roleRef"]["name"] == one(objects, role)["metadata"]["name"]
        (subject,) = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (agent["serviceAccountName"], "tracing")


def test_the_agent_accepts_its_config(objects, tmp_path):
    """The agent reads the ConfigMap without an error, listens where the probes look, and asks for its pods."""
    config = agent_config(objects, tmp_path)
    (port,) = agent_of(objects)["ports"]
    host, _, listened = (config.telemetry.listen or "").rpartition(":")
    assert int(listened) == port["containerPort"]
    assert host in ("0.0.0.0", "[::]"), "the kubelet's probes come from outside of the pod"
    assert config.kubernetes.enabled == "on"


def test_the_agent_is_started_with_the_mounted_file(objects):
    """The arguments name a file of the mounted ConfigMap, which is mounted as a directory: only that is live."""
    container = agent_of(objects)
    assert container["args"] == ["run", "--config", "/etc/spanloom/spanloom.yaml"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "config")
    assert mount == {"name": "config", "mountPath": "/etc/spanloom", "readOnly": True}


def test_a_change_of_the_config_changes_nothing_but_the_config_map(helm):
    """Retuning restarts no agent: the pod template, checksums included, stays the same."""
    before = helm.render({})
    after = helm.render({"config": {"sampling": {"ratio": 0.5}}})
    assert {name for name in before if before[name] != after[name]} == {"configmap.yaml"}


def test_values_arrive_unchanged(helm, tmp_path):
    """False, zero, quotes, stars, large numbers and empty sections reach the agent as they were meant."""
    values = {
        "sampling": {"ratio": 0, "parent_based": False},
        "select": {"executables": {"include": ["*", "python3*"], "exclude": ["a: b # c", "{{ .Values }}"]}},
        "kernel": {"ring_buffer_bytes": float(1 << 30)},  # what Helm's YAML parser makes of integers
        "export": {"console": False, "otlp": None},
        "telemetry": {"log_level": "debug"},
        "resource": {"attributes": {"version": "1.10", "count": 7, "yes": "no"}},
        "routes": None,
    }
    config = agent_config(objects_of(helm.render({"config": values})), tmp_path)
    assert (config.sampling.ratio, config.sampling.parent_based) == (0, False)
    assert config.select.executables.include == ("*", "python3*")
    assert config.select.executables.exclude == ("a: b # c", "{{ .Values }}")
    assert config.kernel.ring_buffer_bytes == 1 << 30
    assert config.export.console == "off"
    assert config.telemetry.log_level == "debug"
    assert config.resource.attributes == {"version": "1.10", "count": 7, "yes": "no"}


texts = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=40)


@given(attributes=st.dictionaries(texts, texts, max_size=4), patterns=st.lists(texts, max_size=2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_arrives_unchanged(helm, tmp_path, attributes, patterns):
    """A text arrives as it is or is refused: none can break out of its place in the ConfigMap, or empty it."""
    values = {"resource": {"attributes": attributes}, "redaction": {"query_keys": patterns}}
    try:
        rendered = helm.render({"config": values})
    except RefusedError as error:
        said = str(error)
    else:
        said = ""
        config = agent_config(objects_of(rendered), tmp_path)
        assert config.resource.attributes == attributes
        assert list(config.redaction.query_keys) == patterns
    unsafe = re.compile("[\x7f-\x9f\u2028\u2029\ufffe\uffff]")
    assert ("control character" in said) == any(map(unsafe.search, [*attributes, *attributes.values(), *patterns]))


@pytest.mark.parametrize("character", ["\x7f", "\x85", "\x9f", "\u2028", "\u2029", "\ufffe"], ids=ascii)
def test_a_character_that_yaml_changes_is_refused(helm, character):
    """One such character once emptied the whole ConfigMap in silence, or changed on the way: now it is refused."""
    with pytest.raises(RefusedError, match="control character"):
        helm.render({"config": {"resource": {"attributes": {"a": f"x{character}y"}}}})


@pytest.mark.parametrize(
    ("values", "endpoint"),
    [
        ({}, None),
        ({"jaeger": {"enabled": True}}, "http://spanloom-jaeger.tracing.svc:4317"),
        ({"otlp": {"endpoint": "http://c:4317"}}, "http://c:4317"),
        ({"otlp": {"endpoint": "c.example.com"}}, "c.example.com"),
        ({"otlp": {"endpoint": "https://[2001:db8::1]:4317"}}, "https://[2001:db8::1]:4317"),
        ({"otlp": {"endpoint": "http://c:4317"}, "jaeger": {"enabled": True}}, "http://c:4317"),
        ({"otlp": {"env": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4317"}}}, "http://e:4317"),
        (
            {"otlp": {"env": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e:1"}}, "jaeger": {"enabled": True}},
            "http://e:1",
        ),
        ({"otlp": {"endpoint": "http://c:1", "env": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:1"}}}, "http://c:1"),
    ],
)
def test_where_spans_go(helm, tmp_path, values, endpoint):
    """otlp.endpoint, then otlp.env, then Jaeger; else nowhere, and the notes say so."""
    rendered = helm.render(values)
    objects = objects_of(rendered)
    variables = environment_of(agent_of(objects)).values()
    environ = {item["name"]: item["value"] for item in variables if item["name"].startswith("OTEL_")}
    assert agent_config(objects, tmp_path, **environ).export.otlp.endpoint == endpoint
    assert ("No endpoint is set" in rendered["NOTES.txt"]) == (endpoint is None)


def test_jaeger_answers_where_the_agents_send(renders, tmp_path):
    """Jaeger's Service has the name and the port of the endpoint; the image is pinned to a version."""
    objects = objects_of(renders["jaeger"])
    service = one(objects, "Service", "jaeger")
    name, ports = service["metadata"]["name"], [port["port"] for port in service["spec"]["ports"]]
    assert agent_config(objects, tmp_path).export.otlp.endpoint == f"http://{name}.tracing.svc:{ports[0]}"
    (container,) = pod_of(one(objects, "Deployment", "jaeger"))["containers"]
    assert re.search(r":\d+\.\d+\.\d+$", container["image"])


def test_tls_files_are_those_of_the_secret(renders, tmp_path):
    """The configured files lie below the mount of the Secret, with its keys as names."""
    objects = objects_of(renders["tls-and-headers"])
    otlp = agent_config(objects, tmp_path).export.otlp
    mount = next(item for item in agent_of(objects)["volumeMounts"] if item["name"] == "otlp-tls")
    names = (otlp.certificate, otlp.client_certificate, otlp.client_key)
    assert names == tuple(f"{mount['mountPath']}/{key}" for key in ("ca.crt", "tls.crt", "tls.key"))


def test_downward_variables(objects):
    """The agent learns its node and its own pod; variables that refer to them come later, or they stay as they are."""
    variables = environment_of(agent_of(objects))
    fields = {name: item["valueFrom"]["fieldRef"]["fieldPath"] for name, item in variables.items() if downward(item)}
    assert fields == {
        "NODE_NAME": "spec.nodeName",
        "NODE_IP": "status.hostIP",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_UID": "metadata.uid",
    }
    assert list(variables)[: len(fields)] == list(fields)


def downward(variable: dict[str, Any]) -> bool:
    return "fieldRef" in variable.get("valueFrom", {})


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, f"ghcr.io/spanloom/spanloom:{__version__}"),
        ({"tag": "edge"}, "ghcr.io/spanloom/spanloom:edge"),
        ({"repository": "r.example:5000/s", "digest": f"sha256:{'a' * 64}"}, f"r.example:5000/s@sha256:{'a' * 64}"),
    ],
)
def test_image(helm, image, expected):
    """The tag follows the chart's appVersion, a digest wins; the test pod uses the same image."""
    objects = objects_of(helm.render({"image": image}))
    assert agent_of(objects)["image"] == expected
    assert pod_of(one(objects, "Pod", "test"))["containers"][0]["image"] == expected


@pytest.mark.parametrize("release", ["s", "spanloom", "my.release", "7", "a" * 53, f"{'a' * 49}-b"])
def test_any_release_name_works(helm, release):
    """Short, long, dotted and numeric names of releases give valid objects."""
    for item in objects_of(helm.render({"jaeger": {"enabled": True}}, release=release)):
        kubernetes_validate.validate(item, NEWEST, strict=True)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", item["metadata"]["name"])
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == release


def test_every_node_is_traced_by_default(renders):
    """The default tolerates every taint."""
    assert pod_of(one(objects_of(renders["default"]), "DaemonSet"))["tolerations"] == [{"operator": "Exists"}]


def test_helm_test_asks_through_the_service(renders):
    """The test pod asks /readyz at the Service's name and port, and may do so when a NetworkPolicy is there."""
    objects = objects_of(renders["everything-on"])
    pod, service = one(objects, "Pod", "test"), one(objects, "Service")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    port = service["spec"]["ports"][0]["port"]
    url = f"http://{service['metadata']['name']}.tracing.svc:{port}/readyz"
    assert pod_of(pod)["containers"][0]["command"][-1] == url
    (rule,) = one(objects, "NetworkPolicy")["spec"]["ingress"]
    labels = pod["metadata"]["labels"].items()
    assert any(peer["podSelector"]["matchLabels"].items() <= labels for peer in rule["from"] if "podSelector" in peer)


def test_the_program_of_helm_test(renders, tmp_path):
    """The test pod's program ends with 0 when /readyz says so, and goes on asking while nobody answers."""
    import subprocess
    import sys
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    answers = [503, 503, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    interpreter, dash_c, program, _ = pod_of(one(objects_of(renders["default"]), "Pod", "test"))["containers"][0][
        "command"
    ]
    assert (interpreter, dash_c) == ("python3", "-c")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/readyz"
        done = subprocess.run([sys.executable, "-c", program, url], timeout=60, capture_output=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert answers == []


def test_the_pod_monitor_names_a_port(renders):
    """The PodMonitor scrapes the agent's named port and carries the labels that Prometheus selects it by."""
    objects = objects_of(renders["everything-on"])
    monitor = one(objects, "PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in agent_of(objects)["ports"]}
    assert endpoint["path"] == "/metrics"
