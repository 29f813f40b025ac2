"""An engine core keeps to the cores on which nobody computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.process import EngineProcess

WITH_A_THREAD = """
import threading
print("up", flush=True)
threading.Thread(target=input, daemon=True).start()
input()
"""


def test_a_thread_that_ends_meanwhile_leaves_none_of_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def tell(thread: int, cores: set[int]) -> None:
        told.append(thread)
        if len(told) == 1:
            raise ProcessLookupError

    threads = [Path("/proc/7/task/7"), Path("/proc/7/task/8"), Path("/proc/7/task/9")]
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(threads))
    monkeypatch.setattr(os, "sched_setaffinity", tell)
    own: Any = SimpleNamespace(pid=7)
    EngineProcess.run_on(own, {0})
    assert told == [7, 8, 9]


def test_all_its_threads_do() -> None:
    everywhere, one = os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}
    with subprocess.Popen(
        [sys.executable, "-c", WITH_A_THREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        own: Any = SimpleNamespace(pid=process.pid)
        EngineProcess.run_on(own, set())
        assert os.sched_getaffinity(process.pid) == everywhere
        EngineProcess.run_on(own, one)
        tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
        assert [os.sched_getaffinity(int(task.name)) for task in tasks] == [one] * len(tasks)
        process.kill()
    EngineProcess.run_on(own, one)  # it is gone: nothing happens
