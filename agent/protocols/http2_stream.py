"""HTTP/2 connections: the segments of one connection -> one synthetic ``Exchange`` with its ``Call`` per stream.

In: ``Segment`` records of both directions in the order in which the kernel made them, at last the close. Out: pairs of
an exchange without heads and the call that was read from the stream's header blocks. Never happens: an exception,
whatever the bytes and numbers are; a body is kept; a request gets a path, a name or a parent that it did not have.

Each direction has its own frame reader and its own HPACK context. A stream's exchange ends with its response, since
that is what the caller waits for, or with what cuts it short. Kernel records may leave bytes out. Inside a DATA frame
that does no harm; inside a header block it loses that block, and what later blocks refer to in it is unknown; where a
frame header may have been, the streams that are open are lost, and reading starts again where the kernel says that
a segment begins with a frame. A connection that is older than its first segment is read in the same way.

A connection that HTTP/1 switched to HTTP/2 has stream 1 from the beginning: the request that asked for it.

Bounds per connection: 1024 open streams, for each direction 64 KiB of a header block, 16 KiB of its dynamic table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.errors import ProtocolError
from agent.model import Call, ConnectionClosed, End, Exchange, Flag, Role, Segment, SegmentFlag
from agent.protocols import grpc
from agent.protocols.http1_outcome import CONNECT, failure
from agent.protocols.http1_reader import LostError
from agent.protocols.http1_stream import StreamLosses
from agent.protocols.http2 import Answer, Http2
from agent.protocols.http2_frames import (
    ACK,
    ANY_FRAME_BYTES,
    DEFAULT_FRAME_BYTES,
    END_STREAM,
    LARGEST_FRAME_BYTES,
    FrameReader,
    Kind,
    begins_with_frames,
    begins_with_preface,
)
from agent.protocols.http2_outcome import (
    REFUSED,
    UNREAD,
    Side,
    Stream,
    call_of,
    continued,
    exchange_id_of,
    exchange_of,
    read_error,
)
from agent.protocols.http2_upgrade import read_upgrade

if TYPE_CHECKING:
    from agent.protocols.http2_headers import HeaderDecoder

OPEN_STREAMS = 1024
"""Requests beyond are lost: "too_many"."""

_DIRECTION_REQUEST = 1
_AT_FRAME = int(SegmentFlag.AT_FRAME)
_INTERIM, _PEER_CLOSED = int(Flag.INTERIM), int(Flag.PEER_CLOSED)
_OPEN, _NEXT, _RESET = int(End.OPEN), int(End.NEXT), int(End.RESET)
_HANDED_OVER, _TIMED_OUT = int(End.HANDED_OVER), int(End.TIMED_OUT)
_HEADER_TABLE_SIZE, _MAX_FRAME_SIZE = 1, 5
_FRAME_HEADER_BYTES = 9


class Http2Connection:
    """One connection. ``feed``, ``expire`` and ``close`` return finished exchanges with their calls and never raise.

    ``lost``: requests whose exchange was never handed out. ``losses``: why, and what else went wrong. Reasons beside
    those of ``StreamLosses``: "mid_stream" (a connection older than its first segment), "header_unknown" (a request
    whose method or path is unknown), "block_too_long", "list_too_long" and "table_too_large" (see http2_headers), and
    those of ``Http1.parse`` for a request that switched to HTTP/2.
    """

    def __init__(self, protocol: Http2, losses: StreamLosses) -> None:
        self.protocol = protocol
        self.losses = losses
        self.lost = 0
        self.peer_connection_id = 0
        """Of a server's connection, the client's end of it on this node; set by whoever knows both."""
        self.withdrawn: list[int] = []
        """Ids of exchanges that were announced and lost since; for whoever was told to take."""
        self._streams: dict[int, Stream] = {}
        self._announced = 0  # the highest stream that announce() has told of
        self._last_stream = 0  # the highest that a request was seen on
        self._may_have_missed = False  # requests, since then
        self._has_preface = False
        self._ready: list[tuple[Exchange, Call]] = []
        # The first one, or the exchange that the connection was switched by, without its data: who and where.
        self._segment: Segment | Exchange | None = None
        self._begun: Exchange | None = None  # the exchange that stream 1 continues
        self._peer = (b"", 0)
        self._role = 0
        self._time_ns = 0
        self._tid = 0
        from agent.protocols.http2_headers import HeaderDecoder  # not before it is needed: see Http2.huffman

        self._request_fields = HeaderDecoder(protocol.huffman, losses)
        self._response_fields = HeaderDecoder(protocol.huffman, losses)
        self._requests = FrameReader(
            on_data=self._on_request_data,
            on_block=self._on_request_block,
            on_push=lambda block: None,
            on_lost_block=self._on_lost_request_block,
            on_control=self._on_request_control,
            on_preface=self._on_preface,
        )
        self._responses = FrameReader(
            on_data=self._on_response_data,
            on_block=self._on_response_block,
            on_push=self._on_push,
            on_lost_block=self._on_lost_response_block,
            on_control=self._on_response_control,
        )

    def use(self, protocol: Http2) -> None:
        """Read what comes from now on by other settings."""
        self.protocol = protocol
        self._request_fields.repeats.clear()
        self._response_fields.repeats.clear()

    @property
    def process(self) -> tuple[int, int]:
        """Whose connection it is: process id and start. Known from the first segment on."""
        segment = self._segment
        return (segment.tgid, segment.process_start_ns) if segment is not None else (0, 0)

    @property
    def outstanding(self) -> int:
        """Requests seen and neither handed out nor lost."""
        return len(self._streams)

    def feed(self, segment: Segment) -> list[tuple[Exchange, Call]]:
        """Consume one segment; return the exchanges that it completed, with their calls."""
        if self._segment is None:
            self._segment = msgspec.structs.replace(segment, data=b"")
            self._peer = segment.remote_address, segment.remote_port
            self._role = segment.role
        is_request = segment.direction == _DIRECTION_REQUEST
        reader = self._requests if is_request else self._responses
        data = segment.data
        self._time_ns = segment.time_ns
        self._tid = segment.tid
        after = segment.length - len(data)
        before = segment.offset - reader.next_offset
        try:
            if before or after > 0:
                after = max(after, 0)
                if before < 0:
                    seen = min(-before, len(data) + after)
                    self.losses.overlapping_bytes += seen
                    after -= max(seen - len(data), 0)
                    data = data[seen:]
                    before = 0
                reader.next_offset += before + len(data) + after
                if before:
                    self._skip(reader, before)
            else:
                reader.next_offset += len(data)
            is_at_frame = segment.flags & _AT_FRAME
            if reader.is_seeking or not reader.frames:
                self._synchronise(reader, is_request, data, is_at_frame)
                if reader.is_seeking and (data or after > 0):
                    self._lose_streams()  # what was just passed over may have been theirs
            elif is_at_frame and not reader.is_between_frames:
                # Records were lost, and what they said is not where it seemed to be.
                self._lose(is_request, "gap")
                self._synchronise(reader, is_request, data, is_at_frame)
            reader.feed(data, segment.time_ns)
            if after > 0:
                reader.skip(after)
        except LostError as loss:
            self._lose(is_request, loss.args[0])
        ready = self._ready
        if ready:
            self._ready = []
        return ready

    def take_over(self, exchange: Exchange, *, is_announced: bool) -> None:
        """Begin with an exchange of HTTP/1 whose response, 101, switched the connection to HTTP/2 (RFC 7540 section
        3.2): it goes on as stream 1. ``is_announced``: others were told of it before. Nothing may have been fed yet.
        """
        self._segment = self._begun = msgspec.structs.replace(exchange, request=b"", response=b"")
        self._peer = exchange.remote_address, exchange.remote_port
        self._role = exchange.role
        self._time_ns = exchange.response_end_ns
        self._announced = int(is_announced)
        for reader, fields in map(self._direction, (True, False)):
            reader.frame_bytes = DEFAULT_FRAME_BYTES
            fields.begin()
        try:
            asked, body_bytes, settings = read_upgrade(self.protocol, exchange)
        except ProtocolError as error:
            self._settings(None, is_request=True)
            self._lose_request(1, error.reason)
            if is_announced:
                self.withdrawn.append(exchange.exchange_id)
            return
        self._settings(settings, is_request=True)
        messages = grpc.MessageCounter() if asked[0].rpc is not None else None
        side = Side(exchange.request_start_ns, exchange.request_end_ns, exchange.request_tid, messages)
        side.skip(body_bytes)
        self._last_stream = 1
        self._streams[1] = Stream(asked, side, END_STREAM)

    def announce(self, begun_ns: int) -> tuple[list[tuple[Exchange, Call]], int]:
        """Return what is known of the open requests that began up to ``begun_ns`` and were not returned before, and the
        begin of the oldest younger one, 0 without any.
        """
        due: list[int] = []
        oldest_ns = 0
        for stream_id in reversed(self._streams):
            if stream_id <= self._announced:
                break
            start_ns = self._streams[stream_id].request.start_ns
            if start_ns <= begun_ns:
                due.append(stream_id)
            else:
                oldest_ns = start_ns
        segment = self._segment
        if not due or segment is None:
            return [], oldest_ns
        self._announced = due[0]
        announced = []
        for stream_id in due:
            stream = self._streams[stream_id]
            exchange = exchange_of(segment, stream, _OPEN, begun_ns, stream_id, self.peer_connection_id)
            if stream_id == 1 and self._begun is not None:
                exchange = continued(exchange, self._begun)
            call = call_of(self.protocol, stream, segment, _OPEN, "", begun_ns)
            announced.append((exchange, call))
        return announced, oldest_ns

    def expire(self, now_ns: int) -> list[tuple[Exchange, Call]]:
        """Return what is outstanding as timed out; what still comes on those streams is read and makes no exchange."""
        return self._end_all(_TIMED_OUT, 0, now_ns)

    def close(self, closed: ConnectionClosed | None) -> list[tuple[Exchange, Call]]:
        """End the connection; return what was outstanding, with the close's end.

        Without a close record nothing is known of how the outstanding exchanges ended: they are counted as lost.
        """
        if closed is not None:
            ready = self._end_all(closed.end, closed.flags & _PEER_CLOSED, closed.time_ns)
        else:
            if self._streams:
                self.losses.count("forgotten")
            self._lose_streams()
            ready = []
        for reader in (self._requests, self._responses):
            reader.reset(seeking=True)
        return ready

    def abandon(self) -> None:
        """Lose what is outstanding: nothing more is to be read, for a time at least."""
        for is_request in (True, False):
            reader, fields = self._direction(is_request)
            reader.reset(seeking=True)
            fields.forget()
        self._lose_streams()

    # -- framing

    def _skip(self, reader: FrameReader, gap_bytes: int) -> None:
        """Leave out lost segments; what follows them may begin at a frame all the same."""
        if reader.is_seeking:
            self._lose_streams()  # those of requests that were read meanwhile
        try:
            reader.skip(gap_bytes)
        except LostError as loss:
            self._lose(reader is self._requests, loss.args[0])

    def _synchronise(self, reader: FrameReader, is_request: bool, data: bytes, is_at_frame: int) -> None:
        """Look whether a direction that has no frame yet, or lost its place, has one at the beginning of ``data``.

        The kernel says where it takes a frame to begin (``is_at_frame``), and is not believed without a look.
        """
        if len(data) < _FRAME_HEADER_BYTES:
            return
        frame_bytes = reader.frame_bytes if reader.frame_bytes < ANY_FRAME_BYTES else DEFAULT_FRAME_BYTES
        if reader.is_seeking:
            if is_at_frame and begins_with_frames(data, frame_bytes, self._last_stream):
                reader.reset()
        elif not (
            reader.buffered_bytes
            or (is_request and begins_with_preface(data))
            or begins_with_frames(data, frame_bytes, 0)
        ):
            self.losses.count("mid_stream")
            reader.reset(seeking=True)

    def _lose(self, is_request: bool, reason: str) -> None:
        """Framing of a direction is lost: header blocks and settings may have been in what was not read."""
        reader, fields = self._direction(is_request)
        self.losses.count(reason if reader.frames else "mid_stream")
        self._may_have_missed |= is_request
        reader.reset(seeking=True)
        fields.forget()
        self._settings(None, is_request=is_request)
        self._lose_streams()

    def _lose_streams(self) -> None:
        self.lost += len(self._streams)
        segment = self._segment
        if self._announced and segment is not None:
            told = (stream_id for stream_id in self._streams if stream_id <= self._announced)
            self.withdrawn += [
                self._begun.exchange_id
                if stream_id == 1 and self._begun is not None
                else exchange_id_of(segment.connection_id, stream_id)
                for stream_id in told
            ]
        self._streams.clear()

    def _on_preface(self) -> None:
        self._has_preface = True
        self._request_fields.begin()
        self._response_fields.begin()
        if self._responses.frame_bytes == ANY_FRAME_BYTES:
            self._responses.frame_bytes = DEFAULT_FRAME_BYTES
        if self._role == Role.SERVER and not self._responses.frames:
            # A server may have sent its settings before, when the connection was not known to be one of HTTP/2.
            self._request_fields.allow(None)
        elif self._requests.frame_bytes == ANY_FRAME_BYTES:
            self._requests.frame_bytes = DEFAULT_FRAME_BYTES

    def _on_request_control(self, kind: int, flags: int, stream_id: int, payload: bytes | None) -> None:
        if kind == Kind.RST_STREAM:
            self._reset(stream_id, payload)
        elif kind == Kind.SETTINGS and not flags & ACK:
            self._settings(payload, is_request=True)

    def _on_response_control(self, kind: int, flags: int, stream_id: int, payload: bytes | None) -> None:
        if kind == Kind.RST_STREAM:
            self._reset(stream_id, payload)
        elif kind == Kind.GOAWAY:
            self._go_away(payload)
        elif kind == Kind.SETTINGS and not flags & ACK:
            if self._has_preface and self._responses.frames == 1 and self._requests.frame_bytes == ANY_FRAME_BYTES:
                self._requests.frame_bytes = DEFAULT_FRAME_BYTES  # the server's first frame: nothing was agreed before
            self._settings(payload, is_request=False)

    def _direction(self, is_request: bool) -> tuple[FrameReader, HeaderDecoder]:
        if is_request:
            return self._requests, self._request_fields
        return self._responses, self._response_fields

    def _settings(self, payload: bytes | None, *, is_request: bool) -> None:
        """Take settings, None when they were missed: they say what their sender accepts, so they hold for the other
        direction (RFC 9113 section 6.5).
        """
        reader, fields = self._direction(not is_request)
        if payload is None:
            fields.allow(None)
            reader.frame_bytes = ANY_FRAME_BYTES
            return
        for position in range(0, len(payload), 6):
            setting = int.from_bytes(payload[position : position + 2], "big")
            value = int.from_bytes(payload[position + 2 : position + 6], "big")
            if setting == _HEADER_TABLE_SIZE:
                fields.allow(value)
            elif setting == _MAX_FRAME_SIZE and DEFAULT_FRAME_BYTES <= value <= LARGEST_FRAME_BYTES:
                # A lower value is in force later, when it has been acknowledged: the highest one so far counts.
                known = reader.frame_bytes if reader.frame_bytes < ANY_FRAME_BYTES else 0
                reader.frame_bytes = max(known, value)

    def _reset(self, stream_id: int, payload: bytes | None) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._end_early(stream_id, stream, read_error(payload))

    def _go_away(self, payload: bytes | None) -> None:
        """End the streams that the server says it has not looked at and never will (RFC 9113 section 6.8)."""
        if payload is None:
            return
        last = int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF
        for stream_id, stream in list(self._streams.items()):
            if stream_id > last:
                self._end_early(stream_id, stream, REFUSED)

    # -- requests

    def _on_request_block(self, stream_id: int, ends: int, block: bytes, start_ns: int) -> None:
        decoder = self._request_fields
        key = hash(block)
        asked = decoder.repeats.get(key)
        is_new = stream_id > self._last_stream
        if self._may_have_missed:
            self._count_missed(stream_id)
        if asked is None or not is_new:
            changes = decoder.changes
            try:
                fields = decoder.decode(block)
                if is_new:
                    asked = self.protocol.read_request(fields, self._role, *self._peer)
            except ProtocolError as error:
                if is_new:
                    self._lose_request(stream_id, error.reason)
                else:
                    self.losses.count(error.reason)
                return
            if is_new and asked is not None and changes == decoder.changes:
                if len(decoder.repeats) >= decoder.MOST_REPEATS:
                    decoder.repeats.clear()
                decoder.repeats[key] = asked
        if not is_new:
            stream = self._streams.get(stream_id)
            if stream is not None:  # the request's trailers
                stream.request.end_ns = self._time_ns
                stream.request_ended |= ends
            return
        if asked is None:
            return  # trailers of a stream that was opened before the first segment
        if len(self._streams) >= OPEN_STREAMS:
            self._lose_request(stream_id, "too_many")
            return
        self._last_stream = stream_id
        messages = grpc.MessageCounter() if asked[0].rpc is not None else None
        self._streams[stream_id] = Stream(asked, Side(start_ns, self._time_ns, self._tid, messages), ends)

    def _count_missed(self, stream_id: int) -> None:
        """Clients use one stream after the other: the requests that were in a gap are those left out."""
        self._may_have_missed = False
        if 0 < self._last_stream < stream_id:
            self.lost += (stream_id - self._last_stream - 1) // 2

    def _lose_request(self, stream_id: int, reason: str) -> None:
        self._last_stream = stream_id
        self.lost += 1
        self.losses.count(reason)

    def _on_lost_request_block(self, stream_id: int, ends: int, reason: str) -> None:
        self._request_fields.forget()
        if stream_id > self._last_stream:
            self._lose_request(stream_id, reason)
        else:
            self.losses.count(reason)
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.request_ended |= ends

    def _on_request_data(self, stream_id: int, data: bytes, start: int, stop: int, gap: int, ends: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            side = stream.request
            side.body_bytes += stop - start
            side.end_ns = self._time_ns
            if side.messages is not None:
                side.messages.feed(data, start, stop)
            if gap:
                side.skip(gap)
            if ends:
                stream.request_ended = ends

    # -- responses

    def _on_response_block(self, stream_id: int, ends: int, block: bytes, start_ns: int) -> None:
        decoder = self._response_fields
        key = hash(block)
        answer = decoder.repeats.get(key)
        if answer is None:
            changes = decoder.changes
            try:
                answer = self.protocol.read_answer(decoder.decode(block), self._role)
            except ProtocolError:
                self._on_lost_response_block(stream_id, ends, "malformed")
                return
            if changes == decoder.changes:
                if len(decoder.repeats) >= decoder.MOST_REPEATS:
                    decoder.repeats.clear()
                decoder.repeats[key] = answer
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_stream:
                self.losses.unmatched_responses += 1
            return
        if 100 <= answer.status < 200 and not ends and stream.answer is None:
            stream.interim = _INTERIM
            return
        self._respond(stream_id, stream, answer, ends, start_ns)

    def _respond(self, stream_id: int, stream: Stream, answer: Answer, ends: int, start_ns: int) -> None:
        """Take the response's header block, or its trailers."""
        side = stream.response
        if side is None:
            messages = grpc.MessageCounter() if stream.asked[0].rpc is not None else None
            stream.response = Side(start_ns, self._time_ns, self._tid, messages)
            stream.answer = answer
            if stream.asked[0].meaning == CONNECT and 200 <= answer.status < 300:
                self._finish(stream_id, stream, _HANDED_OVER, "", self._time_ns)
                return
        else:
            side.end_ns = self._time_ns
            if answer.status and stream.answer is not None and not stream.answer.status:
                stream.answer = answer  # what came before was an interim response that could not be read
            else:
                stream.trailers = answer
        if ends:
            self._finish(stream_id, stream, _NEXT, "", self._time_ns)

    def _on_lost_response_block(self, stream_id: int, ends: int, reason: str) -> None:
        self.losses.count(reason)
        self._response_fields.forget()
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._respond(stream_id, stream, UNREAD, ends, self._time_ns)

    def _on_push(self, block: bytes) -> None:
        """A promised request is not made by a client; only what it adds to the table matters."""
        try:
            self._response_fields.decode(block)
        except ProtocolError as error:
            self.losses.count(error.reason)

    def _on_response_data(self, stream_id: int, data: bytes, start: int, stop: int, gap: int, ends: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.response is None:
            return
        side = stream.response
        side.body_bytes += stop - start
        side.end_ns = self._time_ns
        if side.messages is not None:
            side.messages.feed(data, start, stop)
        if gap:
            side.skip(gap)
        if ends:
            self._finish(stream_id, stream, _NEXT, "", self._time_ns)

    # -- ends

    def _end_early(self, stream_id: int, stream: Stream, cause: str) -> None:
        self._finish(stream_id, stream, _RESET, cause, self._time_ns)

    def _end_all(self, end: int, flags: int, end_ns: int) -> list[tuple[Exchange, Call]]:
        cause = failure(self._role, end, flags)[1]
        for stream_id, stream in list(self._streams.items()):
            self._finish(stream_id, stream, end, str(cause), end_ns)
        ready, self._ready = self._ready, []
        return ready

    def _finish(self, stream_id: int, stream: Stream, end: int, cause: str, end_ns: int) -> None:
        """Hand out a stream's exchange and call; ``cause`` is what cut it short, "" when its response is whole."""
        del self._streams[stream_id]
        segment = self._segment
        if segment is None:  # streams come from segments
            return
        exchange = exchange_of(segment, stream, end, end_ns, stream_id, self.peer_connection_id)
        if stream_id == 1 and self._begun is not None:
            exchange = continued(exchange, self._begun)
        call = call_of(self.protocol, stream, segment, end, cause, end_ns)
        self._ready.append((exchange, call))
