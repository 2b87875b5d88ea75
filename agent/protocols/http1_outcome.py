"""How an HTTP/1.x exchange ended: whether its response is whole, and what cut it short when it is not.

In: a record and what its response head says about the body. Out: a yes or no, and an ``error.type``. Never happens: a
guess in favour of "whole" for a provisional record, which a later one can still settle.
"""

from __future__ import annotations

from agent.model import End, Exchange, Flag, Role
from agent.protocols.http1_syntax import Framing

HEAD, CONNECT = 1, 2
"""Methods that change what the response's framing means (RFC 9112 section 6.3)."""
METHOD_MEANING = {b"HEAD": HEAD, b"CONNECT": CONNECT}

_SERVER = int(Role.SERVER)
_OPEN, _QUIET, _NEXT, _CLOSED, _RESET, _TIMED_OUT, _HANDED_OVER = (int(end) for end in End)
_TAIL_VALID = int(Flag.TAIL_VALID)
_PEER_CLOSED = int(Flag.PEER_CLOSED)
_RESPONSE_CUT = int(Flag.RESPONSE_TRUNCATED)
_FAILURES = {
    reason: ("error.type", reason)
    for reason in ("timeout", "connection_reset", "client_disconnect", "incomplete_response")
}


OVERLAPPED = ("spanloom.response.overlapped", True)
"""The next request came before the response was whole: its end, and so the span's, is not known."""


def is_whole(exchange: Exchange, meaning: int, status: int, framing: Framing, length: int, head_bytes: int) -> bool:
    """Whether the response is whole (RFC 9112 section 6.3); ``head_bytes`` is 0 when its head's end was not seen."""
    end = exchange.end
    response_bytes = exchange.response_bytes
    if end == _HANDED_OVER:
        return True
    if not response_bytes:
        return False
    flags = exchange.flags
    response = exchange.response
    cut = not head_bytes and (flags & _RESPONSE_CUT or response_bytes > len(response))
    if not head_bytes and not cut:
        return False  # the head itself is unfinished
    tail = exchange.tail if flags & _TAIL_VALID else response[-8:] if response_bytes == len(response) else b""
    bodiless = framing is Framing.EMPTY or meaning == HEAD or (meaning == CONNECT and 200 <= status < 300)
    if bodiless or (cut and framing is Framing.LENGTH and not length):
        # Then a blank line at the end can only be the head's.
        return head_bytes > 0 or tail.endswith(b"\r\n\r\n")
    closed_or_reused = end in (_NEXT, _CLOSED)
    if framing in (Framing.CHUNKED, Framing.CHUNKED_TRAILERS):
        # The "\n" tells the last chunk, "0", from a size such as "10".
        if tail.endswith(b"\n0\r\n\r\n"):
            return True
        if end == _NEXT:
            return not tail or tail.endswith(b"\r\n\r\n")  # trailers that were not announced
        return framing is Framing.CHUNKED_TRAILERS and end == _CLOSED and tail.endswith(b"\r\n\r\n")
    if framing is Framing.LENGTH:
        if head_bytes:
            return response_bytes - head_bytes >= length
        # The head is at least as long as what was captured of it.
        return closed_or_reused and response_bytes - len(response) >= length
    if closed_or_reused:
        return True
    # Until the close: a FIN from the server is the end even before the connection is released on this side.
    return not cut and bool(flags & _PEER_CLOSED) and exchange.role != _SERVER and end in (_OPEN, _QUIET)


def failure(role: int, end: int, flags: int) -> tuple[str, str | bool]:
    """Return the pair that says why the response of a final record is not whole: error.type, if it failed.

    A client that sends its next request on the connection does not think that the response failed (RFC 9112 section
    9.3.2): it pipelines, and the rest was on its way then.
    """
    if end == _NEXT:
        return OVERLAPPED
    if end == _TIMED_OUT:
        reason = "timeout"
    elif role == _SERVER:
        reason = "client_disconnect" if end == _RESET or flags & _PEER_CLOSED else "incomplete_response"
    elif end == _RESET:
        reason = "connection_reset"
    elif flags & _PEER_CLOSED:
        reason = "incomplete_response"
    else:
        reason = "client_disconnect"
    return _FAILURES[reason]
