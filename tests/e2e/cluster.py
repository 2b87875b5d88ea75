"""A node's worth of containers: cgroups named as container runtimes name them, and agents in their in-cluster mode.

In: the uids of pods, and a layout. Out: ``Container``, which runs commands in its cgroup, and the fixtures of the tests
in a cluster: ``containers``, ``api`` (tests/apiserver.py) and ``in_cluster``. Never: a cgroup that is left behind, or a
process of somebody else in one.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.apiserver import ApiServer
from tests.collector import CollectedSpan, Collector
from tests.e2e.harness import AgentProcess, curl, wait_until
from tests.e2e.servers import Server

NODE = "node-a"
_ROOTS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_KIND_NODE = "d6701ec289c56e4391acb11d07474b3139466857a305490575508a8b7a9fcf22"


def _systemd(prefix: str, quality: str, root: str = "") -> str:
    """The systemd driver: slices that repeat the names of those above, dashes of the uid as underscores."""
    above = f"{root}kubepods.slice/"
    if quality:
        above += f"{root}kubepods-{quality}.slice/"
        quality += "-"
    return f"{above}{root}kubepods-{quality}pod{{slice}}.slice/{prefix}-{{id}}.scope"


LAYOUTS = {
    "containerd": _systemd("cri-containerd", "burstable"),
    "containerd, guaranteed": _systemd("cri-containerd", ""),
    "containerd, cgroupfs": "kubepods/burstable/pod{uid}/{id}",
    "CRI-O, crun": _systemd("crio", "besteffort") + "/container",
    "cri-dockerd": _systemd("docker", "besteffort"),
    "kind": f"docker/{_KIND_NODE}/kubelet.slice/" + _systemd("cri-containerd", "besteffort", "kubelet-"),
    "k3s": "kubepods/besteffort/pod{uid}/{id}",
    "k3s, rootless": "user.slice/user-1000.slice/user@1000.service/user.slice/k3s-rootless.scope/"
    "kubepods/burstable/pod{uid}/{id}",
}
"""Path of a container's processes below the root of the hierarchy."""


class Container:
    """A container of a pod: its cgroup, and what runs in it.

    ``uid`` is what the runtime was told: the pod's uid, or of a static pod the hash of its manifest. ``root`` is that
    of another hierarchy than cgroup v2.
    """

    def __init__(self, uid: str, layout: str = "containerd", root: Path | None = None) -> None:
        self.id = secrets.token_hex(32)
        self._root = root or next(path for path in _ROOTS if (path / "cgroup.procs").exists())
        self.path = self._root / LAYOUTS[layout].format(uid=uid, slice=uid.replace("-", "_"), id=self.id)
        while not self.path.exists():
            with suppress(FileNotFoundError):  # somebody else has just removed an empty one above
                self.path.mkdir(parents=True)

    def enter(self, arguments: list[str | Path]) -> list[str | Path]:
        """The command line that runs ``arguments`` in this container."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *arguments]

    def wrap(self, server: Server) -> Server:
        """The same server, started in this container."""
        return dataclasses.replace(server, arguments=self.enter(list(server.arguments)))

    def is_empty(self) -> bool:
        return not (self.path / "cgroup.procs").read_text()

    def remove(self) -> None:
        """Remove the cgroup, and those above it that are empty. May be called twice."""
        with suppress(OSError):
            for path in (self.path, *self.path.parents):
                if path == self._root:
                    break
                path.rmdir()


@pytest.fixture
def containers() -> Iterator[Callable[..., Container]]:
    """Makes containers: ``containers(pod_uid)``. Requested before ``serve``, so that they are empty at the end."""
    made: list[Container] = []

    def make(uid: str, layout: str = "containerd", root: Path | None = None) -> Container:
        made.append(Container(uid, layout, root))
        return made[-1]

    yield make
    for container in made:
        if container.path.exists():
            wait_until(container.is_empty, "an empty cgroup")
            container.remove()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.write_service_account(tmp_path / "account")
        yield server


@pytest.fixture
def in_cluster(tmp_path: Path, collector: Collector, api: ApiServer) -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents in a pod of their own on the node."""
    with ExitStack() as stack:

        def start(ports: list[int], settings: dict | None = None, config: Path | None = None) -> AgentProcess:
            chosen = {"kubernetes.service_account": str(tmp_path / "account"), "kubernetes.cluster_name": "test"}
            pod = {"POD_NAMESPACE": "spanloom", "POD_NAME": "spanloom-x", "POD_UID": str(uuid.uuid4())}
            environment = {**api.environ, "NODE_NAME": NODE, **pod}
            return stack.enter_context(
                AgentProcess(tmp_path, collector, ports, chosen | (settings or {}), environment, config)
            )

        yield start


def ask(port: int, path: str = "/status/200") -> None:
    assert curl("-o", "/dev/null", f"http://127.0.0.1:{port}{path}").returncode == 0


def served(tracing: AgentProcess, port: int, count: int = 1) -> list[CollectedSpan]:
    """Wait for that many spans of the server at ``port``; all that there are."""
    wait_until(
        lambda: len(tracing.spans(port, "SERVER")) >= count, lambda: f"{count} spans:\n{tracing.stderr()[-3000:]}"
    )
    return tracing.spans(port, "SERVER")


def number_of(span: CollectedSpan) -> int:
    """The ``number`` in the query of a request, as the tests number them."""
    return int(str(span.attributes.get("url.full") or span.attributes.get("url.query")).rpartition("number=")[2])


@contextmanager
def stopped(tracing: AgentProcess) -> Iterator[None]:
    """The agent does nothing meanwhile: whatever ends, ends before the agent looks at it."""
    os.kill(tracing.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(tracing.pid, signal.SIGCONT)
