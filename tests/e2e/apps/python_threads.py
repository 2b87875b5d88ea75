"""A threaded HTTP/1.1 server on Python's ``http.server`` that keeps an account of its own.

``python python_threads.py PORT [ACCOUNT_FILE]``. ``/status/N`` answers N (``?sleep=SECONDS`` before it does), ``/echo``
the body of a POST, ``/headers`` the request's headers as JSON. At SIGTERM it writes the account: for each request its
target, its status and its clock readings (CLOCK_MONOTONIC ns) before and after the read that brought its first line,
and before and after the last write of its response.
"""

import contextlib
import http.server
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import urllib.parse

account = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        readable = select.poll()
        readable.register(self.connection, select.POLLIN)
        readable.poll()  # the read below finds its bytes waiting: it takes no time of its own
        self.before_read_ns = time.monotonic_ns()
        super().handle_one_request()

    def parse_request(self):
        self.after_read_ns = time.monotonic_ns()
        return super().parse_request()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        status, body = 404, b"not found\n"
        if url.path.startswith("/status/"):
            status, body = int(url.path.rpartition("/")[2]), b"as asked\n"
        elif url.path == "/headers":
            status, body = 200, json.dumps(dict(self.headers)).encode()
        sleep_seconds = float(urllib.parse.parse_qs(url.query).get("sleep", ["0"])[0])
        if sleep_seconds:
            time.sleep(sleep_seconds)
        self.answer(status, body)

    def do_POST(self):
        self.answer(200, self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_HEAD = do_DELETE = do_GET
    do_PUT = do_POST

    def answer(self, status, body):
        self.send_response(status)
        bodiless = status in (204, 304)
        if not bodiless:
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "text/plain")
        if bodiless or self.command == "HEAD":
            body = b""
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer = []
        before_write_ns = time.monotonic_ns()
        try:
            self.wfile.write(head + body)
        finally:
            after_write_ns = time.monotonic_ns()
            account.append(
                (self.path, status, self.before_read_ns, self.after_read_ns, before_write_ns, after_write_ns)
            )

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_bind()


def main():
    # A thread that is back from a system call should not wait 5 ms for the interpreter before it can read the clock.
    sys.setswitchinterval(0.0001)
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.05)
    if len(sys.argv) > 2:
        with open(sys.argv[2] + ".part", "w") as file:
            json.dump(account, file)
        os.rename(sys.argv[2] + ".part", sys.argv[2])
    os._exit(0)


if __name__ == "__main__":
    main()
