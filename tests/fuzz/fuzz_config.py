"""Fuzz target of the configuration: ``python tests/fuzz/fuzz_config.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is the text of a configuration file; lines in front that begin with ``--set `` are overrides, lines that
begin with ``OTEL_`` are variables of the environment. Out: anything but a configuration or a ConfigError of one line is
a finding, and so is a configuration that changes when it is dumped and loaded again. The checks need no atheris.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent import config, config_yaml
    from agent.config_schema import Config
    from agent.errors import ConfigError

_DIRECTORY = tempfile.TemporaryDirectory(prefix="fuzz-config-")
PATH = Path(_DIRECTORY.name) / "config.yaml"
BUILTINS = (str, int, float, bool, type(None))
INPUT_MAX = 65536


def check_plain(value: object) -> None:
    """Assert that YAML became plain data."""
    if type(value) is dict:
        for key, item in value.items():
            assert type(key) in BUILTINS, type(key)
            check_plain(item)
    elif type(value) is list:
        for item in value:
            check_plain(item)
    else:
        assert type(value) in BUILTINS, type(value)


def check_error(error: ConfigError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text, repr(text)
    assert len(text) < 2000, len(text)


def load(text: bytes, overrides: list[str], environ: dict[str, str]) -> Config | None:
    PATH.write_bytes(text)
    try:
        return config.load(PATH, overrides, environ)
    except ConfigError as error:
        check_error(error)
        return None


def check(data: bytes) -> None:
    """The entry point for atheris."""
    overrides: list[str] = []
    environ: dict[str, str] = {}
    rest = data[:INPUT_MAX]
    while rest.startswith((b"--set ", b"OTEL_")):
        line, _, rest = rest.partition(b"\n")
        text = os.fsdecode(line)
        if text.startswith("OTEL_"):
            name, _, value = text.partition("=")
            environ[name] = value
        else:
            overrides.append(text.removeprefix("--set "))
    try:
        check_plain(config_yaml.parse(rest.decode("utf-8", "replace"), "text"))
    except ConfigError as error:
        check_error(error)
    found = load(rest, overrides, environ)
    if found is not None and not found.export.otlp.headers:
        text = config.dump(found)
        assert load(text.encode(), [], {}) == found, text


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
