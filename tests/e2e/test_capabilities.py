"""The chart's mode ``capabilities``: the agent runs with the listed capabilities alone, and needs each of them.

The lists are those of the rendered chart; everything else is really dropped, as a container runtime does it for root:
from the bounding set, and with no_new_privs. Not here: a runtime's seccomp and AppArmor profiles.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import ApiServer, make_pod
from tests.chart.conftest import CI_FILES, values_of
from tests.chart.engine import Engine
from tests.chart.manifests import agent_of, objects_of
from tests.collector import Collector
from tests.e2e import servers
from tests.e2e.cluster import NODE, Container
from tests.e2e.harness import (
    AgentFailedError,
    AgentProcess,
    Process,
    clean_environment,
    curl,
    free_port,
    one,
    wait_until,
)
from tests.e2e.servers import Server

NOBODY = "65534"
DECLARED = "declared by the process"

# include/uapi/linux/capability.h
BITS = {"DAC_READ_SEARCH": 2, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24, "PERFMON": 38, "BPF": 39}

VALUES: dict[str, dict[str, Any]] = {
    "default": {"securityContext": {"mode": "capabilities"}},
    "ci": values_of(next(path for path in CI_FILES if path.name == "capabilities-values.yaml")),
    "sys_admin": {
        "securityContext": {
            "mode": "capabilities",
            "capabilities": ["SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"],
        }
    },
}


@pytest.fixture(scope="module")
def contexts() -> dict[str, dict[str, Any]]:
    """The agent's security context as the chart renders it for each of ``VALUES``."""
    engine = Engine()
    try:
        return {name: agent_of(objects_of(engine.render(values)))["securityContext"] for name, values in VALUES.items()}
    finally:
        engine.close()


def mask(capabilities: Iterable[str]) -> int:
    return sum(1 << BITS[name] for name in capabilities)


def status_of(pid: int) -> dict[str, int]:
    """The capability sets of a process, and NoNewPrivs (proc(5))."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: int(value, 16) for key, _, value in lines if key.startswith("Cap") or key == "NoNewPrivs"}


def dropping_all_but(capabilities: Iterable[str], may_gain: bool = False) -> list[str]:
    """A command that becomes another one of root, with no other capabilities than these."""
    # The tests' own machine may lack some: what is not there cannot be kept.
    ours = status_of(os.getpid())["CapBnd"]
    kept = [f"+{name.lower()}" for name in capabilities if ours >> BITS[name] & 1]
    return [
        *("setpriv", "--inh-caps", "-all", "--ambient-caps", "-all", "--bounding-set", ",".join(["-all", *kept])),
        *([] if may_gain else ["--no-new-privs"]),
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the agent told of the pods. ``service`` and ``language`` are of processes of other users than root.

    ``path``: whether a program was left out that only the path of its executable tells from another one.
    """

    service: object
    language: object
    path: bool
    pods: tuple[object, ...]
    is_one_trace: bool


WHOLE = Seen(service=DECLARED, language="cpp", path=True, pods=("front", "back", "short"), is_one_trace=True)


