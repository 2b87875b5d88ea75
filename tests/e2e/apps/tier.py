"""One tier of an application: ``tier.py MODE BEHAVIOUR PORT [NEXT_PORT]``.

MODE is ``threads`` (one thread per connection), ``loop`` (asyncio), ``select`` (asyncio on select(2)), ``reader`` (one
thread reads all requests, others answer them) or ``takers`` (threads that read a request each and then answer any that
waits). For each request the tier asks the next one for the same path, if there is one, and answers with what came back.
BEHAVIOUR is what it does with trace headers: ``copy`` forwards them, ``root`` X-Ray's without Parent, ``sdk`` makes a
span id of its own in the same trace, ``foreign`` starts a trace of its own, ``none`` sends none; nor do those that take
their time, ``slow`` before it asks and ``late`` after that. The ids it makes can be told from the path: see
``made_ids``.
"""

import asyncio
import http.client
import queue
import random
import select
import selectors
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FORWARDED = (
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-sampled",
    "uber-trace-id",
    "x-amzn-trace-id",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-tags",
    "x-datadog-sampling-priority",
    "x-request-id",
)


def made_ids(port: int, path: str) -> tuple[str, str]:
    """The trace id and the span id that the tier at ``port`` makes for the request number at the end of ``path``."""
    number = int(path.rpartition("/")[2])
    return f"f{port:015x}{number + 1:016x}", f"e{port:07x}{number + 1:08x}"


def headers_for_next(behaviour: str, port: int, path: str, inbound: dict[str, str]) -> dict[str, str]:
    if behaviour == "copy":
        return {name: inbound[name] for name in FORWARDED if name in inbound}
    if behaviour == "root":
        fields = inbound["x-amzn-trace-id"].split(";")
        return {"x-amzn-trace-id": ";".join(field for field in fields if not field.startswith("Parent="))}
    trace_id, span_id = made_ids(port, path)
    if behaviour == "sdk":
        return {"traceparent": f"00-{inbound['traceparent'].split('-')[1]}-{span_id}-01"}
    if behaviour == "foreign":
        return {"traceparent": f"00-{trace_id}-{span_id}-01"}
    return {}


def answer(behaviour: str, port: int, next_port: int, path: str, inbound: dict[str, str]) -> bytes:
    """What a thread does for a request; ``inbound`` has the names of its headers in lower case."""
    if behaviour == "slow":  # most answers take some milliseconds; one in ten is announced before it comes
        number = int(path.rpartition("/")[2])
        time.sleep(0.4 if number % 10 == 0 else number % 7 * 0.005)
    if not next_port:
        return b"end"
    connection = http.client.HTTPConnection("127.0.0.1", next_port, timeout=60)
    connection.request("GET", path, headers=headers_for_next(behaviour, port, path, inbound))
    body = connection.getresponse().read()
    connection.close()
    if behaviour == "late":
        time.sleep(0.8)
    return body


def serve_in_threads(behaviour: str, port: int, next_port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            inbound = {name.lower(): value for name, value in self.headers.items()}
            body = answer(behaviour, port, next_port, self.path, inbound)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    Server(("127.0.0.1", port), Handler).serve_forever()


def read_request(connection: socket.socket) -> tuple[str, dict[str, str]] | None:
    """Path and headers of a request without a body; None at the end of the connection."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = connection.recv(65536)
        if not piece:
            return None
        data += piece
    lines = data.decode().split("\r\n")
    fields = (line.partition(":") for line in lines[1:] if line)
    return lines[0].split(" ")[1], {name.lower(): value.strip() for name, _, value in fields}


def send_response(connection: socket.socket, body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def serve_by_one_reader(behaviour: str, port: int, next_port: int) -> None:
    """The main thread selects and reads; sixteen workers answer."""
    requests: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        while True:
            connection, (path, inbound) = requests.get()
            send_response(connection, answer(behaviour, port, next_port, path, inbound))

    for _ in range(16):
        threading.Thread(target=work, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
            elif (request := read_request(ready)) is not None:
                requests.put((ready, request))
            else:
                connections.remove(ready)
                ready.close()


def serve_by_takers(behaviour: str, port: int, next_port: int) -> None:
    """Sixteen threads, each of which waits for a connection's next request, and then answers one of all that were read:
    now and then its own, mostly another thread's.
    """
    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    connections: queue.SimpleQueue = queue.SimpleQueue()
    requests: list[tuple[socket.socket, tuple[str, dict[str, str]]]] = []
    lock = threading.Lock()

    def work() -> None:
        while True:
            connection = connections.get()
            request = read_request(connection)
            if request is None:
                connection.close()
                continue
            with lock:
                requests.append((connection, request))
            time.sleep(0.003)  # others read meanwhile
            with lock:
                connection, (path, inbound) = requests.pop(random.randrange(len(requests)))
            send_response(connection, answer(behaviour, port, next_port, path, inbound))
            connections.put(connection)

    for _ in range(16):
        threading.Thread(target=work, daemon=True).start()
    while True:
        connections.put(listener.accept()[0])


async def read_message(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """First line, headers by lower-case name, and body of a message with Content-Length or none."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return lines[0], headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def ask(port: int, path: str, headers: dict[str, str]) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    _, _, body = await read_message(reader)
    writer.close()
    return body


async def serve_in_a_loop(behaviour: str, port: int, next_port: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                line, inbound, _ = await read_message(reader)
                path = line.split(" ")[1]
                body = b"end"
                if next_port:
                    await asyncio.sleep(0.001)  # others get their turn between the request and what it causes
                    body = await ask(next_port, path, headers_for_next(behaviour, port, path, inbound))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port, backlog=256)
    await server.serve_forever()


if __name__ == "__main__":
    mode, what = sys.argv[1:3]
    own, following = int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0
    if mode == "loop":
        asyncio.run(serve_in_a_loop(what, own, following))
    elif mode == "select":
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
            runner.run(serve_in_a_loop(what, own, following))
    else:
        serve = {"threads": serve_in_threads, "reader": serve_by_one_reader, "takers": serve_by_takers}[mode]
        serve(what, own, following)
