"""Goodput from shares of good requests, and its interval: figures by hand."""

import math

import pytest

from taichi_serve.search.curve import Curve, jackknife, lead, spread
from taichi_serve.search.interval import T, interval, student


def test_an_interval_is_students_t_times_the_standard_error_of_the_mean():
    # Mean 10, standard deviation 2, of four: 3.182 * 2 / 2.
    found = interval([8.0, 12.0, 10.0 - math.sqrt(2), 10.0 + math.sqrt(2)])
    assert (found.mean, found.half, found.seeds) == (pytest.approx(10.0), pytest.approx(3.182), 4)
    assert (found.low, found.high) == (pytest.approx(6.818), pytest.approx(13.182))


def test_one_seed_has_no_interval_and_none_no_mean():
    assert math.isnan(interval([3.0]).half)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (30, 2.042), (40, 2.021), (120, 1.980)])
def test_quantiles_are_those_of_the_table(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=0.001)
    assert list(T) == sorted(T, reverse=True)


def test_goodput_is_where_the_share_of_all_seeds_together_falls_through_the_target():
    # At 10 requests/s 95 % of both seeds together are good, at 11 85 %: 90 % in the middle.
    curve = Curve((9.0, 10.0, 11.0), ((1.0, 1.0), (1.0, 0.9), (0.9, 0.8)))
    assert curve.goodput() == pytest.approx(10.5)
    assert curve.goodput(without=0) == pytest.approx(10.0)
    assert curve.goodput(without=1) == pytest.approx(11.0)


def test_a_seed_that_falls_far_counts_with_all_its_bad_requests():
    # The mean of what each seed holds is 11; together they are not 90 % good beyond 10.
    curve = Curve((10.0, 10.5, 12.0), ((1.0, 0.9), (1.0, 0.5), (0.9, 0.1)))
    assert 10.0 < curve.goodput() < 10.3


def test_a_share_that_never_falls_gives_the_last_rate_and_one_that_is_too_low_at_once_nothing():
    assert Curve((1.0, 2.0), ((1.0,), (0.95,))).goodput() == 2.0
    assert Curve((1.0, 2.0), ((0.8,), (0.7,))).goodput() == 0.0


def test_the_jackknife_of_a_mean_is_its_ordinary_interval():
    values = [8.0, 9.0, 12.0, 13.0, 14.0]

    def mean(without):
        kept = [value for number, value in enumerate(values) if number != without]
        return sum(kept) / len(kept)

    found, plain = jackknife(mean, 5), interval(values)
    assert (found.mean, found.half) == (pytest.approx(plain.mean), pytest.approx(plain.half))
    assert math.isnan(jackknife(mean, 1).half)


def straight(*goodputs, slope=0.2):
    """Shares that fall by `slope` for each request/s, through 90 % at the goodput of each seed."""
    rates = (8.0, 9.0, 10.0, 11.0, 12.0)
    return Curve(rates, tuple(tuple(0.9 - slope * (rate - at) for at in goodputs) for rate in rates))


def test_an_interval_of_goodput_is_that_of_the_mean_where_shares_fall_on_straight_lines():
    found, plain = spread(straight(9.5, 10.0, 10.1, 10.6)), interval([9.5, 10.0, 10.1, 10.6])
    assert (found.mean, found.half) == (pytest.approx(plain.mean), pytest.approx(plain.half))


def test_the_luck_of_a_seed_is_not_in_a_lead():
    theirs = straight(9.0, 10.0, 11.0)
    ours = Curve(tuple(1.1 * rate for rate in theirs.rates), theirs.shares)  # a tenth more throughout
    found = lead(ours, theirs)
    assert found is not None
    assert (found.mean, found.half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
    assert spread(theirs).half > 1


def test_there_is_no_lead_over_nothing():
    nothing = Curve((1.0, 2.0), ((0.0, 0.0), (0.0, 0.0)))
    assert lead(straight(9.0, 10.0), nothing) is None


def test_a_verdict_is_certain_if_no_single_seed_can_turn_it():
    curve = Curve((1.0, 2.0, 3.0), ((1.0, 0.95, 0.95), (1.0, 1.0, 0.75), (0.5, 0.6, 0.5)))
    assert curve.certain(0, kept=True)
    assert not curve.certain(1, kept=True)
    assert not curve.certain(1, kept=False)
    assert curve.certain(2, kept=False)
