"""The parser that boards and rules are held against refuses what Prometheus would, and what means nothing."""

from __future__ import annotations

import pytest
from promql import COUNTER, GAUGE, Known, PromQLError, parsed

KNOWN = {
    "alive": Known(GAUGE, {"engine": frozenset("01"), "instance": None}),
    "moves_total": Known(COUNTER, {"move": frozenset({"drain", "rescue"}), "instance": None}),
    "vllm:wait_seconds_bucket": Known(COUNTER, {"le": None, "instance": None}),
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("alive == 0", {"alive"}),
        ("-alive + 2 * 3 ^ 2 > bool 1", {"alive"}),
        ('sum by (instance) (rate(moves_total{move="drain", instance=~"$instance"}[5m]))', {"moves_total"}),
        (
            "sum(increase(moves_total[$__rate_interval])) by (move) / on () group_left () count(alive)",
            {"moves_total", "alive"},
        ),
        (
            "histogram_quantile(0.9, sum by (le) (rate(vllm:wait_seconds_bucket[1h30m])))",
            {"vllm:wait_seconds_bucket"},
        ),
        ("topk(3, alive) or vector(0) unless alive offset 5m == 1", {"alive"}),
        ("max_over_time(alive[10m]) and absent(moves_total)", {"alive", "moves_total"}),
        ('rate(moves_total{move=~"drain|rescue"}[5m]) > 0', {"moves_total"}),
    ],
)
def test_what_prometheus_takes_is_taken(text: str, names: set[str]) -> None:
    assert parsed(text, KNOWN).names == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("alive == ", "the end"),
        ("(alive", r"'\)' belongs"),
        ("alive)", "too much"),
        ("sum by (instance (alive)", "belongs"),
        ("rate(alive[5m)", "belongs"),
        ("alive{engine=0}", "string belongs"),
        ('alive{engine "0"}', "after the label"),
        ("alive & alive", "cannot read on"),
        ("alife == 0", "no metric 'alife'"),
        ("rates(moves_total[5m])", "no function 'rates'"),
        ("rate(moves_total)", "rate takes a range, not a vector"),
        ("sum(moves_total[5m])", "no rate of it is taken"),
        ("alive[5m]", "gives a range"),
        ("moves_total > 0", "no rate of it is taken"),
        ("sum(moves_total)", "no rate of it is taken"),
        ("rate(alive[5m])", "is a gauge, and has no rate"),
        ('alive{kind="d"} == 0', "no label 'kind'"),
        ('rate(moves_total{move="drained"}[5m])', "is never 'drained'"),
        ('rate(moves_total{move=~"drain|degrade"}[5m])', "is never 'degrade'"),
        ("1 > 2", "compared with bool"),
        ("alive and 1", "between vectors"),
        ("histogram_quantile(alive, 0.9)", "takes a number, a vector"),
        ("topk(alive)", "takes a number, a vector"),
        ("by (instance) alive", "does not belong there"),
        ('"alive"', "gives a string"),
        ("rate(moves_total[5 minutes])", "belongs"),
    ],
)
def test_what_would_not_work_or_mean_anything_is_refused(text: str, why: str) -> None:
    with pytest.raises(PromQLError, match=why):
        parsed(text, KNOWN)


def test_labels_that_are_grouped_by_or_matched_on_are_told() -> None:
    query = parsed("sum by (engine) (alive) / ignoring (move) group_right (instance) count(alive)", KNOWN)
    assert query.groups == {"engine", "move", "instance"}
