"""The lock files are what pyproject.toml asks for: nothing is missing, nothing is over."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from tools.lock import ARCHITECTURES, PYTHON_VERSION, normalised, requirements

REPOSITORY = Path(__file__).resolve().parents[2]
WANTED = requirements(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")))


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> version and hashes. Every line must have the form that the lock is written in."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    entries = text.replace(" \\\n    ", " ").splitlines()[1:]
    parsed = {}
    for entry in entries:
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)", entry)
        assert match, entry
        parsed[match[1]] = (match[2], match[3].split())
    assert len(parsed) == len(entries), "a package stands twice"
    return parsed


def needed(wanted: list[str]) -> dict[str, list[Requirement]]:
    """Package -> what is asked of it, directly or by a package that is; as the packages installed here tell it."""
    environment = default_environment() | {
        "python_version": PYTHON_VERSION,
        "python_full_version": f"{PYTHON_VERSION}.0",
        "extra": "",
    }
    asked: dict[str, list[Requirement]] = {}
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        requirement = waiting.pop()
        name = normalised(requirement.name)
        is_new = name not in asked
        asked.setdefault(name, []).append(requirement)
        if is_new:
            further = map(Requirement, metadata.requires(name) or ())
            waiting += [one for one in further if one.marker is None or one.marker.evaluate(environment)]
    return asked


@pytest.mark.parametrize("name", WANTED)
def test_the_lock_is_what_is_asked_for(name: str):
    """After a change of the dependencies in pyproject.toml: `make lock`."""
    lock = read_lock(name)
    asked = needed(WANTED[name])
    assert set(lock) == set(asked)
    for package, asking in asked.items():
        version, _ = lock[package]
        assert all(requirement.specifier.contains(version) for requirement in asking), (package, version)


@pytest.mark.parametrize("name", WANTED)
def test_every_package_has_its_hashes(name: str):
    """One for both architectures, or one for each."""
    for package, (_, hashes) in read_lock(name).items():
        assert len(set(hashes)) == len(hashes), package
        assert len(hashes) in (1, len(ARCHITECTURES)), package


def test_the_build_and_the_image_have_the_same_versions():
    """The binding is compiled with the cffi that runs it."""
    build, runtime = map(read_lock, ("requirements-build.lock", "requirements.lock"))
    assert {name: build[name] for name in build if name in runtime} == {
        name: runtime[name] for name in runtime if name in build
    }
