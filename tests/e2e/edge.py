"""One agent and a pair of scripted processes for all tests of a module, and exact statements about their spans.

In: traffic that a test has finished. Out: its spans, server and client, in the order of their beginning, once nothing
of it is in flight any more: what is missing then is missing for good, and what is too much is there.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.collector import CollectedSpan, Collector
from tests.e2e.harness import AgentProcess, free_port, show, wait_until
from tests.e2e.scripted import Peer

ARRIVAL_SECONDS = 10.0
"""Bound on the way of a finished exchange to the collector; the usual time is 0.2 s."""


class Seen(NamedTuple):
    """What a span says of an exchange: path, status code or None, error.type or None."""

    path: str
    status: int | None
    error: str | None


def seen(span: CollectedSpan) -> Seen:
    attributes = span.attributes
    path = attributes.get("url.path")
    if path is None:
        path = urlsplit(attributes["url.full"]).path
    return Seen(path, attributes.get("http.response.status_code"), attributes.get("error.type"))


def duration_ns(span: CollectedSpan) -> int:
    return span.end_time_ns - span.start_time_ns


class Spans(NamedTuple):
    servers: list[CollectedSpan]
    clients: list[CollectedSpan]

    def one(self) -> tuple[CollectedSpan, CollectedSpan]:
        """The server's and the client's span of the only exchange, which must be linked."""
        assert len(self.servers) == len(self.clients) == 1, self.show()
        self.assert_linked()
        return self.servers[0], self.clients[0]

    def assert_linked(self) -> None:
        """Each server span is the only child of one client span, which is a root."""
        clients = {span.span_id: span for span in self.clients}
        assert len(self.servers) == len(clients), self.show()
        for server in self.servers:
            client = clients.pop(server.parent_span_id, None)
            assert client is not None, f"{server.span_id} has a wrong parent:\n" + self.show()
            assert server.trace_id == client.trace_id, self.show()
            assert not client.parent_span_id, self.show()
            assert server.attributes["spanloom.link.method"] == "peer"

    def show(self) -> str:
        return f"servers:\n{show(self.servers[:60])}clients:\n{show(self.clients[:60])}"


class Edge:
    """The agent of a module, its scripted server and client, and a port for their traffic."""

    def __init__(self, agent: AgentProcess, collector: Collector, server: Peer, client: Peer) -> None:
        self.agent = agent
        self.collector = collector
        self.server = server
        self.client = client
        self.port, *self.other_ports = agent.ports
        self._taken = 0
        self._metrics: dict[str, float] = {}

    def begin(self) -> None:
        """Called before each test: what earlier ones left is not this one's."""
        self.server.renew()
        self.client.renew()
        self.agent.settle()
        self._taken = len(self.collector.spans())
        self._metrics = self.agent.metrics()

    def grown(self, metric: str) -> int:
        """How much a metric has grown in this test."""
        return int(self.agent.metrics().get(metric, 0) - self._metrics.get(metric, 0))

    def dropped(self) -> dict[str, int]:
        """Exchanges dropped in this test, by reason."""
        before = {key: value for key, value in self._metrics.items() if key.startswith(_DROPPED)}
        now = {key: value for key, value in self.agent.metrics().items() if key.startswith(_DROPPED)}
        grown = {key: int(value - before.get(key, 0)) for key, value in now.items()}
        return {key.removeprefix(_DROPPED).rstrip("}"): value for key, value in grown.items() if value}

    def spans(self, servers: int, clients: int | None = None) -> Spans:
        """The spans of this test: so many of servers and, unless said, as many of clients, when all is settled."""
        clients = servers if clients is None else clients
        # Of what is missing after this wait the assertion below tells more.
        self.collector.wait_for(lambda spans: len(spans) >= self._taken + servers + clients, ARRIVAL_SECONDS)
        self.agent.settle()
        spans = sorted(self.collector.spans()[self._taken :], key=lambda span: span.start_time_ns)
        found = Spans(
            [span for span in spans if span.kind == "SERVER"], [span for span in spans if span.kind == "CLIENT"]
        )
        assert (len(found.servers), len(found.clients)) == (servers, clients), (
            f"{servers} + {clients} spans expected, not {len(found.servers)} + {len(found.clients)}; "
            f"dropped: {self.dropped()}\n{found.show()}{self.agent.state()}"
        )
        return found

    def expect(self, exchanges: Iterable[tuple[str, int]], *, linked: bool = True) -> Spans:
        """Exactly these paths with these statuses, on both sides, in order; nothing dropped."""
        exchanges = list(exchanges)
        spans = self.spans(len(exchanges))
        servers = [Seen(path, status, str(status) if status >= 500 else None) for path, status in exchanges]
        clients = [Seen(path, status, str(status) if status >= 400 else None) for path, status in exchanges]
        assert [seen(span) for span in spans.servers] == servers, spans.show()
        assert [seen(span) for span in spans.clients] == clients, spans.show()
        for span in (*spans.servers, *spans.clients):
            assert span.status == ("ERROR" if seen(span).error else "UNSET"), spans.show()
        if linked:
            spans.assert_linked()
        assert not self.dropped(), self.dropped()
        return spans

    def connections(self, *ports: int) -> int:
        """Connections that the kernel's map holds for a server port (the module's own, unless said)."""
        return sum(
            1 for local, remote in _connection_ports(self.agent.pid) if {local, remote} & {*(ports or [self.port])}
        )

    def assert_forgotten(self, *ports: int) -> None:
        """Nothing of the test's connections stays behind in the kernel, nor of threads and processes that ended."""
        wait_until(lambda: not self.connections(*ports), lambda: f"{self.connections(*ports)} connections are kept")
        wait_until(lambda: not left_behind(self.agent.pid), lambda: f"kept: {left_behind(self.agent.pid)[:20]}")


