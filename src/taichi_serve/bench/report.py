"""What a goodput measurement came to: a file that can be read back, a table, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from taichi_serve.bench.figure import colours, figure, save
from taichi_serve.bench.goodput import wilson
from taichi_serve.bench.score import Run
from taichi_serve.bench.trial import Goodput, Trial

HEADS = (
    "configuration",
    "goodput, requests/s",
    "attainment there (95 %)",
    "good of sent",
    "failed",
    "TTFT p50 / p90, s",
    "TPOT p50 / p90, ms",
    "missed at, requests/s",
    "remarks",
)


@dataclass(frozen=True, slots=True)
class Result:
    """One configuration, measured."""

    name: str
    target: str  # URL or model
    trial: Trial
    flags: tuple[str, ...]  # of `taichi serve`; none for a server that was running
    goodput: Goodput
    date: str
    versions: str
    machine: str
    notes: tuple[str, ...] = ()  # what whoever reads the figures must know

    def same(self, target: str, trial: Trial, flags: tuple[str, ...]) -> bool:
        """Whether it answers this question."""
        return (self.target, self.trial, self.flags) == (target, trial, flags)


def write(result: Result, path: Path) -> None:
    """As JSON, with every request of every run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def read(path: Path) -> Result | None:
    """A result written before; None where there is none, or it is not one."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Result)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    goodput = found.goodput  # an older file does not say that it is a lower bound
    return replace(found, goodput=Goodput.of(goodput.rate, goodput.runs, goodput.there))


def row(result: Result) -> tuple[str, ...]:
    """One line of the table, under HEADS."""
    found = result.goodput
    missed = [run.rate for run in found.runs if not run.kept]
    beyond = f"{min(missed):.3g}" if missed else "-"
    remarks = "; ".join(_remarks(result)) or "-"
    run = found.there
    if run is None:
        return (result.name, found.words, *("-" for _ in HEADS[4:]), beyond, remarks)
    low, high = run.interval
    return (
        result.name,
        found.words,
        f"{run.least:.1%} ({low:.1%} to {high:.1%})",
        f"{run.good} of {run.total}",
        str(run.failed),
        f"{_time(run, 'ttft', 0.5)} / {_time(run, 'ttft', 0.9)}",
        f"{_time(run, 'tpot', 0.5, 1e3)} / {_time(run, 'tpot', 0.9, 1e3)}",
        beyond,
        remarks,
    )


def _remarks(result: Result) -> list[str]:
    """What is doubtful about the run that is in the table, or about all of them where none is."""
    found = result.goodput
    said = [f"lost {' '.join(found.lost)}"] if found.lost else []
    for run in [found.there] if found.there else found.runs:
        said += [remark for remark in run.remarks if remark not in said and not remark.startswith("lost")]
    return said


def _time(run: Run, name: str, share: float, unit: float = 1.0) -> str:
    seconds = run.quantile(name, share)
    return "-" if seconds is None else f"{seconds * unit:.3g}"


def conditions(result: Result) -> str:
    """What was measured, in one sentence."""
    trial = result.trial
    return (
        f"{result.date}; {result.machine}; {result.versions}. {trial.workload} x {trial.scale:g}, "
        f"{trial.arrivals.words}, SLO "
        f"{trial.slo.ttft:g} s and {trial.slo.tpot * 1e3:g} ms, target {trial.attainment:.0%} of "
        f"{trial.requests} requests for each of the seeds {', '.join(map(str, trial.seeds))}, after "
        f"{trial.warm_up} that are not counted; rate to {trial.tolerance:.0%}."
        + (f" Classes: {trial.mix.words}." if trial.mix.parts else "")
    )


def by_class(result: Result) -> list[str]:
    """A line for each class of requests: how many of those that ended were good at the goodput found."""
    there, lines = result.goodput.there, list[str]()
    if there is None:
        return lines
    for part in result.trial.mix.parts:
        samples = [sample for sample in there.samples if sample.slo_class == part.name]
        good = sum(sample.good for sample in samples)
        low, high = wilson(good, len(samples))
        share = good / len(samples) if samples else 0.0
        of = f"{good} of {len(samples)} good"
        lines.append(f"{result.name}, {part.name}: {share:.1%} ({low:.1%} to {high:.1%}), {of}")
    return lines


def markdown(results: Sequence[Result]) -> str:
    """The conditions and the table."""
    lines = [HEADS, ("---", *("---:" for _ in HEADS[1:])), *map(row, results)]
    flags = [f"- {r.name}: `{' '.join(r.flags)}`" for r in results if r.flags]
    notes = [f"- {note}" for note in notes_of(results)]
    notes += [f"- {line}" for result in results for line in by_class(result)]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([conditions(results[-1]), "", *table, "", *flags, *notes]) + "\n"


def notes_of(results: Sequence[Result]) -> list[str]:
    """The notes of all of them, each once."""
    return list(dict.fromkeys(note for result in results for note in result.notes))


def as_json(results: Sequence[Result]) -> bytes:
    """The table as a list of objects, each with its notes."""
    rows = [{**dict(zip(HEADS, row(result), strict=True)), "notes": result.notes} for result in results]
    return msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Attainment against rate; and TTFT against TPOT at each one's goodput, with the box of the SLO."""
    picture, (left, right) = figure(2)
    trial = results[-1].trial
    for result, colour in zip(results, colours([result.name for result in results]), strict=True):
        _curve(left, result, colour)
        there = result.goodput.there
        if there is not None:
            done = [sample for sample in there.samples if sample.error is None]
            times = [sample.ttft for sample in done], [(sample.tpot or 0.0) * 1e3 for sample in done]
            label = f"{result.name}, {result.goodput.words} requests/s"
            right.scatter(*times, s=9, alpha=0.6, linewidths=0, color=colour, label=label)
    left.axhline(trial.attainment, color="grey", linestyle=":")
    left.set(xlabel="requests/s", ylabel="attainment", xlim=(0, None), ylim=(0, 1.03))
    left.legend(fontsize="small")
    limits = trial.slo.ttft, trial.slo.tpot * 1e3
    right.plot([0, limits[0], limits[0]], [limits[1], limits[1], 0], color="grey", linestyle=":", label="SLO")
    right.set(xlabel="TTFT (s)", ylabel="TPOT (ms)", xlim=(0, None), ylim=(0, None))
    right.legend(fontsize="small")
    save(picture, path)


def _curve(axis: Any, result: Result, colour: str) -> None:
    """Whole runs are points; a run that ended early is a bar, for all that its attainment can be."""
    runs = sorted(result.goodput.runs, key=lambda run: run.rate)
    whole = [run for run in runs if run.whole]
    points = [run.rate for run in whole], [run.least for run in whole]
    axis.plot(*points, marker=".", color=colour, label=result.name)
    seen = {run.rate for run in whole}
    for run in runs:
        if run.rate not in seen:
            axis.vlines(run.rate, run.least, run.most, color=colour, alpha=0.3)
