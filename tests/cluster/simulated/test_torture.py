"""A hundred and fifty bad days, and some that once went wrong. For more run simulated_torture.py."""

from __future__ import annotations

import pytest
from simulated_torture import Tally, day, live

from taichi_serve.stage import Stage

# Rows of the table that only the real cluster takes. Here a decision follows its fact at once, so nobody is
# lost or leaves while HELD; a leg is told to leave after its first token; and a loss goes by way of WAITING.
ELSEWHERE = {
    "held -> over",
    "held -> prefilling",
    "held -> waiting",
    "leaving -> held",
    "decoding -> prefilling",
}


def test_150_bad_days_go_well_and_take_every_row_of_the_table_of_stages() -> None:
    tally = Tally()
    bad = {seed: wrong for seed in range(150) if (wrong := live(seed, tally))}
    assert bad == {}
    assert set(tally.unseen()) <= ELSEWHERE
    assert tally.stages[Stage.WAITING, Stage.OVER] > 0


def test_100_bad_days_of_conversations_go_well() -> None:
    tally = Tally()
    bad = {seed: wrong for seed in range(100) if (wrong := live(seed, tally, prefixes=True))}
    assert bad == {}
    assert tally.facts["Cached"] > 1_000
    assert tally.cached > 100_000
    assert tally.fetched > 5_000


@pytest.mark.parametrize(
    "seed",
    [
        72,  # the scheduler counted a token that was in flight
        78,  # a pull began that was over
        247,  # a job was preempted, forgotten, and planned all the same
        960,  # told to flow with its last token in flight, and its source was lost: it waited for ever
        9360,  # blocks that nobody gave back
        10219,  # a move brought fewer tokens than there were
    ],
)
def test_days_that_once_were_bad_go_well(seed: int) -> None:
    assert live(seed, final=True) is None


def test_the_same_seed_is_the_same_day() -> None:
    assert day(5) == day(5)
    tallies = [Tally(), Tally()]
    for tally in tallies:
        live(5, tally)
    assert tallies[0] == tallies[1]
