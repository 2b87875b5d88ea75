"""What the agent says about itself: Prometheus metrics, ``/healthz``, ``/readyz``, and log events on stderr.

In: counters that the stages keep as plain attributes, read when somebody scrapes and at no other time, so they cost
the hot path nothing; two callables for health and readiness. Out: HTTP responses on one small listening socket; log
lines. Never: a thread per connection, a wait for a slow client, an exception for anything a client may send.

``prometheus_client`` is imported at the first scrape: an agent that nobody scrapes does not pay for it.
"""

from __future__ import annotations

import logging
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import msgspec

from agent.errors import ConfigError

_log = logging.getLogger("spanloom.telemetry")

# ---------------------------------------------------------------------------------------------------- metrics


class Metric(msgspec.Struct, frozen=True):
    """The declaration of one metric, as documented and as exposed.

    ``name`` is the exposed name; that of a counter ends in ``_total``. ``kind`` is ``counter`` or ``gauge``.
    ``labels`` names the labels, whose values must come from a small fixed set. Raises ValueError for anything else.
    """

    name: str
    help: str
    kind: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("counter", "gauge"):
            raise ValueError(f"{self.name}: the kind is counter or gauge, not {self.kind}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: lower case letters, digits and _; _total at the end of counters only")


Readings = Mapping[str, "float | Mapping[str | tuple[str, ...], float]"]
"""Metric name -> its value, or its values by label values (a plain string where there is just one label)."""


class Source(msgspec.Struct, frozen=True):
    """The metrics of one stage and how to read them all at one moment.

    ``read`` is called once per scrape, in the telemetry thread, and must not wait. A metric it leaves out is not
    exposed; a source that raises is left out of that scrape, logged once and counted.
    """

    metrics: tuple[Metric, ...]
    read: Callable[[], Readings]


SOURCE_ERRORS = Metric(
    "spanloom_telemetry_source_errors_total", "Metric sources that failed, summed over all scrapes.", "counter"
)


