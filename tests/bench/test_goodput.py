"""Attainment counts all requests that were sent."""

import pytest

from taichi_serve.bench.goodput import Histogram, Meter, wilson
from taichi_serve.messages import Arrived, Finished, Outcome, Prefilled
from taichi_serve.slo import SLO


class Nobody:
    def on(self, event):
        return []


def fed(meter, *events):
    for event in events:
        meter.on(event)
    return meter.tally


def test_a_request_is_good_when_both_times_are_within_their_slos():
    tally = fed(
        Meter(Nobody(), SLO(1.0, 0.1)),
        *(Arrived(0.0, name, 10, 100) for name in "abcd"),
        Prefilled(0.5, "a", 0, "i0"),
        Prefilled(1.0, "b", 0, "i0"),
        Prefilled(1.5, "c", 0, "i0"),
        Finished(1.5, "a", 11),  # 0.1 s a token
        Finished(2.5, "b", 11),  # 0.15
        Finished(2.0, "c", 11),  # too late
        Finished(2.0, "d", 0, Outcome.FAILED),
    )
    assert (tally.sent, tally.done, tally.good, tally.bad) == (4, 4, 1, 3)
    assert tally.attainment == 0.25


def test_who_waits_past_the_ttft_slo_is_known_to_be_bad_at_the_next_arrival():
    meter = Meter(Nobody(), SLO(1.0, 0.1), lost_at=1, won_at=9)
    fed(meter, Arrived(0.0, "a", 10, 100), Arrived(0.9, "b", 10, 100))
    assert not meter.decided
    fed(meter, Arrived(1.1, "c", 10, 100))
    assert meter.decided
    tally = fed(meter, Prefilled(1.2, "a", 0, "i0"), Finished(1.3, "a", 2))
    assert tally.bad == 1


def test_each_request_is_judged_by_its_own_slo_and_counted_in_its_class():
    loose = SLO(10.0, 1.0)
    meter = Meter(Nobody(), SLO(1.0, 0.1))
    fed(meter, Arrived(0.0, "a", 10, 100, slo=loose, slo_class="batch"), Arrived(0.0, "b", 10, 100))
    fed(meter, Arrived(5.0, "c", 10, 100, slo=loose, slo_class="batch"))
    assert meter.tally.bad == 1  # b is late, though a came before it and is not
    for name in ("a", "b"):
        fed(meter, Prefilled(6.0, name, 0, "i0"), Finished(8.0, name, 11))
    tally, batch = meter.tally, meter.tally.classes["batch"]
    assert (tally.sent, tally.good, tally.bad) == (3, 1, 1)
    assert (batch.sent, batch.good, batch.bad, batch.ttft.count) == (2, 1, 0, 1)
    assert (tally.prompt_tokens, tally.in_time_tokens, batch.in_time_tokens) == (20, 10, 10)


def test_the_wilson_interval_of_ninety_in_a_hundred():
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(100, 100)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_quantiles_are_right_to_half_a_percent_and_the_mean_is_exact():
    times = Histogram()
    for n in range(1, 1001):
        times.add(n / 1000)
    assert times.mean == pytest.approx(0.5005)
    assert times.quantile(0.9) == pytest.approx(0.9, rel=0.006)
    assert len(times.buckets) < 500
