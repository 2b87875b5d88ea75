"""The request of HTTP/1 that asks for HTTP/2, and is stream 1 when it is granted (RFC 7540 section 3.2).

In: the exchange, as the kernel has it when the response, 101, switches. Out: what HTTP/2 makes of the request's fields,
its body, and the client's settings. Never happens: an exception other than ``ProtocolError``.
"""

from __future__ import annotations

import base64
import binascii
from copy import copy
from typing import NamedTuple

from agent.errors import ProtocolError
from agent.model import AttributeGroup, Exchange, Flag
from agent.protocols import http1_syntax as syntax
from agent.protocols.http1 import HEAD_TRUNCATED, request_lines
from agent.protocols.http2 import Asked, Http2
from agent.protocols.http2_frames import UNKNOWN_AMOUNT
from agent.protocols.http_semantics import Fields, merge

_TLS = int(Flag.TLS)


class Upgrade(NamedTuple):
    """``body_bytes`` is UNKNOWN_AMOUNT when the body's size is not known; ``settings``, the payload of the frame that
    the client would have sent, is None when it could not be read.
    """

    asked: Asked
    body_bytes: int
    settings: bytes | None


def read_upgrade(protocol: Http2, exchange: Exchange) -> Upgrade:
    """Raises ProtocolError for what is no request: the reasons of ``Http1.parse`` and ``Http2.read_request``."""
    lines, head_bytes = request_lines(exchange.request, exchange.flags, exchange.response)
    method, target, _ = syntax.read_request_line(lines.pop(0))
    found = [field for field in map(syntax.read_field, lines) if field is not None]
    scheme, authority, path = _split(target)
    pseudo = [
        (b":method", method),
        (b":scheme", scheme or (b"https" if exchange.flags & _TLS else b"http")),
        (b":path", path),
    ]
    if authority:  # else Host is read
        pseudo.append((b":authority", authority))
    asked = protocol.read_request([*pseudo, *found], exchange.role, exchange.remote_address, exchange.remote_port)
    if asked is None:  # there is a method
        raise ProtocolError("malformed")
    if not head_bytes:
        request = copy(asked[0])
        request.attributes = AttributeGroup((*request.attributes, *HEAD_TRUNCATED))
        asked = (request, *asked[1:])
    fields = merge(found)
    body_bytes = _body_bytes(fields, exchange.request_bytes - head_bytes) if head_bytes else UNKNOWN_AMOUNT
    return Upgrade(asked, body_bytes, _read_settings(syntax.first(fields.get(b"http2-settings"))))


def _split(target: bytes) -> tuple[bytes, bytes, bytes]:
    """Return scheme, authority and path of a request's target; only the absolute form has the first two."""
    scheme, separator, rest = target.partition(b"://")
    if target.startswith((b"/", b"*")) or not separator:
        return b"", b"", target
    end = min((position for position in map(rest.find, (b"/", b"?", b"#")) if position >= 0), default=len(rest))
    path = rest[end:]
    # Without user information, which :authority must not have (RFC 9113 section 8.3.1).
    return scheme, rest[:end].rpartition(b"@")[2], path if path.startswith(b"/") else b"/" + path


def _body_bytes(fields: Fields, seen_bytes: int) -> int:
    framing, length = syntax.read_framing(fields)
    if framing is syntax.Framing.NONE:
        return 0
    return length if framing is syntax.Framing.LENGTH and seen_bytes >= length else UNKNOWN_AMOUNT


def _read_settings(value: bytes | None) -> bytes | None:
    """Decode HTTP2-Settings: base64 with the alphabet for URLs, and without padding (RFC 7540 section 3.2.1)."""
    if value is None:
        return None
    try:
        payload = base64.b64decode(value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return payload if len(payload) % 6 == 0 else None
