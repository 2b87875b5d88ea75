"""What the demo sends, which spans have to come of it, and what is wrong with those that came.

In: a number of requests; the spans that the agent found. Out: requests with the spans that each of them must become;
the spans by request; faults in words. Never: a process, a socket, a clock.

The topology is known here, so "whole" is not a matter of opinion: a trace is whole when it has exactly the expected
spans, one root, every other span under the right parent, and the right statuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from agent.model import Span, SpanKind
from agent.process import ProcessInfo

Item = tuple[Span, ProcessInfo]

ENTRIES = ("gateway", "stock")
"""The services that requests are sent to."""

_ARTICLES = ("coffee", "tea", "cocoa", "sugar", "honey")
_FAILING_ARTICLE = "gold"
_MARKER = re.compile(r"[?&]request=(\d+)\b")
_SHOWN_STRAYS = 3


class Key(NamedTuple):
    """What tells a span from all others of its trace."""

    service: str
    kind: int
    path: str

    def __str__(self) -> str:
        return f"{self.service} {'→ ' if self.kind == SpanKind.CLIENT else ''}GET {self.path}"


class Expected(NamedTuple):
    """A span that must be there; ``parent`` is None for the root."""

    key: Key
    parent: Key | None
    status: int

    @property
    def error(self) -> bool:
        """Semantic conventions, HTTP spans, "Status": 4xx is an error for the client only."""
        return self.status >= (400 if self.key.kind == SpanKind.CLIENT else 500)


class Request(NamedTuple):
    """One request of the demo's client. Numbers begin with 1; the number is in the query, which finds the trace."""

    number: int
    entry: str
    path: str
    headers: tuple[tuple[str, str], ...]
    told: str
    trace_id: bytes | None
    parent_span_id: bytes
    expected: tuple[Expected, ...]

    @property
    def target(self) -> str:
        return f"{self.path}?request={self.number}"

    @property
    def status(self) -> int:
        return self.expected[0].status

    def __str__(self) -> str:
        return f"GET {self.path} {self.told}"


def make_requests(count: int, random_bytes: Callable[[int], bytes]) -> list[Request]:
    """The requests of the demo. Five kinds take turns; each shows another way in which a trace holds together."""
    return [_make_request(number, random_bytes) for number in range(1, count + 1)]


def _make_request(number: int, random_bytes: Callable[[int], bytes]) -> Request:
    article = _ARTICLES[(number - 1) % len(_ARTICLES)]
    trace_id, span_id = random_bytes(16), random_bytes(8)
    traceparent = ("traceparent", f"00-{trace_id.hex()}-{span_id.hex()}-01")
    kind = (number - 1) % 5
    if kind == 0:
        headers, told = (traceparent,), "with a W3C traceparent header"
    elif kind == 1:
        headers, told = (("x-request-id", random_bytes(8).hex()),), "with an x-request-id and no trace header"
    elif kind == 2:
        article = _FAILING_ARTICLE
        headers, told = (traceparent,), "with a W3C traceparent header; the price service fails"
    elif kind == 3:
        headers, told = (), "straight to the stock, without any header"
        path = f"/stock/{article}"
        return Request(number, "stock", path, headers, told, None, b"", _through_stock("client", path, article, None))
    else:
        headers, told = (("b3", f"{trace_id.hex()}-{span_id.hex()}-1"),), "with a B3 header"
    if kind == 1:
        trace_id, span_id = None, b""
    path = f"/articles/{article}"
    return Request(number, "gateway", path, headers, told, trace_id, span_id, _through_gateway(path, article))


def _through_gateway(path: str, article: str) -> tuple[Expected, ...]:
    fails = article == _FAILING_ARTICLE
    status = 502 if fails else 200
    client, gateway, proxied, shop = (
        Key("client", SpanKind.CLIENT, path),
        Key("gateway", SpanKind.SERVER, path),
        Key("gateway", SpanKind.CLIENT, path),
        Key("shop", SpanKind.SERVER, path),
    )
    asked, price = (
        Key("shop", SpanKind.CLIENT, f"/price/{article}"),
        Key("price", SpanKind.SERVER, f"/price/{article}"),
    )
    return (
        Expected(client, None, status),
        Expected(gateway, client, status),
        Expected(proxied, gateway, status),
        Expected(shop, proxied, status),
        *_through_stock("shop", f"/stock/{article}", article, shop),
        Expected(asked, shop, 500 if fails else 200),
        Expected(price, asked, 500 if fails else 200),
    )


