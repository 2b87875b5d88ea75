"""A stand-in for the Kubernetes API server: real HTTPS, list, watch, bearer tokens, RBAC denial, faults on demand.

In: objects put and deleted by the test, requests on the loopback. Out: what an API server answers to get, list (pages,
``continue``, ``fieldSelector``, the semantics of ``resourceVersion``), watch (chunked, bookmarks, 410) and the creation
of Events, and a log of the requests with their bytes. Certificates are made at start with the ``openssl`` command.

``python -m tests.apiserver --service-account DIR`` serves until SIGTERM or SIGINT. Its first line of output is a JSON
object with the environment that a pod would have. Each line of its input is a command as a JSON object, answered by one
line: ``{"put": {…}}``, ``{"delete": ["namespace", "name"]}``, ``{"compact": true}``, ``{"rotate_token": true}``,
``{"drop_connections": true}``, ``{"deny": [["list", "pods"]]}``, ``{"requests": true}`` and ``{"events": true}``. The
last line of output is the summary of the request log.

Longer than most modules: a protocol's stand-in is read as a whole.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]

KINDS = {
    "pods": ("v1", "Pod", True),
    "services": ("v1", "Service", True),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice", True),
    "events": ("v1", "Event", True),
    "configmaps": ("v1", "ConfigMap", True),
    "nodes": ("v1", "Node", False),
    "namespaces": ("v1", "Namespace", False),
    "replicasets": ("apps/v1", "ReplicaSet", True),
    "jobs": ("batch/v1", "Job", True),
}
"""Resource -> API version, kind, whether it is namespaced."""

_HISTORY = 100_000  # changes kept for watches; older ones are as if compacted
_SNAPSHOTS = 16  # paged lists that may be under way at once
_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[a-z0-9.]+/v[a-z0-9]+))(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?"
)


@dataclass(slots=True, kw_only=True)
class Request:
    """One request. ``ended_seconds`` is None while a watch is open; the byte counts grow with it.

    ``bytes_in`` and ``bytes_out`` are HTTP heads and bodies with chunk framing. ``wire_in`` and ``wire_out`` are TCP
    payload, so with TLS and its handshake; they count from the end of the request before it on that connection.
    """

    method: str
    path: str
    query: dict[str, str]
    verb: str
    resource: str
    token: str
    user_agent: str
    started_seconds: float
    ended_seconds: float | None = None
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    wire_in: int = 0
    wire_out: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A scripted answer to one request: a status instead of the result, after a delay; ``raw`` is sent as it is."""

    status: int = 500
    message: str = "scripted"
    retry_after: str | None = None
    delay_seconds: float = 0.0
    raw: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    version: int
    resource: str
    old: Json | None
    new: Json | None


@dataclass(slots=True, kw_only=True, eq=False)
class _Connection:
    """``injected`` are raw bytes for the open watch: ``bookmarks`` asks it for one now."""

    sock: socket.socket
    watching: bool = False
    injected: deque[bytes] = field(default_factory=deque)
    bookmarks: int = 0


class _Refused(Exception):
    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details

    def status(self) -> Json:
        metadata = {"continue": self.details["continue_token"]} if "continue_token" in self.details else {}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        } | ({"details": self.details["details"]} if "details" in self.details else {})


