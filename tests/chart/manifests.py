"""Rendered templates -> Kubernetes objects, and look-ups in them that the tests share."""

from __future__ import annotations

from typing import Any

from agent.config_yaml import parse


def objects_of(rendered: dict[str, str]) -> list[dict[str, Any]]:
    """Return all objects in order. A key that is given twice is an error, as for the API server's strict decoder."""
    objects = []
    for template, text in rendered.items():
        if template != "NOTES.txt":
            objects.extend(parse(part, template) for part in text.split("\n---\n"))
    return objects


def one(objects: list[dict[str, Any]], kind: str, component: str = "agent") -> dict[str, Any]:
    """The only object of a kind and a component."""
    found = [item for item in objects if item["kind"] == kind and component_of(item) == component]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def component_of(item: dict[str, Any]) -> str:
    return item["metadata"]["labels"]["app.kubernetes.io/component"]


def pod_of(item: dict[str, Any]) -> dict[str, Any]:
    """The pod's spec of a workload, or of a pod."""
    return item["spec"] if item["kind"] == "Pod" else item["spec"]["template"]["spec"]


def agent_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The agent's container."""
    (container,) = pod_of(one(objects, "DaemonSet"))["containers"]
    return container


def environment_of(container: dict[str, Any]) -> dict[str, Any]:
    """Name -> the variable, with its value or where that comes from. Every name stands once."""
    variables = container["env"]
    result = {variable["name"]: variable for variable in variables}
    assert len(result) == len(variables), "a variable is given twice"
    return result


def config_of(objects: list[dict[str, Any]]) -> str:
    """The agent's configuration file in the ConfigMap."""
    data = one(objects, "ConfigMap")["data"]
    assert list(data) == ["spanloom.yaml"]
    return data["spanloom.yaml"]
