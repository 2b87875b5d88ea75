"""Values: wrong ones are refused with their name, missing ones break no template; the generated files are fresh."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from agent.config_schema import Config, fields_of, leaves
from agent.errors import SpanloomError
from agent.overrides import parse_override
from tests.chart.engine import CHART, RefusedError
from tests.chart.manifests import objects_of
from tools.chart import config_schema, main, read_values, values_schema

TOOL = Path(__file__).resolve().parents[2] / "tools" / "chart.py"
VALUES = read_values((CHART / "values.yaml").read_text(encoding="utf-8"))


OVERRIDE = {
    "until": "2030-01-31T12:00:00Z",
    "match": {"namespace": "checkout"},
    "set": {"sampling": {"ratio": 1.0}, "capture.request_headers": ["x-tenant"]},
}


def nested(path: tuple[str, ...], value: object) -> dict:
    """``("a", "b")`` and a value -> ``{"a": {"b": value}}``."""
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tolerationz": []}, ["tolerationz"]),
        ({"image": {"repo": "x"}}, ["image", "repo"]),
        ({"otlp": {"tls": {"secret": "x"}}}, ["otlp/tls", "secret"]),
        ({"image": {"pullPolicy": "Sometimes"}}, ["image/pullPolicy"]),
        ({"image": {"digest": "sha256:12"}}, ["image/digest"]),
        ({"telemetry": {"port": 0}}, ["telemetry/port"]),
        ({"telemetry": {"port": "9469"}}, ["telemetry/port"]),
        ({"telemetry": {"address": "127.0.0.1"}}, ["telemetry/address"]),
        ({"securityContext": {"mode": "none"}}, ["securityContext/mode"]),
        ({"securityContext": {"capabilities": ["NET_ADMIN"]}}, ["securityContext/capabilities"]),
        ({"securityContext": {"privileged": True}}, ["securityContext", "privileged"]),
        ({"resources": {"limit": {"memory": "1Gi"}}}, ["resources", "limit"]),
        ({"tolerations": [{"operater": "Exists"}]}, ["tolerations/0", "operater"]),
        ({"updateStrategy": {"maxUnavailable": 1}}, ["updateStrategy", "maxUnavailable"]),
        ({"updateStrategy": {"rollingUpdate": {"maxSurge": 1}}}, ["updateStrategy/rollingUpdate", "maxSurge"]),
        ({"affinity": {"podAfinity": {}}}, ["affinity", "podAfinity"]),
        ({"otlp": {"env": {"OTEL_EXPORTER_OTLP_TIMEOUT": 5000}}}, ["otlp/env/OTEL_EXPORTER_OTLP_TIMEOUT"]),
        ({"otlp": {"env": {"PATH": "/"}}}, ["otlp/env", "PATH"]),
        ({"otlp": {"endpoint": "http://collector:4317/v1/traces"}}, ["otlp/endpoint"]),
        ({"otlp": {"endpoint": "grpc://collector:4317"}}, ["otlp/endpoint"]),
        ({"otlp": {"endpoint": "https://me:hunter2@collector:4317"}}, ["otlp/endpoint"]),
        ({"jaeger": {"image": {"tag": "latest"}}}, ["jaeger/image/tag"]),
        ({"extraEnv": [{"value": "x"}]}, ["extraEnv/0", "name"]),
        ({"probes": {"liveness": {"periodSeconds": 0}}}, ["probes/liveness/periodSeconds"]),
        ({"config": {"sampel": {}}}, ["config", "sampel"]),
        ({"config": {"select": {"executabels": {}}}}, ["config/select", "executabels"]),
        ({"config": {"select": {"ports": {"include": [0]}}}}, ["config/select/ports/include/0"]),
        ({"config": {"capture": {"request_head_bytes": 128}}}, ["config/capture/request_head_bytes"]),
        ({"config": {"capture": {"request_head_bytes": "1k"}}}, ["config/capture/request_head_bytes"]),
        ({"config": {"sampling": {"ratio": 1.5}}}, ["config/sampling/ratio"]),
        ({"config": {"export": {"otlp": {"compresion": "gzip"}}}}, ["config/export/otlp", "compresion"]),
        ({"config": {"kubernetes": {"wait": 3}}}, ["config/kubernetes", "wait"]),
        ({"config": {"overrides": [OVERRIDE | {"untill": "x"}]}}, ["config/overrides/0", "untill"]),
        ({"config": {"overrides": [OVERRIDE | {"until": "tomorrow"}]}}, ["config/overrides/0/until"]),
        ({"config": {"overrides": [OVERRIDE | {"match": {}}]}}, ["config/overrides/0/match"]),
        (
            {"config": {"overrides": [OVERRIDE | {"match": {"namspace": "x"}}]}},
            ["config/overrides/0/match", "namspace"],
        ),
        ({"config": {"overrides": [OVERRIDE | {"set": {"kernel": {}}}]}}, ["config/overrides/0/set", "kernel"]),
        (
            {"config": {"overrides": [OVERRIDE | {"set": {"sampling": {"ratio": 7}}}]}},
            ["overrides/0/set/sampling/ratio"],
        ),
        ({"config": {"overrides": [OVERRIDE | {"set": {"sampling.ratio": 7}}]}}, ["overrides/0/set/sampling.ratio"]),
        ({"config": {"overrides": [{"until": OVERRIDE["until"]}]}}, ["config/overrides/0", "match"]),
    ],
    ids=json.dumps,
)
def test_wrong_values_are_refused_with_their_name(helm, values, named):
    """An unknown key, a wrong type and a value out of range fail, and the message names the key."""
    with pytest.raises(RefusedError) as refused:
        helm.render(values)
    text = str(refused.value)
    assert "values don't meet the specifications of the schema" in text
    for name in named:
        assert name in text


def test_an_override_is_accepted(helm):
    """Settings as maps within maps and with dots; the agent reads what the chart wrote."""
    values = {"otlp": {"endpoint": "http://c:4317"}, "config": {"overrides": [OVERRIDE]}}
    [mapped] = [one for one in objects_of(helm.render(values)) if one["kind"] == "ConfigMap"]
    [override] = yaml.safe_load(mapped["data"]["spanloom.yaml"])["overrides"]
    assert dict(parse_override(override, "overrides[0]").set) == {
        "sampling.ratio": 1.0,
        "capture.request_headers": ("x-tenant",),
    }


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"config": {"kubernetes": {"enabled": "off"}}}, "config.kubernetes.enabled"),
        ({"config": {"telemetry": {"listen": "0.0.0.0:1"}}}, "telemetry.address and telemetry.port"),
        ({"config": {"export": {"otlp": {"endpoint": "http://c:4317"}}}}, "otlp.endpoint"),
        ({"config": {"export": {"otlp": {"certificate": "/ca"}}}}, "otlp.tls"),
        ({"config": {"export": {"otlp": {"client_key": "/key"}}}}, "otlp.tls"),
        ({"otlp": {"tls": {"secretName": "s", "certFile": "c"}}}, "give both"),
        ({"otlp": {"tls": {"certFile": "c", "keyFile": "k"}}}, "otlp.tls.secretName"),
        ({"otlp": {"endpoint": "http://c:4317", "tls": {"secretName": "s"}}}, "https://"),
        ({"jaeger": {"enabled": True}, "otlp": {"tls": {"secretName": "s"}}}, "https://"),
    ],
    ids=json.dumps,
)
def test_values_that_contradict_each_other_are_refused(helm, values, remedy):
    """What the chart sets cannot be set in `config`, too; half a TLS setup is none. The message says what to do."""
    with pytest.raises(RefusedError, match=re.escape(remedy)):
        helm.render(values)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ".".join(value.path))
def test_a_value_that_is_taken_away_is_missed_by_name_or_not_at_all(helm, value):
    """`null` removes a default: the chart renders without it, or the schema names it; no template breaks."""
    try:
        rendered = helm.render(nested(value.path, None))
    except RefusedError as error:
        message = str(error)
    else:
        assert objects_of(rendered)
        return
    assert "values don't meet the specifications" in message
    assert value.path[-1] in message


@pytest.mark.parametrize("section", sorted({value.path[:-1] for value in VALUES} - {()}), ids=".".join)
def test_a_section_that_is_taken_away_is_missed_by_name(helm, section):
    """A section that is `null` is refused with its name."""
    with pytest.raises(RefusedError, match=section[-1]):
        helm.render(nested(section, None))


def test_the_globals_of_a_parent_chart_are_accepted(helm):
    """Used as a subchart, the chart is handed the parent's globals."""
    assert helm.render({"global": {"imageRegistry": "r.example.com"}})


