"""Several contenders measured side by side: who is visited next, at which rate, and what came of it.

A round is one rate and one seed: every contender that it tells something of is sent the same requests at the
same times, one contender after the other, with the machine's speed probed before, between and after. So
contenders are compared over minutes and not over the hours that the search takes, and it is known whether the
machine was the same for all of them. There is no I/O here: `next` says what to do, `add` takes what came of
it; the state is the list of rounds, so a contest that was stopped goes on from its file.

First everybody climbs to the two neighbouring rates between which its goodput lies, and visits may end early.
Then these rates are seen to their end, together with everybody whose goodput is near: what they come to there
is compared request by request (pairs.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from taichi_serve.bench.grid import Climb, Grid
from taichi_serve.bench.probe import drift
from taichi_serve.bench.score import Others, Run, needed
from taichi_serve.bench.trial import Goodput, Trial
from taichi_serve.bench.usage import Usage

NEAR = 1.25  # contenders whose goodputs are further apart need no request by request


@dataclass(frozen=True, slots=True)
class Visit:
    """What one contender came to in a round, and what that took."""

    name: str
    run: Run
    usage: Usage | None = None  # of a file of before it was looked at


@dataclass(frozen=True, slots=True)
class Round:
    """One seed at one rung: the visits in order, and the machine's speed before, between and after them."""

    rung: int
    seed: int
    visits: tuple[Visit, ...]
    speeds: tuple[float, ...] = ()  # of the probe, one more than visits
    thrown_away: tuple[tuple[float, ...], ...] = ()  # speeds of earlier attempts, which moved too far
    idle: tuple[float, ...] = ()  # cores that the servers beside the visited one used, for each visit

    @property
    def drift(self) -> float:
        """How far the machine's speed moved."""
        return drift(self.speeds)

    def run(self, name: str) -> Run | None:
        """What this contender came to; None where it was not visited."""
        found = next((visit.run for visit in self.visits if visit.name == name), None)
        return replace(found, drift=self.drift) if found else None

    def whole(self, *names: str) -> bool:
        """Whether all of these were visited, and seen to their end."""
        runs = [self.run(name) for name in names]
        return all(run is not None and run.whole for run in runs)


@dataclass(frozen=True, slots=True)
class Task:
    """A round that is to be done: whom to visit, in this order, and what is known of their other seeds."""

    rung: int
    rate: float
    seed: int
    early: bool  # whether a visit may end when its rate is decided
    names: tuple[str, ...]
    others: tuple[Others, ...]


def order(names: Sequence[str], turn: int) -> tuple[str, ...]:
    """There and back, and then from the next one on. Two of them go ABBA: a machine that gets steadily faster
    or slower favours neither."""
    first = turn // 2 % len(names)
    turned = (*names[first:], *names[:first])
    return turned[::-1] if turn % 2 else turned


