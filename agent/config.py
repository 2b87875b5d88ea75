"""Reads the configuration: YAML file, ``--set`` overrides and the OTLP variables of the environment -> ``Config``.

In: a path, override texts, a mapping of variables. Out: one frozen ``Config``, or a ``ConfigError`` whose single line
names the key (or variable), what is wrong and what would be right. Never: a partly applied configuration, a secret in
an error message or in ``dump``, a look at the machine beyond the file and the page size.

The settings themselves are in ``agent.config_schema``; YAML is imported only when there is some to read or write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import AF_INET6, inet_pton
from typing import Any, get_args, get_origin

import msgspec

from agent.config_schema import Config, Section, bare_type, describe, fields_of, is_section, leaves
from agent.errors import ConfigError

__all__ = ["ENVIRONMENT", "MAX_FILE_BYTES", "Config", "dump", "load"]

MAX_FILE_BYTES = 1 << 20
"""Bound on the configuration file, the size limit of a ConfigMap; a larger one is refused."""


def load(path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the effective configuration: defaults < OTLP variables of ``environ`` < file < ``overrides``.

    ``overrides`` are ``"a.b=<YAML value>"``; the last one wins. A list or map given by a stronger source replaces the
    weaker one's. ``ConfigError``, one line, for anything that is wrong in any source.
    """
    values: dict[str, object] = {}
    _read_environment(environ, values)
    if path is not None:
        from agent.config_yaml import parse

        _read_section(Config, parse(_read_file(path), str(path)), "", values)
    for override in overrides:
        _read_override(override, values)
    config = _build(Config, "", values)
    _check_together(config)
    if config.overrides:
        from agent.overrides import check, parse_override

        check(config, [parse_override(raw, f"overrides[{i}]") for i, raw in enumerate(config.overrides)])
    return config


def dump(config: Config) -> str:
    """Return the configuration as YAML that ``load`` accepts, with the values of ``export.otlp.headers`` as ``***``."""
    import yaml

    values = msgspec.to_builtins(config)
    headers = values["export"]["otlp"]["headers"]
    values["export"]["otlp"]["headers"] = dict.fromkeys(headers, "***")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _read_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{str(path)!a}: cannot read the configuration file: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: the configuration file is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{path}:{line}:{column}: not UTF-8 text") from None


