"""What the kernel forwards of HTTP/2 connections, byte by byte, against the walk as tests/unit/frame_walk.py has it.

Frames of all kinds go through a real connection in transfers of every size, some of them through many buffers; both
ends are seen. Each transfer's segments must be those that the model makes of the same bytes.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent.kernel._libbpf import ffi, lib

from agent.kernel.capture import Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import ConnectionClosed, ConnectionUpgraded, End, Exchange, Role, Segment
from tests.unit.frame_walk import FrameWalk, Made
from tests.unit.http2_traffic import PREFACE, SWITCHES, asks, raw

SERVER, CLIENT = int(Role.SERVER), int(Role.CLIENT)
REQUEST, RESPONSE = 1, 2
LARGEST = 60_000
"""Bytes of one transfer: sent and received in one call without blocking."""


@pytest.fixture(scope="module")
def capture() -> Iterator[Capture]:
    backend = os.environ.get("SPANLOOM_TEST_BACKEND", "auto")
    with Capture(CaptureSettings(backend=backend, ring_buffer_bytes=32 << 20)) as running:
        running.attach()
        yield running


class Connection:
    """Two ends of a TCP connection in this process, and what should be told of what goes through."""

    def __init__(self, capture: Capture, choice: random.Random) -> None:
        self.choice = choice
        with socket.create_server(("127.0.0.1", 0)) as listener:
            capture.select_ports([listener.getsockname()[1]], [])
            while capture.drain()[1]:
                pass
            self.client = socket.create_connection(listener.getsockname())
            self.server, _ = listener.accept()
        for end in (self.client, self.server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.client.getpeername()[1]
        self.walks = {
            (role, direction): FrameWalk(begins=direction == REQUEST)
            for role in (SERVER, CLIENT)
            for direction in (REQUEST, RESPONSE)
        }
        self.expected: dict[tuple[int, int], list[Made]] = defaultdict(list)
        self.upgrades: list[Exchange] = []

    def _pieces(self, size: int) -> list[int]:
        """Sizes of buffers that hold so much together, some of them empty."""
        count = self.choice.choice([2, 3, 7, 40])
        cuts = sorted(self.choice.randint(0, size) for _ in range(count - 1))
        return [end - begin for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]

    def send(self, direction: int, data: bytes, *, whole: bool = False) -> None:
        """One call sends it; another one, or several unless it is to be ``whole``, receive it."""
        sender, receiver = (self.client, self.server) if direction == REQUEST else (self.server, self.client)
        if self.choice.random() < 0.5:
            sent = sender.send(data)
        else:
            view, pieces, position = memoryview(data), [], 0
            for size in self._pieces(len(data)):
                pieces.append(view[position : position + size])
                position += size
            sent = sender.sendmsg(pieces)
        assert sent == len(data)
        role = CLIENT if direction == REQUEST else SERVER
        self.expected[role, direction] += self.walks[role, direction].transfer(data)
        while data:
            size = len(data) if whole else self.choice.choice([len(data), self.choice.randint(1, len(data))])
            if self.choice.random() < 0.5:
                received = receiver.recv(size)
            else:
                buffers = [bytearray(piece) for piece in self._pieces(size)]
                count = receiver.recvmsg_into(buffers)[0]
                received = b"".join(buffers)[:count]
            assert data.startswith(received)
            self.expected[3 - role, direction] += self.walks[3 - role, direction].transfer(received)
            data = data[len(received) :]

    def close(self) -> None:
        self.client.close()
        self.server.close()


def frames(choice: random.Random, count: int) -> bytes:
    """Well-formed frames, of sizes that lie around every limit."""
    made = b""
    for _ in range(count):
        stream = 2 * choice.randrange(500) + 1
        small = choice.choice([0, 1, 20, 100])
        size = choice.choice([0, 1, 15, 16, 17, 511, 512, 513, 4087, 4096, 16384, choice.randrange(20_000)])
        made += choice.choice(
            [
                raw(0, choice.choice([0, 1]), stream, choice.randbytes(size)),
                raw(1, choice.choice([4, 5]), stream, choice.randbytes(choice.choice([small, size]))),
                raw(2, 0, stream, bytes(5)),
                raw(3, 0, stream, bytes(4)),
                raw(4, 0, 0, bytes(6 * choice.choice([0, 1, 5, 300]))),
                raw(6, 0, 0, bytes(8)),
                raw(7, 0, 0, bytes(8 + small)),
                raw(8, 0, choice.choice([0, stream]), bytes(4)),
                raw(9, 4, stream, choice.randbytes(size)),
                raw(16, 0, 0, choice.randbytes(choice.choice([small, 2000]))),
            ]
        )
    return made


def told(capture: Capture, connection: Connection) -> dict[tuple[int, int], list[Made]]:
    """What the kernel forwarded of the connection, when its close has been told of on both sides."""
    decoder = Decoder(capture.layout)
    found: dict[tuple[int, int], list[Made]] = defaultdict(list)
    ids: set[int] = set()
    closed: set[int] = set()
    deadline = time.monotonic() + 20
    while len(closed) < 2:
        assert time.monotonic() < deadline
        capture.sweep()
        for record in decoder.decode(*capture.drain()):
            if type(record) is Segment and connection.port in (record.local_port, record.remote_port):
                ids.add(record.connection_id)
                found[record.role, record.direction].append((record.offset, record.data, record.length, record.flags))
            elif type(record) is ConnectionClosed and record.connection_id in ids:
                closed.add(record.connection_id)
            elif type(record) is ConnectionUpgraded:
                connection.upgrades.append(record.exchange)
    return found


@pytest.mark.parametrize("largest", [1, 12, 300, 5000, LARGEST])
@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_forwards_what_the_model_says(capture: Capture, seed: int, largest: int) -> None:
    """Every segment of either direction on either side, with its offset, gap and flags."""
    choice = random.Random(f"{seed} {largest}")
    connection = Connection(capture, choice)
    lost = capture.counters()["frames_lost"]
    count = 6 if largest < 100 else 60
    most = 4000 if largest < 100 else 1 << 20
    waiting = {direction: frames(choice, count)[:most] for direction in (REQUEST, RESPONSE)}
    connection.send(REQUEST, PREFACE + raw(4, 0, 0, bytes(6)), whole=True)
    while any(waiting.values()):
        direction = choice.choice([direction for direction, data in waiting.items() if data])
        size = choice.randint(1, largest)
        connection.send(direction, waiting[direction][:size])
        waiting[direction] = waiting[direction][size:]
    connection.close()
    found = told(capture, connection)
    for end, expected in connection.expected.items():
        assert found[end] == expected, end
    assert capture.counters()["frames_lost"] == lost


def test_a_preface_in_pieces(capture: Capture) -> None:
    """As Go's server reads it, and in any other way."""
    for cut in range(3, 23):
        connection = Connection(capture, random.Random(cut))
        sent = PREFACE + raw(4, 0, 0, bytes(6)) + raw(1, 5, 1, b"block")
        for piece in (sent[:cut], sent[cut : cut + 30], sent[cut + 30 :]):
            connection.client.sendall(piece)
            received = connection.server.recv(65536)
            assert received == piece
        connection.close()
        found = told(capture, connection)
        for role in (CLIENT, SERVER):
            assert b"".join(data for _, data, _, _ in found[role, REQUEST]) == sent, cut
            assert [flags & 1 for _, _, _, flags in found[role, REQUEST]] == [1] * len(found[role, REQUEST])


