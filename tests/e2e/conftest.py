"""Fixtures of the end-to-end tests, and the check that there can be any.

Where the kernel refuses the probes every test here fails with the agent's own message. Only ``SPANLOOM_SKIP_E2E=1``
skips them, all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector
from tests.e2e.cluster import api, containers, in_cluster  # noqa: F401 - fixtures
from tests.e2e.edge import Edge, edge_of
from tests.e2e.harness import AgentFailedError, AgentProcess, Process, clean_environment, wait_until
from tests.e2e.servers import Server
from tests.e2e.tls_any import tls_any, tls_client  # noqa: F401 - fixtures

_HERE = Path(__file__).parent

AgentFactory = Callable[..., AgentProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SPANLOOM_SKIP_E2E") == "1":
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="SPANLOOM_SKIP_E2E=1"))


@pytest.fixture(scope="session", autouse=True)
def probes_attach(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The agent can trace this host at all. Its failure is the failure of every end-to-end test, with its message."""
    message = ""
    try:
        AgentProcess(tmp_path_factory.mktemp("probes"), None, settings={"export.console": "off"}).start().stop()
    except AgentFailedError as error:
        message = f"no end-to-end test can run here, because {error}"
    if message:
        pytest.fail(message, pytrace=False)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A real OTLP collector in this process."""
    with Collector() as running:
        yield running


@pytest.fixture
def agent(tmp_path: Path, collector: Collector) -> Iterator[AgentFactory]:
    """Starts agents that export to ``collector``: ``agent(ports=[...], settings={"a.b": value}, environment={...})``.

    Each is stopped at the end of the test, and must end well.
    """
    with ExitStack() as stack:

        def start(
            ports: list[int] | tuple[int, ...] = (),
            settings: Mapping[str, Any] | None = None,
            environment: Mapping[str, str] | None = None,
            config: Path | None = None,
        ) -> AgentProcess:
            return stack.enter_context(AgentProcess(tmp_path, collector, ports, settings, environment, config))

        yield start


@pytest.fixture
def tls_agent(agent: AgentFactory) -> AgentFactory:
    """Starts agents like ``agent``, and waits until they watch what uses TLS: this process does, for one."""

    def start(*arguments: Any, **options: Any) -> AgentProcess:
        tracing = agent(*arguments, **options)
        wait_until(lambda: '"event":"tls_o' in tracing.stderr(), tracing.state)  # on, or off
        return tracing

    return start


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory like ``tmp_path`` that other users may read."""
    with tempfile.TemporaryDirectory(prefix="spanloom-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of localhost and its key, in one file that everybody may read."""
    directory = tmp_path_factory.mktemp("certificate")
    made = directory / "localhost.pem"
    key, cert = directory / "key", directory / "cert"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
        env=clean_environment(),
    )
    made.write_text(key.read_text() + cert.read_text())
    return made


@pytest.fixture
def pem(certificate: Path, public_path: Path) -> Path:
    """The same where workers of servers can read it."""
    shutil.copy(certificate, public_path / "localhost.pem")
    (public_path / "localhost.pem").chmod(0o644)
    return public_path / "localhost.pem"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """``start(arguments, port=..., env=..., cwd=...)``: a program that accepts connections, until the test ends."""
    with ExitStack() as stack:
        count = 0

        def run(arguments: list[str | Path], *, port: int | None = None, **options: Any) -> Process:
            nonlocal count
            count += 1
            log = tmp_path / f"process-{count}.log"
            process = stack.enter_context(Process(arguments, log=log, **options))
            if port is not None:
                process.wait_for_port(port)
            return process

        yield run


@pytest.fixture
def serve(start: Callable[..., Process]) -> Callable[..., Process]:
    """Starts a ``Server``: ``serve(server, port, service="name")``."""

    def run(server: Server, port: int, service: str = "") -> Process:
        environment = clean_environment(**server.environment, **({"OTEL_SERVICE_NAME": service} if service else {}))
        return start(server.arguments, port=port, env=environment, cwd=server.cwd)

    return run


@pytest.fixture(scope="module")
def module_edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """One agent and its scripted processes for all tests of a module."""
    with edge_of(tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])) as running:
        yield running


@pytest.fixture
def edge(module_edge: Edge) -> Iterator[Edge]:
    """The module's agent, as if it were new; the test leaves nothing behind in the kernel."""
    module_edge.begin()
    yield module_edge
    module_edge.assert_forgotten()
