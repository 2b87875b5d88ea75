"""Bounded memos of repeated text: what was made of a key once is not made again.

In: a header line, or any hashable key. Out: what was read from it. Never happens: growth beyond the bound (a full memo
is emptied and fills again, so hostile variety costs time, not memory), or a header with a secret name kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agent import redaction
from agent.errors import ProtocolError
from agent.protocols import http1_syntax as syntax

MEMO_LINES = 4096
MEMO_LINE_BYTES = 256
"""Longer header lines are read each time: at most about 2 MB per direction."""


class UnusualLineEnd(Exception):
    """A head that was split at CRLF holds a bare LF too; looking for one in each head would cost the common case."""


class Memo(dict[Any, Any]):
    """Remembers ``make(key)``, but not for bytes beyond ``MEMO_LINE_BYTES``; emptied when it has ``limit`` entries."""

    __slots__ = ("_limit", "_make")

    def __init__(self, make: Callable[[Any], Any], limit: int) -> None:
        self._make = make
        self._limit = limit

    def __missing__(self, key: Any) -> Any:
        value = self._make(key)
        if isinstance(key, bytes) and len(key) > MEMO_LINE_BYTES:
            return value
        if len(self) >= self._limit:
            self.clear()
        self[key] = value
        return value


class LineMemo(dict[bytes, "tuple[bytes, bytes] | None"]):
    """Header line -> (lower-case name, value) when the name is wanted, else None. Raises ProtocolError like read_field.

    Not remembered: ``unique`` names (a new value each time would only push the others out), secrets, long lines.
    ``passed_over`` counts the lines of the first two kinds: what was made of a head with a secret is not to be kept.
    """

    __slots__ = ("_names", "_unique", "_wanted", "passed_over")

    def __init__(self, wanted: Iterable[bytes], unique: Iterable[bytes] = ()) -> None:
        self._wanted = frozenset(wanted)
        self._unique = frozenset(unique)
        self.passed_over = 0
        # Name as written -> (lower-case name or None when not wanted, whether its lines are remembered).
        self._names: dict[bytes, tuple[bytes | None, bool]] = {}

    def __missing__(self, line: bytes) -> tuple[bytes, bytes] | None:
        raw, colon, value = line.partition(b":")
        known = self._names.get(raw)
        if known is None:
            if line[:1] in (b" ", b"\t"):
                if b"\n" in line:
                    raise UnusualLineEnd
                return None  # obs-fold: the continuation of a value
            known = self._learn(raw)
        name, keep = known
        if not colon:
            raise ProtocolError("bad_header")
        if b"\n" in value:
            raise UnusualLineEnd
        field = None if name is None else (name, value.strip(b" \t"))
        if not keep:
            self.passed_over += 1
        elif len(line) <= MEMO_LINE_BYTES:
            if len(self) >= MEMO_LINES:
                self.clear()
            self[line] = field
        return field

    def _learn(self, raw: bytes) -> tuple[bytes | None, bool]:
        if b"\n" in raw:
            raise UnusualLineEnd
        syntax.check_field_name(raw)
        name = raw.lower()
        keep = name not in self._unique and not redaction.is_secret_header(name.decode())
        known = (name if name in self._wanted else None, keep)
        if len(raw) <= 64:
            if len(self._names) >= MEMO_LINES:
                self._names.clear()
            self._names[raw] = known
        return known
