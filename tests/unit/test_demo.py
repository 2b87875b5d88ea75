"""The demo's judgement of its traces: what is whole, and what is said of what is not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent import demo
from agent.console import JsonConsole
from agent.demo import application, plan
from agent.demo.agent_process import AgentEndedError, AgentProcess, span_from_json
from agent.errors import SpanloomError
from agent.model import Span, SpanKind
from agent.process import ProcessInfo


def counting_bytes() -> Callable[[int], bytes]:
    """Ids that are all different and the same in every run."""
    calls = iter(range(1, 1_000_000))
    return lambda count: next(calls).to_bytes(count, "big")


REQUESTS = plan.make_requests(10, counting_bytes())
PASSED_ON, WITH_REQUEST_ID, FAILING, BARE = REQUESTS[:4]


def whole_trace(request: plan.Request) -> list[plan.Item]:
    """The spans that an agent without a defect makes of a request."""
    trace_id = request.trace_id or (1 << 100 | request.number).to_bytes(16, "big")
    ids = {one.key: (100 * request.number + n).to_bytes(8, "big") for n, one in enumerate(request.expected, 1)}
    items = []
    for one in request.expected:
        query = f"?request={request.number}" if one.key.path == request.path else ""
        if one.key.kind == SpanKind.CLIENT:
            attributes = [("url.full", f"http://127.0.0.1:1234{one.key.path}{query}")]
        else:
            attributes = [("url.path", one.key.path)]
            if query:
                attributes.append(("url.query", query[1:]))
        span = Span(
            trace_id,
            ids[one.key],
            request.parent_span_id if one.parent is None else ids[one.parent],
            "",
            "GET",
            one.key.kind,
            1_000_000_000,
            1_002_000_000,
            (*attributes, ("http.response.status_code", one.status)),
            one.error,
            (),
            "",
            True,
            (7, 0),
        )
        resource = (("service.name", one.key.service), ("process.pid", 7), ("process.executable.name", "x"))
        items.append((span, ProcessInfo((7, 0), "x", "", (), "", one.key.service, resource, True)))
    return items


def index_of(request: plan.Request, service: str, kind: SpanKind, path: str = "") -> int:
    return next(
        index
        for index, one in enumerate(request.expected)
        if (one.key.service, one.key.kind) == (service, kind) and one.key.path.startswith(path)
    )


def changed(items: list[plan.Item], index: int, **fields: object) -> list[plan.Item]:
    """The trace with some fields of one span replaced."""
    copy = list(items)
    copy[index] = (msgspec.structs.replace(copy[index][0], **fields), copy[index][1])
    return copy


def test_the_five_kinds_of_requests_take_turns():
    """Five requests cover: W3C, x-request-id, a failure, no header, B3; the sixth is like the first."""
    names = [tuple(name for name, _ in request.headers) for request in REQUESTS]
    assert names[:5] == [("traceparent",), ("x-request-id",), ("traceparent",), (), ("b3",)]
    assert names[5:] == names[:5]
    assert [request.status for request in REQUESTS[:5]] == [200, 200, 502, 200, 200]
    assert len({header for request in REQUESTS for header in request.headers}) == 8


def test_expected_spans_form_one_tree_each():
    """Every request has one root, distinct keys, and parents that stand before their children."""
    for request in REQUESTS:
        keys = [one.key for one in request.expected]
        assert len(set(keys)) == len(keys)
        assert [one.parent for one in request.expected].count(None) == 1
        assert all(one.parent in keys[:index] for index, one in enumerate(request.expected) if index)
    assert {one.key.service for one in PASSED_ON.expected} == {
        "client",
        *application.SERVICE_NAMES,
    }


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request.number}")
def test_a_whole_trace_has_no_faults(request_):
    """What an agent without a defect makes is whole."""
    assert plan.faults_of_trace(request_, whole_trace(request_)) == []


@pytest.mark.parametrize(
    "request_", [PASSED_ON, WITH_REQUEST_ID, FAILING, BARE], ids=lambda request: f"{request.number}"
)
def test_every_missing_span_is_named(request_):
    """Whichever span is taken away, the first fault names it; the children it leaves behind are told too."""
    for index, one in enumerate(request_.expected):
        trace = whole_trace(request_)
        gone = trace.pop(index)[0]
        faults = plan.faults_of_trace(request_, trace)
        assert faults[0] == f"the span '{one.key}' is missing"
        orphans = [child.key for child in request_.expected if child.parent == one.key]
        assert faults[1:] == [
            f"'{orphan}' should be under '{one.key}', but is under {gone.span_id.hex()}, which is not there"
            for orphan in orphans
        ]


def test_a_span_under_the_wrong_parent_is_named_with_both_parents():
    """A wrong parent is worse than a missing one: the right and the wrong one are told."""
    trace = whole_trace(PASSED_ON)
    price = index_of(PASSED_ON, "shop", SpanKind.CLIENT, "/price/")
    stock = index_of(PASSED_ON, "stock", SpanKind.SERVER)
    faults = plan.faults_of_trace(PASSED_ON, changed(trace, price, parent_span_id=trace[stock][0].span_id))
    assert faults == [
        "'shop → GET /price/coffee' should be under 'shop GET /articles/coffee', but is under 'stock GET /stock/coffee'"
    ]


def test_two_roots_are_not_whole():
    """A span without a parent that should have one is told to be a root."""
    faults = plan.faults_of_trace(
        BARE, changed(whole_trace(BARE), index_of(BARE, "stock", SpanKind.CLIENT), parent_span_id=b"")
    )
    assert faults == ["'stock → GET /rack/sugar' should be under 'stock GET /stock/sugar', but is a root"]


@pytest.mark.parametrize(
    ("request_", "parent", "place"),
    [
        (PASSED_ON, b"", "a root"),
        (PASSED_ON, bytes(7) + b"\1", "under 0000000000000001, which is not there"),
        (BARE, bytes(7) + b"\1", "under 0000000000000001, which is not there"),
    ],
)
def test_the_root_hangs_where_the_client_said(request_, parent, place):
    """The root's parent is the id in the header that was sent, and nothing without one."""
    faults = plan.faults_of_trace(request_, changed(whole_trace(request_), 0, parent_span_id=parent))
    assert faults == [f"'client → GET {request_.path}' should be the root, but is {place}"]


