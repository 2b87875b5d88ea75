"""What docs/operating.md and the README tell operators exists: values, settings, metrics, events, objects, commands."""

from __future__ import annotations

import ast
import copy
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from agent.config_schema import leaves
from agent.metrics import ALL
from tests.chart.engine import CHART, Engine
from tests.chart.manifests import objects_of
from tools.chart import read_values

REPOSITORY = CHART.parents[1]
GUIDE = REPOSITORY / "docs" / "operating.md"
PAGES = (GUIDE, REPOSITORY / "README.md", CHART / "README.md")

VALUES = {".".join(value.path): value for value in read_values((CHART / "values.yaml").read_text(encoding="utf-8"))}
SETTINGS = {key for key, _ in leaves()}
LABELS = {metric.name: metric.labels for metric in ALL}
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for pattern in ("agent/**/*.py", "charts/spanloom/templates/*", "charts/spanloom/values.yaml")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.is_file()
)
GRPC_CODES = {code.name.lower() for code in grpc.StatusCode}
COUNTERS = {
    name.lower() for name in re.findall(r"^\tCOUNTER_(\w+),", (REPOSITORY / "bpf" / "events.h").read_text(), re.M)
}


def quoted(page: Path) -> Iterator[str]:
    """Everything between backticks, outside of blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", text)


def is_known(key: str) -> bool:
    """A value of the chart, a setting, a section of either, or an attribute or event that the agent has in its text."""
    known = [*VALUES, *SETTINGS, *(f"config.{name}" for name in SETTINGS)]
    return any(f"{name}.".startswith(f"{key}.") for name in known) or f'"{key}"' in SOURCES


def test_what_counts_as_known():
    """The next test means something."""
    for key in ("config.sampling.ratio", "sampling", "otlp.headersSecret", "otlp.export_failing", "k8s.pod.name"):
        assert is_known(key), key
    for key in ("config.sampling.ration", "sample", "otlp.header", "otlp.export_fails", "config.otlp.endpoint"):
        assert not is_known(key), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_names_exist(page: Path):
    """Dotted keys, names with an underscore and metrics with their labels are those of the code."""
    wrong = []
    for text in quoted(page):
        if match := re.fullmatch(r'(spanloom_[a-z_]+)(?:\{(\w+)="(\w+)"\})?', text):
            name, label, value = match.groups()
            is_right = name in LABELS and (label is None or label in LABELS[name])
            is_right = is_right and (label is None or value in COUNTERS or f'"{value}"' in SOURCES)
        elif re.fullmatch(r"[a-z]\w*(\.[a-z]\w*)+", text):
            is_right = is_known(text) or (REPOSITORY / text).exists()
        elif re.fullmatch(r"[a-z]+(_[a-z]+)+", text):
            is_right = text in COUNTERS | GRPC_CODES or f'"{text}"' in SOURCES or f" {text}=" in SOURCES
        elif re.fullmatch(r"[a-z]+[A-Z]\w+", text):
            is_right = text in SOURCES
        else:
            continue
        if not is_right:
            wrong.append(text)
    assert wrong == []


def texts(node: ast.AST) -> set[str]:
    """The strings in a piece of code, which are what it may say; not its docstrings."""
    docstrings = {id(part.value) for part in ast.walk(node) if isinstance(part, ast.Expr)}
    return {
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in docstrings
    }


def reasons_of_unseen_tls() -> set[str]:
    """What the code may count in `spanloom_tls_unseen_processes_total`: what it reports itself, why it refuses a file
    that a process runs, and why a Go program's functions are not found.
    """
    found: set[str] = set()
    for name in ("tls_watch", "tls_libraries", "go_binary"):
        for node in ast.walk(ast.parse((REPOSITORY / "agent" / f"{name}.py").read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr="_report" | "_refuse"), args=[_, reason, *_]):
                    found |= texts(reason)
                case ast.Call(func=ast.Name(id="GoUnseenError"), args=[reason]):
                    found |= texts(reason)
                case ast.Subscript(value=ast.Attribute(attr="unseen"), slice=reason):
                    found |= texts(reason)
                case ast.FunctionDef(name="_use" | "_watch" | "why_unseen"):
                    for part in ast.walk(node):
                        if isinstance(part, ast.Return):
                            found |= texts(part) - {""}
    return found


def test_every_reason_why_tls_is_not_seen_is_explained():
    """The row of the table has those that the code can count, and no others."""
    (row,) = re.findall(r"^\| [^|]+ \| `spanloom_tls_unseen_processes_total`[^|]*\|(.*)\|$", GUIDE.read_text(), re.M)
    explained = re.findall(r"`(\w+)`", " ".join(re.findall(r"((?:`\w+`(?:, )?)+):", row)))
    counted = reasons_of_unseen_tls()
    assert {"java", "gone", "stacks", "too_many", "go_old", "error"} <= counted
    assert sorted(explained) == sorted(counted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path):
    """Files are there, and headings for what is behind the #."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def commands(page: Path, program: str) -> list[list[str]]:
    """The command lines of a page's indented blocks, without their comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(rf"^    ({program} .*)$", text, re.M)]


def values_of(words: list[str], file: dict[str, Any]) -> dict[str, Any]:
    """The values that a helm command gives: those of its file, and above them its ``--set``."""
    values: dict[str, Any] = copy.deepcopy(file) if "--values" in words else {}
    for option, setting in itertools.pairwise(words):
        if option == "--set":
            key, _, value = setting.partition("=")
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = yaml.safe_load(value)
    return values


def blocks() -> list[dict[str, Any]]:
    """The guide's pieces of a values file."""
    return [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_helm_takes_the_commands(helm: Engine, page: Path):
    """What the page installs or upgrades with renders, and so passes the schema of the values."""
    lines = [words for words in commands(page, "helm") if {"install", "upgrade"} & set(words)]
    assert lines
    for words in lines:
        assert words[2:4] == ["spanloom", "charts/spanloom"], words
        helm.render(values_of(words, blocks()[0]))


def test_helm_takes_the_values(helm: Engine):
    """Each piece of a values file in the guide is accepted."""
    assert len(blocks()) == 2
    for block in blocks():
        assert helm.render(block)["configmap.yaml"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_kubectl_finds_the_objects(helm: Engine, page: Path):
    """`TYPE/NAME` in a command is an object of the chart, and the namespace that of the guide."""
    objects = objects_of(helm.render({"jaeger": {"enabled": True}}))
    there = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in objects}
    for words in commands(page, "kubectl"):
        named = {word for word in words if re.fullmatch(r"[a-z]+/[a-z-]+", word)}
        assert named <= there, words
        if "-n" in words:
            assert words[words.index("-n") + 1] == "spanloom"
