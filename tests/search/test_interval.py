"""Intervals over seeds, with figures from a table of Student's t."""

import math

import pytest

from taichi_serve.search.interval import T, interval, lead, student


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


def test_a_lead_is_taken_seed_by_seed_so_the_luck_of_a_seed_is_not_in_it():
    theirs = [1.0, 2.0, 4.0]  # the seeds differ fourfold, the lead is 10 % at each
    found = lead([1.1, 2.2, 4.4], theirs)
    assert found is not None
    assert (found.mean, found.half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    assert interval(theirs).half > 1


def test_there_is_no_lead_over_nothing():
    assert lead([1.0, 1.0], [0.0, 1.0]) is None
