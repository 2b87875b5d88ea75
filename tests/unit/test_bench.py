"""bench: completeness and the table. The measurements themselves need root and two cores: `make bench`."""

from __future__ import annotations

from bench.__main__ import complete_percent, middle_of, table

RUN = {
    "rate": 20000,
    "due": 120000,
    "spans": 119940,
    "cpu_us_per_span": 10.5,
    "complete_percent": 99.95,
    "refused_by_full_ring": 60,
    "dropped": 0,
    "core_percent": 21.0,
    "rss_mb": 74.0,
    "peak_mb": 82.5,
}


def test_completeness_is_of_what_was_due():
    """What found the ring buffer full is missing; a single span of a million is not rounded away."""
    assert complete_percent(119940, 120000) == 99.95
    assert complete_percent(999_999, 1_000_000) == 99.999
    assert complete_percent(9_999_999, 10_000_000) < 100
    assert complete_percent(1_000_000, 1_000_000) == 100.0
    assert complete_percent(0, 0) == 0.0


def test_the_table_has_each_figure_with_its_target():
    """A reader need not know the targets; what the ring buffer refused stands in the row."""
    text = table({"spans": [RUN, RUN | {"rate": 1000}], "start": {"seconds_to_first_span": 1.5}})
    header, at_20000, at_1000 = text.splitlines()[1:4]
    assert "ring full" in header
    assert " ".join(at_20000.split()) == "20000 10.50 ≤ 12 99.950 = 100 60 0 21.0 74.0 ≤ 80 82.5 ≤ 80"
    assert " ".join(at_1000.split()) == "1000 10.50 99.950 60 0 21.0 74.0 ≤ 80 82.5 ≤ 80"
    assert len(header) == len(at_20000) == len(at_1000)
    assert "start to first span: 1.5 s (target: at most 2 s)" in text


def test_the_comparison_on_nginx_has_its_target():
    """The ratio and what is aimed at stand in one line."""
    web = {
        "server": "nginx",
        "kind": "http",
        "agent_us_per_span": 7.0,
        "backend": "sockets",
        "throughput_ratio": 0.788,
        "requests_per_second_traced": 36519,
        "requests_per_second_plain": 48440,
        "worker_busy_percent_traced": 97.0,
        "worker_busy_percent_plain": 99.0,
        "capacity_ratio": 0.814,
        "dropped": 0,
        "begun": 716440,
        "programs": {"on_send": {"ns_per_run": 381, "runs_per_request": 3.04, "ns_per_request": 1158}},
    }
    (line,) = (line for line in table({"nginx": [web]}).splitlines() if "0.788" in line)
    assert "target: at least 0.80" in line
    text = table({"nginx": [web | {"kind": "https"}, web | {"kind": "http2"}]})
    assert "target: at least 0.75" in text
    assert "7.00   (target: at most 20)" in text


def test_the_worst_run_counts_where_something_may_be_lost():
    """The median cost; the lowest completeness, the most refused, the largest memory."""
    runs = [
        RUN | {"cpu_us_per_span": 9.0, "complete_percent": 100.0, "refused_by_full_ring": 0, "peak_mb": 90.0},
        RUN,
        RUN | {"cpu_us_per_span": 30.0, "complete_percent": 98.0, "refused_by_full_ring": 2400},
    ]
    middle = middle_of(runs)
    assert middle["cpu_us_per_span"] == 10.5
    assert (middle["complete_percent"], middle["refused_by_full_ring"], middle["peak_mb"]) == (98.0, 2400, 90.0)
