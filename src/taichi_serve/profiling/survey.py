"""The whole measurement: what is not known yet is measured, and what is known becomes a profile."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import SCHEMA, Fit, Profile, Transfer, fit_steps
from taichi_serve.profiling.draft import Draft, Moved, Steps
from taichi_serve.profiling.grid import Cell, Grid, Hop, Limits, passes, room
from taichi_serve.profiling.prober import HERE, PLAIN, THERE, Prober
from taichi_serve.sliders import Kind

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
        """Cells and moves of the grid that need not be measured again."""
        moves = sum(hop in self._draft.moves for hop in self.hops)
        return moves + sum(cell in self._draft.cells for cell in self.cells)

    async def run(self, prober: Prober, done: Done) -> None:
        """Measure what is not known; `done` is called after each cell and move."""
        for cell in self.cells:
            if cell not in self._draft.cells:
                await self._cell(prober, cell)
                done()
        await prober.clear()
        for hop in self.hops:
            if hop not in self._draft.moves:
                await self._hop(prober, hop)
                done()

    async def _cell(self, prober: Prober, cell: Cell) -> None:
        count, repeats = passes(cell.chunk, self._limits), self._grid.repeats
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
        self._draft.add(Moved(hop, *await prober.move(hop, self._grid.repeats)))


def profile_of(draft: Draft, kv_capacity: int) -> Profile:
    """The profile of everything in a draft; raises ValueError if that is too little."""
    rows = [row for cell in draft.cells.values() for row in cell]
    # Held out is every fifth row in turn, which must not be every fifth of one kind.
    random.Random(0).shuffle(rows)
    fit = fit_steps(rows)
    return Profile(
        SCHEMA,
        draft.engine.model,
        draft.engine.device,
        dict(draft.engine.versions),
        dict(draft.engine.settings),
        kv_capacity,
        draft.engine.bytes_per_token,
        sorted(rows, key=lambda row: (row.decodes, row.kv_tokens, row.prefill_tokens, row.attention)),
        fit,
        transfers(list(draft.moves.values()), fit, draft.engine.bytes_per_token),
    )


def transfers(moves: Sequence[Moved], fit: Fit, bytes_per_token: int) -> list[Transfer]:
    """Latency and bandwidth between every two kinds, without the step that every move ends with."""
    model = fit.model()
    points: dict[tuple[Kind, Kind], list[tuple[float, float]]] = defaultdict(list)
    for moved in moves:
        point = float(moved.kv_tokens * bytes_per_token), max(0.0, moved.gap - _step(model, moved))
        points[moved.hop.source, moved.hop.target].append(point)
    return [Transfer(*kinds, *line(seen)) for kinds, seen in points.items()]


def _step(model: Roofline, moved: Moved) -> float:
    return model.of(0, 0.0, 1, moved.kv_tokens)


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
