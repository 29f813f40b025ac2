"""`taichi bench goodput --compare`: carry out the rounds that bench/contest.py asks for, and keep them."""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from taichi_serve.bench.contest import Round, Task, Visit
from taichi_serve.bench.endpoint import EndpointError, EndpointGoneError
from taichi_serve.bench.kept import Kept, read, write
from taichi_serve.bench.openloop import OpenLoop
from taichi_serve.bench.probe import Probe, drift
from taichi_serve.bench.report import write as write_result
from taichi_serve.bench.score import DRIFT, Others, Run
from taichi_serve.bench.trial import Trial, measure
from taichi_serve.bench.workload import Workload
from taichi_serve.commands.contenders import Contender, without_key
from taichi_serve.commands.installed import machine, today, versions_with
from taichi_serve.commands.interrupts import Interrupts
from taichi_serve.commands.measure import line, progress_on, telling
from taichi_serve.commands.metering import Meter
from taichi_serve.commands.standing import Standing
from taichi_serve.commands.subserver import ServerError

FILE = "compare.json"
SETTLING = 1 << 31  # a seed that nobody measures with
CALM = 1.5  # seconds: vLLM's workers keep their cores busy for one second after their last step


def compared(
    args: argparse.Namespace,
    trial: Trial,
    field: dict[str, Contender],
    console: Console,
    interrupts: Interrupts,
) -> Kept:
    """Measure all of them, from where an earlier run of the same command was stopped, if there was one."""
    path = Path(args.out) / FILE if args.out else None
    flags = {name: without_key(one.flags) for name, one in field.items()}
    found = read(path) if path else None
    if found is None or not found.same(args.target, trial, flags):
        found = Kept(args.target, trial, flags, today(), machine(), {}, (), ())
    else:
        console.print(f"{len(found.rounds)} rounds of {found.date} are taken from {path}", soft_wrap=True)
        if found.contest.next() is None:
            return found
    standing = Standing(field, args.target, args.api_key, console, args.at_once)
    rounds = Rounds(found, standing, console, args.redo, args.settle, args.senders)
    failed = None
    try:
        return asyncio.run(interrupts.watch(rounds.run(path)))
    except EndpointGoneError as wrong:
        failed = rounds.visited
        raise ServerError(f"{failed}: {wrong}{standing.log(failed)}") from None
    finally:
        with interrupts.hold(), console.status("stopping the servers"):
            standing.stop(failed)


