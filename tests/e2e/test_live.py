"""The configuration file of a running agent changes: what is asked for happens soon, and nothing is lost or mixed."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from tests.apiserver import make_certificates
from tests.collector import Answer, Collector
from tests.e2e import servers
from tests.e2e.books import BooksWatcher
from tests.e2e.harness import AgentProcess, curl, free_port, one, wait_until

APPLIED_SECONDS = 2.0
"""What the agent promises."""


class MountedFile:
    """A configuration file as the kubelet mounts it: a symlink through ``..data``, which is swapped."""

    def __init__(self, directory: Path, config: dict) -> None:
        directory.mkdir()
        self._directory = directory
        self._count = 0
        self.path = directory / "spanloom.yaml"
        self.write(config)
        self.path.symlink_to("..data/spanloom.yaml")

    def write(self, config: dict | str) -> None:
        """Replace the content at one stroke."""
        self._count += 1
        version = self._directory / f"..{self._count}"
        version.mkdir()
        (version / "spanloom.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        link = self._directory / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(self._directory / "..data")


def events(tracing: AgentProcess, name: str) -> list[dict]:
    found = (json.loads(line) for line in tracing.stderr().splitlines())
    return [event for event in found if event["event"] == name]


def change(tracing: AgentProcess, file: MountedFile, config: dict | str, event: str = "config_applied") -> dict:
    """Write the file and wait until the agent says what became of it; not longer than promised, and a little more."""
    count = len(events(tracing, event))
    file.write(config)
    began = time.monotonic()
    wait_until(lambda: len(events(tracing, event)) > count, f"the agent says {event}:\n{tracing.stderr()[-2000:]}", 10)
    assert time.monotonic() - began < APPLIED_SECONDS + 1.0  # a loaded machine
    return events(tracing, event)[-1]


def test_selection_follows_the_file(agent, serve, public_path: Path, tmp_path: Path):
    """Programs and ports are taken out and in again; connections that were passed over are looked at again."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    file = MountedFile(tmp_path / "mounted", {})
    tracing = agent([port], config=file.path)
    url = f"http://127.0.0.1:{port}/status/200"
    selections: list[tuple[dict, set[str]]] = [
        ({}, {"SERVER", "CLIENT"}),
        ({"select": {"executables": {"exclude": ["nginx"]}}}, {"CLIENT"}),
        ({"select": {"executables": {"include": ["nginx"]}}}, {"SERVER"}),
        ({"select": {"host": False}}, set()),
        ({}, {"SERVER", "CLIENT"}),
    ]
    for number, (config, kinds) in enumerate(selections):
        if number:
            change(tracing, file, config)
        curl("-o", "/dev/null", f"{url}?number={number}")
        wait_until(lambda number=number, kinds=kinds: kinds <= _kinds(tracing, number), f"{kinds} for {number}")
        tracing.settle()
        assert _kinds(tracing, number) == kinds


def _kinds(tracing: AgentProcess, number: int) -> set[str]:
    return {
        span.kind
        for span in tracing.collector.spans()
        if f"number={number}" in str(span.attributes.get("url.query") or span.attributes.get("url.full"))
    }


def test_ports_follow_the_file(tmp_path: Path, collector: Collector, serve, public_path: Path):
    """On connections that are kept open, too."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    file = MountedFile(tmp_path / "mounted", {"select": {"ports": {"include": [free_port()]}}})
    tracing = AgentProcess(tmp_path, collector, config=file.path)
    del tracing.settings["select.ports.include"]
    with tracing, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:

        def ask(number: int) -> None:
            connection.sendall(b"GET /status/204?number=%d HTTP/1.1\r\nHost: x\r\n\r\n" % number)
            assert connection.recv(4096).startswith(b"HTTP/1.1 204")

        ask(0)
        change(tracing, file, {"select": {"ports": {"include": [port]}}})
        ask(1)
        ask(2)
        wait_until(lambda: _kinds(tracing, 1) and _kinds(tracing, 2), "spans of the selected port")
        change(tracing, file, {"select": {"ports": {"include": [free_port()]}}})
        ask(3)
        ask(4)
        tracing.settle()
    # The exchange that was open when the port went out of the selection is still told of: it had begun.
    assert not _kinds(tracing, 0)
    assert not _kinds(tracing, 4)


def test_spans_go_where_the_file_says(agent, serve, public_path: Path, tmp_path: Path, collector: Collector):
    """Another endpoint: what came before is at the old one, what comes after at the new one; nothing is lost."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    url = f"http://127.0.0.1:{port}/status/200"
    with Collector() as other:
        file = MountedFile(tmp_path / "mounted", {"export": {"otlp": {"endpoint": collector.endpoint}}})
        tracing = AgentProcess(tmp_path, None, [port], {"export.console": "off"}, config=file.path)
        tracing.collector = collector
        with tracing:
            curl("-o", "/dev/null", f"{url}?number=[1-20]")
            change(tracing, file, {"export": {"otlp": {"endpoint": other.endpoint}}})
            curl("-o", "/dev/null", f"{url}?number=[21-40]")
            wait_until(lambda: collector.span_count + other.span_count == 80, "all spans are somewhere")
        assert other.span_count >= 40


