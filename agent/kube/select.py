"""Which pods and containers are traced.

In: a ``Pod`` and the name of one of its containers. Out: whether it is traced. Never: anything about the process itself
(``agent.process.Selector`` has the rules for programs, and both have to agree).

Grammar of label selectors: Kubernetes, "Labels and Selectors", and ``labels.Parse`` of k8s.io/apimachinery, whose
corner cases are kept: an empty value, ``in ()``, ``notin`` and ``!=`` for a label that is not there, ``>`` and ``<``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from agent.errors import ConfigError
from agent.kube.pods import TRACE_ANNOTATION, Pod


class PodRules:
    """Selects containers. The first of these rules that decides wins:

    1. The pod's annotation ``spanloom.io/trace: "false"``: not traced.
    2. The annotation ``spanloom.io/trace: "true"``: rules 3 to 5 are skipped.
    3. The namespace matches ``namespaces_exclude``: not traced.
    4. The namespace matches nothing in ``namespaces_include``: not traced.
    5. The pod's labels do not satisfy ``labels``: not traced.
    6. The container's name matches ``containers_exclude``: not traced.
    7. The container's name matches something in ``containers_include``: traced. Otherwise not.

    With ``annotation=False`` the annotation is not looked at (an operator may not want pods to decide); its other
    values never mean anything. Globs are ``fnmatch`` patterns, case-sensitive; an empty ``include`` selects nothing, an
    empty ``labels`` everything. While a container's name is not known yet (it is empty) rules 6 and 7 leave it traced,
    so that its first requests are not lost: ask again when the name is known.
    """

    def __init__(
        self,
        namespaces_include: Sequence[str] = ("*",),
        namespaces_exclude: Sequence[str] = (),
        labels: str = "",
        containers_include: Sequence[str] = ("*",),
        containers_exclude: Sequence[str] = (),
        annotation: bool = True,
    ) -> None:
        """Compile the rules. Raises ConfigError when ``labels`` is malformed."""
        self._namespace_included = _matcher(namespaces_include)
        self._namespace_excluded = _matcher(namespaces_exclude)
        self._labels = LabelSelector(labels)
        self._container_included = _matcher(containers_include)
        self._container_excluded = _matcher(containers_exclude)
        self._annotation = annotation

    def selects(self, pod: Pod, container_name: str) -> bool:
        wish = pod.annotations.get(TRACE_ANNOTATION, "").strip().lower() if self._annotation else ""
        if wish == "false":
            return False
        if wish != "true" and not self._selects_pod(pod):
            return False
        if not container_name:
            return True
        return not self._container_excluded(container_name) and bool(self._container_included(container_name))

    def _selects_pod(self, pod: Pod) -> bool:
        if self._namespace_excluded(pod.namespace) or not self._namespace_included(pod.namespace):
            return False
        return self._labels.matches(pod.labels)


def _matcher(globs: Sequence[str]) -> Callable[[str], re.Match[str] | None]:
    """One expression for all globs; without a glob it matches nothing."""
    return re.compile("|".join(map(fnmatch.translate, globs)) if globs else r"(?!)").match


_TEXT_CHARS = 4096
"""A longer selector is refused."""
_SHOWN_CHARS = 40

_TOKEN = re.compile(r"==|!=|[=!<>(),]|[^=!<>(), \t\r\n]+")
_OPERATORS = frozenset(("=", "==", "!=", "<", ">", "in", "notin"))
_SYMBOLS = frozenset(("=", "==", "!=", "!", "<", ">", "(", ")", ","))
_END = ""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_DOMAIN_CHARS = 253
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_INT64_MAX = 2**63 - 1

_Requirement = Callable[[Mapping[str, str]], bool]


class LabelSelector:
    """A Kubernetes label selector: ``app=shop,tier!=db,env in (a,b),!legacy,team,weight>3``, all of which must hold."""

    def __init__(self, text: str) -> None:
        """Parse ``text``. Raises ConfigError that says what is wrong at which character (counted from 1)."""
        self.text = text
        self._requirements = _Parser(text).requirements()

    def __repr__(self) -> str:
        return f"LabelSelector({self.text!r})"

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(holds(labels) for holds in self._requirements)


class _Parser:
    """Tokens -> requirements, by recursive descent. ``in`` and ``notin`` are operators only behind a key."""

    def __init__(self, text: str) -> None:
        if len(text) > _TEXT_CHARS:
            raise ConfigError(f"label selector: has {len(text)} characters; use at most {_TEXT_CHARS}")
        self._text = text
        self._tokens = [(match[0], match.start() + 1) for match in _TOKEN.finditer(text)]
        self._tokens.append((_END, len(text) + 1))
        self._at = 0

    def requirements(self) -> tuple[_Requirement, ...]:
        found: list[_Requirement] = []
        if self._peek() == _END:
            return ()
        while True:
            found.append(self._requirement())
            token, position = self._take()
            if token == _END:
                return tuple(found)
            if token != ",":
                raise self._wrong(token, position, '"," or the end')

    def _requirement(self) -> _Requirement:
        negated = self._peek() == "!"
        if negated:
            self._take()
        key = self._key()
        if self._peek() in (_END, ","):
            return (lambda labels: key not in labels) if negated else (lambda labels: key in labels)
        operator, position = self._take()
        if negated:
            raise self._wrong(operator, position, f'"," or the end behind "!{_cut(key)}"')
        if operator not in _OPERATORS:
            raise self._wrong(operator, position, 'one of = == != in notin > <, "," or the end')
        if operator in ("in", "notin"):
            values = self._values()
            if operator == "in":
                return lambda labels: labels.get(key) in values
            return lambda labels: labels.get(key) not in values
        value_token, value_position = self._tokens[self._at]
        value = self._value()
        if operator == "!=":
            return lambda labels: labels.get(key) != value
        if operator in ("=", "=="):
            return lambda labels: labels.get(key) == value
        limit = _integer(value)
        if limit is None:
            raise self._wrong(value_token, value_position, f'a whole number behind "{operator}"')
        if operator == ">":
            return lambda labels: (number := _integer(labels.get(key, ""))) is not None and number > limit
        return lambda labels: (number := _integer(labels.get(key, ""))) is not None and number < limit

    def _key(self) -> str:
        token, position = self._take()
        if token == _END or token in _SYMBOLS:
            raise self._wrong(token, position, "a label key")
        prefix, slash, name = token.rpartition("/")
        if slash and not (len(prefix) <= _DOMAIN_CHARS and _DOMAIN.fullmatch(prefix)):
            raise self._wrong(token, position, 'a DNS name of lower-case letters before the "/"')
        if not _NAME.fullmatch(name):
            raise self._wrong(token, position, _NAME_RULE.format("a label key"))
        return token

    def _value(self) -> str:
        """One value, which may be missing altogether: then it is the empty text."""
        if self._peek() in (_END, ","):
            return ""
        return self._checked_value()

    def _values(self) -> frozenset[str]:
        """``(a,b)``; nothing between two commas or parentheses is the empty text."""
        token, position = self._take()
        if token != "(":
            raise self._wrong(token, position, '"("')
        values: set[str] = set()
        while True:
            values.add("" if self._peek() in (",", ")") else self._checked_value())
            token, position = self._take()
            if token == ")":
                return frozenset(values)
            if token != ",":
                raise self._wrong(token, position, '"," or ")"')

    def _checked_value(self) -> str:
        token, position = self._take()
        if token == _END or token in _SYMBOLS:
            raise self._wrong(token, position, "a label value")
        if not _NAME.fullmatch(token):
            raise self._wrong(token, position, _NAME_RULE.format("a label value"))
        return token

    def _peek(self) -> str:
        return self._tokens[self._at][0]

    def _take(self) -> tuple[str, int]:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _wrong(self, token: str, position: int, expected: str) -> ConfigError:
        found = ascii(_cut(token)) if token else "the end"
        return ConfigError(
            f"label selector {_cut(self._text)!a}: at character {position}: expected {expected}, not {found}"
        )


_NAME_RULE = "{} of at most 63 letters, digits, - _ . that begins and ends with a letter or digit"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _integer(text: str) -> int | None:
    """A 64-bit integer as Go reads it."""
    if not _INTEGER.fullmatch(text):
        return None
    number = int(text)
    return number if -_INT64_MAX - 1 <= number <= _INT64_MAX else None