def upgrade(connection: Connection, response: bytes) -> None:
    """Ask for HTTP/2 by HTTP/1, and answer: the answer is written in one call, and read in one."""
    request = asks()
    connection.client.sendall(request)
    assert connection.server.recv(65536) == request
    connection.send(RESPONSE, response, whole=True)


@pytest.mark.parametrize("seed", range(6))
def test_frames_behind_an_upgrade(capture: Capture, seed: int) -> None:
    """Those of the responses begin behind the head of the 101, in one call or later; the others with the preface."""
    choice = random.Random(seed)
    connection = Connection(capture, choice)
    counted = capture.counters()
    waiting = {direction: frames(choice, 30) for direction in (REQUEST, RESPONSE)}
    waiting[REQUEST] = PREFACE + waiting[REQUEST]
    for role in (SERVER, CLIENT):
        walk = connection.walks[role, RESPONSE]
        walk.left, walk.passed = len(SWITCHES), True  # like a frame that is left out
    at_once = (0, 1, 9, 40, 5000, LARGEST)[seed]
    upgrade(connection, SWITCHES + waiting[RESPONSE][:at_once])
    waiting[RESPONSE] = waiting[RESPONSE][at_once:]
    while any(waiting.values()):
        direction = choice.choice([direction for direction, data in waiting.items() if data])
        size = choice.randint(1, choice.choice([20, 5000, LARGEST]))
        connection.send(direction, waiting[direction][:size])
        waiting[direction] = waiting[direction][size:]
    connection.close()
    found = told(capture, connection)
    for end, expected in connection.expected.items():
        assert found[end] == expected, end
    begun = {exchange.role: exchange for exchange in connection.upgrades}
    assert begun.keys() == {SERVER, CLIENT}
    for exchange in begun.values():
        assert (exchange.end, exchange.request, exchange.response) == (End.HANDED_OVER, asks(), SWITCHES)
        assert exchange.response_bytes == len(SWITCHES)
    assert begun[SERVER].peer_id == begun[CLIENT].exchange_id
    counts = {name: count - counted[name] for name, count in capture.counters().items() if count != counted[name]}
    assert counts.keys() <= {"begun", "streamed", "segments", "ignored_port"}
    assert (counts["begun"], counts["streamed"]) == (2, 2)


