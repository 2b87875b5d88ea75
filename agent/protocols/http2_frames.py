"""One direction of an HTTP/2 connection, read incrementally: where frames begin and end (RFC 9113 section 4).

In: captured bytes and the lengths of gaps. Out: calls for data, whole header blocks and control frames. Never happens:
data is kept, more than ``BLOCK_BYTES`` and one frame's padding are buffered, or anything but ``LostError`` is raised
here. A gap inside a frame whose header was seen does not destroy framing; what was in it is reported as missing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct

from agent.protocols.http1_reader import LostError

BLOCK_BYTES = 64 * 1024
"""A longer header block is "block_too_long": its frames are skipped."""
CONTROL_BYTES = 1024
"""So much of a SETTINGS or GOAWAY frame is read: 170 settings."""
DEFAULT_FRAME_BYTES = 16 * 1024
LARGEST_FRAME_BYTES = (1 << 24) - 1
ANY_FRAME_BYTES = 1 << 24
"""The limit while it is not known."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PREFACE_HEADER = PREFACE[:9]
_HEADER_BYTES = 9
_HEADER = Struct(">HBBBI")
"""The length in two parts, type, flags, and the stream with the reserved bit."""
_STREAM = 0x7FFF_FFFF


class Kind(IntEnum):
    """Frame types of RFC 9113 section 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


_DATA, _HEADERS, _PUSH_PROMISE, _CONTINUATION = Kind.DATA, Kind.HEADERS, Kind.PUSH_PROMISE, Kind.CONTINUATION
_PREFACE = 256
"""The kind of the connection preface, which is read like a frame."""
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

_BLOCK_FLAGS = END_HEADERS | PADDED | PRIORITIZED

_ON_STREAM = frozenset((Kind.DATA, Kind.HEADERS, Kind.PRIORITY, Kind.RST_STREAM, Kind.PUSH_PROMISE, Kind.CONTINUATION))
_ON_CONNECTION = frozenset((Kind.SETTINGS, Kind.PING, Kind.GOAWAY))
_LENGTHS = {Kind.PRIORITY: 5, Kind.RST_STREAM: 4, Kind.PING: 8, Kind.WINDOW_UPDATE: 4}
_FLAGS = (
    END_STREAM | PADDED,
    END_STREAM | END_HEADERS | PADDED | PRIORITIZED,
    0,
    0,
    ACK,
    END_HEADERS | PADDED,
    ACK,
    0,
    0,
    4,
)
_BLOCK_KINDS = frozenset((Kind.HEADERS, Kind.PUSH_PROMISE, Kind.CONTINUATION))
_BLOCK_FRAME_BYTES = BLOCK_BYTES + 256 + 5
"""A block with what may be around it: padding and priority."""
_KEPT = {
    Kind.HEADERS: _BLOCK_FRAME_BYTES,
    Kind.PUSH_PROMISE: _BLOCK_FRAME_BYTES,
    Kind.CONTINUATION: BLOCK_BYTES + 1,
    Kind.RST_STREAM: 4,
    Kind.SETTINGS: CONTROL_BYTES,
    Kind.GOAWAY: CONTROL_BYTES,
}
"""Payload bytes that are buffered, by kind; of others none."""

STREAMS_AHEAD = 1 << 17
"""So far ahead of the last stream seen may one be at which reading starts again."""
UNKNOWN_AMOUNT = -1

OnData = Callable[[int, bytes, int, int, int, int], None]
OnBlock = Callable[[int, int, bytes, int], None]
OnControl = Callable[[int, int, int, bytes | None], None]


class FrameReader:
    """One direction: consumes bytes and gaps, and finds frames.

    ``on_data(stream, data, start, stop, gap_bytes, ends)`` gives ``data[start:stop]``, then bytes that were not
    captured, without padding; ``gap_bytes`` is UNKNOWN_AMOUNT where the length of the padding was not captured.
    ``on_block(stream, ends, block, start_ns)`` gives a whole header block; ``on_push(block)`` that of a push promise.
    ``on_lost_block(stream, ends, reason)`` reports one of which something is missing.
    ``on_control(kind, flags, stream, payload)`` gives RST_STREAM, SETTINGS and GOAWAY; the payload is None when some
    of it is missing, and of GOAWAY only the beginning. ``on_preface()`` reports the connection preface. ``ends`` is not
    0 with END_STREAM.
    """

    __slots__ = (
        "_block",
        "_block_ends",
        "_block_kind",
        "_block_loss",
        "_block_start_ns",
        "_block_stream",
        "_damaged",
        "_flags",
        "_held",
        "_keep",
        "_kind",
        "_length",
        "_on_block",
        "_on_control",
        "_on_data",
        "_on_lost_block",
        "_on_preface",
        "_on_push",
        "_padding",
        "_payload",
        "_remaining",
        "_start_ns",
        "_stream",
        "frame_bytes",
        "frames",
        "is_seeking",
        "next_offset",
    )

    def __init__(
        self,
        *,
        on_data: OnData,
        on_block: OnBlock,
        on_push: Callable[[bytes], None],
        on_lost_block: Callable[[int, int, str], None],
        on_control: OnControl,
        on_preface: Callable[[], None] | None = None,
    ) -> None:
        self._on_data, self._on_block, self._on_push = on_data, on_block, on_push
        self._on_lost_block, self._on_control, self._on_preface = on_lost_block, on_control, on_preface
        self.next_offset = 0
        self.frame_bytes = ANY_FRAME_BYTES
        """The longest frame that the other end accepts, as far as it is known."""
        self.frames = 0
        self.reset()

    def reset(self, *, seeking: bool = False) -> None:
        """Expect a frame header, or ignore everything until the owner resets again."""
        self.is_seeking = seeking
        self._held = b""  # an unfinished frame header
        self._remaining = 0  # payload bytes of the frame at hand that are still to come
        self._kind = self._flags = self._stream = self._length = self._keep = 0
        self._padding = 0
        self._payload = bytearray()
        self._damaged = False
        self._start_ns = 0
        self._end_block()

    @property
    def buffered_bytes(self) -> int:
        """What is held of an unfinished frame and an unfinished header block."""
        return len(self._held) + len(self._payload) + len(self._block)

    @property
    def is_between_frames(self) -> bool:
        """Whether a frame header is what comes next."""
        return not (self._remaining or self._held)

    def feed(self, data: bytes, time_ns: int) -> None:
        """Consume captured bytes. Raises LostError."""
        if self.is_seeking:
            return
        position = 0
        if self._held:
            data = self._held + data
            self._held = b""
        elif not self._remaining:
            self._start_ns = time_ns
        if self._remaining:
            position = self._consume(data, 0)
            if not self._remaining:
                self._start_ns = time_ns
        end = len(data)
        while end - position >= _HEADER_BYTES:
            high, low, kind, flags, stream = _HEADER.unpack_from(data, position)
            length = high << 8 | low
            stream &= _STREAM
            start = position + _HEADER_BYTES
            stop = start + length
            if stop <= end and not self._block_kind and length <= self.frame_bytes:
                # The short way: a whole frame without anything special about it.
                if kind == 0 and stream:
                    if not flags & PADDED:
                        self.frames += 1
                        position = stop
                        self._on_data(stream, data, start, stop, 0, flags & END_STREAM)
                        self._start_ns = time_ns
                        continue
                elif kind == 1 and stream:
                    if flags & _BLOCK_FLAGS == END_HEADERS and length <= BLOCK_BYTES:
                        self.frames += 1
                        position = stop
                        self._on_block(stream, flags & END_STREAM, data[start:stop], self._start_ns)
                        self._start_ns = time_ns
                        continue
                elif kind == 8 and length == 4:  # WINDOW_UPDATE
                    self.frames += 1
                    position = stop
                    self._start_ns = time_ns
                    continue
            self._begin(data[position:start], kind, flags, stream, length)
            position = self._consume(data, start)
            if not self._remaining:
                self._start_ns = time_ns
        if position < end:
            self._held = data[position:]

    def skip(self, gap_bytes: int) -> None:
        """Consume bytes that were not captured. Raises LostError where that destroys framing."""
        if gap_bytes <= 0 or self.is_seeking:
            return
        step = min(gap_bytes, self._remaining)
        if step:
            self._remaining -= step
            if self._kind == _DATA:
                self._skip_data(step)
            elif len(self._payload) < self._keep:
                self._damaged = True
            if not self._remaining:
                self._finish()
        if gap_bytes > step:
            raise LostError("gap")

    def _begin(self, header: bytes, kind: int, flags: int, stream: int, length: int) -> None:
        """Begin a frame that is not whole in the data at hand, or is unusual. Raises LostError."""
        if header == _PREFACE_HEADER and self._on_preface is not None and not self.frames:
            kind, length = _PREFACE, len(PREFACE) - _HEADER_BYTES
        elif length > self.frame_bytes or not _is_well_formed(kind, flags, stream, length):
            raise LostError("malformed")
        elif (kind == _CONTINUATION) != bool(self._block_kind) or (self._block_kind and stream != self._block_stream):
            raise LostError("malformed")  # section 6.10: nothing comes between the frames of a header block
        self.frames += 1
        self._kind, self._flags, self._stream, self._length = kind, flags, stream, length
        self._remaining = length
        self._keep = min(length, _KEPT.get(kind, 0))
        self._padding = UNKNOWN_AMOUNT if kind == _DATA and flags & PADDED else 0
        self._damaged = False
        self._payload.clear()
        if not length:
            if kind == _DATA:
                if flags & PADDED:
                    raise LostError("malformed")
                self._on_data(stream, b"", 0, 0, 0, flags & END_STREAM)
            self._finish()

    def _consume(self, data: bytes, position: int) -> int:
        """Consume payload of the frame at hand; return the position behind it. Raises LostError."""
        stop = min(position + self._remaining, len(data))
        if stop == position:
            return position
        if self._kind == _DATA:
            self._consume_data(data, position, stop)
        else:
            missing = self._keep - len(self._payload)
            if missing > 0 and not self._damaged:
                self._payload += data[position : min(stop, position + missing)]
            self._remaining -= stop - position
        if not self._remaining:
            self._finish()
        return stop

    def _consume_data(self, data: bytes, start: int, stop: int) -> None:
        if self._padding < 0:
            self._padding = data[start]
            start += 1
            self._remaining -= 1
            if self._padding > self._remaining:
                raise LostError("malformed")
        self._remaining -= stop - start
        # Padding is at the end of the frame: what is left of it behind stop, and what lies in front of stop.
        stop = max(start, stop - max(self._padding - self._remaining, 0))
        self._on_data(self._stream, data, start, stop, 0, self._ends())

    def _skip_data(self, gap_bytes: int) -> None:
        if self._padding < 0:
            self._padding = self._length  # the rest of the frame counts for nothing
            gap_bytes = UNKNOWN_AMOUNT
        elif self._padding:
            gap_bytes -= min(gap_bytes, max(self._padding - self._remaining, 0))
        self._on_data(self._stream, b"", 0, 0, gap_bytes, self._ends())

    def _ends(self) -> int:
        return 0 if self._remaining else self._flags & END_STREAM

    def _finish(self) -> None:
        kind = self._kind
        if kind == _PREFACE:
            if self._on_preface is not None:
                self._on_preface()
        elif kind in _BLOCK_KINDS:
            self._finish_block_frame()
        elif self._keep or kind == Kind.SETTINGS:
            is_cut = self._damaged or (kind == Kind.SETTINGS and self._length > self._keep)
            payload = None if is_cut else bytes(self._payload)
            self._payload.clear()
            self._on_control(kind, self._flags, self._stream, payload)

    def _finish_block_frame(self) -> None:
        payload = self._payload
        flags = self._flags
        if self._kind != _CONTINUATION:
            self._block_kind, self._block_stream = self._kind, self._stream
            self._block_ends = flags & END_STREAM if self._kind == _HEADERS else 0
            self._block_start_ns = self._start_ns
        loss = "gap" if self._damaged else "block_too_long" if self._length > self._keep else ""
        if not loss and self._kind != _CONTINUATION:
            start = 5 if self._kind == _HEADERS and flags & PRIORITIZED else 4 if self._kind == _PUSH_PROMISE else 0
            padding = 0
            if flags & PADDED:
                padding = payload[0] if payload else 0
                start += 1
            if start + padding > len(payload):
                raise LostError("malformed")
            payload = payload[start : len(payload) - padding]
        if not loss and len(self._block) + len(payload) > BLOCK_BYTES:
            loss = "block_too_long"
        if loss:
            self._block_loss = self._block_loss or loss
            self._block.clear()
        elif not self._block_loss:
            self._block += payload
        self._payload.clear()
        if flags & END_HEADERS:
            kind, stream, ends, start_ns = self._block_kind, self._block_stream, self._block_ends, self._block_start_ns
            block, loss = bytes(self._block), self._block_loss
            self._end_block()
            if loss:
                self._on_lost_block(stream if kind == _HEADERS else 0, ends, loss)
            elif kind == _HEADERS:
                self._on_block(stream, ends, block, start_ns)
            else:
                self._on_push(block)

    def _end_block(self) -> None:
        self._block = bytearray()
        self._block_kind = 0  # HEADERS or PUSH_PROMISE while CONTINUATION is to follow
        self._block_stream = self._block_ends = self._block_start_ns = 0
        self._block_loss = ""


def _is_well_formed(kind: int, flags: int, stream: int, length: int) -> bool:
    """Whether such a frame is no connection error (RFC 9113 section 6)."""
    if kind in _ON_STREAM:
        if not stream:
            return False
    elif kind in _ON_CONNECTION and stream:
        return False
    if length != _LENGTHS.get(kind, length):
        return False
    if kind == Kind.SETTINGS:
        return length % 6 == 0 and not (flags & ACK and length)
    return kind != Kind.GOAWAY or length >= 8


def begins_with_frames(data: bytes, frame_bytes: int, last_stream: int) -> bool:
    """Whether ``data`` is likely to begin at a frame: all that follows until its end must be likely as well.

    Stricter than the RFC: a first frame of an unknown type, unknown flags, reserved bits and streams far beyond
    ``last_stream`` (0 when nothing is known) are legal, and rare. A header block's continuation is no beginning.
    """
    position = 0
    while len(data) - position >= _HEADER_BYTES:
        high, low, kind, flags, stream = _HEADER.unpack_from(data, position)
        length = high << 8 | low
        if kind > Kind.CONTINUATION:
            if not position or flags:
                return False
        elif (kind == _CONTINUATION and not position) or flags & ~_FLAGS[kind]:
            return False
        if length > frame_bytes or not _is_well_formed(kind, flags, stream, length):
            return False
        if stream > _STREAM or (last_stream and stream > last_stream + STREAMS_AHEAD):
            return False
        position += _HEADER_BYTES + length
    return position > 0


def begins_with_preface(data: bytes) -> bool:
    """Whether ``data`` begins with the connection preface, as far as it goes."""
    return data[: len(PREFACE)] == PREFACE[: len(data)]
