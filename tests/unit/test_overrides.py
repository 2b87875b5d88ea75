"""Overrides for a time: what is accepted, what is refused and how, when they hold and for whom."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import load
from agent.config_schema import Config, leaves
from agent.errors import ConfigError
from agent.overrides import (
    MATCH_KEYS,
    OVERRIDABLE,
    Override,
    active,
    apply,
    check,
    matches,
    next_end,
    parse_override,
)

UNTIL = "2030-01-31T18:00:00Z"
UNTIL_NS = 1_896_112_800 * 10**9
WHERE = "overrides[0]"


def raw(**fields: object) -> dict[str, object]:
    return {"until": UNTIL, "match": {"namespace": "checkout"}, "set": {"sampling": {"ratio": 1.0}}, **fields}


def override(until_ns: int = UNTIL_NS, match: dict[str, str] | None = None, **set_: object) -> Override:
    return Override(
        until_unix_ns=until_ns,
        match=tuple((match or {"service": "*"}).items()),
        set=tuple((key.replace("__", "."), value) for key, value in set_.items()),
    )


def error_of(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.isprintable(), "an error is one line that cannot disturb a terminal"
    return text


def attempt(call, *arguments):
    """The result of the call, or the ConfigError it raised; anything else it raises fails the test."""
    try:
        return call(*arguments)
    except ConfigError as error:
        return error


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_an_override_is_read():
    """The form of the documentation gives the end in nanoseconds, the globs, and checked values under dotted keys."""
    assert parse_override(raw(), WHERE) == Override(
        until_unix_ns=UNTIL_NS, match=(("namespace", "checkout"),), set=(("sampling.ratio", 1.0),)
    )


@pytest.mark.parametrize(
    "values",
    [
        {"capture": {"request_headers": ["X-Team"]}, "routes": {"patterns": ["/users/{id}"], "guess": True}},
        {"capture.request_headers": ["X-Team"], "routes.patterns": ["/users/{id}"], "routes.guess": True},
        {"capture": {"request_headers": ["X-Team"]}, "sampling": None, "routes.patterns": ["/users/{id}"]}
        | {"routes": {"guess": True}},
    ],
    ids=["nested", "dotted", "mixed"],
)
def test_set_may_be_nested_or_dotted(values):
    """Maps within maps and dotted keys mean the same, and the values get the final form that a file's get."""
    assert sorted(parse_override(raw(set=values), WHERE).set) == [
        ("capture.request_headers", ("x-team",)),
        ("routes.guess", True),
        ("routes.patterns", ("/users/{id}",)),
    ]


@pytest.mark.parametrize(
    ("text", "unix_ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2030-01-31T18:00:00Z", UNTIL_NS),
        ("2030-01-31t18:00:00z", UNTIL_NS),
        ("2030-01-31 18:00:00Z", UNTIL_NS),
        ("2030-01-31T18:00:00+00:00", UNTIL_NS),
        ("2030-01-31T18:00:00-00:00", UNTIL_NS),
        ("2030-01-31T20:30:00+02:30", UNTIL_NS),
        ("2030-01-31T10:00:00-08:00", UNTIL_NS),
        ("2030-02-01T17:59:00+23:59", UNTIL_NS),
        ("2030-01-31T18:00:00.5Z", UNTIL_NS + 500_000_000),
        ("2030-01-31T18:00:00.000000001Z", UNTIL_NS + 1),
        ("2030-01-31T18:00:00.0000000019Z", UNTIL_NS + 1),
        ("2016-12-31T23:59:60Z", 1_483_228_800 * 10**9),
        ("2024-02-29T00:00:00Z", 1_709_164_800 * 10**9),
    ],
)
def test_until_is_rfc_3339(text, unix_ns):
    """All forms of RFC 3339, section 5.6, are read exactly, to the nanosecond."""
    assert parse_override(raw(until=text), WHERE).until_unix_ns == unix_ns


