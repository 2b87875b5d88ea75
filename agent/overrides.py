"""Overrides for a time: other settings for some processes until a moment, from the section ``overrides``.

In: what YAML gave for one override, later facts about a process and the time. Out: a checked ``Override``, whether it
matches, the configuration with it. Never: a clock, a state (an override ends because the time passes its end), or an
error when it becomes active that was not found when the file was loaded.

``agent.config`` checks the section with this module and imports it there, not at its top: this one needs its checks.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from typing import Any

import msgspec

from agent.config import _check_together, _convert, _name, _show
from agent.config import _setting as _checked_setting
from agent.config_schema import Config, Glob, leaves
from agent.errors import ConfigError

MATCH_KEYS = ("namespace", "pod", "container", "executable", "service")
"""The facts that an override can ask for. ``executable`` is the name, or the path if the glob has a ``/``."""

OVERRIDABLE = ("sampling", "capture.request_headers", "capture.response_headers", "routes", "redaction")
"""Settings, and sections with all of their settings, that can differ from process to process."""

_FIELDS = ("until", "match", "set")
_SETTINGS = dict(leaves())
SETTINGS = tuple(key for key in _SETTINGS if f"{key}.".startswith(tuple(f"{part}." for part in OVERRIDABLE)))
"""The dotted keys of all of them."""
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,30}))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_UNIX_EPOCH_DAY = date(1970, 1, 1).toordinal()


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """One override: ``set`` (dotted key, checked value) for what matches every (fact, glob) until ``until_unix_ns``."""

    until_unix_ns: int
    match: tuple[tuple[str, str], ...]
    set: tuple[tuple[str, object], ...]


def parse_override(raw: object, where: str) -> Override:
    """Check one item of the section; ``where`` is its key in errors, such as ``overrides[0]``.

    All of ``until``, ``match`` and ``set`` are required and say something: what is forgotten must not mean everything.
    ConfigError with the exact key. An override whose end has passed is valid.
    """
    fields = _map(raw, where)
    for name in fields:
        if name not in _FIELDS:
            raise _unknown(where, name, _FIELDS)
    for name in _FIELDS:
        if fields.get(name) is None:
            raise ConfigError(f"{where}.{name}: missing; an override needs {', '.join(_FIELDS)}")
    return Override(
        until_unix_ns=_until(fields["until"], f"{where}.until"),
        match=_match(fields["match"], f"{where}.match"),
        set=_set(fields["set"], f"{where}.set"),
    )


def check(config: Config, overrides: Iterable[Override], where: str = "overrides") -> None:
    """Refuse an override that is wrong together with the rest of the configuration."""
    for index, override in enumerate(overrides):
        try:
            apply(config, override)
        except ConfigError as error:
            raise ConfigError(f"{where}[{index}].set.{error}") from None


def active(overrides: Sequence[Override], now_unix_ns: int) -> tuple[Override, ...]:
    """Return those that have not ended, in order. At its end an override is over."""
    return tuple(override for override in overrides if now_unix_ns < override.until_unix_ns)


def next_end(overrides: Sequence[Override], now_unix_ns: int) -> int | None:
    """Return when ``active`` changes next, in Unix nanoseconds; None when it does not."""
    return min((override.until_unix_ns for override in active(overrides, now_unix_ns)), default=None)


def matches(override: Override, facts: Mapping[str, str]) -> bool:
    """Tell whether all globs match. A fact that is absent or empty matches none: ``namespace: "*"`` means any pod.

    ``facts`` has the keys of MATCH_KEYS, and ``executable_path`` for globs with a ``/``. Globs are case-sensitive.
    """
    for name, glob in override.match:
        fact = facts.get("executable_path" if name == "executable" and "/" in glob else name)
        if not fact or not fnmatch.fnmatchcase(fact, glob):
            return False
    return True


def apply(config: Config, override: Override) -> Config:
    """Return ``config`` with the override's settings. Of several that match, apply one after the other: the last wins.

    The result is checked as a file is. That costs some microseconds per setting: keep results, do not ask per span.
    """
    for key, value in override.set:
        config = _replaced(config, key, _setting(key, key, value))
    _check_together(config)
    return config


def _until(value: object, where: str) -> int:
    """RFC 3339, section 5.6, date-time -> Unix nanoseconds; digits beyond the ninth of a second are cut off."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute, second = map(int, match.groups()[:6])
        fraction, sign, offset_hours, offset_minutes = match.groups()[6:]
        offset_hours, offset_minutes = int(offset_hours or 0), int(offset_minutes or 0)
        # Second 60 is a leap second, which Unix time counts as the first of the next minute.
        if hour > 23 or minute > 59 or second > 60 or offset_hours > 23 or offset_minutes > 59:
            raise ValueError
        days = date(year, month, day).toordinal() - _UNIX_EPOCH_DAY
    except ValueError:
        raise ConfigError(
            f"{where}: must be a time with an offset or Z, such as 2030-01-31T18:00:00Z (RFC 3339), not {_show(value)}"
        ) from None
    offset = (offset_hours * 60 + offset_minutes) * (-60 if sign == "-" else 60)
    seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset
    return seconds * 1_000_000_000 + int((fraction or "")[:9].ljust(9, "0"))


