"""``spanloom demo``: the real agent, a small application of five services, some requests, and their traces.

In: how many requests, and how long to stay. Out: the traces on standard output, what is going on on standard error, and
exit code 0 only if every trace is whole (``agent.demo.plan`` knows what that means). Never: a change to the host that
stays, or a look at anything but the demo's own ports.

The services, in ``services/``, are programs that know nothing of Spanloom.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from agent.console import TreeConsole
from agent.demo import application, plan
from agent.demo.agent_process import AgentProcess, Item
from agent.demo.application import Children
from agent.errors import ExportError, SpanloomError

_POLL_SECONDS = 0.02
_QUIET_SECONDS = 3.0
"""No new span for so long: what is missing comes when the agent is stopped, or never."""
_SECONDS_PER_REQUEST = 20.0
"""The client gives up on each request before that."""
_SHOWN_TRACES = 20
_SHOWN_FAULTS = 30

_PICTURE = """\

                                        ╭─→ stock ──────────→ warehouse
  client ──→ gateway ──→ shop ──────────┤   {stock}    {warehouse}
             {gateway}       {shop} ╰─→ price
                                            {price}

"""
_LEGEND = """\
linked by: how the agent found the caller
  remote parent  the id that the client sent        peer        the two ends of one connection
  forwarded      the trace header, passed on        request id  the x-request-id, passed on
  thread         the thread that was serving the request made the call: no header at all

