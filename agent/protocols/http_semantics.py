"""What HTTP requests look like as attributes, whichever version of HTTP carried them.

In: settings, and parts of requests that a protocol module has read. Out: attributes that follow the stable HTTP
semantic conventions, and bounded memos of them. Never happens: a header that was not asked for leaves this module, a
guessed template becomes ``http.route``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Protocol

from agent import redaction, routes
from agent.model import AttributeGroup, Attributes, TraceContext
from agent.protocols import http1_syntax as syntax
from agent.protocols.http1_memo import Memo

KNOWN_METHODS = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"QUERY")
)
"""``http.request.method`` values of the semantic conventions; another method is ``_OTHER``."""
PEER_NAMES = ("service.peer.name", "service.peer.namespace", "spanloom.peer.pod.name")
"""What a called peer is named by; different peers may answer the same request."""
REQUEST_ID_BYTES = 128
"""A longer x-request-id is cut: it is a key for joining, not data."""
MEMO_HOSTS = 4096
MEMO_PEERS = 4096

DEFAULT_PORTS = {"https": 443, "wss": 443}
_URL_HEADERS = frozenset((b"referer", b"location", b"content-location"))
"""Captured values of these are URLs and redacted as such."""

Fields = dict[bytes, bytes | list[bytes]]
Target = tuple[str, str, str, str]
"""Scheme, authority, path and query, as ``http1_syntax.read_target`` returns them."""


class Extractor(Protocol):
    """What is needed of ``agent.propagation.Extractor``."""

    header_names: frozenset[bytes]
    malformed: dict[str, int]

    def context_behind_version(self, value: bytes, trace_state: str) -> TraceContext | None: ...

    def extract(
        self, headers: Mapping[bytes, bytes | list[bytes]], malformed: dict[str, int] | None = None
    ) -> tuple[TraceContext | None, tuple[TraceContext, ...]]: ...

    def decision(self, headers: Mapping[bytes, bytes | list[bytes]]) -> bool | None: ...


class HttpProtocol:
    """The settings and memos that every version of HTTP shares."""

    def __init__(
        self,
        *,
        extractor: Extractor,
        request_headers: Iterable[str] = (),
        response_headers: Iterable[str] = (),
        allow_secret_headers: bool = False,
        redact_query_keys: Iterable[str] = redaction.DEFAULT_QUERY_KEYS,
        route_patterns: Iterable[str] = (),
        guess_routes: bool = False,
        names_of_peer: Callable[[bytes, int], Attributes] = lambda address, port: (),
    ) -> None:
        """Take the headers to capture and the rules for URLs. Raises ConfigError for a malformed route pattern.

        ``names_of_peer(address, port)`` has the attributes that name a called peer; they are remembered until
        ``forget_peers``.

        Header names that carry credentials are left out unless ``allow_secret_headers``; ``refused_headers`` has them.
        """
        captured_request, refused_request = redaction.split_headers(request_headers, allow_secret=allow_secret_headers)
        captured_response, refused = redaction.split_headers(response_headers, allow_secret=allow_secret_headers)
        self.refused_headers: tuple[str, ...] = tuple(dict.fromkeys(refused_request + refused))
        self._request_captures = captures("http.request.header.", captured_request)
        self._response_captures = captures("http.response.header.", captured_response)
        self._redactor = redaction.QueryRedactor(redact_query_keys)
        self._routes = routes.Routes(route_patterns)
        self._guess_routes = guess_routes
        self._extract = extractor.extract
        self._decision = extractor.decision
        self._context_names = extractor.header_names
        self._hosts = Memo(_read_host, MEMO_HOSTS)
        self._addresses = Memo(_peer_pairs, MEMO_PEERS)
        self._ports = Memo(lambda port: ("network.peer.port", port), MEMO_PEERS)
        self._peers = Memo(self._peer_group, MEMO_PEERS)
        self._client_peers = Memo(self._client_peer_group, MEMO_PEERS)
        self._called_peers = Memo(self._called_peer_group, MEMO_PEERS)
        self._names_of_peer = names_of_peer

    def forget_peers(self) -> None:
        """Ask for the names of peers again."""
        self._called_peers.clear()

    def _peer_group(self, key: tuple[bytes, int]) -> AttributeGroup:
        peer, _, _ = self._addresses[key[0]]
        return AttributeGroup((*peer, ("network.peer.port", key[1])) if peer else ())

    def _client_peer_group(self, key: tuple[bytes, int]) -> AttributeGroup:
        return AttributeGroup((*self._peer_group(key), *self._addresses[key[0]][1]))

    def _called_peer_group(self, key: tuple[bytes, int]) -> AttributeGroup:
        return AttributeGroup((*self._peer_group(key), *self._names_of_peer(*key)))

    def _server_attributes(
        self, method: bytes, target: Target, host: bytes | None, version: str
    ) -> tuple[Attributes, str]:
        """Return what a server's request line or pseudo-header fields and Host decide, and the span name."""
        scheme, authority, path, query = target
        known, name, route = self._method_and_route(method, path)
        scheme = scheme or "http"
        attributes = [*known, ("url.path", path), ("url.scheme", scheme)]
        if query:
            attributes.append(("url.query", self._redactor.query(query)))
        if route is not None:
            attributes.append(("http.route", route))
        attributes.append(("network.protocol.version", version))
        server = syntax.read_authority(authority.rpartition("@")[2]) if authority else self._hosts[host or b""][0]
        if server is not None:
            attributes.append(("server.address", server[0]))
            attributes.append(("server.port", server[1] or DEFAULT_PORTS.get(scheme, 80)))
        return tuple(attributes), name

    def _client_attributes(
        self, method: bytes, target: Target, host: bytes | None, version: str, peer_address: str, peer_port: int
    ) -> tuple[Attributes, str, bool]:
        """Like _server_attributes for a client; also returns whether the request names its server."""
        scheme, authority, path, query = target
        known, name, _ = self._method_and_route(method, path)
        scheme = scheme or "http"
        if authority:
            server = syntax.read_authority(authority.rpartition("@")[2])
            authority = redaction.redact_credentials("//" + authority)
        else:
            server, authority = self._hosts[host or b""]
        is_named = server is not None
        if server is None:
            # Only what the kernel saw is left: the address and port of the other end.
            bracketed = f"[{peer_address}]" if ":" in peer_address else peer_address
            default_port = peer_port in (0, DEFAULT_PORTS.get(scheme, 80))
            authority = f"//{bracketed}" if default_port else f"//{bracketed}:{peer_port}"
            server = peer_address, peer_port
        # RFC 9112 section 3.3: the URL of asterisk-form and authority-form has neither path nor query.
        url = f"{scheme}:{authority}{'' if path == '*' else path}"
        if query:
            url = f"{url}?{self._redactor.query(query)}"
        attributes = (
            *known,
            ("server.address", server[0]),
            ("server.port", server[1] or DEFAULT_PORTS.get(scheme, 80)),
            ("url.full", url),
            ("network.protocol.version", version),
        )
        return attributes, name, is_named

    def _method_and_route(self, method: bytes, path: str) -> tuple[Attributes, str, str | None]:
        """Return the method's attributes, the span name, and the configured route or None."""
        original = method.decode()
        if method in KNOWN_METHODS:
            attributes: Attributes = (("http.request.method", original),)
            name = original
        else:
            attributes = (("http.request.method", "_OTHER"), ("http.request.method_original", original))
            name = "HTTP"
        route = self._routes.match(original, path)
        template = route if route is not None or not self._guess_routes else routes.guess(path)
        return attributes, f"{name} {template}" if template else name, route


