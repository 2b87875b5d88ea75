"""One direction of an HTTP/1.x connection, read incrementally: where messages begin and end.

In: captured bytes and the lengths of gaps. Out: calls at the beginning, behind the head and at the end of each message.
Never happens: a body is kept, more than ``HEAD_BYTES`` are buffered, or anything but ``LostError`` is raised here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum

from agent.protocols import http1_syntax as syntax

HEAD_BYTES = 8 * 1024
"""A longer head, chunk-size line or trailer line is ``LostError("too_long")``."""

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")


class State(IntEnum):
    """Where a reader stands."""

    HEAD = 1
    """At a message's beginning or inside its head."""
    BODY = 2
    """``remaining`` bytes of a body with a Content-Length follow."""
    CHUNK_SIZE = 3
    CHUNK_DATA = 4
    """``remaining`` bytes of a chunk and of the CRLF behind it follow."""
    TRAILERS = 5
    UNTIL_CLOSE = 6
    SEEKING = 7
    """Bytes are ignored until a segment begins like a message."""
    OPAQUE = 8
    """Behind 101 or CONNECT: what follows is not HTTP."""


_END_OF_CHUNKS = b"\0\0\n0\r\n\r\n"
"""The last eight bytes of a chunked message as the protocol has them; readers take a bare LF as well, and trailers."""


class LostError(Exception):
    """Framing is lost; the argument is the reason to count."""


class Message:
    """What is known of one request or response."""

    __slots__ = ("done", "end_ns", "head", "message_bytes", "start_ns", "tail", "tid")

    def __init__(self, start_ns: int, tid: int) -> None:
        self.head = b""
        self.message_bytes = 0
        self.start_ns = start_ns
        self.end_ns = start_ns
        self.tid = tid
        self.tail = b""  # the last bytes, at most 8, none from before a gap
        self.done = False


class Reader:
    """One direction: consumes bytes and gaps, and finds where messages begin and end.

    ``start(message)`` tells whether a message is expected here; ``begin(message)`` reads a complete head and returns
    the state for its body with the length, or None to forget the message (an interim response); ``finish(message)``
    ends it.
    """

    __slots__ = ("_begin", "_buffer", "_finish", "_start", "message", "next_offset", "remaining", "state")

    def __init__(
        self,
        start: Callable[[Message], bool],
        begin: Callable[[Message], tuple[State, int] | None],
        finish: Callable[[Message], None],
    ) -> None:
        self._start, self._begin, self._finish = start, begin, finish
        self._buffer = bytearray()  # an unfinished head or line, at most HEAD_BYTES
        self.next_offset = 0
        self.reset(State.HEAD)

    def reset(self, state: State) -> None:
        self.state = state
        self.remaining = 0
        self.message: Message | None = None
        self._buffer.clear()

    def unfinished_head(self) -> bytes:
        return bytes(self._buffer) if self.state is State.HEAD else b""

    def feed(self, data: bytes, time_ns: int, tid: int) -> None:
        """Consume captured bytes. Raises LostError."""
        position = 0
        while position < len(data):
            state = self.state
            if state in (State.SEEKING, State.OPAQUE):
                return
            message = self.message
            if message is None:
                # Empty lines in front of a message are not part of it (RFC 9112 section 2.2).
                while position < len(data) and data[position] in b"\r\n":
                    position += 1
                if position == len(data):
                    return
                message = Message(time_ns, tid)
                if not self._start(message):
                    self.state = State.SEEKING
                    return
                self.message = message
            if state in (State.HEAD, State.CHUNK_SIZE, State.TRAILERS):
                section, end = self._take(data, position)
            elif state is State.UNTIL_CLOSE:
                section, end = None, len(data)
            else:
                section, end = None, min(len(data), position + self.remaining)
                self.remaining -= end - position
            message.message_bytes += end - position
            message.end_ns = time_ns
            message.tail = (message.tail + data[max(position, end - 8) : end])[-8:]
            position = end
            if section is not None:
                self._read(section, message)
            elif state in (State.BODY, State.CHUNK_DATA) and not self.remaining:
                self._end_of_data(message)

    def skip(self, gap_bytes: int, time_ns: int) -> None:
        """Consume bytes that were not captured. Raises LostError where that destroys framing."""
        while gap_bytes > 0 and self.state not in (State.SEEKING, State.OPAQUE):
            message = self.message
            if message is None or self.state in (State.HEAD, State.CHUNK_SIZE, State.TRAILERS):
                raise LostError("gap")
            step = gap_bytes if self.state is State.UNTIL_CLOSE else min(gap_bytes, self.remaining)
            message.message_bytes += step
            message.end_ns = time_ns
            message.tail = b""
            gap_bytes -= step
            if self.state is not State.UNTIL_CLOSE:
                self.remaining -= step
                if not self.remaining:
                    self._end_of_data(message)

    def _take(self, data: bytes, position: int) -> tuple[bytes | None, int]:
        """Collect a head or a line across segments; return it, or None while it is unfinished, and the new position."""
        buffer = self._buffer
        known = len(buffer)
        buffer += data[position : position + HEAD_BYTES + 1 - known]
        if self.state is State.HEAD:
            end = syntax.find_head_end(buffer, max(0, known - 2))
        else:
            end = buffer.find(b"\n", known) + 1
        if end <= 0 and len(buffer) <= HEAD_BYTES:
            return None, len(data)
        if end <= 0 or end > HEAD_BYTES:
            raise LostError("too_long")
        section = bytes(buffer[:end])
        buffer.clear()
        return section, position + end - known

    def _read(self, section: bytes, message: Message) -> None:
        """Act on a complete head, chunk-size line or trailer line."""
        if self.state is State.HEAD:
            message.head = section
            body = self._begin(message)
            if body is None:
                self.message = None
            elif self.message is message:  # else the head ended the connection's HTTP
                self.state, self.remaining = body
                if self.state is State.BODY and not self.remaining:
                    self._end_of_data(message)
        elif self.state is State.CHUNK_SIZE:
            match = _CHUNK_SIZE.fullmatch(section)
            if match is None:
                raise LostError("malformed")
            size = int(match[1], 16)
            self.state, self.remaining = (State.CHUNK_DATA, size + 2) if size else (State.TRAILERS, 0)
        elif section in (b"\r\n", b"\n"):
            if not message.tail.endswith(b"\r\n\r\n"):
                message.tail = _END_OF_CHUNKS  # however it was written: this reader knows
            self._end_of_message(message)

    def _end_of_data(self, message: Message) -> None:
        if self.state is State.CHUNK_DATA:
            self.state = State.CHUNK_SIZE
        else:
            self._end_of_message(message)

    def _end_of_message(self, message: Message) -> None:
        self.reset(State.HEAD)
        message.done = True
        self._finish(message)
