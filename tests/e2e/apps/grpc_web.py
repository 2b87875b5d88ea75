"""sonora as a peer, gRPC-Web over HTTP/1: `gunicorn grpc_web:app`, and `grpc_web.py call PORT`.

The server has the methods of grpc_calls.py. `call` makes calls of all sorts, with the number `x-number` in their
metadata, and prints for each the method, the status that the client saw, and the number of messages received, as JSON.
"""

from __future__ import annotations

import json
import sys

import grpc
from grpc_calls import Handler, status
from sonora.client import insecure_web_channel
from sonora.wsgi import grpcWSGI


class WebHandler(Handler):
    """The same; sonora wants to be told how to read and write messages that are bytes."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        found = super().service(details)
        return found._replace(request_deserializer=bytes, response_serializer=bytes) if found is not None else None


app = grpcWSGI()
app.add_generic_rpc_handlers([WebHandler()])


def call(port: str) -> None:
    made: list[tuple[str, str, int]] = []

    with insecure_web_channel(f"http://127.0.0.1:{port}/") as channel:

        def make(method: str, size: int, received: int) -> None:
            kind = channel.unary_stream if method in ("Many", "FailLate") else channel.unary_unary
            ask = kind(f"/pkg.Echo/{method}", bytes, bytes)
            metadata = [("x-number", str(len(made)))]
            made.append((method, status(lambda: list(ask(bytes(size), metadata=metadata) or ())), received))

        for size in (1, 600, 20_000, 3_000_000):
            make("Unary", size, 1)
        for size in (1, 700, 100_000):
            make("Many", size, 5)
        make("Fail", 1, 0)
        make("FailLate", 1, 1)
    print(json.dumps(made))


if __name__ == "__main__":
    call(sys.argv[2])
