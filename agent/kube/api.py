"""The few calls to the Kubernetes API server that the agent makes, over the standard library's HTTPS.

In: the service account that the kubelet mounts, paths and queries. Out: decoded JSON objects, one by one for a watch.
Never: retries, keeps an object, logs, follows a redirect, speaks without verified TLS, or raises anything but
``ApiError`` (and ``ConfigError`` when there is no service account).

Each request has a connection of its own: an agent makes about a dozen requests an hour, and a fresh connection is
spread anew over the API servers. Token and CA file are compared with the disk before each request, because the kubelet
replaces both while the agent runs. Every wait has a limit, and an ``Interrupt`` ends it earlier.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

import msgspec

from agent import __version__
from agent.errors import ConfigError, SpanloomError

SERVICE_ACCOUNT_DIRECTORY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
USER_AGENT = f"spanloom/{__version__}"

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
"""From the connect to the last byte of an answer that is not a stream; half of it is the longest silence in one."""

MAX_LINE_BYTES = 8 << 20
"""One watch event. etcd refuses objects of more than 1.5 MiB, and JSON of them is at most a few times longer."""

MAX_RESPONSE_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_CREDENTIAL_BYTES = 1 << 20
_MAX_MESSAGE_CHARACTERS = 300
_MAX_EVENT_MESSAGE_CHARACTERS = 1024  # of core/v1 Event
_READ_BYTES = 64 << 10

_REASONS = {401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict", 410: "gone"}
_REASONS |= {429: "too_many_requests"}
_FOLLOWING_VERBS = ("list", "watch")
"""Whoever needs one of them needs the other."""


class ApiError(SpanloomError):
    """A request that failed. ``status`` is the HTTP status, 0 when no whole answer came.

    ``reason`` is a low-cardinality name used as a metric label: ``unauthorized``, ``forbidden``, ``not_found``,
    ``conflict``, ``gone``, ``too_many_requests``, ``server_error``, ``http_error``; without an answer ``connect``,
    ``name_resolution``, ``tls``, ``timeout``, ``disconnected``, ``malformed``, ``too_large``, ``token``, ``ca`` and
    ``interrupted``.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class InClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the API server is and who we are. The files are named and not read: their content changes."""

    host: str
    port: int
    namespace: str
    token_path: Path
    ca_path: Path

    @classmethod
    def load(
        cls, directory: Path = SERVICE_ACCOUNT_DIRECTORY, environ: Mapping[str, str] | None = None
    ) -> InClusterConfig:
        """The configuration that Kubernetes gives each pod. Raises ConfigError where it is missing."""
        environ = os.environ if environ is None else environ
        host = environ.get("KUBERNETES_SERVICE_HOST", "").strip()
        port = environ.get("KUBERNETES_SERVICE_PORT", "").strip()
        if not host or not port:
            raise ConfigError(
                "not in a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; run as a pod, or "
                "switch Kubernetes off"
            )
        if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
            raise ConfigError(f"not in a cluster: KUBERNETES_SERVICE_PORT is {port[:40]!r}, which is no port number")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not host.isascii() or not host.isprintable() or " " in host or "/" in host:
            raise ConfigError(f"not in a cluster: KUBERNETES_SERVICE_HOST is {host[:80]!r}, which is no host")
        texts = {}
        for name in ("ca.crt", "token", "namespace"):
            try:
                texts[name] = _read_bounded(directory / name).strip()
            except OSError as error:
                raise ConfigError(
                    f"not in a cluster: cannot read {directory / name}: {error.strerror or error}; the pod needs "
                    f"automountServiceAccountToken: true"
                ) from error
            if not texts[name]:
                raise ConfigError(f"not in a cluster: {directory / name} is empty; mount the service account again")
        return cls(
            host=host,
            port=int(port),
            namespace=texts["namespace"].decode("utf-8", "replace"),
            token_path=directory / "token",
            ca_path=directory / "ca.crt",
        )


class Interrupt:
    """Ends waits from another thread: those of requests that were given it, and its own ``wait``. Set for ever."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """End all waits, those to come too."""
        with self._lock:
            self._event.set()
            for sock in self._sockets:
                # The plain shutdown: the one of SSLSocket takes the TLS state away from the thread that is reading.
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def wait(self, seconds: float) -> bool:
        """Sleep; True when interrupted."""
        return self._event.wait(seconds)

    def attach(self, sock: socket.socket) -> None:
        """Have ``sock`` shut down by ``set``. Raises ApiError when that was called already."""
        with self._lock:
            if self._event.is_set():
                raise ApiError(0, "interrupted", "interrupted")
            self._sockets.add(sock)

    def detach(self, sock: socket.socket) -> None:
        """Before the socket is closed: its descriptor may be somebody else's afterwards."""
        with self._lock:
            self._sockets.discard(sock)


