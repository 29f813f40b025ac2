"""The rates that contenders share, and the climb of one of them: which rate keeps the target, which is next.

Contenders can be told apart at a rate only where both were there, so all of them try rates of one grid. Rung
0 is the first rate; from rung to rung a rate grows by the tolerance of the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from taichi_serve.bench.bracket import REACH, wider


@dataclass(frozen=True, slots=True)
class Grid:
    """Rates `start * (1 + tolerance) ** rung`, in requests/s, from `start` / 64 to `start` * 64. `step` is
    from the first rate to the next one that is tried, and is squared with every further one, up to 2."""

    start: float
    tolerance: float
    step: float = 2.0

    def rate(self, rung: int) -> float:
        """Requests/s."""
        return self.start * (1 + self.tolerance) ** rung

    def rungs(self, factor: float) -> int:
        """So many rungs come nearest to a rate that is `factor` times as high; at least one."""
        return max(1, round(math.log(factor) / math.log1p(self.tolerance)))

    def stride(self, tried: int) -> int:
        """So many rungs further the next rate is, where so many were tried and all lay on one side."""
        step = self.step
        for _ in range(1, tried):
            step = wider(step)
        return self.rungs(step)

    @property
    def reach(self) -> int:
        """The highest rung, and less 0 the lowest."""
        return self.rungs(REACH)


@dataclass(frozen=True, slots=True)
class Climb:
    """What is known of one contender: for each rung that it tried, whether it kept the target there."""

    grid: Grid
    kept: Mapping[int, bool]

    @property
    def low(self) -> int | None:
        """The highest rung that was kept; None where none was."""
        return max((rung for rung, kept in self.kept.items() if kept), default=None)

    @property
    def high(self) -> int | None:
        """The lowest rung above `low` that was missed; None where none was."""
        low = self.low
        missed = (rung for rung, kept in self.kept.items() if not kept and (low is None or rung > low))
        return min(missed, default=None)

    @property
    def next(self) -> int | None:
        """The rung to try; None where the goodput is known to one rung, or is beyond reach."""
        low, high, reach = self.low, self.high, self.grid.reach
        step = self.grid.stride(len(self.kept))
        if low is not None and high is not None:
            return None if high - low == 1 else (low + high) // 2
        if low is not None:
            return min(low + step, reach) if low < reach else None
        if high is not None:
            return max(high - step, -reach) if high > -reach else None
        return 0

    def tells(self, rung: int) -> bool:
        """Whether this rung can say something new."""
        low, high = self.low, self.high
        return self.next is not None and (low is None or rung > low) and (high is None or rung < high)

    @property
    def deciding(self) -> tuple[int, ...]:
        """The rungs between which the goodput lies; none where no rung was kept."""
        return tuple(rung for rung in (self.low, self.high) if rung is not None and self.low is not None)