@pytest.mark.parametrize(
    "value",
    [
        "2030-01-31T18:00:00",
        "2030-01-31",
        "2030-01-31T18:00Z",
        "2030-02-30T18:00:00Z",
        "2023-02-29T18:00:00Z",
        "2030-13-01T18:00:00Z",
        "0000-01-01T00:00:00Z",
        "2030-01-31T24:00:00Z",
        "2030-01-31T18:60:00Z",
        "2030-01-31T18:00:61Z",
        "2030-01-31T18:00:00+24:00",
        "2030-01-31T18:00:00+01:60",
        "2030-01-31T18:00:00+0100",
        "2030-01-31T18:00:00.Z",
        "2030-01-31T18:00:00Z\n",
        " 2030-01-31T18:00:00Z",
        "٢٠٣٠-01-31T18:00:00Z",
        "tomorrow",
        "",
        1896112800,
        True,
        ["2030-01-31T18:00:00Z"],
        datetime(2030, 1, 31, tzinfo=UTC),
    ],
)
def test_until_refuses_everything_else(value):
    """A time without an offset, an impossible one or another type is refused under its own key, with an example."""
    text = error_of(parse_override, raw(until=value), WHERE)
    assert text.startswith("overrides[0].until: must be a time with an offset or Z, such as 2030-01-31T18:00:00Z")


@given(
    st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
)
def test_until_agrees_with_datetime(moment, offset_minutes):
    """Any moment written with any offset is the moment that the standard library says it is."""
    sign, (hours, minutes) = "-" if offset_minutes < 0 else "+", divmod(abs(offset_minutes), 60)
    text = f"{moment.isoformat(timespec='microseconds')}{sign}{hours:02}:{minutes:02}"
    since = moment - timedelta(minutes=offset_minutes) - datetime(1970, 1, 1)
    assert parse_override(raw(until=text), WHERE).until_unix_ns == since // timedelta(microseconds=1) * 1000


ERRORS = [
    (None, "overrides[0]: must be a map, not null"),
    ([], "overrides[0]: must be a map, not a list"),
    ("x", "overrides[0]: must be a map, not 'x'"),
    ({}, "overrides[0].until: missing; an override needs until, match, set"),
    (
        {"until": UNTIL, "set": {"sampling.ratio": 1}},
        "overrides[0].match: missing; an override needs until, match, set",
    ),
    (raw(set=None), "overrides[0].set: missing; an override needs until, match, set"),
    (raw(untill=UNTIL), "overrides[0].untill: unknown key; did you mean until?"),
    (raw(what=1), "overrides[0].what: unknown key; valid here: until, match, set"),
    ({None: 1}, "overrides[0].null: unknown key; valid here: until, match, set"),
    (raw(match=[]), "overrides[0].match: must be a map, not a list"),
    (raw(match={}), 'overrides[0].match: empty; name what it is for, or write service: "*" for everything'),
    (raw(match={"namespaces": "x"}), "overrides[0].match.namespaces: unknown key; did you mean namespace?"),
    (raw(match={"zone": "x"}), f"overrides[0].match.zone: unknown key; valid here: {', '.join(MATCH_KEYS)}"),
    (
        raw(match={"pod": 7}),
        "overrides[0].match.pod: must be a text of 1 to 256 characters, not 7 (put a text in quotes)",
    ),
    (raw(match={"pod": ""}), "overrides[0].match.pod: must be a text of 1 to 256 characters, not ''"),
    (raw(match={"pod": ["a"]}), "overrides[0].match.pod: must be a text of 1 to 256 characters, not a list"),
    (raw(set=[]), "overrides[0].set: must be a map, not a list"),
    (raw(set={}), "overrides[0].set: empty; name a setting, such as sampling.ratio: 1.0"),
    (raw(set={"sampling": None}), "overrides[0].set: empty; name a setting, such as sampling.ratio: 1.0"),
    (raw(set={"sampling": 1}), "overrides[0].set.sampling: must be a map, not 1"),
    (
        raw(set={"sampling": {"ration": 1}}),
        "overrides[0].set.sampling.ration: unknown key; did you mean sampling.ratio?",
    ),
    (raw(set={"ratio": 1}), "overrides[0].set.ratio: unknown key; did you mean sampling.ratio?"),
    (raw(set={"sampling.ratio.x": 1}), "overrides[0].set.sampling.ratio.x: unknown key; did you mean sampling.ratio?"),
    (raw(set={"routs": {"guess": True}}), "overrides[0].set.routs: unknown key; did you mean routes?"),
    (raw(set={"x y": 1}), "overrides[0].set.'x y': unknown key; valid here: "),
    (raw(set={"": 1}), "overrides[0].set.'': unknown key; valid here: "),
    (raw(set={5: 1}), "overrides[0].set.5: unknown key; valid here: "),
    (
        raw(set={"capture": {"request_head_bytes": 512}}),
        "overrides[0].set.capture.request_head_bytes: cannot be overridden for a time; what can: capture.",
    ),
    (raw(set={"kernel.poll_seconds": 1}), "overrides[0].set.kernel.poll_seconds: cannot be overridden for a time; "),
    (raw(set={"sampling.ratio": 2}), "overrides[0].set.sampling.ratio: must be a number from 0 to 1, not 2"),
    (raw(set={"sampling": {"ratio": "1"}}), "overrides[0].set.sampling.ratio: must be a number from 0 to 1, not '1'"),
    (
        raw(set={"routes": {"patterns": ["users"]}}),
        "overrides[0].set.routes.patterns: route pattern 'users': write a path such as /users/{id}",
    ),
    (
        raw(set={"capture": {"request_headers": ["a", 5]}}),
        "overrides[0].set.capture.request_headers[1]: must be a text of 1 to 128 characters, not 5",
    ),
    (
        raw(set={"sampling.ratio": 1, "sampling": {"ratio": 0.5}}),
        "overrides[0].set.sampling.ratio: given twice; remove one of the two",
    ),
]


