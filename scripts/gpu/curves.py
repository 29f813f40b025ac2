"""Attainment against the rate, of every contender in some comparisons.

    python scripts/gpu/curves.py OUT.svg compare.json [compare.json ...]

A point is all requests of a contender at a rate whose outcome is known, with its 95 % interval (Wilson). A
visit that ended early, because its rate was decided, counts as far as it was seen: its point is hollow.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from taichi_serve.bench.figure import colours, figure, save
from taichi_serve.bench.goodput import wilson
from taichi_serve.bench.kept import Kept, read
from taichi_serve.bench.score import Run

Points = dict[str, dict[float, list[Run]]]


def points(kept: Iterable[Kept]) -> Points:
    """The visits of each contender at each rate, requests/s."""
    found: Points = defaultdict(lambda: defaultdict(list))
    for one in kept:
        for made in one.rounds:
            for visit in made.visits:
                found[visit.name][round(visit.run.rate, 2)].append(visit.run)
    return found


def draw(found: Points, target: float, out: Path) -> None:
    """One line a contender, and the attainment that keeps a rate."""
    made, (panel,) = figure(1)
    made.set_size_inches(7.2, 4.0)
    for (name, rates), colour in zip(sorted(found.items()), colours(sorted(found)), strict=True):
        xs = sorted(rates)
        seen = [(sum(run.good for run in rates[x]), sum(run.good + run.bad for run in rates[x])) for x in xs]
        shares = [good / known for good, known in seen]
        ends = [wilson(good, known) for good, known in seen]
        reach = [[abs(s - end[k]) for s, end in zip(shares, ends, strict=True)] for k in (0, 1)]
        panel.errorbar(xs, shares, yerr=reach, capsize=3, color=colour, label=name)
        whole = [all(run.whole for run in rates[x]) for x in xs]
        faces = [colour if seen_whole else "white" for seen_whole in whole]
        panel.scatter(xs, shares, s=36, zorder=3, edgecolors=colour, facecolors=faces)
    panel.axhline(target, color="grey", linewidth=1, linestyle="--")
    panel.set(xlabel="requests/s", ylabel="share of requests that are good", ylim=(0.6, 1.01))
    panel.legend(frameon=False, loc="lower left")
    save(made, out)


def main() -> None:
    """Read the comparisons, and draw."""
    out, *files = map(Path, sys.argv[1:])
    kept = [one for path in files if (one := read(path)) is not None]
    draw(points(kept), kept[0].trial.attainment, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
