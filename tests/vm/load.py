"""Runs inside the machines of tools/vm.py, as root: every backend that the kernel has loads, and sees real traffic.

Prints what the verifier had to do, and exits 1 with the reason when a program is refused or an exchange is missing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agent.errors import KernelUnsupportedError, SpanloomError
from agent.kernel.capture import Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import Exchange

REQUESTS = 5


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
