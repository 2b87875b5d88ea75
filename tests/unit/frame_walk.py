"""What the kernel forwards of an HTTP/2 connection, written down a second time: transfers -> segments.

In: the bytes of one direction, transfer by transfer. Out: (offset, captured bytes, length, flags) of each segment that
bpf/frames.bpf.h makes of a transfer. tests/e2e/test_frames.py compares the two; the reader is tested with this one.
"""

from __future__ import annotations

from agent.model import SegmentFlag

HTTP2 = int(SegmentFlag.HTTP2)
AT_FRAME = int(SegmentFlag.AT_FRAME)
PREFACE_BYTES, HEADER_BYTES = 24, 9
SEGMENT_CAP, WHOLE_DATA_BYTES, DATA_BYTES, CONTROL_BYTES, BLOCK_BYTES = 4096, 512, 16, 1024, 65536 + 261
DATA, HEADERS, PRIORITY, PUSH_PROMISE, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 5, 6, 8, 9

Made = tuple[int, bytes, int, int]


class FrameWalk:
    """One direction. ``begins``: with the preface."""

    def __init__(self, *, begins: bool) -> None:
        self.left = self.keep = PREFACE_BYTES if begins else 0
        self.header = b""
        self.offset = 0
        self.ends = self.passed = False
        self._run = b""
        self._gap = 0
        self._flags = HTTP2
        self._ended = False
        self._made: list[Made] = []

    def transfer(self, data: bytes) -> list[Made]:
        """Walk over one transfer of well-formed frames."""
        self._made = []
        position = 0
        while position < len(data):
            if not self.left:
                step = min(HEADER_BYTES - len(self.header), len(data) - position)
                self.header += data[position : position + step]
                position += step
                if len(self.header) == HEADER_BYTES:
                    if self._gap or len(self._run) > SEGMENT_CAP - HEADER_BYTES:
                        self._flush(at_end=position == len(data))
                    self._begin()
            elif self.keep:
                if len(self._run) >= SEGMENT_CAP:
                    self._flush(at_end=False)
                step = min(self.keep, len(data) - position, SEGMENT_CAP - len(self._run))
                self._run += data[position : position + step]
                self.keep -= step
                self.left -= step
                position += step
            else:
                step = min(self.left, len(data) - position)
                self.left -= step
                position += step
                if not self.passed:
                    self._gap += step
                    self._ended |= not self.left and self.ends
        self._flush(at_end=True)
        return self._made

    def _begin(self) -> None:
        length, kind, flags = int.from_bytes(self.header[:3], "big"), self.header[3], self.header[4]
        self.left, self.keep = length, 0
        self.passed = not self._run and kind in (WINDOW_UPDATE, PING, PRIORITY)
        if not self.passed:
            if not self._run:
                self._flags = HTTP2 | AT_FRAME
            self._run += self.header
            most = CONTROL_BYTES
            if kind == DATA:
                most = WHOLE_DATA_BYTES if length <= WHOLE_DATA_BYTES else DATA_BYTES
            elif kind in (HEADERS, PUSH_PROMISE, CONTINUATION):
                most = BLOCK_BYTES
            self.keep = min(length, most)
            self.ends = kind == DATA and bool(flags & 1)
        self.header = b""

    def _flush(self, *, at_end: bool) -> None:
        length = len(self._run) + self._gap
        if self._run or (self._ended and at_end):
            self._made.append((self.offset, self._run, length, self._flags))
            self._ended = False
        self.offset += length
        self._run, self._gap, self._flags = b"", 0, HTTP2
