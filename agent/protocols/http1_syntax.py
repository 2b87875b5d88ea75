"""The grammar of HTTP/1 heads, shared by the record parser and the stream reader (RFC 9110, RFC 9112).

In: bytes of a head, a line or a value. Out: plain values. Never happens: state, caches, attributes; anything but
``ProtocolError`` raised for whatever bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum

from agent.errors import ProtocolError

_TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# RFC 9112 section 3. The method is bounded since it is exported; 0x80-0xff in the target is not allowed by the grammar
# but sent by real clients.
_REQUEST_LINE = re.compile(rb"(" + _TCHAR + rb"{1,32}) ([!-~\x80-\xff]+) HTTP/1\.([0-9])")
_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9][0-9])(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_STATUS_PREFIX = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9][0-9]) ")
_FIELD_NAME = re.compile(_TCHAR + rb"+")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
_BLANK_LINE = re.compile(rb"\n\r?\n")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,15})://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.DOTALL)
# RFC 3986 section 3.2.2 without user information; a zone is kept, it is part of the address.
_AUTHORITY = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45}(?:%[0-9A-Za-z._\-%]{1,32})?)\]|([^\[\]:@/?#\\,\s]{1,255}))(?::([0-9]{0,5}))?"
)
_FORWARDED_FOR = re.compile(r"""(?:^|;)[ \t]*for=(?:"([^"\\]*)"|([^";]*))[ \t]*(?=;|$)""", re.IGNORECASE)
# In brackets, bare IPv6 (two colons at least), or anything else; then a port.
_NODE = re.compile(
    r"\[([0-9A-Fa-f:.]{2,45})\](?::[0-9A-Za-z._\-]+)?"
    r"|([0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{0,40})"
    r"|([0-9A-Za-z._\-]{1,64})(?::[0-9A-Za-z._\-]+)?"
)


class Framing(IntEnum):
    """How a message says where its body ends (RFC 9112 section 6.3), before method and status have their say."""

    NONE = 0
    """Neither Content-Length nor Transfer-Encoding: no body (request), or until the close (response)."""
    LENGTH = 1
    CHUNKED = 2
    CHUNKED_TRAILERS = 3
    """Chunked, and the Trailer field announces trailers behind the last chunk."""
    UNKNOWN = 4
    """Content-Length is malformed or contradicts itself, or Transfer-Encoding does not end in chunked."""
    EMPTY = 5
    """The status allows no body: 1xx, 204, 304."""


def text(value: bytes) -> str:
    """Decode ``value`` as UTF-8 for export; what is malformed and every control character become U+FFFD."""
    decoded = value.decode("utf-8", "replace")
    return decoded if decoded.isprintable() else _CONTROLS.sub("\ufffd", decoded)


def find_head_end(data: bytes | bytearray, start: int = 0) -> int:
    """Return the offset behind the blank line that ends a head, or -1. Bare LF counts as a line end (section 2.2)."""
    match = _BLANK_LINE.search(data, start)
    return match.end() if match is not None else -1


def split_lines(head: bytes) -> list[bytes]:
    """Split complete lines, each ended by CRLF or LF; what follows the last line end is dropped, like blank lines."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in head.split(b"\n")[:-1]]
    return [line for line in lines if line]


def read_request_line(line: bytes) -> tuple[bytes, bytes, str]:
    """Return (method, target, version such as "1.1"). Raises ProtocolError: binary_head, bad_request_line."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError("binary_head" if _BINARY.search(line) else "bad_request_line")
    method, target, minor = match.groups()
    return method, target, "1." + minor.decode()


def read_status_line(line: bytes) -> int:
    """Return the status code, 100 to 999. Raises ProtocolError: bad_status_line."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError("bad_status_line")
    return int(match[1])


def read_status_prefix(data: bytes) -> int:
    """Return the status of a status line that has not ended yet, 0 while it is not known.

    Raises ProtocolError: bad_status_line when no status line can begin like this.
    """
    match = _STATUS_PREFIX.match(data)
    if match is not None:
        return int(match[1])
    if len(data) > 13 or not (data.startswith(b"HTTP/1.") or b"HTTP/1.".startswith(data)):
        raise ProtocolError("bad_status_line")
    return 0


