"""Every fuzz target runs over its corpus without the fuzzer: a crash that was found once stays fixed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
TARGETS = sorted(FUZZ.glob("fuzz_*.py"))
INPUTS = [
    (target, seed)
    for target in TARGETS
    for seed in sorted((FUZZ / "corpus" / target.stem.removeprefix("fuzz_")).glob("*"))
]
ODD_INPUTS = (b"", b"\0", b"\xff" * 64, b"\n" * 300, bytes(range(256)) * 4)


class Atheris:
    """Stands in for the fuzzer: takes the entry function and runs nothing."""

    def __init__(self) -> None:
        self.entry: Callable[[bytes], None] | None = None

    def Setup(self, arguments: list[str], entry: Callable[[bytes], None]) -> None:
        self.entry = entry

    def Fuzz(self) -> None:
        pass


_LOADED: dict[Path, ModuleType] = {}


def load(path: Path) -> ModuleType:
    if path not in _LOADED:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        _LOADED[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_LOADED[path])
    return _LOADED[path]


@pytest.fixture
def entry_of(monkeypatch) -> Callable[[Path], Callable[[bytes], None]]:
    """The function that a target's ``main`` hands to the fuzzer."""

    def find(path: Path) -> Callable[[bytes], None]:
        module, fuzzer = load(path), Atheris()
        monkeypatch.setattr(module, "atheris", fuzzer)
        module.main()
        assert fuzzer.entry is not None
        return fuzzer.entry

    return find


@pytest.mark.parametrize(("target", "seed"), INPUTS, ids=lambda path: path.name)
def test_the_corpus_passes(target, seed, entry_of):
    """The entry function takes the seed, and returns None as the fuzzer demands."""
    assert entry_of(target)(seed.read_bytes()) is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_odd_inputs_pass(target, entry_of):
    """Inputs that are no recipe at all are inputs, too."""
    entry = entry_of(target)
    for data in ODD_INPUTS:
        entry(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_cut_seeds_pass(target, entry_of):
    """Every seed, cut in the middle and with a byte turned, is taken."""
    entry = entry_of(target)
    for other, seed in INPUTS:
        if other == target:
            data = seed.read_bytes()
            entry(data[: len(data) // 2])
            middle = len(data) // 3
            entry(data[:middle] + bytes(255 - byte for byte in data[middle : middle + 1]) + data[middle + 1 :])


def test_every_target_has_seeds():
    """A fuzzer that begins with nothing gets nowhere, and no corpus is left without its target."""
    names = {target.stem.removeprefix("fuzz_") for target in TARGETS}
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == names
    assert {target.stem.removeprefix("fuzz_") for target, _ in INPUTS} == names


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_without_the_fuzzer_a_target_says_what_to_install(target, monkeypatch):
    """Run by hand without atheris, a target ends with a hint."""
    module = load(target)
    monkeypatch.setattr(module, "atheris", None)
    with pytest.raises(SystemExit, match="atheris"):
        module.main()
