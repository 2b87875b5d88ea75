"""gRPC-Web over HTTP/1: the call of an HTTP exchange -> that of gRPC which it carried (grpc/doc/PROTOCOL-WEB.md).

In: the record of an exchange, and the ``Call`` that it is as HTTP. Out: a ``Call`` with the attributes that gRPC over
HTTP/2 has. Never happens: an exception; a message's content looked at; a status that was not seen or does not follow
from what was seen.

The status is in the headers of a response without a body, else in the last frame of the body, which is rarely captured:
where it is not, the last eight bytes and the lengths of the frames may tell.
"""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Any

from agent.model import Attributes, Call, Exchange, Flag, Role
from agent.protocols import grpc
from agent.protocols import http1_syntax as syntax
from agent.protocols.http_semantics import PEER_NAMES

MARK = b"application/grpc-web"
"""What every request of gRPC-Web has in its head. Looking for it in each POST costs less than reading a field more."""

_SERVER = int(Role.SERVER)
_TAIL_VALID = int(Flag.TAIL_VALID)
_CONTENT_TYPE = re.compile(rb"\ncontent-type:[ \t]*application/grpc-web(-text)?[+; \t\r\n]", re.IGNORECASE)
_CHUNKED = re.compile(rb"\ntransfer-encoding:[ \t]*chunked[ \t]*\r?\n", re.IGNORECASE)
_CODED = re.compile(rb"\ncontent-encoding:", re.IGNORECASE)
_STATUS = re.compile(rb"(?:^|\n)grpc-status:[ \t]*([!-~]*)[ \t]*\r?\n", re.IGNORECASE)
_TIMEOUT = re.compile(rb"\ngrpc-timeout:[ \t]*([0-9A-Za-z]*)[ \t]*\r?\n", re.IGNORECASE)
_STATUS_TAIL = re.compile(rb"([a-z\-]*): ?([0-9]{1,2})\r\n", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\n]*)?\r?\n")
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{2}(?:[A-Za-z0-9+/]{2}|[A-Za-z0-9+/]=|==))*")

_PREFIX_BYTES = 5
_TRAILERS = 0x80
_LEAST_TRAILERS_BYTES = len("grpc-status:0\r\n")
_TAIL_BYTES = 8
_KEPT = frozenset(
    (
        "server.address",
        "server.port",
        "client.address",
        "network.peer.address",
        "network.peer.port",
        "spanloom.request.head_truncated",
        "spanloom.response.overlapped",
        *PEER_NAMES,
    )
)
"""Attributes that a call of gRPC has in common with one of HTTP."""
_METADATA = (
    ("http.request.header.", "rpc.request.metadata."),
    ("http.response.header.", "rpc.response.metadata."),
)


def as_call(http: Call, exchange: Exchange, request_head_bytes: int, response_head_bytes: int) -> Call:
    """Return the call of gRPC-Web that an exchange is, or ``http`` when it is none.

    ``request_head_bytes`` and ``response_head_bytes``: up to the end of each head, 0 when that was not captured.
    """
    head = exchange.request[: request_head_bytes or None]
    content_type = _CONTENT_TYPE.search(head)
    if content_type is None:
        return http
    attributes = dict(http.all_attributes())
    http_status = attributes.get("http.response.status_code", 0)
    error = attributes.get("error.type", "")
    asked = _read_request(exchange, head, request_head_bytes, attributes, content_type[1] is not None)
    answered, status = _read_response(http, exchange, response_head_bytes, attributes)
    is_inferred = not status and error == "client_disconnect"
    if is_inferred:
        timeout = _TIMEOUT.search(head)
        timeout_ns = grpc.read_timeout_ns(timeout[1]) if timeout is not None else 0
        has_expired = grpc.has_expired(timeout_ns, exchange.end_ns - exchange.request_start_ns)
        status = "DEADLINE_EXCEEDED" if has_expired else "CANCELLED"

    path = _path(exchange.request)
    method = grpc.read_method(path)
    if exchange.role == _SERVER and status == "UNIMPLEMENTED":
        method = ""  # the name may be anything then
    pairs: list[tuple[str, Any]] = [("rpc.system.name", "grpc"), ("rpc.method", method or grpc.OTHER)]
    if not method:
        pairs.append(("rpc.method_original", grpc.display(path)))
    pairs += _kept(attributes)
    is_bad = http.error
    if status:
        pairs.append(("rpc.response.status_code", status))
        if status in grpc.SERVER_ERRORS if exchange.role == _SERVER else status != "OK":
            is_bad, error = True, status
        elif is_inferred or error == str(http_status):
            is_bad = False  # else what cut short a response that said its status stays its error
    if is_bad:
        pairs.append(("error.type", error))
    if http_status not in (0, 200):
        pairs.append(("http.response.status_code", http_status))
    if asked is not None:
        pairs.append(("spanloom.rpc.request.messages", asked))
    if answered is not None:
        pairs.append(("spanloom.rpc.response.messages", answered))
    return Call(
        method or "grpc",
        tuple(pairs),
        is_bad,
        http.context,
        http.other_contexts,
        http.request_id,
        http.complete,
        http.groups,
        http.decision,
    )


def _path(request: bytes) -> str:
    """The path of a request line that was read before."""
    method, _, rest = request.lstrip(b"\r\n").partition(b" ")
    return syntax.read_target(method, rest.split(None, 1)[0])[2]