class Rounds:
    """Does the rounds of a comparison, one after the other."""

    def __init__(
        self, begun: Kept, standing: Standing, console: Console, redo: int, settle: float, senders: int = 1
    ) -> None:
        """A round during which the machine's speed moves is done again, `redo` times at most. Before the
        first one everybody is loaded for `settle` seconds. So many processes send the load."""
        self._begun, self._contest = begun, begun.contest
        self._standing, self._console, self._redo, self._settle = standing, console, redo, settle
        self._senders = senders
        self.visited = ""  # who is being visited, or was last

    async def run(self, path: Path | None) -> Kept:
        """Until all is known; what there is is written to `path` after every round."""
        trial, versions, limits = self._contest.trial, {}, []
        for name in self._contest.names:  # every one is seen up once, before hours of measuring
            self.visited = name
            async with await self._standing.meet(name) as endpoint:
                limits.append(endpoint.limit)
                versions[name] = versions_with(endpoint.version)
        requests = trial.lengths(min(limits))  # the same for all: they fit who takes the fewest tokens
        notes = (requests.note,) if requests.note else ()
        for note in notes:
            self._say(note)
        made = replace(self._begun, versions=versions, notes=notes)
        if self._settle:
            await self._settled(requests)
        with Probe.start() as probe:
            while (task := self._contest.next()) is not None:
                done = await self._round(task, requests, probe)
                self._contest.add(done)
                self._say(self.told(task, done))
                made = replace(made, rounds=tuple(self._contest.rounds))
                if path:
                    write(made, path)
        if path:
            for one in made.results:
                write_result(one, path.parent / f"{file_name(one.name)}.json")
        return made

    async def _settled(self, requests: Workload) -> None:
        """Load everybody as in the first round: who sets its own sliders has seen the workload then."""
        trial = self._contest.trial
        own = replace(trial, seeds=(SETTLING,), requests=max(1, round(self._settle * trial.start)))
        for name in self._contest.names:
            self.visited = name
            async with await self._standing.meet(name) as endpoint:
                with progress_on(self._console) as progress, telling(progress, name, own.total) as tell:
                    loop = OpenLoop(endpoint, senders=self._senders)
                    run = await measure(loop, own, requests, own.start, early=False, tell=tell)
            self._say(f"{line(name, run, 'settling')}; not counted")

    async def _round(self, task: Task, requests: Workload, probe: Probe) -> Round:
        thrown_away: list[tuple[float, ...]] = []
        while True:
            last = len(thrown_away) == self._redo
            visits, speeds, idle = await self._attempt(task, requests, probe, last)
            if len(visits) == len(task.names):
                shares = tuple(idle)
                return Round(task.rung, task.seed, tuple(visits), tuple(speeds), tuple(thrown_away), shares)
            thrown_away.append(tuple(speeds))
            self._say(f"the machine's speed moved by {drift(speeds):.1%}: the round is done again")

    async def _attempt(
        self, task: Task, requests: Workload, probe: Probe, last: bool
    ) -> tuple[list[Visit], list[float], list[float]]:
        """As far as the machine's speed stays; the last attempt is done to its end whatever it does."""
        visits: list[Visit] = []
        idle: list[float] = []
        salt = secrets.randbits(64)  # one for the round: everybody gets the same tokens, and nobody twice
        speeds = [probe.speed()]
        for name, others in zip(task.names, task.others, strict=True):
            self.visited = name
            async with await self._standing.meet(name) as endpoint:
                meter = await Meter.start(self._standing, name, endpoint)
                loop = OpenLoop(endpoint, salt, self._senders)
                run = await self._visit(name, task, others, loop, requests)
                usage, beside = await meter.read()
                idle.append(beside)
                await endpoint.settle()  # what was aborted is over before the machine is probed
                await asyncio.sleep(CALM)
            speeds.append(probe.speed())
            visits.append(Visit(name, run, usage))
            self._say(line(name, run, f"seed {task.seed}"))
            if drift(speeds) > DRIFT and not last:
                return visits[:-1], speeds, idle  # less than all: the attempt does not count
        return visits, speeds, idle

    async def _visit(self, name: str, task: Task, others: Others, loop: OpenLoop, requests: Workload) -> Run:
        own = replace(self._contest.trial, seeds=(task.seed,))
        what = f"{name} {task.rate:.3g}/s, seed {task.seed}"
        with progress_on(self._console) as progress, telling(progress, what, own.total) as tell:
            run = await measure(loop, own, requests, task.rate, task.early, tell, others)
        if run.failed == run.sent > 0:
            raise EndpointError(f"{name}: every request failed: {run.samples[0].error}")
        return run

    def told(self, task: Task, made: Round) -> str:
        """A round in words: what is known at its rate, how the machine moved, what idle servers took."""
        known = {name: self._contest.runs(name).get(task.rung) for name in task.names}
        words = [f"{n} {'kept' if run.kept else 'missed'}" for n, run in sorted(known.items()) if run]
        speeds = " ".join(f"{speed:.1f}" for speed in made.speeds)
        kept = ", and is kept" if made.drift > DRIFT else ""
        return (
            f"round {len(self._contest.rounds)}  {task.rate:.3g} requests/s, seed {task.seed}: "
            f"{', '.join(words) or 'open'}; machine {speeds}: moved by {made.drift:.1%}{kept}; "
            f"idle servers used {max(made.idle, default=0.0):.3f} cores"
        )

    def _say(self, words: str) -> None:
        self._console.print(words, soft_wrap=True, markup=False)


def file_name(contender: str) -> str:
    """Of its results: an address has characters that no file should have."""
    return re.sub(r"[^\w.+-]+", "-", contender)
