"""YAML text from an operator or a mounted ConfigMap -> plain maps, lists, strings, numbers, booleans and null.

In: text that may be wrong or hostile. Out: builtins. Never: objects of other types, references (anchors, aliases and
merge keys can make a small file expand without end), tags, work that is not linear in the text, or any exception but
``ConfigError``. The scalars mean what ``yaml.safe_load`` makes of them (YAML 1.1), except that dates stay strings.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from agent.errors import ConfigError

MAX_NODES = 20_000
"""Bound on scalars, lists and maps together; beyond it the text is refused. Keeps the worst case near a second."""
MAX_DEPTH = 16
"""Bound on nesting; beyond it the text is refused. The schema needs four levels."""
_MAX_NUMBER_CHARACTERS = 64  # The conversion of a base-60 number is quadratic in its length.

_TAG = "tag:yaml.org,2002:"


def parse(text: str, source: str) -> object:
    """Return the value of the one YAML document in ``text``; None when it is empty.

    ``source`` names the text in errors: ``ConfigError("<source>:<line>:<column>: <problem>")``, both counted from 1.
    """
    try:
        return _Builder(text, source).build()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(f"{source}:{line}:{column}: character U+{error.character:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(f"{error.problem}".split())
        if error.context and ("alias" in error.context or "anchor" in error.context):
            problem = "a text that begins with * or & must be in quotes"
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None


class _Builder:
    """Builds the value from parser events, so that every bound holds before memory or stack is spent."""

    def __init__(self, text: str, source: str) -> None:
        self._loader = yaml.SafeLoader(text)
        self._source = source

    def build(self) -> object:
        events = self._events()
        next(events)  # StreamStart
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self._value(next(events), events)
        next(events)  # DocumentEnd
        extra = next(events)
        if not isinstance(extra, yaml.StreamEndEvent):
            raise self._error(extra, "a second YAML document begins here; only one is allowed")
        return value

    def _events(self) -> Iterator[yaml.Event]:
        nodes = depth = 0
        while (event := self._loader.get_event()) is not None:
            if isinstance(event, yaml.NodeEvent):
                nodes += 1
                if nodes > MAX_NODES:
                    raise self._error(event, f"more than {MAX_NODES} values")
                if event.anchor is not None:
                    raise self._error(
                        event, "anchors (&) and aliases (*) are not supported; put a text that begins so in quotes"
                    )
                if getattr(event, "tag", None) is not None:
                    raise self._error(event, "tags (!) are not supported; put a text that begins with ! in quotes")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise self._error(event, f"nested more than {MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            yield event

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event]) -> object:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[object] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                items.append(self._value(item, events))
            return items
        members: dict[object, object] = {}
        while not isinstance(key_event := next(events), yaml.MappingEndEvent):
            if not isinstance(key_event, yaml.ScalarEvent):
                raise self._error(key_event, "a key must be a plain text")
            key = self._scalar(key_event)
            if key in members:
                raise self._error(key_event, f"the key {str(key)[:80]!r} is given twice")
            members[key] = self._value(next(events), events)
        return members

    def _scalar(self, event: yaml.ScalarEvent) -> object:
        text = event.value
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            # Only an escape such as "\ud800" can produce one; no encoder downstream accepts it.
            raise self._error(event, "a surrogate is not a character")
        tag = self._loader.resolve(yaml.ScalarNode, text, event.implicit).removeprefix(_TAG)
        if tag == "null":
            return None
        if tag not in ("bool", "int", "float"):
            return text
        if len(text) > _MAX_NUMBER_CHARACTERS:
            raise self._error(event, "a number of this length is not supported")
        node = yaml.ScalarNode(_TAG + tag, text, event.start_mark, event.end_mark)
        try:
            if tag == "bool":
                return self._loader.construct_yaml_bool(node)
            return self._loader.construct_yaml_int(node) if tag == "int" else self._loader.construct_yaml_float(node)
        except (ValueError, OverflowError):
            raise self._error(event, "not a number that can be read; put it in quotes if it is a text") from None

    def _error(self, event: yaml.Event, problem: str) -> ConfigError:
        mark = event.start_mark
        return ConfigError(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {problem}")
