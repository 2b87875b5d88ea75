"""HTTP/1.x: one kernel record of an exchange -> what was asked and answered (sans-IO).

In: an ``Exchange``. Out: a ``Call`` whose attributes follow the stable HTTP semantic conventions. Never happens: a
clock or a socket is read, a header that was not asked for leaves this module, an exception other than ``ProtocolError``
is raised, whatever the bytes and numbers are.

This is the hot path of the agent. Most lines of most heads repeat, so everything derived from a line is remembered by
the line's bytes, and the attributes of a call are put together from remembered pairs (encoders may cache by identity or
by value). Every memo is bounded and emptied when full, so hostile variety costs time, not memory.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from agent.errors import ProtocolError
from agent.model import AttributeGroup, Attributes, Call, End, Exchange, Flag, Role, TraceContext
from agent.protocols import grpc_web, tls
from agent.protocols import http1_syntax as syntax
from agent.protocols.http1_memo import MEMO_LINE_BYTES, LineMemo, Memo, UnusualLineEnd
from agent.protocols.http1_outcome import METHOD_MEANING, OVERLAPPED, failure, is_whole
from agent.protocols.http1_syntax import Framing
from agent.protocols.http_semantics import (
    PEER_NAMES,
    REQUEST_ID_BYTES,
    Extractor,
    Fields,
    HttpProtocol,
    Target,
    captured,
    merge,
)

MEMO_TARGETS = 4096
MEMO_TARGET_BYTES = 512
"""Longer request lines are read each time: at most about 6 MB per role."""
MEMO_HEADS = 1024
MEMO_HEAD_BYTES = 768
"""Longer response heads are read each time: at most about 1.5 MB per role."""

_SERVER = int(Role.SERVER)
_QUIET, _NEXT, _HANDED_OVER = int(End.QUIET), int(End.NEXT), int(End.HANDED_OVER)
_FOREIGN = int(Flag.FOREIGN)
_TLS = int(Flag.TLS)
_REQUEST_CUT = int(Flag.REQUEST_TRUNCATED | Flag.REQUEST_GAP)
_LENGTH, _UNKNOWN = Framing.LENGTH, Framing.UNKNOWN

_Target = tuple[Attributes, str, int]
"""Attributes that the request line and Host decide, the span name, and 0, or HEAD or CONNECT of http1_outcome."""
_Targets = dict[tuple[bytes, bytes | None], _Target]
"""By request line and Host."""
_Answer = tuple[int, Framing, int, Attributes, bool]
"""Status, framing, Content-Length, attributes (status, error.type, captured headers), whether the status is bad."""
_NO_ANSWER: _Answer = (0, _UNKNOWN, 0, (), False)
HEAD_TRUNCATED = (("spanloom.request.head_truncated", True),)
"""An attribute of a request whose head was cut at the capture limit."""
_WholeAnswer = tuple[int, AttributeGroup, bool]
"""Content-Length, attributes of a response that reached it, whether the status is bad."""
_Repeat = tuple[int, str, AttributeGroup, Memo, dict[bytes, _WholeAnswer], str]
"""Length and name, attributes of the request, the memo of peers and the answers that go with its role, tracestate."""
_TRACEPARENT = b"raceparent: 00-"  # as most send it, and as Go does: with a capital
_TRACEPARENT_BYTES = 52
"""What differs from request to request: trace id, parent id and flags behind the version."""


class Http1(HttpProtocol):
    """Parses records of HTTP/1.x exchanges; keeps nothing of an exchange but memos of repeated text."""

    name = "http1"

    def __init__(self, *, extractor: Extractor, **settings: Any) -> None:
        """Take the settings of ``HttpProtocol``. Raises ConfigError for a malformed route pattern."""
        super().__init__(extractor=extractor, **settings)
        self._malformed = extractor.malformed
        self._malformed_here: defaultdict[str, int] = defaultdict(int)  # of the record at hand

        read = {b"host", b"user-agent", b"content-length", b"transfer-encoding", b"forwarded", b"x-forwarded-for"}
        unique = {*extractor.header_names, b"x-request-id"}
        self._request_field = LineMemo({*read, *unique, *self._request_captures}, unique).__getitem__
        framing = (b"content-length", b"transfer-encoding", b"trailer")
        self._response_lines = LineMemo((*framing, *self._response_captures))
        self._response_field = self._response_lines.__getitem__
        self._server_targets: _Targets = {}
        self._client_targets: _Targets = {}
        self._tls_server_targets: _Targets = {}
        self._tls_client_targets: _Targets = {}
        self._server_answers: dict[bytes, _Answer] = {}
        self._client_answers: dict[bytes, _Answer] = {}
        self._agents = Memo(lambda value: (("user_agent.original", syntax.text(value)),), MEMO_TARGETS)
        self._statuses = Memo(syntax.read_status_line, MEMO_HEADS)
        self._repeats: dict[int, _Repeat] = {}
        self._whole_server_answers: dict[bytes, _WholeAnswer] = {}
        self._whole_client_answers: dict[bytes, _WholeAnswer] = {}
        self._context_of = extractor.context_behind_version
        # What is cut out of a request to see whether the rest repeats; a mark that no request holds cuts nothing.
        self._mark = _TRACEPARENT if b"traceparent" in extractor.header_names else b"\0\r\n\0"

    def parse(self, exchange: Exchange) -> Call:
        """Return the best knowledge of ``exchange``, provisional or final; as a call of gRPC where it is gRPC-Web.

        ``Call.complete``: the response is whole by RFC 9112 section 6.3; of a final record it is False exactly when
        ``error.type`` says what cut it short (or a status of gRPC does), or ``spanloom.response.overlapped`` that its
        end was not seen. Where the
        response head was cut at the capture limit and the length stays unknown, a provisional record is not complete,
        and a final one has the benefit of the doubt.

        Raises ProtocolError for what is not HTTP/1: no_request, incomplete_request, binary_head, bad_request_line,
        bad_header, bad_status_line, foreign_response (an exchange that ended, and was answered with other bytes only).
        """
        request = exchange.request
        before, mark, after = request.partition(self._mark)
        key = hash((before, after[_TRACEPARENT_BYTES:], exchange.role + (exchange.flags & _TLS)))
        repeat = self._repeats.get(key)
        if repeat is not None and exchange.request_bytes == len(request) == repeat[0] and exchange.end != _HANDED_OVER:
            # The short way: the request was seen before but for its trace context, and the response head as well.
            _, name, group, peers, answers, trace_state = repeat
            response = exchange.response
            end = response.find(b"\r\n\r\n")
            answer = answers.get(response[:end]) if end > 0 else None
            if answer is not None:
                length, answered, error = answer
                if exchange.response_bytes - end - 4 >= length:
                    context = self._context_of(after[:_TRACEPARENT_BYTES], trace_state) if mark else None
                    if context is not None or not mark:
                        peer = peers[exchange.remote_address, exchange.remote_port]
                        groups = (group, peer, answered)
                        if exchange.tls:
                            groups += (tls.attributes_of(exchange.tls),)
                        return Call(name, (), error, context, (), "", True, groups)
        call, target, is_forwarded = self._parse_anew(exchange)
        if (
            target is not None
            and not target[2]
            and exchange.request_bytes == len(request)
            and not call.request_id
            and not call.other_contexts
            and call.decision is None
            and call.context == (self._context_of(after[:_TRACEPARENT_BYTES], _trace_state(call)) if mark else None)
        ):
            self._remember_repeat(key, len(request), exchange.role == _SERVER, call, is_forwarded)
        return call

    def _remember_repeat(self, key: int, length: int, is_server: bool, call: Call, is_forwarded: bool) -> None:
        """Remember what a request is, but for its trace context, under a hash of its bytes.

        A hash, so that no head, which may hold secrets, is kept; of 64 bits made from SipHashes with a random seed, and
        the length is compared as well: two different requests of one key are out of reach.
        """
        others = {"network.peer.address", "network.peer.port", "error.type", *PEER_NAMES}
        if not is_forwarded:
            others.add("client.address")
        group = AttributeGroup(
            pair
            for pair in call.attributes
            if pair[0] not in others and not pair[0].startswith(("http.response.", "spanloom.response."))
        )
        if HEAD_TRUNCATED[0] in group:
            return
        if len(self._repeats) >= MEMO_TARGETS:
            self._repeats.clear()
        peers = (self._peers if is_forwarded else self._client_peers) if is_server else self._called_peers
        answers = self._whole_server_answers if is_server else self._whole_client_answers
        self._repeats[key] = length, call.name, group, peers, answers, _trace_state(call)

    def _parse_anew(self, exchange: Exchange) -> tuple[Call, _Target | None, bool]:
        """Parse line by line. Also returns the target, None when the request is not to be remembered, and whether
        client.address is from a header.
        """
        request = exchange.request
        flags = exchange.flags
        end = request.find(b"\r\n\r\n")
        lines = request[:end].split(b"\r\n")
        request_line = lines.pop(0)
        try:
            if end < 0 or not request_line or b"\n" in request_line:
                raise UnusualLineEnd
            found = [*filter(None, map(self._request_field, lines))]
            request_head_bytes = end + 4
        except UnusualLineEnd:
            lines, request_head_bytes = request_lines(request, flags, exchange.response)
            request_line = lines.pop(0)
            found = [*filter(None, map(self._request_field, lines))]
        fields: Fields = dict(found)
        if len(fields) != len(found):
            fields = merge(found)
        captures = captured(self._request_captures, fields, self._redactor) if self._request_captures else ()

        host = fields.pop(b"host", None)
        agent = fields.pop(b"user-agent", None)
        peer, client, peer_address = self._addresses[exchange.remote_address]
        if exchange.role == _SERVER:
            targets = self._tls_server_targets if flags & _TLS else self._server_targets
            target = targets.get((request_line, host)) or self._server_target(request_line, host, targets)
            answers = self._server_answers
        else:
            targets = self._tls_client_targets if flags & _TLS else self._client_targets
            target = targets.get((request_line, host)) or self._client_target(
                request_line, host, targets, peer_address, exchange.remote_port
            )
            client = self._names_of_peer(exchange.remote_address, exchange.remote_port)
            answers = self._client_answers
        attributes, name, meaning = target
        is_forwarded = False

        body: Attributes = ()
        request_id = ""
        context: TraceContext | None = None
        others: tuple[TraceContext, ...] = ()
        decision: bool | None = None
        malformed: dict[str, int] | None = None
        if fields:
            if exchange.role == _SERVER and client and (b"x-forwarded-for" in fields or b"forwarded" in fields):
                forwarded = syntax.read_forwarded(
                    syntax.first(fields.get(b"forwarded")), syntax.first(fields.get(b"x-forwarded-for"))
                )
                if forwarded:
                    client = (("client.address", forwarded),)
                    is_forwarded = True
            if 0 < request_head_bytes < exchange.request_bytes:
                body = _request_body_size(fields, exchange.request_bytes - request_head_bytes)
            known_id = fields.pop(b"x-request-id", None)
            if known_id is not None:
                request_id = syntax.text(syntax.first(known_id)[:REQUEST_ID_BYTES])
            if not self._context_names.isdisjoint(fields):
                context, others = self._extract(fields, self._malformed_here)
                if self._malformed_here:
                    malformed, self._malformed_here = self._malformed_here, defaultdict(int)
                if context is None:
                    decision = self._decision(fields)

        response = exchange.response
        end = response.find(b"\r\n\r\n")
        answer = answers.get(response[:end]) if end > 0 else None
        if answer is not None:
            response_head_bytes = end + 4
        elif response:
            answer, response_head_bytes = self._read_answer(response, end, answers)
        else:
            if flags & _FOREIGN and exchange.end > _NEXT:
                raise ProtocolError("foreign_response")
            answer, response_head_bytes = _NO_ANSWER, 0
        status, framing, length, answered, error = answer

        if framing is _LENGTH and response_head_bytes and not meaning:
            whole = exchange.response_bytes - response_head_bytes >= length
        else:
            whole = is_whole(exchange, meaning, status, framing, length, response_head_bytes)
        if whole:
            if response_head_bytes and framing <= _LENGTH and not meaning and exchange.end != _HANDED_OVER:
                if framing is not _LENGTH:
                    length = exchange.response_bytes - response_head_bytes
                body = (*body, ("http.response.body.size", length))
        elif exchange.end > _QUIET and not error:
            cause = failure(exchange.role, exchange.end, flags)
            answered = (*answered, cause)
            error = cause is not OVERLAPPED

        port = (self._ports[exchange.remote_port],) if peer else ()
        agent = self._agents[agent] if agent is not None else ()
        forwarded_for, own = (client, ()) if is_forwarded else ((), client)
        attributes = (*attributes, *agent, *forwarded_for, *captures, *peer, *port, *own, *answered, *body)
        if not request_head_bytes:
            attributes += HEAD_TRUNCATED
        # Without Host, a client's target is made of its peer; a request with a body has its size among the attributes.
        repeats = target if host is not None and request_head_bytes == exchange.request_bytes else None
        if malformed:
            # Counted once, with the record that the span is made of; and read, and counted, again when it repeats.
            repeats = None
            if whole or exchange.end > _QUIET:
                for format_name, count in malformed.items():
                    self._malformed[format_name] += count
        groups = (tls.attributes_of(exchange.tls),) if exchange.tls else ()
        call = Call(name, attributes, error, context, others, request_id, whole, groups, decision)
        if request.startswith(b"POST ") and grpc_web.MARK in request:
            # What becomes of it is in its body: no two are alike.
            return grpc_web.as_call(call, exchange, request_head_bytes, response_head_bytes), None, is_forwarded
        return call, repeats, is_forwarded

    def _read_request_line(self, request_line: bytes, targets: _Targets) -> tuple[bytes, Target, str]:
        method, target, version = syntax.read_request_line(request_line)
        scheme, *rest = syntax.read_target(method, target)
        if not scheme and (targets is self._tls_server_targets or targets is self._tls_client_targets):
            scheme = "https"
        return method, (scheme, *rest), version

    def _server_target(self, request_line: bytes, host: bytes | None, targets: _Targets) -> _Target:
        method, target, version = self._read_request_line(request_line, targets)
        attributes, name = self._server_attributes(method, target, host, version)
        result = attributes, name, METHOD_MEANING.get(method, 0)
        _remember(targets, request_line, host, result)
        return result

    def _client_target(
        self, request_line: bytes, host: bytes | None, targets: _Targets, peer_address: str, peer_port: int
    ) -> _Target:
        method, target, version = self._read_request_line(request_line, targets)
        attributes, name, is_named = self._client_attributes(method, target, host, version, peer_address, peer_port)
        result = attributes, name, METHOD_MEANING.get(method, 0)
        if is_named:
            _remember(targets, request_line, host, result)
        return result

    def _read_answer(self, response: bytes, end: int, answers: dict[bytes, _Answer]) -> tuple[_Answer, int]:
        """Read the final response head; ``end`` is where its first CRLFCRLF was found, or -1.

        Returns the answer and the bytes up to the end of its head, 0 when the head's end is not there.
        """
        if end <= 0:
            return self._read_unusual_answer(response, answers)
        lines = response[:end].split(b"\r\n")
        status_line = lines.pop(0)
        secrets = self._response_lines.passed_over
        try:
            if not status_line or b"\n" in status_line:
                raise UnusualLineEnd
            status = self._statuses[status_line]
            if status < 200 and status != 101:
                return self._read_unusual_answer(response, answers)
            found = [*filter(None, map(self._response_field, lines))]
        except UnusualLineEnd:
            return self._read_unusual_answer(response, answers)
        answer = self._answer(status, found, answers)
        if end <= MEMO_HEAD_BYTES and secrets == self._response_lines.passed_over:
            whole = self._whole_server_answers if answers is self._server_answers else self._whole_client_answers
            if len(answers) >= MEMO_HEADS:
                answers.clear()
                whole.clear()
            answers[response[:end]] = answer
            if answer[1] is _LENGTH:
                group = AttributeGroup((*answer[3], ("http.response.body.size", answer[2])))
                whole[response[:end]] = answer[2], group, answer[4]
        return answer, end + 4

    def _read_unusual_answer(self, response: bytes, answers: dict[bytes, _Answer]) -> tuple[_Answer, int]:
        """Like _read_answer for bare LF, a head that was cut, and interim heads in front (RFC 9110 section 15.2)."""
        start = 0
        while start < len(response):
            end = syntax.find_head_end(response, start)
            lines = syntax.split_lines(response[start : end if end > 0 else None])
            if not lines:
                status = syntax.read_status_prefix(response[start:])
                return (_NO_ANSWER if status < 200 and status != 101 else self._answer(status, [], answers)), 0
            status = syntax.read_status_line(lines.pop(0))
            if status >= 200 or status == 101:
                found = [*filter(None, map(self._response_field, lines))]
                return self._answer(status, found, answers), max(end, 0)
            if end < 0:
                break
            start = end
        return _NO_ANSWER, 0

    def _answer(self, status: int, found: list[tuple[bytes, bytes]], answers: dict[bytes, _Answer]) -> _Answer:
        fields = merge(found)
        framing, length = syntax.read_framing(fields)
        if status in (101, 204, 304):
            framing = Framing.EMPTY
        error = status >= (500 if answers is self._server_answers else 400)
        attributes: Attributes = (("http.response.status_code", status),)
        if error:
            attributes += (("error.type", str(status)),)
        if self._response_captures:
            attributes += captured(self._response_captures, fields, self._redactor)
        return status, framing, length, attributes, error


def request_lines(request: bytes, flags: int, response: bytes) -> tuple[list[bytes], int]:
    """Split an unusual request head: bare LF, blank lines in front (RFC 9112 section 2.2), or cut at the capture limit.

    Returns the lines and the bytes up to the end of the head, 0 for a head that was cut.
    """
    stripped = request.lstrip(b"\r\n")
    if not stripped:
        raise ProtocolError("no_request")
    end = syntax.find_head_end(stripped)
    if end > 0:
        return syntax.split_lines(stripped[:end]), len(request) - len(stripped) + end
    lines = syntax.split_lines(stripped)
    method, space, target = stripped.partition(b" ")
    if not lines and space and flags & _REQUEST_CUT and response[:7] == b"HTTP/1.":
        # The target alone is longer than the capture: it is shown as far as it goes, under the answer's version. Of an
        # authority that was cut nobody can tell what is a host and what a password.
        target = target.partition(b" ")[0]
        if not target.startswith(b"/") and b"/" not in target.partition(b"://")[2]:
            raise ProtocolError("incomplete_request")
        return [method + b" " + target + b" " + response[:8]], 0
    syntax.read_request_line(lines[0] if lines else stripped)
    if not lines or not flags & _REQUEST_CUT:
        raise ProtocolError("incomplete_request")
    return lines, 0


def _remember(targets: _Targets, line: bytes, host: bytes | None, value: _Target) -> None:
    if len(line) <= MEMO_TARGET_BYTES and (host is None or len(host) <= MEMO_LINE_BYTES):
        if len(targets) >= MEMO_TARGETS:
            targets.clear()
        targets[line, host] = value


def _trace_state(call: Call) -> str:
    return call.context.trace_state if call.context is not None else ""


def _request_body_size(fields: Fields, body_bytes: int) -> Attributes:
    """Chunked framing and bytes that no field announces are no body size."""
    framing, length = syntax.read_framing(fields)
    return (("http.request.body.size", min(length, body_bytes)),) if framing is _LENGTH and length else ()
