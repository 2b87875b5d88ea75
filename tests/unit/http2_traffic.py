"""HTTP/2 traffic made by h2, an implementation that is not ours, and fed to a connection in any segmentation."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame

from agent.model import Call, ConnectionClosed, End, Exchange, Flag, Role, SegmentFlag
from agent.propagation import FORMATS, Extractor
from agent.protocols.http1_stream import StreamLosses
from agent.protocols.http2 import Http2
from agent.protocols.http2_stream import Http2Connection
from tests.fuzz.fuzz_http1_stream import segment

REQUEST, RESPONSE = 1, 2
HTTP2, AT_FRAME = SegmentFlag.HTTP2, SegmentFlag.AT_FRAME
SERVER, CLIENT = int(Role.SERVER), int(Role.CLIENT)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Headers = list[tuple[str, str]]


class Observed:
    """A connection as the agent sees it: segments in, results out. Every segment takes one time unit."""

    def __init__(self, role: int = SERVER, protocol: Http2 | None = None, **settings: object) -> None:
        self.losses = StreamLosses()
        self.protocol = protocol or Http2(extractor=Extractor(FORMATS), **settings)
        self.connection = Http2Connection(self.protocol, self.losses)
        self.role = role
        self.offsets = {REQUEST: 0, RESPONSE: 0}
        self.time_ns = 0
        self.results: list[tuple[Exchange, Call]] = []

    def see(self, direction: int, data: bytes, gap: int = 0, before: int = 0, flags: int = HTTP2) -> Observed:
        """Feed one segment; ``gap`` bytes behind it were not captured, ``before`` it a segment of so many was lost."""
        self.time_ns += 1
        self.offsets[direction] += before
        total = len(data) + gap
        record = segment(direction, data, self.offsets[direction], total, self.time_ns, flags)
        self.offsets[direction] += total
        self.results += self.connection.feed(msgspec.structs.replace(record, role=self.role))
        return self

    def take_over(self, exchange: Exchange, *, is_announced: bool = False) -> Observed:
        """Begin with an exchange of HTTP/1 that was answered by a switch to HTTP/2."""
        self.connection.take_over(exchange, is_announced=is_announced)
        self.time_ns = exchange.response_end_ns
        return self

    def see_frame(self, direction: int, data: bytes, gap: int = 0, before: int = 0) -> Observed:
        """The same for a segment at whose beginning the kernel saw a frame begin."""
        return self.see(direction, data, gap, before, HTTP2 | AT_FRAME)

    def close(self, end: End | None = End.CLOSED, flags: int = 0) -> Observed:
        record = None if end is None else ConnectionClosed(4, 1, int(end), int(flags), 7, 0, self.time_ns + 5)
        self.results += self.connection.close(record)
        return self

    @property
    def calls(self) -> list[Call]:
        return [call for _, call in self.results]

    @property
    def values(self) -> list[dict[str, object]]:
        return [dict(call.all_attributes()) for call in self.calls]

    def only(self) -> tuple[Exchange, Call, dict[str, object]]:
        """The one result that there is to be."""
        ((exchange, call),) = self.results
        return exchange, call, dict(call.all_attributes())


class Conversation:
    """A client and a server of h2, and what they sent: ``log`` has (direction, bytes) in the order of the wire."""

    def __init__(self, *, upgrades: bool = False) -> None:
        """``upgrades``: HTTP/1 has asked for HTTP/2 with ``settings``, and stream 1 is open."""
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.log: list[tuple[int, bytes]] = []
        self.settings = b""
        if upgrades:
            self.settings = self.client.initiate_upgrade_connection() or b""
            self.server.initiate_upgrade_connection(self.settings)
        else:
            self.client.initiate_connection()
            self.server.initiate_connection()
        self.exchange()

    def flush_client(self) -> None:
        data = self.client.data_to_send()
        if data:
            self.log.append((REQUEST, data))
            self.server.receive_data(data)

    def flush_server(self) -> None:
        data = self.server.data_to_send()
        if data:
            self.log.append((RESPONSE, data))
            self.client.receive_data(data)

    def exchange(self) -> None:
        """Let everything that waits be sent and received, acknowledgements included."""
        for _ in range(3):
            self.flush_client()
            self.flush_server()

    def ask(self, headers: Headers, body: bytes = b"", **options: object) -> int:
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, headers, end_stream=not body, **options)
        if body:
            self.client.send_data(stream, body, end_stream=True)
        self.exchange()
        return stream

    def answer(self, stream: int, headers: Headers, body: bytes = b"", trailers: Headers | None = None) -> None:
        self.server.send_headers(stream, headers, end_stream=not body and trailers is None)
        if body:
            self.server.send_data(stream, body, end_stream=trailers is None)
        if trailers is not None:
            self.server.send_headers(stream, trailers, end_stream=True)
        self.exchange()

    def show(self, observed: Observed) -> Observed:
        for direction, data in self.log:
            observed.see(direction, data)
        return observed


def get(path: str = "/", method: str = "GET", *more: tuple[str, str], scheme: str = "http") -> Headers:
    return [(":method", method), (":scheme", scheme), (":authority", "a.example:8080"), (":path", path), *more]


SWITCHES = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"


def upgraded(request: bytes, role: int = SERVER, **fields: object) -> Exchange:
    """What the kernel says of an exchange whose response switches to HTTP/2."""
    values: dict[str, object] = dict.fromkeys(Exchange.__struct_fields__, 0)
    values |= {
        "role": role,
        "end": int(End.HANDED_OVER),
        "flags": int(Flag.FIRST),
        "exchange_id": 77,
        "connection_id": 7,
        "request_start_ns": 10,
        "request_end_ns": 12,
        "response_start_ns": 20,
        "response_end_ns": 20,
        "end_ns": 20,
        "request_bytes": len(request),
        "response_bytes": len(SWITCHES),
        "request_captured": len(request),
        "response_captured": len(SWITCHES),
        "remote_address": bytes(10) + b"\xff\xff\x7f\0\0\1",
        "tail": bytes(8),
        "request": request,
        "response": SWITCHES,
    }
    return Exchange(**values | fields)


def asks(target: str = "/a", *more: str, method: str = "GET", settings: str = "AAMAAABkAAQAAP__") -> bytes:
    """The head of a request that asks for HTTP/2."""
    fields = ["Host: a.example:8080", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"]
    lines = [f"{method} {target} HTTP/1.1", *fields, f"HTTP2-Settings: {settings}", *more]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def grpc(path: str = "/pkg.Greeter/Hello", *more: tuple[str, str]) -> Headers:
    return get(path, "POST", ("te", "trailers"), ("content-type", "application/grpc+proto"), *more)


OK: Headers = [(":status", "200")]
GRPC_OK: Headers = [(":status", "200"), ("content-type", "application/grpc")]


def message(size: int) -> bytes:
    """A length-prefixed message of gRPC."""
    return b"\0" + size.to_bytes(4, "big") + b"m" * size


class Raw:
    """Frames by hand, for what h2 does not send."""

    def __init__(self) -> None:
        self.encoders = {REQUEST: Encoder(), RESPONSE: Encoder()}

    def headers(self, direction: int, stream: int, headers: Headers, *flags: str) -> bytes:
        frame = HeadersFrame(stream, self.encoders[direction].encode(headers), flags=["END_HEADERS", *flags])
        return frame.serialize()


def raw(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of any kind."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def frames_of(data: bytes) -> Iterable[bytes]:
    """The frames of whole bytes of a direction, the preface first."""
    if data.startswith(PREFACE):
        yield PREFACE
        data = data[len(PREFACE) :]
    while data:
        _, length = Frame.parse_frame_header(memoryview(data[:9]))
        yield data[: 9 + length]
        data = data[9 + length :]