@pytest.mark.parametrize(("item", "error"), ERRORS, ids=[error.partition(";")[0] for _, error in ERRORS])
def test_errors_name_the_exact_key_and_the_remedy(item, error):
    """Every fault is refused with the key it is at, the reason, and what would be right."""
    assert error_of(parse_override, item, WHERE).startswith(error)


def test_what_can_be_overridden():
    """Each entry of the table is there, and nothing that is not per process is let in."""
    for entry in OVERRIDABLE:
        assert any(f"{key}.".startswith(f"{entry}.") for key, _ in leaves()), entry
    for key, _ in leaves():
        if not f"{key}.".startswith(tuple(f"{entry}." for entry in OVERRIDABLE)):
            assert "cannot be overridden" in error_of(parse_override, raw(set={key: None}), WHERE)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([UNTIL, "*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["until", "match", "set", *MATCH_KEYS, *OVERRIDABLE, "sampling.ratio", "ratio", "patterns"])
            | st.text(max_size=8)
            | st.none()
            | st.integers(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JUNK, st.sampled_from([(), ("until",), ("match",), ("set",)]))
def test_any_value_gives_an_override_or_a_config_error(value, path):
    """Whatever YAML can hold, at any place of an override: an override that can be applied, or one printable line."""
    item = raw(**{path[0]: value}) if path else value
    parsed = attempt(parse_override, item, WHERE)
    if isinstance(parsed, ConfigError):
        assert str(parsed).startswith(WHERE)
        assert str(parsed).isprintable()
        return
    assert parsed.set
    assert parsed.match
    result = attempt(apply, Config(), parsed)
    assert isinstance(result, Config) or "credentials" in str(result)


# ---- Time ------------------------------------------------------------------------------------------------------------


def test_overrides_end_by_themselves():
    """An override holds until its end, exclusively; the next end is that of the first one still active."""
    early, late = override(100, sampling__ratio=1.0), override(200, sampling__ratio=0.5)
    both = (late, early)
    assert active(both, 99) == (late, early)
    assert next_end(both, 99) == 100
    assert active(both, 100) == (late,)
    assert next_end(both, 100) == 200
    assert active(both, 200) == ()
    assert next_end(both, 200) is None
    assert next_end((), 0) is None


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 60))
def test_nothing_changes_before_the_next_end(ends, now):
    """Who looks again at the next end and not before misses no end."""
    overrides = tuple(override(end) for end in ends)
    end = next_end(overrides, now)
    for later in range(now, 61):
        if end is not None and later >= end:
            assert len(active(overrides, later)) < len(active(overrides, now))
        else:
            assert active(overrides, later) == active(overrides, now)


