"""How requests share connections, processes and system calls: each still makes one span on either side."""

from __future__ import annotations

import array
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.collector import CollectedSpan
from tests.e2e.edge import Edge, seen
from tests.e2e.harness import Process, clean_environment, wait_until
from tests.e2e.scripted import (
    RECEIVING,
    SENDING,
    PeerError,
    Turn,
    accept,
    chunked,
    connect,
    cut,
    listen,
    receive,
    receive_head,
    request,
    request_turns,
    response,
    run_turns,
    send_all,
)
from tests.e2e.servers import nginx


def _turn(path: str, status: int = 200, **options: tuple[str, str]) -> Turn:
    return Turn([request(path)], [response(status, body=b"" if status == 204 else b"ok")], **options)


# -- one after the other


def test_keep_alive(edge: Edge) -> None:
    """A hundred requests on one connection are a hundred spans, each with its own path and status."""
    statuses = [200, 201, 302, 404, 500, 503]
    exchanges = [(f"/{index}", statuses[index % len(statuses)]) for index in range(100)]
    run_turns(edge.server, edge.client, edge.port, [_turn(path, status) for path, status in exchanges])
    spans = edge.expect(exchanges)
    for earlier, later in zip(spans.clients, spans.clients[1:], strict=False):
        assert earlier.end_time_ns <= later.start_time_ns


def test_http10(edge: Edge) -> None:
    """HTTP/1.0 without keep-alive: the close is the end of the response, and the version is told."""
    edge.server.start(_serve_until_close, edge.port, [b"HTTP/1.0 200 OK\r\n\r\n", b"until ", b"the end"])
    edge.client.call(_request_until_close, edge.port, request("/old", version="1.0"))
    edge.server.result()
    for span in edge.expect([("/old", 200)]).one():
        assert span.attributes["network.protocol.version"] == "1.0"


def test_http10_keep_alive(edge: Edge) -> None:
    """HTTP/1.0 with `Connection: keep-alive` and lengths works like HTTP/1.1."""
    fields = ["Connection: keep-alive"]
    turns = [
        Turn([request(f"/{index}", version="1.0", fields=fields)], [response(version="1.0", fields=fields)])
        for index in range(5)
    ]
    run_turns(edge.server, edge.client, edge.port, turns)
    edge.expect([(f"/{index}", 200) for index in range(5)])


