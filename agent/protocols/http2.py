"""HTTP/2 and gRPC: the decoded fields of a stream -> what was asked and answered (sans-IO).

In: fields of header blocks, what is unknown in them as None, and what became of the stream. Out: a ``Call`` whose
attributes follow the stable HTTP semantic conventions, or for gRPC those of RPC. Never happens: a header that was not
asked for leaves this module, an exception other than ``ProtocolError`` is raised, an unknown field is guessed at.

Fields repeat from request to request as the same objects, since they stand in HPACK's tables: everything that is made
of them is remembered by them. Every memo is bounded and emptied when full.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from agent.errors import ProtocolError
from agent.model import AttributeGroup, Attributes, Call, Exchange, Role, Segment, TraceContext
from agent.protocols import grpc, tls
from agent.protocols import http1_syntax as syntax
from agent.protocols.http1_memo import Memo
from agent.protocols.http1_outcome import CONNECT, HEAD
from agent.protocols.http_semantics import (
    REQUEST_ID_BYTES,
    Extractor,
    Fields,
    HttpProtocol,
    Target,
    captured,
    captures,
    merge,
)

if TYPE_CHECKING:
    from agent.protocols.http2_headers import Field, HuffmanMemo

MEMO_REQUESTS = 4096
MEMO_FIELDS_BYTES = 1024
"""Requests and responses with longer fields of interest are read each time: at most about 8 MB per role."""
MEMO_ANSWERS = 1024
MEMO_ENDINGS = 4096
VERSION = "2"

_SERVER = int(Role.SERVER)
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
_PATH = re.compile(rb"[!-~\x80-\xff]+")
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]{0,15}")
_STATUS = re.compile(rb"[1-9][0-9][0-9]")
_BODILESS = frozenset((204, 304))

_FIXED, _CONTEXT, _TIMEOUT = 1, 2, 3
"""What a field is to a request: part of what repeats, of its trace context, or its deadline."""


class Rpc:
    """What a request is as a call of gRPC."""

    __slots__ = ("attributes", "name", "unknown_attributes")

    def __init__(self, name: str, attributes: AttributeGroup, unknown_attributes: AttributeGroup) -> None:
        self.name = name
        self.attributes = attributes
        self.unknown_attributes = unknown_attributes  # when the server says that it has no such method


class Request:
    """What the repeating fields of a request say. ``rpc`` is not None when it is gRPC, or may be."""

    __slots__ = ("attributes", "is_forwarded", "is_named", "is_rpc", "meaning", "name", "rpc")

    def __init__(
        self,
        name: str,
        attributes: AttributeGroup,
        meaning: int,
        *,
        is_rpc: bool,
        rpc: Rpc | None,
        is_forwarded: bool,
        is_named: bool,
    ) -> None:
        self.name = name
        self.attributes = attributes
        self.meaning = meaning
        self.is_rpc = is_rpc
        self.rpc = rpc
        self.is_forwarded = is_forwarded  # client.address is from a header
        self.is_named = is_named  # nothing of it is from the connection


class Answer:
    """What a response's header block, or its trailers, say. ``status`` is 0 when it is absent or unknown."""

    __slots__ = ("attributes", "is_bad", "is_partial", "is_rpc", "metadata", "rpc_status", "status")

    def __init__(
        self, fields: Sequence[Field], attributes: Attributes, metadata: Attributes, *, is_server: bool
    ) -> None:
        values = dict(fields)
        status = values.get(b":status") or b""
        self.status = int(status) if _STATUS.fullmatch(status) else 0
        self.is_bad = self.status >= (500 if is_server else 400)
        self.is_partial = None in values  # some fields are unknown
        rpc_status = values.get(b"grpc-status")
        self.rpc_status = grpc.read_status(rpc_status) if rpc_status is not None else ""
        self.is_rpc = bool(self.rpc_status) or grpc.is_grpc(values.get(b"content-type") or b"")
        if self.status:
            pairs: Attributes = (("http.response.status_code", self.status),)
            if self.is_bad:
                pairs += (("error.type", str(self.status)),)
            attributes = pairs + attributes
        self.attributes = attributes
        self.metadata = metadata


Asked = tuple[Request, TraceContext | None, tuple[TraceContext, ...], str, bool | None, int]
"""The request, its trace contexts, x-request-id, what it says about sampling, and grpc-timeout in nanoseconds."""