class Node:
    """Pods behind an API server, none of them root's, and agents that are to describe them.

    ``front`` declares its own name and asks ``back``, which maps the library that tells of C++. ``short`` is a process
    that has ended before the agent, held up meanwhile, can look at it. ``unwanted`` runs a copy of the program of
    ``back`` that is deselected by its path.
    """

    def __init__(self, directory: Path, public: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._count = 0
        self._ports = front, back, unwanted = free_port(), free_port(), free_port()
        self._api = stack.enter_context(ApiServer())
        self._api.write_service_account(directory / "account")
        self._containers = {}
        for name in (*WHOLE.pods, "unwanted"):
            uid = str(uuid.uuid4())
            container = self._containers[name] = Container(uid)
            stack.callback(self._remove, container)
            self._api.put(make_pod(name, "shop", NODE, {"app": container.id}, uid=uid))
        tier = shutil.copy(servers.APPS / "tier.py", public)
        arguments = ["/usr/bin/python3", tier, "threads", "none", str(front), str(back)]
        environment = {"OTEL_SERVICE_NAME": DECLARED}
        asking = Server(arguments=arguments, executable="python3", language="python", environment=environment)
        answering = servers.nginx(back, public, main="user nobody nogroup;")
        answering.environment["LD_PRELOAD"] = "libstdc++.so.6"
        copied = servers.nginx(unwanted, public, main="user nobody nogroup;")
        (public / "unwanted").mkdir()
        program = shutil.copy(copied.arguments[0], public / "unwanted")
        copied = dataclasses.replace(copied, arguments=[program, *copied.arguments[1:]])
        for name, server, port in (
            ("back", answering, back),
            ("front", self._of_nobody(asking), front),
            ("unwanted", copied, unwanted),
        ):
            inside = self._containers[name].wrap(server)
            log, variables = directory / f"{name}.log", clean_environment(**server.environment)
            process = stack.enter_context(Process(inside.arguments, log=log, env=variables, cwd=public))
            process.wait_for_port(port)

    @staticmethod
    def _remove(container: Container) -> None:
        wait_until(lambda: not (container.path / "cgroup.procs").read_text(), "an empty cgroup")
        container.remove()

    @staticmethod
    def _of_nobody(server: Server) -> Server:
        become = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
        return dataclasses.replace(server, arguments=[*become, *server.arguments])

    def agent(self, collector: Collector, within: list[str]) -> AgentProcess:
        """An agent in a pod of its own, not yet started."""
        self._count += 1
        directory = self._directory / f"agent-{self._count}"
        directory.mkdir()
        settings = {
            "kubernetes.service_account": str(self._directory / "account"),
            # Whatever the load of the machine: no span leaves without its pod.
            "kubernetes.wait_seconds": 10,
            "select.executables.exclude": ["*/unwanted/nginx"],
        }
        pod = {"POD_NAMESPACE": "spanloom", "POD_NAME": "spanloom-x", "POD_UID": str(uuid.uuid4()), "NODE_NAME": NODE}
        return AgentProcess(directory, collector, self._ports, settings, {**self._api.environ, **pod}, within=within)

    def observe(self, tracing: AgentProcess) -> Seen:
        """Send a request through both tiers, and one of a process that ends at once; say what the spans tell."""
        front, back, unwanted = self._ports
        for port in (front, unwanted):
            assert curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200").returncode == 0
        tracing.wait_for_spans(5)
        tracing.popen.send_signal(signal.SIGSTOP)
        try:
            url = f"http://127.0.0.1:{back}/status/204"
            fetch = Server(arguments=["curl", "-q", "-s", "-o", "/dev/null", url], executable="curl", language="")
            inside = self._containers["short"].wrap(self._of_nobody(fetch))
            with Process(inside.arguments, log=self._directory / "short.log") as short:
                assert short.popen.wait(20) == 0, short.output()
        finally:
            tracing.popen.send_signal(signal.SIGCONT)
        tracing.wait_for_spans(2, port=back, kind="CLIENT")
        tracing.settle()
        begin = one(span for span in tracing.spans(front, "CLIENT"))
        serving = one(tracing.spans(front, "SERVER"))
        asking = one(span for span in tracing.spans(back, "CLIENT") if span.trace_id == begin.trace_id)
        answering = one(span for span in tracing.spans(back, "SERVER") if span.trace_id == begin.trace_id)
        ended = one(span for span in tracing.spans(back, "CLIENT") if span.trace_id != begin.trace_id)
        chain = [begin, serving, asking, answering]
        one(tracing.spans(unwanted, "CLIENT"))
        return Seen(
            service=serving.resource.get("service.name"),
            language=answering.resource.get("telemetry.sdk.language"),
            path=not tracing.spans(unwanted, "SERVER"),
            pods=tuple(span.resource.get("k8s.pod.name") for span in (serving, answering, ended)),
            is_one_trace=[span.parent_span_id for span in chain] == ["", *(span.span_id for span in chain[:-1])],
        )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with ExitStack() as stack:
        # pytest's own directories are closed to other users.
        public = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spanloom-test-")))
        public.chmod(0o755)
        yield Node(tmp_path_factory.mktemp("node"), public, stack)


@pytest.mark.parametrize("values", VALUES)
def test_the_list_is_enough(node: Node, contexts, collector: Collector, values: str):
    """Traces, pods, names and languages are all there, and the kernel says that the agent has nothing else."""
    context = contexts[values]
    assert (context["privileged"], context["capabilities"]["drop"], context["runAsUser"]) == (False, ["ALL"], 0)
    kept = context["capabilities"]["add"]
    may_gain = context["allowPrivilegeEscalation"]
    with node.agent(collector, dropping_all_but(kept, may_gain)) as tracing:
        allowed = mask(kept) & status_of(os.getpid())["CapBnd"]
        assert status_of(tracing.pid) == {
            "CapInh": 0,
            "CapPrm": allowed,
            "CapEff": allowed,
            "CapBnd": allowed,
            "CapAmb": 0,
            "NoNewPrivs": int(not may_gain),
        }
        assert node.observe(tracing) == WHOLE


def test_the_default_list_is_that_of_this_test(contexts):
    """Each capability of the mode's default is taken away below; the list of the ci file adds what old kernels need."""
    assert set(contexts["default"]["capabilities"]["add"]) == {*REQUIRED, *LOST}
    assert set(contexts["ci"]["capabilities"]["add"]) == {*REQUIRED, *LOST, "SYS_RESOURCE"}


REQUIRED = ("BPF", "PERFMON")
"""Without them there is no tracing; the others make it tell more."""

MEMORY_BY_PERFMON = tuple(map(int, re.match(r"(\d+)\.(\d+)", os.uname().release).groups())) >= (6, 15)
"""From here on PERFMON opens what /proc shows of other processes' memory (may_access_mm in kernel/fork.c)."""

LOST = {
    # Executables are closed then, and memory maps and environments on older kernels.
    "SYS_PTRACE": {"path": False} | ({} if MEMORY_BY_PERFMON else {"service": "front", "language": None}),
    # Of other users' processes only the environment is closed.
    "DAC_READ_SEARCH": {"service": "front"},
}
"""Capability -> what differs from ``WHOLE`` without it: the pod's name stands in for the one declared."""


@pytest.mark.parametrize("missing", REQUIRED)
def test_without_a_required_one_the_start_is_refused(node: Node, contexts, collector: Collector, missing: str):
    """Exit code 3, and one line that names it."""
    kept = [name for name in contexts["default"]["capabilities"]["add"] if name != missing]
    with pytest.raises(AgentFailedError) as caught:
        node.agent(collector, dropping_all_but(kept)).start()
    assert caught.value.code == 3
    (line,) = caught.value.stderr.splitlines()
    assert "CAP_BPF and CAP_PERFMON" in line


@pytest.mark.parametrize("missing", LOST)
def test_without_another_one_names_are_lost(node: Node, contexts, collector: Collector, missing: str):
    """The traces and the pods stay; what goes is what values.yaml says, and nothing else."""
    kept = [name for name in contexts["default"]["capabilities"]["add"] if name != missing]
    with node.agent(collector, dropping_all_but(kept)) as tracing:
        assert not status_of(tracing.pid)["CapBnd"] & mask([missing])
        assert node.observe(tracing) == dataclasses.replace(WHOLE, **LOST[missing])
