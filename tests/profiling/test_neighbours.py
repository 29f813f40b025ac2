"""Instances beside the one that is measured: at work in every step of it, at rest in every move."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path

import pytest
from miniature import CHUNKS, ENGINE, GRID, LIMITS, TRUTH, Miniature

from taichi_serve.latency.profile import StepRow
from taichi_serve.messages import (
    Arrived,
    Command,
    Event,
    Finished,
    Flow,
    Outcome,
    Prefill,
    Prefilled,
    SetChunk,
    Stepped,
)
from taichi_serve.profiling.draft import Draft
from taichi_serve.profiling.grid import Cell, Limits
from taichi_serve.profiling.neighbours import Load, Neighbours
from taichi_serve.profiling.probed import LostError
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


def test_first_requests_are_of_different_lengths_on_each_and_between_them() -> None:
    cluster = Told()
    neighbours = Neighbours(cluster, ["i1", "i2"], Load(at_once=2, prompt=300, output=20, chunk=128))
    neighbours.work()
    # a half and all of 20, and beside them what is in the middle
    assert cluster.asked == ["0: 300/10", "1: 300/20", "2: 300/5", "3: 300/15"]
    for name in cluster.asked[:3]:
        neighbours.saw(Prefilled(0.5, name, 0, False))
    assert not neighbours.settled
    neighbours.saw(Prefilled(0.5, cluster.asked[3], 0, False))
    assert neighbours.settled
    neighbours.saw(Finished(1.0, "2: 300/5", 5))
    assert cluster.asked[4:] == ["4: 300/20"]


def test_a_neighbour_that_cannot_serve_is_an_error_that_names_it() -> None:
    cluster = Told()
    neighbours = Neighbours(cluster, ["i1"], Load(at_once=1, prompt=300, output=20, chunk=128))
    neighbours.work()
    with pytest.raises(LostError, match="instance i1 could not serve while another was measured: failed"):
        neighbours.saw(Finished(1.0, "0: 300/20", 0, Outcome.FAILED))


class Watched(Miniature):
    """Three engines in miniature, and who was at work at each step of them and at each move."""

    def __init__(self) -> None:
        super().__init__(d_heavy=2)
        self.theirs: set[str] = set()
        self.live: dict[str, str] = {}  # request of a neighbour, and where it is
        self.steps: list[tuple[Stepped, set[str]]] = []
        self.moves: list[set[str]] = []

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        name = super().ask(prompt_tokens, output_tokens)
        if prompt_tokens == LOAD.prompt:
            self.theirs.add(name)
        return name

    async def events(self) -> AsyncIterator[Event]:
        async for event in super().events():
            if isinstance(event, Stepped):
                self.steps.append((event, set(self.live.values())))
            elif isinstance(event, Finished):
                self.live.pop(event.request, None)
            yield event

    def send(self, command: Command) -> None:
        if isinstance(command, Prefill) and command.request in self.theirs:
            self.live[command.request] = command.on
        if isinstance(command, Flow):
            self.moves.append(set(self.live.values()))
        super().send(command)


class Watching(Prober):
    """Keeps the steps of all instances while cells are measured."""

    def __init__(self, cluster: Watched) -> None:
        super().__init__(cluster, Neighbours(cluster, ["i1", "i2"], LOAD))
        self.cluster = cluster
        self.cells: list[list[tuple[Stepped, set[str]]]] = []

    async def measure(self, cell: Cell, passes: int, repeats: int) -> list[StepRow]:
        before = len(self.cluster.steps)
        rows = await super().measure(cell, passes, repeats)
        self.cells.append(self.cluster.steps[before:])
        return rows


async def test_neighbours_are_at_work_in_every_step_and_at_rest_in_every_move(tmp_path: Path) -> None:
    cluster = Watched()
    prober = Watching(cluster)
    draft = Draft(tmp_path / "p.part", ENGINE)
    survey = Survey(GRID, LIMITS, draft, CHUNKS)
    await survey.run(prober, lambda: None)
    assert len(prober.cells) == GRID.repeats * len(survey.cells)
    for steps in prober.cells:
        here = [working for step, working in steps if step.instance == "i0"]
        assert here
        assert all(working == {"i1", "i2"} for working in here)
    assert len(cluster.moves) == GRID.repeats * len(survey.hops)
    assert not any(cluster.moves)
    assert cluster.live == {}
    # Engines in miniature have a device each: what is found is what is true.
    fit = profile_of(draft, LIMITS.kv_capacity).fit
    assert fit.error_p95 < 0.001
    assert fit.token == pytest.approx(TRUTH.token, rel=0.01)


async def test_chunks_of_a_neighbour_are_spread_over_its_steps(tmp_path: Path) -> None:
    cluster = Watched()
    prober = Watching(cluster)
    await Survey(GRID, LIMITS, Draft(tmp_path / "p.part", ENGINE), None).run(prober, lambda: None)
    for instance in ("i1", "i2"):
        chunks = [bool(s.prefill_tokens) for cell in prober.cells for s, _ in cell if s.instance == instance]
        assert len(chunks) > 500
        # Four requests of three chunks and 20 outputs: in bursts, 12 steps with a chunk and 19 without.
        assert max(len(list(steps)) for _, steps in groupby(chunks)) < 10


def test_load_is_what_an_engine_can_take() -> None:
    assert Load.within(LIMITS) == Load(16, 1024, 128, 256)
    # half of 4,096 tokens of KV hold three requests of 512 + 128
    assert Load.within(Limits(kv_capacity=4096, sequence=1024, step=128, sequences=64)) == Load(
        3, 512, 128, 64
    )
    assert Load.within(Limits(kv_capacity=256, sequence=256, step=8, sequences=2)) == Load(1, 128, 64, 4)
