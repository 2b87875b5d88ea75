"""A process is its pid and its start, a container is its cgroup: what has either one again inherits nothing."""

from __future__ import annotations

import json
import sys
import uuid
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.apiserver import make_pod
from tests.e2e import servers
from tests.e2e.cluster import NODE, ask, number_of, served, stopped
from tests.e2e.harness import free_port, one
from tests.e2e.servers import APPS


def unused_pid() -> int:
    """One that is far from those that the kernel gives out next."""
    last = int(Path("/proc/sys/kernel/ns_last_pid").read_text())
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    pid = (last + limit // 2) % (limit - 1000) + 500
    while Path(f"/proc/{pid}").exists():
        pid += 1
    return pid


def curl_command(port: int, number: int) -> list[str]:
    return ["curl", "-q", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number={number}"]


@pytest.mark.parametrize("late", [False, True], ids=["looked at once", "looked at when all is over"])
def test_a_pid_that_is_used_again(containers, api, in_cluster, start, public_path: Path, late: bool):
    """Twenty pods' processes have the same pid one right after the other, a server of yet another pod at last."""
    port, last_port, pid = free_port(), free_port(), unused_pid()
    tracing = in_cluster([port, last_port], {"kubernetes.wait_seconds": 20})
    start(servers.python_threads(port, public_path).arguments, port=port)
    commands: list[tuple[str, list[str]]] = []
    owners: dict[int, str] = {}
    for number in range(21):
        uid = str(uuid.uuid4())
        container = containers(uid)
        owners[number] = container.id
        api.put(make_pod(f"pod-{number}", "shop", NODE, {"app": container.id}, uid=uid))
        commands.append((str(container.path), curl_command(port, number)))
    server = servers.python_threads(last_port, public_path).arguments
    commands[-1] = commands[-1][0], list(map(str, server))
    with stopped(tracing) if late else nullcontext():
        start([sys.executable, APPS / "same_pid.py", str(pid), json.dumps(commands)], port=last_port)
    spans = tracing.wait_for_spans(20, port=port, kind="CLIENT")
    found = {number_of(span): (span.resource.get("container.id"), span.resource["process.pid"]) for span in spans}
    assert found == {number: (owners[number], pid) for number in range(20)}
    ask(last_port)
    span = one(served(tracing, last_port))
    assert (span.resource["k8s.pod.name"], span.resource["process.pid"]) == ("pod-20", pid)


@pytest.fixture
def hierarchy() -> Path:
    """The memory controller's hierarchy of cgroup v1, beside the v2 of a hybrid host."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, options, *_ = line.split(" ")
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(path)
    pytest.skip("the memory controller of this kernel is in cgroup v2")


def test_containers_that_share_a_cgroup(hierarchy: Path, containers, api, in_cluster, start, serve, public_path: Path):
    """Where runtimes use cgroup v1, all containers are in one group of v2: v1 tells them apart.

    So it does of what has ended before it was looked at, whose groups are gone by then.
    """
    ports = [free_port(), free_port()]
    tracing = in_cluster(ports)
    for port, name in zip(ports, ("one", "two"), strict=True):
        uid = str(uuid.uuid4())
        container = containers(uid, "containerd, cgroupfs", hierarchy)
        api.put(make_pod(name, "shop", NODE, {"app": container.id}, uid=uid))
        serve(container.wrap(servers.python_threads(port, public_path)), port)
        ask(port)
    names = [one(served(tracing, port)).resource["k8s.pod.name"] for port in ports]
    assert names == ["one", "two"]
    with stopped(tracing):
        for number, port in enumerate(ports):
            uid = str(uuid.uuid4())
            container = containers(uid, "containerd, cgroupfs", hierarchy)
            api.put(make_pod(f"job-{number}", "shop", NODE, {"app": container.id}, uid=uid))
            assert start(container.enter(curl_command(port, number))).popen.wait(20) == 0
            container.remove()
            assert not container.path.exists()
    for number, port in enumerate(ports):
        spans = tracing.wait_for_spans(2, port=port, kind="CLIENT")  # the first is of ``ask``, on the host
        span = one(span for span in spans if span.attributes["url.full"].endswith(f"number={number}"))
        assert span.resource["k8s.pod.name"] == f"job-{number}"
        assert span.resource["process.executable.name"] == "curl"
