"""The order of prompts on an engine in miniature: steps take a second and 100 prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
