"""Runs on all cores: a task is the arguments of one, and results come in the order of the tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

from taichi_serve.bench.goodput import Tally
from taichi_serve.search.goodput import TARGET, Contender, Scene, attain

Run = tuple[Contender, float, int, int]  # rate (requests/s), requests, seed

_scene: Scene | None = None


def _start(scene: Scene) -> None:
    global _scene  # noqa: PLW0603  # a worker process has one scene, sent once and not with every task
    _scene = scene


def _attain(task: Run) -> Tally:
    assert _scene is not None
    return attain(_scene, *task, target=TARGET)


def _whole(task: Run) -> Tally:
    assert _scene is not None
    return attain(_scene, *task)


class Workers:
    """Runs on several processes, or in this one; results come in the order of the tasks."""

    def __init__(self, scene: Scene, pool: ProcessPoolExecutor | None) -> None:
        self.scene = scene
        self.pool = pool

    def attain(self, tasks: Iterable[Run]) -> list[Tally]:
        """One run for each task, which ends when its verdict is certain."""
        return list(self.pool.map(_attain, tasks, chunksize=2) if self.pool else map(_attain, tasks))

    def attain_all(self, tasks: Iterable[Run]) -> list[Tally]:
        """One run to its end for each task."""
        return list(self.pool.map(_whole, tasks, chunksize=1) if self.pool else map(_whole, tasks))


@contextmanager
def workers(scene: Scene, processes: int | None = None) -> Iterator[Workers]:
    """As many processes as there are cores, or as asked for; with one, everything runs here."""
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        _start(scene)
        yield Workers(scene, None)
        return
    context = get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=partial(_start, scene)) as pool:
        yield Workers(scene, pool)
