"""Silent instances and newcomers meet when both answer, and work goes to nobody who is silent by then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from house import House, until

from taichi_serve.cluster.vllm.server.engine import Engine

OLD, NEW = "i0", "i1.2"  # one that is silent, and one that comes meanwhile
BOTH = {(OLD, NEW), (NEW, OLD)}


@pytest.fixture
async def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
async def late(house: House) -> House:
    """`OLD` was silent when `NEW` came."""
    house.keeper.silence(house.cluster.engines[0], 6)
    house.keeper.exited(house.cluster.engines[1], -9)
    await house.joined()
    assert set(house.cluster.met) == {(NEW, NEW)}
    return house


def asked(engine: Engine) -> list[asyncio.Future[Any]]:
    """The questions to it that are not answered yet."""
    client: Any = engine.client
    return [question for question in client.asked if not question.done()]


async def probe(engine: Engine, wrong: Exception | None = None) -> None:
    """Wait until it is asked, and have it answer or fail."""
    await until(lambda: bool(asked(engine)))
    (question,) = asked(engine)
    if wrong is None:
        question.set_result(None)
    else:
        question.set_exception(wrong)


def works(house: House, name: str = OLD) -> bool:
    """Whether it was said that it answers."""
    return ("silence", name, False) in house.cluster.told


async def turns() -> None:
    """Let everybody do what they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def met(late: House) -> Engine:
    """The silent one, which answered, was met, and is asked once more."""
    engine = late.cluster.engines[0]
    late.keeper.answered(engine)
    await probe(engine)
    await until(lambda: set(late.cluster.met) >= BOTH)
    await until(lambda: bool(asked(engine)))
    return engine


async def test_a_silent_one_is_met_when_it_answers_and_works_when_it_has_answered_after_that(
    late: House,
) -> None:
    engine = await met(late)
    await turns()
    assert not works(late)
    await probe(engine)
    await until(lambda: works(late))
    assert not late.keeper.silent


async def test_one_that_is_silent_again_when_it_was_met_gets_no_work_until_it_answers_once_more(
    late: House,
) -> None:
    engine = await met(late)
    late.keeper.silence(engine, 6)
    for question in asked(engine):  # too late
        question.set_result(None)
    await turns()
    assert not works(late)
    assert late.keeper.silent == {engine}
    late.keeper.answered(engine)  # it owes nothing any more, and has just answered
    assert works(late)


async def test_one_that_falls_silent_while_it_is_met_owes_the_meetings_and_nobody_waits_for_them(
    late: House,
) -> None:
    engine = late.cluster.engines[0]
    late.cluster.hangs = lambda at, to: True
    late.keeper.answered(engine)
    await probe(engine)
    await until(lambda: set(late.cluster.met) >= BOTH)
    late.keeper.silence(engine, 6)
    await turns()
    assert sum(word[0] == "abandon" for word in late.cluster.told) == 2
    assert not late.keeper._meetings.one_by_one.locked()
    late.cluster.hangs = lambda at, to: False
    late.cluster.met.clear()
    late.keeper.answered(engine)
    await probe(engine)
    await until(lambda: set(late.cluster.met) >= BOTH)
    await probe(engine)
    await until(lambda: works(late))


async def test_one_that_fails_when_it_is_asked_is_asked_again(
    late: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.meetings.AGAIN", 0.0)
    engine = late.cluster.engines[0]
    late.keeper.answered(engine)
    await probe(engine, Exception("Call to taichi_here method failed: busy"))
    await turns()
    assert not works(late)
    for _ in range(2):
        await probe(engine)
    await until(lambda: works(late))


async def test_one_that_dies_while_it_is_met_is_started_again_and_waited_for_no_more(late: House) -> None:
    engine = late.cluster.engines[0]
    late.keeper.answered(engine)
    await until(lambda: bool(asked(engine)))
    late.cluster.joined.clear()
    late.keeper.exited(engine, -9)
    await late.joined()
    assert late.launcher.begun == ["i1.2", "i0.2"]
    assert not works(late)
    assert not late.keeper._meetings._unmet


async def test_one_that_answers_while_a_newcomer_is_met_is_met_before_that_one_joins(house: House) -> None:
    engine = house.cluster.engines[0]
    house.keeper.silence(engine, 6)
    rehearse = house.cluster.rehearse

    def meanwhile(request: Any, at: Any, to: Any) -> asyncio.Future[int]:
        if engine in house.keeper.silent:
            house.keeper.answered(engine)
        return rehearse(request, at, to)

    house.cluster.rehearse = meanwhile  # type: ignore[method-assign]
    house.keeper.exited(house.cluster.engines[1], -9)
    await house.joined()
    assert works(house)
    assert set(house.cluster.met) == {(NEW, NEW), *BOTH}
    assert house.cluster.met.count((NEW, NEW)) == 2, "it was rehearsed alone but once"
    assert not house.keeper._meetings._unmet


async def test_one_that_falls_silent_while_a_newcomer_waits_for_it_is_met_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.meetings.MEET_SECONDS", 1.0)
    engine = house.cluster.engines[0]

    def hangs(at: Engine, to: Engine | None) -> bool:
        if to is not None and engine not in house.keeper.silent:
            house.keeper.silence(engine, 6)
        return to is not None

    house.cluster.hangs = hangs
    house.keeper.exited(house.cluster.engines[1], -9)
    await house.joined()
    house.cluster.hangs = lambda at, to: False
    house.cluster.met.clear()
    house.keeper.answered(engine)
    await probe(engine)
    await until(lambda: set(house.cluster.met) == BOTH)


async def test_two_of_whom_one_is_silent_meet_when_that_one_answers_and_the_other_works_meanwhile(
    late: House,
) -> None:
    old, new = late.cluster.engines
    late.keeper.silence(new, 6)
    late.cluster.met.clear()
    late.keeper.answered(old)
    assert works(late)
    assert late.cluster.met == []
    late.keeper.answered(new)
    await probe(new)
    await until(lambda: set(late.cluster.met) == BOTH)
    await probe(new)
    await until(lambda: works(late, NEW))
