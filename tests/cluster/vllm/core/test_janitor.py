"""Whoever is killed, nothing of an engine stays: neither processes nor what they made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from taichi_serve.cluster.vllm.core import janitor
from taichi_serve.cluster.vllm.server import remains

SERVER = """
import subprocess, sys, time
core = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], process_group=0)
print(core.pid, flush=True)
core.wait()
time.sleep(60)
"""
CORE = """
import os, subprocess, sys, time
from pathlib import Path
from taichi_serve.cluster.vllm.core.janitor import watch
from taichi_serve.cluster.vllm.core.main import die_with_parent
die_with_parent(os.getppid())
directory = Path(sys.argv[1])
held = os.pipe()
watch(os.getppid(), directory)
worker = subprocess.Popen(["sleep", "60"])
(directory / "worker").write_text(str(worker.pid))
(directory / "ready").touch()
time.sleep(60)
"""


@dataclass
class Family:
    """A server, its core, and a worker that ends with nobody by itself."""

    directory: Path
    server: subprocess.Popen[str]
    core: int
    worker: int


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def runs(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def group(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == leader and runs(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    directory = tmp_path / "scratch"
    directory.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, CORE, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    core = int(server.stdout.readline())
    assert eventually((directory / "ready").exists, 20)
    yield Family(directory, server, core, int((directory / "worker").read_text()))
    for process in [server.pid, *group(core)]:
        if runs(process):
            os.kill(process, signal.SIGKILL)
    server.wait()
    server.stdout.close()


def test_a_killed_server_leaves_neither_processes_nor_its_directory(family: Family) -> None:
    family.server.kill()
    assert eventually(lambda: group(family.core) == [])
    assert not family.directory.exists()


def test_a_killed_core_takes_its_workers_along_and_leaves_the_server_its_directory(family: Family) -> None:
    os.kill(family.core, signal.SIGKILL)
    assert eventually(lambda: not runs(family.worker))
    assert eventually(lambda: group(family.core) == [], 10)
    assert runs(family.server.pid) and family.directory.exists()


def test_it_knows_all_shared_memory_that_the_server_knows() -> None:
    assert janitor.SHARED.pattern == remains.SHARED.pattern
    assert janitor.SHARED.findall(" /dev/shm/vllm_offload_server-i0.mmap\n") == [
        "/dev/shm/vllm_offload_server-i0.mmap"
    ]


def test_it_holds_nothing_open_that_somebody_waits_for_the_end_of(family: Family) -> None:
    held = Path(f"/proc/{family.core}/task/{family.core}/children").read_text().split()
    janitors = [pid for pid in held if int(pid) != family.worker]
    assert eventually(lambda: [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in janitors] == [5])
