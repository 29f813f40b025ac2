"""Workers of a core that was forked are forked too, and get the cores that vLLM chose for them.

vLLM starts a worker of a CPU as a program of its own, because OpenMP reads the number of its threads and
their cores from the environment when it is loaded. In a worker that is forked it is loaded already, but has
no thread yet: nobody above it computes. So it is told.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.v1.executor import multiproc_executor

MANY = 1 << 20  # elements: PyTorch divides so many over all threads


def fork_workers(argv: list[str], module: Any = multiproc_executor) -> None:
    """Have this process, a core with this command line and vLLM's executor in `module`, fork its workers.

    They stay programs where OpenMP is not the one that comes with PyTorch (how another one could be told is
    not known), and with `--numa-bind` (vLLM starts them by way of `numactl`).
    """
    if not _library() or any(word.replace("_", "-").startswith("--numa-bind") for word in argv):
        return
    stock = module.WorkerProc.worker_main

    def worker_main(*args: Any, **kwargs: Any) -> None:
        bind(chosen())
        stock(*args, **kwargs)

    module.WorkerProc.worker_main = staticmethod(worker_main)
    module.get_mp_context = lambda: multiprocessing.get_context("fork")


def _library() -> str:
    """The file of the OpenMP that the kernels use: vLLM has it loaded before everything else."""
    names = os.environ.get("LD_PRELOAD", "").split(":")
    return next((name for name in names if "libgomp" in Path(name).name), "")


def chosen() -> list[int]:
    """The cores of this worker, as vLLM says them to OpenMP; none where it leaves them to the operator."""
    if envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        return []
    return [int(core) for core in os.environ.get("GOMP_CPU_AFFINITY", "").split()]


def bind(cores: list[int]) -> None:
    """Have as many OpenMP threads as cores, each on its own; this thread is the first of them."""
    if not cores:
        return
    ctypes.CDLL(_library()).omp_set_num_threads(len(cores))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores)
        before = _threads()
        torch.ones(MANY)
        # PyTorch may take fewer than it is told, where two of the cores are one with two threads.
        for thread, core in zip(sorted(_threads() - before), cores[1:], strict=False):
            os.sched_setaffinity(thread, {core})
    os.sched_setaffinity(0, cores[:1])


def _threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}
