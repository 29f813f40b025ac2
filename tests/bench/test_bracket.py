"""Bisection on servers whose cliff is known."""

import math

import pytest

from taichi_serve.bench.bracket import Bracket


def searched(cliff, bracket):
    """The rates tried on a server that keeps its target up to `cliff`, and what is known at the end."""
    tried = []
    while (rate := bracket.next()) is not None:
        tried.append(rate)
        bracket = bracket.after(rate, rate <= cliff)
    return tried, bracket


def test_it_doubles_until_it_misses_and_then_halves_the_gap_by_ratio():
    tried, bracket = searched(5.0, Bracket(1.0, tolerance=0.5))
    assert tried == [1.0, 2.0, 4.0, 8.0, pytest.approx(math.sqrt(32))]
    assert (bracket.low, bracket.high) == (4.0, pytest.approx(math.sqrt(32)))  # 4 and 5.66: within 50 %


def test_it_halves_from_a_start_that_is_too_high():
    tried, bracket = searched(0.3, Bracket(2.0, tolerance=1.0))
    assert tried == [2.0, 1.0, 0.5, 0.25]
    assert bracket.low == 0.25


@pytest.mark.parametrize("cliff", [0.11, 1.0, 3.7, 50.0])
def test_the_cliff_is_found_to_the_tolerance(cliff):
    _, bracket = searched(cliff, Bracket(1.0, tolerance=0.02))
    assert bracket.low <= cliff < bracket.high <= bracket.low * 1.02


def test_a_server_that_keeps_nothing_is_given_up_at_a_64th_of_the_start():
    tried, bracket = searched(0.0, Bracket(1.0))
    assert tried == [1 / 2**n for n in range(7)]
    assert bracket.low == 0.0


def test_a_server_that_keeps_everything_is_given_up_at_64_times_the_start():
    tried, bracket = searched(math.inf, Bracket(1.0))
    assert tried == [2.0**n for n in range(7)]
    assert bracket.low == 64.0


@pytest.mark.parametrize("start", [0.0, -1.0, math.inf, math.nan])
def test_a_start_that_is_no_rate_is_refused(start):
    with pytest.raises(ValueError, match="start must be a positive number"):
        Bracket(start)
