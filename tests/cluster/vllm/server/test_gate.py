"""Commands that the quarantine holds back reach the cluster when a fact clears the way."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.base import Recorded
from taichi_serve.cluster.vllm.server.gate import Gate
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.messages import (
    Abort,
    Decline,
    Event,
    Finished,
    Flowed,
    Lost,
    Outcome,
    Prefill,
    Prefilled,
    Stepped,
)

P = Prefill("p", 1, "i1", hand_over=False)


def step(instance: str, *missed: str) -> Stepped:
    return Stepped(2.0, instance, 0.01, 0, 1, 16, missed=missed)


async def sent(facts: Iterable[Event]) -> list[object]:
    """What reaches the cluster when `a` decoded where an instance died, and `p`'s prompt was in its step."""
    cluster, quarantine = Recorded(facts), Quarantine()
    quarantine.lost("e0", ["a"], ["p"])
    gate = Gate(cluster, quarantine)
    gate.send(P)
    seen = [event async for event in gate.events()]
    assert seen == cluster.history
    return list(cluster.sent)


A = Flowed(1.0, "a", 1, "i1", 21, 0, 0.5)


async def test_a_prompt_goes_on_when_the_decodes_have_made_two_tokens() -> None:
    assert await sent([A]) == []
    assert await sent([A, step("i1")]) == [P]


async def test_a_step_elsewhere_or_one_that_missed_it_clears_nobody() -> None:
    assert await sent([A, step("i2"), step("i1", "a")]) == []


async def test_who_ends_is_in_nobodys_way() -> None:
    assert await sent([Finished(1.0, "a", 21)]) == [P]


async def test_a_step_of_an_instance_that_was_lost_meanwhile_clears_nobody() -> None:
    assert await sent([A, Lost(1.5, "i1", "killed"), step("i1")]) == []


async def test_facts_about_others_pass() -> None:
    assert await sent([Prefilled(1.0, "z", 0, "i1"), step("i1")]) == []


def test_who_is_turned_away_is_told_so_and_then_ended() -> None:
    cluster, told = Recorded([]), []
    gate = Gate(cluster, Quarantine(), lambda decline: told.append((decline.request, list(cluster.sent))))
    gate.send(Decline("a", 3.0, "full"))
    assert told == [("a", [])]
    assert cluster.sent == [Abort("a", Outcome.REFUSED, "full")]
