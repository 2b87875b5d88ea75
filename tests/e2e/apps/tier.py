"""One tier of an application: ``tier.py MODE BEHAVIOUR PORT [NEXT_PORT]``.

MODE is ``threads`` (one thread per connection) or ``loop`` (asyncio). For each request the tier asks the next one for
the same path, if there is one, and answers with what came back. BEHAVIOUR is what it does with trace headers: ``copy``
forwards them, ``sdk`` makes a span id of its own in the same trace, ``foreign`` starts a trace of its own, ``none``
sends none. The ids it makes can be told from the path: see ``made_ids``.
"""

import asyncio
import http.client
import sys
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
)


def made_ids(port: int, path: str) -> tuple[str, str]:
    """The trace id and the span id that the tier at ``port`` makes for the request number at the end of ``path``."""
    number = int(path.rpartition("/")[2])
    return f"f{port:015x}{number + 1:016x}", f"e{port:07x}{number + 1:08x}"


def headers_for_next(behaviour: str, port: int, path: str, inbound: dict[str, str]) -> dict[str, str]:
    if behaviour == "copy":
        return {name: inbound[name] for name in FORWARDED if name in inbound}
    trace_id, span_id = made_ids(port, path)
    if behaviour == "sdk":
        return {"traceparent": f"00-{inbound['traceparent'].split('-')[1]}-{span_id}-01"}
    if behaviour == "foreign":
        return {"traceparent": f"00-{trace_id}-{span_id}-01"}
    return {}


def serve_in_threads(behaviour: str, port: int, next_port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b"end"
            if next_port:
                inbound = {name.lower(): value for name, value in self.headers.items()}
                connection = http.client.HTTPConnection("127.0.0.1", next_port, timeout=60)
                connection.request("GET", self.path, headers=headers_for_next(behaviour, port, self.path, inbound))
                body = connection.getresponse().read()
                connection.close()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    Server(("127.0.0.1", port), Handler).serve_forever()


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
    if mode == "threads":
        serve_in_threads(what, own, following)
    else:
        asyncio.run(serve_in_a_loop(what, own, following))
