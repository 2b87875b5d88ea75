"""Traffic of all kinds between three processes, for tools/record.py: ``mixed.py FRONT_PORT BACK_PORT``.

The front service forwards trace headers and calls the back service once or twice; the client does what clients do,
well and badly. Everything is on loopback and made up.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    back_port = 0

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **fields: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/front":
            self.answer(self.call_back("/ok"))
        elif path == "/twice":
            self.answer(max(self.call_back("/ok"), self.call_back("/missing")))
        elif path == "/slow":
            time.sleep(0.35)
            self.answer(200, b"slow")
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"5\r\nhello\r\n", b"6\r\n world\r\n", b"0\r\n\r\n"):
                self.wfile.write(piece)
                time.sleep(0.01)
        elif path == "/die":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            self.close_connection = True
        elif path == "/until-close":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nall there is")
            self.close_connection = True
        else:
            self.answer(
                {"/missing": 404, "/error": 503, "/empty": 204}.get(path, 200), b"" if path == "/empty" else b"ok"
            )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, b"made")

    def call_back(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.back_port, timeout=10)
        carried = self.headers.get("traceparent")
        connection.request("GET", path, headers={"traceparent": carried} if carried else {})
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status


def serve(port: int, back_port: int) -> None:
    Handler.back_port = back_port
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def wait_for(port: int) -> None:
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise SystemExit(f"nobody listens on {port}")


def raw(port: int, *pieces: bytes, reads: bool = True, pause_seconds: float = 0.0) -> None:
    """Send pieces as they are; read to the end, or leave at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause_seconds)
        if reads:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def client(front: int, back: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", back, timeout=10)
    for method, path, headers in (
        ("GET", "/ok?q=1&sig=secret", {"traceparent": TRACE, "User-Agent": "mixed/1"}),
        ("HEAD", "/ok", {}),
        ("GET", "/empty", {"Authorization": "Bearer secret"}),
        ("GET", "/missing", {}),
        ("GET", "/error", {"b3": "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1"}),
        ("GET", "/chunked", {}),
        ("GET", "/slow", {}),
    ):
        connection.request(method, path, headers=headers)
        connection.getresponse().read()
    connection.request("POST", "/upload", body=b"x" * 3000)
    connection.getresponse().read()
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", front, timeout=10)
    for path, headers in (("/front", {"traceparent": TRACE}), ("/front", {}), ("/twice", {"traceparent": TRACE})):
        connection.request("GET", path, headers=headers)
        connection.getresponse().read()
    connection.close()
    get = b"GET /ok HTTP/1.1\r\nHost: back\r\n\r\n"
    raw(back, get * 3)
    raw(back, *(get[index : index + 1] for index in range(len(get))))
    raw(back, b"GET /die HTTP/1.1\r\nHost: back\r\n\r\n")
    raw(back, b"GET /until-close HTTP/1.0\r\n\r\n")
    raw(back, b"GET /slow HTTP/1.1\r\nHost: back\r\n\r\n", reads=False, pause_seconds=0.1)
    raw(back, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40))
    raw(back, b"\x00\x01\x02garbage\r\n\r\n")
    raw(back, b"GET /" + b"a" * 1500 + b" HTTP/1.1\r\nHost: back\r\n\r\n")
    time.sleep(0.5)


def main() -> None:
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), int(sys.argv[3]))
        return
    front, back = map(int, sys.argv[1:3])
    servers = [
        subprocess.Popen([sys.executable, __file__, "serve", str(port), str(back)], stderr=subprocess.DEVNULL)
        for port in (front, back)
    ]
    try:
        wait_for(front)
        wait_for(back)
        client(front, back)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