def test_spans_for_a_wrong_endpoint_go_to_the_right_one(serve, public_path: Path, tmp_path: Path, collector: Collector):
    """The very case one edits for: all that waits for a dead endpoint arrives, and no counter starts again."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    url = f"http://127.0.0.1:{port}/status/200"

    def config(endpoint: str | None, **more: dict) -> dict:
        return {"export": {"otlp": {"endpoint": endpoint}, "console": "off"}} | more

    file = MountedFile(tmp_path / "mounted", config(f"http://127.0.0.1:{free_port()}"))
    settings = {"export.batch.max_spans": 10, "select.executables.exclude": ["curl"]}
    tracing = AgentProcess(tmp_path, None, [port], settings, config=file.path)
    tracing.collector = collector
    bad_header = ("-H", "traceparent: nonsense")
    with tracing, BooksWatcher(tracing, most_in_flight=1000) as watcher:
        curl("-o", "/dev/null", *bad_header, f"{url}?number=[1-200]")
        wait_until(lambda: tracing.books().exporting == 200, lambda: tracing.state())
        wait_until(lambda: tracing.metrics()["spanloom_export_retries_total"], "the wrong endpoint was tried")
        retries = tracing.metrics()["spanloom_export_retries_total"]
        change(tracing, file, config(collector.endpoint, propagation={"formats": ["tracecontext"]}))
        tracing.exact_spans(200, kind="SERVER")
        metrics = tracing.metrics()
        assert metrics["spanloom_export_retries_total"] >= retries
        assert metrics["spanloom_propagation_malformed_total{format=tracecontext}"] == 200
        # Taken away and given again: it goes on where it was.
        change(tracing, file, config(None))
        curl("-o", "/dev/null", *bad_header, f"{url}?number=[201-210]")
        wait_until(lambda: tracing.books().not_exported == 10, lambda: tracing.state())
        change(tracing, file, config(collector.endpoint))
        curl("-o", "/dev/null", *bad_header, f"{url}?number=[211-220]")
        tracing.wait_for_spans(210, kind="SERVER")
        assert tracing.metrics()["spanloom_propagation_malformed_total{format=tracecontext}"] == 220
        wait_until(lambda: tracing.books().on_the_way == 0, lambda: tracing.state())
        books = tracing.books()
    watcher.assert_right(readings=20)
    assert (books.exported, books.undelivered, books.not_exported) == (210, {}, 10)
    assert collector.span_count == 210


def test_the_end_waits_for_what_came_from_an_old_endpoint(serve, public_path: Path, tmp_path: Path):
    """A change of the endpoint, then SIGTERM at once: what waited for the old one is delivered by the new one."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    with Collector() as silent, Collector() as other:
        silent.answer(*[Answer(hang=True)] * 100)

        def config(endpoint: str) -> dict:
            return {"export": {"otlp": {"endpoint": endpoint, "timeout_seconds": 2}, "batch": {"max_spans": 10}}}

        file = MountedFile(tmp_path / "mounted", config(silent.endpoint))
        tracing = AgentProcess(tmp_path, None, [port], {"export.console": "off"}, config=file.path)
        with tracing:
            curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-50]")
            wait_until(lambda: tracing.books().exporting == 100, lambda: tracing.state())
            change(tracing, file, config(other.endpoint))
        assert other.span_count == 100
    assert '"exported":100,"not_delivered":0' in tracing.stderr()