@dataclass(slots=True)
class Contest:
    """All that is known, and what follows."""

    names: tuple[str, ...]
    trial: Trial
    rounds: list[Round] = field(default_factory=list)

    @property
    def grid(self) -> Grid:
        """The rates."""
        return Grid(self.trial.start, self.trial.tolerance)

    def add(self, done: Round) -> None:
        """A round more."""
        self.rounds.append(done)

    def next(self) -> Task | None:
        """The next round; None when all is known."""
        return self._climbing() or self._deciding()

    # ------------------------------------------------------------------------------------- what is known

    def seeds(self, name: str, rung: int) -> dict[int, Run]:
        """The last run of each seed of a contender at a rung."""
        found = ((r.seed, r.run(name)) for r in self.rounds if r.rung == rung)
        return {seed: run for seed, run in found if run is not None}

    def runs(self, name: str) -> dict[int, Run]:
        """For every rung at which a contender's outcome is known all its seeds, in the order of rounds."""
        rungs = dict.fromkeys(r.rung for r in self.rounds if r.run(name) is not None)
        known = {rung: tuple(self.seeds(name, rung).values()) for rung in rungs}
        made = {rung: self._together(parts) for rung, parts in known.items()}
        return {rung: run for rung, run in made.items() if run is not None}

    def _together(self, parts: Sequence[Run]) -> Run | None:
        """None while it depends on seeds that have not run."""
        run = replace(Run.of(parts, self.trial.attainment), total=self.trial.total)
        least = needed(self.trial.attainment, run.total)
        kept, missed = run.good >= least, run.total - run.bad < least
        known = kept or missed or len(parts) == len(self.trial.seeds)
        return replace(run, kept=kept) if known else None

    def climb(self, name: str) -> Climb:
        """Where a contender is."""
        return Climb(self.grid, {rung: run.kept for rung, run in self.runs(name).items()})

    def goodput(self, name: str) -> Goodput:
        """What was found for a contender."""
        runs, low = self.runs(name), self.climb(name).low
        every = tuple(runs.values())
        return (
            Goodput.of(self.grid.rate(low), every, runs[low])
            if low is not None
            else Goodput(0.0, every, None)
        )

    # --------------------------------------------------------------------------------------- what is next

    def _climbing(self) -> Task | None:
        """The rung that most of those wait for who are still climbing; one that is under way goes first."""
        climbs = {name: self.climb(name) for name in self.names}
        wanted = Counter(climb.next for climb in climbs.values() if climb.next is not None)
        if not wanted:
            return None
        begun = {rung: any(self._open(name, rung, climbs[name]) for name in self.names) for rung in wanted}
        rung = max(wanted, key=lambda rung: (begun[rung], wanted[rung], -rung))
        asked = [name for name in self.names if climbs[name].tells(rung)]
        left = {name: [s for s in self.trial.seeds if s not in self.seeds(name, rung)] for name in asked}
        seed = next(seed for seed in self.trial.seeds if any(seed in each for each in left.values()))
        return self._task(rung, seed, not self.trial.full, [name for name in asked if seed in left[name]])

    def _open(self, name: str, rung: int, climb: Climb) -> bool:
        """Whether some of its seeds have run there, and the outcome is not known."""
        return bool(self.seeds(name, rung)) and rung not in climb.kept

    def _deciding(self) -> Task | None:
        """The lowest rung and seed for which somebody who is decided there, or a pair, was not seen whole."""
        climbs = {name: self.climb(name) for name in self.names}
        for rung in sorted({rung for climb in climbs.values() for rung in climb.deciding}):
            sets = self._needed(rung, climbs)
            for seed in self.trial.seeds:
                there = [r for r in self.rounds if (r.rung, r.seed) == (rung, seed)]
                missing = {n for pair in sets if not any(r.whole(*pair) for r in there) for n in pair}
                if missing:
                    return self._task(rung, seed, False, [name for name in self.names if name in missing])
        return None

    def _needed(self, rung: int, climbs: dict[str, Climb]) -> list[tuple[str, ...]]:
        """Who must be seen whole there, alone or in the same round."""
        near, found = self.grid.rungs(NEAR), []
        for name, climb in climbs.items():
            if rung in climb.deciding:
                lows = {other: each.low for other, each in climbs.items() if other != name}
                partners = [o for o, low in lows.items() if low is not None and abs(low - rung) <= near]
                found += [(name,), *((name, other) for other in partners)]
        return found

    def _task(self, rung: int, seed: int, early: bool, names: Sequence[str]) -> Task:
        turned = order(names, sum(1 for r in self.rounds if len(r.visits) > 1))
        return Task(
            rung,
            self.grid.rate(rung),
            seed,
            early,
            turned,
            tuple(self._others(name, rung, seed) for name in turned),
        )

    def _others(self, name: str, rung: int, seed: int) -> Others:
        known = [run for s, run in self.seeds(name, rung).items() if s != seed]
        total = self.trial.total - self.trial.requests
        return Others(total, sum(run.good for run in known), sum(run.bad for run in known))
