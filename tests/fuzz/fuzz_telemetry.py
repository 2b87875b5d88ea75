"""Fuzz target of the telemetry endpoint: ``python tests/fuzz/fuzz_telemetry.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a byte that says where the request is cut into segments, and what a client sends. Out: an exception, an
answer that is no well-formed HTTP/1.1 response with a status of ours, one that depends on the cuts, or a connection
that holds more than its bound is a finding. The bytes go through a real socket pair; the checks need no atheris.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent import telemetry
    from agent.telemetry import Metric, Source, Telemetry

HELD = Metric("spanloom_held_spans", "Spans that wait for their root.", "gauge")
SERVER = Telemetry([Source((HELD,), lambda: {HELD.name: 3})], lambda: True, lambda: False)
# Nothing fails behind this endpoint, so 500 would be a defect of the endpoint itself.
STATUSES = frozenset(telemetry._REASONS) - {500}
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+")
FIELD_LINE = re.compile(rb"(Content-Type|Content-Length|Connection|Allow): ([!-~]+(?: [!-~]+)*)")
SEGMENTS_MAX = 64  # a longer request is cut into larger pieces


def cut(data: bytes, segment_bytes: int) -> list[bytes]:
    """Pieces of that size, the last one shorter."""
    segment_bytes = max(1, segment_bytes, -(-len(data) // SEGMENTS_MAX))
    return [data[start : start + segment_bytes] for start in range(0, len(data), segment_bytes)]


def answer(segments: Sequence[bytes]) -> bytes | None:
    """What the endpoint sends to a client that sends these segments one after the other; None when it waits for more.

    Afterwards the client is gone, and the endpoint has let go of the connection.
    """
    ours, client = socket.socketpair()
    with ours, client, selectors.DefaultSelector() as selector:
        ours.setblocking(False)
        client.setblocking(False)
        connection = telemetry._Connection(ours, 0.0)
        SERVER._connections[connection] = None
        selector.register(ours, selectors.EVENT_READ, connection)
        for segment in segments:
            client.sendall(segment)
            while connection.outgoing is None and selector.select(0):
                SERVER._advance(selector, connection)
                assert len(connection.incoming) < 2 * telemetry._REQUEST_HEAD_BYTES
            if connection.outgoing is not None:
                break
        received = b""
        if connection.outgoing is not None:
            while connection.outgoing:
                SERVER._advance(selector, connection)
                received += read(client)
        client.close()
        while connection in SERVER._connections:  # what is unread is read away first
            SERVER._advance(selector, connection)
        assert not selector.get_map()
        return received or None


def read(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 20)
    except BlockingIOError:
        return b""


def check_response(response: bytes, request: bytes) -> int:
    """Assert that it is one response that every client understands; the status."""
    head, separator, body = response.partition(b"\r\n\r\n")
    assert separator
    status_line, *lines = head.split(b"\r\n")
    match = STATUS_LINE.fullmatch(status_line)
    assert match, status_line
    fields = {}
    for line in lines:
        field = FIELD_LINE.fullmatch(line)
        assert field, line
        assert field[1] not in fields, line
        fields[field[1]] = field[2]
    assert fields[b"Connection"] == b"close"
    status = int(match[1])
    assert status in STATUSES, status
    assert (b"Allow" in fields) == (status == 405)
    if request.startswith(b"HEAD ") and status in (200, 404, 503):
        assert not body
    else:
        assert len(body) == int(fields[b"Content-Length"])
    return status


def check(data: bytes) -> None:
    """The entry point for atheris."""
    request = data[1:]
    segment_bytes = data[0] if data else 0
    assert SERVER._respond(request)[:9] == b"HTTP/1.1 "
    whole = answer([request])
    in_pieces = answer(cut(request, segment_bytes))
    head_bytes = request.find(b"\r\n\r\n")
    ends_in_bounds = 0 <= head_bytes <= telemetry._REQUEST_HEAD_BYTES - 4
    assert (whole is not None) == (ends_in_bounds or len(request) >= telemetry._REQUEST_HEAD_BYTES)
    if whole is None:
        assert in_pieces is None
        return
    assert in_pieces is not None
    status = check_response(whole, request)
    assert (status == 431) == (not ends_in_bounds), status
    assert check_response(in_pieces, request) == status
    if not request.partition(b" ")[2].startswith(b"/metrics"):  # those change with every look
        assert in_pieces == whole


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