class Http2(HttpProtocol):
    """Reads the fields of HTTP/2 streams; keeps nothing of a stream but memos of repeated text."""

    name = "http2"

    def __init__(self, *, extractor: Extractor, **settings: Any) -> None:
        """Take the settings of ``HttpProtocol``. Raises ConfigError for a malformed route pattern."""
        super().__init__(extractor=extractor, **settings)
        strip = len("http.request.header.")
        self._request_metadata = captures(
            "rpc.request.metadata.", (name[strip:] for name in self._request_captures.values())
        )
        strip = len("http.response.header.")
        self._response_metadata = captures(
            "rpc.response.metadata.", (name[strip:] for name in self._response_captures.values())
        )
        self._context_of = extractor.context_behind_version
        unique = frozenset((*extractor.header_names, b"x-request-id"))
        read = (b":method", b":scheme", b":authority", b":path", b":protocol", b"host", b"user-agent", b"content-type")
        self._request_kinds: dict[bytes | None, int] = {
            **dict.fromkeys((None, *read, b"forwarded", b"x-forwarded-for", *self._request_captures), _FIXED),
            b"grpc-timeout": _TIMEOUT,
            **dict.fromkeys(unique, _CONTEXT),
        }
        # A header that is captured and read as well: what is made of the request depends on it.
        self._captured_context = unique & self._request_captures.keys()
        self._response_names = frozenset((None, b":status", b"content-type", b"grpc-status", *self._response_captures))
        self._unique_names = unique | {b"grpc-timeout"}
        self._requests: tuple[dict[tuple[Field, ...], Request], ...] = ({}, {})
        self._answers: tuple[dict[tuple[Field, ...], Answer], ...] = ({}, {})
        self._endings = Memo(_ending, MEMO_ENDINGS)
        self._rpc_endings = Memo(_rpc_ending, MEMO_ENDINGS)

    @cached_property
    def huffman(self) -> HuffmanMemo:
        """Decoded strings, for the header decoders of all connections."""
        # The tables of HPACK take 3 MB: only where there is HTTP/2.
        from agent.protocols.http2_headers import HuffmanMemo

        return HuffmanMemo(self._unique_names)

    def read_request(self, fields: Sequence[Field], role: int, address: bytes, port: int) -> Asked | None:
        """Return what a request's header block says; None when it is none, but the trailers of one.

        Raises ProtocolError: header_unknown (the method or the path is), malformed.
        """
        kinds = self._request_kinds
        fixed, context_fields = [], []
        timeout = None
        for field in fields:
            kind = kinds.get(field[0])
            if kind == _FIXED:
                fixed.append(field)
            elif kind == _CONTEXT:
                context_fields.append(field)
            elif kind:
                timeout = field[1]
        if self._captured_context:
            fixed += [field for field in context_fields if field[0] in self._captured_context]
        key = tuple(fixed)
        requests = self._requests[role == _SERVER]
        request = requests.get(key)
        if request is None:
            request = self._read_request(fixed, role, address, port)
            if request is None:
                return None
            if request.is_named and _is_memorable(key):
                if len(requests) >= MEMO_REQUESTS:
                    requests.clear()
                requests[key] = request
        timeout_ns = grpc.read_timeout_ns(timeout) if timeout is not None else 0
        if not context_fields:
            return request, None, (), "", None, timeout_ns
        if len(context_fields) == 1:
            name, value = context_fields[0]
            if name == b"traceparent" and value is not None and len(value) == 55 and value[:3] == b"00-":
                context = self._context_of(value[3:], "")
                if context is not None:
                    return request, context, (), "", None, timeout_ns
        headers = merge(context_fields)
        known_id = headers.pop(b"x-request-id", None)
        request_id = syntax.text(syntax.first(known_id)[:REQUEST_ID_BYTES]) if known_id is not None else ""
        context, others, decision = None, (), None
        if headers:
            context, others = self._extract(headers)
            if context is None:
                decision = self._decision(headers)
        return request, context, others, request_id, decision, timeout_ns

    def _read_request(self, found: list[Field], role: int, address: bytes, port: int) -> Request | None:
        known = [field for field in found if field[0] is not None]
        unknown = len(known) < len(found)
        fields: Fields = merge(known)
        pseudo = {name: fields.pop(name) for name in [*fields] if name[:1] == b":"}
        if not pseudo and not unknown:
            return None
        if any(isinstance(value, list) for value in pseudo.values()):
            raise ProtocolError("malformed")
        method, path, authority = pseudo.get(b":method"), pseudo.get(b":path"), pseudo.get(b":authority")
        is_connect = method == b"CONNECT" and path is None and b":protocol" not in pseudo
        if method is None or (authority if is_connect else path) is None:
            raise ProtocolError("header_unknown" if unknown else "malformed")
        host = authority if authority is not None else syntax.first(fields.get(b"host"))
        scheme = pseudo.get(b":scheme")
        target = _read_target(method, scheme, authority if is_connect else path, is_connect)
        fields.pop(b"host", None)

        _, client, peer_address = self._addresses[address]
        is_named = True
        if role == _SERVER:
            attributes, name = self._server_attributes(method, target, host, VERSION)
        else:
            attributes, name, is_named = self._client_attributes(method, target, host, VERSION, peer_address, port)
        if unknown:
            attributes = self._without_unknown(attributes, scheme, host)
        agent = syntax.first(fields.pop(b"user-agent", None))
        own: Attributes = (("user_agent.original", syntax.text(agent)),) if agent is not None else ()
        forwarded = ""
        if role == _SERVER and client:
            forwarded = syntax.read_forwarded(
                syntax.first(fields.get(b"forwarded")), syntax.first(fields.get(b"x-forwarded-for"))
            )
        forwarded_for: Attributes = (("client.address", forwarded),) if forwarded else ()
        content_type = syntax.first(fields.get(b"content-type"))
        is_rpc = content_type is not None and grpc.is_grpc(content_type)
        rpc = None
        if is_rpc or (unknown and content_type is None and method == b"POST"):
            rpc = self._rpc(target[2], attributes, forwarded_for, fields)
        headers = captured(self._request_captures, fields, self._redactor) if self._request_captures else ()
        return Request(
            name,
            AttributeGroup((*attributes, *own, *forwarded_for, *headers)),
            CONNECT if method == b"CONNECT" else HEAD if method == b"HEAD" else 0,
            is_rpc=is_rpc,
            rpc=rpc,
            is_forwarded=bool(forwarded),
            is_named=is_named,
        )

    def _without_unknown(self, attributes: Attributes, scheme: bytes | None, host: bytes | None) -> Attributes:
        """Leave out what would be made up where the scheme or the authority may be among the unknown fields."""
        left_out: set[str] = set()
        if scheme is None:
            left_out |= {"url.scheme", "url.full"}
            server = self._hosts[host][0] if host is not None else None
            if server is not None and server[1] is None:
                left_out.add("server.port")
        if host is None:
            left_out.add("url.full")
        return tuple(pair for pair in attributes if pair[0] not in left_out)

    def _rpc(self, path: str, attributes: Attributes, forwarded_for: Attributes, fields: Fields) -> Rpc:
        server = tuple(pair for pair in attributes if pair[0] in ("server.address", "server.port"))
        metadata = captured(self._request_metadata, fields, self._redactor) if self._request_metadata else ()
        rest = (*server, *forwarded_for, *metadata)
        system = ("rpc.system.name", "grpc")
        unknown = (system, ("rpc.method", grpc.OTHER), ("rpc.method_original", grpc.display(path)))
        method = grpc.read_method(path)
        known = (system, ("rpc.method", method)) if method else unknown
        return Rpc(method or "grpc", AttributeGroup((*known, *rest)), AttributeGroup((*unknown, *rest)))

    def read_answer(self, fields: Sequence[Field], role: int) -> Answer:
        """Return what a response's header block or trailers say. Never raises: a bad status counts as unknown."""
        names = self._response_names
        key = tuple([field for field in fields if field[0] in names])
        answers = self._answers[role == _SERVER]
        answer = answers.get(key)
        if answer is None:
            attributes: Attributes = ()
            metadata: Attributes = ()
            if self._response_captures:
                merged = merge([field for field in key if field[0] is not None])
                attributes = captured(self._response_captures, merged, self._redactor)
                metadata = captured(self._response_metadata, merged, self._redactor)
            answer = Answer(key, attributes, metadata, is_server=role == _SERVER)
            if _is_memorable(key):
                if len(answers) >= MEMO_ANSWERS:
                    answers.clear()
                answers[key] = answer
        return answer

    def is_rpc(self, request: Request, answer: Answer | None, trailers: Answer | None) -> bool:
        """Whether the stream is a call of gRPC. A request whose content-type is unknown is what its response says."""
        if request.is_rpc or request.rpc is None:
            return request.is_rpc
        return (answer is not None and answer.is_rpc) or (trailers is not None and bool(trailers.rpc_status))

    def http_call(
        self,
        asked: Asked,
        segment: Segment | Exchange,
        answer: Answer | None,
        cause: str,
        sizes: tuple[int, int],
    ) -> Call:
        """Put the call of a plain HTTP exchange together. ``cause``: why its response is not whole, "" when it is.

        ``segment``: one of the connection, or the exchange that it began with. ``sizes``: bytes of the bodies of the
        request and the response, below 0 when that is not known.
        """
        request, context, others, request_id, decision, _ = asked
        ending, is_bad = self._endings[answer, request.meaning, not cause, sizes]
        attributes: Attributes = ()
        if cause and not is_bad:
            attributes = (("error.type", cause),)
            is_bad = True
        groups = self._groups(request, request.attributes, segment, ending)
        return Call(request.name, attributes, is_bad, context, others, request_id, not cause, groups, decision)

    def rpc_call(
        self,
        asked: Asked,
        segment: Segment | Exchange,
        answers: tuple[Answer | None, Answer | None],
        cause: str,
        status: str,
        messages: tuple[int | None, int | None],
    ) -> Call:
        """Like http_call for gRPC: ``status`` is the name of its code, "" when it is not known.

        ``answers``: the response's header block and its trailers. ``messages``: those of the request and the response.
        """
        request, context, others, request_id, decision, _ = asked
        rpc, role = request.rpc, segment.role
        assert rpc is not None
        ending, is_bad = self._rpc_endings[answers, role, cause, status, messages]
        is_unknown = status == "UNIMPLEMENTED" and role == _SERVER
        group = rpc.unknown_attributes if is_unknown else rpc.attributes
        groups = self._groups(request, group, segment, ending)
        name = "grpc" if is_unknown else rpc.name
        return Call(name, (), is_bad, context, others, request_id, not cause, groups, decision)

    def _groups(
        self, request: Request, attributes: AttributeGroup, segment: Segment | Exchange, ending: AttributeGroup
    ) -> tuple[AttributeGroup, ...]:
        if segment.role != _SERVER:
            peers = self._called_peers
        else:
            peers = self._peers if request.is_forwarded else self._client_peers
        peer = peers[segment.remote_address, segment.remote_port]
        if segment.tls:
            return attributes, peer, ending, tls.attributes_of(segment.tls)
        return attributes, peer, ending


