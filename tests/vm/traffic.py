"""Real exchanges over loopback, system call by system call, with what any backend has to record of them.

In: nothing, or as a program a number of exchanges to make. Out: each kind of traffic returns an ``Expected`` per
exchange; both ends are this process, and most of the time this thread. The sockets are blocking: one call of Python is
one of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

LARGE = 1 << 20
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
POST_BODY = bytes(range(256)) * 20


class Expected(NamedTuple):
    """What both ends have to say of an exchange. ``parent`` is the target that the client's thread was serving."""

    target: str
    request_bytes: int
    response_bytes: int
    parent: str = ""


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket and its server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield client, server


def request(target: str, method: str = "GET", body: bytes = b"") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: there\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket, count: int) -> None:
    while count > 0:
        count -= len(connection.recv(min(count, 65536)))


def _readv(sizes: Callable[[int], list[int]]) -> Callable[[socket.socket, int], None]:
    return lambda server, count: _same(os.readv(server.fileno(), [bytearray(size) for size in sizes(count)]), count)


def _recvmsg(sizes: Callable[[int], list[int]]) -> Callable[[socket.socket, int], None]:
    return lambda server, count: _same(server.recvmsg_into([bytearray(size) for size in sizes(count)])[0], count)


def _same(found: int, count: int) -> None:
    assert found == count, (found, count)


def _in_pieces(server: socket.socket, count: int) -> None:
    read_all(server, 7)
    read_all(server, count - 7)


def _after_a_look(server: socket.socket, count: int) -> None:
    server.recv(count, socket.MSG_PEEK)
    read_all(server, count)


READS: dict[str, Callable[[socket.socket, int], None]] = {
    "recv": lambda server, count: _same(len(server.recv(4096)), count),
    "read": lambda server, count: _same(len(os.read(server.fileno(), 4096)), count),
    "read-exactly": lambda server, count: _same(len(os.read(server.fileno(), count)), count),
    "recvmsg": lambda server, count: _same(len(server.recvmsg(4096)[0]), count),
    "recvmsg-into-one": _recvmsg(lambda count: [count]),
    "recvmsg-into-three": _recvmsg(lambda count: [5, 20, 4096]),
    "readv-with-room": _readv(lambda count: [9, 30, 4096, 10]),
    "readv-exactly": _readv(lambda count: [9, count - 9]),
    "readv-at-an-end": _readv(lambda count: [9, count - 9, 100, 100]),
    "readv-of-many": _readv(lambda count: [4] * 30),
    "in-pieces": _in_pieces,
    "peek": _after_a_look,
    "wait-for-all": lambda server, count: _same(len(server.recv(count, socket.MSG_WAITALL)), count),
}

WRITES: dict[str, Callable[[socket.socket], object]] = {
    "send": lambda server: server.send(OK),
    "write": lambda server: os.write(server.fileno(), OK),
    "writev": lambda server: os.writev(server.fileno(), [OK[:9], OK[9:20], b"", OK[20:]]),
    "writev-of-many": lambda server: os.writev(server.fileno(), [OK[at : at + 3] for at in range(0, len(OK), 3)]),
    "sendmsg": lambda server: server.sendmsg([OK[:-2], OK[-2:]]),
    "twice": lambda server: (server.send(OK[:-2]), server.send(OK[-2:])),
    "after-a-fault": lambda server: (server.send(OK[:-2]), _write_nothing(server), server.send(OK[-2:])),
}


def _write_nothing(server: socket.socket) -> None:
    """A write of memory that is not there."""
    assert ctypes.CDLL(None).write(server.fileno(), ctypes.c_void_p(8), 100) == -1


def reading_and_writing() -> list[Expected]:
    """Keep-alive: every way to read a request, and every way to write a response."""
    expected = []
    with pair() as (client, server):
        ways = [(f"/read/{name}", read, WRITES["send"]) for name, read in READS.items()]
        ways += [(f"/write/{name}", READS["recv"], write) for name, write in WRITES.items()]
        for target, read, write in ways:
            sent = request(target)
            client.sendall(sent)
            read(server, len(sent))
            write(server)
            read_all(client, len(OK))
            expected.append(Expected(target, len(sent), len(OK)))
    return expected


def large_bodies() -> list[Expected]:
    """What never is in user memory, and writes that block, come short, or are refused."""
    return [
        _large("/sendfile", _sendfile),
        _large("/splice-out", _splice_out),
        _large("/blocking", lambda server, head: server.sendall(bytes(LARGE))),
        _large("/nonblocking", _nonblocking),
        _spliced_request(),
    ]