_DROPPED = "spanloom_exchanges_dropped_total{reason="


@contextmanager
def edge_of(directory: Path, *, ports: int = 4, settings: dict[str, Any] | None = None) -> Iterator[Edge]:
    """Start everything for a module."""
    chosen = [free_port() for _ in range(ports)]
    with (
        Collector() as collector,
        Peer() as server,
        Peer() as client,
        AgentProcess(directory, collector, chosen, settings) as agent,
    ):
        yield Edge(agent, collector, server, client)


# -- the agent's maps, read through bpf(2): the agent itself has no use for such a listing

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_MAP_LOOKUP_ELEM, _MAP_GET_NEXT_KEY, _MAP_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 1, 4, 14, 15
_libc = ctypes.CDLL(None, use_errno=True)


def left_behind(pid: int) -> list[str]:
    """What the agent's maps hold of clients' connections that are not tracked any more, and of ended threads and
    processes.
    """
    connections = {key for key, _ in _entries(pid, "connections")}
    return [
        *(f"endpoint {key.hex()}" for key, connection in _entries(pid, "endpoints") if connection not in connections),
        *(
            f"{name} {task}"
            for name in ("threads", "processes")
            for task in (int.from_bytes(key, sys.byteorder) for key, _ in _entries(pid, name))
            if not Path(f"/proc/{task}").exists()  # that of a thread is not listed, and is there
        ),
    ]


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    return _libc.syscall(_SYS_BPF, command, buffer, 128)


def _map_of(pid: int, name: str) -> tuple[int, int, int]:
    """A descriptor of a process's BPF map, by name, and the sizes of its keys and values."""
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        fields = dict(line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line)
        if "map_id" not in fields:
            continue
        descriptor = _bpf(_MAP_GET_FD_BY_ID, struct.pack("<I", int(fields["map_id"])))
        info = ctypes.create_string_buffer(128)
        if descriptor < 0 or _bpf(
            _OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", descriptor, len(info), ctypes.addressof(info))
        ):
            raise OSError(ctypes.get_errno(), "bpf")
        # struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags, name
        if info.raw[24:40].rstrip(b"\0").decode() == name:
            return descriptor, *struct.unpack_from("<II", info.raw, 8)
        os.close(descriptor)
    raise AssertionError(f"process {pid} has no map {name}")


def _entries(pid: int, name: str) -> list[tuple[bytes, bytes]]:
    """Keys and values of a process's BPF map."""
    descriptor, key_size, value_size = _map_of(pid, name)
    found = []
    try:
        key, value = ctypes.create_string_buffer(key_size), ctypes.create_string_buffer(value_size)
        following = ctypes.create_string_buffer(key_size)
        previous = 0
        while not _bpf(_MAP_GET_NEXT_KEY, struct.pack("<IIQQ", descriptor, 0, previous, ctypes.addressof(following))):
            key.raw = following.raw
            previous = ctypes.addressof(key)
            # One that is gone meanwhile is none.
            if not _bpf(_MAP_LOOKUP_ELEM, struct.pack("<IIQQ", descriptor, 0, previous, ctypes.addressof(value))):
                found.append((key.raw, value.raw))
    finally:
        os.close(descriptor)
    return found


def _connection_ports(pid: int) -> list[tuple[int, int]]:
    """(local port, remote port) of every connection."""
    # The two ports stand 48 bytes before the end of struct record_exchange, which the captured bytes follow: 1024 + 256
    # of them and 256 of slack with the default settings.
    return [struct.unpack_from("=HH", value, len(value) - 1536 - 48) for _, value in _entries(pid, "connections")]
