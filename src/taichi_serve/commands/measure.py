"""Measure one server, ours or a running one, and say on the terminal how far it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from taichi_serve.bench.endpoint import EndpointError, EndpointGoneError, meet
from taichi_serve.bench.openloop import OpenLoop, Tell
from taichi_serve.bench.score import Run, Score
from taichi_serve.bench.trial import Goodput, Trial, climb, measure
from taichi_serve.commands.interrupts import Interrupts
from taichi_serve.commands.subserver import ServerError, Subserver


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found, the version of the server, and what is to be known of the workload."""

    goodput: Goodput
    version: str
    notes: tuple[str, ...] = ()


async def running(
    name: str, url: str, api_key: str | None, trial: Trial, console: Console, senders: int = 1
) -> Measured:
    """The goodput of a server that runs, with a load from so many processes."""
    async with meet(url, api_key) as endpoint:
        requests, loop = trial.lengths(endpoint.limit), OpenLoop(endpoint, senders=senders)
        notes = (requests.note,) if requests.note else ()
        for note in notes:
            console.print(f"{name}  {note}", soft_wrap=True, markup=False)
        with progress_on(console) as progress:

            async def run(rate: float, early: bool) -> Run:
                with telling(progress, f"{name} {rate:.3g}/s", trial.total) as tell:
                    made = await measure(loop, trial, requests, rate, early and not trial.full, tell)
                console.print(line(name, made), soft_wrap=True, markup=False)
                if made.failed == made.sent > 0:
                    raise EndpointError(f"{url}: every request failed: {made.samples[0].error}")
                return made

            return Measured(await climb(trial.bracket, run), endpoint.version, notes)


def progress_on(console: Console) -> Progress:
    """A bar for the rate that is being measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    more = TextColumn("{task.fields[so_far]}")
    return Progress(*columns, more, TimeElapsedColumn(), console=console, transient=True)


@contextlib.contextmanager
def telling(progress: Progress, what: str, total: int) -> Iterator[Tell]:
    """A line of it, and who moves it."""
    bar = progress.add_task(what, total=total, so_far="")

    def tell(score: Score) -> None:
        progress.update(bar, completed=score.sent, so_far=so_far(score))

    try:
        yield tell
    finally:
        progress.remove_task(bar)


def so_far(score: Score) -> str:
    """The attainment of the requests whose outcome is known, and how many these are."""
    known = score.good + score.bad
    share = f"attainment {score.good / known:.1%}, " if known else ""
    bad = f"{score.bad} bad of at most {max(0, score.spare)}"
    return f"{share}{score.good} good, {bad}, {len(score.live)} under way"


def line(name: str, run: Run, verdict: str = "") -> str:
    """One rate in words; `verdict` is said instead of whether it was kept."""
    share = f"{run.least:.1%}" if run.whole else f"{run.least:.1%} to {run.most:.1%}"
    verdict = verdict or ("kept" if run.kept else "missed")
    failed = f", {run.failed} failed" if run.failed else ""
    cached = "" if run.cached is None else f", {run.cached:.1%} of the prompt tokens cached"
    doubts = "".join(f", {remark}" for remark in run.remarks)
    late = f", the client was up to {run.lag:.2f} s late" if run.lag > 0.1 else ""
    sent = f", {run.lateness.words}" if run.lateness else ""
    return (
        f"{name}  {run.rate:.3g} requests/s: {verdict}, attainment {share} of {run.total}, "
        f"{run.sent} sent{failed}{cached}{late}, {run.seconds:.0f} s{sent}{doubts}"
    )


def ours(
    name: str,
    words: tuple[str, ...],
    api_key: str | None,
    trial: Trial,
    console: Console,
    interrupts: Interrupts,
    senders: int = 1,
) -> Measured:
    """The goodput of `taichi serve` with these words, started for it and stopped after it."""
    server: Subserver | None = None
    keep = False
    try:
        with interrupts.hold():
            server = Subserver(list(words))
        return asyncio.run(interrupts.watch(_started(name, server, api_key, trial, console, senders)))
    except (ServerError, EndpointGoneError) as wrong:
        keep = True
        log = server.log if server else "not there"
        raise ServerError(f"{name}: {wrong}\nits log is {log}") from None
    finally:
        with interrupts.hold(), console.status("stopping the server"):
            if server is not None:
                server.stop(keep)


async def _started(
    name: str, server: Subserver, api_key: str | None, trial: Trial, console: Console, senders: int
) -> Measured:
    with console.status(f"{name}: starting the server") as status:
        async for said in server.sayings():
            status.update(f"{name}: {said}")
    return await running(name, server.url, api_key, trial, console, senders)
