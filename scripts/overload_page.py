"""docs/overload-tables.md and its picture, from what scripts/overload.py has kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from taichi_serve.bench.figure import COLOURS, save
from taichi_serve.scheduling.policy import DEMOTE, OVERLOAD, SERVE
from taichi_serve.search.interval import interval

SHOWN = (1.0, 1.25, 2.0)  # loads that have a column
ARRIVALS = {1.0: "Poisson arrivals", 2.0: "Bursts: gamma arrivals, CV 2", 5.0: "Bursts: gamma arrivals, CV 5"}
STYLES = {SERVE: ":", DEMOTE: "-", "refuse": "--"}
PICTURE = "img/overload-attainment.svg"
HEAD = """# Overload, in figures

Written by `python scripts/overload.py --write` from simulation: the settings of [paper.md](paper.md), each
of its three ways of serving with the sliders tuned there, all with the same mechanism. What the modes do, and
what follows from these tables, is in [overload.md](overload.md).

Own goodput is the highest rate at which `serve` keeps 90 % good, on the same seeds and arrivals (within 2 %).
Attainment is of all requests that were sent, refused ones too; means of {seeds} seeds with 95 % intervals,
{long:g} s of traffic a run, {chat:g} s where chats are served. "Least of peak" is the lowest rate of good
requests at any load from 1 to 2 over the highest at a lower one. "Longest" is the attainment of the longest
quarter of the prompts over that of all, where it is lowest. p99 TTFT is that of the requests that were
served, over the SLO, at the load where it is highest.

![attainment against load](img/overload-attainment.svg)

Attainment against load, Poisson arrivals: dotted `serve`, solid `demote`, dashed `refuse`.
"""


@dataclass(frozen=True)
class Row:
    """All loads of one way of serving in one mode."""

    setting: str
    family: str
    cv: float
    mode: str
    own: float
    loads: dict[float, list[dict[str, Any]]]

    def mean(self, load: float, key: str = "attainment") -> float:
        """Over the seeds."""
        return fmean(run[key] for run in self.loads[load])

    @property
    def least(self) -> float:
        """The lowest rate of good requests from the own goodput on, over the highest at a lower load."""
        loads = sorted(self.loads)
        good = [self.mean(load, "good") for load in loads]
        return min(good[k] / max(good[: k + 1]) for k in range(len(loads)) if loads[k] >= 1.0)

    @property
    def longest(self) -> float:
        """Attainment of the longest quarter over that of all, at the load where it is lowest."""
        return min(
            fmean(run["quartiles"][-1] for run in runs) / fmean(run["attainment"] for run in runs)
            for runs in self.loads.values()
        )

    @property
    def wait(self) -> float:
        """The p99 TTFT over the SLO, at the load where it is highest."""
        return max(self.mean(load, "wait") for load in self.loads)

    def cells(self) -> Iterator[str]:
        """Of its line."""
        yield f"`{self.mode}`"
        for load in SHOWN:
            found = interval([run["attainment"] for run in self.loads[load]])
            yield f"{found.mean:.2f} ± {found.half:.2f}"
        yield f"{self.least:.0%}"
        yield f"{self.wait:.1f}"
        yield f"{self.longest:.2f}"
        yield f"{self.mean(max(SHOWN), 'refused'):.0%}"


def read(folder: Path) -> list[Row]:
    """All that have every load."""
    found: dict[tuple[str, str, float, str], Row] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".own.json"):
            continue
        kept = json.loads(path.read_text())
        key = kept["setting"], kept["family"], kept["cv"], kept["mode"]
        row = found.setdefault(key, Row(*key, kept["own"], {}))
        row.loads[kept["load"]] = kept["runs"]
    return [row for row in found.values() if set(SHOWN) <= set(row.loads)]


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """One for each kind of arrivals."""
    for cv, title in ARRIVALS.items():
        these = [row for row in rows if row.cv == cv]
        if not these:
            continue
        yield f"\n## {title}\n"
        yield "| | own goodput | mode | 1 | 1.25 | 2 | least of peak | p99 TTFT | longest | refused at 2 |"
        yield "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
        these.sort(key=lambda row: (row.setting, row.family, OVERLOAD.index(row.mode)))
        for row in these:
            first = row.mode == SERVE
            about = f"{row.setting}, {row.family}" if first else ""
            own = f"{row.own:.3g}" if first else ""
            yield f"| {' | '.join((about, own, *row.cells()))} |"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Attainment against load: a panel for each setting."""
    from matplotlib.figure import Figure

    names = sorted({row.setting for row in rows})
    wide = 3
    high = -(-len(names) // wide)
    figure = Figure(figsize=(9.6, 2.5 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flat
    for panel, name in zip(panels, names, strict=False):
        for row in (row for row in rows if row.setting == name):
            loads = sorted(row.loads)
            shares = [row.mean(load) for load in loads]
            label = row.family if row.mode == DEMOTE else None
            panel.plot(loads, shares, STYLES[row.mode], color=COLOURS[row.family], label=label)
        panel.set_title(name, fontsize=9)
        panel.set_ylim(0, 1.02)
    figure.supxlabel("load, times the own goodput with `serve`", fontsize=9)
    figure.supylabel("attainment", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    save(figure, path)


def write(folder: Path, docs: Path) -> None:
    """The page and its picture."""
    rows = read(folder)
    some = [json.loads(path.read_text()) for path in folder.glob("*.demote.*.json")]
    seeds = len(some[0]["seeds"])
    seconds = {kept["seconds"] for kept in some}
    draw([row for row in rows if row.cv == 1.0], docs / PICTURE)
    head = HEAD.format(seeds=seeds, long=max(seconds), chat=min(seconds))
    (docs / "overload-tables.md").write_text("\n".join((head.rstrip(), *tables(rows))) + "\n")
