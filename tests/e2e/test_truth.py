"""What the agent says against what the servers themselves wrote down, at 20 000 requests.

wrk keeps 64 connections busy and leaves requests under way when it stops, so the numbers are compared with the servers'
own accounts and not with wrk's. Durations are compared in two ways. Within 1 ms or 5 % of what the application measured
where the machine let the application measure well; and, for every single one, within the bounds that the application's
own clock readings allow: it reads its clock before and after the system calls whose ends the agent sees.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from pathlib import Path

from tests.collector import CollectedSpan
from tests.e2e import servers
from tests.e2e.harness import AgentProcess, Books, clean_environment, free_port, show

REQUESTS = 20_000
CONNECTIONS = 64
SETTLE_SECONDS = 60.0

WRK_SCRIPT = """
-- Each thread numbers its requests, goes through the given paths in turn, and stops after its share of the responses.
local threads = 0
function setup(thread) threads = threads + 1; thread:set("me", threads) end
function init(arguments)
  share, paths = tonumber(arguments[1]), {}
  for index = 2, #arguments do paths[#paths + 1] = arguments[index] end
  sent, received = 0, 0
end
function request()
  sent = sent + 1
  local path = paths[sent % #paths + 1]
  return wrk.format("GET", path .. (path:find("?", 1, true) and "&" or "?") .. "id=" .. me .. "-" .. sent)
end
function response() received = received + 1; if received == share then wrk.thread:stop() end end
"""


def run_wrk(directory: Path, port: int, paths: list[str], requests: int = REQUESTS) -> None:
    """At least ``requests`` requests over 64 keep-alive connections."""
    script = directory / "numbered.lua"
    script.write_text(WRK_SCRIPT)
    threads = 2
    command = ["wrk", f"-t{threads}", f"-c{CONNECTIONS}", "-d100s", "--timeout", "30s", "-s", str(script)]
    result = subprocess.run(
        [*command, f"http://127.0.0.1:{port}", "--", str(requests // threads), *paths],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr


class BooksWatcher:
    """Reads the books again and again while the traffic goes on, and keeps those that do not close."""

    def __init__(self, tracing: AgentProcess) -> None:
        self._tracing = tracing
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.readings = 0
        self.open: list[Books] = []

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            books = self._tracing.books()
            self.readings += 1
            if not books.closed:
                self.open.append(books)

    def __enter__(self) -> BooksWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)


def request_key(span: CollectedSpan) -> str:
    """Path and query of a server span: every request has a number of its own."""
    return f"{span.attributes['url.path']}?{span.attributes.get('url.query', '')}"


def finished_books(tracing: AgentProcess) -> Books:
    """The books after the traffic: closed, nothing in flight, nothing dropped, all of it at the collector."""
    books = tracing.settle(SETTLE_SECONDS)
    assert books.closed
    assert books.in_flight == 0
    assert books.dropped == {}, tracing.state()
    assert books.sampled_out == 0
    assert tracing.collector is not None
    assert tracing.collector.span_count == books.handed_over == books.begun
    return books


def by_status(spans: list[CollectedSpan]) -> Counter[int]:
    return Counter(int(span.attributes.get("http.response.status_code", 0)) for span in spans)


def test_nginx_serves_20000_requests(agent, serve, public_path: Path):
    """Server spans equal the lines of nginx's own access log, per status code; durations match; the books close."""
    port = free_port()
    log = public_path / f"nginx-{port}.log"
    # $msec and $request_time have a resolution of a millisecond.
    process = serve(servers.nginx(port, public_path), port)
    tracing = agent([port])
    with BooksWatcher(tracing) as watcher:
        run_wrk(public_path, port, [f"/status/{status}" for status in servers.STATUSES])
        finished_books(tracing)
    process.stop()
    logged = {}
    for line in log.read_text().splitlines():
        status, seconds, target = line.split()
        logged[target] = int(status), float(seconds)
    assert len(logged) >= REQUESTS
    served = tracing.spans(port, "SERVER")
    # nginx logs a request whose client went away before the answer as 499: it was read, and has no response.
    expected = Counter(0 if status == 499 else status for status, _ in logged.values())
    assert by_status(served) == expected
    assert {request_key(span) for span in served} == set(logged)
    assert len(served) == len(logged)
    for span in served:
        status = span.attributes.get("http.response.status_code")
        assert span.status == ("ERROR" if status in (None, 500) else "UNSET"), show([span])
    # nginx takes the time once per turn of its event loop: two readings, each up to a millisecond old.
    allowed_ms = 1 + 2
    off = [
        (span, logged[request_key(span)])
        for span in served
        if abs((span.end_time_ns - span.start_time_ns) / 1e6 - logged[request_key(span)][1] * 1e3) > allowed_ms
    ]
    assert len(off) <= 0.01 * len(served), f"{len(off)} of {len(served)}:\n" + show(span for span, _ in off[:20])
    assert watcher.readings > 0
    assert watcher.open == [], f"{len(watcher.open)} of {watcher.readings} readings do not close: {watcher.open[:5]}"


def test_threaded_python_serves_20000_requests(agent, serve, public_path: Path):
    """Server spans equal the server's own account, request by request; durations match its clock; the books close."""
    port = free_port()
    process = serve(servers.python_threads(port, public_path), port)
    tracing = agent([port])
    paths = [f"/status/{status}" for status in servers.STATUSES]
    # Most requests wait, so that the threads do not queue for the interpreter and the application's clock can be read
    # soon after the system call that it measures; the others are as short as they can be.
    paths = [*paths, *(f"{path}?sleep=0.03" for path in paths * 3)]
    with BooksWatcher(tracing) as watcher:
        run_wrk(public_path, port, paths)
        finished_books(tracing)
    assert process.stop() == 0, process.output()
    account = json.loads((public_path / f"python-{port}.json").read_text())
    assert len(account) >= REQUESTS
    served = tracing.spans(port, "SERVER")
    by_request = {request_key(span): span for span in served}
    assert len(by_request) == len(served), "two spans of one request"
    assert set(by_request) == {target for target, *_ in account}
    assert by_status(served) == Counter(status for _, status, *_ in account)

    good, measurable, impossible = 0, 0, []
    for target, status, before_read, after_read, before_write, after_write in account:
        span = by_request[target]
        assert span.attributes["http.response.status_code"] == status
        duration = span.end_time_ns - span.start_time_ns
        # The read returned between the readings around it, and the last write within those around it.
        if not before_write - after_read <= duration <= after_write - before_read:
            impossible.append((target, duration, before_read, after_read, before_write, after_write))
        measured = after_write - after_read
        measurable += 1
        good += abs(duration - measured) <= max(1_000_000, 0.05 * measured)
    assert not impossible, f"{len(impossible)}: {impossible[:10]}"
    assert good >= 0.99 * measurable, f"{good} of {measurable} durations within 1 ms or 5 %"
    assert watcher.readings > 0
    assert watcher.open == [], f"{len(watcher.open)} of {watcher.readings} readings do not close: {watcher.open[:5]}"
