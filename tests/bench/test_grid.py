"""Rates of one grid, and the climb of one contender on it."""

from __future__ import annotations

import pytest

from taichi_serve.bench.grid import Climb, Grid

TENTHS = Grid(start=4.0, tolerance=0.1)


def climbed(cliff: int, grid: Grid = TENTHS) -> tuple[list[int], Climb]:
    """What a contender is asked that keeps every rung up to `cliff`."""
    asked: list[int] = []
    climb = Climb(grid, {})
    while (rung := climb.next) is not None:
        asked.append(rung)
        climb = Climb(grid, {**climb.kept, rung: rung <= cliff})
    return asked, climb


def test_a_rung_is_the_tolerance_above_the_one_below() -> None:
    assert [round(TENTHS.rate(rung), 3) for rung in (-1, 0, 1, 7)] == [3.636, 4.0, 4.4, 7.795]
    assert TENTHS.rungs(2.0) == 7
    assert Grid(1.0, 4.0).rungs(2.0) == 1


def test_a_climb_doubles_and_then_halves_what_is_open_to_one_rung() -> None:
    asked, climb = climbed(9)
    assert asked == [0, 7, 14, 10, 8, 9]
    assert (climb.low, climb.high, climb.deciding) == (9, 10, (9, 10))


def test_below_the_first_rate_it_goes_down_in_the_same_steps() -> None:
    asked, climb = climbed(-9)
    assert asked == [0, -7, -14, -11, -9, -8]
    assert climb.deciding == (-9, -8)


def test_it_ends_where_its_reach_ends() -> None:
    assert TENTHS.reach == 44
    asked, climb = climbed(1000)
    assert (asked[-1], climb.low, climb.high, climb.deciding) == (44, 44, None, (44,))
    asked, climb = climbed(-1000)
    assert (asked[-1], climb.low, climb.deciding) == (-44, None, ())


def test_only_rungs_between_what_was_kept_and_what_was_missed_tell_something() -> None:
    climb = Climb(TENTHS, {0: True, 7: False})
    assert [rung for rung in range(-1, 9) if climb.tells(rung)] == [1, 2, 3, 4, 5, 6]
    assert not Climb(TENTHS, {0: True, 1: False}).tells(5)
    assert Climb(TENTHS, {}).tells(-30)


def test_a_rung_missed_below_one_that_was_kept_says_nothing_about_those_above() -> None:
    climb = Climb(TENTHS, {0: True, 5: False, 6: True, 8: False})
    assert (climb.low, climb.high, climb.next) == (6, 8, 7)


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.25, 1.0, 3.0])
def test_any_cliff_within_reach_is_found(tolerance: float) -> None:
    grid = Grid(1.0, tolerance)
    for cliff in range(-grid.reach, grid.reach):
        assert climbed(cliff, grid)[1].deciding == (cliff, cliff + 1)


def test_the_first_steps_may_be_small_and_each_is_the_square_of_the_one_before():
    near = Grid(start=4.0, tolerance=0.05, step=1.2)
    # 1.05 ** 4 is 1.22, 1.05 ** 7 is 1.41, 1.05 ** 14 is 1.98
    assert Climb(near, {0: True}).next == 4
    assert Climb(near, {0: True, 4: True}).next == 4 + 7
    assert Climb(near, {0: True, 4: True, 11: True}).next == 11 + 14
    assert Climb(near, {0: False}).next == -4
    assert Climb(near, {0: True, 4: False}).next == 2


def test_a_first_step_of_two_is_two_every_time():
    assert [TENTHS.stride(tried) for tried in (0, 1, 2, 9)] == [TENTHS.rungs(2.0)] * 4
