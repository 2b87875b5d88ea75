"""gRPC-Web over HTTP/1 between programs that nobody here wrote: sonora's client, its application under gunicorn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.e2e import servers
from tests.e2e.harness import Process, clean_environment, free_port, show

CALLS = servers.APPS / "grpc_web.py"


@pytest.mark.parametrize("captured", [256, 2048])
def test_every_kind_of_call(agent, start: Callable[..., Process], captured: int):
    """Calls of gRPC on either side. What is told of status and messages is right; it is told where the response was
    captured, or the lengths in it and its last bytes.
    """
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread"]
    command += ["--threads", "4", "--log-level", "warning", "--no-control-socket", "grpc_web:app"]
    start(command, port=port, env=clean_environment(), cwd=servers.APPS)
    settings = {
        "capture.request_headers": ["x-number"],
        "capture.request_head_bytes": 1024,
        "capture.response_head_bytes": captured,
    }
    tracing = agent([port], settings)
    done = subprocess.run(
        [sys.executable, CALLS, "call", str(port)],
        env=clean_environment(),
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
    )
    made = json.loads(done.stdout)
    assert {status for _, status, _ in made} == {"OK", "NOT_FOUND", "DATA_LOSS"}
    spans = tracing.exact_spans(2 * len(made))
    known: dict[int, int] = {}
    for span in spans:
        number = int(span.attributes["rpc.request.metadata.x-number"][0])
        method, status, received = made[number]
        assert (span.name, span.attributes["rpc.method"]) == (f"pkg.Echo/{method}",) * 2
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["server.port"] == port
        assert not {name for name in span.attributes if name.startswith(("http.", "url."))}, show([span])
        assert span.attributes.get("spanloom.rpc.request.messages", 1) == 1
        told = span.attributes.get("rpc.response.status_code")
        assert told in (None, status), show([span])
        known[number] = known.get(number, 0) + (told is not None)
        if told is not None:
            assert span.attributes["spanloom.rpc.response.messages"] == received, show([span])
            is_error = status == "DATA_LOSS" or (status != "OK" and span.kind == "CLIENT")
            assert span.status == ("ERROR" if is_error else "UNSET")
    if captured == 2048:
        # All but the two streams in chunks that are longer than what is captured.
        assert {number: count for number, count in known.items() if count < 2} == {5: 0, 6: 0}
    clients = {span.span_id for span in spans if span.kind == "CLIENT"}
    assert {span.parent_span_id for span in spans if span.kind == "SERVER"} == clients
    assert tracing.books().dropped == {}
