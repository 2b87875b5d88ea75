"""grpcio under load: ``python -m bench.grpc_load serve PORT`` and ``python -m bench.grpc_load call PORT SECONDS``.

The server echoes unary calls, and prints how many it has served whenever it reads a line. The client calls without a
pause, over channels that are new every second: of connections that are older than the agent, it sees little.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import grpc

METHOD = "/bench.Echo/Unary"
CHANNELS, OUTSTANDING = 4, 16


class _Echo(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.served = 0
        self._number = count(1)
        self._handler = grpc.unary_unary_rpc_method_handler(self._answer)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if details.method == METHOD else None

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.served = next(self._number)  # one step of the interpreter: several threads answer
        return request


def serve(port: str) -> None:
    echo = _Echo()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[echo])
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(echo.served, flush=True)
    server.stop(None)


def call(port: str, seconds: str) -> None:
    deadline = time.monotonic() + float(seconds)
    own = [("grpc.use_local_subchannel_pool", 1)]  # else a new channel is the old connection
    while (now := time.monotonic()) < deadline:
        until = min(now + 1, deadline)
        channels = [grpc.insecure_channel(f"127.0.0.1:{port}", own) for _ in range(CHANNELS)]
        methods = [channel.unary_unary(METHOD) for channel in channels]
        while time.monotonic() < until:
            calls = [method.future(b"hello") for method in methods for _ in range(OUTSTANDING)]
            for one in calls:
                one.result(10)
        for channel in channels:
            channel.close()


if __name__ == "__main__":
    {"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
