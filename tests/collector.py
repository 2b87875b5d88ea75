"""A real OTLP/gRPC trace collector for tests, benchmarks and the demo.

In: ``TraceService/Export`` calls on 127.0.0.1. Out: the decoded spans as plain records, the requests with their
metadata, and scripted answers. Payloads are kept as bytes and decoded with the official stubs only when asked for.

``python -m tests.collector --port 0 --count-only`` prints its port on the first line and serves until SIGTERM or
SIGINT, then prints the number of spans received on the last line. With ``--count-only`` it keeps nothing and finds the
span boundaries by skipping over lengths, so that it takes little CPU next to an agent that is being measured. On
SIGUSR1 it prints the number so far. Without the option it prints one JSON object per span as they arrive.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field

import grpc

METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
GRPC_OPTIONS = (("grpc.max_receive_message_length", -1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to answer to one request; requests beyond the script are accepted.

    ``delay_seconds`` passes first. With ``hang`` the answer never comes (until the caller gives up or the collector
    stops). With a ``code`` the call fails with it, with ``retry_delay_seconds`` as RetryInfo when not None. Otherwise
    the call succeeds, as a partial success when ``rejected_spans`` or ``message`` is set.
    """

    code: grpc.StatusCode | None = None
    message: str = ""
    retry_delay_seconds: float | None = None
    rejected_spans: int = 0
    delay_seconds: float = 0.0
    hang: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One Export call as it arrived. ``time_seconds`` is time.monotonic(); ``accepted`` is False when it was failed."""

    metadata: dict[str, str | bytes]
    payload: bytes
    span_count: int
    time_seconds: float
    accepted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedLink:
    trace_id: str
    span_id: str
    trace_state: str
    attributes: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedSpan:
    """A decoded span. Ids are lower-case hex, ``parent_span_id`` empty for a root; times are Unix nanoseconds.

    ``kind`` and ``status`` are the short names of the enums: ``SERVER``, ``CLIENT``, …; ``UNSET``, ``OK``, ``ERROR``.
    Array attributes are lists.
    """

    trace_id: str
    span_id: str
    parent_span_id: str
    trace_state: str
    flags: int
    name: str
    kind: str
    start_time_ns: int
    end_time_ns: int
    status: str
    status_message: str
    attributes: dict[str, object]
    resource: dict[str, object]
    links: list[CollectedLink]
    scope_name: str
    scope_version: str
    schema_url: str


@dataclass(slots=True)
class _State:
    requests: list[Request] = field(default_factory=list)
    script: deque[Answer] = field(default_factory=deque)
    span_count: int = 0
    request_count: int = 0


class Collector:
    """A TraceService on 127.0.0.1. Usable as a context manager; ``start`` after ``stop`` takes the same port again.

    ``port`` 0 lets the kernel choose at the first start. ``tls`` is ``(key, certificate)`` in PEM, ``client_ca`` a PEM
    certificate that client certificates must be signed with. With ``keep=False`` only counts are kept. ``on_payload``
    is called on a gRPC thread with each accepted payload.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        tls: tuple[bytes, bytes] | None = None,
        client_ca: bytes | None = None,
        keep: bool = True,
        on_payload: Callable[[bytes], None] | None = None,
    ) -> None:
        self.port = port
        self._tls = tls
        self._client_ca = client_ca
        self._keep = keep
        self._on_payload = on_payload
        self._server: grpc.Server | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._state = _State()
        self._decoded: list[CollectedSpan] = []
        self._decoded_requests = 0

    def __enter__(self) -> Collector:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._server is not None:
            raise RuntimeError("the collector runs already")
        self._stopping.clear()
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=GRPC_OPTIONS)
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        service, _, method = METHOD.strip("/").partition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        address = f"127.0.0.1:{self.port}"
        if self._tls is None:
            self.port = server.add_insecure_port(address)
        else:
            credentials = grpc.ssl_server_credentials(
                (self._tls,), root_certificates=self._client_ca, require_client_auth=self._client_ca is not None
            )
            self.port = server.add_secure_port(address, credentials)
        server.start()
        self._server = server

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Stop listening; calls in progress are aborted after ``grace_seconds``. The spans stay readable."""
        if self._server is not None:
            self._stopping.set()
            self._server.stop(grace_seconds).wait()
            self._server = None

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def endpoint(self) -> str:
        """The address as an OTLP endpoint URL."""
        return f"{'http' if self._tls is None else 'https'}://{self.address}"

    @property
    def requests(self) -> list[Request]:
        """All calls so far, failed ones included; empty with ``keep=False``."""
        with self._changed:
            return list(self._state.requests)

    @property
    def span_count(self) -> int:
        """Spans in accepted requests so far."""
        return self._state.span_count

    @property
    def request_count(self) -> int:
        return self._state.request_count

    def answer(self, *answers: Answer) -> None:
        """Append answers to the script; each is used for one request, in the order of arrival."""
        with self._changed:
            self._state.script.extend(answers)

    def clear(self) -> None:
        """Forget requests, counts and the script."""
        with self._changed:
            self._state = _State()
            self._decoded = []
            self._decoded_requests = 0

    def spans(self) -> list[CollectedSpan]:
        """All spans of accepted requests, in the order of arrival."""
        with self._changed:
            for request in self._state.requests[self._decoded_requests :]:
                if request.accepted:
                    self._decoded.extend(decode(request.payload))
            self._decoded_requests = len(self._state.requests)
            return list(self._decoded)

    def wait_for(self, what: int | Callable[[list[CollectedSpan]], object], timeout_seconds: float = 10.0) -> bool:
        """Wait for that many spans, or until ``what(spans)`` is true. False when the time is up first."""

        def reached() -> object:
            return self.span_count >= what if isinstance(what, int) else what(self.spans())

        with self._changed:
            return bool(self._changed.wait_for(reached, timeout_seconds))

    def wait_for_requests(self, count: int, timeout_seconds: float = 10.0) -> bool:
        """Wait for that many calls, failed and hanging ones included. False when the time is up first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state.request_count >= count, timeout_seconds)

    def _export(self, payload: bytes, context: grpc.ServicerContext) -> bytes:
        span_count = count_spans(payload)
        with self._changed:
            state = self._state
            answer = state.script.popleft() if state.script else None
            accepted = answer is None or (answer.code is None and not answer.hang)
            if self._keep:
                request = Request(
                    metadata=dict(context.invocation_metadata()),
                    payload=payload,
                    span_count=span_count,
                    time_seconds=time.monotonic(),
                    accepted=accepted,
                )
                state.requests.append(request)
            state.request_count += 1
            if accepted:
                state.span_count += span_count
            self._changed.notify_all()
        if accepted and self._on_payload is not None:
            self._on_payload(payload)
        return b"" if answer is None else self._perform(answer, context)

    def _perform(self, answer: Answer, context: grpc.ServicerContext) -> bytes:
        if answer.hang:
            while context.is_active() and not self._stopping.wait(0.01):
                pass
            context.abort(grpc.StatusCode.UNAVAILABLE, "the collector stops")
        if answer.delay_seconds:
            self._stopping.wait(answer.delay_seconds)
        if answer.code is not None:
            if answer.retry_delay_seconds is not None:
                details = status_with_retry_info(answer.code.value[0], answer.message, answer.retry_delay_seconds)
                context.set_trailing_metadata((("grpc-status-details-bin", details),))
            context.abort(answer.code, answer.message)
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        response = ExportTraceServiceResponse()
        if answer.rejected_spans or answer.message:
            response.partial_success.rejected_spans = answer.rejected_spans
            response.partial_success.error_message = answer.message
        return response.SerializeToString()


