"""Attainment past goodput: what --overload serve, demote and refuse make of 0.9 to 2 times the goodput.

    scripts/compile.sh
    PYTHONPATH=build/compiled python scripts/overload.py [--arxiv FILE] [--setting NAME] [--cv 1 2 5]

The settings are those of docs/paper.md, with its three ways of serving as tuned there; --arxiv is the CSV of
the lengths of its Table 2. Own goodput is that of `serve` on the same seeds: the highest rate at which 90 %
of all requests sent are good. At each multiple of it stand, for each mode: the share of all requests that are
good, good requests/s over the time in which requests came, the p99 of the TTFT of those served over the TTFT
SLO, the share that was refused, and attainment by quartile of prompt length, shortest first.

Every own goodput and every load is kept in build/overload/, and is not run again while its file is there.
With --write the tables of docs/overload-tables.md and their picture are made of what is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import Pool
from pathlib import Path
from statistics import fmean
from typing import Any

from overload_page import write
from overload_runs import Task, share, simulated
from overload_settings import Setting, settings

from taichi_serve.bench.arrivals import GAMMA, Arrivals
from taichi_serve.bench.bracket import Bracket
from taichi_serve.scheduling.policy import OVERLOAD, REFUSE, SERVE
from taichi_serve.search.goodput import TARGET, Contender

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build/overload"
LOADS = (0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # times own goodput
TOLERANCE = 0.02  # of a goodput


class Study:
    """A pool of processes, the seeds, and the folder of what has been run."""

    def __init__(self, pool: Any, seeds: list[int], folder: Path) -> None:
        self.pool, self.seeds, self.folder = pool, seeds, folder

    def tasks(self, about: Setting, cv: float, one: Contender, mode: str, rate: float) -> list[Task]:
        """One a seed."""
        return [Task(about, Arrivals(GAMMA, cv), one, mode, rate, seed) for seed in self.seeds]

    def own(self, about: Setting, cv: float, one: Contender, guess: float) -> float:
        """The highest rate (requests/s) at which 90 % are good with `serve`, on average over the seeds."""
        path = self.folder / f"{about.name}.{one.name}.cv{cv:g}.own.json"
        if path.exists():
            return float(json.loads(path.read_text()))
        bracket = Bracket(guess / cv**0.5, TOLERANCE, step=1.06)
        while (rate := bracket.next()) is not None:
            tasks = self.tasks(about, cv, one, SERVE, rate)
            shares = self.pool.map(share, tasks, chunksize=1)
            bracket = bracket.after(rate, fmean(shares) >= TARGET)
        path.write_text(json.dumps(bracket.low))
        return bracket.low

    def load(self, about: Setting, cv: float, one: Contender, mode: str, own: float, load: float) -> None:
        """All seeds at one multiple of the own goodput."""
        path = self.folder / f"{about.name}.{one.name}.cv{cv:g}.{mode}.{load:g}.json"
        if path.exists():
            return
        runs = self.pool.map(simulated, self.tasks(about, cv, one, mode, load * own), chunksize=1)
        kind = {"setting": about.name, "family": one.name, "cv": cv, "mode": mode, "load": load, "own": own}
        seen = {"seeds": self.seeds, "seconds": about.seconds, "runs": [asdict(run) for run in runs]}
        path.write_text(json.dumps(kind | seen))
        print(f"{path.stem}: {fmean(run.attainment for run in runs):.3f}", flush=True)


def chosen(args: argparse.Namespace) -> Iterator[Setting]:
    """Those that were asked for, or all."""
    known = {one.name: one for one in settings(args.arxiv)}
    for name in args.setting or known:
        if name not in known:
            raise SystemExit(f"overload.py: --setting {name!r} is none of {', '.join(known)}")
        yield known[name]


def main() -> None:
    """Run what is not kept yet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--arxiv", metavar="FILE", help="lengths of Table 2; without it three settings fewer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--setting", action="append", metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--load", type=float, nargs="+", default=list(LOADS), metavar="X")
    parser.add_argument(
        "--cv", type=float, nargs="+", default=[1.0, 2.0, 5.0], help="of the gaps; 1: Poisson"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the page, and run nothing")
    args = parser.parse_args()
    if args.write:
        write(KEPT, ROOT / "docs")
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    with Pool(args.processes) as pool:
        study = Study(pool, args.seeds, KEPT)
        for cv in args.cv:
            for about in chosen(args):
                for one, guess in zip(about.families, about.guesses, strict=True):
                    own = study.own(about, cv, one, guess)
                    for mode in OVERLOAD:
                        if mode == REFUSE and one.name != "hybrid":
                            continue  # the baselines have the same mechanism, and one mode shows it
                        for load in args.load:
                            study.load(about, cv, one, mode, own, load)


if __name__ == "__main__":
    main()
