"""The processes of the demo: on which ports they listen, how they are started, and that every one of them ends.

In: a temporary directory. Out: running children. Never: a shell, a port that is reachable from another host, a child
that outlives the demo (the kernel ends them should the demo be killed), a signal to a process that is not our child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from agent.errors import SpanloomError

SERVICES = Path(__file__).parent / "services"

SERVICE_NAMES = ("gateway", "shop", "stock", "price", "warehouse")
AGENT_TELEMETRY = "agent"

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_HOST = "127.0.0.1"
_PORTS = range(18_000, 32_000)  # below what Linux gives to outgoing connections
_START_SECONDS = 20.0
_STOP_SECONDS = 5.0  # what the agent needs at most
_LOG_TAIL_BYTES = 2000
_PR_SET_PDEATHSIG = 1  # prctl(2)
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # Debian keeps nginx there; it is not in everybody's PATH


def choose_addresses() -> dict[str, str]:
    """A free loopback address for each service and for the agent's own endpoint."""
    ports = iter(random.sample(_PORTS, len(_PORTS)))
    addresses: dict[str, str] = {}
    for name in (*SERVICE_NAMES, AGENT_TELEMETRY):
        port = next((port for port in ports if _is_free(port)), None)
        if port is None:
            raise SpanloomError(f"no free port from {_PORTS[0]} to {_PORTS[-1]} on {_HOST}")
        addresses[name] = f"{_HOST}:{port}"
    return addresses


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of an earlier server that are only waiting for their end do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class Children:
    """The demo's child processes. Leaving the context ends them all.

    Their standard error goes to files in ``directory``, which is small: none of them logs requests.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: list[subprocess.Popen[bytes]] = []
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave children behind.
        before = [(number, signal.signal(number, signal.SIG_IGN)) for number in ENDING_SIGNALS]
        try:
            for process in self._running:
                if process.poll() is None:
                    process.terminate()
            deadline = time.monotonic() + _STOP_SECONDS
            for process in self._running:
                _reap(process, deadline)
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a child in a session of its own, so that Ctrl-C reaches the demo alone, which ends all in order."""
        with open(self._log_path(name), "wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=log,
                    env={**os.environ, **environment},
                    cwd=self._directory,
                    start_new_session=True,
                    preexec_fn=self._die_with_parent,  # the demo has no threads, so this is safe
                )
            except OSError as error:
                raise SpanloomError(f"cannot start {command[0]}: {error.strerror}") from error
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        """The end of what a child has written to its standard error."""
        with contextlib.suppress(OSError), open(self._log_path(name), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace").strip()
        return ""

    def _log_path(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _die_with_parent(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _reap(process: subprocess.Popen[bytes], deadline: float) -> None:
    if process.stdout is not None:
        process.stdout.close()  # what is still written to it goes nowhere, and nobody waits for a reader
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def find_nginx() -> str:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN))
    found = shutil.which("nginx", path=path)
    if found is None:
        raise SpanloomError("the demo needs nginx: run make setup, or apt-get install nginx-light")
    return found


def start_services(children: Children, directory: Path, addresses: dict[str, str], nginx: str) -> dict[str, str]:
    """Start the sample application and wait until it listens. Returns what each service is made of, for people."""
    node = shutil.which("node")
    python = [sys.executable, "-I"]
    config = string.Template((SERVICES / "nginx.conf").read_text("utf-8"))
    (directory / "nginx.conf").write_text(config.substitute(listen=addresses["gateway"], shop=addresses["shop"]))
    commands = {
        "warehouse": ([*python, str(SERVICES / "warehouse.py")], "Python threads"),
        "stock": ([*python, str(SERVICES / "stock.py")], "Python threads"),
        "price": (
            ([node, str(SERVICES / "price.mjs")], "Node.js")
            if node
            else ([*python, str(SERVICES / "price.py")], "Python")
        ),
        "shop": ([*python, str(SERVICES / "shop.py")], "Python asyncio"),
        "gateway": ([nginx, "-e", "stderr", "-p", f"{directory}/", "-c", "nginx.conf"], "nginx"),
    }
    calls = {name.upper(): address for name, address in addresses.items() if name != AGENT_TELEMETRY}
    processes = {
        name: children.start(name, command, {**calls, "OTEL_SERVICE_NAME": name, "LISTEN": addresses[name]})
        for name, (command, _) in commands.items()
    }
    deadline = time.monotonic() + _START_SECONDS
    for name, process in processes.items():
        while not is_listening(addresses[name]):
            if process.poll() is not None:
                raise SpanloomError(f"the service {name} ended with {process.returncode}: {children.log(name)}")
            if time.monotonic() > deadline:
                raise SpanloomError(f"the service {name} does not listen after {_START_SECONDS:.0f} s")
            time.sleep(0.02)
    return {name: made_of for name, (_, made_of) in commands.items()}


def is_listening(address: str) -> bool:
    """Whether somebody accepts connections; sends nothing, so that no exchange comes of it."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((_HOST, port_of(address))) == 0