class _Collector:
    """Turns sources into metric families of ``prometheus_client`` (its Collector protocol)."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._errors = 0
        self._reported: set[int] = set()

    def describe(self) -> list[Any]:
        return []  # without it the registry would collect at registration

    def collect(self) -> Iterator[Any]:
        for index, source in enumerate(self._sources):
            try:
                readings = source.read()
                families = [
                    _family(metric, readings[metric.name]) for metric in source.metrics if metric.name in readings
                ]
            except Exception as error:  # a defect of one stage must not hide the metrics of the others
                self._errors += 1
                if index not in self._reported:
                    self._reported.add(index)
                    event(
                        _log,
                        "metric_source_failed",
                        level=logging.ERROR,
                        first_metric=source.metrics[0].name if source.metrics else "",
                        error=repr(error),
                    )
                continue
            yield from families
        yield _family(SOURCE_ERRORS, self._errors)


def _family(metric: Metric, reading: float | Mapping[str | tuple[str, ...], float]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        metric.name, metric.help, labels=metric.labels
    )
    # dict() copies at once, so that another thread may add a label value meanwhile.
    values = dict(reading) if isinstance(reading, Mapping) else {(): reading}
    for key, value in values.items():
        label_values = (key,) if isinstance(key, str) else key
        if len(label_values) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, not {len(label_values)} values")
        family.add_metric(label_values, value)
    return family


class _Exposition:
    """The registry and its text form, made at the first scrape."""

    def __init__(self, sources: Sequence[Source]) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(sources))
        ProcessCollector(registry=self._registry)  # process_cpu_seconds_total, process_resident_memory_bytes, ...

    def render(self, accept: str) -> tuple[str, bytes]:
        """Content type and body in the best format for an ``Accept`` header."""
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest

        try:
            encode, content_type = choose_encoder(accept)
            # The version is the client's own text, and the library takes one with line feeds around it.
            if not (content_type.isascii() and content_type.isprintable()):
                raise ValueError(f"a version with characters that no header may have: {content_type!r}")
            return content_type, encode(self._registry)
        except (LookupError, TypeError, ValueError):  # a version or an escaping scheme that does not exist
            return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)


# ---------------------------------------------------------------------------------------------------- server

_MAX_CONNECTIONS = 8  # one more closes the oldest, so a client that holds connections cannot lock out a probe
_REQUEST_HEAD_BYTES = 8192  # a longer head, its empty line included, is answered with 431
_CONNECTION_SECONDS = 5.0  # from accept to close, however slowly the client reads or writes
_LINGER_SECONDS = 1.0  # for the client to close after the response; unread input would turn close into a reset

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}
_REASONS |= {431: "Request Header Fields Too Large", 503: "Service Unavailable"}


class _Connection:
    """One accepted socket. ``outgoing`` is None while the request is being read."""

    __slots__ = ("deadline", "incoming", "outgoing", "sock")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.incoming = bytearray()
        self.outgoing: memoryview | None = None


class Telemetry:
    """The HTTP endpoint: GET and HEAD of ``/metrics``, ``/healthz``, ``/readyz``.

    ``is_ready`` and ``is_healthy`` are called in the telemetry thread and must not wait. One thread serves at most
    eight connections, each for five seconds at most and for one request. It is a daemon thread: it never keeps the
    agent alive.
    """

    def __init__(self, sources: Sequence[Source], is_ready: Callable[[], bool], is_healthy: Callable[[], bool]) -> None:
        self._sources = tuple(sources)
        self._is_ready = is_ready
        self._is_healthy = is_healthy
        self._exposition: _Exposition | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._connections: dict[_Connection, None] = {}  # oldest first
        self.port = 0

    def start(self, listen: str) -> None:
        """Listen on ``host:port`` (``[::1]:9469``, ``:9469`` for all addresses, port 0 for a free one).

        Raises ConfigError, naming ``telemetry.listen``, for what is no address, is not ours or is in use.
        """
        host, port = parse_listen(listen)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.create_server(address[:2], family=family, backlog=16)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"telemetry.listen: cannot listen on {listen}: {reason}; choose another address"
            ) from error
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        wake_receiver, self._waker = socket.socketpair()
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(wake_receiver, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._serve, args=(selector, listener, wake_receiver), name="telemetry", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the socket and every connection. May be called twice, and without ``start``."""
        if self._waker is None or self._thread is None:
            return
        self._waker.close()
        self._thread.join(timeout=2.0)
        self._waker = self._thread = None

    def _serve(self, selector: selectors.BaseSelector, listener: socket.socket, wake_receiver: socket.socket) -> None:
        try:
            while True:
                for key, _ in selector.select(self._seconds_to_next_deadline()):
                    if key.fileobj is wake_receiver:
                        return
                    if key.fileobj is listener:
                        self._accept(selector, listener)
                    elif key.data in self._connections:  # not closed by an accept of the same round
                        self._advance(selector, key.data)
                now = time.monotonic()
                for connection in [c for c in self._connections if c.deadline <= now]:
                    self._close(selector, connection)
        finally:
            for connection in list(self._connections):
                self._close(selector, connection)
            listener.close()
            wake_receiver.close()
            selector.close()

    def _seconds_to_next_deadline(self) -> float | None:
        if not self._connections:
            return None
        return max(0.0, min(connection.deadline for connection in self._connections) - time.monotonic())

    def _accept(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: do not spin on the readable listener
            event(_log, "telemetry_accept_failed", level=logging.WARNING, error=str(error))
            time.sleep(0.1)
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            self._close(selector, next(iter(self._connections)))
        sock.setblocking(False)
        connection = _Connection(sock, time.monotonic() + _CONNECTION_SECONDS)
        self._connections[connection] = None
        selector.register(sock, selectors.EVENT_READ, connection)

    def _close(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        del self._connections[connection]
        selector.unregister(connection.sock)
        connection.sock.close()

    def _advance(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        """One step of read request -> write response -> wait for the client to close."""
        try:
            if connection.outgoing is None:
                data = connection.sock.recv(_REQUEST_HEAD_BYTES)
                if not data:
                    self._close(selector, connection)
                    return
                connection.incoming += data
                # Within the bound only, so that the answer does not depend on how the head is cut into segments.
                head_bytes = connection.incoming.find(b"\r\n\r\n", 0, _REQUEST_HEAD_BYTES)
                if head_bytes < 0 and len(connection.incoming) < _REQUEST_HEAD_BYTES:
                    return
                response = self._respond(bytes(connection.incoming[:head_bytes])) if head_bytes >= 0 else _response(431)
                connection.outgoing = memoryview(response)
                selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
            elif connection.outgoing:
                connection.outgoing = connection.outgoing[connection.sock.send(connection.outgoing) :]
                if not connection.outgoing:
                    connection.sock.shutdown(socket.SHUT_WR)
                    connection.deadline = min(connection.deadline, time.monotonic() + _LINGER_SECONDS)
                    selector.modify(connection.sock, selectors.EVENT_READ, connection)
            elif not connection.sock.recv(_REQUEST_HEAD_BYTES):
                self._close(selector, connection)
        except BlockingIOError:
            return
        except OSError:  # the client is gone
            self._close(selector, connection)

    def _respond(self, head: bytes) -> bytes:
        """The response to a request head without its final empty line; never raises."""
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"([!-~]{1,32}) ([!-~]+) HTTP/1\.[01]", lines[0])
        if match is None:
            return _response(400)
        method, target = match.groups()
        with_body = method != "HEAD"
        if method not in ("GET", "HEAD"):
            return _response(405, extra="Allow: GET, HEAD\r\n")
        try:
            match target.partition("?")[0]:
                case "/healthz":
                    return _state(self._is_healthy(), "ok", "not healthy: a stage of the agent has failed", with_body)
                case "/readyz":
                    return _state(self._is_ready(), "ready", "not ready: the probes are not attached", with_body)
                case "/metrics":
                    if self._exposition is None:
                        self._exposition = _Exposition(self._sources)
                    accept = next((line[7:] for line in lines[1:] if line[:7].lower() == "accept:"), "")
                    content_type, body = self._exposition.render(accept.strip())
                    return _response(200, body, content_type, with_body)
        except Exception as error:  # the endpoint has to outlive a defect in what it asks
            event(_log, "telemetry_request_failed", level=logging.ERROR, target=target[:64], error=repr(error))
            return _response(500, with_body=with_body)
        return _response(404, with_body=with_body)


def _state(is_good: bool, good: str, bad: str, with_body: bool) -> bytes:
    body = (good if is_good else bad).encode() + b"\n"
    return _response(200 if is_good else 503, body, with_body=with_body)


def _response(
    status: int,
    body: bytes = b"",
    content_type: str = "text/plain; charset=utf-8",
    with_body: bool = True,
    extra: str = "",
) -> bytes:
    body = body or f"{_REASONS[status]}\n".encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode("latin-1", "replace") + (body if with_body else b"")


def parse_listen(listen: str) -> tuple[str, int]:
    """``host:port`` -> its parts; the host may be empty or a bracketed IPv6 address. Raises ConfigError."""
    host, separator, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        not separator
        or not re.fullmatch(r"\d{1,5}", port, re.ASCII)
        or int(port) > 65535
        or (":" in host and not bracketed)
    ):
        raise ConfigError(f"telemetry.listen: {listen!r} is not host:port, as in 127.0.0.1:9469 or [::1]:9469")
    return (host[1:-1] if bracketed else host), int(port)


# ---------------------------------------------------------------------------------------------------- logging

_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "fields"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def event(log: logging.Logger, name: str, /, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event by its name with key-values: ``event(log, "probes_attached", programs=7)``."""
    if log.isEnabledFor(level):
        log.log(level, "%s", name, extra={"fields": fields})


def configure_logging(level: str, format: str, stream: IO[str] | None = None) -> None:
    """Send all log records to stderr (or ``stream``): JSON objects or text, one line each. May be called again.

    ``level`` is debug, info, warning or error and holds for Spanloom's own loggers; libraries speak from warning on.
    ``format`` is json, text, or auto: text on a terminal, else JSON. Raises ConfigError for other values.
    """
    stream = sys.stderr if stream is None else stream
    if level not in _LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(_LEVELS)}")
    if format not in ("auto", "json", "text"):
        raise ConfigError(f"log format {format!r} is not one of auto, json, text")
    if format == "auto":
        format = "text" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    handler.set_name("spanloom")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "spanloom"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("spanloom").setLevel(_LEVELS[level])
    logging.raiseExceptions = False  # a closed stderr must not print a traceback per record


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The key-values of a record, given through ``event`` or through ``extra``."""
    fields = {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}
    fields.update(getattr(record, "fields", {}))
    return fields


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = int(record.created * 1000)
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
        line: dict[str, Any] = {
            "time": f"{clock}.{milliseconds % 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for key, value in _fields(record).items():
            line[f"{key}_" if key in line else key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except (TypeError, ValueError, RecursionError):  # odd keys, lone surrogates
            text = {key: repr(value).encode("utf-8", "replace").decode() for key, value in line.items()}
            return msgspec.json.encode(text).decode()


class _TextFormatter(logging.Formatter):
    """``HH:MM:SS level event key=value``; a traceback follows, indented. Nothing can inject a line or an escape."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        words = [clock, f"{record.levelname.lower():7}", _printable(record.getMessage())]
        words += (f"{key}={_quoted(value)}" for key, value in _fields(record).items())
        lines = [" ".join(words)]
        if record.exc_info:
            lines += ("    " + _printable(line) for line in self.formatException(record.exc_info).splitlines())
        return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not any(character in text for character in ' "=')
    return text if plain else '"' + _printable(text).replace('"', '\\"') + '"'


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
