"""The Helm engine and the rendered ci values files, once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.engine import CHART, Engine
from tests.chart.manifests import objects_of

CI_FILES = sorted((CHART / "ci").glob("*-values.yaml"))


def values_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def helm() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def renders(helm: Engine) -> dict[str, dict[str, str]]:
    """Name of the ci values file without its ending -> template -> text."""
    return {path.name.removesuffix("-values.yaml"): helm.render(values_of(path)) for path in CI_FILES}


@pytest.fixture(params=[path.name.removesuffix("-values.yaml") for path in CI_FILES])
def case(request: pytest.FixtureRequest) -> str:
    """Each ci values file."""
    return request.param


@pytest.fixture
def objects(renders: dict[str, dict[str, str]], case: str) -> list[dict[str, Any]]:
    """The objects of each ci values file."""
    return objects_of(renders[case])
