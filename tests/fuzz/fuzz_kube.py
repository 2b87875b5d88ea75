"""Fuzz target of what comes from container runtimes and the API server: cgroups, pods, label selectors.

``python tests/fuzz/fuzz_kube.py [libFuzzer arguments] CORPUS_DIR``. In: the first byte chooses what the rest is: the
text of ``/proc/<pid>/cgroup`` (c), a label selector (l), or a Pod as JSON. Out: an AssertionError, or any exception but
the documented ones, is a finding. The checks need no atheris, so the unit tests replay the corpus through them.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.errors import ConfigError
    from agent.kube.cgroups import ContainerRef, container_of
    from agent.kube.directory import PodDirectory
    from agent.kube.pods import read_pod
    from agent.kube.select import LabelSelector, PodRules

RULES = PodRules(namespaces_exclude=("kube-*",), labels="!legacy")


def check_cgroup(text: str) -> None:
    """A container's id and uid are short, whatever the path."""
    found = container_of(text)
    if found is not None:
        assert 0 < len(found.container_id) <= 128, found
        assert len(found.pod_uid) <= 128, found


def check_pod(item: object) -> None:
    """A pod is read or refused; what was read can be placed, changed and removed, and leaves nothing behind."""
    try:
        pod = read_pod(item)
    except ValueError:
        return
    assert pod.uid
    assert pod.name
    assert pod.namespace
    directory = PodDirectory(RULES, node_name="node")
    directory.change("ADDED", item)
    directory.change("MODIFIED", item)
    assert (directory.pods, directory.malformed) == (1, 0)
    for ref in [ContainerRef(one.id, pod.uid) for one in pod.containers] + [ContainerRef("", pod.uid)]:
        placement = directory.place(ref, {"service.name": "declared"})
        keys = [key for key, _ in placement.attributes]
        assert len(set(keys)) == len(keys), keys
        assert all(value not in ("", ()) for _, value in placement.attributes), placement
        assert dict(placement.attributes)["service.name"] == "declared"
    directory.change("DELETED", item)
    assert directory.pods == 0


def check_selector(text: str) -> None:
    """A selector is understood or refused, and always decides alike."""
    message = ""
    try:
        selector = LabelSelector(text)
    except ConfigError as error:
        message = str(error)
    if message:
        assert "\n" not in message, message
        return
    for labels in ({}, {"app": "shop"}, {"app": "", "tier": "7"}):
        assert selector.matches(labels) == LabelSelector(text).matches(labels)


def test_one_input(data: bytes) -> None:
    """The entry point for atheris."""
    kind, rest = data[:1], data[1:]
    text = rest.decode("utf-8", "replace")
    if kind == b"c":
        check_cgroup(text)
    elif kind == b"l":
        check_selector(text)
    else:
        try:
            item = msgspec.json.decode(rest)
        except (ValueError, RecursionError):
            return
        check_pod(item)


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
