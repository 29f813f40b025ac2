"""Quiet instances are asked, silent ones are told of: a clock and answers by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from instances import instance

from taichi_serve.cluster.vllm.server.clock import Patience
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.watch import Watch


class Notes:
    """A keeper that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def silence(self, engine: Engine, seconds: float) -> None:
        self.told.append(("silent", engine.name))

    def answered(self, engine: Engine) -> None:
        self.told.append(("answers", engine.name))

    def cut(self, engine: Engine) -> None:
        self.told.append(("cut", engine.name))
        engine.alive = False

    def stalled(self, engine: Engine, seconds: float) -> None:
        self.told.append(("stalled", engine.name))
        engine.alive = False


class Watched:
    """Two instances that are watched, on a clock of the test's."""

    def __init__(self, directory: Path, stall: float = 20.0) -> None:
        self.outside = 0.0
        self.engines = [instance(directory, 0), instance(directory, 1)]
        self.patience = Patience(lambda: self.outside)
        self.notes = Notes()
        self.watch = Watch(lambda: self.engines, self.patience, stall, self.notes)
        self.watch.look()

    async def passes(self, seconds: float, *answering: int) -> None:
        """So many seconds, half a second at a time; these answer whatever they are asked."""
        for _ in range(round(seconds * 2)):
            self.outside += 0.5
            self.patience.tick()
            self.watch.look()
            await asyncio.sleep(0)
            for index in answering:
                self.answers(index)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def answers(self, index: int) -> None:
        client: Any = self.engines[index].client
        for question in client.asked:
            if not question.done():
                question.set_result([None])

    async def close(self) -> None:
        for engine in self.engines:
            engine.client.fail()
        await asyncio.sleep(0)


async def test_whoever_answers_is_left_in_peace(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    await watched.passes(300, 0, 1)
    assert watched.notes.told == []
    await watched.close()


async def test_a_connection_that_was_made_anew_is_told_once_at_the_next_look(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    contacts: Any = watched.engines[1].process.line.contacts
    contacts.again = True
    await watched.passes(2, 0)
    assert watched.notes.told == [("cut", "i1")]
    await watched.close()


async def test_an_idle_instance_that_hangs_is_known_within_ten_seconds_and_ended_after_the_stall_time(
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path)
    await watched.passes(8, 0)
    assert watched.notes.told == [("silent", "i1")]
    await watched.passes(11.5, 0)
    assert watched.notes.told == [("silent", "i1")]
    await watched.passes(1, 0)
    assert watched.notes.told == [("silent", "i1"), ("stalled", "i1")]
    await watched.close()


async def test_a_late_answer_brings_it_back(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    await watched.passes(8, 0)
    watched.answers(1)
    for _ in range(10):  # turns of the loop: an answer is two tasks deep
        await asyncio.sleep(0)
    assert watched.notes.told == [("silent", "i1"), ("answers", "i1")]
    await watched.close()


async def test_outputs_are_signs_of_life_and_nobody_who_steps_is_asked(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for _ in range(40):
        await watched.passes(0.5, 0)
        watched.watch.heard(watched.engines[1])
    assert watched.notes.told == []
    assert watched.engines[1].client.asked == []  # type: ignore[attr-defined]
    await watched.close()


async def test_when_everything_stood_still_for_ten_minutes_nobody_was_silent(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    await watched.passes(5)  # nobody has answered for a while
    watched.outside += 600
    await watched.passes(5)
    assert watched.notes.told == []
    await watched.passes(1, 0, 1)
    assert watched.notes.told == []
    await watched.close()


async def test_a_dead_instance_is_not_asked(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.engines[1].alive = False
    await watched.passes(30, 0)
    assert watched.notes.told == []
    assert watched.engines[1].client.asked == []  # type: ignore[attr-defined]
    await watched.close()