# ---- The generated files ---------------------------------------------------------------------------------------------


def test_generated_files_are_up_to_date():
    """values.schema.json and README.md are what tools/chart.py makes: `python tools/chart.py` rewrites them."""
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_finds_drift_and_the_tool_repairs_it(tmp_path, capsys):
    """A changed default makes both files stale; --check says which and writes nothing, without it they are written."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    values = chart / "values.yaml"
    values.write_text(values.read_text(encoding="utf-8").replace("port: 9469", "port: 9470"), encoding="utf-8")
    before = (chart / "README.md").read_text(encoding="utf-8")
    assert main(["--check", "--chart", str(chart)]) == 1
    said = capsys.readouterr().err
    assert "README.md is out of date" in said
    assert "values.schema.json is out of date" in said
    assert (chart / "README.md").read_text(encoding="utf-8") == before
    assert main(["--chart", str(chart)]) == 0
    assert main(["--check", "--chart", str(chart)]) == 0
    assert "9470" in (chart / "README.md").read_text(encoding="utf-8")


def test_the_schema_is_a_schema():
    """It is valid draft-07, without keywords of later drafts."""
    schema = values_schema(VALUES)
    jsonschema.Draft7Validator.check_schema(schema)
    text = json.dumps(schema)
    assert '"$ref"' not in text
    assert '"$defs"' not in text
    assert '"prefixItems"' not in text


def test_the_defaults_meet_the_schema():
    """values.yaml as it is passes its own schema."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(values_schema(VALUES)).validate(values)


