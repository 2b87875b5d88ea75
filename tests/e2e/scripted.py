"""Processes that do on TCP sockets exactly what a test tells them, system call by system call.

In: functions of an importable module with their arguments. Out: what they return, or their exception. A ``Peer`` runs
one function at a time in its main thread; the sockets it uses are blocking, so that one Python call is one system call,
and every wait is bounded by ``WAIT_SECONDS``. The orders travel over a pipe pair, which is no traffic of interest.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WAIT_SECONDS = 40
ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"


class PeerError(Exception):
    """A function failed in its peer, or the peer ended."""


class Peer:
    """A process that runs functions for a test. Usable as a context manager; the process ends with it."""

    def __init__(self, *, namespace: str | None = None) -> None:
        """``namespace`` is one of ``ip netns``."""
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        self._command = [*enter, sys.executable, "-m", "tests.e2e.scripted"]
        self._start_process()

    def _start_process(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._busy = False
        self.pid = self.call(os.getpid)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Let the peer run ``function(*args)``; ``result`` waits for it."""
        if self._busy:
            raise PeerError("the peer has another function to run")
        self._busy = True
        _put(self._process.stdin.fileno(), (function, args))

    def result(self) -> Any:
        """The value of the function started last. Raises PeerError when it failed or took too long."""
        descriptor = self._process.stdout.fileno()
        if not select.select([descriptor], [], [], WAIT_SECONDS + 10)[0]:
            raise PeerError(f"peer {self._process.pid} does not answer")
        try:
            ok, value = _get(descriptor)
        except EOFError:
            raise PeerError(f"peer {self._process.pid} ended") from None
        self._busy = False
        if not ok:
            raise PeerError(value)
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function and wait for it."""
        self.start(function, *args)
        return self.result()

    def renew(self) -> None:
        """Replace the process by a fresh one when a failed test left it at work."""
        if self._busy or self._process.poll() is not None:
            self.kill()
            self._start_process()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def close(self) -> None:
        """End the process; a function that still runs is cut short."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _put(descriptor: int, value: Any) -> None:
    data = pickle.dumps(value)
    data = struct.pack("<Q", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def _get(descriptor: int) -> Any:
    def read(length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = os.read(descriptor, length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    return pickle.loads(read(struct.unpack("<Q", read(8))[0]))


def main() -> None:
    """Run the orders of standard input until it ends."""
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    while True:
        try:
            function, args = _get(orders)
        except EOFError:
            return
        try:
            answer = True, function(*args)
        except Exception as error:
            answer = False, f"{function.__name__}: {error!r}"
        _put(answers, answer)


# -- sockets

_TIMEOUT = struct.pack("ll", WAIT_SECONDS, 0)


def bounded(connection: socket.socket) -> socket.socket:
    """Bound the blocking calls of a socket by the kernel's own timeouts, and send small writes at once."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def listen(port: int, host: str = LOOPBACK, *, both_families: bool = False) -> socket.socket:
    """A listening socket; ``both_families``: an IPv6 one that takes IPv4 clients as well."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both_families)
    listener.bind((host, port))
    listener.listen(128)
    return listener


def accept(listener: socket.socket) -> socket.socket:
    """Accept one connection; fails when none comes in time."""
    listener.settimeout(WAIT_SECONDS)
    return bounded(listener.accept()[0])


def connect(port: int, host: str = LOOPBACK, *, source: tuple[str, int] | None = None) -> socket.socket:
    """Connect, and try again while nobody listens yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            if source is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                connection.bind(source)
            connection.connect((host, port))
            return bounded(connection)
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def close_with_reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# -- one system call each

_libc = ctypes.CDLL(None, use_errno=True)
_MSG_WAITFORONE = 0x10000


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct mmsghdr, sendmmsg(2)
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("_padding", ctypes.c_int),
        ("length", ctypes.c_uint32),
    )


def _messages(buffers: Sequence[ctypes.Array]) -> ctypes.Array:
    iovecs = [_Iovec(ctypes.addressof(buffer), len(buffer)) for buffer in buffers]
    return (_Message * len(buffers))(*(_Message(iov=ctypes.pointer(iovec), iov_count=1) for iovec in iovecs))


def _sendmmsg(connection: socket.socket, data: bytes, messages: int = 1) -> int:
    pieces = cut(data, -(-len(data) // messages))
    buffers = [ctypes.create_string_buffer(piece, len(piece)) for piece in pieces]
    vector = _messages(buffers)
    sent = _libc.sendmmsg(connection.fileno(), vector, len(pieces), 0)
    if sent < 1:
        raise OSError(ctypes.get_errno(), "sendmmsg")
    return sum(message.length for message in vector[:sent])


def _recvmmsg(connection: socket.socket, length: int, messages: int = 1) -> bytes:
    sizes = map(len, cut(bytes(length), -(-length // messages)))
    buffers = [ctypes.create_string_buffer(size) for size in sizes]
    vector = _messages(buffers)
    # What is there when the first message has come.
    received = _libc.recvmmsg(connection.fileno(), vector, len(buffers), _MSG_WAITFORONE, None)
    if received < 1:
        raise OSError(ctypes.get_errno(), "recvmmsg")
    return b"".join(buffer.raw[: message.length] for buffer, message in zip(buffers[:received], vector, strict=False))


def cut(data: bytes, size: int) -> list[bytes]:
    """Pieces of ``size`` bytes."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def _scatter(connection: socket.socket, length: int, size: int, call: Callable) -> bytes:
    buffers = [bytearray(size) for _ in range(-(-length // size))]
    count = call(connection, buffers)
    return b"".join(buffers)[:count]


def _readv(connection: socket.socket, buffers: Sequence[bytearray]) -> int:
    return os.readv(connection.fileno(), buffers)


def _recvmsg_into(connection: socket.socket, buffers: Sequence[bytearray]) -> int:
    return connection.recvmsg_into(buffers)[0]


def _peek_then_read(connection: socket.socket, length: int) -> bytes:
    connection.recv(length, socket.MSG_PEEK)
    connection.recvmsg(length, 0, socket.MSG_PEEK)
    return os.read(connection.fileno(), length)


SENDING: dict[str, Callable[[socket.socket, bytes], int]] = {
    "write": lambda connection, data: os.write(connection.fileno(), data),
    "send": lambda connection, data: connection.send(data),
    "sendto": lambda connection, data: connection.sendto(data, connection.getpeername()),
    "sendmsg": lambda connection, data: connection.sendmsg([data]),
    "sendmsg_7": lambda connection, data: connection.sendmsg(cut(data, 7)[:1024]),
    "sendmmsg": _sendmmsg,
    "sendmmsg_2": lambda connection, data: _sendmmsg(connection, data, 2),
    "writev": lambda connection, data: os.writev(connection.fileno(), [data]),
    "writev_1": lambda connection, data: os.writev(connection.fileno(), cut(data, 1)[:1024]),
    "writev_1_by_200": lambda connection, data: os.writev(connection.fileno(), cut(data, 1)[:200]),
    "writev_7": lambda connection, data: os.writev(connection.fileno(), cut(data, 7)[:1024]),
    "writev_empty": lambda connection, data: os.writev(connection.fileno(), [b"", data[:3], b"", data[3:], b""]),
    "writev_4096": lambda connection, data: os.writev(connection.fileno(), cut(data, 4096)[:1024]),
    "write_1": lambda connection, data: os.write(connection.fileno(), data[:1]),
    "send_1": lambda connection, data: connection.send(data[:1]),
}
"""Each makes one system call with data from the beginning of what is to be sent, and returns how much went out."""

RECEIVING: dict[str, Callable[[socket.socket, int], bytes]] = {
    "read": lambda connection, length: os.read(connection.fileno(), length),
    "recv": lambda connection, length: connection.recv(length),
    "recvfrom": lambda connection, length: connection.recvfrom(length)[0],
    "recvmsg": lambda connection, length: connection.recvmsg(length)[0],
    "recvmsg_7": lambda connection, length: _scatter(connection, min(length, 7000), 7, _recvmsg_into),
    "recvmmsg": _recvmmsg,
    "recvmmsg_2": lambda connection, length: _recvmmsg(connection, length, 2),
    "readv": lambda connection, length: _scatter(connection, length, length, _readv),
    "readv_1": lambda connection, length: _scatter(connection, min(length, 200), 1, _readv),
    "readv_7": lambda connection, length: _scatter(connection, min(length, 7000), 7, _readv),
    "readv_4096": lambda connection, length: _scatter(connection, min(length, 1 << 20), 4096, _readv),
    "read_1": lambda connection, length: os.read(connection.fileno(), 1),
    "recv_1": lambda connection, length: connection.recv(1),
    "peek": _peek_then_read,
}
"""Each makes one system call (``peek``: two more before it) that takes at most ``length`` bytes."""


def send_all(connection: socket.socket, data: bytes, how: str = "write") -> None:
    """Send everything by repeated calls of one kind."""
    call = SENDING[how]
    rest = memoryview(data) if how in ("write", "send", "writev_4096", "writev") else data
    while rest:
        rest = rest[call(connection, rest) :]


def receive(connection: socket.socket, length: int, how: str = "read") -> bytes:
    """Receive exactly ``length`` bytes by repeated calls of one kind. Raises EOFError when the stream ends before."""
    call = RECEIVING[how]
    pieces = []
    while length:
        piece = call(connection, length)
        if not piece:
            raise EOFError(f"{length} bytes are missing")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def receive_head(connection: socket.socket) -> bytes:
    """Receive up to a blank line, and not beyond when the sender waits for an answer."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = os.read(connection.fileno(), 65536)
        if not piece:
            raise EOFError(f"the stream ended after {head!r}")
        head += piece
    return head


def receive_to_end(connection: socket.socket) -> int:
    """Receive until the stream ends; return the number of bytes."""
    total = 0
    while piece := os.read(connection.fileno(), 1 << 20):
        total += len(piece)
    return total


# -- messages and the exchanges that most tests are made of


def request(
    path: str, *, method: str = "GET", version: str = "1.1", fields: Sequence[str] = (), body: bytes = b""
) -> bytes:
    """A request; a body brings its Content-Length."""
    lines = [f"{method} {path} HTTP/{version}", "Host: test.example", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def response(
    status: int = 200, *, version: str = "1.1", fields: Sequence[str] = (), body: bytes | None = b"ok"
) -> bytes:
    """A response; ``body`` None leaves the Content-Length out."""
    lines = [f"HTTP/{version} {status} Reason", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(pieces: Iterable[bytes], *, trailers: Sequence[str] = ()) -> bytes:
    """A chunked body (RFC 9112 section 7.1)."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return body + "".join(["0\r\n", *(f"{line}\r\n" for line in trailers), "\r\n"]).encode()


class Turn(NamedTuple):
    """One request and its response, in the pieces in which they are written, and the system calls that move them.

    The reader takes each piece with calls that stop at the piece's end, so that reads are cut where writes are.
    """

    request: Sequence[bytes]
    response: Sequence[bytes]
    request_by: tuple[str, str] = ("write", "read")
    response_by: tuple[str, str] = ("write", "read")


def serve_turns(connection: socket.socket, turns: Iterable[Turn]) -> None:
    """The server's half of some exchanges."""
    for turn in turns:
        _take(connection, turn.request, turn.request_by[1])
        for piece in turn.response:
            send_all(connection, piece, turn.response_by[0])


def make_turns(connection: socket.socket, turns: Iterable[Turn]) -> None:
    """The client's half of some exchanges."""
    for turn in turns:
        for piece in turn.request:
            send_all(connection, piece, turn.request_by[0])
        _take(connection, turn.response, turn.response_by[1])


def _take(connection: socket.socket, pieces: Sequence[bytes], how: str) -> None:
    """Receive a message in at least as many reads as it has pieces."""
    for piece in pieces:
        if receive(connection, len(piece), how) != piece:
            raise PeerError("other bytes arrived than were sent")


def serve(port: int, turns: Sequence[Turn], host: str = LOOPBACK, both_families: bool = False) -> None:
    """Accept one connection, make the exchanges, and close when the client does."""
    with listen(port, host, both_families=both_families) as listener, accept(listener) as connection:
        listener.close()
        serve_turns(connection, turns)
        if os.read(connection.fileno(), 1):
            raise PeerError("unexpected bytes")


def request_turns(port: int, turns: Sequence[Turn], host: str = LOOPBACK) -> tuple[str, int]:
    """Connect, make the exchanges and close. Returns the own address and port."""
    with connect(port, host) as connection:
        make_turns(connection, turns)
        return connection.getsockname()[:2]


def run_turns(server: Peer, client: Peer, port: int, turns: Sequence[Turn]) -> None:
    """Both halves on one connection."""
    server.start(serve, port, turns)
    client.call(request_turns, port, turns)
    server.result()


if __name__ == "__main__":
    from tests.e2e import scripted

    scripted.main()