def check_field_name(name: bytes) -> None:
    """Raise ProtocolError (binary_head, bad_header) when ``name`` is no field name (RFC 9110 section 5.1)."""
    if _FIELD_NAME.fullmatch(name) is None:
        raise ProtocolError("binary_head" if _BINARY.search(name) else "bad_header")


def read_field(line: bytes) -> tuple[bytes, bytes] | None:
    """Return (lower-case name, trimmed value), or None for an obs-fold continuation.

    Raises ProtocolError: binary_head, bad_header. White space before the colon is refused (RFC 9112 section 5.1).
    """
    if line[:1] in (b" ", b"\t"):
        return None
    name, colon, value = line.partition(b":")
    check_field_name(name)
    if not colon:
        raise ProtocolError("bad_header")
    return name.lower(), value.strip(b" \t")


def first(value: bytes | list[bytes] | None) -> bytes | None:
    """Return the first value of a field that may have come more than once."""
    return value[0] if isinstance(value, list) else value


def read_framing(fields: Mapping[bytes, bytes | list[bytes]]) -> tuple[Framing, int]:
    """Return (framing, Content-Length or 0). Transfer-Encoding wins over Content-Length (RFC 9112 section 6.3)."""
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        last = coding[-1] if isinstance(coding, list) else coding
        if last.rpartition(b",")[2].strip(b" \t").lower() != b"chunked":
            return Framing.UNKNOWN, 0
        return (Framing.CHUNKED_TRAILERS if b"trailer" in fields else Framing.CHUNKED), 0
    length = fields.get(b"content-length")
    if length is None:
        return Framing.NONE, 0
    if isinstance(length, bytes) and length.isdigit() and len(length) <= 18:
        return Framing.LENGTH, int(length)
    joined = b",".join(length) if isinstance(length, list) else length
    # "5, 5" is one length; anything else that is not one number is not to be trusted. 18 digits stay below 2**63.
    values = {part.strip(b" \t") for part in joined.split(b",")}
    value = values.pop()
    if values or not value.isdigit() or len(value) > 18:
        return Framing.UNKNOWN, 0
    return Framing.LENGTH, int(value)


def read_authority(authority: str) -> tuple[str, int | None] | None:
    """Return (host without brackets, port or None) of ``host[:port]``, or None when it is none.

    User information is not accepted: strip it first where it is allowed.
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return None
    port = int(match[3]) if match[3] else None
    if port is not None and port > 65535:
        return None
    return match[1] or match[2], port


def read_target(method: bytes, target: bytes) -> tuple[str, str, str, str]:
    """Return (scheme, authority, path, query) of a request target (RFC 9112 section 3.2).

    Origin-form and asterisk-form have neither scheme nor authority; authority-form has only an authority. The authority
    may hold user information. A missing query is "", a fragment is dropped. Raises ProtocolError: bad_request_line.
    """
    decoded = text(target)
    if method == b"CONNECT":
        known = read_authority(decoded.rpartition("@")[2])
        if known is None or known[1] is None:
            raise ProtocolError("bad_request_line")
        return "", decoded, "", ""
    if decoded.startswith("/"):
        path, _, query = decoded.partition("#")[0].partition("?")
        return "", "", path, query
    if decoded == "*":
        return "", "", "*", ""
    match = _ABSOLUTE.fullmatch(decoded)
    if match is None:
        raise ProtocolError("bad_request_line")
    scheme, authority, path, query = match.groups()
    if read_authority(authority.rpartition("@")[2]) is None:
        raise ProtocolError("bad_request_line")
    return scheme.lower(), authority, path or "/", query or ""


def read_forwarded(forwarded: bytes | None, forwarded_for: bytes | None) -> str:
    """Return the client's address from the first element of Forwarded (RFC 7239), else of X-Forwarded-For, else "".

    A port is dropped; "unknown" and what is no address, host name or obfuscated identifier counts as absent.
    """
    if forwarded is not None:
        match = _FORWARDED_FOR.search(text(forwarded).partition(",")[0])
        if match is not None:
            node = _read_node(match[1] if match[1] is not None else match[2])
            if node:
                return node
    return _read_node(text(forwarded_for).partition(",")[0]) if forwarded_for is not None else ""


def _read_node(node: str) -> str:
    match = _NODE.fullmatch(node.strip())
    if match is None:
        return ""
    name = match[1] or match[2] or match[3]
    return "" if name.lower() == "unknown" else name
