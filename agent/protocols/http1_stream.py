"""Pipelined HTTP/1.x: the segments of one connection -> one synthetic ``Exchange`` per request and response.

In: ``Segment`` records of both directions in the order in which the kernel made them, at last the close. Out: records
as the kernel would have made them, had the requests come one at a time; ``Http1.parse`` reads them like any other.
Never happens: an exception, whatever the bytes and numbers; a body is kept; a response is paired with a request that
was read before framing was lost.

Each direction has its own reader (head, then a body by RFC 9112 section 6.3); responses are paired with requests in
order (section 9.3.2). Kernel records may leave bytes out: inside a body whose length is known that does not matter.
Anywhere else the connection is lost: what was outstanding is counted and forgotten. Reading starts again at a request
segment that begins with a method and follows a response segment (the client writes again, so it is likely that
nothing older is owed to it), and at the first response segment after it that begins with "HTTP/1.".

Requests that wait for too long are handed out by ``expire`` and keep their place without their heads: what is answered
after all is their response, and not that of a later request.

Bounds per connection: 256 outstanding requests, 256 KiB of their heads, 8 KiB for each head, chunk-size line and
trailer line. Whatever exceeds one of them loses the connection in the above sense.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import islice
from random import getrandbits

import msgspec

from agent.errors import ProtocolError
from agent.model import ConnectionClosed, End, Exchange, Flag, Segment, SegmentFlag
from agent.protocols import http1_syntax as syntax
from agent.protocols.http1_reader import LostError, Message, Reader, State
from agent.protocols.http1_syntax import Framing

OUTSTANDING_REQUESTS = 256
OUTSTANDING_HEAD_BYTES = 256 * 1024

_DIRECTION_REQUEST = 1
_TLS = int(SegmentFlag.TLS)
_REQUEST_BEGINNING = re.compile(rb"(?:\r?\n)*[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}(?: [!-~\x80-\xff]| ?$)")
_RESPONSE_BEGINNING = re.compile(rb"H(?:T(?:T(?:P(?:/(?:1(?:\.|$)|$)|$)|$)|$)|$)")
_FRAMING_NAMES = frozenset((b"content-length", b"transfer-encoding", b"trailer"))


class _Pair:
    """A request whose exchange has not been handed out, and its response as far as it came."""

    __slots__ = ("interim", "method", "request", "response")

    def __init__(self, request: Message, method: bytes) -> None:
        self.request = request
        self.method = method
        self.response: Message | None = None
        self.interim = False


class StreamLosses:
    """What connections could not make sense of; one may serve many connections.

    ``reasons``: reason -> how often a connection was lost: "gap", "malformed", "too_long" (a head or line), "too_many"
    (outstanding requests or their heads), "unmatched" (bytes that may have held a response were ignored),
    "handed_over" (requests behind 101 or CONNECT), "forgotten" (closed without a record). ``unmatched_responses``:
    times that response bytes came without an outstanding request. ``overlapping_bytes``: bytes that had been seen
    before.
    """

    __slots__ = ("overlapping_bytes", "reasons", "unmatched_responses")

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}
        self.unmatched_responses = 0
        self.overlapping_bytes = 0

    def count(self, reason: str) -> None:
        """Count one loss."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class PipelinedConnection:
    """One connection in stream mode. ``feed``, ``expire`` and ``close`` return finished exchanges and never raise.

    ``lost``: requests whose exchange was never handed out. ``losses``: why, and what else went wrong.
    """

    def __init__(self, losses: StreamLosses | None = None) -> None:
        self.lost = 0
        self.losses = losses if losses is not None else StreamLosses()
        self._pairs: deque[_Pair] = deque()
        self._expired = 0  # the oldest of _pairs, which were handed out already
        self._head_bytes = 0  # of the requests in _pairs
        self._ready: list[Exchange] = []
        self._requests = Reader(lambda message: True, self._begin_request, self._finish_request)
        self._responses = Reader(self._start_response, self._begin_response, self._finish_response)
        self._last_direction = 0
        self._segment: Segment | None = None  # the first one without its data: who and where

    @property
    def outstanding(self) -> int:
        """Requests seen and neither handed out nor lost."""
        return len(self._pairs) - self._expired

    def feed(self, segment: Segment) -> list[Exchange]:
        """Consume one segment; return the exchanges that it completed."""
        if self._segment is None:
            self._segment = msgspec.structs.replace(segment, data=b"")
        is_request = segment.direction == _DIRECTION_REQUEST
        reader = self._requests if is_request else self._responses
        data = segment.data
        after = max(segment.length - len(data), 0)
        before = segment.offset - reader.next_offset
        if before < 0:
            seen = min(-before, len(data) + after)
            self.losses.overlapping_bytes += seen
            after -= max(seen - len(data), 0)
            data = data[seen:]
            before = 0
        reader.next_offset += before + len(data) + after
        try:
            reader.skip(before, segment.time_ns)
        except LostError as loss:
            self._lose(loss.args[0])
        self._resynchronise(is_request, data)
        try:
            reader.feed(data, segment.time_ns, segment.tid)
            reader.skip(after, segment.time_ns)
        except LostError as loss:
            self._lose(loss.args[0])
        except ProtocolError:
            self._lose("malformed")
        if self._pairs and self._responses.state is State.SEEKING and not is_request:
            # The bytes just ignored may have held the beginning of an awaited response: later ones would be mispaired.
            self._lose("unmatched")
        if data or after:
            self._last_direction = segment.direction
        return self._take_ready()

    def hand_over(self) -> None:
        """Ignore what comes: it is of another protocol."""
        self._forget(State.OPAQUE)

    def expire(self, now_ns: int) -> list[Exchange]:
        """Return what is outstanding as timed out. Its late responses are read and make no exchange of their own."""
        self._keep_unfinished_head()
        for pair in islice(self._pairs, self._expired, None):
            self._hand_out(pair, End.TIMED_OUT, 0, now_ns)
            self._head_bytes -= len(pair.request.head)
            pair.request.head = b""
        self._expired = len(self._pairs)
        return self._take_ready()

    def close(self, closed: ConnectionClosed | None) -> list[Exchange]:
        """End the connection; return what was outstanding, with the close's end and flags.

        Without a close record nothing is known of how the outstanding exchanges ended: they are counted as lost.
        """
        if closed is None:
            self._lose("forgotten", count=bool(self.outstanding))
        else:
            self._keep_unfinished_head()
            for pair in islice(self._pairs, self._expired, None):
                self._hand_out(pair, closed.end, closed.flags & Flag.PEER_CLOSED, closed.time_ns)
            self._forget(State.OPAQUE)
        self._requests.reset(State.OPAQUE)
        self._responses.reset(State.OPAQUE)
        return self._take_ready()

    def _keep_unfinished_head(self) -> None:
        response = self._responses.message
        if response is not None and not response.head:
            response.head = self._responses.unfinished_head()

    def _take_ready(self) -> list[Exchange]:
        ready = self._ready
        if ready:
            self._ready = []
        return ready

    def _resynchronise(self, is_request: bool, data: bytes) -> None:
        """Let a seeking reader start again when ``data`` begins like a message that can be paired."""
        if is_request:
            follows_response = self._last_direction != _DIRECTION_REQUEST
            if self._requests.state is State.SEEKING and follows_response and _REQUEST_BEGINNING.match(data):
                self._requests.reset(State.HEAD)
        elif self._responses.state is State.SEEKING and self._awaits_response() and _RESPONSE_BEGINNING.match(data):
            self._responses.reset(State.HEAD)

    def _awaits_response(self) -> bool:
        return bool(self._pairs) and self._pairs[0].response is None

    def _begin_request(self, message: Message) -> tuple[State, int]:
        lines = syntax.split_lines(message.head)
        method, target, _ = syntax.read_request_line(lines[0])
        syntax.read_target(method, target)
        framing, length = _framing(lines)
        if framing is Framing.UNKNOWN:
            raise LostError("malformed")
        self._head_bytes += len(message.head)
        if len(self._pairs) >= OUTSTANDING_REQUESTS or self._head_bytes > OUTSTANDING_HEAD_BYTES:
            self.lost += 1
            raise LostError("too_many")
        self._pairs.append(_Pair(message, method))
        if method == b"CONNECT":
            message.done = True
            return State.OPAQUE, 0  # until the response says whether a tunnel begins here
        return _body_state(framing, length)

    def _finish_request(self, message: Message) -> None:
        pair = self._pairs[-1]
        if pair.response is not None and pair.response.done:
            self._complete(pair)

    def _start_response(self, message: Message) -> bool:
        if self._awaits_response():
            self._pairs[0].response = message
            return True
        self.losses.unmatched_responses += 1
        return False

    def _begin_response(self, message: Message) -> tuple[State, int] | None:
        pair = self._pairs[0]
        lines = syntax.split_lines(message.head)
        status = syntax.read_status_line(lines[0])
        if status < 200 and status != 101:
            pair.interim = True
            pair.response = None
            return None
        framing, length = _framing(lines)
        if status == 101 or (pair.method == b"CONNECT" and status < 300):
            pair.request.done = message.done = True
            self._end_oldest(End.HANDED_OVER, message.end_ns)
            self._lose("handed_over", State.OPAQUE, count=bool(self._pairs))
            return State.OPAQUE, 0
        if pair.method == b"CONNECT":
            self._requests.reset(State.SEEKING)  # no tunnel: the next request may follow
        if pair.method == b"HEAD" or status in (204, 304):
            return State.BODY, 0
        if framing in (Framing.NONE, Framing.UNKNOWN):
            return State.UNTIL_CLOSE, 0
        return _body_state(framing, length)

    def _finish_response(self, message: Message) -> None:
        pair = self._pairs[0]
        if pair.request.done:
            self._complete(pair)

    def _complete(self, pair: _Pair) -> None:
        """Hand out the oldest pair, whose response is whole."""
        self._end_oldest(End.NEXT, max(pair.request.end_ns, pair.response.end_ns if pair.response else 0))

    def _end_oldest(self, end: int, end_ns: int) -> None:
        pair = self._pairs.popleft()
        self._head_bytes -= len(pair.request.head)
        if self._expired:
            self._expired -= 1
        else:
            self._hand_out(pair, end, 0, end_ns)

    def _lose(self, reason: str, state: State = State.SEEKING, *, count: bool = True) -> None:
        if count:
            self.losses.count(reason)
        if self._pairs and self._pairs[0].response is not None and self._pairs[0].response.done:
            self._complete(self._pairs[0])  # only the end of its request's body is missing
        self.lost += self.outstanding
        self._forget(state)

    def _forget(self, state: State) -> None:
        self._pairs.clear()
        self._expired = 0
        self._head_bytes = 0
        self._requests.reset(state)
        self._responses.reset(state)

    def _hand_out(self, pair: _Pair, end: int, flags: int, end_ns: int) -> None:
        segment = self._segment
        if segment is None:  # pairs come from segments
            return
        request, response = pair.request, pair.response or Message(0, 0)
        flags |= Flag.FIRST
        if request.message_bytes > len(request.head):
            flags |= Flag.REQUEST_TRUNCATED
        if response.message_bytes > len(response.head):
            flags |= Flag.RESPONSE_TRUNCATED
        if pair.interim:
            flags |= Flag.INTERIM
        if segment.flags & _TLS:
            flags |= Flag.TLS
        if response.message_bytes and len(response.tail) == min(8, response.message_bytes):
            flags |= Flag.TAIL_VALID
        self._ready.append(
            Exchange(
                role=segment.role,
                end=int(end),
                flags=int(flags),
                exchange_id=getrandbits(64) or 1,
                parent_id=0,
                peer_id=0,
                connection_id=segment.connection_id,
                process_start_ns=segment.process_start_ns,
                request_start_ns=request.start_ns,
                request_end_ns=request.end_ns,
                response_start_ns=response.start_ns,
                response_end_ns=response.end_ns,
                end_ns=end_ns,
                request_bytes=request.message_bytes,
                response_bytes=response.message_bytes,
                tgid=segment.tgid,
                request_tid=request.tid,
                response_tid=response.tid,
                remote_port=segment.remote_port,
                request_captured=len(request.head),
                response_captured=len(response.head),
                remote_address=segment.remote_address,
                tail=response.tail.rjust(8, b"\0"),
                tls=segment.tls,
                request=request.head,
                response=response.head,
            )
        )


def _framing(lines: list[bytes]) -> tuple[Framing, int]:
    """Read the framing of a head's lines, its first line aside. Raises ProtocolError for a malformed field."""
    fields: dict[bytes, list[bytes]] = {}
    for field in map(syntax.read_field, lines[1:]):
        if field is not None and field[0] in _FRAMING_NAMES:
            fields.setdefault(field[0], []).append(field[1])
    return syntax.read_framing(fields)


def _body_state(framing: Framing, length: int) -> tuple[State, int]:
    if framing in (Framing.CHUNKED, Framing.CHUNKED_TRAILERS):
        return State.CHUNK_SIZE, 0
    return State.BODY, length