def test_another_trace_id_than_the_one_sent_is_told():
    """The trace id of the header is kept, on every span."""
    faults = plan.faults_of_trace(PASSED_ON, changed(whole_trace(PASSED_ON), 3, trace_id=bytes(15) + b"\xff"))
    assert faults == ["the trace id is not the one that was sent"]


def test_a_span_twice_and_a_foreign_span_are_told():
    """Exactly the expected spans: none of them twice, none besides."""
    trace = whole_trace(BARE)
    foreign = whole_trace(WITH_REQUEST_ID)[index_of(WITH_REQUEST_ID, "price", SpanKind.SERVER)]
    faults = plan.faults_of_trace(BARE, [*trace, trace[-1], foreign])
    assert faults == [
        "the span 'warehouse GET /rack/sugar' is there 2 times",
        "the span 'price GET /price/tea' does not belong here",
    ]


def test_a_failure_has_to_be_shown_as_one():
    """The failing request's status and error mark are checked, and no other span may be marked."""
    price = index_of(FAILING, "price", SpanKind.SERVER)
    trace = whole_trace(FAILING)
    key = "'price GET /price/gold'"
    assert trace[price][0].error
    assert plan.faults_of_trace(FAILING, changed(trace, price, error=False)) == [f"{key} should be shown as failed"]
    attributes = (("url.path", "/price/gold"), ("http.response.status_code", 200))
    assert plan.faults_of_trace(FAILING, changed(trace, price, attributes=attributes)) == [
        f"{key} should have the status 500, but has 200"
    ]
    attributes = (("url.path", "/price/gold"),)
    assert plan.faults_of_trace(FAILING, changed(trace, price, attributes=attributes)) == [
        f"{key} should have the status 500, but has none"
    ]
    assert plan.faults_of_trace(BARE, changed(whole_trace(BARE), 1, error=True)) == [
        "'stock GET /stock/sugar' should not be shown as failed"
    ]


def test_spans_are_sorted_to_their_requests_in_any_order():
    """The trace id that was sent, or the number in the query, finds the request of a trace."""
    items = [item for request in REQUESTS for item in whole_trace(request)]
    by_request, strays = plan.sort_spans(items[::-1], REQUESTS)
    assert strays == []
    assert all(
        plan.faults_of_trace(request, by_request[request.number]) == [] and by_request[request.number]
        for request in REQUESTS
    )


@pytest.mark.parametrize("backwards", [False, True])
def test_a_torn_trace_is_its_request_s_where_the_client_stands(backwards):
    """When a request's spans fall into two traces, the part of the client is the request's and the other is a stray."""
    torn = [
        (msgspec.structs.replace(span, trace_id=bytes(15) + b"\x77") if index else span, info)
        for index, (span, info) in enumerate(whole_trace(WITH_REQUEST_ID))
    ]
    by_request, strays = plan.sort_spans(torn[::-1] if backwards else torn, REQUESTS)
    assert [plan.key_of(*item).service for item in by_request[2]] == ["client"]
    assert [len(stray) for stray in strays] == [9]
    assert plan.faults_of_trace(WITH_REQUEST_ID, by_request[2])[0] == "the span 'gateway GET /articles/tea' is missing"


