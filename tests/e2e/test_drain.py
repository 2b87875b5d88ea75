"""The reader of the ring buffer: every record comes out whole and once, wherever in the ring it lies."""

from __future__ import annotations

import os

import pytest
from agent.kernel._libbpf import ffi

from agent.kernel.capture import BATCH_BYTES, Capture, CaptureSettings
from bench.generator import Generator

DATA_BYTES = 448 + 200
"""Both heads, at the end of each record."""


@pytest.fixture
def ring(request):
    """A capture with a ring of that many bytes, in which nothing but the generator writes, and the generator."""
    with Capture(CaptureSettings(ring_buffer_bytes=request.param)) as capture:
        while capture.drain()[1]:
            pass
        generator = Generator(os.getpid(), (os.getpid(), os.getpid()))
        try:
            yield capture, generator
        finally:
            generator.close()


def records_of(batch: bytes, offsets: list[int]) -> list[bytes]:
    ends = [*offsets[1:], len(batch)]
    return [batch[start:end] for start, end in zip(offsets, ends, strict=True)]


def fixed_part(record: bytes) -> bytes:
    """What generator.bpf.c makes the same in all records: their data but for the path's digits and the identifiers."""
    data = bytearray(record[-DATA_BYTES:])
    for varying in (slice(14, 16), slice(87, 119), slice(120, 136)):
        data[varying] = b"-" * len(data[varying])
    return bytes(data)


@pytest.mark.parametrize("ring", [4096], indirect=True)
def test_a_record_broken_at_the_end_of_the_ring_is_whole(ring):
    capture, generator = ring
    seen = []
    for _ in range(400):
        generator.write(1)
        ffi.buffer(capture._buffer)[:] = b"!" * BATCH_BYTES  # or an earlier record shows through where one is missing
        batch, offsets = capture.drain()
        seen += records_of(batch, offsets)
    assert len(seen) == generator.written == 1200
    assert len({len(record) for record in seen}) == 1
    assert 4096 % len(seen[0]), "the test's own premise: records begin anywhere"
    assert len({fixed_part(record) for record in seen}) == 1


@pytest.mark.parametrize("ring", [1 << 20], indirect=True)
def test_a_full_ring_comes_in_batches(ring):
    capture, generator = ring
    generator.write(1 << 16)
    assert generator.refused
    written, seen, batches = generator.written, 0, 0
    while True:
        batch, offsets = capture.drain()
        if not offsets:
            break
        assert len(batch) <= BATCH_BYTES
        assert offsets == sorted(set(offsets))
        seen += len(offsets)
        batches += 1
    assert (seen, batches > 4) == (written, True)
    generator.write(1)
    assert len(capture.drain()[1]) == 3, "the room was given back"