def _kept(attributes: dict[str, Any]) -> Attributes:
    pairs = []
    for key, value in attributes.items():
        if key in _KEPT:
            pairs.append((key, value))
        for prefix, metadata in _METADATA:
            if key.startswith(prefix):
                pairs.append((metadata + key[len(prefix) :], value))
    return tuple(pairs)


def _read_request(
    exchange: Exchange, head: bytes, head_bytes: int, attributes: dict[str, Any], is_text: bool
) -> int | None:
    """Return the number of messages of a request, None when it is not known."""
    size = attributes.get("http.request.body.size")
    is_captured = exchange.request_bytes == len(exchange.request)
    body = _body(exchange.request, head, head_bytes, size, is_captured, is_text) if head_bytes else None
    return _read_frames(*body, b"")[0] if body is not None else None


def _read_response(
    http: Call, exchange: Exchange, head_bytes: int, attributes: dict[str, Any]
) -> tuple[int | None, str]:
    """Return the number of messages of a response, None when it is not known, and the name of its status, or ""."""
    response = exchange.response
    head = response[: head_bytes or None]
    in_head = _STATUS.search(head)
    status = grpc.read_status(in_head[1]) if in_head is not None else ""
    if not head_bytes:
        return None, status
    content_type = _CONTENT_TYPE.search(head)
    if content_type is None:
        # A failure of a proxy is what the client makes of the HTTP status. But a 200 may be a server's that takes the
        # type from Accept, as sonora does.
        http_status = int(attributes.get("http.response.status_code", 0))
        return None, status or (grpc.status_of_http(http_status) if http_status != 200 else "")
    if not http.complete:
        return None, status
    size = attributes.get("http.response.body.size")
    is_captured = exchange.response_bytes == len(response)
    body = _body(response, head, head_bytes, size, is_captured, content_type[1] is not None)
    if body is None:
        return None, status
    is_tail = exchange.flags & _TAIL_VALID and size is not None and exchange.response_bytes == head_bytes + size
    messages, in_body = _read_frames(*body, exchange.tail if is_tail else b"")
    return messages, status or in_body


def _body(
    message: bytes, head: bytes, head_bytes: int, size: int | None, is_captured: bool, is_text: bool
) -> tuple[bytes, int] | None:
    """Return what is captured of a body without its codings, and how long it is; None when that cannot be told.

    ``size`` is the body's, None when it is not known, as that of a chunked one.
    """
    if _CODED.search(head) is not None:
        return None
    if size is not None:
        body = message[head_bytes : head_bytes + size]
    elif is_captured and _CHUNKED.search(head) is not None:
        chunked = _without_chunks(message[head_bytes:])
        if chunked is None:
            return None
        body, size = chunked, len(chunked)
    else:
        return None
    if not is_text:
        return body, size
    if len(body) < size or len(body) % 4 or _BASE64.fullmatch(body) is None:
        return None
    # Each piece may have been encoded, and padded, by itself.
    decoded = b"".join(b64decode(body[position : position + 4]) for position in range(0, len(body), 4))
    return decoded, len(decoded)


def _without_chunks(body: bytes) -> bytes | None:
    """Return the data of a chunked body that is whole, None when it is malformed (RFC 9112 section 7.1)."""
    pieces = []
    position = 0
    while (line := _CHUNK_SIZE.match(body, position)) is not None:
        size = int(line[1], 16)
        if not size:
            return b"".join(pieces)
        position = line.end() + size
        pieces.append(body[line.end() : position])
        position += 2 if body[position : position + 2] == b"\r\n" else 1
    return None


def _read_frames(body: bytes, size: int, tail: bytes) -> tuple[int | None, str]:
    """Walk over the frames of a body of ``size`` bytes that begins with ``body`` and ends with ``tail``.

    Returns the number of messages, None when it cannot be told, and the status in the trailers, or "".
    """
    position = messages = 0
    while position + _PREFIX_BYTES <= len(body):
        flags = body[position]
        start = position + _PREFIX_BYTES
        end = start + int.from_bytes(body[position + 1 : start], "big")
        if end > size:
            return None, ""
        if flags == _TRAILERS:
            if end != size:
                return None, ""
            return messages, _read_trailers(body[start:]) if end <= len(body) else _read_tail(end - start, tail)
        if flags > 1:  # no frame, or compressed trailers
            return None, ""
        messages += 1
        position = end
    rest = size - position
    if not rest:
        return messages, ""
    if rest < 2 * _PREFIX_BYTES + _LEAST_TRAILERS_BYTES:
        # No room for a message beside the trailers.
        status = _read_tail(rest - _PREFIX_BYTES, tail)
        return (messages if status else None), status
    return None, ""


def _read_trailers(block: bytes) -> str:
    found = _STATUS.search(block + b"\n")  # the last line may go without its end
    return grpc.read_status(found[1]) if found is not None else ""


def _read_tail(block_bytes: int, tail: bytes) -> str:
    """Return the status in trailers of which only the last bytes are known, when nothing else can be there.

    Trailers have a line for grpc-status. Were the last line another one, there would have to be room for both.
    """
    if not _LEAST_TRAILERS_BYTES <= block_bytes < _LEAST_TRAILERS_BYTES + _TAIL_BYTES or len(tail) != _TAIL_BYTES:
        return ""
    line = _STATUS_TAIL.fullmatch(tail)
    return grpc.read_status(line[2]) if line is not None and b"grpc-status".endswith(line[1].lower()) else ""
