"""Live configuration: a mounted file that changes -> the new configuration, or why it is refused.

In: the path of the file, and what ``agent.config.load`` takes besides. Out: ``Loaded`` or ``Refused`` when something
happened, and which of the changed settings need a restart. Never: a thread, a wait, an exception for what is in the
file or because it is not there, or a configuration other than the last good one.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from errno import EINVAL, ENOENT, ENOTDIR
from pathlib import Path

import msgspec

from agent.config import MAX_FILE_BYTES, Config, load
from agent.config_schema import leaves
from agent.errors import ConfigError

CONFIRM_SECONDS = 1.0
"""A changed file is read once more after this time: two writes of equal size within one tick of the kernel's file clock
(10 ms at most on local file systems) cannot be told apart by what ``stat`` says."""

RETRY_SECONDS = 10.0
"""A file that is right by itself and could not be put into effect is tried again: a certificate that it names may be
there by then, as the volumes of a pod are not renewed at one moment."""

_GONE = (ENOENT, ENOTDIR)

FIXED_AT_START: dict[str, str] = {
    "kubernetes.enabled": "the watch of pods is begun once",
    "kubernetes.node_name": "the watch of pods is begun once",
    "kubernetes.peers": "the watches of services are begun once",
    "kubernetes.service_account": "the watch of pods is begun once",
    "kernel": "the probes and the buffer shared with the kernel are set up once",
    "limits.connections": "it is the size of maps in the kernel",
    "limits.exchange_timeout_seconds": "the loaded programs hold it as a constant",
    "limits.processes": "it is the size of maps in the kernel",
    "limits.request_head_bytes": "the programs are loaded for heads of this size",
    "limits.response_head_bytes": "the programs are loaded for heads of this size",
    "telemetry.listen": "the port is opened once, and whoever scrapes it keeps its address",
}
"""Setting, or section with all of its settings -> why a change needs a restart. Everything else is applied live."""


class Loaded(msgspec.Struct, frozen=True):
    """A configuration that is now in effect.

    ``changed`` holds the dotted keys with another effective value, in the order of the reference. It is empty when only
    the text changed (a comment), and when a good file is back after a refusal.
    """

    config: Config
    changed: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Loaded(changed={self.changed})"  # the configuration may hold secrets


class Refused(msgspec.Struct, frozen=True):
    """A file that is not applied. ``message`` is one line with the file, the key (or the line) and the reason."""

    message: str


class ConfigFile:
    """The configuration file of a running agent. ``config`` is the last good configuration.

    A ConfigMap is mounted as a symlink to ``..data/<name>``; the kubelet replaces the directory behind ``..data`` by
    renaming the symlink, so a reader sees the old content or the new one. A file that is written in place is read as it
    is at that moment: half of a file is refused unless it is valid by itself.

    What was no regular file at the start, such as a pipe, can be read only once: it is never polled.

    For metrics: ``last_reload_successful`` is False from a refusal until a good file is read;
    ``last_reload_success_unix`` is the time of the last good reload, at first that of the start. ``reloads`` counts
    ``applied``, ``refused`` and ``unchanged`` (touched, or replaced by the same bytes); the start is not counted.
    """

    def __init__(self, path: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> None:
        """Load the file for the first time. ConfigError, as from ``load``, when that fails."""
        self.path = path
        self._data_link = path.parent / "..data"
        self._overrides = tuple(overrides)
        self._environ = dict(environ)
        self._is_polled = path.is_file()
        self._problem: str | None = None  # what was reported last; None: all is well
        self.reloads: Counter[str] = Counter(applied=0, refused=0, unchanged=0)
        try:
            signature, data = (self._look(), self._read()) if self._is_polled else (None, None)
        except OSError:
            signature = data = None  # load() says it
        self.config = load(path, self._overrides, self._environ)
        # If it changed meanwhile, its signature did too, or the confirming read tells.
        self._signature: tuple[object, ...] | None = signature  # None: read at the next poll, whatever stat says
        self._data: bytes | None = data  # what was judged last
        self._confirm_at = time.monotonic() + CONFIRM_SECONDS
        self._retry_at = math.inf
        self.last_reload_successful = True
        self.last_reload_success_unix = time.time()

    def poll(self, apply: Callable[[Config], None] = lambda config: None) -> Loaded | Refused | None:
        """Look at the file; None when there is nothing new. Costs two system calls as long as nothing changes.

        ``apply`` is called with a configuration that differs from the last good one and puts it into effect; when it
        raises ConfigError, having changed nothing, the file is refused like any other.

        Each refusal is returned once: for a bad content when it appears, for a file that is gone or unreadable when it
        begins to be. What ``apply`` refused is offered to it again every ``RETRY_SECONDS``. Reading a changed file
        takes milliseconds, and about a second for a hostile one.
        """
        if not self._is_polled:
            return None
        now = time.monotonic()
        try:
            signature = self._look()
            is_known = signature == self._signature
            if is_known and now < min(self._confirm_at, self._retry_at):
                return None
            data = self._read()
        except OSError as error:
            self._signature = None
            if error.errno in _GONE and os.path.exists(self.path):
                return None  # The old version was removed between two steps of looking it up; the new one is there.
            # What comes next is judged afresh: nothing in stat may differ once a permission is given back.
            self._data = None
            message = self._unreadable(error)
            return self._refuse(message) if message != self._problem else None
        self._signature = signature
        self._confirm_at = math.inf if is_known else now + CONFIRM_SECONDS
        if data == self._data and now < self._retry_at:
            self.reloads["unchanged"] += not is_known
            return None
        try:
            outcome: Config | ConfigError = load(self.path, self._overrides, self._environ)
        except ConfigError as error:
            outcome = error
        if not self._still_is(data):
            self._signature = None  # It changed while it was read: the next poll tells.
            return None
        is_retry, self._data, self._retry_at = data == self._data, data, math.inf
        if isinstance(outcome, ConfigError):
            return self._refuse(self._with_file(str(outcome)))
        changed = changed_keys(self.config, outcome)
        if changed:
            try:
                apply(outcome)
            except ConfigError as error:
                self._retry_at = now + RETRY_SECONDS
                message = self._with_file(str(error))
                return self._refuse(message) if not is_retry or message != self._problem else None
        return self._accept(outcome, changed)

    def _accept(self, config: Config, changed: tuple[str, ...]) -> Loaded:
        self.config = config
        self._problem = None
        self.reloads["applied"] += 1
        self.last_reload_successful = True
        self.last_reload_success_unix = time.time()
        return Loaded(config, changed)

    def _refuse(self, message: str) -> Refused:
        self._problem = message
        self.reloads["refused"] += 1
        self.last_reload_successful = False
        return Refused(message)

    def _look(self) -> tuple[object, ...]:
        """What differs when the content does. OSError when there is no file to read."""
        try:
            target = os.readlink(self._data_link)
        except OSError:
            target = ""  # not a mounted ConfigMap
        found = os.stat(self.path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(EINVAL, "it is not a regular file")  # opening a pipe could block
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, target

    def _read(self) -> bytes:
        """The content, up to the first byte that is too many: then ``load`` refuses the file."""
        with open(self.path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)

    def _still_is(self, data: bytes) -> bool:
        """Tell whether what ``load`` has read between two looks was ``data``."""
        try:
            return self._read() == data
        except OSError:
            return False

    def _unreadable(self, error: OSError) -> str:
        if error.errno in _GONE:
            return f"{self._name}: the configuration file is gone"
        return f"{self._name}: cannot read the configuration file: {error.strerror}"

    def _with_file(self, message: str) -> str:
        """Errors in a key do not name the file by themselves, errors in the text do."""
        named = message.startswith((f"{self.path}:", f"{str(self.path)!a}:"))
        return message if named else f"{self._name}: {message}"

    @property
    def _name(self) -> str:
        name = str(self.path)
        return name if name.isprintable() else ascii(name)


def changed_keys(old: Config, new: Config) -> tuple[str, ...]:
    """Return the keys of the settings that differ, in the order of the reference. A list or map is one setting."""
    return tuple(key for key, _ in leaves() if not _is_same(_value(old, key), _value(new, key)))


def head_room(started_with: Config) -> dict[str, int]:
    """Return how long heads may become while an agent runs that was started with this configuration, by key."""
    names = ("request_head_bytes", "response_head_bytes")
    return {
        f"capture.{name}": max(getattr(started_with.capture, name), getattr(started_with.limits, name) or 0)
        for name in names
    }


def restart_needed(old: Config, new: Config) -> tuple[str, ...]:
    """Return the dotted keys that differ and cannot be applied live. ``old`` is what the agent was *started* with."""
    room = head_room(old)
    return tuple(
        key
        for key in changed_keys(old, new)
        if restart_reason(key) is not None or (key in room and _value(new, key) > room[key])
    )


def restart_reason(key: str) -> str | None:
    """Say why a change of ``key`` needs a restart; None when it is applied live."""
    while key:
        if key in FIXED_AT_START:
            return FIXED_AT_START[key]
        key = key.rpartition(".")[0]
    return None


def _value(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_same(old: object, new: object) -> bool:
    """Equality that tells 1, 1.0 and true apart: as values of an attribute they are exported as different types."""
    if type(old) is not type(new):
        return False
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_is_same(value, new[name]) for name, value in old.items())
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(map(_is_same, old, new))
    return old == new
