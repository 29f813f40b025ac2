"""The order of prompts on an engine in miniature: steps take a second and 100 prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.latency.curve import StepCurve
from taichi_serve.messages import (
    Arrived,
    Command,
    Decline,
    Demote,
    Event,
    Finished,
    Outcome,
    Prefill,
    Prefilled,
    Stepped,
)
from taichi_serve.sliders import Sliders

SECOND = StepCurve(((0, 1.0), (1000, 1.0)), 0.0, 0.0, 0.0)
Answers = dict[str, list[Command]]  # to the arrival of a request


@dataclass
class Script:
    """A scheduler that answers arrivals with what is written down."""

    answers: Answers
    log: list[Event] = field(default_factory=list)

    def on(self, event: Event) -> Sequence[Command]:
        self.log.append(event)
        return self.answers[event.request] if isinstance(event, Arrived) else []


def cluster(calls: list[Call], kv: int = 1600) -> SimulatedCluster:
    return SimulatedCluster(
        Sliders(0, 1, 0, 100), [SECOND], EngineShape(kv), Link(1.0, 1000.0, 0.5), calls, (), kv
    )


def played(answers: Answers, made: SimulatedCluster) -> list[Event]:
    script = Script(answers)
    run(script, made)
    return script.log


def firsts(log: list[Event]) -> list[str]:
    return [event.request for event in log if isinstance(event, Prefilled)]


def placed(name: str, by: float) -> Answers:
    return {name: [Prefill(name, 0, "i0", by=by)]}


CALLS = [Call(0.0, 250, 2), Call(0.1, 100, 2), Call(0.2, 100, 2), Call(0.3, 100, 2)]


def test_prompts_are_computed_in_the_order_they_were_given() -> None:
    answers = placed("r0", 1.0) | placed("r1", 9.0) | placed("r2", 5.0) | placed("r3", 7.0)
    assert firsts(played(answers, cluster(CALLS))) == ["r0", "r2", "r3", "r1"]


def test_equal_ones_are_computed_in_order_of_arrival() -> None:
    answers = placed("r0", 3.0) | placed("r1", 3.0) | placed("r2", 3.0) | placed("r3", 3.0)
    assert firsts(played(answers, cluster(CALLS))) == ["r0", "r1", "r2", "r3"]


def test_a_prompt_that_is_put_off_lets_the_others_go_first() -> None:
    answers = placed("r0", 1.0) | placed("r1", 1.0) | placed("r2", 1.0)
    answers["r3"] = [Prefill("r3", 0, "i0", by=1.0), Demote("r1", 0, 8.0)]
    assert firsts(played(answers, cluster(CALLS))) == ["r0", "r2", "r3", "r1"]


def test_a_prompt_that_has_begun_is_not_put_off() -> None:
    answers = placed("r0", 1.0) | placed("r1", 1.0) | placed("r2", 1.0)
    answers["r3"] = [Prefill("r3", 0, "i0", by=1.0), Demote("r0", 0, 8.0)]
    assert firsts(played(answers, cluster(CALLS))) == ["r0", "r1", "r2", "r3"]


def test_who_is_turned_away_takes_no_room_and_ends_as_refused() -> None:
    made = cluster([Call(0.0, 50, 2)])
    log = played({"r0": [Decline("r0", 3.0, "full")]}, made)
    assert log[-1] == Finished(0.0, "r0", 0, Outcome.REFUSED)
    assert made.engines["i0"].residents.free == 100
    assert not made.jobs


def test_best_effort_is_preempted_before_a_younger_request() -> None:
    # Room for 4 blocks: the two prompts fill it, and the one that is best effort yields though it is older.
    answers: Answers = {
        "r0": [Prefill("r0", 0, "i0", best_effort=True)],
        "r1": [Prefill("r1", 0, "i0")],
    }
    log = played(answers, cluster([Call(0.0, 30, 10), Call(0.0, 30, 10)], kv=64))
    assert [event.request for event in log if isinstance(event, Finished)] == ["r1", "r0"]


# ---------------------------------------------------------------- room for 4 blocks: 64 tokens, and no more

TWO = [Call(0.0, 30, 10), Call(0.0, 30, 10)]  # at the third token of the first both have all 4 blocks


def ends(log: list[Event]) -> list[str]:
    return [event.request for event in log if isinstance(event, Finished)]


def preempted(log: list[Event]) -> set[str]:
    return {name for event in log if isinstance(event, Stepped) for name in event.missed}


@pytest.mark.parametrize(
    ("bound", "best_effort", "yields"),
    [
        ("", "", "r1"),  # the younger one
        ("r1", "", "r0"),
        ("r0", "", "r1"),
        ("r0 r1", "", "r1"),
        ("r0", "r0", "r0"),
        ("r1", "r0 r1", "r0"),
    ],
)
def test_best_effort_is_preempted_first_and_of_equals_one_that_is_not_bound(
    bound: str, best_effort: str, yields: str
) -> None:
    calls = [replace(call, movable=f"r{n}" not in bound) for n, call in enumerate(TWO)]
    answers: Answers = {
        name: [Prefill(name, 0, "i0", best_effort=name in best_effort)] for name in ("r0", "r1")
    }
    log = played(answers, cluster(calls, kv=64))
    assert preempted(log) == {yields}
    assert ends(log)[-1] == yields


@pytest.mark.parametrize(("by", "order"), [(50.0, ["r1", "r2", "r0"]), (5.0, ["r1", "r0", "r2"])])
def test_preempted_best_effort_waits_in_its_place(by: float, order: list[str]) -> None:
    # r0 yields to r1, and both it and the newcomer r2 need 3 blocks: they are served one after the other.
    answers: Answers = placed("r1", 1.0) | placed("r2", 9.0)
    answers["r0"] = [Prefill("r0", 0, "i0", by=by, best_effort=True)]
    log = played(answers, cluster([*TWO, Call(2.5, 40, 2)], kv=64))
    assert preempted(log) == {"r0"}
    assert ends(log) == order


def test_anybody_else_who_is_preempted_waits_before_all() -> None:
    answers = placed("r0", 1.0) | placed("r1", 1.0) | placed("r2", 0.5)
    log = played(answers, cluster([*TWO, Call(2.5, 40, 2)], kv=64))
    assert preempted(log) == {"r1"}
    assert ends(log) == ["r0", "r1", "r2"]


def test_who_is_put_off_while_it_runs_is_preempted_first_and_waits_in_its_new_place() -> None:
    answers = placed("r0", 1.0) | placed("r1", 1.0)
    answers["r2"] = [Prefill("r2", 0, "i0", by=9.0), Demote("r0", 0, 50.0)]
    log = played(answers, cluster([*TWO, Call(1.5, 40, 2)], kv=64))
    assert preempted(log) == {"r0"}
    assert ends(log) == ["r1", "r2", "r0"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_good_request_is_preempted_beside_best_effort_nor_a_bound_one_beside_its_like(seed: int) -> None:
    chance = Random(seed)
    calls = [
        Call(0.4 * n, chance.randint(1, 60), chance.randint(1, 40), movable=chance.random() < 0.5)
        for n in range(12)
    ]
    answers: Answers = {
        f"r{n}": [Prefill(f"r{n}", 0, "i0", by=chance.uniform(1, 60), best_effort=chance.random() < 0.4)]
        for n in range(12)
    }
    made = cluster(calls, kv=160)
    engine = made.engines["i0"]
    preempt = engine._preempt

    def watched() -> None:
        before = list(engine.running)
        preempt()
        (gone,) = set(before) - set(engine.running)
        like = [job for job in before if job.best_effort >= gone.best_effort]
        assert all(job.best_effort == gone.best_effort for job in like)
        if gone.bound and gone.made:
            assert all(job.bound and job.made for job in like)

    engine._preempt = watched  # type: ignore[method-assign]
    log = played(answers, made)
    made_tokens = {event.request: event.output_tokens for event in log if isinstance(event, Finished)}
    assert made_tokens == {f"r{n}": call.output_tokens for n, call in enumerate(calls)}
    assert engine.residents.free == 10
