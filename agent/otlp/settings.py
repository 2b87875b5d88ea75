"""Where and how to export: the exporter's settings, and what follows from them before anything is sent.

In: ``ExporterSettings`` and PEM files. Out: a gRPC target, call metadata, certificates; ConfigError for what can never
work, with a text that names the setting. Never opens a connection and never imports gRPC.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from agent.errors import ConfigError

DEFAULT_PORT = 4317

_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")


class ExporterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how to export. Every bound is here, with its default.

    ``endpoint`` is ``http://host:port``, ``https://host:port`` or ``host:port``; the scheme decides about TLS, and
    ``insecure`` only when there is none. Without a port it is 4317. ``certificate`` (the CAs to trust instead of
    the system's), ``client_key`` and ``client_certificate`` are paths of PEM files. ``headers`` go with each call.

    ``timeout_seconds`` bounds one attempt, ``retry_elapsed_seconds`` the time from the first attempt of a batch to the
    start of its last one; so a batch is settled after at most the sum of both. The wait between attempts begins at
    ``backoff_initial_seconds`` and doubles up to ``backoff_max_seconds``.

    ``queue_spans`` and ``queue_bytes`` bound what is accepted and not yet settled, whichever is reached first; beyond
    it, ``submit`` refuses. ``max_in_flight`` is the number of concurrent calls.
    """

    endpoint: str = "http://localhost:4317"
    headers: dict[str, str] = {}
    compression: Literal["none", "gzip"] = "none"
    timeout_seconds: float = 10.0
    insecure: bool = False
    certificate: str | None = None
    client_key: str | None = None
    client_certificate: str | None = None
    queue_spans: int = 65536
    queue_bytes: int = 16 << 20
    max_in_flight: int = 2
    retry_elapsed_seconds: float = 60.0
    backoff_initial_seconds: float = 1.0
    backoff_max_seconds: float = 30.0


def parse_endpoint(endpoint: str, insecure: bool) -> tuple[str, bool]:
    """``(gRPC target, uses TLS)`` of an OTLP endpoint (OTLP exporter specification, "Configuration Options").

    Raises ConfigError for anything but ``[http://|https://]host[:port]``.
    """
    scheme, separator, _ = endpoint.partition("://")
    if not separator:
        scheme = "http" if insecure else "https"
        endpoint = f"{scheme}://{endpoint}"
    if scheme.lower() not in ("http", "https"):
        raise ConfigError(f"export.otlp.endpoint {endpoint!r}: the scheme must be http or https")
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"export.otlp.endpoint {endpoint!r}: {error}") from None
    if not host or port == 0 or re.search(r"\s", endpoint):
        raise ConfigError(f"export.otlp.endpoint {endpoint!r}: give it as http://host:port")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"export.otlp.endpoint of host {host!r}: only scheme, host and port are allowed")
    if parts.path not in ("", "/"):
        raise ConfigError(
            f"export.otlp.endpoint {endpoint!r}: a path belongs to OTLP/HTTP; give the OTLP/gRPC address (port 4317)"
        )
    if ":" in host:
        host = f"[{host}]"
    return f"{host}:{port or DEFAULT_PORT}", scheme.lower() == "https"


def metadata_of(headers: dict[str, str]) -> tuple[tuple[str, str | bytes], ...]:
    """Headers as gRPC metadata. Values are secrets, perhaps: no error shows them."""
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers.items():
        lower = name.lower()
        if not _HEADER_NAME.fullmatch(lower) or lower.startswith("grpc-"):
            raise ConfigError(f"export.otlp.headers: {name!r} cannot be the name of a gRPC header")
        if not _HEADER_VALUE.fullmatch(value):
            raise ConfigError(f"export.otlp.headers: the value of {name!r} must be printable ASCII")
        metadata.append((lower, value.encode() if lower.endswith("-bin") else value))
    return tuple(metadata)


def require_positive(settings: ExporterSettings) -> None:
    for name in (
        "timeout_seconds",
        "queue_spans",
        "queue_bytes",
        "max_in_flight",
        "backoff_initial_seconds",
        "backoff_max_seconds",
    ):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"export.otlp.{name}: must be greater than 0")


def read_certificates(settings: ExporterSettings) -> tuple[bytes | None, bytes | None, bytes | None]:
    """``(root certificates, private key, certificate chain)`` in PEM, None where not set.

    gRPC takes any bytes here and then fails each connection without a reason, so the files are tried with the standard
    library first. Raises ConfigError with the path.
    """
    import ssl

    if (settings.client_key is None) != (settings.client_certificate is None):
        raise ConfigError("export.otlp.client_key and export.otlp.client_certificate: set both or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Without one of its own: the system's file (or SSL_CERT_FILE), and gRPC's built-in one where that is missing too.
    root = _read("certificate", settings.certificate or ssl.get_default_verify_paths().cafile)
    key = _read("client_key", settings.client_key)
    chain = _read("client_certificate", settings.client_certificate)
    if settings.certificate is not None:
        try:
            context.load_verify_locations(settings.certificate)
        except ssl.SSLError as error:
            raise ConfigError(
                f"export.otlp.certificate {settings.certificate}: no PEM certificate ({error.reason})"
            ) from None
    if settings.client_certificate is not None:
        try:
            # An empty password: an encrypted key is an error and not a question on the terminal.
            context.load_cert_chain(settings.client_certificate, settings.client_key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"export.otlp.client_certificate {settings.client_certificate}: not an unencrypted PEM pair with "
                f"{settings.client_key} ({getattr(error, 'reason', error)})"
            ) from None
    return root, key, chain


def _read(setting: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"export.otlp.{setting} {path}: {error.strerror}") from None