def _read_section(section: type[Section], value: object, path: str, values: dict[str, object]) -> None:
    """Convert a map of settings into ``values``, dotted key -> checked value. An empty section (null) says nothing."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'the configuration'}: must be a map of settings, not {_show(value)}")
    fields = fields_of(section)
    for name, item in value.items():
        if not isinstance(name, str) or name not in fields:
            raise _unknown_key(section, path, name)
        key = f"{path}.{name}" if path else name
        if is_section(fields[name]):
            _read_section(fields[name], item, key, values)
        else:
            values[key] = _setting(key, key, fields[name], item)


def _read_override(override: str, values: dict[str, object]) -> None:
    """Apply one ``a.b=<YAML value>``. Below a map such as resource.attributes the rest of the key is one map key."""
    from agent.config_yaml import parse

    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {_name(path)}: must be key=value, for example --set sampling.ratio=0.1")
    annotation: Any = Config
    key = ""
    parts = path.split(".")
    while parts and is_section(annotation):
        fields = fields_of(annotation)
        if parts[0] not in fields:
            raise _unknown_key(annotation, key, parts[0])
        annotation = fields[parts[0]]
        key = f"{key}.{parts.pop(0)}".lstrip(".")
    try:
        value = parse(text, f"--set {key}")
    except ConfigError as error:
        raise ConfigError(f"{error}; quote special texts, as in --set 'telemetry.listen=\"[::]:9469\"'") from None
    if is_section(annotation):
        _read_section(annotation, value, key, values)
    elif not parts:
        values[key] = _setting(key, key, annotation, value)
    elif get_origin(bare_type(annotation)) is dict:
        current = values.get(key, {})
        assert isinstance(current, dict)
        values[key] = _setting(key, key, annotation, {**current, ".".join(parts): value})
    else:
        raise ConfigError(f"{_name(path)}: unknown key; did you mean {key}?")


def _read_environment(environ: Mapping[str, str], values: dict[str, object]) -> None:
    """Read the variables of the OTLP exporter specification; an empty one counts as unset, the TRACES one wins."""
    annotations = None
    for suffix, (key, decode) in ENVIRONMENT.items():
        for name in (f"OTEL_EXPORTER_OTLP_TRACES_{suffix}", f"OTEL_EXPORTER_OTLP_{suffix}"):
            if text := environ.get(name, "").strip():
                annotations = annotations or dict(leaves())
                try:
                    value = decode(text)
                except ValueError as error:
                    raise ConfigError(f"{name}: {error}") from None
                values[key] = _setting(name, key, annotations[key], value)
                break


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"must be true or false, not {_show(text)}")
    return text.lower() == "true"


def _milliseconds(text: str) -> float:
    if not re.fullmatch("[0-9]{1,6}", text, re.ASCII) or not 1 <= int(text) <= 300_000:
        raise ValueError(f"must be milliseconds, an integer from 1 to 300000, not {_show(text)}")
    return int(text) / 1000


def _header_list(text: str) -> dict[str, str]:
    """Decode W3C Baggage form without properties: comma-separated ``name=value``, both may be percent-encoded."""
    from urllib.parse import unquote

    headers = {}
    for position, member in enumerate(text.split(","), 1):
        if not member.strip():
            continue
        name, equals, value = member.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"entry {position} is not name=value (the text is not shown, it may be secret)")
        # A byte that is no UTF-8 becomes U+FFFD, which the check of the value refuses.
        headers[unquote(name.strip())] = unquote(value.strip())
    return headers


ENVIRONMENT: dict[str, tuple[str, Callable[[str], object]]] = {
    "ENDPOINT": ("export.otlp.endpoint", str),
    "HEADERS": ("export.otlp.headers", _header_list),
    "COMPRESSION": ("export.otlp.compression", str),
    "TIMEOUT": ("export.otlp.timeout_seconds", _milliseconds),
    "INSECURE": ("export.otlp.insecure", _boolean),
    "CERTIFICATE": ("export.otlp.certificate", str),
    "CLIENT_KEY": ("export.otlp.client_key", str),
    "CLIENT_CERTIFICATE": ("export.otlp.client_certificate", str),
}
"""``OTEL_EXPORTER_OTLP_[TRACES_]<suffix>`` -> setting and decoder (OpenTelemetry specification, OTLP exporter)."""


def _build(section: type[Section], prefix: str, values: Mapping[str, object]) -> Any:
    arguments = {}
    for name, annotation in fields_of(section).items():
        if is_section(annotation):
            arguments[name] = _build(annotation, f"{prefix}{name}.", values)
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return section(**arguments)


# ---- Checking --------------------------------------------------------------------------------------------------------


def _setting(where: str, key: str, annotation: Any, value: object) -> object:
    """Return the value of setting ``key`` in its final form; ``where`` is the key or variable that errors name."""
    if key == "export.console" and value is False:
        value = "off"  # YAML 1.1 reads a bare off as false.
    elif key == "kubernetes.enabled" and isinstance(value, bool):
        value = "on" if value else "off"
    converted = _convert(where, annotation, value, secret=key in ("export.otlp.headers", "export.otlp.endpoint"))
    if (finish := _FINISH.get(key)) is None:
        return converted
    try:
        return finish(converted)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(where: str, annotation: Any, value: object, secret: bool) -> Any:
    bare = bare_type(annotation)
    if get_origin(bare) is tuple and isinstance(value, list):
        value = [_convert(f"{where}[{i}]", get_args(bare)[0], item, secret) for i, item in enumerate(value)]
    elif get_origin(bare) is dict and isinstance(value, dict):
        key_type, item_type = get_args(bare)
        value = {
            _convert(f"{where}: the name {_name(name)}", key_type, name, False): _convert(
                f"{where}.{_name(name)}", item_type, item, secret
            )
            for name, item in value.items()
        }
    elif bare is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # Helm renders large integers as 8.388608e+06.
    try:
        converted = msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        pass
    else:
        if not isinstance(converted, float) or math.isfinite(converted):
            return converted
    hint = ""
    if str in (bare, *map(bare_type, get_args(bare))) and isinstance(value, (bool, int, float)):
        hint = " (put a text in quotes)"
    raise ConfigError(f"{where}: must be {describe(annotation)}, not {_show(value, secret)}{hint}")


def _endpoint(value: str | None) -> str | None:
    """Accept what names a gRPC server without doubt, and nothing that could carry a password."""
    if value is None:
        return None
    match = re.fullmatch(
        r"(?:(https?)://)?(\[[0-9a-f:.]+\]|[\w.-]+)(?::([0-9]{1,5}))?/?", value, re.ASCII | re.IGNORECASE
    )
    if match is None or (match[3] and not 1 <= int(match[3]) <= 65535):
        hint = "; credentials belong in export.otlp.headers" if "@" in value else f", not {_show(value)}"
        raise ValueError(f"must be http://HOST:PORT, https://HOST:PORT or HOST:PORT without a path{hint}")
    if match[2].startswith("["):
        try:
            inet_pton(AF_INET6, match[2][1:-1])
        except OSError:
            raise ValueError(f"{_show(match[2])} is no IPv6 address") from None
    scheme = f"{match[1].lower()}://" if match[1] else ""
    return scheme + match[2] + (f":{match[3]}" if match[3] else "")


def _metadata(headers: dict[str, str]) -> dict[str, str]:
    """Check against what gRPC metadata allows (gRPC over HTTP/2, Custom-Metadata)."""
    result = {}
    for name, value in headers.items():
        lower = name.lower()
        if not re.fullmatch(r"[0-9a-z_.-]+", lower) or lower.startswith("grpc-"):
            raise ValueError(
                f"the header name {_name(name)} is not allowed; use letters, digits, -, _ and ., not grpc- in front"
            )
        if not re.fullmatch(r"[ -~]*", value):
            raise ValueError(f"the value of the header {_name(name)} has characters other than printable ASCII")
        result[lower] = value
    return result


def _header_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(r"[0-9A-Za-z!#$%&'*+.^_`|~-]+", name):  # RFC 9110, section 5.6.2: token
            raise ValueError(f"{_show(name)} is not a header name")
    return tuple(dict.fromkeys(name.lower() for name in names))


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is listed twice; each format may stand once")
    return values


def _route_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if patterns:
        from agent.routes import Routes

        try:
            Routes(patterns)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return patterns


def _listen(value: str | None) -> str | None:
    if value is not None:
        match = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]*):([0-9]{1,5})", value, re.ASCII)
        if match is None or int(match[1]) > 65535:
            raise ValueError(f'must be HOST:PORT such as "127.0.0.1:9469" or "[::]:9469", or null, not {_show(value)}')
    return value


def _label_selector(value: str) -> str:
    if value:
        from agent.kube.select import LabelSelector

        LabelSelector(value)
    return value


def _ring_buffer_bytes(value: int) -> int:
    from mmap import PAGESIZE

    if value & (value - 1) or value % PAGESIZE:
        lower = max(PAGESIZE, 1 << (value.bit_length() - 1))
        raise ValueError(f"must be a power of two and a multiple of {PAGESIZE}, such as {lower}, not {value}")
    return value


_FINISH: dict[str, Callable[[Any], object]] = {
    "export.otlp.endpoint": _endpoint,
    "export.otlp.headers": _metadata,
    "capture.request_headers": _header_names,
    "capture.response_headers": _header_names,
    "propagation.formats": _distinct,
    "routes.patterns": _route_patterns,
    "telemetry.listen": _listen,
    "select.kubernetes.labels": _label_selector,
    "kernel.ring_buffer_bytes": _ring_buffer_bytes,
}
"""Setting -> function that returns the final value, or raises ``ValueError`` with the text for the operator."""


def _check_together(config: Config) -> None:
    """Refuse settings that are right alone and wrong together."""
    capture, export = config.capture, config.export
    for key in ("request_headers", "response_headers"):
        if (names := getattr(capture, key)) and not capture.dangerously_allow_secret_headers:
            from agent.redaction import is_secret_header

            for name in filter(is_secret_header, names):
                raise ConfigError(
                    f"capture.{key}: {name} may carry credentials and is refused; remove it, or set "
                    "capture.dangerously_allow_secret_headers: true"
                )
    if (export.otlp.client_key is None) != (export.otlp.client_certificate is None):
        missing = "client_key" if export.otlp.client_key is None else "client_certificate"
        raise ConfigError(f"export.otlp.{missing}: missing; client_key and client_certificate must be given together")
    if export.batch.max_spans > export.queue_spans:
        raise ConfigError(
            f"export.batch.max_spans: must be at most export.queue_spans ({export.queue_spans}), "
            f"not {export.batch.max_spans}"
        )


def _unknown_key(section: type[Section], path: str, name: object) -> ConfigError:
    """Name the nearest key: one of this very name elsewhere, a sibling, or a setting whose last part is alike."""
    from difflib import get_close_matches

    prefix = f"{path}." if path else ""
    fields = fields_of(section)
    text = str(name)[:80]
    elsewhere = {key.rpartition(".")[2]: key for key, _ in reversed(list(leaves()))}
    last = text.rpartition(".")[2]
    if last in elsewhere and text not in fields:
        suggestion = f"did you mean {elsewhere[last]}?"
    elif near := get_close_matches(text, fields, 1):
        suggestion = f"did you mean {prefix}{near[0]}?"
    elif near := get_close_matches(last, elsewhere, 1, 0.8):
        suggestion = f"did you mean {elsewhere[near[0]]}?"
    else:
        suggestion = f"valid here: {', '.join(fields)}"
    return ConfigError(f"{prefix}{_name(name)}: unknown key; {suggestion}")


def _name(name: object) -> str:
    """A key as the operator wrote it, or quoted and cut where that would garble the line."""
    return name if isinstance(name, str) and re.fullmatch(r"[!-~]{1,100}", name) else _show(name)


def _show(value: object, secret: bool = False) -> str:
    """A value for an error message: one line, short, and without its content where that may be secret."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a map"
    if value is None:
        return "null"
    if secret:
        return "the value given"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