"""
_ASCII = str.maketrans("─→╭╰┤…", "->,`|~")


def main(requests: int, keep_seconds: float) -> int:
    """Run the demo. Returns 0 if every trace is whole and 1 if not.

    Raises errors of ``agent.errors``; those of the agent keep its exit code.
    """
    with (
        _leaving_in_order(),
        tempfile.TemporaryDirectory(prefix="spanloom-demo-", ignore_cleanup_errors=True) as name,
        Children(Path(name)) as children,
    ):
        return _run(children, Path(name), requests, keep_seconds)


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: with its children and its files."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    # What nohup ignores stays ignored.
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    previous = [(number, signal.signal(number, leave)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def _run(children: Children, directory: Path, count: int, keep_seconds: float) -> int:
    nginx = application.find_nginx()
    addresses = application.choose_addresses()
    began = time.monotonic()
    _say("starting the agent")
    ports = [application.port_of(addresses[name]) for name in application.SERVICE_NAMES]
    agent = AgentProcess(children, ports, addresses[application.AGENT_TELEMETRY])
    agent.wait_until_ready()
    _say(f"probes attached after {time.monotonic() - began:.1f} s; starting the services, none of which knows of it")
    made_of = application.start_services(children, directory, addresses, nginx)
    requests = plan.make_requests(count, os.urandom)
    _say(f"sending {_plural(count, 'request')}")
    items: list[Item] = []
    statuses = _send(children, directory, requests, addresses, agent, items)
    _collect(agent, items, sum(len(request.expected) for request in requests))
    if not keep_seconds:
        items += agent.stop()
    _print(_PICTURE.format_map(made_of))
    whole = _report(requests, statuses, items)
    if keep_seconds:
        _stay(agent, addresses, keep_seconds)
    else:
        _say("next: spanloom demo --keep 600 lets you play with this application; spanloom run traces this host")
    return 0 if whole else 1


def _send(
    children: Children,
    directory: Path,
    requests: Sequence[plan.Request],
    addresses: dict[str, str],
    agent: AgentProcess,
    items: list[Item],
) -> list[int | None]:
    """Let the client send the requests; returns the statuses that it got. Spans are taken meanwhile."""
    wanted, got = directory / "requests.json", directory / "statuses.json"
    wanted.write_text(
        json.dumps(
            [{"address": addresses[one.entry], "target": one.target, "headers": dict(one.headers)} for one in requests]
        )
    )
    with wanted.open("rb") as stdin, got.open("wb") as stdout:
        client = children.start(
            "client",
            [sys.executable, "-I", str(application.SERVICES / "client.py")],
            {"OTEL_SERVICE_NAME": "client"},
            stdin,
            stdout,
        )
    deadline = time.monotonic() + _SECONDS_PER_REQUEST * len(requests)
    while client.poll() is None:
        items += agent.take()
        agent.raise_if_ended()
        if time.monotonic() > deadline:
            raise SpanloomError(f"the client has not ended in time: {children.log('client')}")
        time.sleep(_POLL_SECONDS)
    if client.returncode:
        raise SpanloomError(f"the client ended with {client.returncode}: {children.log('client')}")
    return json.loads(got.read_text())


def _collect(agent: AgentProcess, items: list[Item], expected: int) -> None:
    """Take spans until all are there that should be, or none comes any more."""
    last = time.monotonic()
    while len(items) < expected and time.monotonic() - last < _QUIET_SECONDS:
        time.sleep(_POLL_SECONDS)
        agent.raise_if_ended()
        new = agent.take()
        if new:
            items += new
            last = time.monotonic()


def _report(requests: Sequence[plan.Request], statuses: Sequence[int | None], items: Sequence[Item]) -> bool:
    """Print the traces and what is wrong with them. Returns whether nothing is."""
    by_request, strays = plan.sort_spans(items, requests)
    faults: list[str] = []
    whole = 0
    for request, status in zip(requests, statuses, strict=True):
        trace = by_request[request.number]
        found = plan.faults_of_trace(request, trace)
        if status != request.status:
            found.insert(0, f"the client got {status or 'no answer'} instead of {request.status}")
        whole += not found
        faults += [f"request {request.number} ({request}): {fault}" for fault in found]
        if request.number <= _SHOWN_TRACES or found:
            _show(f"request {request.number}: {request}", trace)
    if len(requests) > _SHOWN_TRACES:
        _print(f"… of the other {len(requests) - _SHOWN_TRACES} traces, only those that are not whole are shown\n\n")
    for stray in strays[:_SHOWN_TRACES]:
        _show("a trace that belongs to no request", stray)
    faults += plan.faults_of_strays(strays)
    _print(_LEGEND)
    for fault in faults[:_SHOWN_FAULTS]:
        _print(f"not whole: {fault}\n")
    if len(faults) > _SHOWN_FAULTS:
        _print(f"not whole: and {len(faults) - _SHOWN_FAULTS} more faults\n")
    if faults:
        _print(_paint(f"{whole} of {_plural(len(requests), 'trace')} whole", "1;31") + ": see above\n")
        return False
    failing = sum(request.status >= 400 for request in requests)
    _print(
        _paint(f"{whole} of {_plural(len(requests), 'trace')} whole", "1;32")
        + f": {_plural(len(items), 'span')} of {_plural(len({info.service_name for _, info in items}), 'service')}"
        + (f", {_plural(failing, 'failing request')} shown as failing\n" if failing else "\n")
    )
    return True


def _show(caption: str, trace: Sequence[Item]) -> None:
    _print(_paint(caption, "1;35") + "\n" + ("" if trace else "(no span of it was found)\n\n"))
    _write(TreeConsole(sys.stdout), trace, is_last=True)


def _write(console: TreeConsole, items: Sequence[Item], is_last: bool) -> None:
    try:
        console.write(items)
        if is_last:
            console.flush()
    except ExportError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            raise error.__cause__ from None  # the command line knows what that means
        raise


def _stay(agent: AgentProcess, addresses: dict[str, str], seconds: float) -> None:
    """Show what comes, until the time is over or Ctrl-C."""
    _say(f"staying for {seconds:g} s, Ctrl-C ends it. In another terminal, try:")
    _say(f"  curl -H 'x-request-id: mine' http://{addresses['gateway']}/articles/coffee")
    _say(f"  curl http://{addresses['stock']}/stock/coffee")
    _say(f"  curl http://{addresses[application.AGENT_TELEMETRY]}/metrics")
    console = TreeConsole(sys.stdout)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            agent.raise_if_ended()
            _write(console, agent.take(), is_last=False)
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        _say("ending")
    _write(console, agent.stop(), is_last=True)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _paint(text: str, style: str) -> str:
    """https://no-color.org"""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{style}m{text}\x1b[0m"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"demo: {text}", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII)
    print(text, end="", flush=True)