def _serve_until_close(port: int, pieces: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        for piece in pieces:
            send_all(connection, piece)


def _request_until_close(port: int, data: bytes) -> None:
    with connect(port) as connection:
        send_all(connection, data)
        while os.read(connection.fileno(), 65536):
            pass


# -- pipelining


_GETS = [request("/0"), request("/1"), request("/2")]
_POSTS = [request(f"/{index}", method="POST", body=b"body of %d" % index) for index in range(3)]
_MIXED = [
    request("/0"),
    request("/1", method="PUT", body=b"x" * 3000),
    request("/2", method="POST", fields=["Transfer-Encoding: chunked"]) + chunked([b"abc", b"defg"]),
]
_STATUSES = [200, 404, 500]


def _pipelined(edge: Edge, writes: Sequence[bytes], total: int, responses: Sequence[bytes]) -> None:
    edge.server.start(_serve_pipelined, edge.port, total, responses)
    edge.client.call(_request_pipelined, edge.port, writes, sum(map(len, responses)))
    edge.server.result()


def _serve_pipelined(port: int, total: int, responses: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive(connection, total)
        for one in responses:
            send_all(connection, one)
        connection.recv(1)


def _request_pipelined(port: int, writes: Sequence[bytes], total: int) -> None:
    with connect(port) as connection:
        for one in writes:
            send_all(connection, one)
        receive(connection, total)


@pytest.mark.parametrize("requests", [_GETS, _POSTS, _MIXED], ids=["get", "post", "mixed"])
@pytest.mark.parametrize("separately", [False, True], ids=["one_send", "three_sends"])
@pytest.mark.parametrize("answered_at_once", [False, True], ids=["three_responses", "one_response"])
def test_pipelining(edge: Edge, requests: list[bytes], separately: bool, answered_at_once: bool) -> None:
    """Three requests before the first response are three spans on either side, whatever the writes are."""
    writes = requests if separately else [b"".join(requests)]
    responses = [response(status) for status in _STATUSES]
    _pipelined(
        edge,
        writes,
        sum(map(len, requests)),
        [b"".join(responses)] if answered_at_once else responses,
    )
    edge.expect([(f"/{index}", status) for index, status in enumerate(_STATUSES)], linked=False)


def test_pipelining_again_and_again(edge: Edge) -> None:
    """A connection goes from pipelining to single requests and back; every request is one span."""
    batches = [3, 1, 1, 2, 1, 5, 1]
    edge.server.start(_serve_batches, edge.port, batches)
    edge.client.call(_request_batches, edge.port, batches)
    edge.server.result()
    paths = [f"/{batch}/{index}" for batch, size in enumerate(batches) for index in range(size)]
    edge.expect([(path, 200) for path in paths], linked=False)


def _serve_batches(port: int, batches: Sequence[int]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        for batch, size in enumerate(batches):
            receive(connection, sum(len(request(f"/{batch}/{index}")) for index in range(size)))
            for _ in range(size):
                send_all(connection, response())
        connection.recv(1)


def _request_batches(port: int, batches: Sequence[int]) -> None:
    with connect(port) as connection:
        for batch, size in enumerate(batches):
            send_all(connection, b"".join(request(f"/{batch}/{index}") for index in range(size)))
            receive(connection, len(response()) * size)


@pytest.mark.parametrize("chunks", [False, True], ids=["length", "chunked"])
def test_pipelining_against_a_running_response(edge: Edge, chunks: bool) -> None:
    """A request that is sent while the response before it still arrives: nothing failed, and the next ones are seen."""
    body = [b"first half, " * 100, b"second half, " * 100]
    if chunks:
        end = len(chunked(body[1:]))
        whole = response(fields=["Transfer-Encoding: chunked"], body=None) + chunked(body)
        pieces = [whole[:-end], whole[-end:]]
    else:
        whole = response(body=b"".join(body))
        pieces = [whole[: -len(body[1])], whole[-len(body[1]) :]]
    edge.server.start(_serve_overlapped, edge.port, pieces)
    edge.client.call(_request_overlapped, edge.port, [len(piece) for piece in pieces])
    edge.server.result()
    spans = edge.expect([("/running", 200), ("/during", 201), ("/after", 202)])
    for side in (spans.servers, spans.clients):
        assert [span.attributes.get("spanloom.response.overlapped", False) for span in side] == [True, False, False]


def _serve_overlapped(port: int, pieces: Sequence[bytes]) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        send_all(connection, pieces[0])
        receive_head(connection)
        send_all(connection, pieces[1])
        time.sleep(0.05)  # a segment of its own: what is read together with the end of another is not told apart
        send_all(connection, response(201))
        receive_head(connection)
        send_all(connection, response(202))
        connection.recv(1)


def _request_overlapped(port: int, pieces: Sequence[int]) -> None:
    with connect(port) as connection:
        send_all(connection, request("/running"))
        receive(connection, pieces[0])
        send_all(connection, request("/during"))
        receive(connection, pieces[1])
        receive(connection, len(response(201)))
        send_all(connection, request("/after"))
        receive(connection, len(response(202)))


_PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


@pytest.mark.parametrize("before", ["interim", "refused"])
def test_pipelining_behind_what_was_no_response(edge: Edge, before: str) -> None:
    """The next request comes behind an interim response, or a write that the kernel refused as a whole: both requests
    are still waiting, and their responses are those that come.
    """
    edge.server.start(_serve_behind, edge.port, before)
    edge.client.call(_request_behind, edge.port, before)
    edge.server.result()
    edge.expect([("/first", 200), ("/second", 404)], linked=False)


def _serve_behind(port: int, before: str) -> None:
    with listen(port) as listener, accept(listener) as connection:
        receive_head(connection)
        if before == "interim":
            send_all(connection, _PROCESSING)
        else:
            with pytest.raises(OSError, match="Invalid argument"):
                connection.sendmsg([response(500)], [(socket.SOL_SOCKET, 0x7FFF, b"nothing known")])
        receive_head(connection)
        send_all(connection, response(200))
        send_all(connection, response(404))
        connection.recv(1)


def _request_behind(port: int, before: str) -> None:
    with connect(port) as connection:
        send_all(connection, request("/first"))
        if before == "interim":
            receive(connection, len(_PROCESSING))
        else:
            time.sleep(0.1)
        send_all(connection, request("/second"))
        receive(connection, len(response(200)) + len(response(404)))


def test_pipelining_into_nginx(edge: Edge, tmp_path: Path) -> None:
    """Fifty requests to nginx before any response is read, in one send, in fifty, cut anywhere: fifty spans a side."""
    port = edge.other_ports[0]
    tmp_path.chmod(0o755)
    server = nginx(port, tmp_path)
    statuses = [(200, 404, 500)[index % 3] for index in range(50)]
    with Process(server.arguments, log=tmp_path / "output", env=clean_environment(), cwd=server.cwd) as process:
        process.wait_for_port(port)
        wait_until(lambda: not edge.connections(port), "the probe of the port is forgotten")
        requests = [request(f"/status/{status}?{index}") for index, status in enumerate(statuses)]
        for writes in ([b"".join(requests)], requests, cut(b"".join(requests), 700)):
            edge.begin()
            edge.client.call(_request_from_nginx, port, writes, statuses)
            spans = edge.spans(50)
            for side in spans:
                served = [(span.attributes["http.response.status_code"], _query(span)) for span in side]
                assert sorted(served, key=lambda one: int(one[1])) == [
                    (status, str(index)) for index, status in enumerate(statuses)
                ]
            assert {span.resource["process.executable.name"] for span in spans.servers} == {"nginx"}
            assert not edge.dropped()
    edge.assert_forgotten(port)


def _query(span: CollectedSpan) -> str:
    return span.attributes.get("url.query") or urlsplit(span.attributes["url.full"]).query


def _request_from_nginx(port: int, writes: Sequence[bytes], statuses: Sequence[int]) -> None:
    with connect(port) as connection:
        for data in writes:
            send_all(connection, data)
        received = b""
        while received.count(b"as asked") < len(statuses):
            piece = connection.recv(65536)
            if not piece:
                raise EOFError
            received += piece
        if [int(status) for status in re.findall(rb"HTTP/1.1 ([0-9]{3}) ", received)] != list(statuses):
            raise PeerError("other statuses came")


# -- who holds the connection


def test_connection_pool(edge: Edge) -> None:
    """A pool of five connections used in turn: each exchange is linked to its own other end."""
    edge.server.start(_serve_pool, edge.port, 5)
    edge.client.call(_request_pool, edge.port, 5, 60)
    edge.server.result()
    edge.expect([(f"/{index}", 200) for index in range(60)])


def _serve_pool(port: int, size: int) -> None:
    """A thread per connection, until the client closes it."""

    def serve_one(connection: socket.socket) -> None:
        with connection:
            while data := os.read(connection.fileno(), 65536):
                if not data.endswith(b"\r\n\r\n"):
                    raise PeerError("a request was cut")
                send_all(connection, response())

    with listen(port) as listener:
        threads = [threading.Thread(target=serve_one, args=(accept(listener),)) for _ in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _request_pool(port: int, size: int, count: int) -> None:
    pool = [connect(port) for _ in range(size)]
    for index in range(count):
        connection = pool[index * 7 % size]
        send_all(connection, request(f"/{index}"))
        receive(connection, len(response()))
    for connection in pool:
        connection.close()


def test_threads_share_a_socket(edge: Edge) -> None:
    """Eight threads that take turns on one connection under a lock: no exchange is lost or mixed up."""
    edge.server.start(_serve_pool, edge.port, 1)
    edge.client.call(_request_from_threads, edge.port, 8, 25)
    edge.server.result()
    spans = edge.spans(200)
    spans.assert_linked()
    paths = sorted(f"/{thread}/{index}" for thread in range(8) for index in range(25))
    assert sorted(seen(span).path for span in spans.servers) == paths
    clients = {span.span_id: seen(span) for span in spans.clients}
    assert all(clients[span.parent_span_id] == seen(span) for span in spans.servers)


def _request_from_threads(port: int, threads: int, count: int) -> None:
    lock = threading.Lock()

    def run(thread: int) -> None:
        for index in range(count):
            with lock:
                send_all(connection, request(f"/{thread}/{index}"))
                receive(connection, len(response()))

    with connect(port) as connection:
        running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()


@pytest.mark.parametrize("depth", [1, 8], ids=["one_at_a_time", "pipelined"])
def test_threads_that_read_and_threads_that_write(edge: Edge, depth: int) -> None:
    """On both ends one thread receives and another one sends, with up to ``depth`` requests under way: each request is
    one span on either side, with its own status, and the two are linked where nothing is pipelined.
    """
    edge.server.start(_serve_by_reader_and_writer, edge.port)
    edge.client.call(_request_by_sender_and_receiver, edge.port, 100, depth)
    edge.server.result()
    expected = [(f"/{index}", _STATUSES[index % 3]) for index in range(100)]
    edge.expect(expected, linked=depth == 1)


@pytest.mark.parametrize("depth", [1, 8], ids=["one_at_a_time", "pipelined"])
def test_readers_and_writers_of_many_connections(edge: Edge, depth: int) -> None:
    """The same on many connections at once: no exchange of one connection is taken for that of another."""
    clients, count = 20, 25
    edge.server.start(_serve_by_reader_and_writer, edge.port, clients)
    edge.client.call(_request_by_many, edge.port, clients, count, depth)
    edge.server.result()
    spans = edge.spans(count * clients)
    paths = sorted(f"/{client}/{number}" for client in range(clients) for number in range(count))
    for side in spans:
        assert sorted(seen(span).path for span in side) == paths, spans.show()
        for span in side:
            assert seen(span).status == _STATUSES[int(seen(span).path.rpartition("/")[2]) % 3], spans.show()
    callers = {span.span_id: seen(span).path for span in spans.clients}
    for span in spans.servers:
        assert callers.get(span.parent_span_id, seen(span).path if depth > 1 else "") == seen(span).path, spans.show()


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_readers_and_writers_that_begin_to_pipeline(edge: Edge, depth: int) -> None:
    """On many connections the second request comes while the response to the first one is read or written by another
    thread, which may run on another CPU: whichever comes first, each request has its own response.
    """
    connections, count = 200, 8
    edge.server.start(_serve_one_after_another, edge.port, connections)
    edge.client.call(_request_one_after_another, edge.port, connections, count, depth)
    edge.server.result()
    for side in edge.spans(connections * count):
        wrong = [
            seen(span) for span in side if seen(span).status != _STATUSES[int(seen(span).path.rpartition("/")[2]) % 3]
        ]
        assert not wrong
    assert not edge.dropped()


def _serve_one_after_another(port: int, connections: int) -> None:
    with listen(port) as listener:
        for _ in range(connections):
            with accept(listener) as connection:
                _read_and_write(connection)


def _request_one_after_another(port: int, connections: int, count: int, depth: int) -> None:
    for index in range(connections):
        _request_by_sender_and_receiver(port, count, depth, f"/{index}")


def _serve_by_reader_and_writer(port: int, clients: int = 1) -> None:
    with listen(port) as listener, ExitStack() as stack:
        _read_and_write(*[stack.enter_context(accept(listener)) for _ in range(clients)])


def _read_and_write(*connections: socket.socket) -> None:
    """One thread reads the requests of a connection, another one writes the responses, in order."""

    def read(connection: socket.socket, requests: queue.SimpleQueue) -> None:
        data = b""
        while piece := connection.recv(65536):
            *whole, data = (data + piece).split(b"\r\n\r\n")
            for head in whole:
                requests.put(int(head.split(b" ")[1].rpartition(b"/")[2]))
        requests.put(None)

    def write(connection: socket.socket, requests: queue.SimpleQueue) -> None:
        while (number := requests.get()) is not None:
            send_all(connection, response(_STATUSES[number % 3]))

    both = [(connection, queue.SimpleQueue()) for connection in connections]
    _run_all([partial(do, *one) for one in both for do in (read, write)])


def _request_by_sender_and_receiver(port: int, count: int, depth: int, name: str = "") -> None:
    """One thread sends requests, another one receives the responses; ``depth`` of them are under way at most."""
    room = threading.Semaphore(depth)

    def send() -> None:
        for number in range(count):
            assert room.acquire(timeout=10), "a response is missing"
            send_all(connection, request(f"{name}/{number}"))

    def receive_responses() -> None:
        for number in range(count):
            receive(connection, len(response(_STATUSES[number % 3])))
            room.release()

    with connect(port) as connection:
        _run_all([send, receive_responses])


def _request_by_many(port: int, clients: int, count: int, depth: int) -> None:
    _run_all([partial(_request_by_sender_and_receiver, port, count, depth, f"/{index}") for index in range(clients)])


def _run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Each in a thread of its own, at the same time. The first failure is raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for running in [pool.submit(task) for task in tasks]:
            running.result()


def test_fork_after_accept(edge: Edge) -> None:
    """A server that accepts and lets a child serve: the spans are the child's."""
    edge.server.start(_serve_in_child, edge.port)
    edge.client.call(request_turns, edge.port, [_turn("/a"), _turn("/b", 500)])
    child = edge.server.result()
    spans = edge.expect([("/a", 200), ("/b", 500)])
    assert {span.resource["process.pid"] for span in spans.servers} == {child}
    assert {span.resource["process.pid"] for span in spans.clients} == {edge.client.pid}


def _serve_in_child(port: int) -> int:
    with listen(port) as listener, accept(listener) as connection:
        child = os.fork()
        if not child:
            try:
                for status in (200, 500):
                    receive_head(connection)
                    send_all(connection, response(status))
                connection.recv(1)
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    return child


def test_descriptor_passed_to_another_process(edge: Edge) -> None:
    """A connection that is passed on with SCM_RIGHTS belongs to the process that serves it."""
    edge.server.start(_serve_in_receiver, edge.port)
    edge.client.call(request_turns, edge.port, [_turn("/passed")])
    receiver = edge.server.result()
    server, _ = edge.expect([("/passed", 200)]).one()
    assert server.resource["process.pid"] == receiver


def _serve_in_receiver(port: int) -> int:
    giver, taker = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if not child:
        try:
            _, ancillary, _, _ = taker.recvmsg(1, socket.CMSG_SPACE(4))
            descriptors = array.array("i", ancillary[0][2][:4])
            connection = socket.socket(fileno=descriptors[0])
            receive_head(connection)
            send_all(connection, response())
            connection.recv(1)
        finally:
            os._exit(0)
    with listen(port) as listener, accept(listener) as connection:
        rights = array.array("i", [connection.fileno()])
        giver.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    os.waitpid(child, 0)
    giver.close()
    taker.close()
    return child


def test_duplicated_descriptor(edge: Edge) -> None:
    """Reading from one descriptor and writing to its duplicate is one exchange."""
    edge.server.start(_serve_with_two_descriptors, edge.port, 3)
    edge.client.call(request_turns, edge.port, [_turn(f"/{index}") for index in range(3)])
    edge.server.result()
    edge.expect([(f"/{index}", 200) for index in range(3)])


def _serve_with_two_descriptors(port: int, count: int) -> None:
    with listen(port) as listener, accept(listener) as connection, connection.dup() as other:
        for _ in range(count):
            receive_head(connection)
            send_all(other, response())
        connection.recv(1)


# -- how bytes come and go


_SPLIT_REQUEST = request("/split/at/any/byte?a=b", method="POST", fields=["X-One: 1"], body=b"the body")
_SPLIT_RESPONSE = response(418, fields=["X-Two: 2"], body=b"the answer")


def test_heads_split_at_every_byte(edge: Edge) -> None:
    """Wherever a request and its response are cut in two writes and two reads, it is one exchange with all facts."""
    turns = [
        Turn([_SPLIT_REQUEST[:at], _SPLIT_REQUEST[at:]], [_SPLIT_RESPONSE]) for at in range(1, len(_SPLIT_REQUEST))
    ]
    turns += [
        Turn([_SPLIT_REQUEST], [_SPLIT_RESPONSE[:at], _SPLIT_RESPONSE[at:]]) for at in range(1, len(_SPLIT_RESPONSE))
    ]
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.expect([("/split/at/any/byte", 418)] * len(turns))
    for span in (*spans.servers, *spans.clients):
        assert span.attributes["http.request.body.size"] == 8
        assert span.attributes["http.response.body.size"] == 10


def test_heads_of_get_split_at_every_byte(edge: Edge) -> None:
    """The same for a request without a body, whose last bytes are the blank line."""
    whole, answer = request("/g"), response(204, body=None)
    turns = [Turn([whole[:at], whole[at:]], [answer]) for at in range(1, len(whole))]
    turns += [Turn([whole], [answer[:at], answer[at:]]) for at in range(1, len(answer))]
    run_turns(edge.server, edge.client, edge.port, turns)
    edge.expect([("/g", 204)] * len(turns))


@pytest.mark.parametrize("sending", sorted(SENDING.keys() - {"sendmmsg_2"}))
def test_ways_of_sending(edge: Edge, sending: str) -> None:
    """Whatever system call sends, in whatever portions: one span a side, with exact sizes and the trace context."""
    _assert_way_works(edge, (sending, "read"))


@pytest.mark.parametrize("receiving", sorted(RECEIVING.keys() - {"recvmmsg_2"}))
def test_ways_of_receiving(edge: Edge, receiving: str) -> None:
    """Whatever system call receives, in whatever portions: one span a side, with exact sizes; MSG_PEEK counts once."""
    _assert_way_works(edge, ("write", receiving))


@pytest.mark.parametrize("way", [("sendmmsg_2", "read"), ("write", "recvmmsg_2"), ("sendmmsg_2", "recvmmsg_2")])
def test_two_messages_in_one_call(edge: Edge, way: tuple[str, str]) -> None:
    """Of two messages in one call both count; what is read of a head has to stand in the first one."""
    _assert_way_works(edge, way, body_bytes=500)


def test_one_byte_per_call_everywhere(edge: Edge) -> None:
    """Both directions written and read byte by byte."""
    _assert_way_works(edge, ("write_1", "read_1"))


def _assert_way_works(edge: Edge, way: tuple[str, str], body_bytes: int = 10) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    fields = [f"traceparent: 00-{trace_id}-{parent_id}-01"]
    turns = [
        Turn(
            [request(f"/{index}", method="POST", fields=fields, body=b"r" * (body_bytes + index))],
            [response(200 + index, body=b"s" * (2 * body_bytes + index))],
            way,
            way,
        )
        for index in range(2)
    ]
    run_turns(edge.server, edge.client, edge.port, turns)
    spans = edge.spans(2)
    for side in spans:
        for index, span in enumerate(side):
            assert seen(span) == (f"/{index}", 200 + index, None)
            assert span.trace_id == trace_id
            assert span.attributes["http.request.body.size"] == body_bytes + index
            assert span.attributes["http.response.body.size"] == 2 * body_bytes + index
    clients = [span.span_id for span in spans.clients]
    assert [span.parent_span_id for span in spans.servers] == clients
    assert [span.parent_span_id for span in spans.clients] == [parent_id] * 2


def test_as_many_buffers_as_there_can_be(edge: Edge) -> None:
    """1024 one-byte buffers in one writev: the head is cut at the 256th, which the span says, and sizes stay exact."""
    head = request("/many", method="POST", fields=[f"X-Fill: {'f' * 200}", "Content-Length: 700"])
    answer = response(fields=[f"X-Fill: {'f' * 200}"], body=b"s" * 700)
    way = ("writev_1", "read")
    run_turns(edge.server, edge.client, edge.port, [Turn([head + b"r" * 700], [answer], way, way), _turn("/next")])
    spans = edge.expect([("/many", 200), ("/next", 200)])
    for side in spans:
        assert side[0].attributes["http.response.body.size"] == 700


@pytest.mark.parametrize("sending", ["writev_4096", "sendmsg_7"])
def test_big_vectors(edge: Edge, sending: str) -> None:
    """A body of a megabyte in vectors: sizes are exact on both sides."""
    body = b"v" * (1 << 20)
    way = (sending, "readv_4096")
    turn = Turn([request("/big", method="PUT", body=body)], [response(body=body)], way, way)
    run_turns(edge.server, edge.client, edge.port, [turn, _turn("/next")])
    spans = edge.expect([("/big", 200), ("/next", 200)])
    for side in spans:
        assert side[0].attributes["http.request.body.size"] == 1 << 20
        assert side[0].attributes["http.response.body.size"] == 1 << 20


# -- refused and short writes


@pytest.mark.parametrize("how", ["send", "write", "sendmsg", "writev_4096"])
def test_full_socket_buffer(edge: Edge, how: str) -> None:
    """A non-blocking sender whose writes are cut short and refused: bytes that were not taken are not counted."""
    size = 8 << 20
    edge.server.start(_serve_without_blocking, edge.port, size, how)
    assert edge.client.call(_read_slowly, edge.port) == size
    refused, short = edge.server.result()
    assert refused
    assert short
    for span in edge.expect([("/slow", 200)]).one():
        # Chunked, so that nothing but the bytes seen on the socket gives the size.
        assert "http.response.body.size" not in span.attributes
    edge.begin()
    edge.server.start(_serve_without_blocking, edge.port, -size, how)
    assert edge.client.call(_read_slowly, edge.port) == size
    edge.server.result()
    for span in edge.expect([("/slow", 200)]).one():
        assert span.attributes["http.response.body.size"] == size


def _serve_without_blocking(port: int, size: int, how: str) -> tuple[int, int]:
    """Answer with so many bytes until the close (negative), or with one chunk. Returns refused and short writes."""
    refused = short = 0
    with listen(port) as listener, accept(listener) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        receive_head(connection)
        body = b"z" * abs(size)
        if size < 0:
            data = b"HTTP/1.1 200 OK\r\n\r\n" + body
        else:
            data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked([body])
        connection.setblocking(False)
        rest = memoryview(data)
        deadline = time.monotonic() + 30
        while rest:
            try:
                count = SENDING[how](connection, rest)
            except BlockingIOError:
                refused += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
                continue
            offered = min(len(rest), 4096 * 1024)
            short += count < offered
            rest = rest[count:]
    return refused, short


def _read_slowly(port: int) -> int:
    """Request, read until the end with pauses, and return the bytes of the body's own letter."""
    total = pauses = 0
    with connect(port) as connection:
        send_all(connection, request("/slow"))
        while data := os.read(connection.fileno(), 1 << 20):
            total += data.count(b"z")
            if pauses < 20:
                pauses += 1
                time.sleep(0.005)
    return total


def test_refused_upload(edge: Edge) -> None:
    """An upload whose writes are refused again and again, answered early, with the next request right behind it."""
    edge.server.start(_serve_after_upload, edge.port)
    refused = edge.client.call(_send_into_full_buffer, edge.port)
    assert refused
    edge.server.result()
    edge.expect([("/upload", 200), ("/behind", 201)], linked=False)


def _serve_after_upload(port: int) -> None:
    with listen(port) as listener:
        connection = accept(listener)
    with connection:
        head = receive_head(connection)
        send_all(connection, response(200))
        time.sleep(0.2)
        rest = 4 << 20
        rest -= len(head) - head.index(b"\r\n\r\n") - 4
        receive(connection, rest)
        receive_head(connection)
        send_all(connection, response(201))
        connection.recv(1)


def _send_into_full_buffer(port: int) -> int:
    """Send an upload whose response comes early, then a request while the upload still fills the buffer."""
    refused = 0
    with connect(port) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        rest = memoryview(request("/upload", method="POST", body=b"u" * (4 << 20)))
        second = request("/behind")
        connection.setblocking(False)
        deadline = time.monotonic() + 30
        while rest or second:
            if time.monotonic() > deadline:
                raise TimeoutError
            try:
                if rest:
                    rest = rest[connection.send(rest) :]
                else:
                    connection.send(second)
                    second = b""
            except BlockingIOError:
                refused += 1
                time.sleep(0.001)
        connection.settimeout(30)
        receive_to = len(response(200)) + len(response(201))
        while receive_to:
            receive_to -= len(connection.recv(receive_to))
    return refused


def test_refused_request(edge: Edge) -> None:
    """A request that a full socket buffer refuses begins when it is taken; the refused attempts are counted as such."""
    for _ in range(10):
        edge.begin()
        edge.server.call(_listen_for_junk, edge.port)
        junk_bytes, refused, is_sent = edge.client.call(_fill_and_request, edge.port, 5)
        edge.server.start(_serve_behind_junk, junk_bytes)
        edge.client.call(_request_at_last, is_sent)
        edge.server.result()
        spans = edge.spans(1)
        spans.assert_linked()
        assert [seen(span) for side in spans for span in side] == [("/at/last", 200, None)] * 2
        assert edge.dropped() == ({"write_refused": refused} if refused else {})
        if refused:
            return
    raise AssertionError("the kernel found room for every request")


_kept: list[socket.socket] = []


def _listen_for_junk(port: int) -> None:
    _kept.append(listen(port))


def _fill_and_request(port: int, attempts: int) -> tuple[int, int, bool]:
    """Fill the connection with what is no request, then try to send one.

    Returns the bytes, the refusals and whether it was taken in the end: a full buffer may have room for a short write.
    """
    connection = connect(port)
    _kept.append(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    connection.setblocking(False)
    total = refused = quiet = 0
    while quiet < 20:  # what the kernel moves to the other end meanwhile makes room
        quiet += 1
        for size in (65536, 1024, 16):  # a full buffer may still take a short write behind the last long one
            try:
                total += connection.send(b"\0" * size)
                quiet = 0
            except BlockingIOError:
                pass
        if quiet:
            time.sleep(0.01)
    with suppress(BlockingIOError):
        while True:  # what a window probe has just made room for
            total += connection.send(b"\0" * 16)
    for _ in range(attempts):
        try:
            connection.send(request("/at/last"))
            return total, refused, True
        except BlockingIOError:
            refused += 1
    return total, refused, False


def _serve_behind_junk(junk_bytes: int) -> None:
    with _kept.pop() as listener, accept(listener) as connection:
        receive(connection, junk_bytes)
        receive_head(connection)
        send_all(connection, response())
        connection.recv(1)


def _request_at_last(is_sent: bool) -> None:
    with _kept.pop() as connection:
        connection.setblocking(True)
        if not is_sent:
            send_all(connection, request("/at/last"))
        receive(connection, len(response()))
