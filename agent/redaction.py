"""What must not leave the node: credentials in URLs, signed query values, secret headers.

In: text and header names. Out: the same text with the secret parts replaced, or a yes/no. Never happens: a secret is
shortened, hashed or partly shown; a value is guessed at (only its key or its place in the URL counts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote_plus

REDACTED = "REDACTED"

DEFAULT_QUERY_KEYS = (
    "X-Amz-Signature",
    "X-Amz-Credential",
    "X-Amz-Security-Token",
    "AWSAccessKeyId",
    "Signature",
    "sig",
    "X-Goog-Signature",
    "api_key",
    "apikey",
    "apiKey",
    "api-key",
    "access_token",
    "refresh_token",
    "id_token",
    "token",
    "client_secret",
    "secret",
    "password",
)
"""Query keys whose values are replaced by default; case-sensitive. Up to X-Goog-Signature the list of the semantic
conventions (``url.query``), then what carries API keys and credentials: docs/adr/0010."""

_SECRET_NAMES = frozenset(
    ("authentication-info", "proxy-authentication-info", "dpop", "x-auth", "x-auth-user", "x-ms-client-principal")
)
# A substring anywhere in the name (after "_" became "-"). Too many refusals cost a line of configuration, one refusal
# too few costs a credential; so the list is generous, but it spares idempotency-key, sec-websocket-key and the like.
_SECRET_PARTS = re.compile(
    r"authoriz|cookie|token|secret|passw|passphrase|credential|session-?id|signature|jwt|csrf|xsrf|assertion"
    r"|(?:api|access|auth|account|private|secret|shared|master|subscription|functions|encryption|customer|license)-?key"
)

_CREDENTIALS = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.\-]*:)?//)[^/?#]*@")


def is_secret_header(name: str) -> bool:
    """Tell whether header ``name`` (any case) is refused for capture: it carries credentials by its name.

    Refused: Authorization, Proxy-Authorization, Cookie, Set-Cookie, (Proxy-)Authentication-Info, DPoP, X-Auth, and
    every name that contains one of: authoriz, cookie, token, secret, passw, passphrase, credential, session-id,
    signature, jwt, csrf, xsrf, assertion, or ``api``/``access``/``auth``/``account``/``private``/``secret``/``shared``/
    ``master``/``subscription``/``functions``/``encryption``/``customer``/``license`` followed by ``key``.
    "_" counts as "-".
    """
    name = name.strip().lower().replace("_", "-")
    return name in _SECRET_NAMES or _SECRET_PARTS.search(name) is not None


def split_headers(names: Iterable[str], *, allow_secret: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the configured header ``names`` into (captured, refused), both lower-case, in order, without duplicates."""
    captured: list[str] = []
    refused: list[str] = []
    for name in dict.fromkeys(name.strip().lower() for name in names):
        (captured if allow_secret or not is_secret_header(name) else refused).append(name)
    return tuple(captured), tuple(refused)


class QueryRedactor:
    """Replaces the values of secret query keys; the keys stay (semantic conventions, ``url.query``)."""

    def __init__(self, keys: Iterable[str] = DEFAULT_QUERY_KEYS) -> None:
        """Take the secret ``keys``, case-sensitive; an empty iterable switches the redaction of queries off."""
        self._keys = frozenset(keys)
        # A cheap first look: most queries hold none of the keys, not even inside a longer word, and no escape.
        parts = "|".join(re.escape(key) for key in sorted(self._keys))
        self._suspicious = re.compile(f"%|{parts}").search if parts else lambda query: None

    def query(self, query: str) -> str:
        """Redact a query string (without its "?").

        A key counts whether it is written plainly or percent-encoded, and after ";" as well as "&". The value reaches
        to the next "&", so that a ";" inside a signature hides nothing.
        """
        if self._suspicious(query) is None:
            return query
        return "&".join(map(self._parameters, query.split("&")))

    def _parameters(self, part: str) -> str:
        """Redact what lies between two "&"."""
        keys = self._keys
        position = 0
        for parameter in part.split(";"):
            key, equals, _ = parameter.partition("=")
            if equals and (key in keys or unquote_plus(key) in keys):
                return f"{part[:position]}{key}={REDACTED}"
            position += len(parameter) + 1
        return part

    def url(self, url: str) -> str:
        """Redact the credentials and the query of a URL or a relative reference, and drop its fragment.

        A fragment never belongs on the wire; where one appears it may be an OAuth answer (RFC 6749 section 4.2.2).
        """
        url = redact_credentials(url.partition("#")[0])
        head, mark, query = url.partition("?")
        return f"{head}?{self.query(query)}" if mark else head


def redact_credentials(url: str) -> str:
    """Replace ``user:password@`` of an absolute or network-path URL by ``REDACTED:REDACTED@``.

    The user information ends at the last "@" of the authority (RFC 3986 section 3.2), so that a stray "@" in a password
    does not leave half of it behind.
    """
    return _CREDENTIALS.sub(rf"\g<1>{REDACTED}:{REDACTED}@", url)
