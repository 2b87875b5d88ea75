"""agent.routes: configured route templates and the opt-in guess."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import routes
from agent.errors import ConfigError
from agent.routes import Routes, guess


@pytest.mark.parametrize(
    ("pattern", "method", "path", "expected"),
    [
        ("/users/{id}", "GET", "/users/7", "/users/{id}"),
        ("/users/{id}", "GET", "/users/", None),
        ("/users/{id}", "GET", "/users/7/", None),
        ("/users/{id}", "GET", "/users/7/orders", None),
        ("/users/{id}/orders/{order}", "GET", "/users/7/orders/8", "/users/{id}/orders/{order}"),
        ("GET /users/{id}", "GET", "/users/7", "/users/{id}"),
        ("GET /users/{id}", "POST", "/users/7", None),
        ("/static/*", "GET", "/static/a/b.css", "/static/*"),
        ("/static/*", "GET", "/static/", "/static/*"),
        ("/static/*", "GET", "/static", None),
        ("/*", "GET", "/", "/*"),
        ("/", "GET", "/", "/"),
        ("/", "GET", "/a", None),
        ("/*", "OPTIONS", "*", None),
        ("/*", "CONNECT", "", None),
        ("/a.b", "GET", "/axb", None),
    ],
)
def test_match(pattern: str, method: str, path: str, expected: str | None) -> None:
    """Segments are compared whole; a parameter takes one non-empty segment, a final * takes one or more."""
    assert Routes([pattern]).match(method, path) == expected


def test_the_first_pattern_wins() -> None:
    """Order decides, not length or specificity; a method in front takes part in the decision."""
    configured = Routes(["POST /users/{id}", "/users/me", "/users/{id}", "/*"])
    assert configured.match("GET", "/users/me") == "/users/me"
    assert configured.match("POST", "/users/me") == "/users/{id}"
    assert configured.match("GET", "/users/1") == "/users/{id}"
    assert configured.match("GET", "/x") == "/*"


@pytest.mark.parametrize("pattern", ["users", "", "/a/{", "/a/{x}.json", "/a/*/b", "/a b", "/{}", "GET", "/a?b", "/**"])
def test_malformed_patterns_are_refused(pattern: str) -> None:
    """A pattern that could never do what it says is a configuration error that names it."""
    with pytest.raises(ConfigError, match=re.escape(repr(pattern))):
        Routes([pattern])


def test_the_memo_is_bounded_and_does_not_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More paths than the memo holds, and paths too long for it, match as before."""
    monkeypatch.setattr(routes, "MEMO_ENTRIES", 8)
    configured = Routes(["/u/{id}"])
    for _ in range(2):
        for number in range(50):
            assert configured.match("GET", f"/u/{number}") == "/u/{id}"
            assert configured.match("GET", f"/v/{number}") is None
            assert len(configured._memo) <= 8
    assert configured.match("GET", "/u/" + "x" * 1000) == "/u/{id}"
    assert all(len(path) <= routes.MEMO_PATH_CHARACTERS for _, path in configured._memo)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("/health", "/health"),
        ("/api/v1/users/42", "/api/v1/users/{id}"),
        ("/users/550e8400-e29b-41d4-a716-446655440000/orders", "/users/{id}/orders"),
        ("/blobs/deadbeefcafe", "/blobs/{id}"),
        ("/blobs/5f4dcc3b5aa765d6", "/blobs/{id}"),
        ("/files/" + "a" * 40, "/files/{id}"),
        ("/oauth2/token", "/oauth2/token"),
        ("/u/anna@example.org", "/u/{id}"),
        ("/search/a%20b", "/search/{id}"),
        ("/a/b/c/d/e/f/g/h", "/a/b/c/d/e/f/*"),
        ("/a/", "/a/"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_guess(path: str, expected: str) -> None:
    """What looks like an identifier is replaced; words and versions stay."""
    assert guess(path) == expected


@given(st.text())
def test_guess_is_bounded_whatever_the_path(path: str) -> None:
    """A guess never has more segments than the bound, nor a run of three digits outside a version."""
    template = guess("/" + path)
    assert template.count("/") <= routes.GUESS_SEGMENTS + 1
    assert not re.search(r"(?<![vV.\d])\d{3}", template)
    assert len(template) <= 40 * (routes.GUESS_SEGMENTS + 1)