def test_strays_are_told_with_their_spans_and_a_bound():
    """A trace that no request explains is told with its first spans; of many traces the first three."""
    bare = whole_trace(BARE)
    assert plan.faults_of_strays([bare[:1]]) == ["a trace belongs to no request: 'client → GET /stock/sugar'"]
    faults = plan.faults_of_strays([whole_trace(PASSED_ON)] * 5)
    assert len(faults) == 4
    assert faults[0].endswith(" and 6 more")
    assert faults[-1] == "and 2 more such traces"


def test_spans_survive_the_way_through_json():
    """What the agent's JSON console writes becomes the same span again, as far as the demo looks at it."""
    for request in REQUESTS:
        items = whole_trace(request)
        stream = io.StringIO()
        JsonConsole(stream).write(items)
        read = [span_from_json(line.encode()) for line in stream.getvalue().splitlines()]
        assert [span for span, _ in read] == [span for span, _ in items]
        assert [info.service_name for _, info in read] == [info.service_name for _, info in items]


def test_the_report_is_true_only_for_whole_traces(capsys):
    """Without faults the last line counts; with one span less the report is false and names request and span."""
    items = [item for request in REQUESTS for item in whole_trace(request)]
    statuses = [request.status for request in REQUESTS]
    assert demo._report(REQUESTS, statuses, items) is True
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "10 of 10 traces whole: 88 spans of 6 services, 2 failing requests shown as failing"
    assert demo._report(REQUESTS, statuses, items[:-1]) is False
    *_, fault, last = capsys.readouterr().out.splitlines()
    assert fault == (
        "not whole: request 10 (GET /articles/honey with a B3 header): the span 'price GET /price/honey' is missing"
    )
    assert last == "9 of 10 traces whole: see above"


def test_a_client_without_its_answer_is_a_fault(capsys):
    """The application has to answer too: a whole trace of a wrong answer is not enough."""
    assert demo._report([BARE], [None], whole_trace(BARE)) is False
    assert "the client got no answer instead of 200" in capsys.readouterr().out


def test_no_span_at_all_is_a_fault(capsys):
    """An agent that finds nothing gives no whole trace."""
    assert demo._report([BARE], [200], []) is False
    out = capsys.readouterr().out
    assert "(no span of it was found)" in out
    assert "0 of 1 trace whole" in out


def test_addresses_are_distinct_and_on_the_loopback():
    """Every service and the agent have a port of their own that no other host reaches."""
    addresses = application.choose_addresses()
    assert set(addresses) == {*application.SERVICE_NAMES, application.AGENT_TELEMETRY}
    assert len(set(addresses.values())) == len(addresses)
    assert all(address.startswith("127.0.0.1:") for address in addresses.values())


def test_without_nginx_the_demo_says_what_to_install(monkeypatch):
    """No nginx: one line with the remedy."""
    monkeypatch.setattr(application.shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(SpanloomError, match="apt-get install nginx-light"):
        application.find_nginx()


@pytest.mark.parametrize("code", [1, 3, 4, 5])
def test_an_agent_that_gives_up_passes_on_its_line_and_its_exit_code(tmp_path: Path, monkeypatch, code):
    """The agent's own one-line message and exit code are what the demo ends with."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\necho '{{\"event\":\"x\"}}' >&2\necho 'spanloom: not today; come back' >&2\nexit {code}\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    with application.Children(tmp_path) as children:
        agent = AgentProcess(children, [1], "127.0.0.1:1")
        with pytest.raises(AgentEndedError, match=r"^not today; come back$") as caught:
            agent.wait_until_ready()
    assert caught.value.exit_code == code


def test_children_end_with_their_context(tmp_path: Path):
    """Leaving the context ends every child, also one that had ended before."""
    with application.Children(tmp_path) as children:
        sleeper = children.start("sleeper", ["sleep", "1000"], {})
        quick = children.start("quick", ["true"], {})
        quick.wait(30)
        assert sleeper.poll() is None
    assert sleeper.returncode == -15
    assert quick.returncode == 0


def test_a_program_that_does_not_exist_is_one_line(tmp_path: Path):
    """A child that cannot be started is an expected error."""
    with (
        application.Children(tmp_path) as children,
        pytest.raises(SpanloomError, match="cannot start /nowhere/x: No"),
    ):
        children.start("x", ["/nowhere/x"], {})