def _through_stock(caller: str, path: str, article: str, parent: Key | None) -> tuple[Expected, ...]:
    asked, stock = Key(caller, SpanKind.CLIENT, path), Key("stock", SpanKind.SERVER, path)
    called, warehouse = (
        Key("stock", SpanKind.CLIENT, f"/rack/{article}"),
        Key("warehouse", SpanKind.SERVER, f"/rack/{article}"),
    )
    return (
        Expected(asked, parent, 200),
        Expected(stock, asked, 200),
        Expected(called, stock, 200),
        Expected(warehouse, called, 200),
    )


class Sorted(NamedTuple):
    """Spans by the request that they belong to, and the traces that belong to none."""

    by_request: dict[int, list[Item]]
    strays: list[list[Item]]


def sort_spans(items: Sequence[Item], requests: Sequence[Request]) -> Sorted:
    """Group spans into traces and find the request of each: by its trace id, or by the number in a span's query."""
    traces: dict[bytes, list[Item]] = {}
    for item in items:
        traces.setdefault(item[0].trace_id, []).append(item)
    by_request: dict[int, list[Item]] = {request.number: [] for request in requests}
    numbers = {request.trace_id: request.number for request in requests if request.trace_id is not None}
    strays = []
    for trace_id, trace in traces.items():
        number = numbers.get(trace_id) or _marked_number(trace)
        # A second trace with the same number: the first one, in which the client stands, is the request's own.
        if number not in by_request or (by_request[number] and not _has_client(trace)):
            strays.append(trace)
        else:
            if by_request[number]:
                strays.append(by_request[number])
            by_request[number] = trace
    return Sorted(by_request, strays)


def _marked_number(trace: Sequence[Item]) -> int:
    for span, _ in trace:
        for key, value in span.attributes:
            if key in ("url.full", "url.query"):
                match = _MARKER.search(f"?{value}" if key == "url.query" else str(value))
                if match is not None:
                    return int(match[1])
    return 0


def _has_client(trace: Sequence[Item]) -> bool:
    return any(info.service_name == "client" for _, info in trace)


def faults_of_trace(request: Request, trace: Sequence[Item]) -> list[str]:
    """What keeps the trace of a request from being whole, each in a few words; empty when it is whole."""
    found: dict[Key, Span] = {}
    counts: Counter[Key] = Counter()
    for span, info in trace:
        key = key_of(span, info)
        counts[key] += 1
        found[key] = span
    expected = {one.key: one for one in request.expected}
    faults = [f"the span '{key}' is missing" for key in expected if key not in counts]
    for key, count in counts.items():
        if key not in expected:
            faults.append(f"the span '{key}' does not belong here")
        elif count > 1:
            faults.append(f"the span '{key}' is there {count} times")
    if request.trace_id is not None and any(span.trace_id != request.trace_id for span, _ in trace):
        faults.append("the trace id is not the one that was sent")
    by_id = {span.span_id: key_of(span, info) for span, info in trace}
    for key, wanted in expected.items():
        if counts[key] != 1:
            continue
        span = found[key]
        if wanted.parent is None:
            if span.parent_span_id != request.parent_span_id:
                faults.append(f"'{key}' should be the root, but is {_place(span, by_id)}")
        elif by_id.get(span.parent_span_id) != wanted.parent:
            faults.append(f"'{key}' should be under '{wanted.parent}', but is {_place(span, by_id)}")
        status = dict(span.attributes).get("http.response.status_code")
        if status != wanted.status:
            faults.append(f"'{key}' should have the status {wanted.status}, but has {status or 'none'}")
        elif span.error != wanted.error:
            faults.append(f"'{key}' should {'' if wanted.error else 'not '}be shown as failed")
    return faults


def faults_of_strays(strays: Sequence[Sequence[Item]]) -> list[str]:
    """One line for each trace that no request explains, the first few of them."""
    faults = []
    for trace in strays[:_SHOWN_STRAYS]:
        names = ", ".join(f"'{key_of(span, info)}'" for span, info in trace[:4])
        more = f" and {len(trace) - 4} more" if len(trace) > 4 else ""
        faults.append(f"a trace belongs to no request: {names}{more}")
    if len(strays) > _SHOWN_STRAYS:
        faults.append(f"and {len(strays) - _SHOWN_STRAYS} more such traces")
    return faults


def key_of(span: Span, info: ProcessInfo) -> Key:
    """The key of a span of the demo."""
    attributes = dict(span.attributes)
    path = str(attributes.get("url.path", ""))
    if span.kind == SpanKind.CLIENT:
        path = urlsplit(str(attributes.get("url.full", ""))).path
    return Key(info.service_name, span.kind, path)


def _place(span: Span, by_id: dict[bytes, Key]) -> str:
    if not span.parent_span_id:
        return "a root"
    parent = by_id.get(span.parent_span_id)
    return f"under '{parent}'" if parent else f"under {span.parent_span_id.hex()}, which is not there"
