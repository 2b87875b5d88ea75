"""The metrics reference."""

from pathlib import Path

from agent import metrics


def test_the_reference_is_current():
    """docs/metrics.md is what ``make docs`` writes."""
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text() == metrics.reference()


def test_every_metric_is_declared_once():
    """No name stands twice, and each has a meaning."""
    names = [metric.name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    assert all(metric.help.endswith(".") for metric in metrics.ALL)
