"""agent.hold: spans of a process without a place wait, for how long, and what becomes of them."""

from __future__ import annotations

from agent.hold import Hold
from agent.model import Span

SECOND = 1_000_000_000
FRONT, BACK = (1, 10), (2, 20)


def spans(process: tuple[int, int], count: int = 1) -> list[Span]:
    return [Span(bytes(16), bytes(8), b"", "", "GET", 2, 1, 2, (), False, (), "", True, process) for _ in range(count)]


def of(leaving: list[Span]) -> list[tuple[int, int]]:
    """Whose spans they are."""
    return [span.process_key for span in leaving]


def holding(**bounds: int) -> Hold:
    """One that knows of BACK that it has no place yet."""
    hold = Hold(**{"hold_ns": 2 * SECOND} | bounds)
    hold.review(BACK, is_placed=False, is_wanted=True)
    return hold


def test_nothing_is_looked_at_while_everybody_has_a_place():
    """The pipeline need not ask."""
    hold = Hold(hold_ns=SECOND)
    assert hold.is_idle
    hold.review(FRONT, is_placed=True, is_wanted=True)
    assert hold.is_idle
    hold.review(BACK, is_placed=False, is_wanted=True)
    assert not hold.is_idle
    hold.review(BACK, is_placed=True, is_wanted=True)
    assert hold.is_idle


def test_spans_wait_for_their_pod():
    """They leave when it becomes known in time, before what comes then; others are not held up."""
    hold = holding()
    assert of(hold.pass_on(spans(FRONT) + spans(BACK, 2) + spans(FRONT), 0)) == [FRONT, FRONT]
    assert hold.waiting == hold.held == 2
    hold.review(BACK, is_placed=True, is_wanted=True)
    assert (hold.waiting, hold.held) == (2, 0)
    assert not hold.is_idle
    assert of(hold.pass_on(spans(FRONT), SECOND)) == [BACK, BACK, FRONT]
    assert (hold.waiting, hold.incomplete, hold.is_idle) == (0, 0, True)


def test_the_wait_is_bounded_in_time():
    """Then they leave with what is known, and are counted; the next ones wait anew."""
    hold = holding()
    hold.pass_on(spans(BACK, 4), 0)
    assert hold.pass_on(spans(BACK), 2 * SECOND - 1) == []
    assert hold.overdue(2 * SECOND - 1) == []
    assert hold.overdue(2 * SECOND) == [BACK]
    assert of(hold.pass_on([], 2 * SECOND)) == [BACK] * 5
    assert (hold.incomplete, hold.waiting) == (5, 0)
    assert hold.pass_on(spans(BACK), 3 * SECOND) == []
    assert of(hold.pass_on([], 5 * SECOND)) == [BACK]


def test_who_waits_longest_is_overdue_first():
    """Each process has a time of its own."""
    hold = holding()
    hold.review(FRONT, is_placed=False, is_wanted=True)
    hold.pass_on(spans(FRONT), 0)
    hold.pass_on(spans(BACK), SECOND)
    assert of(hold.pass_on([], 2 * SECOND)) == [FRONT]
    assert of(hold.pass_on([], 3 * SECOND)) == [BACK]


def test_the_wait_is_bounded_in_number():
    """Beyond the bound nothing more is held."""
    hold = holding(max_held=3)
    assert of(hold.pass_on(spans(BACK, 5), 0)) == [BACK] * 2
    assert (hold.held, hold.incomplete) == (3, 2)


def test_without_a_wait_nothing_is_held():
    """wait_seconds: 0."""
    hold = holding(hold_ns=0)
    assert of(hold.pass_on(spans(BACK), 0)) == [BACK]
    assert (hold.waiting, hold.incomplete) == (0, 1)


def test_the_bound_may_change_while_spans_wait():
    """A shorter wait holds for those that are here, too."""
    hold = holding()
    hold.pass_on(spans(BACK), 0)
    hold.hold_ns = SECOND
    assert of(hold.pass_on([], SECOND)) == [BACK]


def test_the_processes_that_are_remembered_are_bounded():
    """The oldest is forgotten; its spans leave as they are."""
    hold = holding()
    hold.pass_on(spans(BACK), 0)
    for number in range(Hold._PROCESSES):
        hold.review((1000 + number, 1), is_placed=False, is_wanted=True)
    assert of(hold.pass_on([], 1)) == [BACK]
    assert (hold.held, hold.incomplete) == (0, 1)


def test_what_turns_out_not_to_be_wanted_is_dropped_and_counted():
    """A pod that the rules leave out may have made spans before it was known, some of which are still on their way."""
    hold = holding()
    hold.pass_on(spans(BACK, 4), 0)
    hold.review(BACK, is_placed=True, is_wanted=False)
    assert of(hold.pass_on(spans(BACK, 3) + spans(FRONT), 1)) == [FRONT]
    assert (hold.waiting, hold.unwanted, hold.incomplete) == (0, 7, 0)
    hold.review(BACK, is_placed=True, is_wanted=True)
    assert hold.is_idle


def test_what_was_made_while_selected_is_not_dropped():
    """Only what was held without a decision is: a changed selection holds for what comes."""
    hold = Hold(hold_ns=SECOND)
    hold.review(FRONT, is_placed=True, is_wanted=False)
    assert hold.is_idle


def test_the_end_waits_for_nothing():
    """flush() hands over what is held."""
    hold = holding()
    hold.pass_on(spans(BACK), 0)
    assert of(hold.flush()) == [BACK]
    assert hold.flush() == []
    assert (hold.waiting, hold.incomplete) == (0, 1)