def _read_target(method: bytes, scheme: bytes | None, path: bytes, is_connect: bool) -> Target:
    if _METHOD.fullmatch(method) is None or _PATH.fullmatch(path) is None:
        raise ProtocolError("malformed")
    if scheme is not None and _SCHEME.fullmatch(scheme) is None:
        raise ProtocolError("malformed")
    try:
        # With extended CONNECT (RFC 8441) the path is a path.
        _, _, shown_path, query = target = syntax.read_target(b"CONNECT" if is_connect else b"", path)
    except ProtocolError:
        raise ProtocolError("malformed") from None
    if is_connect:
        return (scheme.decode().lower() if scheme is not None else "", *target[1:])
    return scheme.decode().lower() if scheme is not None else "", "", shown_path, query


def _is_memorable(key: tuple[Field, ...]) -> bool:
    """Whether to remember what was made of these fields: not when they are long, or unknown and so hardly repeat."""
    size = 0
    for name, value in key:
        if name is None or value is None:
            return False
        size += len(name) + len(value)
    return size <= MEMO_FIELDS_BYTES


def _ending(key: tuple[Answer | None, int, bool, tuple[int, int]]) -> tuple[AttributeGroup, bool]:
    """Return what the end of an HTTP exchange says, and whether its status is an error."""
    answer, meaning, is_whole, (request_bytes, response_bytes) = key
    pairs: list[Any] = []
    if answer is not None:
        pairs += answer.attributes
        if is_whole and not meaning and answer.status not in _BODILESS and response_bytes >= 0:
            pairs.append(("http.response.body.size", response_bytes))
    if request_bytes > 0:
        pairs.append(("http.request.body.size", request_bytes))
    return AttributeGroup(pairs), answer is not None and answer.is_bad


def _rpc_ending(
    key: tuple[tuple[Answer | None, Answer | None], int, str, str, tuple[int | None, int | None]],
) -> tuple[AttributeGroup, bool]:
    """Return what the end of a call says, and whether it is an error by the conventions of gRPC."""
    (answer, trailers), role, cause, status, (asked, answered) = key
    pairs: list[Any] = []
    if status:
        pairs.append(("rpc.response.status_code", status))
        is_bad = status in grpc.SERVER_ERRORS if role == _SERVER else status != "OK"
        if is_bad:
            pairs.append(("error.type", status))
    else:
        is_bad = bool(cause)
        if is_bad:
            pairs.append(("error.type", cause))
    if answer is not None and answer.status not in (0, 200):
        pairs.append(("http.response.status_code", answer.status))
    metadata: dict[str, Any] = dict(answer.metadata) if answer is not None else {}
    if trailers is not None:
        metadata |= trailers.metadata
    pairs += metadata.items()
    if asked is not None:
        pairs.append(("spanloom.rpc.request.messages", asked))
    if answered is not None:
        pairs.append(("spanloom.rpc.response.messages", answered))
    return AttributeGroup(pairs), is_bad
