"""The error taxonomy. Imports nothing of ours; foreign errors are mapped to these at the edge where they appear."""

from __future__ import annotations


class SpanloomError(Exception):
    """Base of every error that Spanloom raises on purpose. Its text says what to do, on one line."""

    exit_code = 1


class ConfigError(SpanloomError):
    """The configuration is wrong: an unknown key, a bad value, an unreadable file."""

    exit_code = 2


class PrivilegeError(SpanloomError):
    """The process lacks root or a capability that the probes need."""

    exit_code = 3


class KernelUnsupportedError(SpanloomError):
    """The kernel is too old, was built without BTF, or lacks a feature without which nothing can be traced."""

    exit_code = 4


class TracingRefusedError(SpanloomError):
    """The kernel has the feature but refuses it here: lockdown, a security module, a sandbox."""

    exit_code = 5


class ProtocolError(SpanloomError):
    """Bytes that are not what the protocol allows. ``reason`` is a low-cardinality name used as a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ExportError(SpanloomError):
    """A batch of spans could not be delivered. ``reason`` is a low-cardinality name used as a metric label."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
