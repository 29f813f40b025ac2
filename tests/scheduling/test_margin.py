"""How much of the TTFT SLO is left where a prompt is placed, by hand-made numbers: a token takes 1 ms."""

from __future__ import annotations

import math

import pytest
from even import Even

from taichi_serve.messages import Arrived, Command, Prefill, Prefilled
from taichi_serve.scheduling.margin import LATE, LEAST, MOST, STEP, Margin
from taichi_serve.scheduling.policy import DEMOTE, REFUSE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


def test_nothing_moves_while_all_are_in_time() -> None:
    margin = Margin()
    for _ in range(100):
        margin.through(late=False)
    assert margin.share == LEAST


def test_it_grows_with_each_that_is_late_up_to_a_bound() -> None:
    margin = Margin()
    margin.through(late=True)
    assert margin.share == pytest.approx(LEAST + STEP)
    for _ in range(1_000):
        margin.through(late=True)
    assert margin.share == MOST


def test_one_that_is_late_is_made_up_for_by_as_many_as_may_be_in_time_beside_it() -> None:
    margin = Margin()
    margin.through(late=True)
    for _ in range(math.ceil(1 / LATE)):
        margin.through(late=False)
    assert margin.share == pytest.approx(LEAST)


def one(margin: float) -> tuple[GlobalScheduler, Command]:
    """Where so much is left: what becomes of a prompt that is predicted at 3.7 s of 4 s."""
    policy = Policy(overload=DEMOTE, leftover=0.25)
    s = GlobalScheduler(Sliders(0, 1, 0, 100), SLO(4.0, 0.1), Even(), policy, {"i0": 1_000_000})
    s._dispatcher.triage.margin.share = margin
    s.on(Arrived(0.0, "a", 300, 100))
    (command,) = s.on(Arrived(0.0, "b", 3400, 100))
    return s, command


@pytest.mark.parametrize(("margin", "best_effort"), [(0.05, False), (0.1, True)])
def test_who_is_predicted_within_the_margin_is_not_in_time(margin: float, best_effort: bool) -> None:
    _, placed = one(margin)
    assert isinstance(placed, Prefill)
    assert placed.best_effort is best_effort


@pytest.mark.parametrize(("at", "grown"), [(3.9, 0.0), (4.1, STEP)])
def test_a_first_token_after_the_deadline_is_late(at: float, grown: float) -> None:
    s, _ = one(LEAST)
    s.on(Prefilled(0.3, "a", 0, "i0"))
    s.on(Prefilled(at, "b", 0, "i0"))
    assert s._dispatcher.triage.margin.share == pytest.approx(LEAST + grown)


def test_who_was_not_accepted_as_in_time_says_nothing() -> None:
    s, _ = one(0.1)
    s.on(Prefilled(0.3, "a", 0, "i0"))
    before = s._dispatcher.triage.margin.share
    s.on(Prefilled(9.0, "b", 0, "i0"))
    assert s._dispatcher.triage.margin.share == before


def test_the_margin_shrinks_again_where_every_prompt_is_within_it() -> None:
    s = GlobalScheduler(
        Sliders(0, 1, 0, 100), SLO(4.0, 0.1), Even(), Policy(overload=REFUSE), {"i0": 1_000_000}
    )
    s._dispatcher.triage.margin.share = MOST
    (placed,) = s.on(Arrived(0.0, "a", 3600, 100))  # alone, 0.9 of its SLO
    assert isinstance(placed, Prefill)
    s.on(Prefilled(3.6, "a", 0, "i0"))
    assert s._dispatcher.triage.margin.share < MOST
