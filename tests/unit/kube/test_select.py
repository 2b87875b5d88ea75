"""Selection of pods: the grammar of label selectors, its errors, and the precedence of the rules."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import ConfigError
from agent.kube.pods import Pod
from agent.kube.select import LabelSelector, PodRules

SHOP = {"app": "shop", "tier": "web", "weight": "5"}

MATCHES = [
    # Everything
    ("", SHOP, True),
    ("", {}, True),
    (" \t\r\n", SHOP, True),
    # Equality
    ("app=shop", SHOP, True),
    ("app==shop", SHOP, True),
    ("app = shop", SHOP, True),
    ("  app\t==\nshop ", SHOP, True),
    ("app=other", SHOP, False),
    ("app=shop", {}, False),
    ("app=Shop", SHOP, False),
    ("app!=shop", SHOP, False),
    ("app!=other", SHOP, True),
    ("app!=shop", {}, True),
    ("app!=", {}, True),
    ("app!=", {"app": ""}, False),
    ("app=", {"app": ""}, True),
    ("app=", SHOP, False),
    ("app=", {}, False),
    ("app=,tier", {"app": "", "tier": "x"}, True),
    # Existence
    ("app", SHOP, True),
    ("app", {"app": ""}, True),
    ("team", SHOP, False),
    ("!team", SHOP, True),
    ("! team", SHOP, True),
    ("!app", SHOP, False),
    # Sets
    ("app in (shop)", SHOP, True),
    ("app in (a,shop,b)", SHOP, True),
    ("app in ( a , shop )", SHOP, True),
    ("app in(shop)", SHOP, True),
    ("app in (a,b)", SHOP, False),
    ("app in (a)", {}, False),
    ("app notin (a,b)", SHOP, True),
    ("app notin (a,shop)", SHOP, False),
    ("app notin (a)", {}, True),
    ("app in ()", {"app": ""}, True),
    ("app in ()", SHOP, False),
    ("app in ()", {}, False),
    ("app notin ()", {"app": ""}, False),
    ("app notin ()", SHOP, True),
    ("app in (,)", {"app": ""}, True),
    ("app in (,shop)", SHOP, True),
    ("app in (shop,)", {"app": ""}, True),
    ("app in (a,,b)", {"app": ""}, True),
    ("app in (a,,b)", {"app": "b"}, True),
    # Numbers
    ("weight>4", SHOP, True),
    ("weight > 5", SHOP, False),
    ("weight<6", SHOP, True),
    ("weight<5", SHOP, False),
    ("weight>4", {}, False),
    ("weight<4", {}, False),
    ("weight>4", {"weight": "heavy"}, False),
    ("weight<4", {"weight": ""}, False),
    ("weight>4", {"weight": "1_0"}, False),
    ("weight>4", {"weight": "٧"}, False),
    ("weight>4", {"weight": "9223372036854775807"}, True),
    ("weight>4", {"weight": "9223372036854775808"}, False),
    ("weight>4", {"weight": "9" * 5000}, False),
    # All have to hold
    ("app=shop,tier=web", SHOP, True),
    ("app=shop,tier=db", SHOP, False),
    ("app=shop,tier!=db,weight in (4,5),!legacy,tier", SHOP, True),
    ("app=shop,tier!=db,weight in (4,5),!legacy,team", SHOP, False),
    ("app=shop,app=other", SHOP, False),
    # Keys and values that look like operators
    ("in", {"in": "x"}, True),
    ("in in (in,notin)", {"in": "notin"}, True),
    ("notin notin (in)", {"notin": "in"}, False),
    ("!in", {"in": "x"}, False),
    ("in=in", {"in": "in"}, True),
    ("app=notin", {"app": "notin"}, True),
    # Keys with a prefix, and the longest that are allowed
    ("app.kubernetes.io/name=shop", {"app.kubernetes.io/name": "shop"}, True),
    ("A_b.c-9=X_y.z-0", {"A_b.c-9": "X_y.z-0"}, True),
    (f"{'k' * 63}={'v' * 63}", {"k" * 63: "v" * 63}, True),
    (f"{'.'.join(['d' * 62] * 4)}d/k", {f"{'.'.join(['d' * 62] * 4)}d/k": ""}, True),
]


@pytest.mark.parametrize(("text", "labels", "expected"), MATCHES)
def test_selectors_match_as_in_kubernetes(text: str, labels: dict[str, str], expected: bool) -> None:
    """Equality, existence, sets and numbers, all joined by "and"."""
    assert LabelSelector(text).matches(labels) is expected


ERRORS = [
    (",", 1, "a label key"),
    ("app,", 5, "a label key"),
    ("app,,tier", 5, "a label key"),
    (",app", 1, "a label key"),
    ("=shop", 1, "a label key"),
    ("(a)", 1, "a label key"),
    ("!", 2, "a label key"),
    ("!!app", 2, "a label key"),
    ("app shop", 5, "one of = == != in notin > <"),
    ("app in", 7, '"("'),
    ("app in shop", 8, '"("'),
    ("app in (shop", 13, '"," or ")"'),
    ("app in (", 9, "a label value"),
    ("app in (a b)", 11, '"," or ")"'),
    ("app in (a=b)", 10, '"," or ")"'),
    ("app in ((a))", 9, "a label value"),
    ("app in (a))", 11, '"," or the end'),
    ("app In (a)", 5, "one of"),
    ("app=shop tier=web", 10, '"," or the end'),
    ("app=shop;tier=web", 5, "a label value"),
    ("app===shop", 6, "a label value"),
    ("app!==shop", 6, "a label value"),
    ("app=!shop", 5, "a label value"),
    ("app=(shop)", 5, "a label value"),
    ("app!shop", 4, "one of"),
    ("!app=shop", 5, '"," or the end behind "!app"'),
    ("!app in (a)", 6, '"," or the end behind "!app"'),
    ("weight>", 8, "a whole number"),
    ("weight>,app", 8, "a whole number"),
    ("weight>heavy", 8, "a whole number"),
    ("weight>1.5", 8, "a whole number"),
    ("weight>-1", 8, "a label value"),
    ("weight<9223372036854775808", 8, "a whole number"),
    ("-app", 1, "a label key"),
    ("app-", 1, "a label key"),
    ("äpp", 1, "a label key"),
    ("app=shöp", 5, "a label value"),
    ("app=shop.", 5, "a label value"),
    ('app="shop"', 5, "a label value"),
    ("app=sh\0op", 5, "a label value"),
    ("app\u00a0in\u00a0(a)", 1, "a label key"),
    ("/app", 1, 'before the "/"'),
    ("app/", 1, "a label key"),
    ("Example.com/app", 1, 'before the "/"'),
    ("a..b/app", 1, 'before the "/"'),
    ("a/b/app", 1, 'before the "/"'),
    (f"{'k' * 64}", 1, "a label key"),
    (f"{'d' * 254}/k", 1, 'before the "/"'),
    (f"app={'v' * 64}", 5, "a label value"),
]


@pytest.mark.parametrize(("text", "position", "expected"), ERRORS)
def test_a_malformed_selector_is_refused_with_the_place(text: str, position: int, expected: str) -> None:
    """One line: the selector, the character counted from 1, what had to stand there and what does."""
    with pytest.raises(ConfigError) as caught:
        LabelSelector(text)
    message = str(caught.value)
    assert f"at character {position}: expected " in message
    assert expected in message
    assert message.isprintable()
    assert len(message) < 300


def test_the_message_names_what_was_found() -> None:
    """The text, or that it ended."""
    with pytest.raises(ConfigError, match=re.escape("label selector 'app in (a b)': at character 11: ")) as caught:
        LabelSelector("app in (a b)")
    assert str(caught.value).endswith("not 'b'")
    with pytest.raises(ConfigError, match="not the end"):
        LabelSelector("app in (a")
    with pytest.raises(ConfigError, match="not ','"):
        LabelSelector("weight>,app")


def test_a_very_long_selector_is_refused() -> None:
    """4096 characters are allowed."""
    exactly = ",".join(["a=b"] * 1024) + "c"
    assert len(exactly) == 4096
    assert LabelSelector(exactly).matches({"a": "b"}) is False
    with pytest.raises(ConfigError, match="at most 4096"):
        LabelSelector(exactly + "c")


PIECES = st.sampled_from(
    ("a", "b.c/d", "in", "notin", "=", "==", "!=", "!", "<", ">", "(", ")", ",", " ", "7", "-", "\n", "é")
)


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join)))
@example("a" * 5000)
@example("a-" * 2000 + "/k")
@example("(" * 4000)
@example("a in (" + "," * 4000)
def test_any_text_is_a_selector_or_a_configuration_error(text: str) -> None:
    """Nothing else is raised, neither by parsing nor by matching."""
    try:
        selector = LabelSelector(text)
    except ConfigError:
        return
    assert isinstance(selector.matches({"a": "7", "in": ""}), bool)


VALUES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,5}[A-Za-z0-9])?", fullmatch=True)


@given(VALUES, st.lists(VALUES, min_size=1, max_size=4), st.dictionaries(VALUES, VALUES, max_size=3))
def test_opposite_operators_never_agree(key: str, values: list[str], labels: dict[str, str]) -> None:
    """``in`` and ``notin``, ``=`` and ``!=``, ``key`` and ``!key`` divide all label sets between them."""
    listed = ",".join(values)
    for one, other in (
        (f"{key} in ({listed})", f"{key} notin ({listed})"),
        (f"{key}={values[0]}", f"{key}!={values[0]}"),
        (key, f"!{key}"),
    ):
        assert LabelSelector(one).matches(labels) is not LabelSelector(other).matches(labels)
        assert LabelSelector(one).matches({**labels, key: values[0]})


# ---- Rules


def pod(namespace: str = "shop", trace: str | None = None, **labels: str) -> Pod:
    annotations = {} if trace is None else {"spanloom.io/trace": trace}
    return Pod("u1", namespace, "cart-0", labels=labels, annotations=annotations)


RULES = [
    ("no rule", {}, pod(), "web", True),
    ("no rule, container not known", {}, pod(), "", True),
    # 1. and 2. The annotation
    ("false wins over everything", {}, pod(trace="false"), "web", False),
    ("true and a namespace that is excluded", {"namespaces_exclude": ["shop"]}, pod(trace="true"), "web", True),
    ("true and a namespace that is not included", {"namespaces_include": ["kube-*"]}, pod(trace="true"), "web", True),
    ("true and labels that do not match", {"labels": "app=shop"}, pod(trace="true"), "web", True),
    ("true and a container that is excluded", {"containers_exclude": ["web"]}, pod(trace="true"), "web", False),
    ("true and a container that is not included", {"containers_include": ["db"]}, pod(trace="true"), "web", False),
    ("false in capitals, with spaces", {}, pod(trace=" False\n"), "web", False),
    ("true in capitals", {"labels": "app"}, pod(trace="TRUE"), "web", True),
    ("another value, selected by the rest", {}, pod(trace="no"), "web", True),
    ("another value, not selected by the rest", {"labels": "app"}, pod(trace="yes"), "web", False),
    ("an empty value", {}, pod(trace=""), "web", True),
    ("false, not looked at", {"annotation": False}, pod(trace="false"), "web", True),
    ("true, not looked at", {"annotation": False, "labels": "app"}, pod(trace="true"), "web", False),
    # 3. and 4. Namespaces
    ("excluded", {"namespaces_exclude": ["shop"]}, pod(), "web", False),
    ("excluded and included", {"namespaces_exclude": ["sh*"], "namespaces_include": ["shop"]}, pod(), "web", False),
    ("included", {"namespaces_include": ["bank", "sh?p"]}, pod(), "web", True),
    ("not included", {"namespaces_include": ["bank", "shopping"]}, pod(), "web", False),
    ("included by nothing", {"namespaces_include": []}, pod(), "web", False),
    ("a glob is the whole name", {"namespaces_exclude": ["sho"]}, pod(), "web", True),
    ("a glob minds case", {"namespaces_exclude": ["Shop"]}, pod(), "web", True),
    ("a set of letters", {"namespaces_exclude": ["[a-s]hop"]}, pod(), "web", False),
    # 5. Labels
    ("labels match", {"labels": "app=shop,!legacy"}, pod(app="shop"), "web", True),
    ("labels do not match", {"labels": "app=shop,!legacy"}, pod(app="shop", legacy="yes"), "web", False),
    ("namespace is asked before labels", {"namespaces_exclude": ["shop"], "labels": "app"}, pod(app="x"), "web", False),
    # 6. and 7. Containers
    ("container excluded", {"containers_exclude": ["istio-*"]}, pod(), "istio-proxy", False),
    ("another container", {"containers_exclude": ["istio-*"]}, pod(), "web", True),
    ("container included", {"containers_include": ["web", "api"]}, pod(), "api", True),
    ("container not included", {"containers_include": ["web", "api"]}, pod(), "db", False),
    ("container in both", {"containers_include": ["w*"], "containers_exclude": ["web"]}, pod(), "web", False),
    ("container not known, others included", {"containers_include": ["web"]}, pod(), "", True),
    ("container not known, others excluded", {"containers_exclude": ["*"]}, pod(), "", True),
    ("container not known, pod not to be traced", {}, pod(trace="false"), "", False),
    ("container not known, namespace excluded", {"namespaces_exclude": ["shop"]}, pod(), "", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "subject", "container", "expected"), [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_the_first_rule_that_decides_wins(
    rules: dict[str, object], subject: Pod, container: str, expected: bool
) -> None:
    """The numbered list in the docstring of PodRules."""
    assert PodRules(**rules).selects(subject, container) is expected


def test_malformed_labels_are_an_error_of_the_configuration() -> None:
    """They are parsed when the rules are made, not when a pod comes."""
    with pytest.raises(ConfigError, match="at character 6"):
        PodRules(labels="app=,=")


def test_hostile_globs_and_names_take_no_time() -> None:
    """Many stars against a long name that does not match."""
    rules = PodRules(namespaces_exclude=["*a" * 40 + "b"])
    assert rules.selects(pod(namespace="a" * 10_000), "web")