def _large(target: str, write: Callable[[socket.socket, bytes], None]) -> Expected:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE
    with pair() as (client, server):
        sent = request(target)
        client.sendall(sent)
        server.recv(4096)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        reader = threading.Thread(target=read_all, args=(client, len(head) + LARGE))
        server.sendall(head)
        if target == "/nonblocking":
            _fill(server)
        reader.start()
        write(server, head)
        reader.join()
    return Expected(target, len(sent), len(head) + LARGE)


def _sendfile(server: socket.socket, _: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(LARGE))
        file.flush()
        sent = 0
        while sent < LARGE:
            sent += os.sendfile(server.fileno(), file.fileno(), sent, LARGE - sent)


def _splice_out(server: socket.socket, _: bytes) -> None:
    source, sink = os.pipe()
    sent = 0
    while sent < LARGE:
        waiting = os.write(sink, bytes(min(32768, LARGE - sent)))
        while waiting:
            moved = os.splice(source, server.fileno(), waiting)
            waiting -= moved
            sent += moved
    os.close(source)
    os.close(sink)


def _fill(server: socket.socket) -> None:
    """Writes until nothing fits any more: the last one is refused, and nothing of it counts."""
    server.setblocking(False)
    sent = 0
    try:
        while True:
            sent += server.send(bytes(50_000))
    except BlockingIOError:
        _nonblocking.sent = sent  # type: ignore[attr-defined]


def _nonblocking(server: socket.socket, _: bytes) -> None:
    sent = _nonblocking.sent  # type: ignore[attr-defined]
    assert 0 < sent < LARGE
    while sent < LARGE:
        select.select([], [server], [])
        try:
            sent += server.send(bytes(min(200_000, LARGE - sent)))
        except BlockingIOError:
            continue


def _spliced_request() -> Expected:
    """The body of a request goes from the socket into a pipe."""
    sent = request("/splice-in", "POST", POST_BODY)
    source, sink = os.pipe()
    with pair() as (client, server):
        client.sendall(sent)
        read_all(server, len(sent) - len(POST_BODY))
        left = len(POST_BODY)
        while left:
            left -= os.splice(server.fileno(), sink, left)
        server.send(OK)
        read_all(client, len(OK))
    os.close(source)
    os.close(sink)
    return Expected("/splice-in", len(sent), len(OK))


def parents() -> list[Expected]:
    """A request that is sent while another one is served belongs to it, unless the thread has waited for events."""
    expected = []
    for outer, waits in (("/outer", False), ("/outer-that-waits", True)):
        inner = outer.replace("outer", "inner")
        with pair() as (client, server), pair() as (onward, upstream), select.epoll() as events:
            client.sendall(request(outer))
            server.recv(4096)
            if waits:
                events.poll(0.02)
            onward.sendall(request(inner))
            upstream.recv(4096)
            upstream.send(OK)
            read_all(onward, len(OK))
            server.send(OK)
            read_all(client, len(OK))
        expected.append(Expected(outer, len(request(outer)), len(OK)))
        expected.append(Expected(inner, len(request(inner)), len(OK), "" if waits else outer))
    return expected


def fast_open() -> None:
    """Twice a request that leaves with the first packet of its connection, and another one behind it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
        listener.listen()
        for number in range(2):  # the first one asks for the cookie that the second one needs
            with socket.socket() as client:
                client.sendto(request(f"/fast/{number}"), socket.MSG_FASTOPEN, listener.getsockname())
                server, _ = listener.accept()
                with server:
                    for target in (f"/fast/{number}", f"/next/{number}"):
                        if "next" in target:
                            client.sendall(request(target))
                        read_all(server, len(request(target)))
                        server.sendall(OK)
                        read_all(client, len(OK))


def pipelined() -> dict[int, bytes]:
    """Three requests in one write, and their responses in one. Returns the bytes by direction: requests are 1."""
    sent = b"".join(request(f"/pipelined/{number}") for number in range(3))
    with pair() as (client, server):
        client.sendall(sent)
        read_all(server, len(sent))
        server.sendall(OK * 3)
        client.recvmsg_into([bytearray(50), bytearray(4096)])
    return {1: sent, 2: OK * 3}


def talk(times: int) -> None:
    """Exchanges on one connection, between two threads."""
    with pair() as (client, server):
        sent = request("/talk")
        thread = threading.Thread(target=_answer, args=(server, len(sent), times))
        thread.start()
        for _ in range(times):
            client.sendall(sent)
            read_all(client, len(OK))
        thread.join()


def _answer(server: socket.socket, count: int, times: int) -> None:
    for _ in range(times):
        read_all(server, count)
        server.sendall(OK)


if __name__ == "__main__":
    talk(int(sys.argv[1]))
