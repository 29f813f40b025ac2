"""A worker that is forked has the OpenMP threads and cores that a program of its own has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.worker import forked

LOOK = """
import json, os, torch
torch.ones(1 << 20)
tasks = sorted(map(int, os.listdir("/proc/self/task")))
print(json.dumps([torch.get_num_threads(), [sorted(os.sched_getaffinity(task)) for task in tasks]]))
"""
IN_A_FORK = f"""
import os, sys
from taichi_serve.cluster.vllm.worker import forked
if not os.fork():
    forked.bind([int(core) for core in sys.argv[1].split()])
    exec({LOOK!r})
    sys.stdout.flush()
    os._exit(0)
assert os.wait()[1] == 0
"""


def openmp() -> str:
    """The OpenMP of PyTorch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    return str(next(path for place in ("../torch.libs", "lib") for path in (torch / place).glob("libgomp*")))


def looked(text: str, *words: str, **env: str) -> Any:
    library = {"LD_PRELOAD": openmp(), "OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", text, *words],
        env={**os.environ, **library, **env},
        capture_output=True,
        check=True,
    )
    return json.loads(told.stdout.decode().splitlines()[-1])


def test_where_there_are_fewer_cores_than_it_is_told_it_has_the_threads_that_pytorch_takes() -> None:
    cores = sorted(os.sched_getaffinity(0))
    asked = " ".join(map(str, (cores * 4)[: 2 * len(cores)]))  # each core twice, as two threads of one are
    threads, _ = looked(IN_A_FORK, asked)
    assert 1 <= threads <= 2 * len(cores)


@pytest.mark.parametrize("order", [list, lambda cores: cores[::-1], lambda cores: cores[-1:]])
def test_it_has_the_threads_and_the_cores_of_a_program(order: Callable[[list[int]], list[int]]) -> None:
    cores = order(sorted(os.sched_getaffinity(0))[:2])
    words = " ".join(map(str, cores))
    program = looked(LOOK, OMP_NUM_THREADS=str(len(cores)), GOMP_CPU_AFFINITY=words)
    assert program == [len(cores), [[core] for core in cores]]
    assert looked(IN_A_FORK, words) == program


@pytest.mark.parametrize(
    ("env", "cores"),
    [
        ({"GOMP_CPU_AFFINITY": "3 1"}, [3, 1]),
        ({}, []),
        ({"GOMP_CPU_AFFINITY": "3 1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, []),
    ],
)
def test_its_cores_are_what_vllm_says_to_openmp(
    env: dict[str, str], cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_CPU_AFFINITY", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert forked.chosen() == cores


@pytest.mark.parametrize(
    ("preload", "argv", "method"),
    [
        ("/lib/libtcmalloc.so:/lib/libgomp-6a.so.1", ["model"], "fork"),
        ("/lib/libiomp5.so", ["model"], "spawn"),
        ("", ["model"], "spawn"),
        ("/lib/libgomp-6a.so.1", ["model", "--numa-bind"], "spawn"),
    ],
)
def test_workers_are_forked_where_openmp_can_be_told(
    preload: str, argv: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preload)
    ran: list[str] = []
    kind = SimpleNamespace(worker_main=ran.append)
    module = SimpleNamespace(
        WorkerProc=kind, get_mp_context=lambda: SimpleNamespace(get_start_method=lambda: "spawn")
    )
    forked.fork_workers(argv, module)
    assert module.get_mp_context().get_start_method() == method
    monkeypatch.setattr(forked, "bind", lambda cores: ran.append("bound"))
    module.WorkerProc.worker_main("runs")
    assert ran == (["bound", "runs"] if method == "fork" else ["runs"])
