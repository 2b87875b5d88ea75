"""agent.protocols.http2_stream and grpcio, a peer that nobody here wrote: its bytes, recorded between two sockets."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.unit.http2_traffic import CLIENT, REQUEST, RESPONSE, SERVER, Observed

TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Tap:
    """Forwards one connection to ``port`` and notes (direction, bytes, time) in the order of the wire."""

    def __init__(self, port: int) -> None:
        self.log: list[tuple[int, bytes, int]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._upstream = port
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._upstream))
        with client, server, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, (REQUEST, server))
            selector.register(server, selectors.EVENT_READ, (RESPONSE, client))
            while True:
                for key, _ in selector.select():
                    direction, other = key.data
                    data = key.fileobj.recv(65536)
                    if not data:
                        return
                    self.log.append((direction, data, time.monotonic_ns()))
                    other.sendall(data)

    def finish(self) -> None:
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()


class Handler(grpc.GenericRpcHandler):
    """Methods by name; messages are bytes. ``begun`` counts the slow calls that have begun."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

        def slow(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.begun.release()
            while context.is_active():
                time.sleep(0.005)
            return b""

        return {
            "/pkg.Echo/Unary": grpc.unary_unary_rpc_method_handler(lambda request, context: request * 2),
            "/pkg.Echo/Many": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([request] * 5)),
            "/pkg.Echo/Sum": grpc.stream_unary_rpc_method_handler(lambda requests, context: b"".join(requests)),
            "/pkg.Echo/Chat": grpc.stream_stream_rpc_method_handler(lambda requests, context: iter(list(requests))),
            "/pkg.Echo/Fail": grpc.unary_unary_rpc_method_handler(fail),
            "/pkg.Echo/Slow": grpc.unary_unary_rpc_method_handler(slow),
        }.get(details.method)


@pytest.fixture(scope="module")
def log() -> list[tuple[int, bytes, int]]:
    """What a client and a server of grpcio sent: every kind of call, failures, a deadline, a cancellation."""
    with ThreadPoolExecutor(4) as pool:
        handler = Handler()
        server = grpc.server(pool, handlers=[handler])
        tap = Tap(server.add_insecure_port("127.0.0.1:0"))
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{tap.port}", [("grpc.enable_retries", 0)]) as channel:
            unary = channel.unary_unary("/pkg.Echo/Unary")
            for _ in range(3):
                assert unary(b"ab", metadata=[("traceparent", TRACEPARENT)], timeout=20) == b"abab"
            assert list(channel.unary_stream("/pkg.Echo/Many")(b"x" * 40000, timeout=20)) == [b"x" * 40000] * 5
            assert channel.stream_unary("/pkg.Echo/Sum")(iter([b"a", b"", b"b"]), timeout=20) == b"ab"
            assert list(channel.stream_stream("/pkg.Echo/Chat")(iter([b"1", b"2"]), timeout=20)) == [b"1", b"2"]
            for path in ("/pkg.Echo/Fail", "/pkg.Echo/Missing"):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(path)(b"", timeout=20)
            slow = channel.unary_unary("/pkg.Echo/Slow")
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                slow(b"", timeout=1)
            assert handler.begun.acquire(timeout=10)
            call = slow.future(b"", timeout=20)
            assert handler.begun.acquire(timeout=10)
            call.cancel()
            assert unary(b"last", timeout=20) == b"lastlast"
        tap.finish()
        server.stop(None).wait()
    return tap.log


def observe(log: list[tuple[int, bytes, int]], role: int, largest: int = 1 << 20) -> Observed:
    observed = Observed(role)
    for direction, data, time_ns in log:
        observed.time_ns = time_ns
        for start in range(0, len(data), largest):
            observed.see(direction, data[start : start + largest])
    return observed


EXPECTED = [
    ("pkg.Echo/Unary", "OK", 1, 1),
    ("pkg.Echo/Unary", "OK", 1, 1),
    ("pkg.Echo/Unary", "OK", 1, 1),
    ("pkg.Echo/Many", "OK", 1, 5),
    ("pkg.Echo/Sum", "OK", 3, 1),
    ("pkg.Echo/Chat", "OK", 2, 2),
    ("pkg.Echo/Fail", "NOT_FOUND", 1, 0),
    ("pkg.Echo/Missing", "UNIMPLEMENTED", 1, 0),
    ("pkg.Echo/Slow", "DEADLINE_EXCEEDED", 1, 0),
    ("pkg.Echo/Slow", "CANCELLED", 1, 0),
    ("pkg.Echo/Unary", "OK", 1, 1),
]


@pytest.mark.parametrize("largest", [1 << 20, 7])
def test_every_call_of_a_client(log, largest) -> None:
    """Names, codes and messages of all kinds of calls; what failed is an error."""
    observed = observe(log, CLIENT, largest)
    assert [
        (
            value["rpc.method"],
            value["rpc.response.status_code"],
            value["spanloom.rpc.request.messages"],
            value["spanloom.rpc.response.messages"],
        )
        for value in observed.values
    ] == EXPECTED
    assert [call.error for call in observed.calls] == [status != "OK" for _, status, _, _ in EXPECTED]
    assert [call.context is not None for call in observed.calls] == [True] * 3 + [False] * 8
    assert (observed.losses.reasons, observed.connection.lost, observed.connection.outstanding) == ({}, 0, 0)


def test_the_same_calls_of_a_server(log) -> None:
    """Only what is the server's fault is its error; a method that it does not have has no name."""
    observed = observe(log, SERVER)
    assert [call.error for call in observed.calls] == [
        status in ("UNIMPLEMENTED", "DEADLINE_EXCEEDED") for _, status, _, _ in EXPECTED
    ]
    assert [call.name for call in observed.calls if call.name != "pkg.Echo/Unary"] == [
        "pkg.Echo/Many",
        "pkg.Echo/Sum",
        "pkg.Echo/Chat",
        "pkg.Echo/Fail",
        "grpc",
        "pkg.Echo/Slow",
        "pkg.Echo/Slow",
    ]
