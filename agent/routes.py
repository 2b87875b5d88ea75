"""Route templates: the configured patterns, and the opt-in guess for span names.

In: a method and a path. Out: a template of low cardinality, or None. Never happens: a guess is handed out as a route
(``http.route`` comes from configured patterns only), or a path's own text of high cardinality gets into a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from agent.errors import ConfigError

MEMO_ENTRIES = 4096
"""Remembered (method, path) results; the memo is emptied when full."""
MEMO_PATH_CHARACTERS = 256
"""Longer paths are matched each time, so that the memo stays small."""
GUESS_SEGMENTS = 6
"""A guessed template has at most so many segments; the rest becomes ``*``."""

_PATTERN = re.compile(r"(?:([!#$%&'*+\-.^_`|~0-9A-Za-z]+) +)?(/\S*)")
_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_.\-]*\}")
# Versions (v1, 2024-01) and short words with a digit (oauth2, s3) are names, not identifiers.
_PLAIN_SEGMENT = re.compile(r"(?:[vV][0-9]{1,3}(?:\.[0-9]{1,3})?|[A-Za-z_.~\-]{1,32}|[A-Za-z_.\-]{2,24}[0-9]{1,2})?")
_HEXADECIMAL = re.compile(r"[0-9A-Fa-f\-]{8,}")


class Routes:
    """The configured route patterns, in order; the first that matches wins.

    A pattern is a path of literal segments and ``{name}`` parameters (a whole, non-empty segment each), optionally with
    a method in front (``GET /users/{id}``) and with ``/*`` at the end, which stands for one or more further segments,
    the last of which may be empty (``/static/*`` matches ``/static/`` and ``/static/a/b``, not ``/static``).
    Segments are compared as sent, without percent-decoding. The template is the pattern without the method.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        """Compile ``patterns``. Raises ConfigError for one that is malformed."""
        self._patterns = tuple(_compile(pattern) for pattern in patterns)
        self._memo: dict[tuple[str, str], str | None] = {}

    def match(self, method: str, path: str) -> str | None:
        """Return the template of the first pattern that matches, or None. ``path`` has no query."""
        if not self._patterns:
            return None
        key = (method, path)
        memo = self._memo
        if key in memo:
            return memo[key]
        template = self._search(method, path)
        if len(path) <= MEMO_PATH_CHARACTERS:
            if len(memo) >= MEMO_ENTRIES:
                memo.clear()
            memo[key] = template
        return template

    def _search(self, method: str, path: str) -> str | None:
        if not path.startswith("/"):
            return None  # "*" and the empty path of CONNECT
        segments = path.split("/")
        count = len(segments)
        for wanted_method, wanted, open_ended, template in self._patterns:
            if wanted_method is not None and wanted_method != method:
                continue
            if count != len(wanted) and not (open_ended and count > len(wanted)):
                continue
            if open_ended and count == len(wanted):
                continue
            if all(
                segment == literal if literal is not None else segment
                for literal, segment in zip(wanted, segments, strict=False)
            ):
                return template
        return None


def _compile(pattern: str) -> tuple[str | None, tuple[str | None, ...], bool, str]:
    """Return (method or None, segments with None for a parameter, whether it ends in ``/*``, template)."""
    match = _PATTERN.fullmatch(pattern.strip())
    if match is None:
        raise ConfigError(f"route pattern {pattern!r}: write a path such as /users/{{id}}, with or without a method")
    method, template = match.groups()
    segments = template.split("/")
    open_ended = segments[-1] == "*"
    if open_ended:
        segments.pop()
    wanted: list[str | None] = []
    for segment in segments:
        if _PARAMETER.fullmatch(segment):
            wanted.append(None)
        elif "{" in segment or "}" in segment or "*" in segment or "?" in segment or "#" in segment:
            raise ConfigError(f"route pattern {pattern!r}: {segment!r} must be a literal, {{name}}, or * at the end")
        else:
            wanted.append(segment)
    return method, tuple(wanted), open_ended, template


def guess(path: str) -> str:
    """Guess a template of low cardinality for ``path``: what looks like an identifier becomes ``{id}``.

    Kept: words of at most 32 letters, words with one or two digits at the end, and versions such as v1. Replaced:
    numbers, UUIDs, hexadecimal of 8 and more, and every other or longer segment (mixed digits, escapes, "@"). Segments
    after the sixth become ``*``. Only for span names; never for ``http.route``.
    """
    if not path.startswith("/"):
        return path if path == "*" else ""
    segments = path.split("/")[1:]
    template = [segment if _is_plain(segment) else "{id}" for segment in segments[:GUESS_SEGMENTS]]
    if len(segments) > GUESS_SEGMENTS:
        template.append("*")
    return "/" + "/".join(template)


def _is_plain(segment: str) -> bool:
    if _PLAIN_SEGMENT.fullmatch(segment) is None:
        return False
    # "deadbeef" is an identifier though all letters; "feedback" and "facade" have a letter beyond f or are short.
    return _HEXADECIMAL.fullmatch(segment) is None
