"""gRPC over HTTP/2: what its headers, trailers and message prefixes mean (grpc/doc/PROTOCOL-HTTP2.md).

In: values of header fields, bytes of DATA frames. Out: status names, message counts, the name of a method. Never
happens: state beyond one call's, an exception, a message's content looked at.
"""

from __future__ import annotations

import re

from agent.protocols import http1_syntax as syntax

OTHER = "_OTHER"
"""Semantic conventions, rpc.method: what the server does not know, or no method name at all."""

_CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
_STATUS_OF_FIELD = {b"%d" % code: name for code, name in enumerate(_CODES)}
SERVER_ERRORS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""Codes with which a server's span is an error; a client's is with every one but OK."""

# grpc/doc/http-grpc-status-mapping.md: for a response without grpc-status, which then comes from a proxy.
_STATUS_OF_HTTP = {
    400: "INTERNAL",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
# PROTOCOL-HTTP2.md, "Errors": HTTP/2 error codes that mean something else than INTERNAL.
_STATUS_OF_ERROR = {
    "REFUSED_STREAM": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "ENHANCE_YOUR_CALM": "RESOURCE_EXHAUSTED",
    "INADEQUATE_SECURITY": "PERMISSION_DENIED",
}

_METHOD = re.compile(r"/([A-Za-z_][A-Za-z0-9_.\-]{0,255}/[A-Za-z_][A-Za-z0-9_\-]{0,255})")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_NS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 1000, b"n": 1}
_PREFIX_BYTES = 5


def is_grpc(content_type: bytes) -> bool:
    """Whether a request or response with this content-type is gRPC, and not gRPC-Web, whose status is in its body."""
    return content_type[:16] == b"application/grpc" and content_type[16:17] in (b"", b"+", b";", b" ")


def read_method(path: str) -> str:
    """Return ``package.Service/Method``, or "" for a path of another form."""
    match = _METHOD.fullmatch(path)
    return match[1] if match is not None else ""


def read_status(value: bytes) -> str:
    """Return the name of a grpc-status; what is no known code counts as UNKNOWN (statuscodes.md)."""
    return _STATUS_OF_FIELD.get(value) or "UNKNOWN"


def status_of_http(status: int) -> str:
    """Return what a client makes of an HTTP status that came without grpc-status."""
    return _STATUS_OF_HTTP.get(status, "UNKNOWN")


def status_of_error(error: str) -> str:
    """Return what an HTTP/2 error code, by its name, means for a call that it ended."""
    return _STATUS_OF_ERROR.get(error, "INTERNAL")


def read_timeout_ns(value: bytes | None) -> int:
    """Return grpc-timeout in nanoseconds, 0 when it is absent or malformed."""
    match = _TIMEOUT.fullmatch(value) if value is not None else None
    return int(match[1]) * _UNIT_NS[match[2]] if match is not None else 0


def has_expired(timeout_ns: int, elapsed_ns: int) -> bool:
    """Whether a cancelled call was cancelled by its deadline.

    Senders round grpc-timeout up to three digits, so that a call may end by its deadline a little earlier than it says.
    """
    return 0 < timeout_ns * 98 <= elapsed_ns * 100


def display(path: str) -> str:
    """Return what was asked for where it is no method's name: rpc.method_original."""
    return syntax.text(path.removeprefix("/").encode("utf-8", "replace"))


class MessageCounter:
    """Counts the length-prefixed messages of one direction of a call; ``count`` is None once it cannot be known."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self) -> None:
        self.count: int | None = 0
        self._left = 0  # bytes of the message at hand that are still to come
        self._prefix = b""

    def feed(self, data: bytes, start: int, stop: int) -> None:
        """Consume ``data[start:stop]``."""
        if self.count is None:
            return
        while start < stop:
            if self._left:
                step = min(self._left, stop - start)
                self._left -= step
                start += step
                if not self._left:
                    self.count += 1
                continue
            step = min(_PREFIX_BYTES - len(self._prefix), stop - start)
            prefix = self._prefix + data[start : start + step]
            start += step
            if len(prefix) < _PREFIX_BYTES:
                self._prefix = prefix
                return
            self._prefix = b""
            if prefix[0] > 1:  # neither plain nor compressed: no message begins here
                self.count = None
                return
            self._left = int.from_bytes(prefix[1:], "big")
            if not self._left:
                self.count += 1

    def skip(self, gap_bytes: int) -> None:
        """Consume bytes that were not captured: harmless inside a message."""
        if self.count is None:
            return
        if not 0 <= gap_bytes <= self._left:
            self.count = None
        elif gap_bytes:
            self._left -= gap_bytes
            if not self._left:
                self.count += 1
