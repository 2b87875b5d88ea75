"""Address families and network namespaces: the two ends of a connection are paired, and never with another's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from tests.e2e.edge import Edge, edge_of, seen
from tests.e2e.scripted import (
    LOOPBACK,
    Peer,
    Turn,
    accept,
    connect,
    listen,
    receive,
    request,
    request_turns,
    response,
    send_all,
    serve,
)

MAPPED = "::ffff:127.0.0.1"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge_of(tmp_path_factory.mktemp("namespaces")) as running:
        yield running


# -- families


@pytest.mark.parametrize(
    ("listening", "both", "connecting", "address"),
    [
        (LOOPBACK, False, LOOPBACK, LOOPBACK),
        ("127.0.0.1", False, "127.0.0.1", "127.0.0.1"),
        ("::1", False, "::1", "::1"),
        ("::", True, LOOPBACK, LOOPBACK),
        (LOOPBACK, False, MAPPED, LOOPBACK),
        ("::", True, MAPPED, LOOPBACK),
        ("::", True, "::1", "::1"),
        ("127.0.0.2", False, "127.0.0.2", "127.0.0.2"),
    ],
)
def test_families(edge: Edge, listening: str, both: bool, connecting: str, address: str) -> None:
    """IPv4, IPv6 and IPv4 in IPv6 on either end: paired, and addresses are told as what they are on the wire."""
    edge.begin()
    turns = [Turn([request(f"/{index}")], [response()]) for index in range(3)]
    edge.server.start(serve, edge.port, turns, listening, both)
    local, local_port = edge.client.call(request_turns, edge.port, turns, connecting)
    edge.server.result()
    spans = edge.expect([(f"/{index}", 200) for index in range(3)])
    for client in spans.clients:
        assert client.attributes["network.peer.address"] == address
        assert client.attributes["network.peer.port"] == edge.port
    for server in spans.servers:
        assert server.attributes["network.peer.address"] == local.removeprefix("::ffff:")
        assert server.attributes["client.address"] == local.removeprefix("::ffff:")
        assert server.attributes["network.peer.port"] == local_port
    edge.assert_forgotten()


# -- namespaces


class Namespaces:
    """Network namespaces made for a test, with their loopback up. They go with the test."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def make(self) -> str:
        name = f"spanloom-{os.getpid()}-{len(self._names)}"
        _ip("netns", "add", name)
        self._names.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def join(self, left: str, left_address: str, right: str, right_address: str) -> None:
        """A veth pair between two of them."""
        _ip("-n", left, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", right)
        for name, address in ((left, left_address), (right, right_address)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")

    def remove(self) -> None:
        for name in self._names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    assert not ran.returncode, f"ip {' '.join(arguments)}: {ran.stderr}"


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        yield made
    finally:
        made.remove()


class Side:
    """A server and a client that stay connected, and that a test moves step by step."""

    def __init__(self, stack: ExitStack, server_namespace: str, client_namespace: str) -> None:
        self.server = stack.enter_context(Peer(namespace=server_namespace))
        self.client = stack.enter_context(Peer(namespace=client_namespace))

    def connect(self, port: int, host: str, source: tuple[str, int]) -> None:
        self.server.call(_listen, port, host)
        self.client.call(_connect, port, host, source)
        self.server.call(_accept)


_open: list[socket.socket] = []


def _listen(port: int, host: str) -> None:
    _open.append(listen(port, host))


def _connect(port: int, host: str, source: tuple[str, int]) -> None:
    _open.append(connect(port, host, source=source))


def _accept() -> None:
    with _open.pop() as listener:
        _open.append(accept(listener))


def _send(data: bytes) -> None:
    send_all(_open[0], data)


def _receive(length: int) -> None:
    receive(_open[0], length)


def _close() -> None:
    _open.pop().close()


def _interleave(sides: Sequence[Side], requests: Sequence[Sequence[bytes]]) -> None:
    """Every request is on its way on all sides before any server reads, and unanswered while the others are read."""
    for turn in zip(*requests, strict=True):
        for orders in (sides, sides[::-1]):
            for side, data in zip(sides, turn, strict=True):
                side.client.call(_send, data)
            for side in orders:
                side.server.call(_receive, len(turn[sides.index(side)]))
            for side in sides:
                side.server.call(_send, response())
            for side in orders:
                side.client.call(_receive, len(response()))
    for side in sides:
        side.client.call(_close)
        side.server.call(_close)


def _assert_never_crossed(edge: Edge, sides: Sequence[Side], per_side: int, *, all_linked: bool) -> None:
    spans = edge.spans(per_side * len(sides))
    clients = {span.span_id: span for span in spans.clients}
    partner = {side.server.pid: side.client.pid for side in sides}
    children = 0
    for server in spans.servers:
        if not server.parent_span_id:
            continue
        client = clients[server.parent_span_id]
        assert client.resource["process.pid"] == partner[server.resource["process.pid"]], spans.show()
        assert seen(client) == seen(server)
        assert client.trace_id == server.trace_id
        children += 1
    if all_linked:
        assert children == len(spans.servers), spans.show()
    assert len({server.parent_span_id for server in spans.servers if server.parent_span_id}) == children


@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
def test_equal_ports_on_two_loopbacks(edge: Edge, namespaces: Namespaces, host: str) -> None:
    """Two namespaces with the same server port and the same client port on their loopback: always the right pair."""
    with ExitStack() as stack:
        sides = [Side(stack, name, name) for name in (namespaces.make(), namespaces.make())]
        edge.begin()
        for side in sides:
            side.connect(edge.port, host, (host, 40_000))
        same = [request(f"/{index}") for index in range(5)]
        other = [request(f"/{index}", method="POST", body=b"b") for index in range(5)]
        _interleave(sides, [same + other, same + same])
        _assert_never_crossed(edge, sides, 20, all_linked=True)


def test_veth_pair(edge: Edge, namespaces: Namespaces) -> None:
    """A client and a server in two namespaces that a veth pair joins: paired by the addresses on it."""
    left, right = namespaces.make(), namespaces.make()
    namespaces.join(left, "10.77.0.1", right, "10.77.0.2")
    with ExitStack() as stack:
        sides = [Side(stack, right, left)]
        edge.begin()
        sides[0].connect(edge.port, "10.77.0.2", ("10.77.0.1", 40_000))
        _interleave(sides, [[request(f"/{index}") for index in range(10)]])
        _assert_never_crossed(edge, sides, 20, all_linked=True)
        spans = edge.spans(20)
        assert {span.attributes["network.peer.address"] for span in spans.servers} == {"10.77.0.1"}
        assert {span.attributes["network.peer.address"] for span in spans.clients} == {"10.77.0.2"}


@pytest.mark.parametrize("equal_bytes", [True, False], ids=["equal_requests", "other_requests"])
def test_equal_addresses_on_two_veth_pairs(edge: Edge, namespaces: Namespaces, equal_bytes: bool) -> None:
    """Two veth pairs with the same addresses and ports: unlinked where it cannot be told, never the wrong pair."""
    with ExitStack() as stack:
        sides = []
        for _ in range(2):
            left, right = namespaces.make(), namespaces.make()
            namespaces.join(left, "10.77.0.1", right, "10.77.0.2")
            sides.append(Side(stack, right, left))
        edge.begin()
        for side in sides:
            side.connect(edge.port, "10.77.0.2", ("10.77.0.1", 40_000))
        first = [request(f"/equal/path/{index}") for index in range(10)]
        second = first if equal_bytes else [request(f"/other/path/{index}", method="PUT") for index in range(10)]
        _interleave(sides, [first, second])
        _assert_never_crossed(edge, sides, 20, all_linked=False)