class ApiClient:
    """Requests to the API server as the mounted service account. Thread-safe; holds no connection."""

    def __init__(self, config: InClusterConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._token = ""
        self._token_signature: object = None
        self._context: ssl.SSLContext | None = None
        self._context_signature: object = None

    def get(
        self, path: str, query: Mapping[str, object] | None = None, *, interrupt: Interrupt | None = None
    ) -> dict[str, Any]:
        """The object or list at ``path``."""
        with _Exchange(self, "GET", path, query, None, interrupt, REQUEST_SECONDS / 2) as exchange:
            return exchange.read_object()

    def post(self, path: str, body: Mapping[str, Any], *, interrupt: Interrupt | None = None) -> dict[str, Any]:
        """Create ``body`` in the collection at ``path``; the created object."""
        with _Exchange(self, "POST", path, None, msgspec.json.encode(body), interrupt, REQUEST_SECONDS / 2) as exchange:
            return exchange.read_object()

    def stream(
        self,
        path: str,
        query: Mapping[str, object] | None,
        read_timeout_seconds: float,
        *,
        interrupt: Interrupt | None = None,
    ) -> Stream:
        """Open a watch. Returns when the server has agreed to it, so that a refusal is raised here.

        ``read_timeout_seconds`` is the longest silence between bytes.
        """
        exchange = _Exchange(self, "GET", path, query, None, interrupt, read_timeout_seconds)
        return Stream(exchange)

    def post_event(
        self, namespace: str, pod_name: str, pod_uid: str, reason: str, message: str, type: str = "Warning"
    ) -> ApiError | None:
        """Write a core/v1 Event about a pod, for ``kubectl describe``. A failure is returned, not raised."""
        time_ns = time.time_ns()
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns // 1_000_000_000))
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            # The form that client-go gives these names; 253 characters are allowed.
            "metadata": {"name": f"{pod_name[:230]}.{time_ns:x}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": namespace,
                "name": pod_name,
                "uid": pod_uid,
            },
            "type": type,
            "reason": reason,
            "message": message[:_MAX_EVENT_MESSAGE_CHARACTERS],
            "source": {"component": "spanloom"},
            "reportingComponent": "spanloom.io/agent",
            "reportingInstance": pod_name,
            "firstTimestamp": timestamp,
            "lastTimestamp": timestamp,
            "count": 1,
        }
        try:
            self.post(f"/api/v1/namespaces/{quote(namespace, safe='')}/events", body)
        except ApiError as error:
            return error
        return None

    def _authorization(self) -> str:
        """The header's value, from the file as it is now."""
        path = self.config.token_path
        with self._lock:
            try:
                signature = _signature(path)
                if signature != self._token_signature:
                    token = _read_bounded(path).strip().decode("ascii")
                    if not token or not token.isprintable() or " " in token:
                        raise ValueError("not a token")
                    self._token, self._token_signature = token, signature
            except OSError as error:
                raise ApiError(0, "token", f"cannot read {path}: {error.strerror or error}") from error
            except ValueError as error:
                raise ApiError(0, "token", f"{path} holds no token: mount the service account again") from error
            return f"Bearer {self._token}"

    def _forget_token(self) -> None:
        """After 401: read the file again whatever its times say."""
        with self._lock:
            self._token_signature = None

    def _tls_context(self) -> ssl.SSLContext:
        path = self.config.ca_path
        with self._lock:
            try:
                signature = _signature(path)
                if self._context is None or signature != self._context_signature:
                    # Not create_default_context: with an empty file it would trust the system's authorities.
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.load_verify_locations(cadata=_read_bounded(path).decode("ascii"))
                    context.set_alpn_protocols(["http/1.1"])
                    self._context, self._context_signature = context, signature
            except ssl.SSLError as error:
                raise ApiError(0, "ca", f"{path} holds no certificate: mount the service account again") from error
            except OSError as error:
                raise ApiError(0, "ca", f"cannot read {path}: {error.strerror or error}") from error
            except ValueError as error:
                raise ApiError(0, "ca", f"{path} holds no certificate: mount the service account again") from error
            return self._context

    def _connect(self, interrupt: Interrupt | None) -> ssl.SSLSocket:
        """A connected socket after the handshake, attached to ``interrupt``."""
        context = self._tls_context()
        host, port = self.config.host, self.config.port
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ApiError(0, "name_resolution", f"cannot resolve {host}: {error}") from error
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            # Wrapped and attached before it connects, so that an interrupt reaches it in every phase.
            with socket.socket(family, kind, protocol) as plain:
                _keep_alive(plain)
                plain.settimeout(CONNECT_SECONDS)
                sock = context.wrap_socket(plain, server_hostname=host)
            try:
                if interrupt is not None:
                    interrupt.attach(sock)
                sock.connect(address)
                return sock
            except (OSError, ValueError) as error:  # ValueError: a host that cannot be a TLS name
                _close(sock, interrupt)
                failure = error if isinstance(error, OSError) else ssl.SSLError(str(error))
            except BaseException:
                _close(sock, interrupt)
                raise
        raise failure


