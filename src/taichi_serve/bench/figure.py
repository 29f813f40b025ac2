"""How our pictures look: size, colours, files that are the same when the figures are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

COLOURS = {"aggregation": "#4c72b0", "disaggregation": "#dd8452", "hybrid": "#55a868"}
OTHERS = ("#8172b3", "#c44e52", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
TICKS = 5  # intervals below a panel: more of them have labels that overlap where these are long


def colours(names: Sequence[str]) -> list[str]:
    """Of things with these names: the known ones have their own, the others one each as far as there are."""
    others = cycle(OTHERS)
    return [COLOURS.get(name) or next(others) for name in names]


def figure(columns: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    made = Figure(figsize=(4.6 * columns, 3.4), layout="constrained")
    panels = list(made.subplots(1, columns, squeeze=False)[0])
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(TICKS))
    return made, panels


def stacked(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure with panels of these heights (inches) below one another."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9.2, sum(heights)), layout="constrained")
    return made, list(made.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def save(made: Any, path: Path) -> None:
    """Write it, without the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
