"""agent.kernel.records: bytes packed by hand -> records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.records import Decoder
from agent.model import ConnectionClosed, ConnectionUpgraded, Exchange, PeerFound, ProcessSeen, Segment, TlsSeen
from tests.unit.kernel.wire import CLOSE, EXCHANGE, LAYOUT, PEER, PROCESS, SEGMENT, TLS, batch, pack

U64, U32, U16 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
ADDRESS = st.binary(min_size=16, max_size=16)
LOCAL, REMOTE, TAIL = bytes(range(16)), bytes(range(16, 32)), b"87654321"


def decode(*pieces: bytes) -> list:
    return Decoder(LAYOUT).decode(*batch(pieces))


def test_an_exchange_is_read_member_by_member():
    """Every member that is read has its place; the data behind the struct is the request and then the response."""
    numbers = list(range(1001, 1013))
    data = EXCHANGE.pack(1, 2, 3, 260, *numbers, 11, 12, 13, 14, 80, 40000, 3, 5, LOCAL, REMOTE, TAIL, 0x03041301)
    [found] = decode(data + b"GET" + b"HTTP/")
    assert found == Exchange(
        role=2,
        end=3,
        flags=260,
        exchange_id=1001,
        parent_id=1002,
        peer_id=1003,
        connection_id=1004,
        process_start_ns=1005,
        request_start_ns=1006,
        request_end_ns=1007,
        response_start_ns=1008,
        response_end_ns=1009,
        end_ns=1010,
        request_bytes=1011,
        response_bytes=1012,
        tgid=11,
        request_tid=12,
        response_tid=13,
        remote_port=40000,
        request_captured=3,
        response_captured=5,
        remote_address=REMOTE,
        tail=TAIL,
        tls=0x03041301,
        request=b"GET",
        response=b"HTTP/",
    )


def test_a_process_is_read_with_its_names():
    """Names end at their first NUL, and what is no UTF-8 is replaced."""
    data = PROCESS.pack(2, 0, 0, 42, 2**63, 1000, 1, b"nginx\0garbage", b"n\xffx" + bytes(61))
    assert decode(data) == [ProcessSeen(42, 2**63, 1000, 1, "nginx", "n\ufffdx", b"")]


def test_a_name_may_fill_its_place():
    """A name of 16 and one of 64 bytes have no NUL."""
    [found] = decode(PROCESS.pack(2, 0, 0, 1, 2, 3, 4, b"c" * 16, b"e" * 64))
    assert (found.comm, found.executable) == ("c" * 16, "e" * 64)


@pytest.mark.parametrize(
    ("unified", "memory", "text"),
    [
        (b"", b"", b""),
        (b"\0", b"", b"0::/\n"),
        (b"app.scope\0a b.slice\0\0", b"", b"0::/a b.slice/app.scope\n"),
        (b"\0", b"id\0pod1\0kubepods\0\0", b"0::/\n1:memory:/kubepods/pod1/id\n"),
        (b"", b"id\0\0", b"1:memory:/id\n"),
    ],
)
def test_the_names_of_cgroups_are_read_as_paths(unified: bytes, memory: bytes, text: bytes):
    """They come from the cgroup upwards; a single 0 is the root, nothing at all is what the kernel could not tell."""
    head = PROCESS.pack(2, len(unified), len(memory), 1, 2, 3, 4, b"c", b"e")
    found = decode(head + unified + memory, CLOSE.pack(4, 1, 5, 0, 1, 2, 3))
    assert found[0].cgroup == text
    assert len(found) == 2


def test_a_segment_is_read_with_its_data():
    """Only the captured bytes are data; the length may be larger."""
    data = SEGMENT.pack(3, 1, 2, 4, 2, 21, 22, 23, 24, 900, 31, 32, 33, 80, 40000, LOCAL, REMOTE, 34)
    assert decode(data + b"data") == [
        Segment(3, 1, 2, 4, 2, 21, 22, 23, 24, 900, 31, 32, 33, 80, 40000, LOCAL, REMOTE, 34, b"data")
    ]


def test_a_close_is_read():
    """A close has no data."""
    assert decode(CLOSE.pack(4, 1, 5, 16, 71, 72, 73)) == [ConnectionClosed(4, 1, 5, 16, 71, 72, 73)]


def test_a_peer_is_read():
    """The server's connection comes first."""
    assert decode(PEER.pack(5, 71, 72)) == [PeerFound(71, 72)]


def test_a_process_that_uses_tls_is_read():
    """How, its number and when it started."""
    assert decode(TLS.pack(6, 2, 42, 2**63)) == [TlsSeen(2, 42, 2**63)]


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_an_unknown_kind_is_counted_and_skipped(kind):
    """A record of a later version does not disturb its neighbours."""
    decoder = Decoder(LAYOUT)
    known = CLOSE.pack(4, 1, 5, 0, 1, 2, 3)
    found = decoder.decode(*batch([known, kind.to_bytes(2, "little") + bytes(30), known]))
    assert len(found) == 2
    assert decoder.unknown_records == 1


def test_an_empty_batch_is_no_record():
    """Nothing in, nothing out."""
    assert Decoder(LAYOUT).decode(b"", []) == []


EXCHANGES = st.builds(
    lambda role, end, flags, numbers, small, port, remote, tail, tls, request, response: Exchange(
        role,
        end,
        flags,
        *numbers,
        *small,
        port,
        len(request),
        len(response),
        remote,
        tail,
        tls,
        request,
        response,
    ),
    st.integers(0, 255),
    st.integers(0, 255),
    U32,
    st.lists(U64, min_size=12, max_size=12),
    st.lists(U32, min_size=3, max_size=3),
    U16,
    ADDRESS,
    st.binary(min_size=8, max_size=8),
    U32,
    st.binary(max_size=40),
    st.binary(max_size=40),
)
NAMES = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=16)
CGROUPS = st.sampled_from(
    (b"", b"0::/\n", b"0::/system.slice/a b.service\n", b"0::/\n1:memory:/kubepods/pod1/id\n", b"0::/x\n1:memory:/\n")
)
PROCESSES = st.builds(ProcessSeen, U32, U64, U32, U32, NAMES, NAMES, CGROUPS)
SEGMENTS = st.builds(
    lambda numbers, length, small, ports, local, remote, tls, data: Segment(
        3, 1, 2, len(data), 3, *numbers, length, *small, *ports, local, remote, tls, data
    ),
    st.lists(U64, min_size=4, max_size=4),
    U64,
    st.lists(U32, min_size=3, max_size=3),
    st.lists(U16, min_size=2, max_size=2),
    ADDRESS,
    ADDRESS,
    U32,
    st.binary(max_size=60),
)
CLOSES = st.builds(ConnectionClosed, st.just(4), st.integers(0, 255), st.integers(0, 255), U32, U64, U64, U64)
PEERS = st.builds(PeerFound, U64, U64)
UPGRADES = st.builds(ConnectionUpgraded, EXCHANGES)


@given(st.lists(st.one_of(EXCHANGES, PROCESSES, SEGMENTS, CLOSES, PEERS, UPGRADES), max_size=12))
def test_records_survive_the_wire(records):
    """What the kernel packs is what comes out, in its order, whatever stands beside it."""
    decoder = Decoder(LAYOUT)
    assert decoder.decode(*batch([pack(record) for record in records])) == records
    assert decoder.unknown_records == 0
