"""agent.sampling: one decision per trace, the same on every node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sampling import Sampler

TRACE_IDS = st.binary(min_size=16, max_size=16)
RATIOS = st.floats(0, 1)
LOWEST, HIGHEST = bytes(16), bytes(9) + b"\xff" * 7


@given(TRACE_IDS, st.sampled_from([True, False]), RATIOS)
def test_the_senders_decision_is_kept(trace_id, sampled, ratio):
    """Parent-based: what came with the context wins over the ratio."""
    assert Sampler(ratio, parent_based=True).keeps(trace_id, sampled) is sampled


@given(TRACE_IDS, st.sampled_from([True, False, None]), RATIOS)
def test_without_parent_based_only_the_ratio_decides(trace_id, sampled, ratio):
    """The sender's decision is not looked at."""
    sampler = Sampler(ratio, parent_based=False)
    assert sampler.keeps(trace_id, sampled) == sampler.keeps(trace_id, None)


@given(TRACE_IDS)
def test_the_ends_of_the_ratio_are_exact(trace_id):
    """1 keeps every trace and 0 none."""
    assert Sampler(1.0).keeps(trace_id, None)
    assert not Sampler(0.0).keeps(trace_id, None)


@given(TRACE_IDS, RATIOS, RATIOS)
def test_a_higher_ratio_keeps_what_a_lower_one_keeps(trace_id, one, other):
    """Nodes with different ratios agree on the traces of the lower one."""
    low, high = sorted((one, other))
    assert Sampler(low).keeps(trace_id, None) <= Sampler(high).keeps(trace_id, None)


@given(TRACE_IDS, st.binary(min_size=9, max_size=9), RATIOS)
def test_only_the_random_part_decides(trace_id, prefix, ratio):
    """The lowest 56 bits are random by the specification; the others may hold a time or be zero."""
    sampler = Sampler(ratio)
    assert sampler.keeps(trace_id, None) == sampler.keeps(prefix + trace_id[9:], None)


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_the_share_kept_is_the_ratio(ratio):
    """Evenly spread ids are kept in the configured share."""
    sampler = Sampler(ratio)
    count = 20_000
    kept = sum(
        sampler.keeps(bytes(9) + (index * (1 << 56) // count).to_bytes(7, "big"), None) for index in range(count)
    )
    assert abs(kept - ratio * count) <= 1


def test_the_boundary_is_on_the_high_side():
    """With half of the traces the lowest id is dropped and the highest kept, as W3C level 2 has it."""
    sampler = Sampler(0.5)
    assert not sampler.keeps(LOWEST, None)
    assert sampler.keeps(HIGHEST, None)
    assert sampler.keeps(bytes(9) + b"\x80" + bytes(6), None)
    assert not sampler.keeps(bytes(9) + b"\x7f" + b"\xff" * 6, None)
