"""Segments of one connection, as the kernel made them -> in the order in which the protocol needs them.

A request that a client sends is told of when its write returns. Its response may have been read by another thread by
then, and is told of first; the kernel marks it. Such responses wait here for the request, or for whatever shows that
it has been told of. Never happens: a segment is kept longer than its connection, or changes its place among those of
its direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.model import Segment, SegmentFlag

WAITING_SEGMENTS = 64
"""Of one connection. With more of them nothing waits any longer: the write blocks, or its end was not seen."""

WAITING_NS = 1_000_000_000
"""A write that takes longer than this may never be told of: body bytes of HTTP/2 alone are not."""

_DIRECTION_REQUEST = 1
_OVERTAKES = int(SegmentFlag.OVERTAKES)


class SegmentOrder:
    """The segments that wait, of all connections."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: dict[int, list[Segment]] = {}
        """Connection id -> marked responses, oldest first. Empty nearly always: look here first, it is quick."""

    def arrange(self, segment: Segment) -> Sequence[Segment]:
        """Take one segment; return those that are to be read now, in order."""
        connection_id = segment.connection_id
        if segment.flags & _OVERTAKES:
            waiting = self.waiting.setdefault(connection_id, [])
            waiting.append(segment)
            return self.release(connection_id) if len(waiting) > WAITING_SEGMENTS else ()
        waiting = self.release(connection_id)
        return [segment, *waiting] if segment.direction == _DIRECTION_REQUEST else [*waiting, segment]

    def overdue(self, now_ns: int) -> list[int]:
        """Return the connections of which something has been waiting for too long."""
        return [
            connection_id for connection_id, waiting in self.waiting.items() if now_ns - waiting[0].time_ns > WAITING_NS
        ]

    def release(self, connection_id: int) -> list[Segment]:
        """Return what waits of a connection, in order; it waits no longer."""
        return self.waiting.pop(connection_id, [])