def status_with_retry_info(code: int, message: str, delay_seconds: float) -> bytes:
    """A serialized ``google.rpc.Status`` with a RetryInfo, as it stands in ``grpc-status-details-bin``.

    The two google.rpc messages have no stubs here, so their fields are set on messages of the same wire shape:
    Any and Duration are protobuf's own, and a message with one message field 1 is an ExportTraceServiceResponse.
    """
    from google.protobuf.any_pb2 import Any
    from google.protobuf.duration_pb2 import Duration

    duration = Duration()
    duration.FromNanoseconds(int(delay_seconds * 1e9))
    retry_info = _delimited(0x0A, duration.SerializeToString())
    detail = Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry_info)
    return bytes((0x08, code)) + _delimited(0x12, message.encode()) + _delimited(0x1A, detail.SerializeToString())


def _delimited(tag: int, body: bytes) -> bytes:
    length = len(body)
    if length >= 16384:
        raise ValueError("only for short messages")
    size = bytes((length,)) if length < 128 else bytes((length & 127 | 128, length >> 7))
    return bytes((tag,)) + size + body


def count_spans(payload: bytes) -> int:
    """The spans of a serialized ExportTraceServiceRequest, found by skipping over lengths.

    Raises ValueError for bytes that do not have this shape.
    """
    spans = 0
    for resource_start, resource_end in _elements(payload, 0, len(payload), 1):
        for scope_start, scope_end in _elements(payload, resource_start, resource_end, 2):
            # The loop of _elements once more without a generator: this runs once per span.
            offset = scope_start
            while offset < scope_end:
                tag = payload[offset]
                if tag & 7 != 2 or tag > 127:
                    raise ValueError(f"tag {tag} in ScopeSpans")
                length = payload[offset + 1]
                offset += 2
                if length > 127:
                    length &= 127
                    shift = 7
                    while True:
                        byte = payload[offset]
                        offset += 1
                        length |= (byte & 127) << shift
                        if byte < 128:
                            break
                        shift += 7
                offset += length
                if tag == 0x12:
                    spans += 1
            if offset != scope_end:
                raise ValueError("a span reaches beyond its ScopeSpans")
    return spans


