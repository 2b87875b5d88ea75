"""agent.protocols.grpc: messages, deadlines, names; whole, byte by byte, with a gap."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocols import grpc
from agent.protocols.grpc import MessageCounter
from tests.unit.http2_traffic import message


@given(st.lists(st.integers(0, 3000), max_size=20), st.integers(0, 2**32), st.sampled_from([1, 4, 7, 5000]))
@settings(max_examples=200, deadline=None)
def test_messages_are_counted_in_any_cut(sizes, seed, largest) -> None:
    """However the bytes come, every message counts once it is whole, also those without content."""
    choice = random.Random(seed)
    data = b"".join(map(message, sizes))
    counter = MessageCounter()
    position = 0
    while position < len(data):
        step = choice.randint(1, largest)
        counter.feed(data, position, min(position + step, len(data)))
        position += step
    assert counter.count == len(sizes)


@given(st.lists(st.integers(0, 300), max_size=20), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_gap_leaves_the_count_right_or_unknown(sizes, seed) -> None:
    """Inside a message nothing is lost by it; over a prefix the count is given up."""
    choice = random.Random(seed)
    data = b"".join(map(message, sizes))
    counter = MessageCounter()
    position = 0
    while position < len(data):
        stop = min(position + choice.randint(1, 100), len(data))
        if choice.random() < 0.3:
            counter.skip(stop - position)
        else:
            counter.feed(data, position, stop)
        position = stop
    assert counter.count in (None, len(sizes))


def test_gaps_one_by_one() -> None:
    """Exactly to the end of a message is inside it; a byte more is not."""
    data = message(10) + message(3)
    for gap, count in ((10, 2), (9, 2), (11, None)):
        counter = MessageCounter()
        counter.feed(data, 0, 5)
        counter.skip(gap)
        counter.feed(data, 5 + gap, len(data))
        assert counter.count == count
    counter.skip(5)
    counter.feed(message(1), 0, 6)
    assert counter.count is None


def test_an_unfinished_message_does_not_count() -> None:
    """A call that is cut short sent what was whole."""
    counter = MessageCounter()
    counter.feed(message(10) + message(10)[:-1], 0, 29)
    assert counter.count == 1


def test_bytes_that_are_no_messages() -> None:
    """A first byte beyond 1 is no flag of gRPC."""
    counter = MessageCounter()
    counter.feed(b"<html></html>", 0, 13)
    assert counter.count is None


def test_compressed_messages_count() -> None:
    """The flag 1."""
    counter = MessageCounter()
    counter.feed(b"\1\0\0\0\2zz", 0, 7)
    assert counter.count == 1


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [
        (b"1H", 3600 * 10**9),
        (b"2M", 120 * 10**9),
        (b"3S", 3 * 10**9),
        (b"4m", 4 * 10**6),
        (b"5u", 5000),
        (b"6n", 6),
        (b"99999999S", 99999999 * 10**9),
        (b"999999999S", 0),
        (b"1s", 0),
        (b"", 0),
        (b"S", 0),
        (b"-1S", 0),
        (None, 0),
    ],
)
def test_timeouts(value, nanoseconds) -> None:
    """At most eight digits and a unit (PROTOCOL-HTTP2.md); anything else is as if absent."""
    assert grpc.read_timeout_ns(value) == nanoseconds


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/pkg.v1.Greeter/Hello", "pkg.v1.Greeter/Hello"),
        ("/Greeter/Hello_2", "Greeter/Hello_2"),
        ("/grpc.reflection.v1.ServerReflection/Info", "grpc.reflection.v1.ServerReflection/Info"),
        ("/a", ""),
        ("/a/b/c", ""),
        ("a/b", ""),
        ("/a/", ""),
        ("//b", ""),
        ("/a b/c", ""),
        ("/" + "a" * 300 + "/b", ""),
    ],
)
def test_method_names(path, method) -> None:
    """A service with its package, and a method."""
    assert grpc.read_method(path) == method
