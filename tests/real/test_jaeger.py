"""A real Jaeger takes the traces of the demo's application: as many trees as requests, and all it says of them."""

from __future__ import annotations

import re
import subprocess
import sys

from agent.demo.application import SERVICE_NAMES
from tests.e2e.harness import REPOSITORY, clean_environment, wait_until
from tests.real.programs import Jaeger, Json

REQUESTS = 20
SENT_WITH_A_PARENT = 12
"""Three of five requests bring a span's id along that nobody exports: the demo plays a caller that is elsewhere."""


def tags_of(span: Json) -> dict[str, object]:
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def parent_of(span: Json) -> str:
    [parent] = [one["spanID"] for one in span["references"] if one["refType"] == "CHILD_OF"] or [""]
    return parent


def test_the_demo(jaeger: Jaeger):
    """Services, kinds, parents and failures are as the demo knows them to be."""
    command = [sys.executable, "-m", "agent", "demo", "--requests", str(REQUESTS)]
    environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.endpoint)
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=100, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    said = re.search(r"^20 of 20 traces whole: (\d+) spans of 6 services", run.stdout, re.MULTILINE)
    assert said, run.stdout[-2000:]
    services = {"client", *SERVICE_NAMES}

    def traces() -> list[Json]:
        found = {}
        for service in services & set(jaeger.query("services") or []):
            for trace in jaeger.query(f"traces?service={service}&limit=500&lookback=1h"):
                found[trace["traceID"]] = trace
        return list(found.values())

    count = int(said[1])
    wait_until(lambda: sum(len(trace["spans"]) for trace in traces()) >= count, f"{count} spans in Jaeger")
    assert len(traces()) == REQUESTS
    assert sum(len(trace["spans"]) for trace in traces()) == count
    absent = []
    for trace in traces():
        spans = {span["spanID"]: span for span in trace["spans"]}
        assert len(spans) == len(trace["spans"])
        assert {process["serviceName"] for process in trace["processes"].values()} <= services
        roots = [span for span in trace["spans"] if parent_of(span) not in spans]
        assert len(roots) == 1
        for span in trace["spans"]:
            tags = tags_of(span)
            is_server = tags["span.kind"] == "server"
            assert tags["span.kind"] in ("client", "server")
            failed = int(str(tags["http.response.status_code"])) >= (500 if is_server else 400)
            assert (tags.get("error") is True, tags.get("otel.status_code") == "ERROR") == (failed, failed)
            # Jaeger looks for clocks that disagree: a child that begins before its parent is moved, and it says so.
            if span is not roots[0]:
                assert not span["warnings"]
                parent = spans[parent_of(span)]
                assert parent["startTime"] <= span["startTime"]
                assert tags_of(parent)["span.kind"] != tags["span.kind"]
            elif parent_of(span):
                absent.append(span["warnings"])
            else:
                assert not span["warnings"]
    # Jaeger is right about these.
    assert len(absent) == SENT_WITH_A_PARENT
    assert all("invalid parent span IDs" in warning for [warning] in absent)
