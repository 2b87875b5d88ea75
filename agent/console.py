"""Finished spans on a text stream: one JSON object per span, or each trace as a waterfall.

In: pairs of ``Span`` and ``ProcessInfo``. Out: text. Never: a terminal escape that came from traffic (names and values
are neutralised first), an unbounded wait for spans that never come, recursion over spans.

``render_trace`` is a pure function; ``TreeConsole`` decides when a trace is shown, ``JsonConsole`` needs no decision.
The module is longer than most because the layout is one thing: columns, tree and bars only make sense together.
"""

from __future__ import annotations

import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from agent.errors import ExportError
from agent.model import AttributeValue, Span, SpanKind

if TYPE_CHECKING:
    from agent.process import ProcessInfo

    Item = tuple[Span, ProcessInfo]

# ---------------------------------------------------------------------------------------------------- JSON

_RESOURCE_KEYS = frozenset(
    ("service.name", "service.namespace", "service.instance.id", "host.name", "process.pid", "process.executable.name")
)
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029]")  # JSON escapes what is below U+0020 by itself


class JsonConsole:
    """Writes each span as one JSON object on a line of its own.

    Keys: ``trace_id``, ``span_id``, ``parent_span_id`` (hex; empty for a root), ``trace_state``, ``name``, ``kind``
    (server, client, internal), ``start``, ``end`` (ISO 8601, UTC, nanoseconds), ``start_time_ns``, ``end_time_ns``,
    ``duration_ns``, ``status`` (unset, error), ``attributes``, ``links``, ``link_method``, ``sampled``, ``resource``.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, spans: Iterable[Item]) -> None:
        """Raises ExportError("console_closed") when nobody reads the stream any more."""
        lines = [_json_line(span, info) for span, info in spans]
        if lines:
            _write(self._stream, "".join(lines))


def _json_line(span: Span, info: ProcessInfo) -> str:
    record = {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex(),
        "trace_state": span.trace_state,
        "name": span.name,
        "kind": _KIND_NAMES.get(span.kind, "internal"),
        "start": _iso_time(span.start_time_ns),
        "end": _iso_time(span.end_time_ns),
        "start_time_ns": span.start_time_ns,
        "end_time_ns": span.end_time_ns,
        "duration_ns": span.end_time_ns - span.start_time_ns,
        "status": "error" if span.error else "unset",
        "attributes": dict(span.all_attributes()),
        "links": [
            {"trace_id": link.trace_id.hex(), "span_id": link.span_id.hex(), "attributes": dict(link.attributes)}
            for link in span.links
        ],
        "link_method": span.link_method,
        "sampled": span.sampled,
        "resource": {key: value for key, value in info.resource if key in _RESOURCE_KEYS},
    }
    try:
        line = msgspec.json.encode(record).decode()
    except UnicodeEncodeError:  # a lone surrogate
        line = json.dumps(record, separators=(",", ":"))
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", line) + "\n"


_KIND_NAMES = {kind.value: kind.name.lower() for kind in SpanKind}


def _iso_time(time_ns: int) -> str:
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest_ns:09d}Z"


def _write(stream: IO[str], text: str) -> None:
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # escapes that are right in JSON strings, and readable elsewhere
            stream.write(re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        raise ExportError("console_closed", f"cannot write to the console: {error}") from error


# ---------------------------------------------------------------------------------------------------- waterfall

_MIN_WIDTH = 60
_MAX_WIDTH = 160  # longer lines are harder to read, not easier
_MAX_SERVICE_CELLS = 20
_MAX_STATUS_CELLS = 22
_MIN_BAR_CELLS = 8
_MAX_INDENT_LEVELS = 12  # deeper spans are drawn at this depth

_RESET, _BOLD, _DIM, _RED = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m"
_KIND_COLOURS = {SpanKind.SERVER: "\x1b[32m", SpanKind.CLIENT: "\x1b[36m", SpanKind.INTERNAL: "\x1b[35m"}


class _Glyphs(NamedTuple):
    branch: str  # a child that has later siblings
    last: str
    pass_by: str  # an ancestor that has later siblings
    client: str
    failed: str
    ellipsis: str
    replacement: str
    bars: dict[int, tuple[str, str, str]]  # kind -> right half of a cell, whole cell, left half
    axis: str
    micro: str


_UNICODE = _Glyphs(
    "├╴", "╰╴", "│ ", "→ ", " ✗", "…", "\ufffd",
    {SpanKind.SERVER: ("╺", "━", "╸"), SpanKind.CLIENT: ("╶", "─", "╴"), SpanKind.INTERNAL: ("╶", "╌", "╴")},
    "─", "µ",
)  # fmt: skip
_ASCII = _Glyphs(
    "|-", "`-", "| ", "> ", " !", "~", "?",
    {SpanKind.SERVER: ("=", "=", "="), SpanKind.CLIENT: ("-", "-", "-"), SpanKind.INTERNAL: (".", ".", ".")},
    "-", "u",
)  # fmt: skip


class _Row(NamedTuple):
    span: Span
    service: str
    title: str
    prefix_chars: int  # how much of the title is tree and arrow
    status: str
    duration: str
    link: str


def render_trace(spans: Sequence[Item], width: int = 100, colour: bool = False, ascii_only: bool = False) -> str:
    """One trace as text: a header (two lines if narrow), a line with the time axis, and one line per span.

    ``width`` is that of the terminal in cells (at least 60, at most 160 are used); no line is longer. Children are
    sorted by start under their parent. A span whose parent is not among ``spans`` stands at the top level, as does the
    earliest span of a parent cycle. ``ascii_only`` also replaces what ASCII cannot show in names.
    """
    if not spans:
        return ""
    glyphs = _ASCII if ascii_only else _UNICODE
    rows = _rows(spans, glyphs)
    start_ns = min(span.start_time_ns for span, _ in spans)
    total_ns = max(span.end_time_ns for span, _ in spans) - start_ns
    total = format_duration(total_ns, glyphs.micro)

    width = max(_MIN_WIDTH, min(width, _MAX_WIDTH))
    gap = "  " if width >= 80 else " "
    service_cells = max(7, min(max(_cells(row.service) for row in rows), _MAX_SERVICE_CELLS, width // 6))
    status_cells = max(6, min(max(_cells(row.status) for row in rows), _MAX_STATUS_CELLS, width // 7))
    duration_cells = max(len(row.duration) for row in rows)
    link_cells = max(9, min(max(_cells(row.link) for row in rows), width // 6))
    free = width - service_cells - status_cells - duration_cells - link_cells - 5 * len(gap)
    # Titles get 55 %, and more where a deep tree would leave no room for the names.
    title_limit = min(free - _MIN_BAR_CELLS, max(free * 11 // 20, max(row.prefix_chars for row in rows) + 14))
    title_cells = max(4, min(max(_cells(row.title) for row in rows), title_limit))
    bar_cells = free - title_cells

    def line(service: str, title: str, status: str, bar: str, duration: str, link: str) -> str:
        return gap.join((service, title, status, bar, duration, link)).rstrip()

    errors = sum(span.error for span, _ in spans)
    services = len({info.service_name for _, info in spans})
    trace_id = f"trace {spans[0][0].trace_id.hex()}"
    facts = f"{total}  {_plural(len(spans), 'span')}  {_plural(services, 'service')}"
    failures = f"  {_plural(errors, 'error')}" if errors else ""
    between = "  " if len(trace_id) + len(facts) + len(failures) + 2 <= width else "\n"
    lines = [_paint(trace_id, _BOLD, colour) + between + facts + _paint(failures, _RED, colour)]
    axis_cells = bar_cells - len(total) - 3
    axis = f"0 {glyphs.axis * axis_cells} {total}" if axis_cells > 0 else ""
    heading = line(
        _fit("service", service_cells, glyphs),
        _fit("span", title_cells, glyphs),
        _fit("status", status_cells, glyphs),
        _fit(axis, bar_cells, glyphs),
        "time".rjust(duration_cells),
        "linked by",
    )
    lines.append(_paint(heading, _DIM, colour))
    for row in rows:
        span = row.span
        title = _fit(row.title, title_cells, glyphs)
        lines.append(
            line(
                _paint(_fit(row.service, service_cells, glyphs), _BOLD if span.kind == SpanKind.SERVER else "", colour),
                _paint(title[: row.prefix_chars], _DIM, colour) + title[row.prefix_chars :],
                _paint(_fit(row.status, status_cells, glyphs), _RED if span.error else "", colour),
                _paint(
                    _bar(span, start_ns, total_ns, bar_cells, glyphs),
                    _RED if span.error else _KIND_COLOURS.get(span.kind, ""),
                    colour,
                ),
                row.duration.rjust(duration_cells),
                _paint(_fit(row.link, link_cells, glyphs).rstrip(), _DIM, colour),
            )
        )
    return "\n".join(lines) + "\n"


def _rows(spans: Sequence[Item], glyphs: _Glyphs) -> list[_Row]:
    """The spans in the order of display. Without recursion, as a trace may be 20000 spans deep."""
    items = sorted(spans, key=lambda item: (item[0].start_time_ns, -item[0].end_time_ns))
    ids = {span.span_id for span, _ in items}
    children: dict[bytes, list[int]] = {}
    roots: list[int] = []
    for index, (span, _) in enumerate(items):
        (children.setdefault(span.parent_span_id, []) if span.parent_span_id in ids else roots).append(index)
    rows: list[_Row] = []
    done: set[int] = set()
    for root in (*roots, *range(len(items))):  # what no root leads to hangs on a cycle: its earliest span goes first
        pending = [(root, "", "")]
        while pending:
            index, prefix, child_prefix = pending.pop()
            if index in done:
                continue
            done.add(index)
            span, info = items[index]
            below = [child for child in children.pop(span.span_id, ()) if child not in done]
            deep = len(child_prefix) >= _MAX_INDENT_LEVELS * len(glyphs.branch)
            for child in reversed(below):
                last = child == below[-1]
                beneath = child_prefix if deep else child_prefix + ("  " if last else glyphs.pass_by)
                pending.append((child, child_prefix + (glyphs.last if last else glyphs.branch), beneath))
            if not span.parent_span_id:
                link = "root"
            elif span.parent_span_id not in ids:
                link = "remote parent"
            elif index == root:
                link = "cycle"
            else:
                link = _clean(span.link_method, glyphs).replace("_", " ") or "parent"
            if span.links:
                link += f" +{_plural(len(span.links), 'link')}"
            prefix += glyphs.client if span.kind == SpanKind.CLIENT else ""
            attributes = dict(span.all_attributes())
            rows.append(
                _Row(
                    span,
                    _clean(info.service_name, glyphs),
                    prefix + _clean(_title(span, attributes, bool(below)), glyphs),
                    len(prefix),
                    _clean(_status(span, attributes), glyphs) + (glyphs.failed if span.error else ""),
                    format_duration(span.end_time_ns - span.start_time_ns, glyphs.micro),
                    link,
                )
            )
    return rows


def _title(span: Span, attributes: dict[str, AttributeValue], has_callee: bool) -> str:
    """The span's name; when it is only a method, what was asked for stands behind it: a person reads this, once.

    A client span shows the host as well, unless the called service has a line of its own below.
    """
    if "http.route" in attributes or " " in span.name:
        return span.name
    if span.kind == SpanKind.CLIENT:
        address = str(attributes.get("url.full", "")).partition("://")[2].partition("?")[0]
        authority, slash, path = address.partition("/")
        target = slash + path if has_callee else authority.rpartition("@")[2] + slash + path
    else:
        target = str(attributes.get("url.path", ""))
    return f"{span.name} {target}" if target else span.name


def _status(span: Span, attributes: dict[str, AttributeValue]) -> str:
    code = str(attributes.get("http.response.status_code", ""))
    reason = str(attributes.get("error.type", ""))
    if reason in ("", code):
        return code
    return f"{code} {_SHORT_REASONS.get(reason, reason)}".lstrip()


_SHORT_REASONS = {"connection_reset": "reset", "client_disconnect": "client left", "incomplete_response": "cut off"}


def _bar(span: Span, start_ns: int, total_ns: int, cells: int, glyphs: _Glyphs) -> str:
    """The span on the trace's time line, in half cells, never shorter than one."""
    right_half, whole, left_half = glyphs.bars.get(span.kind, glyphs.bars[SpanKind.INTERNAL])
    halves = 2 * cells
    total_ns = max(total_ns, 1)
    first = min((span.start_time_ns - start_ns) * halves // total_ns, halves - 1)
    end = min(max(-((start_ns - span.end_time_ns) * halves // total_ns), first + 1), halves)
    bar = " " * (first // 2)
    if first % 2:
        bar += right_half
    bar += whole * (end // 2 - (first + 1) // 2)
    if end % 2 and end > first + first % 2:
        bar += left_half
    return bar.ljust(cells)


def format_duration(duration_ns: int, micro: str = "µ") -> str:
    """Three significant digits with the unit that fits: ``840 ns``, ``12.3 µs``, ``1.20 s``, ``2m 03s``."""
    if duration_ns < 0:
        return "-" + format_duration(-duration_ns, micro)
    if duration_ns < 1000:
        return f"{duration_ns} ns"
    for unit, unit_ns, limit in ((f"{micro}s", 10**3, 999.5), ("ms", 10**6, 999.5), ("s", 10**9, 59.95)):
        value = duration_ns / unit_ns
        if value < limit:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    minutes, seconds = divmod(round(duration_ns / 10**9), 60)
    return f"{minutes}m {seconds:02d}s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _paint(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_RESET}" if colour and style and text else text


def _clean(text: str, glyphs: _Glyphs) -> str:
    """Without control, format (bidirectional, zero-width), unassigned and surrogate code points."""
    if glyphs is _ASCII and not text.isascii():
        text = text.encode("ascii", "replace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else glyphs.replacement for c in text)


def _cells(text: str) -> int:
    """Terminal cells that a text takes: East Asian wide characters take two, combining ones none."""
    return len(text) if text.isascii() else sum(map(_char_cells, text))


def _char_cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, cells: int, glyphs: _Glyphs) -> str:
    """Cut with an ellipsis or filled with spaces to exactly ``cells``."""
    text = text[: 4 * cells + 4]  # many combining characters take no cell; they need not all be kept
    missing = cells - _cells(text)
    if missing < 0:
        kept, used = [], 0
        for character in text:
            used += _char_cells(character)
            if used > cells - 1:
                break
            kept.append(character)
        text = "".join(kept) + glyphs.ellipsis
        missing = cells - _cells(text)
    return text + " " * missing


class TreeConsole:
    """Prints a trace as a waterfall once no new span of it has come for ``quiet_seconds``, or on ``flush``.

    At most ``max_traces`` traces and ``max_spans`` spans wait; above that the trace that has been silent longest is
    printed early (``printed_early`` counts those), and what comes of it later is printed as a trace of its own.
    ``clock`` gives monotonic seconds; ``tick`` has to be called a few times per second. ``width`` and ``colour`` are
    those of the terminal unless given: colours only on a terminal and without ``NO_COLOR``.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        quiet_seconds: float = 0.6,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
        colour: bool | None = None,
        max_traces: int = 1000,
        max_spans: int = 20_000,
    ) -> None:
        self._stream = stream
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._width = width
        self._colour = _wants_colour(stream) if colour is None else colour
        self._ascii_only = not _can_encode(stream, "├╰│━…╺µ✗→\ufffd")
        self._max_traces = max_traces
        self._max_spans = max_spans
        self._traces: dict[bytes, _Waiting] = {}  # the one that has been silent longest comes first
        self._spans = 0
        self.printed_early = 0

    def write(self, spans: Iterable[Item]) -> None:
        """Take spans and print what is due. Raises ExportError("console_closed"), as do ``tick`` and ``flush``."""
        now = self._clock()
        for item in spans:
            trace_id = item[0].trace_id
            waiting = self._traces.pop(trace_id, None) or _Waiting()
            waiting.last_seconds = now
            waiting.items.append(item)
            self._traces[trace_id] = waiting
            self._spans += 1
            while self._spans > self._max_spans or len(self._traces) > self._max_traces:
                self.printed_early += 1
                self._print(next(iter(self._traces)))
        self.tick()

    def tick(self) -> None:
        due_seconds = self._clock() - self._quiet_seconds
        while self._traces:
            trace_id, waiting = next(iter(self._traces.items()))
            if waiting.last_seconds > due_seconds:
                return
            self._print(trace_id)

    def flush(self) -> None:
        while self._traces:
            self._print(next(iter(self._traces)))

    def _print(self, trace_id: bytes) -> None:
        waiting = self._traces.pop(trace_id)
        self._spans -= len(waiting.items)
        width = self._width or _terminal_width(self._stream)
        _write(self._stream, render_trace(waiting.items, width, self._colour, self._ascii_only) + "\n")


class _Waiting:
    __slots__ = ("items", "last_seconds")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.last_seconds = 0.0


def _wants_colour(stream: IO[str]) -> bool:
    """https://no-color.org: any value but the empty one turns colours off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _can_encode(stream: IO[str], text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _terminal_width(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 100
    except (OSError, ValueError):
        return 100