def _elements(payload: bytes, offset: int, end: int, wanted: int) -> Iterable[tuple[int, int]]:
    """``(start, end)`` of the length-delimited fields numbered ``wanted`` of the message at ``offset``."""
    while offset < end:
        tag = payload[offset]
        if tag & 7 != 2 or tag > 127:
            raise ValueError(f"tag {tag}")
        length = shift = 0
        while True:
            offset += 1
            byte = payload[offset]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        offset += 1
        if tag >> 3 == wanted:
            yield offset, offset + length
        offset += length
    if offset != end:
        raise ValueError("an element reaches beyond its message")


def decode(payload: bytes) -> list[CollectedSpan]:
    """The spans of a serialized ExportTraceServiceRequest, by the official stubs."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1 import trace_pb2

    request = ExportTraceServiceRequest.FromString(payload)
    spans = []
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                links = [
                    CollectedLink(
                        trace_id=link.trace_id.hex(),
                        span_id=link.span_id.hex(),
                        trace_state=link.trace_state,
                        attributes=_attributes(link.attributes),
                    )
                    for link in span.links
                ]
                collected = CollectedSpan(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_span_id=span.parent_span_id.hex(),
                    trace_state=span.trace_state,
                    flags=span.flags,
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    start_time_ns=span.start_time_unix_nano,
                    end_time_ns=span.end_time_unix_nano,
                    status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    status_message=span.status.message,
                    attributes=_attributes(span.attributes),
                    resource=resource,
                    links=links,
                    scope_name=scope_spans.scope.name,
                    scope_version=scope_spans.scope.version,
                    schema_url=scope_spans.schema_url,
                )
                spans.append(collected)
    return spans


def _attributes(pairs: Iterable) -> dict[str, object]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.collector", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 lets the kernel choose")
    parser.add_argument("--count-only", action="store_true", help="keep nothing, print the total at the end")
    options = parser.parse_args(arguments)

    def print_spans(payload: bytes) -> None:
        lines = "".join(json.dumps(asdict(span)) + "\n" for span in decode(payload))
        sys.stdout.write(lines)
        sys.stdout.flush()

    # Blocked before gRPC starts its threads, so that the signals come to sigwait and to nothing else.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    collector = Collector(port=options.port, keep=False, on_payload=None if options.count_only else print_spans)
    collector.start()
    print(collector.port, flush=True)
    while signal.sigwait(signals) == signal.SIGUSR1:
        print(collector.span_count, flush=True)
    collector.stop(grace_seconds=0.5)
    print(collector.span_count, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
