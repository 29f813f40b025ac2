"""The whole measurement: what is not known yet is measured, and what is known becomes a profile."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import median

import numpy as np

from taichi_serve.latency.profile import SCHEMA, Profile, StepRow, Transfer, fit_steps
from taichi_serve.profiling.draft import Draft, Moved, Steps
from taichi_serve.profiling.grid import Cell, Grid, Hop, Limits, passes, prompts, room
from taichi_serve.profiling.probed import LostError
from taichi_serve.profiling.prober import HERE, PLAIN, THERE, Prober, alike, medians
from taichi_serve.sliders import Kind

DISAGREE = 0.1  # of what a step takes: a cell whose rounds are further apart is measured
AGAIN = 2  # times more,
DOUBTFUL = 3  # one in so many of them at most
TRIES = 3  # of one move
FASTEST = 1e13  # bytes/s of a link on which more bytes were seen to take no longer

Done = Callable[[], None]


class Survey:
    """What is to be measured on one engine, and where it is kept."""

    def __init__(self, grid: Grid, limits: Limits, draft: Draft, chunks: dict[Kind, int] | None) -> None:
        """`chunks` are those of the two kinds of instances; without them no moves are measured."""
        self._grid, self._limits, self._draft = grid, limits, draft
        self._chunks = chunks
        self.cells = grid.cells(limits)
        self.hops = grid.hops(limits) if chunks else []

    @property
    def known(self) -> int:
        """How often cells and moves were measured, all together."""
        moves = sum(len(self._draft.moves[hop]) for hop in self.hops)
        return moves + sum(len(self._draft.cells[cell]) for cell in self.cells)

    @property
    def total(self) -> int:
        """How often they will have been at the end, as far as can be told."""
        once = len(self.cells) + len(self.hops)
        return self._grid.repeats * once + AGAIN * len(self._doubtful())

    async def run(self, prober: Prober, done: Done) -> None:
        """Measure what is not known; `done` is called after each cell and move.

        Whatever else a machine does comes and goes in seconds, and would be in all of a cell that is measured
        in one go. So everything is measured once, then once more; where that says one thing now and another
        later, more often.
        """
        for turn in range(self._grid.repeats):
            await self._round(prober, done, self.cells, turn)
            await self._moves(prober, done, turn)
        doubtful = self._doubtful()
        for turn in range(self._grid.repeats, self._grid.repeats + AGAIN):
            await self._round(prober, done, doubtful, turn)
        await prober.clear()
        await prober.neighbours_at_rest()

    async def _round(self, prober: Prober, done: Done, cells: Sequence[Cell], turn: int) -> None:
        for cell in cells:
            if len(self._draft.cells[cell]) <= turn:
                await prober.neighbours_at_work()
                await self._cell(prober, cell)
                done()

    async def _moves(self, prober: Prober, done: Done, turn: int) -> None:
        """Every move once; with nothing else going on, or its gap would hold whatever the target is at."""
        await prober.clear()
        for hop in self.hops:
            if len(self._draft.moves[hop]) <= turn:
                await prober.neighbours_at_rest()
                await self._hop(prober, hop)
                done()

    def _doubtful(self) -> list[Cell]:
        """Cells that were fast in one of the rounds and slow in another: those that differ most, a third of
        all at most, so that there is an end to it."""
        repeats, apart = self._grid.repeats, {}
        for cell in self.cells:
            rounds = self._draft.cells[cell][:repeats]
            apart[cell] = disagreement(rounds) if len(rounds) == repeats > 1 else 0.0
        worst = sorted(self.cells, key=lambda cell: -apart[cell])[: len(self.cells) // DOUBTFUL]
        return [cell for cell in self.cells if cell in worst and apart[cell] > DISAGREE]

    async def _cell(self, prober: Prober, cell: Cell) -> None:
        count, repeats = passes(cell.chunk, self._limits), prompts(cell.chunk)
        # Twice the steps that are planned: decodes do not wait for us between two cells.
        steps = 2 * (repeats + 1) * (count + PLAIN)
        if not prober.stands(cell.decodes, cell.context, room(self._limits) - steps):
            largest = max(c.chunk for c in self.cells if c.decodes == cell.decodes)
            await prober.stand(cell.decodes, cell.context, room(self._limits), largest)
        self._draft.add(Steps(cell, await prober.measure(cell, count, repeats)))

    async def _hop(self, prober: Prober, hop: Hop) -> None:
        assert self._chunks is not None
        for kind, on in ((hop.source, HERE), (hop.target, THERE)):
            await prober.chunk(self._chunks[kind], kind, on)
        for _ in range(TRIES):
            if (moved := await prober.move(hop)) is not None:
                self._draft.add(Moved(hop, *moved))
                return
        raise LostError(
            f"a request of {hop.tokens} tokens could not be moved from {HERE} to {THERE}; "
            "--no-moves leaves the speed of moves to be learned"
        )


def disagreement(rounds: Sequence[Sequence[StepRow]]) -> float:
    """How far apart rounds are about the same work: their range as a share of their median, that of the
    median step."""
    seen = [[row.seconds for row in same] for same in alike(chain.from_iterable(rounds)).values()]
    return median([(max(times) - min(times)) / median(times) for times in seen] or [0.0])


def profile_of(draft: Draft, kv_capacity: int) -> Profile:
    """The profile of everything in a draft; raises ValueError if that is too little."""
    rows = [row for rounds in draft.cells.values() for row in medians(chain.from_iterable(rounds))]
    moves = [_usual(times) for times in draft.moves.values() if times]
    # Held out is every fifth row in turn, which must not be every fifth of one kind.
    random.Random(0).shuffle(rows)
    return Profile(
        SCHEMA,
        draft.engine.model,
        draft.engine.device,
        dict(draft.engine.versions),
        dict(draft.engine.settings),
        kv_capacity,
        draft.engine.bytes_per_token,
        sorted(rows, key=lambda row: (row.decodes, row.kv_tokens, row.prefill_tokens, row.attention)),
        fit_steps(rows),
        transfers(moves, draft.engine.bytes_per_token),
    )


def _usual(times: Sequence[Moved]) -> Moved:
    """The median of the same move."""
    gap, step = median(m.gap for m in times), median(m.step for m in times)
    return Moved(times[0].hop, round(median(m.kv_tokens for m in times)), gap, step)


def transfers(moves: Sequence[Moved], bytes_per_token: int) -> list[Transfer]:
    """Latency and bandwidth between every two kinds, without the step that every move ends with."""
    points: dict[tuple[Kind, Kind], list[tuple[float, float]]] = defaultdict(list)
    for moved in moves:
        point = float(moved.kv_tokens * bytes_per_token), max(0.0, moved.gap - moved.step)
        points[moved.hop.source, moved.hop.target].append(point)
    return [Transfer(*kinds, *line(seen)) for kinds, seen in points.items()]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency (s) and bytes a second of moves given as (bytes, seconds), neither of them negative."""
    sizes, seconds = np.array(points, dtype=np.float64).T
    spread = sizes - sizes.mean()
    slope = float(spread @ seconds / (spread @ spread)) if spread.any() else 0.0
    latency = float(seconds.mean() - slope * sizes.mean())
    if latency < 0:  # then it is none, and the line begins at zero
        latency, slope = 0.0, float(sizes @ seconds / (sizes @ sizes))
    if slope <= 1 / FASTEST:
        latency, slope = float(seconds.mean()), 1 / FASTEST
    return latency, 1 / slope
