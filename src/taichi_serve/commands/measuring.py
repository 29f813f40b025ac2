"""What `taichi profile` does with vLLM: start the instances, measure them, and write the profile."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.identity import identity
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.fleet import fleet, prepare, scratch
from taichi_serve.cluster.vllm.server.probe import ProbedCluster
from taichi_serve.latency.identity import Identity, Setting
from taichi_serve.latency.profile import Profile, save
from taichi_serve.profiling.draft import Draft
from taichi_serve.profiling.grid import Grid, Limits
from taichi_serve.profiling.neighbours import Load, Neighbours
from taichi_serve.profiling.prober import Prober
from taichi_serve.profiling.survey import Survey, profile_of
from taichi_serve.sliders import Kind


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be measured, on instances with which words, and where it goes."""

    grid: Grid
    output: Path
    words: list[str]
    args: argparse.Namespace
    moves: bool
    neighbours: int

    def labelled(self, engine: Identity) -> Identity:
        """The engine, and how many neighbours are at work on its device."""
        more: dict[str, Setting] = {"neighbours": self.neighbours} if self.neighbours else {}
        return replace(engine, settings={**engine.settings, **more})


def task(grid: Grid, output: Path, words: list[str], moves: bool, neighbours: int) -> Task:
    """The same, parsed; exits as argparse does when words are wrong. Raises ValueError without the model."""
    prepare()
    args = flags.parse(words)
    if args.model.startswith(("/", ".", "~")) and not Path(args.model).is_dir():
        raise ValueError(f"{args.model}: no such directory")
    return Task(grid, output, args.argv, args, moves, neighbours)


async def measured(task: Task, console: Console) -> Profile:
    """The profile, written. Raises ValueError, OSError, StartError or LostError with one line to say."""
    with scratch(console.print) as here:
        config = flags.engine_config(task.words, here.path.name)
        part = task.output.with_name(task.output.name + ".part")
        draft = Draft(part, task.labelled(identity(config, task.args.model)))
        with console.status("starting the instances") as status:

            def waiting(text: str, seconds: float) -> None:
                status.update(f"{text} ({seconds:.0f} s)")

            told = status.update, waiting
            instances = fleet(task.args, task.words, config, here, lambda outputs: None, *told)
            async with instances as its:
                status.stop()
                profile = await _survey(task, draft, its.cluster, console)
    save(profile, task.output)
    draft.remove()
    return profile


async def _survey(task: Task, draft: Draft, cluster: VllmCluster, console: Console) -> Profile:
    for engine in cluster.engines:
        engine.client.tell("taichi_settle")
    sliders = flags.sliders(task.args)
    chunks = {kind: sliders.chunk(kind) for kind in Kind} if task.moves else None
    engine, *others = cluster.engines
    limits = _limits(engine.client.vllm_config, engine.kv_capacity)
    survey = Survey(task.grid, limits, draft, chunks)
    probed, names = ProbedCluster(cluster), [other.name for other in others[: task.neighbours]]
    neighbours = Neighbours(probed, names, Load.within(limits)) if names else None
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=survey.total, completed=survey.known)
        done = partial(_done, progress, bar, survey)
        await survey.run(Prober(probed, neighbours), done)
    return profile_of(draft, engine.kv_capacity)


def _done(progress: Progress, bar: TaskID, survey: Survey) -> None:
    progress.update(bar, completed=survey.known, total=survey.total)


def _limits(config: Any, kv_capacity: int) -> Limits:
    scheduler = config.scheduler_config
    return Limits(
        kv_capacity,
        config.model_config.max_model_len,
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
    )
