"""agent.redaction: what must not leave the node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.redaction import DEFAULT_QUERY_KEYS, QueryRedactor, is_secret_header, redact_credentials, split_headers


@pytest.mark.parametrize("key", DEFAULT_QUERY_KEYS)
def test_default_keys_lose_their_value_and_stay(key: str) -> None:
    """The value of each default key becomes REDACTED wherever it stands; the others stay as they are."""
    redact = QueryRedactor().query
    assert redact(f"{key}=abc") == f"{key}=REDACTED"
    assert redact(f"a=1&{key}=abc%3D&b=2") == f"a=1&{key}=REDACTED&b=2"
    assert redact(f"{key}=a&{key}=b") == f"{key}=REDACTED&{key}=REDACTED"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ""),
        ("a=1&b=2", "a=1&b=2"),
        ("SIG=1&Sig=2", "SIG=1&Sig=2"),  # case-sensitive
        ("xsig=1&sigx=2", "xsig=1&sigx=2"),
        ("sig", "sig"),
        ("sig=", "sig=REDACTED"),
        ("sig=a=b==", "sig=REDACTED"),
        ("%73ig=a", "%73ig=REDACTED"),
        ("X%2DAmz%2DSignature=a&q=%20", "X%2DAmz%2DSignature=REDACTED&q=%20"),
        ("a=1;sig=x;y&b=2", "a=1;sig=REDACTED&b=2"),
        ("&&sig=x&", "&&sig=REDACTED&"),
        (
            "api_key=a&access_token=b&token=c&password=d",
            "&".join(f"{key}=REDACTED" for key in ("api_key", "access_token", "token", "password")),
        ),
        ("key=record&tokens=2", "key=record&tokens=2"),
    ],
)
def test_query_edge_cases(query: str, expected: str) -> None:
    """Keys are compared case-sensitively and whole, also when percent-encoded or behind a semicolon."""
    assert QueryRedactor().query(query) == expected


def test_configured_keys_replace_the_default() -> None:
    """A configured list is the whole list; an empty one switches the redaction off."""
    assert QueryRedactor(["k.y"]).query("k.y=1&sig=2&kzy=3") == "k.y=REDACTED&sig=2&kzy=3"
    assert QueryRedactor([]).query("sig=2&%73ig=1") == "sig=2&%73ig=1"


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.text("0123456789#", min_size=12), st.text(max_size=40))
def test_a_signed_value_never_survives(before: str, secret: str, after: str) -> None:
    """Whatever stands around it, the value of a secret key is gone, and only then anything changed."""
    redact = QueryRedactor().query
    before, after = before.replace(secret, ""), after.replace(secret, "")
    assert secret not in redact(f"{before}&sig={secret}&{after}")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host/path", "http://host/path"),
        ("http://user:pass@host/path", "http://REDACTED:REDACTED@host/path"),
        ("http://user@host", "http://REDACTED:REDACTED@host"),
        ("HTTPS://u:p@ss@host:8443/?a=b@c", "HTTPS://REDACTED:REDACTED@host:8443/?a=b@c"),
        ("//u:p@host", "//REDACTED:REDACTED@host"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host?x=//u:p@h", "http://host?x=//u:p@h"),
        ("/path@x", "/path@x"),
    ],
)
def test_credentials_in_urls(url: str, expected: str) -> None:
    """User information becomes REDACTED:REDACTED; an "@" elsewhere is left alone."""
    assert redact_credentials(url) == expected


def test_url_redacts_credentials_and_query_and_drops_the_fragment() -> None:
    """A whole URL loses all three at once."""
    redactor = QueryRedactor()
    assert redactor.url("http://u:p@h/x?a=1&sig=s#access_token=t") == "http://REDACTED:REDACTED@h/x?a=1&sig=REDACTED"
    assert redactor.url("/x#t") == "/x"


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "proxy-authorization",
        "COOKIE",
        "Set-Cookie",
        "set-cookie2",
        "x-api-key",
        "api-key",
        "apikey",
        "X_API_KEY",
        "x-auth-token",
        "x-amz-security-token",
        "x-csrf-token",
        "x-xsrf-token",
        "my-api-key",
        "client-secret",
        "x-vault-token",
        "x-goog-api-key",
        "ocp-apim-subscription-key",
        "x-functions-key",
        "x-forwarded-access-token",
        "x-hub-signature-256",
        "php-auth-password",
        "x-session-id",
        "DPoP",
        "authentication-info",
        "x-amz-credential",
    ],
)
def test_secret_header_names(name: str) -> None:
    """Names that carry credentials are recognised in any case and with either separator."""
    assert is_secret_header(name)


@pytest.mark.parametrize(
    "name",
    [
        "content-type",
        "accept",
        "x-request-id",
        "traceparent",
        "idempotency-key",
        "sec-websocket-key",
        "cache-control",
        "user-agent",
        "etag",
        "x-forwarded-for",
        "authority",
        "x-tenant",
        "keep-alive",
    ],
)
def test_harmless_header_names(name: str) -> None:
    """Ordinary names can be captured."""
    assert not is_secret_header(name)


def test_split_headers_keeps_order_and_says_what_it_refused() -> None:
    """Names are lower-cased, deduplicated, and split; the dangerous setting lets all through."""
    names = ["X-Tenant", "Cookie", "x-tenant", " Accept "]
    assert split_headers(names) == (("x-tenant", "accept"), ("cookie",))
    assert split_headers(names, allow_secret=True) == (("x-tenant", "cookie", "accept"), ())