class ApiServer:
    """The server; a context manager. With ``listening=False`` the port is reserved and refuses connections.

    Control: ``put``, ``delete``, ``compact``, ``tokens`` (what is accepted), ``deny`` (pairs of verb and resource,
    ``*`` for any), ``delay`` (seconds before each answer), ``watch_second`` (how long a second of ``timeoutSeconds``
    lasts, which is a whole number), ``fail_next``, ``drop_connections``, ``inject``, ``bookmark``,
    ``refuse_connections``, ``accept_connections``. To look at: ``requests``, ``recorded_events``.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        listening: bool = True,
        bookmark_seconds: float = 60.0,
        gone_as_event: bool = True,
        pages_from_cache: bool = True,
    ) -> None:
        """``gone_as_event``: a watch from a compacted version gets an ERROR event (as real servers do), else HTTP 410.

        ``pages_from_cache``: whether ``limit`` holds for ``resourceVersion=0``, which older servers ignore.
        """
        self.host = host
        self.bookmark_seconds = bookmark_seconds
        self.gone_as_event = gone_as_event
        self.pages_from_cache = pages_from_cache
        self.tokens: set[str] = set()
        self.deny: set[tuple[str, str]] = set()
        self.delay = 0.0
        self.watch_second = 1.0
        self.requests: list[Request] = []
        self.recorded_events: list[Json] = []
        self.handshake_failures = 0
        self.connection_count = 0
        self._changed = threading.Condition()
        self._objects: dict[str, dict[tuple[str, str], Json]] = {resource: {} for resource in KINDS}
        self._version = 1000
        self._oldest_version = 1000
        self._history: deque[_Change] = deque()
        self._snapshots: dict[int, list[Json]] = {}
        self._failures: deque[Failure] = deque()
        self._connections: set[_Connection] = set()
        self._stopping = threading.Event()
        self._generation = 0  # of the listener: what it accepted last must not outlive it
        self._accounts: dict[Path, str] = {}  # directory -> namespace
        self._account_token = ""
        self.ca_pem, certificate, key = _certificates()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self._tls.set_alpn_protocols(["http/1.1"])
        self._listener = self._bind(port)
        self.port: int = self._listener.getsockname()[1]
        if listening:
            self.accept_connections()

    # -------------------------------------------------------------------------------------------- control

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stopping.set()
        with self._changed:
            self._listener.close()
            self._changed.notify_all()
        self.drop_connections()

    @property
    def environ(self) -> dict[str, str]:
        """The variables that the kubelet gives each container."""
        return {"KUBERNETES_SERVICE_HOST": self.host, "KUBERNETES_SERVICE_PORT": str(self.port)}

    @property
    def version(self) -> int:
        """The newest resourceVersion."""
        return self._version

    def put(self, thing: Json) -> Json:
        """Create or replace an object; its resource is told by its kind, Pod by default. Returns it as stored."""
        kind = thing.get("kind", "Pod")
        resource = next(name for name, (_, known, _) in KINDS.items() if known == kind)
        with self._changed:
            return self._store(resource, thing)

    def delete(self, namespace: str, name: str, resource: str = "pods") -> None:
        with self._changed:
            old = self._objects[resource].pop((namespace, name))
            self._version += 1
            self._record(_Change(version=self._version, resource=resource, old=old, new=None))

    def compact(self) -> None:
        """Forget the past: watches from older versions and continue tokens are Gone. Open watches go on."""
        with self._changed:
            self._version += 1
            self._oldest_version = self._version
            self._history.clear()
            self._snapshots.clear()
            self._changed.notify_all()

    def bookmark(self) -> None:
        """Send one to each open watch that allows them."""
        with self._changed:
            for connection in self._connections:
                connection.bookmarks += 1
            self._changed.notify_all()

    def inject(self, data: bytes) -> int:
        """Send raw bytes into each open watch, as a chunk; the number of watches."""
        with self._changed:
            watching = [connection for connection in self._connections if connection.watching]
            for connection in watching:
                connection.injected.append(data)
            self._changed.notify_all()
            return len(watching)

    def fail_next(self, *failures: Failure) -> None:
        """Script the answers to the next requests."""
        with self._changed:
            self._failures.extend(failures)

    def drop_connections(self, reset: bool = False) -> int:
        """Cut all connections, with a reset instead of an end when asked for. Returns how many there were."""
        with self._changed:
            connections = list(self._connections)
            for connection in connections:
                with suppress(OSError):
                    if reset:
                        linger = struct.pack("ii", 1, 0)
                        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
            return len(connections)

    def refuse_connections(self) -> None:
        """As if the server were not running: its port refuses, its connections are cut."""
        with self._changed:
            with suppress(OSError):  # not listening at present
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept of the other thread, as a close does not
            self._listener.close()
            self._generation += 1
        self.drop_connections()
        deadline = time.monotonic() + 5.0
        while True:
            try:
                self._listener = self._bind(self.port)
                return
            except OSError:  # an accept in progress holds the old socket for a moment
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def accept_connections(self) -> None:
        listener = self._listener
        listener.listen(512)
        listener.settimeout(0.1)
        threading.Thread(target=self._accept, args=(listener, self._generation), name="apiserver", daemon=True).start()

    def write_service_account(self, directory: Path, namespace: str = "spanloom") -> Path:
        """Mount a service account there as the kubelet does; its token is accepted. Returns the directory."""
        self._accounts[directory] = namespace
        self._account_token = self._account_token or self.new_token()
        write_volume(directory, self._volume(namespace))
        return directory

    def new_token(self) -> str:
        """A further token that is accepted, in the form of a JWT."""

        def part(thing: Json) -> str:
            return base64.urlsafe_b64encode(json.dumps(thing).encode()).rstrip(b"=").decode()

        claims = {"iss": "stand-in", "sub": "system:serviceaccount:spanloom:spanloom", "jti": str(uuid.uuid4())}
        token = f"{part({'alg': 'RS256'})}.{part(claims)}.{secrets.token_urlsafe(256)}"
        self.tokens.add(token)
        return token

    def rotate_token(self, revoke_old: bool = True) -> str:
        """Swap the mounted token the way the kubelet does, and accept the old one no longer."""
        old, self._account_token = self._account_token, self.new_token()
        for directory, namespace in self._accounts.items():
            write_volume(directory, self._volume(namespace))
        if revoke_old:
            self.tokens.discard(old)
        return self._account_token

    def wait_for(self, what: Any, timeout_seconds: float = 10.0) -> bool:
        """Wait until ``what(server)`` is true; looked at after each request and change. False when time is up."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: what(self), timeout_seconds))

    @property
    def open_watches(self) -> int:
        return sum(connection.watching for connection in list(self._connections))

    def summary(self) -> dict[str, Json]:
        """Requests, events and bytes by verb and resource."""
        lines: dict[str, Json] = {}
        with self._changed:
            for request in self.requests:
                line = lines.setdefault(
                    f"{request.verb} {request.resource}",
                    dict.fromkeys(("requests", "events", "bytes_in", "bytes_out", "wire_in", "wire_out"), 0),
                )
                line["requests"] += 1
                for name in ("events", "bytes_in", "bytes_out", "wire_in", "wire_out"):
                    line[name] += getattr(request, name)
        return lines

    # -------------------------------------------------------------------------------------------- storage

    def _volume(self, namespace: str) -> dict[str, str]:
        return {"ca.crt": self.ca_pem, "token": self._account_token, "namespace": namespace}

    def _store(self, resource: str, thing: Json) -> Json:
        version, kind, namespaced = KINDS[resource]
        metadata = dict(thing["metadata"])
        key = (metadata.setdefault("namespace", "default") if namespaced else "", metadata["name"])
        old = self._objects[resource].get(key)
        self._version += 1
        metadata["resourceVersion"] = str(self._version)
        metadata.setdefault("uid", old["metadata"]["uid"] if old else str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", timestamp())
        new = {"apiVersion": version, "kind": kind} | thing | {"metadata": metadata}
        self._objects[resource][key] = new
        self._record(_Change(version=self._version, resource=resource, old=old, new=new))
        return new

    def _record(self, change: _Change) -> None:
        self._history.append(change)
        if len(self._history) > _HISTORY:
            self._oldest_version = self._history.popleft().version
        self._changed.notify_all()

    def _list(self, resource: str, namespace: str | None, query: dict[str, str]) -> Json:
        """Called with the lock held."""
        api_version, kind, _ = KINDS[resource]
        limit = int(query.get("limit") or 0)
        wanted = query.get("resourceVersion", "")
        match = query.get("resourceVersionMatch", "")
        start = 0
        if token := query.get("continue"):
            if wanted not in ("", "0") or match:
                raise _Refused(400, "BadRequest", "specifying resource version is not allowed when using continue")
            try:
                version, start = json.loads(base64.urlsafe_b64decode(token))
            except ValueError:
                raise _Refused(400, "BadRequest", "continue key is not valid") from None
            if version not in self._snapshots:
                message = "The provided continue parameter is too old to display a consistent list result."
                raise _Refused(410, "Expired", message)
            items = self._snapshots[version]
        else:
            if match and (not wanted or match not in ("Exact", "NotOlderThan")):
                raise _Refused(400, "BadRequest", "resourceVersionMatch is forbidden without resourceVersion")
            if wanted and not wanted.isdecimal():
                raise _Refused(400, "BadRequest", f"Invalid resource version {wanted!r}")
            if wanted and int(wanted) > self._version:
                details = {"causes": [{"reason": "ResourceVersionTooLarge"}], "retryAfterSeconds": 1}
                raise _Refused(504, "Timeout", f"Too large resource version: {wanted}", details=details)
            exact = match == "Exact" or (not match and limit > 0 and wanted not in ("", "0"))
            if exact and int(wanted) != self._version:  # only the present is kept
                raise _Refused(410, "Expired", f"The resourceVersion for the provided list is too old: {wanted}")
            version = self._version
            items = [
                thing
                for _, thing in sorted(self._objects[resource].items())
                if _selected(thing, namespace, query.get("fieldSelector", ""))
            ]
        if wanted == "0" and not self.pages_from_cache:
            limit = 0
        page = items[start : start + limit] if limit else items[start:]
        metadata: Json = {"resourceVersion": str(version)}
        left = len(items) - start - len(page)
        if left:
            self._snapshots[version] = items
            while len(self._snapshots) > _SNAPSHOTS:
                del self._snapshots[next(iter(self._snapshots))]
            token = base64.urlsafe_b64encode(json.dumps([version, start + len(page)]).encode()).decode()
            metadata |= {"continue": token, "remainingItemCount": left}
        # In a list, items carry neither kind nor version.
        bare = [{key: value for key, value in item.items() if key not in ("kind", "apiVersion")} for item in page]
        return {"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata, "items": bare}

    # -------------------------------------------------------------------------------------------- network

    def _bind(self, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, port))
        except OSError:
            sock.close()
            raise
        return sock

    def _accept(self, listener: socket.socket, generation: int) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.connection_count += 1
            threading.Thread(
                target=self._serve, args=(sock, generation), name="apiserver-connection", daemon=True
            ).start()

    def _serve(self, plain: socket.socket, generation: int) -> None:
        plain.settimeout(30.0)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as Go does; else answers wait for an ACK
        connection = _Connection(sock=plain)
        try:
            with self._changed:
                if generation != self._generation:
                    return
                self._connections.add(connection)
            with self._tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as sock:
                with self._changed:
                    connection.sock = sock
                try:
                    sock.do_handshake()
                except OSError:
                    self.handshake_failures += 1
                    return
                sock.settimeout(600.0)
                with suppress(OSError, ValueError):
                    _Handler(self, connection)
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()
            plain.close()


def _selected(thing: Json, namespace: str | None, selector: str) -> bool:
    metadata = thing["metadata"]
    if namespace is not None and metadata.get("namespace") != namespace:
        return False
    for term in filter(None, selector.split(",")):
        match = re.fullmatch(r"([A-Za-z.]+)(==|=|!=)(.*)", term)
        fields = {
            "metadata.name": metadata["name"],
            "metadata.namespace": metadata.get("namespace", ""),
            "spec.nodeName": thing.get("spec", {}).get("nodeName", ""),
            "status.phase": thing.get("status", {}).get("phase", ""),
        }
        if match is None or match[1] not in fields:
            raise _Refused(400, "BadRequest", f"field label not supported: {term}")
        if (fields[match[1]] == match[3]) == (match[2] == "!="):
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    """One connection; ``handle`` serves its requests one after the other."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def __init__(self, server: ApiServer, connection: _Connection) -> None:
        self.api = server
        self.state = connection
        self.entry: Request | None = None
        self.wire = (0, 0)
        super().__init__(connection.sock, connection.sock.getpeername(), None)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Count the bytes when the client has them: before it closes they may wait in the kernel, not yet sent."""
        with suppress(OSError, ValueError):
            super().finish()
            socket.socket.shutdown(self.connection, socket.SHUT_WR)
            self.connection.settimeout(1.0)
            self.connection.recv(1)
        with suppress(OSError):
            self._measure()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_GET
    do_PUT = do_GET
    do_PATCH = do_GET
    do_DELETE = do_GET

    def _answer(self) -> None:
        api = self.api
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        match = _PATH.fullmatch(unquote(parts.path))
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(min(size, 16 << 20))
        head_bytes = len(self.raw_requestline) + sum(len(k) + len(v) + 4 for k, v in self.headers.items()) + 2
        resource = match["resource"] if match else ""
        if self.command == "GET":
            watches = query.get("watch", "").lower() in ("1", "true")
            verb = "get" if match and match["name"] else "watch" if watches else "list"
        else:
            verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[self.command]
        self.entry = entry = Request(
            method=self.command,
            path=parts.path,
            query=query,
            verb=verb,
            resource=resource,
            token=self.headers.get("Authorization", "").removeprefix("Bearer "),
            user_agent=self.headers.get("User-Agent", ""),
            started_seconds=time.monotonic(),
            bytes_in=head_bytes + len(body),
        )
        with api._changed:
            api.requests.append(entry)
            failure = api._failures.popleft() if api._failures else None
        try:
            delay_seconds = api.delay + (failure.delay_seconds if failure else 0.0)
            if delay_seconds and api._stopping.wait(delay_seconds):
                self.close_connection = True
                return
            self._perform(match, verb, resource, query, body, failure)
        except _Refused as refused:
            self._send(refused.code, refused.status())
        except OSError:
            self.close_connection = True
        finally:
            with suppress(OSError):
                self._measure()
            with api._changed:
                entry.ended_seconds = time.monotonic()
                api._changed.notify_all()

    def _perform(
        self,
        match: re.Match[str] | None,
        verb: str,
        resource: str,
        query: dict[str, str],
        body: bytes,
        failure: Failure | None,
    ) -> None:
        api = self.api
        if failure is not None and failure.raw is not None:
            self._write(failure.raw)
            self.close_connection = True
            return
        if failure is not None:
            refused = _Refused(failure.status, "Scripted", failure.message)
            extra = {"Retry-After": failure.retry_after} if failure.retry_after is not None else {}
            self._send(failure.status, refused.status(), extra)
            return
        if self.entry is not None and self.entry.token not in api.tokens:
            raise _Refused(401, "Unauthorized", "Unauthorized")
        if api.deny & {(verb, resource), (verb, "*"), ("*", resource), ("*", "*")}:
            where = (
                f'in the namespace "{match["namespace"]}"' if match and match["namespace"] else "at the cluster scope"
            )
            message = (
                f'{resource} is forbidden: User "system:serviceaccount:spanloom:spanloom" cannot {verb} resource '
                f'"{resource}" in API group "" {where}'
            )
            raise _Refused(403, "Forbidden", message)
        known = KINDS.get(resource)
        if match is None or known is None or known[0] != (match["core"] or match["group"]):
            raise _Refused(404, "NotFound", "the server could not find the requested resource")
        namespace, name = match["namespace"], match["name"]
        if verb == "watch":
            self._watch(resource, namespace, query)
        elif verb == "list":
            with api._changed:
                answer = api._list(resource, namespace, query)
            self._send(200, answer)
        elif verb == "get":
            with api._changed:
                thing = api._objects[resource].get((namespace or "", name))
            if thing is None:
                raise _Refused(404, "NotFound", f'{resource} "{name}" not found')
            self._send(200, thing)
        elif verb == "create" and resource == "events":
            self._send(201, self._create_event(namespace, body))
        else:
            raise _Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _create_event(self, namespace: str | None, body: bytes) -> Json:
        """With the checks of the API server that a client can fall foul of."""
        try:
            thing = json.loads(body)
            name, involved = thing["metadata"]["name"], thing["involvedObject"]
        except (ValueError, KeyError, TypeError):
            raise _Refused(400, "BadRequest", "the object provided is unrecognized") from None
        if thing.get("kind") != "Event" or thing["metadata"].get("namespace") != namespace:
            raise _Refused(400, "BadRequest", "the namespace of the provided object does not match the request")
        if involved.get("namespace") != namespace or thing.get("type") not in ("Normal", "Warning"):
            raise _Refused(422, "Invalid", f'Event "{name}" is invalid')
        if len(name) > 253 or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
            raise _Refused(422, "Invalid", f'Event "{name}" is invalid: metadata.name')
        with self.api._changed:
            if (namespace, name) in self.api._objects["events"]:
                raise _Refused(409, "AlreadyExists", f'events "{name}" already exists')
            stored = self.api._store("events", thing)
            self.api.recorded_events.append(stored)
        return stored

    def _watch(self, resource: str, namespace: str | None, query: dict[str, str]) -> None:
        api, state, entry = self.api, self.state, self.entry
        assert entry is not None
        selector = query.get("fieldSelector", "")
        timeout_seconds = float(query.get("timeoutSeconds") or 1800)
        allows_bookmarks = query.get("allowWatchBookmarks", "").lower() in ("1", "true")
        wanted = query.get("resourceVersion", "")
        if wanted and not wanted.isdecimal():
            raise _Refused(400, "BadRequest", f"Invalid resource version {wanted!r}")
        _selected({"metadata": {"name": ""}}, None, selector)  # refuses a selector that is none
        pending: list[tuple[str, Json]] = []
        with api._changed:
            if wanted in ("", "0"):
                version = api._version
                things = api._objects[resource].values()
                pending = [("ADDED", thing) for thing in things if _selected(thing, namespace, selector)]
            else:
                version = int(wanted)
            gone = version < api._oldest_version
        refused = _Refused(410, "Expired", f"too old resource version: {wanted} ({api._oldest_version})")
        if gone and not api.gone_as_event:
            raise refused
        entry.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        entry.bytes_out += sum(map(len, self._headers_buffer)) + 2
        self.end_headers()
        self.wfile.flush()
        self._measure()
        if gone:
            self._chunk(_line("ERROR", refused.status()))
            self._chunk(b"")
            return
        deadline = time.monotonic() + timeout_seconds * api.watch_second
        next_bookmark = time.monotonic() + api.bookmark_seconds
        with api._changed:
            state.watching = True
            asked_bookmarks = state.bookmarks
            api._changed.notify_all()
        try:
            while not api._stopping.is_set():
                data = b""
                with api._changed:
                    now = time.monotonic()
                    if version < api._oldest_version:
                        version = api._oldest_version  # compacted while open: it had been read before
                    changes, newest = self._changes(resource, version), api._version
                    if not (changes or pending or state.injected or state.bookmarks > asked_bookmarks):
                        wake = min(deadline, next_bookmark if allows_bookmarks else deadline)
                        if now < wake:
                            api._changed.wait(min(wake - now, 0.05))
                            if self._is_gone():
                                raise OSError("the client is gone")
                            continue
                    while state.injected:
                        data += state.injected.popleft()
                    due = allows_bookmarks and (now >= next_bookmark or state.bookmarks > asked_bookmarks)
                    asked_bookmarks = state.bookmarks
                    version = newest
                for change in changes:
                    kind = _kind_of(change, namespace, selector)
                    if kind is not None:
                        pending.append((kind, change.new if change.new is not None else _deleted(change)))
                for kind, thing in pending:
                    data += _line(kind, thing)
                    entry.events += 1
                pending = []
                if due:
                    api_version, kind, _ = KINDS[resource]
                    metadata = {"resourceVersion": str(newest), "creationTimestamp": None}
                    data += _line("BOOKMARK", {"kind": kind, "apiVersion": api_version, "metadata": metadata})
                    entry.events += 1
                    next_bookmark = time.monotonic() + api.bookmark_seconds
                if data:
                    self._chunk(data)
                if time.monotonic() >= deadline:
                    self._chunk(b"")
                    return
        finally:
            state.watching = False
        self.close_connection = True

    def _changes(self, resource: str, version: int) -> list[_Change]:
        """Newer than ``version``; from the end, because a watch is mostly up to date."""
        changes: list[_Change] = []
        for change in reversed(self.api._history):
            if change.version <= version:
                break
            if change.resource == resource:
                changes.append(change)
        return changes[::-1]

    def _is_gone(self) -> bool:
        """Whether the client closed the connection, seen below TLS without reading from it."""
        try:
            plain = socket.socket(fileno=os.dup(self.connection.fileno()))
        except OSError:
            return True
        with plain:
            try:
                return plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

    def _send(self, status: int, thing: Json, extra: Mapping[str, str] | None = None) -> None:
        data = json.dumps(thing, separators=(",", ":")).encode() + b"\n"
        if self.entry is not None:
            self.entry.status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        if self.entry is not None:
            self.entry.bytes_out += sum(map(len, self._headers_buffer)) + 2
        self.end_headers()
        self._write(data)

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))
        with suppress(OSError):
            self._measure()

    def _write(self, data: bytes) -> None:
        if self.entry is not None:
            self.entry.bytes_out += len(data)
        self.wfile.write(data)
        self.wfile.flush()

    def _measure(self) -> None:
        """Bytes of TCP payload since the request before: ``tcp_info`` of include/uapi/linux/tcp.h."""
        information = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
        if len(information) < 208 or self.entry is None:
            return
        received = struct.unpack_from("=Q", information, 128)[0]  # tcpi_bytes_received
        sent = struct.unpack_from("=Q", information, 200)[0]  # tcpi_bytes_sent
        self.entry.wire_in += received - self.wire[0]
        self.entry.wire_out += sent - self.wire[1]
        self.wire = (received, sent)


