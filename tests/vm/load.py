"""Runs inside the machines of tools/vm.py, as root: every backend that the kernel has loads, and sees real traffic.

Prints what the verifier had to do, and exits 1 with the reason when a program is refused or an exchange is missing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agent.errors import KernelUnsupportedError, SpanloomError
from agent.kernel.capture import Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import ConnectionUpgraded, Exchange, Segment

REQUESTS = 5
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ASKS = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n"
SWITCHES = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def exchanges(backend: str, port: int) -> list[Exchange]:
    """What a backend records of a few requests; none of them may be missing on either side."""
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.load_tls()
        work = {one.name: one.verified_instructions for one in capture.statistics()}
        capture.attach()
        for number in range(REQUESTS):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{number}", timeout=30).read()
        time.sleep(0.5)
        capture.sweep()
        batch, offsets = capture.drain()
        found = [one for one in Decoder(capture.layout).decode(batch, offsets) if type(one) is Exchange]
        print(f"{os.uname().release} {backend}: {len(found)} exchanges, verified instructions {work}")
    return found


def frames(backend: str, upgrades: bool) -> str:
    """What is wrong with what a backend forwards of an HTTP/2 connection, seen from both ends; "" when nothing is.

    ``upgrades``: HTTP/1 has asked for it.
    """
    sent = PREFACE + frame(4, 0, bytes(6)) + frame(1, 1, b"block")
    sent += frame(0, 1, bytes(20_000)) + frame(1, 1, b"trailers")
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.attach()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        with client, server:
            if upgrades:
                for sender, receiver, data in ((client, server, ASKS), (server, client, SWITCHES)):
                    sender.sendall(data)
                    receiver.recv(65536)
            client.sendall(sent)
            received = 0
            while received < len(sent):
                received += len(server.recv(65536))
        batch, offsets = capture.drain()
        records = Decoder(capture.layout).decode(batch, offsets)
    segments = [one for one in records if type(one) is Segment]
    if sum(type(one) is ConnectionUpgraded for one in records) != 2 * upgrades:
        return f"upgrades: {records}"
    for role in (1, 2):
        mine = [one for one in segments if one.role == role and one.flags & 1]
        forwarded = b"".join(one.data for one in mine)
        if mine[-1].offset + mine[-1].length != len(sent) or b"block" not in forwarded or b"trailers" not in forwarded:
            return f"{role}: {segments}"
        if len(forwarded) > 200:
            return f"{role}: {len(forwarded)} bytes were forwarded"
    return ""


def frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, 4 * (kind == 1))) + stream.to_bytes(4, "big") + payload


def main() -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for backend in ("syscalls", "sockets"):
        try:
            found = exchanges(backend, server.server_port)
        except KernelUnsupportedError as error:
            if backend == "sockets" and "has no tracepoint" in str(error):
                print(f"{os.uname().release} {backend}: {error}")
                continue
            print(error)
            return 1
        except SpanloomError as error:
            print(error)
            return 1
        targets = sorted((one.role, one.request.split(b" ")[1]) for one in found)
        wanted = sorted((role, b"/%d" % number) for role in (1, 2) for number in range(REQUESTS))
        if targets != wanted or any(not one.response.startswith(b"HTTP/1.1 200") for one in found):
            print(f"{backend}: {targets}")
            return 1
        for upgrades in (False, True):
            if wrong := frames(backend, upgrades):
                print(f"{backend}: {wrong}")
                return 1
        print(f"{backend}: frames of HTTP/2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