def test_retuning_under_load(serve, start, public_path: Path, tmp_path: Path, collector: Collector):
    """30 changes during a run of wrk lose no span, and no span was made half by one configuration, half by another.

    Every change is one of the trace formats, the headers that are captured, what is redacted, the routes, the resource
    and the bytes that are captured of a head; every other one is one of the endpoint, too. 10 files in between are
    refused for one of their keys, and nothing else of them is applied: all of them would trace nothing any more.
    """
    port = free_port()
    process = serve(servers.python_threads(port, public_path), port)
    other = Collector()

    def config(number: int) -> dict:
        is_odd = number % 2 == 1
        return {
            "routes": {"patterns": [f"/{'{kind}' if is_odd else '{thing}'}/{{status}}"]},
            "capture": {
                "request_headers": ["x-odd" if is_odd else "x-even"],
                "response_headers": ["server" if is_odd else "date"],
                "request_head_bytes": 1024 if is_odd else 2048,
            },
            "redaction": {"query_keys": ["sleep" if is_odd else "other"]},
            "propagation": {"formats": ["b3" if is_odd else "tracecontext"]},
            "resource": {"attributes": {"tuned": "odd" if is_odd else "even"}},
            "sampling": {"parent_based": is_odd},
            "export": {"otlp": {"endpoint": (collector if number % 4 < 2 else other).endpoint}},
        }

    nothing = {"sampling": {"ratio": 0.0, "parent_based": False}, "select": {"executables": {"include": []}}}
    wrong: list[dict | str] = [
        nothing | part
        for part in (
            {"rotues": {}},
            {"sampling": {"ratio": 2}},
            {"routes": {"patterns": "x"}},
            {"capture": {"request_headers": ["authorization"]}},
            {"export": {"otlp": {"endpoint": "nonsense:"}}},
            {"kernel": {"ring_buffer_bytes": 1000}},
            {"overrides": [{"until": "tomorrow", "match": {}, "set": {}}]},
            {"select": {"ports": {"include": [70000]}}},
            {"select": {"executables": {"include": []}, "kubernetes": {"labels": "a in ("}}},
        )
    ]
    wrong.append("a: [")
    file = MountedFile(tmp_path / "mounted", config(0))
    settings = {"select.executables.exclude": ["wrk"], "export.console": "off"}
    tracing = AgentProcess(tmp_path, None, [port], settings, config=file.path)
    tracing.collector = collector
    tracing.expects_errors = True
    odd_trace, even_trace = "0" * 31 + "1", "0" * 31 + "2"
    headers = [
        "x-odd: yes",
        "x-even: yes",
        f"b3: {odd_trace}-{'1' * 16}-1",
        f"traceparent: 00-{even_trace}-{'2' * 16}-01",
    ]
    wrk = ["wrk", "-t1", "-c8", "-d120s", *(word for header in headers for word in ("-H", header))]
    with other, tracing:
        load = start([*wrk, f"http://127.0.0.1:{port}/status/200?sleep=0.05"])
        for number in range(1, 31):
            if number % 3 == 0:
                change(tracing, file, wrong[number // 3 - 1], "config_refused")
            changed = change(tracing, file, config(number))
            assert set(changed["changed"]) == {
                "routes.patterns",
                "capture.request_headers",
                "capture.response_headers",
                "capture.request_head_bytes",
                "redaction.query_keys",
                "propagation.formats",
                "resource.attributes",
                "sampling.parent_based",
                *(["export.otlp.endpoint"] if number % 2 == 0 else []),
            }
            assert changed["needs_restart"] == []
        assert len(events(tracing, "config_refused")) == len(wrong) == 10
        assert len(events(tracing, "config_applied")) == 30
        load.popen.send_signal(signal.SIGINT)
        load.popen.wait(20)
        wait_until(lambda: tracing.books().on_the_way == 0, lambda: tracing.state())
        books = tracing.books()
        assert books.dropped.keys() <= {"not_selected"}  # what wrk did before it was known to be left out
        assert not books.undelivered
        assert process.stop() == 0, process.output()
    account = json.loads((public_path / f"python-{port}.json").read_text())
    served = [span for at in (collector, other) for span in at.spans() if span.kind == "SERVER"]
    assert len(served) == len(account) > 1000
    assert min(collector.span_count, other.span_count) > 100
    made: Counter[bool] = Counter()
    late = 0
    for span in served:
        told = {
            "route": span.attributes["http.route"],
            "name": span.name,
            "request headers": {name for name in span.attributes if name.startswith("http.request.header.")},
            "response headers": {name for name in span.attributes if name.startswith("http.response.header.")},
            "query": span.attributes["url.query"],
            "trace": span.trace_id,
        }
        odd = "http.request.header.x-odd" in told["request headers"]
        kind = "kind" if odd else "thing"
        assert told == {
            "route": f"/{{{kind}}}/{{status}}",
            "name": f"GET /{{{kind}}}/{{status}}",
            "request headers": {"http.request.header." + ("x-odd" if odd else "x-even")},
            "response headers": {"http.response.header." + ("server" if odd else "date")},
            "query": "sleep=REDACTED" if odd else "sleep=0.05",
            "trace": odd_trace if odd else even_trace,
        }
        made[odd] += 1
        late += span.resource["tuned"] != ("odd" if odd else "even")
    assert min(made.values()) > 100
    assert late < len(served) / 10  # a resource is that of the moment at which the span leaves


def test_what_is_wrong_changes_nothing(serve, public_path: Path, tmp_path: Path, collector: Collector):
    """Each bad file is refused once with its key and reason; the last good configuration stays; a good one follows."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    good = {"routes": {"patterns": ["/status/{code}"]}, "export": {"otlp": {"endpoint": collector.endpoint}}}
    file = MountedFile(tmp_path / "mounted", good)
    not_pem, gone = tmp_path / "not.pem", tmp_path / "gone.pem"
    not_pem.write_text("nothing")

    def with_files(**files: Path) -> dict:
        """All right but for the files, which only the exporter reads; the rest must not be applied either."""
        otlp = {"endpoint": "https://localhost:4317"} | {key: str(value) for key, value in files.items()}
        return {"export": {"otlp": otlp}, "telemetry": {"log_level": "error"}, "sampling": {"ratio": 0}}

    wrong: list[tuple[dict | str, str]] = [
        ({"routes": {"patterns": "x"}}, "routes.patterns"),
        ({"rotues": {}}, "routes"),
        ({"sampling": {"ratio": 2}}, "sampling.ratio"),
        ({"capture": {"request_headers": ["authorization"]}}, "capture.request_headers"),
        ({"export": {"otlp": {"endpoint": "nonsense:"}}}, "export.otlp.endpoint"),
        ({"select": {"ports": {"include": [70000]}}}, "select.ports.include"),
        ({"kernel": {"ring_buffer_bytes": 1000}}, "kernel.ring_buffer_bytes"),
        ("a: [", "not valid YAML"),
        ("- a list\n", ""),
        ({"select": {"kubernetes": {"labels": "a in ("}}}, "select.kubernetes.labels"),
        ({"export": {"otlp": {"endpoint": "http://[:::]:4317"}}}, "export.otlp.endpoint: '[:::]'"),
        (with_files(certificate=gone), f"export.otlp.certificate {gone}: No such file"),
        (with_files(certificate=not_pem), "no PEM certificate"),
        (with_files(client_key=not_pem, client_certificate=not_pem), "not an unencrypted PEM pair"),
        (with_files(client_key=tmp_path, client_certificate=not_pem), f"export.otlp.client_key {tmp_path}: "),
    ]
    # The endpoint is the file's: one that is given by --set would be stronger.
    tracing = AgentProcess(tmp_path, None, [port], {"export.console": "off"}, config=file.path)
    tracing.collector = collector
    tracing.expects_errors = True
    with tracing:
        _refuse_each(tracing, file, port, wrong)
        change(tracing, file, good | {"resource": {"attributes": {"team": "blue"}}})
        assert tracing.metrics()["spanloom_config_last_reload_successful"] == 1
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=99")
        spans = tracing.exact_spans(2 * len(wrong) + 2, port=port)
    assert {span.name for span in spans if span.kind == "SERVER"} == {"GET /status/{code}"}
    last = one(span for span in spans if span.attributes.get("url.query") == "number=99")
    assert last.resource["team"] == "blue"


def _refuse_each(tracing: AgentProcess, file: MountedFile, port: int, wrong: list[tuple[dict | str, str]]) -> None:
    for number, (config, words) in enumerate(wrong):
        refused = change(tracing, file, config, "config_refused")
        assert words in refused["message"]
        assert tracing.metrics()["spanloom_config_last_reload_successful"] == 0
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number={number}")
    time.sleep(1.5)
    assert len(events(tracing, "config_refused")) == len(wrong)
    assert not events(tracing, "config_applied")


def test_what_cannot_change_says_so(agent, tmp_path: Path):
    """It is named in the log, and the rest of the change is applied."""
    file = MountedFile(tmp_path / "mounted", {})
    tracing = agent([free_port()], config=file.path)
    applied = change(tracing, file, {"limits": {"connections": 1000}, "sampling": {"ratio": 0.5}})
    assert set(applied["changed"]) == {"limits.connections", "sampling.ratio"}
    assert applied["needs_restart"] == ["limits.connections"]


def test_an_override_ends_by_itself(agent, serve, public_path: Path, tmp_path: Path):
    """What matches has other settings until the moment comes; everything else has not."""
    ports = [free_port(), free_port()]
    serve(servers.nginx(ports[0], public_path), ports[0])
    serve(servers.python_threads(ports[1], public_path), ports[1])
    file = MountedFile(tmp_path / "mounted", {"sampling": {"ratio": 0.0}})
    # Whoever begins a trace decides about it: without the client those are the servers.
    tracing = agent(ports, {"select.executables.exclude": ["curl"]}, config=file.path)
    until = datetime.now(UTC) + timedelta(seconds=6)
    override = {
        "until": until.isoformat(),
        "match": {"executable": "nginx"},
        "set": {"sampling": {"ratio": 1.0}, "routes": {"patterns": ["/status/{code}"]}},
    }
    change(tracing, file, {"sampling": {"ratio": 0.0}, "overrides": [override]})
    for port in ports:
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200")
    [span] = tracing.wait_for_spans(1, port=ports[0], kind="SERVER")
    assert span.name == "GET /status/{code}"
    wait_until(lambda: events(tracing, "override_ended"), "the end of the override", 20)
    assert datetime.now(UTC) >= until
    for port in ports:
        curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200")
    books = tracing.settle()
    assert len(tracing.spans(ports[0], "SERVER")) == 1
    assert not tracing.spans(ports[1], "SERVER")
    assert books.closed


def test_heads_grow_and_formats_change(agent, serve, public_path: Path, tmp_path: Path):
    """Longer heads, other trace headers and another ratio, on a connection that stays open; shorter heads again."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    file = MountedFile(tmp_path / "mounted", {"capture": {"request_head_bytes": 512}})
    tracing = agent([port], {"limits.request_head_bytes": 4096}, config=file.path)
    trace = "0af7651916cd43dd8448eb211c80319c"

    def settings(heads: int, formats: list[str], ratio: float = 1.0) -> dict:
        return {
            "capture": {"request_head_bytes": heads},
            "propagation": {"formats": formats},
            "sampling": {"ratio": ratio, "parent_based": False},
        }

    with socket.create_connection(("127.0.0.1", port)) as connection:

        def ask(number: int) -> None:
            connection.sendall(
                b"GET /status/204?number=%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (number, port)
                + b"X-Padding: %b\r\ntraceparent: 00-%b-00f067aa0ba902b7-01\r\n\r\n" % (b"p" * 3000, trace.encode())
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 204")
            tracing.settle()  # an exchange is read under the settings of the moment when it is read

        ask(0)
        assert change(tracing, file, settings(4096, ["tracecontext"]))["needs_restart"] == []
        ask(1)
        change(tracing, file, settings(4096, ["b3"]))
        ask(2)
        change(tracing, file, settings(4096, ["tracecontext"], 0.0))
        ask(3)
        change(tracing, file, settings(512, ["tracecontext"]))
        ask(4)
        assert change(tracing, file, settings(5000, ["tracecontext"]))["needs_restart"] == [
            "capture.request_head_bytes"
        ]
        assert tracing.metrics()["spanloom_config_restart_needed"] == 1
    found = {}
    for span in tracing.spans(port, "SERVER"):
        number = int(str(span.attributes["url.query"]).rpartition("=")[2])
        found[number] = (span.trace_id == trace, "spanloom.request.head_truncated" in span.attributes)
    assert found == {0: (False, True), 1: (True, False), 2: (False, False), 4: (False, True)}


def test_probes_are_switched_off_and_on(agent, serve, public_path: Path, tmp_path: Path):
    """Off: nothing is attached, and what is under way is counted; on: connections that stayed open are picked up."""
    port = free_port()
    serve(servers.python_threads(port, public_path), port)
    file = MountedFile(tmp_path / "mounted", {})
    tracing = agent([port], config=file.path)
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def ask(number: int, query: str = "") -> None:
            head = b"GET /status/200?number=%d%b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
            connection.sendall(head % (number, query.encode(), port))

        def answer() -> None:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")

        descriptors = []
        for turn in range(5):
            ask(2 * turn)
            answer()
            wait_until(lambda turn=turn: len(tracing.spans(port, "SERVER")) == turn + 1, lambda: tracing.state())
            ask(90, "&sleep=1.5")  # under way when the probes go
            change(tracing, file, {"capture": {"enabled": False}})
            wait_until(lambda: not attached(tracing.pid), tracing.state)  # those of TLS go in a thread of their own
            assert tracing.probe("/readyz") == 200
            answer()
            ask(2 * turn + 1)
            answer()
            change(tracing, file, {"capture": {"enabled": True}})
            assert len(attached(tracing.pid)) > 5
            begun = turn + 2
            wait_until(lambda begun=begun: tracing.stderr().count('"event":"tls_on"') == begun, tracing.state)
            descriptors.append(len(list(Path(f"/proc/{tracing.pid}/fd").iterdir())))
        ask(99)
        answer()
    books = tracing.settle()
    numbers = sorted(int(str(one.attributes["url.query"]).rpartition("=")[2]) for one in tracing.spans(port, "SERVER"))
    assert numbers == [0, 2, 4, 6, 8, 99]
    assert books.dropped == {"switched_off": 10}
    assert books.closed
    assert max(descriptors) <= descriptors[0] + 1, "descriptors are kept"


def attached(pid: int) -> set[str]:
    """The ids of the BPF links that a process holds."""
    found = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(OSError):
            found |= {line.split()[1] for line in entry.read_text().splitlines() if line.startswith("link_id")}
    return found


def test_what_did_not_change_stays_attached(agent, tmp_path: Path):
    """No change of other settings takes a probe away, even for a moment: the links are the same ones."""
    file = MountedFile(tmp_path / "mounted", {})
    tracing = agent([free_port()], config=file.path)
    wait_until(lambda: '"event":"tls_on"' in tracing.stderr(), tracing.state)
    before = attached(tracing.pid)
    assert len(before) > 5
    for config in (
        {"select": {"executables": {"include": ["nginx"]}}},
        {"capture": {"request_head_bytes": 512, "request_headers": ["x-a"]}},
        {"export": {"batch": {"max_spans": 100}}, "sampling": {"ratio": 0.5}},
        {"capture": {"protocols": []}, "propagation": {"formats": ["b3"]}},
    ):
        change(tracing, file, config)
        assert before <= attached(tracing.pid)  # more of them when a TLS library comes into use meanwhile


def test_an_agent_may_start_without_probes(agent, tmp_path: Path):
    """It is ready, since that is what it was asked for, and attaches them when the file says so."""
    file = MountedFile(tmp_path / "mounted", {"capture": {"enabled": False}})
    tracing = agent([free_port()], config=file.path)
    assert not attached(tracing.pid)
    change(tracing, file, {})
    assert len(attached(tracing.pid)) > 5


def test_protocols_are_switched_off_and_on(agent, serve, public_path: Path, tmp_path: Path):
    """Exchanges of a protocol that is off are counted and make no span."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    file = MountedFile(tmp_path / "mounted", {"capture": {"protocols": []}})
    tracing = agent([port], config=file.path)
    url = f"http://127.0.0.1:{port}/status/200"
    curl("-o", "/dev/null", f"{url}?number=1")
    assert tracing.settle().dropped == {"protocol_off": 2}
    change(tracing, file, {})
    curl("-o", "/dev/null", f"{url}?number=2")
    wait_until(lambda: _kinds(tracing, 2) == {"SERVER", "CLIENT"}, lambda: tracing.state())
    assert not _kinds(tracing, 1)


def test_certificates_are_followed(serve, public_path: Path, tmp_path: Path):
    """A certificate that is replaced is taken up, for the spans that wait, too; a file without one changes nothing."""
    port = free_port()
    serve(servers.nginx(port, public_path), port)
    made = {}
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        made[name] = make_certificates(tmp_path / name)
    authority, certificate, key = made["new"]
    mounted = tmp_path / "ca.crt"
    mounted.write_text(made["old"][0])
    with Collector(tls=(key.read_bytes(), certificate.read_bytes())) as collector:
        tracing = AgentProcess(tmp_path, collector, [port], {"export.otlp.certificate": str(mounted)})
        tracing.expects_errors = True
        with tracing:
            curl("-o", "/dev/null", f"http://127.0.0.1:{port}/status/200?number=[1-10]")
            wait_until(lambda: "otlp.export_failing" in tracing.stderr(), lambda: tracing.stderr())
            mounted.write_text("nonsense")
            wait_until(lambda: events(tracing, "certificates_refused"), lambda: tracing.stderr())
            assert collector.span_count == 0
            mounted.write_text(authority)
            wait_until(lambda: collector.span_count == 20, lambda: tracing.stderr())
            assert events(tracing, "certificates_renewed")
            books = tracing.settle()
            assert books.closed
            assert not books.dropped