def _kind_of(change: _Change, namespace: str | None, selector: str) -> str | None:
    """What a watch with this selector is told: an object may also enter and leave the selection."""
    before = change.old is not None and _selected(change.old, namespace, selector)
    after = change.new is not None and _selected(change.new, namespace, selector)
    return {(False, True): "ADDED", (True, True): "MODIFIED", (True, False): "DELETED"}.get((before, after))


def _deleted(change: _Change) -> Json:
    """The last state, with the version of the deletion."""
    assert change.old is not None
    return change.old | {"metadata": change.old["metadata"] | {"resourceVersion": str(change.version)}}


def _line(kind: str, thing: Json) -> bytes:
    return json.dumps({"type": kind, "object": thing}, separators=(",", ":")).encode() + b"\n"


def write_volume(directory: Path, files: Mapping[str, str]) -> None:
    """As the kubelet's atomic writer: a new directory, then ``..data`` is swapped in one rename."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / f"..{time.strftime('%Y_%m_%d_%H_%M_%S')}.{secrets.randbelow(10**9)}"
    data.mkdir()
    for name, text in files.items():
        (data / name).write_text(text)
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(f"..data/{name}")
    new_link = directory / "..data_tmp"
    new_link.symlink_to(data.name)
    current = directory / "..data"
    old = current.readlink() if current.is_symlink() else None
    new_link.rename(current)
    if old is not None:
        for name in os.listdir(directory / old):
            (directory / old / name).unlink()
        (directory / old).rmdir()


@functools.cache
def _certificates() -> tuple[str, Path, Path]:
    """One authority for all servers of this process: keys take a while to make."""
    directory = tempfile.mkdtemp(prefix="apiserver-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return make_certificates(Path(directory))


def make_certificates(directory: Path) -> tuple[str, Path, Path]:
    """A CA and a server certificate for the loopback: the CA as PEM, the paths of certificate and key."""
    configuration = directory / "openssl.cnf"
    configuration.write_text(
        "[req]\ndistinguished_name=name\n[name]\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
        "[server]\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        "extendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        "subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost,DNS:kubernetes.default.svc\n"
    )

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=30)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "openssl.cnf")
    openssl(
        *("req", "-x509", *key, "-subj", "/CN=kubernetes", "-days", "30", "-extensions", "ca"),
        *("-keyout", "ca.key", "-out", "ca.crt"),
    )
    openssl("req", *key, "-subj", "/CN=kube-apiserver", "-keyout", "server.key", "-out", "server.csr")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30"),
        *("-extfile", "openssl.cnf", "-extensions", "server", "-out", "server.crt"),
    )
    return (directory / "ca.crt").read_text(), directory / "server.crt", directory / "server.key"


def timestamp(seconds: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ------------------------------------------------------------------------------------------------------- pods


def make_pod(
    name: str,
    namespace: str = "default",
    node: str = "node-a",
    containers: Mapping[str, str | None] | Iterable[str] = ("app",),
    *,
    init_containers: Mapping[str, str | None] | None = None,
    ephemeral_containers: Mapping[str, str | None] | None = None,
    owner: tuple[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    phase: str = "Running",
    uid: str | None = None,
    image: str = "registry.example/shop/{}:1.4.2",
    runtime: str = "containerd",
    pod_ip: str = "10.244.1.17",
    host_network: bool = False,
    start_time: str | None = None,
    restarts: int = 0,
) -> Json:
    """A v1 Pod of the size and shape that API servers send (about 6 kB with one container).

    ``containers`` maps names to container ids (64 hex digits, without the runtime's prefix): None for one that has not
    been started, and a random one when only names are given. ``owner`` is kind and name of the controller. ``{}`` in
    ``image`` is the container's name.
    """
    if not isinstance(containers, Mapping):
        containers = {container: secrets.token_hex(32) for container in containers}
    created = start_time or timestamp(time.time() - 3600)
    ready = phase == "Running"
    host_ip = "192.0.2.10"
    metadata: Json = {
        "name": name,
        "namespace": namespace,
        "uid": uid or str(uuid.uuid4()),
        "creationTimestamp": created,
        "labels": {"app.kubernetes.io/name": name.split("-")[0], "pod-template-hash": "6d4cf56db6"}
        | dict(labels or {}),
        "annotations": {"kubectl.kubernetes.io/restartedAt": created} | dict(annotations or {}),
        "managedFields": [
            _managed_fields("kube-controller-manager", created, containers, ""),
            _managed_fields("kubelet", created, containers, "status"),
        ],
    }
    if owner is not None:
        kind, owner_name = owner
        group = {"Job": "batch/v1", "ReplicationController": "v1", "Node": "v1"}.get(kind, "apps/v1")
        metadata["generateName"] = f"{owner_name}-"
        metadata["ownerReferences"] = [
            {
                "apiVersion": group,
                "kind": kind,
                "name": owner_name,
                "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{namespace}.{kind}.{owner_name}")),
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    spec: Json = {
        "volumes": [
            {
                "name": "kube-api-access-x7k2p",
                "projected": {
                    "defaultMode": 420,
                    "sources": [
                        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                    ],
                },
            }
        ],
        "containers": [_container(container, image) for container in containers],
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": "default",
        "serviceAccount": "default",
        "nodeName": node,
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{taint}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 300,
            }
            for taint in ("not-ready", "unreachable")
        ],
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    if host_network:
        spec["hostNetwork"] = True
        pod_ip = host_ip
    conditions = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    status: Json = {
        "phase": phase,
        "conditions": [
            {
                "type": condition,
                "status": "True" if ready or condition == "PodScheduled" else "False",
                "lastProbeTime": None,
                "lastTransitionTime": created,
            }
            for condition in conditions
        ],
        "hostIP": host_ip,
        "hostIPs": [{"ip": host_ip}],
        "startTime": created,
        "qosClass": "Burstable",
        "containerStatuses": [
            _container_status(container, container_id, image, runtime, created, phase, restarts)
            for container, container_id in containers.items()
        ],
    }
    if ready or phase in ("Succeeded", "Failed"):
        status |= {"podIP": pod_ip, "podIPs": [{"ip": pod_ip}]}
    for field_name, status_name, extra in (
        ("initContainers", "initContainerStatuses", init_containers),
        ("ephemeralContainers", "ephemeralContainerStatuses", ephemeral_containers),
    ):
        if extra:
            spec[field_name] = [_container(container, image) for container in extra]
            state = "Succeeded" if field_name == "initContainers" else phase
            status[status_name] = [
                _container_status(container, container_id, image, runtime, created, state, 0)
                for container, container_id in extra.items()
            ]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def make_service(name: str, namespace: str, cluster_ip: str, port: int) -> Json:
    """A v1 Service with one TCP port; ``cluster_ip`` "None" for a headless one."""
    moment = timestamp()
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": moment,
            "labels": {"app.kubernetes.io/name": name},
            "managedFields": [_managed_fields("helm", moment, ("app",), "")],
        },
        "spec": {
            "clusterIP": cluster_ip,
            "clusterIPs": [cluster_ip],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": port, "protocol": "TCP", "targetPort": "http"}],
            "selector": {"app.kubernetes.io/name": name},
            "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def make_endpoint_slice(
    service: str, namespace: str, pods: Mapping[str, str], port: int, suffix: str = "x7k2p"
) -> Json:
    """A discovery.k8s.io/v1 EndpointSlice: ``pods`` maps names to addresses."""
    moment = timestamp()
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-{suffix}",
            "generateName": f"{service}-",
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": moment,
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "managedFields": [_managed_fields("kube-controller-manager", moment, ("app",), "")],
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": "node-a",
                "targetRef": {"kind": "Pod", "name": pod, "namespace": namespace, "uid": str(uuid.uuid4())},
                "zone": "zone-a",
            }
            for pod, address in pods.items()
        ],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    }


def _container(name: str, image: str) -> Json:
    probe = {
        "httpGet": {"path": "/healthz", "port": "http", "scheme": "HTTP"},
        "timeoutSeconds": 1,
        "periodSeconds": 10,
        "successThreshold": 1,
        "failureThreshold": 3,
    }
    return {
        "name": name,
        "image": image.replace("{}", name),
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "env": [
            {"name": "LOG_LEVEL", "value": "info"},
            {"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "database", "key": "url"}}},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
        ],
        "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [
            {
                "name": "kube-api-access-x7k2p",
                "readOnly": True,
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
            }
        ],
        "livenessProbe": probe,
        "readinessProbe": probe,
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
    }


def _container_status(
    name: str, container_id: str | None, image: str, runtime: str, started: str, phase: str, restarts: int
) -> Json:
    reference = image.replace("{}", name)
    full_id = f"{runtime}://{container_id}" if container_id else ""
    running = phase == "Running" and container_id is not None
    if running:
        state: Json = {"running": {"startedAt": started}}
    elif container_id is None or phase == "Pending":
        state = {"waiting": {"reason": "ContainerCreating"}}
    else:
        code = 1 if phase == "Failed" else 0
        reason = "Error" if code else "Completed"
        state = {"terminated": {"exitCode": code, "reason": reason, "startedAt": started, "containerID": full_id}}
    repository = reference.rpartition(":")[0] or reference
    digest = uuid.uuid5(uuid.NAMESPACE_URL, reference).hex * 2
    status: Json = {
        "name": name,
        "state": state,
        "lastState": {},
        "ready": running,
        "restartCount": restarts,
        "image": reference,
        "imageID": f"{repository}@sha256:{digest}" if container_id else "",
        "started": running,
    }
    return status | ({"containerID": full_id} if container_id else {})


def _managed_fields(manager: str, moment: str, containers: Iterable[str], subresource: str) -> Json:
    """The bulk of a real pod's JSON, and of no use to anybody here."""
    leaf: Json = {}
    fields: Json
    if subresource:
        conditions = ("ContainersReady", "Initialized", "PodReadyToStartContainers", "Ready")
        condition = {"f:lastProbeTime": leaf, "f:lastTransitionTime": leaf, "f:status": leaf, "f:type": leaf}
        fields = {
            "f:status": {
                "f:conditions": {f'k:{{"type":"{name}"}}': {".": leaf} | condition for name in conditions},
                "f:containerStatuses": leaf,
                "f:hostIP": leaf,
                "f:phase": leaf,
                "f:podIP": leaf,
                "f:podIPs": {".": leaf, 'k:{"ip":"10.244.1.17"}': {".": leaf, "f:ip": leaf}},
                "f:startTime": leaf,
            }
        }
    else:
        probe = {
            f"f:{name}": leaf for name in ("failureThreshold", "periodSeconds", "successThreshold", "timeoutSeconds")
        }
        probe |= {"f:httpGet": {".": leaf, "f:path": leaf, "f:port": leaf, "f:scheme": leaf}}
        container = {
            ".": leaf,
            "f:env": {".": leaf, 'k:{"name":"LOG_LEVEL"}': {".": leaf, "f:name": leaf, "f:value": leaf}},
            "f:image": leaf,
            "f:imagePullPolicy": leaf,
            "f:livenessProbe": probe,
            "f:name": leaf,
            "f:ports": {".": leaf, 'k:{"containerPort":8080,"protocol":"TCP"}': {".": leaf, "f:name": leaf}},
            "f:readinessProbe": probe,
            "f:resources": {".": leaf, "f:limits": {".": leaf, "f:memory": leaf}},
            "f:terminationMessagePath": leaf,
            "f:terminationMessagePolicy": leaf,
        }
        fields = {
            "f:metadata": {"f:generateName": leaf, "f:labels": {".": leaf}, "f:ownerReferences": {".": leaf}},
            "f:spec": {
                "f:containers": {f'k:{{"name":"{name}"}}': container for name in containers},
                "f:dnsPolicy": leaf,
                "f:restartPolicy": leaf,
                "f:schedulerName": leaf,
                "f:terminationGracePeriodSeconds": leaf,
            },
        }
    entry = {"manager": manager, "operation": "Update", "apiVersion": "v1", "time": moment, "fieldsType": "FieldsV1"}
    return entry | {"fieldsV1": fields} | ({"subresource": subresource} if subresource else {})


# -------------------------------------------------------------------------------------------------- command line


def _command(server: ApiServer, command: Json) -> Any:
    if "put" in command:
        return server.put(command["put"])["metadata"]["resourceVersion"]
    if "delete" in command:
        server.delete(*command["delete"])
    if "compact" in command:
        server.compact()
    if "rotate_token" in command:
        server.rotate_token()
    if "drop_connections" in command:
        return server.drop_connections()
    if "deny" in command:
        server.deny = {(verb, resource) for verb, resource in command["deny"]}
    if "requests" in command:
        return [asdict(request) | {"token": ""} for request in list(server.requests)]
    if "events" in command:
        return list(server.recorded_events)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.apiserver", description="A stand-in Kubernetes API server.")
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1", "::1"))
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service-account", type=Path, metavar="DIR", help="mount a service account there")
    parser.add_argument("--namespace", default="spanloom", help="of the service account")
    parser.add_argument("--node", default="node-a", help="the node of the pods that are made")
    parser.add_argument("--pods", type=int, default=0, help="make this many pods")
    parser.add_argument("--bookmark-seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with ApiServer(options.host, options.port, bookmark_seconds=options.bookmark_seconds) as server:
        if options.service_account is not None:
            server.write_service_account(options.service_account, options.namespace)
        for number in range(options.pods):
            server.put(make_pod(f"made-{number}", node=options.node, owner=("ReplicaSet", "made")))
        print(json.dumps(server.environ), flush=True)

        def obey() -> None:
            for line in sys.stdin:
                try:
                    answer = {"ok": _command(server, json.loads(line))}
                except Exception as error:
                    answer = {"error": repr(error)}
                print(json.dumps(answer), flush=True)

        threading.Thread(target=obey, daemon=True).start()
        stopped.wait()
        print(json.dumps(server.summary()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
