"""Rehearsals in a process of their own: an answer comes back, a failure is counted, and nothing is left."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import psutil

from taichi_serve.cluster.simulated import Call
from taichi_serve.frontend.adviser import Rehearsing
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Transfer
from taichi_serve.scheduling.policy import Policy
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.proposal import Proposal, Question
from taichi_serve.tuning.rehearsal import Limits, Past, Plant
from taichi_serve.tuning.setting import Setting

LINKS = tuple(Transfer(a, b, 0.005, 1e10) for a in Kind for b in Kind)
PLANT = Plant(
    Roofline(launch=0.01, token=1e-4), (), 1.0, 1.0, 1.0, Limits(100_000, 64, 8192, 2048, 16, 1000), LINKS
)
PAST = Past(tuple(Call(n * 1.0, 100, 5) for n in range(20)), 20.0)
# One instance alone, and an SLO that nothing meets: every rehearsal is short.
NOW = Setting(Sliders(0, 1, 0, 256), 0.5, 0.8)
QUESTION = Question(PLANT, PAST, SLO(1e-4, 1e-4), Policy(), NOW, 0.2)


async def answered(adviser: Rehearsing) -> Proposal | None:
    """Wait for the process to be over."""
    assert adviser._task is not None
    await asyncio.wait([adviser._task])
    return adviser.answer(0.0)


def below() -> list[psutil.Process]:
    """Rehearsals that run below this process."""
    return [p for p in psutil.Process().children() if "adviser" in " ".join(p.cmdline())]


async def test_an_answer_comes_back_once_with_the_time_that_it_took() -> None:
    adviser = Rehearsing(Trouble())
    adviser.ask(0.0, QUESTION)
    assert adviser.answer(0.0) is None
    found = await answered(adviser)
    assert found is not None
    assert (found.setting, found.gain) == (NOW, 0.0)
    assert adviser.seconds == adviser.took > 0
    assert adviser.answer(0.0) is None
    assert below() == []


async def test_a_question_that_cannot_be_answered_is_counted_and_another_can_be_asked() -> None:
    said: list[str] = []
    trouble = Trouble(said.append)
    adviser = Rehearsing(trouble)
    adviser.ask(0.0, replace(QUESTION, plant=replace(PLANT, model=None)))  # no steps to fit one to
    assert await answered(adviser) is None
    assert trouble.counts["autotune"] == 1
    assert "rehearsals ended with status 1" in said[0]
    adviser.ask(0.0, QUESTION)
    assert await answered(adviser) is not None


async def test_another_question_ends_the_one_before_and_closing_ends_all() -> None:
    adviser = Rehearsing(Trouble())
    adviser.ask(0.0, QUESTION)
    first = adviser._task
    assert first is not None
    while not below():  # noqa: ASYNC110  # nobody says when it runs
        await asyncio.sleep(0)
    adviser.ask(0.0, QUESTION)
    second = adviser._task
    assert second is not None
    await asyncio.wait([first])
    assert first.cancelled()
    adviser.close()
    await asyncio.wait([second])
    assert second.cancelled()
    assert below() == []
