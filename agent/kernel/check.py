"""``spanloom check``: what this kernel and these privileges allow.

In: nothing. Out: a table or one JSON document on standard output, and the exit code that ``spanloom run`` would have.
Every feature is tried for real (agent.kernel.check_probes) and never looked up by kernel version; nothing stays loaded
or attached. Never: a traceback because something is refused.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import textwrap

import msgspec

from agent import __version__
from agent.errors import KernelUnsupportedError, SpanloomError, TracingRefusedError
from agent.kernel.capture import Capture, CaptureSettings, ProgramStatistics
from agent.kernel.check_probes import NO, PROBES, REFUSED, REQUIRED, UNUSED, YES, Finding, Probe, may_trace

_AS_ROOT = "run as root (sudo), or in a privileged container"
_POLICY = "root is not enough here: a security module, a seccomp filter or a sandbox refuses it"


class Result(msgspec.Struct, frozen=True):
    """One row of the report, as ``--json`` shows it. ``remedy`` is empty when there is nothing to do."""

    title: str
    state: str
    errno: str
    need: str
    purpose: str
    detail: str
    remedy: str


class Report(msgspec.Struct, frozen=True):
    """The whole answer; its fields are the keys of the JSON document and stay as they are."""

    version: str
    kernel: str
    machine: str
    uid: int
    exit_code: int
    verdict: str
    checks: dict[str, Result]
    programs: list[ProgramStatistics]


def main(json: bool) -> int:
    """Print what is possible here. Returns 0 when ``spanloom run`` would work, else the code it would end with."""
    found = report()
    if json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        print(render(found, shutil.get_terminal_size((100, 24)).columns, colour=not is_plain))
    return found.exit_code


def report() -> Report:
    """Try everything. Takes about a second: most of it is the verifier's work on the capture programs."""
    checks = {}
    for probe in PROBES:
        finding = probe.find()
        checks[probe.key] = Result(
            title=probe.title,
            state=finding.state,
            errno=finding.errno,
            need=probe.need,
            purpose=probe.purpose,
            detail=finding.detail,
            remedy=_remedy(probe, finding),
        )
    chosen, programs, error = _load_capture()
    checks["capture"] = Result(
        title="capture programs",
        state=YES if error is None else REFUSED if _is_refusal(error) else NO,
        errno="",
        need=REQUIRED,
        purpose="they record the exchanges",
        detail=str(error) if error is not None else f"{chosen}; {_verifier_work(programs)}",
        remedy="" if error is None else "see the message, and the rows above",
    )
    exit_code, verdict = _verdict(checks, error)
    return Report(
        version=__version__,
        kernel=platform.release(),
        machine=platform.machine(),
        uid=os.geteuid(),
        exit_code=exit_code,
        verdict=verdict,
        checks=checks,
        programs=programs,
    )


def _remedy(probe: Probe, finding: Finding) -> str:
    """What to do: about a lack it is the probe's or the finding's word, about a refusal it is a matter of rights."""
    if finding.state == YES or probe.need == UNUSED:
        return ""
    if finding.remedy or finding.state == NO:
        return finding.remedy or probe.remedy
    return _POLICY if may_trace() else _AS_ROOT


def render(found: Report, columns: int, colour: bool) -> str:
    """The report as a table of at most ``columns`` characters per line (at least 60)."""
    width = max(columns, 60)
    rows = [(check.title, _state_text(check), check.need, check) for check in found.checks.values()]
    sizes = [max(len(row[index]) for row in rows) for index in range(3)]
    indent = sum(sizes) + 6
    lines = [f"Spanloom {found.version} on Linux {found.kernel} ({found.machine}), uid {found.uid}", ""]
    for title, state, need, check in rows:
        texts = [check.purpose + (f": {check.detail}" if check.detail else "")]
        if check.remedy:
            texts.append(f"-> {check.remedy}")
        wrapped = [line for text in texts for line in textwrap.wrap(text, width - indent, break_long_words=True)]
        left = f"{title:{sizes[0]}}  {_paint(check, state.ljust(sizes[1]), colour)}  {need:{sizes[2]}}  "
        lines.append((left + wrapped[0]).rstrip())
        lines.extend(" " * indent + line for line in wrapped[1:])
    lines += ["", *textwrap.wrap(f"spanloom run: {found.verdict}", width)]
    return "\n".join(lines)


def _state_text(check: Result) -> str:
    return f"{check.state} ({check.errno})" if check.errno else check.state


def _paint(check: Result, text: str, colour: bool) -> str:
    if not colour or check.need == UNUSED:
        return text
    number = 32 if check.state == YES else 31 if check.need == REQUIRED else 33
    return f"\x1b[{number}m{text}\x1b[0m"


def _load_capture() -> tuple[str, list[ProgramStatistics], SpanloomError | None]:
    try:
        with Capture(CaptureSettings()) as capture:
            chosen = f"backend {capture.backend} by {capture.hooks}"
            if capture.reasons:
                chosen += f", because {', and '.join(capture.reasons)}"
            return chosen, capture.statistics(), None
    except SpanloomError as error:
        return "", [], error
    except OSError as error:
        return "", [], SpanloomError(f"the capture programs cannot be read: {error.strerror}")


def _is_refusal(error: SpanloomError) -> bool:
    return error.exit_code not in (SpanloomError.exit_code, KernelUnsupportedError.exit_code)


def _verifier_work(programs: list[ProgramStatistics]) -> str:
    total = sum(program.verified_instructions for program in programs)
    if not total:  # the kernel tells it from 5.16 on (commit aba64c7da983)
        return f"{len(programs)} programs"
    largest = max(programs, key=lambda program: program.verified_instructions)
    return (
        f"{len(programs)} programs, {total} instructions followed by the verifier, "
        f"{largest.verified_instructions} of them in {largest.name}; its limit is 1000000 per program"
    )


def _verdict(checks: dict[str, Result], error: SpanloomError | None) -> tuple[int, str]:
    """The exit code of ``run``: its loader's own error, else what attaching would meet."""
    if error is not None:
        return error.exit_code, f"would end with exit code {error.exit_code}: {error}"
    for key in ("tp_btf", "map_iter"):
        if checks[key].state != YES:
            kind = TracingRefusedError if checks[key].state == REFUSED else KernelUnsupportedError
            return kind.exit_code, f"would end with exit code {kind.exit_code}: {checks[key].title} cannot be attached"
    return 0, "works here"
