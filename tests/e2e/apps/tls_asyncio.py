"""Python's asyncio over TLS, which moves the records itself.

``python tls_asyncio.py serve PORT CERTIFICATE`` answers ``/status/N`` with N. ``python tls_asyncio.py ask PORT
CERTIFICATE COUNT CONNECTIONS`` makes COUNT requests on each of so many connections at once, and prints the statuses.
"""

import asyncio
import contextlib
import ssl
import sys


async def answer(reader, writer):
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.split(b" ", 2)[1].partition(b"?")[0].rpartition(b"/")[2].decode()
            body = b"" if status == "204" else b"as asked\n"
            length = "" if status == "204" else f"Content-Length: {len(body)}\r\n"
            writer.write(f"HTTP/1.1 {status} As Asked\r\n{length}\r\n".encode() + body)
            await writer.drain()
    writer.close()


async def ask(port, context, name, count):
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context, family=2)
    statuses = []
    for number in range(count):
        writer.write(f"GET /status/200?id={name}-{number} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        statuses.append(int(head.split()[1]))
        length = head.lower().partition(b"content-length:")[2].split()[0]
        await reader.readexactly(int(length))
    writer.close()
    return statuses


async def main():
    mode, port, certificate, *rest = sys.argv[1:]
    if mode == "serve":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server = await asyncio.start_server(answer, "127.0.0.1", int(port), ssl=context)
        await server.serve_forever()
    else:
        context = ssl.create_default_context(cafile=certificate)
        count, connections = map(int, rest)
        answers = await asyncio.gather(*(ask(int(port), context, name, count) for name in range(connections)))
        print(*(status for statuses in answers for status in statuses))


asyncio.run(main())