def _match(value: object, where: str) -> tuple[tuple[str, str], ...]:
    globs = _map(value, where)
    for name in globs:
        if name not in MATCH_KEYS:
            raise _unknown(where, name, MATCH_KEYS)
    if not globs:
        raise ConfigError(f'{where}: empty; name what it is for, or write service: "*" for everything')
    return tuple((name, _convert(f"{where}.{name}", Glob, glob, secret=False)) for name, glob in globs.items())


def _set(value: object, where: str) -> tuple[tuple[str, object], ...]:
    values: dict[str, object] = {}
    _collect(value, where, "", values)
    if not values:
        raise ConfigError(f"{where}: empty; name a setting, such as sampling.ratio: 1.0")
    return tuple(values.items())


def _collect(value: object, where: str, prefix: str, values: dict[str, object]) -> None:
    """Read maps within maps, dotted keys and mixtures of both. An empty section (null) says nothing, as in a file."""
    for name, item in _map(value, f"{where}.{prefix}".rstrip(".")).items():
        key = prefix + (name if isinstance(name, str) else _name(name))
        if any(leaf.startswith(f"{key}.") for leaf in _SETTINGS):
            if item is not None:
                _collect(item, where, f"{key}.", values)
        elif key in values:
            raise ConfigError(f"{where}.{key}: given twice; remove one of the two")
        else:
            values[key] = _setting(f"{where}.{_name(key)}", key, item)


def _setting(where: str, key: str, value: object) -> object:
    """Check one setting by the very function that checks a file's."""
    if key in SETTINGS:
        return _checked_setting(where, key, _SETTINGS[key], value)
    if key in _SETTINGS:
        raise ConfigError(f"{where}: cannot be overridden for a time; what can: {', '.join(SETTINGS)}")
    last = key.rpartition(".")[2][:100]
    near = [name for name in SETTINGS if name.rpartition(".")[2] == last] or get_close_matches(
        key[:100], (*SETTINGS, *OVERRIDABLE), 1
    )
    near = near or [name for name in SETTINGS if get_close_matches(last, [name.rpartition(".")[2]], 1, 0.8)]
    raise ConfigError(f"{where}: unknown key; {_suggestion(near, SETTINGS)}")


def _replaced(section: Any, key: str, value: object) -> Any:
    name, _, rest = key.partition(".")
    return msgspec.structs.replace(section, **{name: _replaced(getattr(section, name), rest, value) if rest else value})


def _map(value: object, where: str) -> dict[Any, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a map, not {_show(value)}")
    return value


def _unknown(where: str, name: object, valid: Sequence[str]) -> ConfigError:
    near = get_close_matches(str(name)[:100], valid, 1)
    return ConfigError(f"{where}.{_name(name)}: unknown key; {_suggestion(near, valid)}")


def _suggestion(near: Sequence[str], valid: Sequence[str]) -> str:
    return f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"
