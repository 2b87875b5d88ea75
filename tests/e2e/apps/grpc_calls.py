"""grpcio as a peer: `grpc_calls.py serve PORT [NEXT_PORT]` and `grpc_calls.py call PORT`.

The server has every kind of call in `pkg.Echo`; with a next port its `Pass` makes the same call there, with the
metadata `traceparent` that it got. `call` makes one call of each sort, with the number `x-number` in its metadata, and
prints for each the method, the status that the client saw, and the numbers of messages sent and received, as JSON.
`calls PORT COUNT THREADS [TRACEPARENT]` makes unary calls of `Pass` and prints nothing. `watch PORT TRACEPARENT` reads
a stream of `Tick` until its standard input ends, then cancels it; it prints a line when the first message has come.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

LARGE = 3_000_000
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Handler(grpc.GenericRpcHandler):
    """Methods by name; messages are bytes."""

    def __init__(self, next_port: str = "") -> None:
        self._next = grpc.insecure_channel(f"127.0.0.1:{next_port}") if next_port else None

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

        def fail_late(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield request
            context.abort(grpc.StatusCode.DATA_LOSS, "half of it")

        def slow(request: bytes, context: grpc.ServicerContext) -> bytes:
            while context.is_active():
                time.sleep(0.005)
            return b""

        def tick(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            while context.is_active():
                yield request
                time.sleep(0.005)

        def onward(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self._next is None:
                return request
            time.sleep(0.002)
            metadata = [pair for pair in context.invocation_metadata() if pair[0] == "traceparent"]
            return self._next.unary_unary("/pkg.Echo/Pass")(request, metadata=metadata, timeout=30)

        return {
            "/pkg.Echo/Unary": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
            "/pkg.Echo/Many": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([request] * 5)),
            "/pkg.Echo/Sum": grpc.stream_unary_rpc_method_handler(lambda requests, context: b"".join(requests)),
            "/pkg.Echo/Chat": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
            "/pkg.Echo/Fail": grpc.unary_unary_rpc_method_handler(fail),
            "/pkg.Echo/FailLate": grpc.unary_stream_rpc_method_handler(fail_late),
            "/pkg.Echo/Slow": grpc.unary_unary_rpc_method_handler(slow),
            "/pkg.Echo/Tick": grpc.unary_stream_rpc_method_handler(tick),
            "/pkg.Echo/Pass": grpc.unary_unary_rpc_method_handler(onward),
        }.get(details.method)


def serve(port: str, next_port: str = "") -> None:
    server = grpc.server(ThreadPoolExecutor(32), handlers=[Handler(next_port)], options=OPTIONS)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def status(act: Callable[[], object]) -> str:
    try:
        act()
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def cancelled(responses: grpc.Call) -> str:
    """Takes one message of a stream that never ends, and has enough."""
    next(iter(responses))
    responses.cancel()
    return status(lambda: list(responses))


def call(port: str) -> None:
    made: list[tuple[str, str, int, int]] = []
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:

        def path(name: str) -> str:
            return f"/pkg.Echo/{name}"

        def metadata() -> list[tuple[str, str]]:
            return [("x-number", str(len(made)))]

        unary, answers = channel.unary_unary, channel.unary_stream
        requests: Iterable[bytes]
        for size in (0, 1, 600, 20_000, LARGE):
            made.append(("Unary", status(lambda: unary(path("Unary"))(bytes(size), metadata=metadata())), 1, 1))  # noqa: B023
        for size in (1, 700, 100_000):
            made.append(("Many", status(lambda: list(answers(path("Many"))(bytes(size), metadata=metadata()))), 1, 5))  # noqa: B023
            requests = [bytes(size)] * 3
            total = channel.stream_unary(path("Sum"))
            made.append(("Sum", status(lambda: total(iter(requests), metadata=metadata())), 3, 1))  # noqa: B023
            chat = channel.stream_stream(path("Chat"))
            made.append(("Chat", status(lambda: list(chat(iter(requests), metadata=metadata()))), 3, 3))  # noqa: B023
        made.append(("Fail", status(lambda: unary(path("Fail"))(b"x", metadata=metadata())), 1, 0))
        made.append(("FailLate", status(lambda: list(answers(path("FailLate"))(b"x", metadata=metadata()))), 1, 1))
        made.append(("None", status(lambda: unary(path("None"))(b"x", metadata=metadata())), 1, 0))
        made.append(("Slow", status(lambda: unary(path("Slow"))(b"x", metadata=metadata(), timeout=0.3)), 1, 0))
        made.append(("Tick", cancelled(answers(path("Tick"))(b"x", metadata=metadata())), 1, -1))
    print(json.dumps(made))


def calls(port: str, count: str, threads: str, traceparent: str = "") -> None:
    metadata = [("traceparent", traceparent)] if traceparent else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, ThreadPoolExecutor(int(threads)) as pool:
        ask = channel.unary_unary("/pkg.Echo/Pass")
        for _ in pool.map(lambda number: ask(b"%d" % number, metadata=metadata, timeout=60), range(int(count))):
            pass


def watch(port: str, traceparent: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = channel.unary_stream("/pkg.Echo/Tick")(b"x", metadata=[("traceparent", traceparent)])
        next(stream)
        print("open", flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), stream.cancel())).start()
        status(lambda: list(stream))


if __name__ == "__main__":
    {"serve": serve, "call": call, "calls": calls, "watch": watch}[sys.argv[1]](*sys.argv[2:])