def switching(*fields: str) -> bytes:
    return "".join(f"{line}\r\n" for line in ("HTTP/1.1 101 Switching Protocols", *fields, "")).encode()


@pytest.mark.parametrize(
    ("response", "is_http2"),
    [
        (switching("Upgrade: h2c"), True),
        (switching("upgrade:h2c", "Connection: upgrade"), True),
        (switching("Date: x", "UPGRADE: \t H2C \t", "Server: y"), True),
        (switching("Upgrade: h2c, websocket"), True),
        (switching(*(f"X-{number}: 1" for number in range(12)), "Upgrade: h2c"), True),
        (switching("X-Long: " + "x" * 110, "Upgrade: h2c"), True),
        (switching("Upgrade: websocket"), False),
        (switching("Upgrade: h2"), False),
        (switching("Upgrade: h2cc"), False),
        (switching("Upgrade:"), False),
        (switching("X-Upgrade: h2c"), False),
        (switching("Upgrades: h2c"), False),
        (switching("Connection: Upgrade: h2c"), False),
        (switching("Connection: Upgrade"), False),
        (switching(), False),
        (switching("Upgrade: h2c")[:-2], False),
        (switching("X-Long: " + "x" * 400, "Upgrade: h2c"), False),
        (switching("Connection: Upgrade") + b"\r\nUpgrade: h2c\r\n\r\n", False),
    ],
)
def test_which_switches_are_to_http2(capture: Capture, response: bytes, is_http2: bool) -> None:
    """The field's name is compared without case. All other switches, and heads that are not whole, end what is seen."""
    connection = Connection(capture, random.Random(1))
    upgrade(connection, response)
    connection.client.sendall(PREFACE)
    connection.server.recv(65536)
    connection.close()
    exchanges, upgrades = [], []
    deadline = time.monotonic() + 20
    while len(exchanges) + len(upgrades) < 2:
        assert time.monotonic() < deadline
        for record in Decoder(capture.layout).decode(*capture.drain()):
            if type(record) is Exchange:
                exchanges.append(record)
            elif type(record) is ConnectionUpgraded:
                upgrades.append(record.exchange)
    assert len(upgrades if is_http2 else exchanges) == 2
    for exchange in exchanges:
        assert exchange.end == End.HANDED_OVER
    for exchange in upgrades:
        assert exchange.response == response


def test_a_stale_line_is_none(capture: Capture) -> None:
    """What was captured of an earlier response on the connection does not complete a head."""
    connection = Connection(capture, random.Random(1))
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nUpgrade: h2c\r\n\r\n"
    upgrade(connection, ok)
    upgrade(connection, ok[:9] + b"101" + ok[12:-20])
    connection.close()
    ends = []
    deadline = time.monotonic() + 20
    while len(ends) < 4:
        assert time.monotonic() < deadline
        ends += [one.end for one in Decoder(capture.layout).decode(*capture.drain()) if type(one) is Exchange]
    assert sorted(ends) == [End.NEXT] * 2 + [End.HANDED_OVER] * 2