def test_the_schema_has_every_setting_with_its_bounds():
    """Every key of the agent's model is in the schema, at its place, with its description; bounds are kept."""
    schema = config_schema()
    for key, _ in leaves():
        part = schema
        for name in key.split("."):
            part = part["properties"][name]
        assert part["description"], key
    bounds = schema["properties"]["capture"]["properties"]["request_head_bytes"]
    assert (bounds["minimum"], bounds["maximum"]) == (256, 8192)
    assert set(schema["properties"]) == set(fields_of(Config))


def closed_objects(schema: dict, path: str = "") -> list[str]:
    """The paths of objects that list properties and let others pass, too."""
    open_ones = []
    if "properties" in schema and schema.get("additionalProperties") is not False:
        open_ones.append(path)
    for name, child in schema.get("properties", {}).items():
        open_ones += closed_objects(child, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        open_ones += closed_objects(schema["items"], f"{path}[]")
    return open_ones


def test_unknown_keys_are_refused_at_every_level():
    """Nothing with known keys lets others pass, but volumes, whose sources are Kubernetes' own."""
    assert closed_objects(values_schema(VALUES)) == [".extraVolumes[]"]


def test_every_value_is_in_the_readme():
    """The table has a row for each value, in the order of values.yaml."""
    rows = re.findall(r"^\| `([\w.]+)` \|", (CHART / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [".".join(value.path) for value in VALUES]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1", "a has no description"),
        ("a:\n  # -- B.\n  b: 1\n  c: 2", "a.c has no description"),
        ("# about\na: 1", "a has no description"),
        ("# -- Far away.\n\na: 1", "a has no description"),
        ("# @schema {}\n# -- A.\na: 1", "@schema stands below"),
        ("# -- A.\n# @schema [1]\na: 1", "@schema takes a map"),
    ],
)
def test_undocumented_values_are_an_error(text, problem):
    """A value without a description, or a hint in the wrong place, is an error that names the key."""
    with pytest.raises(SpanloomError, match=re.escape(problem)):
        read_values(text)


def test_comments_become_descriptions_and_hints():
    """Lines of one block are joined; a key with a description is one value, whatever it holds."""
    text = (
        '# heading\n\n# -- One\n# and two.\n# @schema {minimum: 1,\n# maximum: 2}\na: 1\nb:\n  # -- C.\n  c: {d: "x"}\n'
    )
    one, two = read_values(text)
    assert (one.path, one.default, one.description, one.schema) == (
        ("a",), 1, "One and two.", {"minimum": 1, "maximum": 2},
    )  # fmt: skip
    assert (two.path, two.default, two.schema) == (("b", "c"), {"d": "x"}, {})


def test_a_list_needs_the_kind_of_its_items():
    """A list of anything would let mistakes pass."""
    with pytest.raises(SpanloomError, match="a list needs"):
        values_schema(read_values("# -- A.\na: []"))
