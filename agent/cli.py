"""The ``spanloom`` command: arguments -> what they ask for -> an exit code.

In: the argument list. Out: the exit code; errors that are expected are one line on standard error. Never: a traceback
for an expected error, or an import that ``--help`` and ``--version`` do not need (the commands import their modules
when they run).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence

from agent import __version__
from agent.errors import SpanloomError

EXIT_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for a program that Ctrl-C ended."""
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, what a shell reports for a program whose reader went away."""

_EXIT_CODES = """\
exit codes:
  0    success
  1    an error at run time; for demo: a trace was not whole
  2    wrong arguments or configuration
  3    not root, or a capability is missing
  4    the kernel is too old or lacks a feature without which nothing can be traced
  5    the kernel refuses tracing here (lockdown, a security module, a sandbox)
  130  interrupted with Ctrl-C
  141  the reader of standard output went away
"""

_MAIN_EPILOG = f"""\
examples:
  spanloom check                      what this kernel and these privileges allow
  sudo spanloom run                   trace this host, print the traces
  sudo spanloom demo                  trace a small sample application

{_EXIT_CODES}"""

_RUN_EPILOG = f"""\
examples:
  sudo spanloom run
  sudo spanloom run --config /etc/spanloom/config.yaml
  sudo spanloom run --set export.otlp.endpoint=http://localhost:4317 --set sampling.ratio=0.1
  sudo spanloom run --set 'select.executables.include=[nginx, "python3*"]'
  spanloom run --config config.yaml --print-config

The OTEL_EXPORTER_OTLP_* variables give defaults, --config overrides them, --set overrides both.
Every setting is explained in docs/configuration.md.

{_EXIT_CODES}"""

_CHECK_EPILOG = f"""\
examples:
  sudo spanloom check
  sudo spanloom check --json

{_EXIT_CODES}"""

_DEMO_EPILOG = f"""\
examples:
  sudo spanloom demo
  sudo spanloom demo --requests 20 --keep 600

{_EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code listed in ``--help``."""
    try:
        code = _dispatch(argv)
        _print("")  # Flushes here, where a failure can still be reported, and not when the interpreter ends.
    except SpanloomError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    return code


def _dispatch(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed the help, the version or what is wrong
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        raise
    except OSError as error:  # nothing but printing can fail in argparse
        raise _unwritable(error) from None
    command: Callable[[argparse.Namespace], int] | None = arguments.command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    return command(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from agent import config

    path = None if arguments.config is None else Path(arguments.config)
    if arguments.print_config:
        _print(config.dump(config.load(path, arguments.overrides, os.environ)))
        return 0
    try:
        if path is None:
            file, settings = None, config.load(None, arguments.overrides, os.environ)
        else:
            from agent.live import ConfigFile

            file = ConfigFile(path, arguments.overrides, os.environ)
            settings = file.config
        from agent import runtime

        return runtime.run(settings, file)
    except SpanloomError as error:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            from agent.kube.cluster import report_failure

            report_failure(error, os.environ)
        raise


def _check(arguments: argparse.Namespace) -> int:
    from agent.kernel import check

    return check.main(json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from agent import demo

    return demo.main(requests=arguments.requests, keep_seconds=arguments.keep)


def _version(arguments: argparse.Namespace) -> int:
    _print(f"spanloom {__version__}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spanloom",
        description="Traces the HTTP traffic of this host's processes with eBPF, without touching them.",
        epilog=_MAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"spanloom {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int], text: str, epilog: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(command=function)
        return command

    run = add("run", _run, "trace this host until SIGTERM or Ctrl-C", _RUN_EPILOG)
    run.add_argument("--config", metavar="FILE", help="YAML file of settings")
    run.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one setting, its value in YAML; may be repeated, the last one wins",
    )
    run.add_argument(
        "--print-config", action="store_true", help="print the effective settings, secrets hidden, and do not trace"
    )

    check = add("check", _check, "show what this kernel and these privileges allow", _CHECK_EPILOG)
    check.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    demo = add("demo", _demo, "trace a small sample application and show its traces", _DEMO_EPILOG)
    demo.add_argument(
        "--requests", metavar="N", type=_request_count, default=5, help="requests to send, 1 to 10000 (default: 5)"
    )
    demo.add_argument(
        "--keep",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="keep the application running and traced for so long afterwards (default: 0)",
    )

    add("version", _version, "print the version", _EXIT_CODES)
    return parser


def _request_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 10000, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be seconds from 0 to 86400, not {text!r}")
    return seconds


def _print(text: str) -> None:
    """Write to standard output at once; nothing happens when it is closed, as with ``print``."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> SpanloomError:
    _discard_stdout()
    return SpanloomError(f"cannot write to standard output: {error.strerror}")


def _fail(message: str, exit_code: int) -> int:
    try:
        print(end="", flush=True)
    except OSError:
        _discard_stdout()
    with contextlib.suppress(OSError):  # standard error may be unwritable too; the exit code still tells
        print(f"spanloom: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return exit_code


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter complains about it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