# ---- Matching --------------------------------------------------------------------------------------------------------

FACTS = {
    "namespace": "checkout",
    "pod": "cart-7d4f",
    "container": "web",
    "executable": "python3.11",
    "executable_path": "/usr/bin/python3.11",
    "service": "Cart",
}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"namespace": "checkout"}, True),
        ({"namespace": "check*"}, True),
        ({"namespace": "Checkout"}, False),
        ({"namespace": "heckou"}, False),
        ({"namespace": "checkou?"}, True),
        ({"pod": "cart-[0-9]*"}, True),
        ({"pod": "cart-[!0-9]*"}, False),
        ({"namespace": "checkout", "pod": "cart-*", "container": "web"}, True),
        ({"namespace": "checkout", "container": "proxy"}, False),
        ({"executable": "python3*"}, True),
        ({"executable": "/usr/bin/python3*"}, True),
        ({"executable": "/opt/*"}, False),
        ({"executable": "*bin*"}, False),
        ({"executable": "*/bin/*"}, True),
        ({"service": "*"}, True),
        ({"service": "C*t"}, True),
        ({"service": "cart"}, False),
        ({"service": "[" + "*" * 200}, False),
    ],
)
def test_all_globs_must_match(match, expected):
    """Globs are case-sensitive, match the whole fact, and hold together only when each of them does."""
    assert matches(override(match=match), FACTS) is expected


@pytest.mark.parametrize("name", MATCH_KEYS)
@pytest.mark.parametrize("facts", [{}, dict.fromkeys(MATCH_KEYS, "")])
def test_an_absent_fact_matches_nothing(name, facts):
    """A host process is in no namespace: not even ``*`` is about it."""
    assert not matches(override(match={name: "*"}), facts)


# ---- Applying --------------------------------------------------------------------------------------------------------


def test_apply_changes_only_what_is_set():
    """The result differs in the named setting only, and the configuration it came from stays as it is."""
    config = load(None, ["sampling.ratio=0.1", "routes.guess=true", "export.otlp.headers={k: v}"], {})
    result = apply(config, parse_override(raw(), WHERE))
    assert result == load(None, ["sampling.ratio=1", "routes.guess=true", "export.otlp.headers={k: v}"], {})
    assert config.sampling.ratio == 0.1


def test_later_overrides_win():
    """Of several that match, the last one that names a setting decides; what it does not name stays."""
    config = Config()
    for values in ({"sampling.ratio": 0.5, "routes.guess": True}, {"sampling.ratio": 0.25}):
        config = apply(config, parse_override(raw(set=values), WHERE))
    assert (config.sampling.ratio, config.routes.guess) == (0.25, True)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"sampling__ratio": "all"}, "sampling.ratio: must be a number from 0 to 1, not 'all'"),
        ({"limits__processes": 16}, "limits.processes: cannot be overridden"),
        ({"sampling__what": 16}, "sampling.what: unknown key"),
    ],
)
def test_apply_checks_like_a_file(values, error):
    """Even an override that was not read from a file cannot make a configuration that no file could."""
    assert error_of(apply, Config(), override(**values)).startswith(error)


def test_secret_headers_are_refused_when_the_file_is_loaded():
    """What is wrong only together with the rest is found by ``check``, under the key it is at in the file."""
    item = parse_override(raw(set={"capture": {"request_headers": ["Authorization"]}}), WHERE)
    harmless = parse_override(raw(), WHERE)
    text = error_of(check, Config(), (harmless, item))
    assert text.startswith("overrides[1].set.capture.request_headers: authorization may carry credentials")
    check(load(None, ["capture.dangerously_allow_secret_headers=true"], {}), (harmless, item))
    check(Config(), (harmless,))
    check(Config(), ())