class Stream:
    """The events of a watch, as dicts. Ends when the server ends it; raises ApiError when it breaks. Close it."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange
        self._events = self._decode()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._events)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._events.close()
        self._exchange.close()

    def _decode(self) -> Iterator[dict[str, Any]]:
        try:
            for line in split_lines(self._exchange.chunks()):
                yield _decode_object(line)
        finally:
            self._exchange.close()


class _Exchange:
    """One request and its answer, of which the head has been read and is a success. Maps foreign errors to ApiError."""

    def __init__(
        self,
        client: ApiClient,
        method: str,
        path: str,
        query: Mapping[str, object] | None,
        body: bytes | None,
        interrupt: Interrupt | None,
        silence_seconds: float,
    ) -> None:
        self._interrupt = interrupt
        self._deadline = time.monotonic() + REQUEST_SECONDS
        self._silence_seconds = silence_seconds
        self._sock: ssl.SSLSocket | None = None
        self._response: http.client.HTTPResponse | None = None
        config = client.config
        headers = {
            "Authorization": client._authorization(),
            "Accept": "application/json",
            "User-Agent": USER_AGENT,
            "Connection": "close",
        }
        if body is not None:
            headers["Content-Type"] = "application/json"
        target = path if not query else f"{path}?{urlencode(query)}"
        connecting = True
        try:
            self._sock = client._connect(interrupt)
            connecting = False
            self._sock.settimeout(REQUEST_SECONDS / 2)
            connection = http.client.HTTPConnection(config.host, config.port)
            connection.sock = self._sock  # with a socket in place http.client does not connect by itself
            connection.request(method, target, body, headers)
            self._response = connection.getresponse()
            if not 200 <= self._response.status < 300:
                raise self._refusal(client, method, path, query)
            self._sock.settimeout(silence_seconds)
        except ApiError:
            self.close()
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            self._fail(error, f"{config.host}:{config.port}", connecting=connecting)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._sock is not None:
            _close(self._sock, self._interrupt)
            self._sock = None
        if self._response is not None:  # its file holds the descriptor open
            with suppress(OSError):
                self._response.close()

    def read_object(self) -> dict[str, Any]:
        """The whole body as one object."""
        return _decode_object(self._read_body(MAX_RESPONSE_BYTES))

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes."""
        while data := self._read_some():
            yield data

    def _read_body(self, limit_bytes: int) -> bytes:
        parts = []
        size = 0
        while data := self._read_some():
            size += len(data)
            if size > limit_bytes:
                raise ApiError(0, "too_large", f"an answer of more than {limit_bytes >> 20} MiB")
            if time.monotonic() > self._deadline:
                raise ApiError(0, "timeout", f"the answer took more than {REQUEST_SECONDS:.0f} s")
            parts.append(data)
        return b"".join(parts)

    def _read_some(self) -> bytes:
        """The next bytes of the body, empty at its end."""
        if self._sock is None or self._response is None:
            return b""
        try:
            data = self._response.read1(_READ_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._fail(error, "the API server")
        if not data:
            self._check_interrupt()
            if self._response.length:  # of the Content-Length; read1 does not miss what is missing
                raise ApiError(0, "disconnected", "the API server closed the connection within an answer")
        return data

    def _check_interrupt(self) -> None:
        if self._interrupt is not None and self._interrupt.is_set:
            raise ApiError(0, "interrupted", "interrupted")

    def _fail(self, error: Exception, server: str, *, connecting: bool = False) -> NoReturn:
        """Raise the ApiError for a foreign error."""
        self._check_interrupt()
        text = _printable(str(getattr(error, "strerror", None) or error) or type(error).__name__)
        if isinstance(error, TimeoutError):
            message = f"{server} did not connect" if connecting else f"{server} was silent for too long"
            raise ApiError(0, "timeout", message) from error
        if isinstance(error, ssl.SSLCertVerificationError):
            message = f"{server}: the certificate is not one of the cluster's ca.crt: {error.verify_message}"
            raise ApiError(0, "tls", message) from error
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            raise ApiError(0, "tls", f"{server}: TLS failed: {text}") from error
        if isinstance(error, OSError) and connecting:
            raise ApiError(0, "connect", f"{server}: cannot connect: {text}") from error
        if isinstance(error, OSError | http.client.IncompleteRead | http.client.RemoteDisconnected):
            raise ApiError(0, "disconnected", f"{server} closed the connection: {text}") from error
        raise ApiError(0, "malformed", f"{server} does not speak HTTP: {text}") from error

    def _refusal(self, client: ApiClient, method: str, path: str, query: Mapping[str, object] | None) -> ApiError:
        """The error for an answer that is not a success."""
        status = self._response.status
        if status == 401:
            client._forget_token()
        said = ""
        retry_after_seconds = parse_retry_after(self._response.getheader("Retry-After"))
        with suppress(ApiError):  # the status alone tells enough
            said = status_message(_decode_object(self._read_body(_MAX_ERROR_BYTES)))
        reason = _REASONS.get(status, "server_error" if status >= 500 else "http_error")
        match status:
            case 401:
                message = (
                    "unauthorized: the API server does not accept the token of the service account; the mounted file "
                    "is read again for the next try"
                )
            case 403:
                message = missing_rule(method, path, query)
            case _:
                message = f"HTTP {status} for {method} {path}"
        if said and status not in (401, 403):
            message = f"{message}: {said}"
        return ApiError(status, reason, message, retry_after_seconds)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a watch without their ends, each as soon as it is whole; empty ones are left out.

    Keeps at most one line and one chunk. Raises ApiError for a line over ``MAX_LINE_BYTES`` and for a last line that
    was not ended: the server ends each.
    """
    pending = bytearray()
    for data in chunks:
        searched = len(pending)  # what was there before has no end of line in it
        pending += data
        start = 0
        while (end := pending.find(b"\n", max(start, searched))) >= 0 and end - start <= MAX_LINE_BYTES:
            line = bytes(pending[start:end])
            start = end + 1
            if line.strip():
                yield line
        del pending[:start]
        if len(pending) > MAX_LINE_BYTES:
            raise ApiError(0, "too_large", f"a watch event of more than {MAX_LINE_BYTES >> 20} MiB")
    if pending.strip():
        raise ApiError(0, "disconnected", "the watch ended within an event")


def missing_rule(method: str, path: str, query: Mapping[str, object] | None) -> str:
    """What the service account was refused, and the RBAC rule that allows it, on one line."""
    segments = [segment for segment in path.split("/") if segment]
    group = segments[1] if segments[:1] == ["apis"] and len(segments) > 2 else ""
    segments = segments[3 if group else 2 :]
    namespace = ""
    if len(segments) > 2 and segments[0] == "namespaces":
        namespace, segments = segments[1], segments[2:]
    resource = segments[0] if segments else path
    if len(segments) > 2:
        resource += f"/{segments[2]}"
    if group:
        resource += f".{group}"
    watches = str((query or {}).get("watch", "")).lower() in ("1", "true")
    if method == "POST":
        verb = "create"
    elif watches:
        verb = "watch"
    else:
        verb = "get" if len(segments) > 1 else "list"
    needed = ", ".join(_FOLLOWING_VERBS if verb in _FOLLOWING_VERBS else (verb,))
    where, kind = (f"in namespace {namespace}", "Role") if namespace else ("at cluster scope", "ClusterRole")
    return _printable(
        f"forbidden: the service account may not {verb} {resource} {where}: it needs {needed} on {resource} ({kind})"
    )


def parse_retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header. The date form is not used by API servers and read as absent."""
    if value is None:
        return None
    value = value.strip()
    return float(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


def status_message(status: Mapping[str, Any]) -> str:
    """The message of a ``Status`` object in a form fit for a log line."""
    message = status.get("message")
    return _printable(message) if isinstance(message, str) else ""


def _decode_object(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ApiError(
            0, "malformed", f"the API server sent what is no JSON object: {_printable(str(error))}"
        ) from error


def _signature(path: Path) -> tuple[int, int, int]:
    """Differs when the content may differ. ``stat`` follows the link that the kubelet swaps, so the inode changes."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_CREDENTIAL_BYTES)


def _keep_alive(sock: socket.socket) -> None:
    """Notice within a minute a server that vanished: a watch may be silent for longer than that."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _close(sock: ssl.SSLSocket, interrupt: Interrupt | None) -> None:
    if interrupt is not None:
        interrupt.detach(sock)
    with suppress(OSError):
        sock.close()


def _printable(text: str) -> str:
    text = text[:_MAX_MESSAGE_CHARACTERS]
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