def merge(found: list[tuple[bytes, bytes]]) -> Fields:
    """Collect repeated fields into lists, in order; of Host and User-Agent the first counts."""
    fields: Fields = {}
    for name, value in found:
        earlier = fields.get(name)
        if earlier is None:
            fields[name] = value
        elif isinstance(earlier, list):
            earlier.append(value)
        elif name not in (b"host", b"user-agent"):
            fields[name] = [earlier, value]
    return fields


def captures(prefix: str, names: Iterable[str]) -> dict[bytes, str]:
    """Header name as it is compared -> attribute name."""
    return {name.encode("latin-1", "replace"): prefix + name for name in names}


def captured(wanted: dict[bytes, str], fields: Fields, redactor: redaction.QueryRedactor) -> Attributes:
    """Return the attributes of the ``wanted`` headers that are there."""
    attributes = []
    for name, key in wanted.items():
        value = fields.get(name)
        if value is not None:
            values = map(syntax.text, value if isinstance(value, list) else (value,))
            attributes.append((key, tuple(map(redactor.url, values) if name in _URL_HEADERS else values)))
    return tuple(attributes)


def _read_host(host: bytes) -> tuple[tuple[str, int | None] | None, str]:
    """Return (host and port, "//" and the value) of a Host field; (None, "") when it is absent or malformed."""
    value = syntax.text(host)
    server = syntax.read_authority(value)
    return (server, "//" + value) if server is not None else (None, "")


def _peer_pairs(address: bytes) -> tuple[Attributes, Attributes, str]:
    """Return network.peer.address, client.address, and the text of a 16-byte address; empty when it is unspecified."""
    if len(address) != 16 or not any(address):
        return (), (), ""
    if address.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff"):  # RFC 4291 section 2.5.5.2
        shown = inet_ntop(AF_INET, address[12:])
    else:
        shown = inet_ntop(AF_INET6, address)
    return (("network.peer.address", shown),), (("client.address", shown),), shown
