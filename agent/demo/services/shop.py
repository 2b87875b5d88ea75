"""The shop: asks ``stock`` and ``price`` at the same time and joins their answers. Asyncio streams, nothing else.

It knows nothing of tracing. It copies the trace headers that it received to the requests that it makes, which is all
that an application has to do: an event loop serves many requests on one thread, so nothing else could tell the tracer
which request caused which call.

Environment: LISTEN, STOCK and PRICE, each host:port.
"""

import asyncio
import json
import os

FORWARDED_HEADERS = ("traceparent", "tracestate", "b3", "x-request-id")
IDLE_SECONDS = 60
CALL_SECONDS = 10


async def read_message(reader):
    """The first line, the headers and the body of a request or a response; ends the connection when there is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    first_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first_line, headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def call(address, path, headers):
    """GET ``path``; returns the status and the decoded answer."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        lines = [f"GET {path} HTTP/1.1", f"host: {address}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        first_line, _, body = await asyncio.wait_for(read_message(reader), CALL_SECONDS)
        return int(first_line.split()[1]), json.loads(body)
    finally:
        writer.close()


async def answer(path, headers):
    forwarded = {name: headers[name] for name in FORWARDED_HEADERS if name in headers}
    article = path.partition("?")[0].removeprefix("/articles/")
    await asyncio.sleep(0.004)  # looks up the article's description
    (_, stock), (price_status, price) = await asyncio.gather(
        call(os.environ["STOCK"], f"/stock/{article}", forwarded),
        call(os.environ["PRICE"], f"/price/{article}", forwarded),
    )
    await asyncio.sleep(0.003)  # renders the page
    if price_status != 200:
        return "502 Bad Gateway", {"error": f"no price: {price['error']}"}
    return "200 OK", {"article": article, "left": stock["left"], "price": price["price"]}


async def serve(reader, writer):
    try:
        while True:
            first_line, headers, _ = await asyncio.wait_for(read_message(reader), IDLE_SECONDS)
            try:
                status, result = await answer(first_line.split()[1], headers)
            except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                status, result = "502 Bad Gateway", {"error": repr(error)}
            body = json.dumps(result).encode() + b"\n"
            writer.write(
                f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await writer.drain()
    except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # the client is gone, or sent no HTTP
    finally:
        writer.close()


async def main():
    host, port = os.environ["LISTEN"].rsplit(":", 1)
    server = await asyncio.start_server(serve, host, int(port))
    async with server:
        await server.serve_forever()


asyncio.run(main())