def test_many_of_the_shortest_frames(capture: Capture) -> None:
    """A transfer that is full of them is walked over to its end."""
    connection = Connection(capture, random.Random(1))
    connection.send(REQUEST, PREFACE, whole=True)
    connection.send(REQUEST, raw(3, 0, 1, bytes(4)) * (LARGEST // 13), whole=True)
    connection.send(REQUEST, raw(8, 0, 1, bytes(4)) * (LARGEST // 13), whole=True)
    connection.close()
    found = told(capture, connection)
    for end, expected in connection.expected.items():
        assert found[end] == expected, end


def test_no_frames(capture: Capture) -> None:
    """What can be none loses the place: a gap tells of it once, until a transfer begins like a frame."""
    connection = Connection(capture, random.Random(1))
    first, block = raw(4, 0, 0, bytes(6)), raw(1, 5, 3, b"block")
    for piece in (PREFACE + first, b"\xff" * 300, b"\xfe" * 200, block):
        connection.client.sendall(piece)
        assert connection.server.recv(65536) == piece
    lost = capture.counters()["frames_lost"]
    connection.close()
    found = told(capture, connection)
    for role in (CLIENT, SERVER):
        whole = len(PREFACE + first)
        assert found[role, REQUEST] == [
            (0, PREFACE + first, whole, 1),
            (whole, b"", 291, 1),
            (whole + 491, block, len(block), 3),
        ]
    assert lost >= 2


def occupy(capture: Capture, taken: int) -> None:
    """Mark so many of the spaces for segments as those of a thread that was preempted, on all processors."""
    cpus = lib.libbpf_num_possible_cpus()
    spaces = capture.map_fd("segment_scratch")
    (size,) = (
        (int(line.split()[1]) + 7) // 8 * 8
        for line in Path(f"/proc/self/fdinfo/{spaces}").read_text().splitlines()
        if line.startswith("value_size:")
    )
    for index in range(3):
        value = ffi.new("unsigned char[]", size * cpus)
        for cpu in range(cpus):
            ffi.cast("uint32_t *", value + size * cpu)[0] = 0xFFFFFFFF if index < taken else 0
        assert not lib.bpf_map_update_elem(spaces, ffi.new("uint32_t *", index), value, 0)


@pytest.fixture
def spaces(capture: Capture) -> Iterator[None]:
    """Free again at the end."""
    yield
    occupy(capture, 0)


@pytest.mark.usefixtures("spaces")
def test_preempted_threads_keep_their_segments(capture: Capture) -> None:
    """While two others are at work on the same processor a thread has a space of its own, time after time."""
    connection = Connection(capture, random.Random(1))
    occupy(capture, 2)
    connection.send(REQUEST, PREFACE + frames(connection.choice, 20), whole=True)
    connection.send(RESPONSE, frames(connection.choice, 20), whole=True)
    connection.close()
    found = told(capture, connection)
    for end, expected in connection.expected.items():
        assert found[end] == expected, end


@pytest.mark.usefixtures("spaces")
def test_without_a_space_what_moves_is_a_gap(capture: Capture) -> None:
    """It is counted as lost, and what comes later is placed behind it."""
    connection = Connection(capture, random.Random(1))
    first, lost, block = raw(4, 0, 0, bytes(6)), raw(1, 5, 1, b"lost"), raw(1, 5, 3, b"block")
    before = capture.counters()["segments_lost"]
    for taken, piece in ((0, PREFACE + first), (3, lost), (0, block)):
        occupy(capture, taken)
        connection.client.sendall(piece)
        assert connection.server.recv(65536) == piece
    assert capture.counters()["segments_lost"] == before + 2
    connection.close()
    found = told(capture, connection)
    for role in (CLIENT, SERVER):
        whole = len(PREFACE + first)
        assert found[role, REQUEST] == [(0, PREFACE + first, whole, 1), (whole + len(lost), block, len(block), 3)]
