"""The command line: what is printed where, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import agent
from agent import cli, errors
from agent.config import Config, load
from agent.config_schema import leaves

ROOT = Path(__file__).parents[2]


def spanloom(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the real command with an environment of its own."""
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def stage(monkeypatch):
    """Put a module where a command imports the part that needs a kernel; returns the calls it received."""

    def replace(parent: object, name: str, function: str, behaviour) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []

        def record(*arguments, **keywords):
            calls.append((arguments, keywords))
            return behaviour()

        full_name = f"{parent.__name__}.{name}"
        module = types.ModuleType(full_name)
        setattr(module, function, record)
        monkeypatch.setitem(sys.modules, full_name, module)
        monkeypatch.setattr(parent, name, module, raising=False)
        return calls

    return replace


def raising(error: BaseException):
    def behaviour():
        raise error

    return behaviour


# ---- As a real process -------------------------------------------------------------------------------------------


def test_version_as_process():
    """--version prints the name and version and nothing else."""
    result = spanloom("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"spanloom {agent.__version__}\n", "")


def test_print_config_as_process(tmp_path):
    """run --print-config shows the effective settings of file, environment and --set, without secrets."""
    path = tmp_path / "config.yaml"
    path.write_text("sampling: {ratio: 0.5}\n")
    result = spanloom(
        *("run", "--config", str(path), "--set", "capture.request_head_bytes=2048", "--print-config"),
        OTEL_EXPORTER_OTLP_HEADERS="api-key=hunter2",
    )
    shown = yaml.safe_load(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert shown["sampling"]["ratio"] == 0.5
    assert shown["capture"]["request_head_bytes"] == 2048
    assert shown["export"]["otlp"]["headers"] == {"api-key": "***"}
    assert "hunter2" not in result.stdout


def test_configuration_error_as_process():
    """A configuration error is one line on standard error and exit code 2, without a traceback."""
    result = spanloom("run", "--set", "capture.request_head_byts=5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "spanloom: capture.request_head_byts: unknown key; did you mean capture.request_head_bytes?\n"
    )


def test_reader_that_went_away():
    """When the reader of the output is gone the command ends quietly with 141."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "agent", "run", "--print-config"],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--print-config"]])
def test_output_that_cannot_be_written(arguments):
    """A full disk behind standard output is a one-line error and exit code 1."""
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "agent", *arguments],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == "spanloom: cannot write to standard output: No space left on device\n"


def test_help_imports_nothing_heavy():
    """--help and --version import neither the configuration nor any third-party package."""
    code = (
        "import sys; from agent.cli import main; main(['--version']); main(['run', '--help']); "
        "print([m for m in ('msgspec', 'yaml', 'grpc', 'cffi', 'agent.config', 'agent.model') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout.endswith("\n[]\n")


# ---- In process --------------------------------------------------------------------------------------------------


def test_version_command(capsys):
    """The version command prints what --version prints."""
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"spanloom {agent.__version__}\n"


def test_no_command_shows_the_help_as_an_error(capsys):
    """Without a command the help goes to standard error and the code is that of wrong arguments."""
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "commands:" in output.err


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["demo"], ["version"]])
def test_every_help_lists_every_exit_code(capsys, command):
    """Each help text explains the exit code of every error class that has its own."""
    assert cli.main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.partition("exit codes:\n")[2].splitlines()
    explained = {int(line.split()[0]) for line in lines}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    assert explained == {0, cli.EXIT_INTERRUPTED, cli.EXIT_BROKEN_PIPE} | {kind.exit_code for kind in classes}


def test_settings_in_the_help_texts_exist(capsys):
    """Each --set example of the help is a valid setting."""
    cli.main(["run", "--help"])
    words = capsys.readouterr().out.replace("'", "").split("--set ")[1:]
    keys = [word.partition("=")[0] for word in words if "=" in word.split()[0] and "." in word.split()[0]]
    assert len(keys) >= 3
    assert set(keys) <= {key for key, _ in leaves()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["--vers"],
        ["run", "--conf", "x"],
        ["run", "extra"],
        ["run", "--set"],
        ["check", "--jso"],
        ["demo", "--requests", "0"],
        ["demo", "--requests", "1e3"],
        ["demo", "--requests", "9" * 5000],
        ["demo", "--keep", "-1"],
        ["demo", "--keep", "nan"],
        ["demo", "--keep", "soon"],
    ],
)
def test_wrong_arguments(capsys, arguments):
    """Wrong or abbreviated arguments are an error of the command line: code 2, usage on standard error."""
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: spanloom")


def test_run_passes_the_configuration_and_the_code(stage, monkeypatch):
    """run hands the effective configuration to the runtime and returns its exit code."""
    monkeypatch.setattr(os, "environ", {})
    calls = stage(agent, "runtime", "run", lambda: 7)
    assert cli.main(["run", "--set", "sampling.ratio=0.5", "--set", "sampling.ratio=0.25"]) == 7
    assert calls == [((load(None, ["sampling.ratio=0.25"], {}), None), {})]


def test_print_config_needs_no_runtime(stage, capsys, monkeypatch):
    """--print-config prints the settings and starts nothing."""
    monkeypatch.setattr(os, "environ", {})
    calls = stage(agent, "runtime", "run", lambda: 7)
    assert cli.main(["run", "--print-config"]) == 0
    assert calls == []
    assert yaml.safe_load(capsys.readouterr().out).keys() == set(Config.__struct_fields__)


def test_check_passes_json(stage):
    """check tells its implementation whether JSON is wanted and returns its exit code."""
    import agent.kernel

    calls = stage(agent.kernel, "check", "main", lambda: 4)
    assert cli.main(["check"]) == 4
    assert cli.main(["check", "--json"]) == 4
    assert [keywords for _, keywords in calls] == [{"json": False}, {"json": True}]


def test_demo_passes_its_options(stage):
    """demo passes the number of requests and how long to stay."""
    calls = stage(agent, "demo", "main", lambda: 0)
    assert cli.main(["demo", "--requests", "20", "--keep", "1.5"]) == 0
    assert calls == [((), {"requests": 20, "keep_seconds": 1.5})]


@pytest.mark.parametrize(
    "kind",
    [
        errors.SpanloomError,
        errors.ConfigError,
        errors.PrivilegeError,
        errors.KernelUnsupportedError,
        errors.TracingRefusedError,
        errors.ExportError,
    ],
)
def test_expected_errors_are_one_line(stage, capsys, kind):
    """Each expected error gives its own exit code and exactly one line, even if its text had several."""
    stage(agent, "runtime", "run", raising(kind("first\nsecond")))
    assert cli.main(["run"]) == kind.exit_code
    assert capsys.readouterr().err == "spanloom: first second\n"


def test_interrupt(stage, capsys):
    """Ctrl-C ends with 130 and without a traceback."""
    stage(agent, "runtime", "run", raising(KeyboardInterrupt()))
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err == ""


def test_unexpected_errors_keep_their_traceback(stage):
    """A bug is not dressed up as an expected error."""
    stage(agent, "runtime", "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["run"])
