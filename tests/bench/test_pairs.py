"""Differences and ratios with their intervals, on outcomes made by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from contests import play

from taichi_serve.bench.pairs import (
    Decided,
    Ratio,
    blocks_of,
    difference,
    hanging_together,
    outcomes,
    pairs,
    quantile,
    ratio_of,
)
from taichi_serve.bench.score import Run, Sample


def test_a_difference_counts_only_requests_that_were_good_for_one_of_the_two() -> None:
    found = difference(5.0, [[1] * 6 + [-1] * 2 + [0] * 92])
    assert (found.requests, found.only_first, found.only_second, found.share) == (100, 6, 2, 0.04)
    # By hand: p = 7/102, q = 3/102, so 0.0392 +- t * sqrt((0.0980 - 0.0015) / 102) at least.
    assert found.low <= 0.0392 - 1.96 * math.sqrt((10 / 102 - (4 / 102) ** 2) / 102)
    assert found.low < 0 < found.high


def test_scattered_wins_of_one_side_only_are_a_difference_and_none_at_all_is_an_interval_around_zero() -> (
    None
):
    scattered = [1 if number % 10 == 0 else 0 for number in range(200)]
    assert difference(5.0, [scattered]).low > 0.03
    nothing = difference(5.0, [[0] * 200])
    assert (nothing.share, nothing.low) == (0.0, -nothing.high)
    assert 0 < nothing.high < 0.02


def test_requests_that_go_wrong_together_say_less_than_as_many_that_go_wrong_apart() -> None:
    apart = difference(5.0, [[1 if number % 10 == 0 else 0 for number in range(200)]])
    together = difference(5.0, [[1] * 20 + [0] * 180])
    assert apart.share == together.share == 0.1
    assert together.high - together.low > 3 * (apart.high - apart.low)
    assert together.low < 0


def test_blocks_are_of_twenty_and_the_last_one_takes_the_rest() -> None:
    assert [len(block) for block in blocks_of([0] * 67)] == [20, 20, 27]
    assert [len(block) for block in blocks_of([0] * 7)] == [7]
    assert hanging_together([[1, 0, 0]]) == (1.0, 3)


def test_students_quantile_is_near_the_one_of_the_tables() -> None:
    for freedom, table in ((4, 2.776), (9, 2.262), (29, 2.045), (999, 1.962)):
        assert quantile(freedom) == pytest.approx(table, rel=0.02)


def test_the_interval_of_a_difference_holds_the_truth_in_about_95_of_100_contests() -> None:
    """Requests hang together: whether one side loses a request persists over five of them on average."""
    chance, held = random.Random(1), 0
    for _ in range(300):
        series, state = [], 0
        for _ in range(400):
            if chance.random() < 0.2:
                state = chance.choices((1, -1, 0), (0.08, 0.04, 0.88))[0]
            series.append(state)
        found = difference(5.0, [series[:200], series[200:]])
        held += found.low <= 0.04 <= found.high
    assert 0.92 <= held / 300 <= 0.99


def shares(low: float, high: float, seeds: int = 2, requests: int = 200) -> Decided:
    """Outcomes with these attainments at the rates 10 and 11, bad ones scattered evenly."""

    def one(share: float) -> tuple[bool, ...]:
        return tuple(
            math.floor((n + 1) * (1 - share) + 1e-9) == math.floor(n * (1 - share) + 1e-9)
            for n in range(requests)
        )

    return Decided(10.0, 11.0, {s: one(low) for s in range(seeds)}, {s: one(high) for s in range(seeds)})


@pytest.mark.parametrize(
    ("low", "high", "target", "goodput"),
    [
        (0.95, 0.85, 0.9, math.sqrt(110)),
        (0.90, 0.80, 0.9, 10.0),
        (0.95, 0.85, 0.5, 11.0 * 1.1),  # at most a rung outside
        (0.95, 0.95, 0.9, 11.0 * 1.1),  # not seen to fall
        (0.85, 0.85, 0.9, 10.0 / 1.1),
    ],
)
def test_a_goodput_lies_where_the_line_between_two_rates_crosses_the_target(
    low: float, high: float, target: float, goodput: float
) -> None:
    found = shares(low, high).goodput(np.array([low]), np.array([high]), target)
    assert found == pytest.approx(goodput)


def test_a_contender_is_level_with_itself_whatever_blocks_are_drawn() -> None:
    found = ratio_of(shares(0.95, 0.8), shares(0.95, 0.8), 0.9)
    assert (found.value, found.low, found.high, found.verdict) == (1.0, 1.0, 1.0, "no difference seen")


def test_with_few_blocks_it_is_single_requests_that_say_how_far_a_ratio_may_be_off() -> None:
    """40 requests, two blocks, in which by chance as many are good: blocks alone would know it exactly."""
    high = tuple(number % 2 == 0 for number in range(40))
    ours = Decided(10.0, 11.0, {0: (True,) * 40}, {0: high})
    theirs = Decided(10.0, 11.0, {0: (True,) * 40}, {0: tuple(not one for one in high)})
    found = ratio_of(ours, theirs, 0.9)
    assert found.value == pytest.approx(1.0)
    assert found.low < 0.995
    assert found.high > 1.005


def test_what_is_a_grid_step_apart_is_told_apart() -> None:
    ours, theirs = shares(0.95, 0.85), shares(0.95, 0.85)
    further = Decided(13.31, 14.641, ours.at_low, ours.at_high)
    found = ratio_of(further, theirs, 0.9)
    assert found.value == pytest.approx(1.331)
    assert (found.low > 1.3, found.verdict) == (True, "ahead")
    assert ratio_of(theirs, further, 0.9).verdict == "behind"


def test_seeds_that_disagree_make_the_interval_of_a_ratio_wide() -> None:
    """The second seed had a bad round at the higher rate for the one, and the first seed for the other."""
    good, bad = shares(0.95, 0.89), shares(0.95, 0.75)
    ours = Decided(10.0, 11.0, good.at_low, {0: good.at_high[0], 1: bad.at_high[1]})
    theirs = Decided(10.0, 11.0, good.at_low, {0: bad.at_high[0], 1: good.at_high[1]})
    found = ratio_of(ours, theirs, 0.9)
    assert found.value == pytest.approx(1.0)
    assert found.low < 0.97
    assert found.high > 1.03


def test_nothing_is_said_of_a_pair_for_which_the_machine_was_not_the_same() -> None:
    assert Ratio(1.3, 1.2, 1.4, drift=0.06).verdict == "open: the machine's speed differed by 6%"
    assert Ratio(1.3, 1.2, 1.4, drift=0.04).verdict == "ahead"


def test_whatever_is_not_among_the_good_samples_of_a_whole_run_was_bad() -> None:
    def sample(number: int, good: bool) -> Sample:
        return Sample(0, number, 20, 11, 0.1, 0.01, good, None)

    run = Run(2.0, 4, 4, 2, 2, False, 1.0, 0.0, (sample(5, True), sample(7, True), sample(6, False)))
    assert outcomes(run, warm_up=5) == (True, False, True, False)


def test_every_two_contenders_are_a_pair_and_far_ones_have_no_rate_in_common() -> None:
    contest = play({"A": 2.4, "B": 2.6, "C": 8.2})
    found = {(pair.first, pair.second): pair for pair in pairs(contest)}
    assert list(found) == [("A", "B"), ("A", "C"), ("B", "C")]
    near = found["A", "B"]
    assert [round(one.rate / 1.1**9, 2) for one in near.differences] == [1.0, 1.1, 1.21]
    # At the middle rate 70 % are good for A and 95 % for B; 25 of 100 requests for each of two seeds.
    middle = near.differences[1]
    assert (middle.requests, middle.only_first, middle.only_second) == (200, 0, 50)
    assert middle.high < 0
    assert near.ratio is not None
    assert near.ratio.value == pytest.approx(1 / 1.1)
    assert found["A", "C"].ratio is not None
    assert found["A", "C"].ratio.verdict == "behind"


def test_there_is_no_ratio_with_a_goodput_that_is_only_a_bound() -> None:
    (pair,) = pairs(play({"A": 0.0, "B": 2.4}))
    assert (pair.ratio, pair.differences) == (None, ())


def test_a_rate_that_both_saw_whole_with_some_seeds_only_is_no_common_rate() -> None:
    contest = play({"A": 2.4, "B": 2.6})
    last = max(number for number, done in enumerate(contest.rounds) if done.rung == 11)
    del contest.rounds[last]
    (pair,) = pairs(contest)
    assert [round(one.rate / 1.1**9, 2) for one in pair.differences] == [1.0, 1.1]
