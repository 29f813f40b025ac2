"""Contests made by hand: each contender keeps the target up to a rate of its own."""

from __future__ import annotations

from taichi_serve.bench.contest import Contest, Round, Task, Visit
from taichi_serve.bench.score import Others, Run, Sample
from taichi_serve.bench.trial import Trial
from taichi_serve.slo import SLO

TRIAL = Trial("sharegpt", SLO(4.0, 0.07), requests=100, warm_up=5, seeds=(0, 1), start=1.0)


def sample(seed: int, number: int, good: bool) -> Sample:
    return Sample(seed, number, 20, 11, 0.1 if good else 9.0, 0.01, good, None)


def run(task: Task, others: Others, kept: bool, trial: Trial = TRIAL) -> Run:
    """95 of 100 good where it keeps the target, and 70 where not. It ends early where it may and can."""
    good, bad = (95, 5) if kept else (70, 30)
    if task.early:
        least = round(trial.attainment * trial.total)
        good = min(good, max(0, least - others.good)) if kept else 0
        bad = 0 if kept else min(bad, trial.total - least - others.bad + 1)
    outcomes = [True] * good + [False] * bad
    samples = tuple(sample(task.seed, trial.warm_up + n, one) for n, one in enumerate(outcomes))
    return Run(task.rate, trial.requests, good + bad, good, bad, kept, 10.0, 0.0, samples, span=90.0)


def play(cliffs: dict[str, float], trial: Trial = TRIAL, contest: Contest | None = None) -> Contest:
    contest = contest or Contest(tuple(cliffs), trial)
    for _ in range(500):
        if (task := contest.next()) is None:
            return contest
        visits = [
            Visit(name, run(task, others, task.rate <= cliffs[name], trial))
            for name, others in zip(task.names, task.others, strict=True)
        ]
        contest.add(Round(task.rung, task.seed, tuple(visits), (10.0,) * (len(visits) + 1)))
    raise AssertionError("it has no end")
