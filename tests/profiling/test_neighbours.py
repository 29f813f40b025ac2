"""Instances beside the one that is measured: at work in every step of it, at rest in every move."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from miniature import CHUNKS, ENGINE, GRID, LIMITS, TRUTH, Miniature

from taichi_serve.messages import Arrived, Command, Event, Finished, Flow, Prefill, SetChunk, Stepped
from taichi_serve.profiling.draft import Draft
from taichi_serve.profiling.grid import Limits
from taichi_serve.profiling.neighbours import Load, Neighbours
from taichi_serve.profiling.prober import Prober
from taichi_serve.profiling.survey import Survey, profile_of
from taichi_serve.sliders import Kind

LOAD = Load(at_once=4, prompt=300, output=20, chunk=128)


class Told:
    """A cluster that keeps what it was asked and told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.sent: list[Command] = []

    async def events(self) -> AsyncIterator[Event]:
        return
        yield

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        self.asked.append(f"{len(self.asked)}: {prompt_tokens}/{output_tokens}")
        return self.asked[-1]


def test_a_neighbour_gets_another_request_for_each_that_has_finished_until_it_is_to_rest() -> None:
    cluster = Told()
    neighbours = Neighbours(cluster, ["i1"], Load(at_once=1, prompt=300, output=20, chunk=128))
    assert neighbours.settled
    neighbours.work()
    neighbours.work()  # already
    assert cluster.asked == ["0: 300/20"]
    assert cluster.sent == [SetChunk("i1", Kind.D_HEAVY, 128)]
    assert not neighbours.settled
    neighbours.saw(Arrived(0.0, "0: 300/20", 300, 20))
    assert cluster.sent[1:] == [Prefill("0: 300/20", 0, "i1")]
    neighbours.saw(Finished(1.0, "somebody else", 20))
    assert len(cluster.asked) == 1
    neighbours.saw(Finished(1.0, "0: 300/20", 20))
    assert cluster.asked == ["0: 300/20", "1: 300/20"]
    neighbours.rest()
    assert not neighbours.settled
    neighbours.saw(Finished(2.0, "1: 300/20", 20))
    assert len(cluster.asked) == 2
    assert neighbours.settled


class Watched(Miniature):
    """Three engines in miniature; whether the neighbours were at work at each step of i0 and at each move."""

    def __init__(self) -> None:
        super().__init__(d_heavy=2)
        self.steps: list[set[str]] = []
        self.moves: list[set[str]] = []
        self.theirs: set[str] = set()
        self.live: dict[str, str] = {}  # request of a neighbour, and where it is

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        name = super().ask(prompt_tokens, output_tokens)
        if (prompt_tokens, output_tokens) == (LOAD.prompt, LOAD.output):
            self.theirs.add(name)
        return name

    async def events(self) -> AsyncIterator[Event]:
        async for event in super().events():
            if isinstance(event, Stepped) and event.instance == "i0":
                self.steps.append(set(self.live.values()))
            elif isinstance(event, Finished):
                self.live.pop(event.request, None)
            yield event

    def send(self, command: Command) -> None:
        if isinstance(command, Prefill) and command.request in self.theirs:
            self.live[command.request] = command.on
        if isinstance(command, Flow):
            self.moves.append(set(self.live.values()))
        super().send(command)


async def test_neighbours_are_at_work_in_every_step_and_at_rest_in_every_move(tmp_path: Path) -> None:
    cluster = Watched()
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, CHUNKS)
    await survey.run(Prober(cluster, Neighbours(cluster, ["i1", "i2"], LOAD)), lambda: None)
    assert survey.known == survey.total
    assert len(cluster.moves) == GRID.repeats * len(survey.hops)
    assert not any(cluster.moves)
    assert cluster.live == {}
    at_work = [beside for beside in cluster.steps if beside]
    assert all(beside == {"i1", "i2"} for beside in at_work)
    rows = sum(len(rows) for rounds in draft.cells.values() for rows in rounds)
    assert len(at_work) > rows > 0
    # Engines in miniature have a device each: what is found is what is true.
    fit = profile_of(draft, LIMITS.kv_capacity).fit
    assert fit.error_p95 < 0.001
    assert fit.token == pytest.approx(TRUTH.token, rel=0.01)


def test_load_is_what_an_engine_can_take() -> None:
    assert Load.within(LIMITS) == Load(16, 1024, 128, 256)
    # half of 4,096 tokens of KV hold three requests of 512 + 128
    assert Load.within(Limits(kv_capacity=4096, sequence=1024, step=128, sequences=64)) == Load(
        3, 512, 128, 64
    )
    assert Load.within(Limits(kv_capacity=256, sequence=256, step=8, sequences=2)) == Load(1, 128, 64, 4)
