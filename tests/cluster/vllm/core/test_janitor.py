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

from taichi_serve.cluster.vllm.belongings import SHARED
from taichi_serve.cluster.vllm.core import janitor
from taichi_serve.cluster.vllm.core.janitor import _remove
from taichi_serve.cluster.vllm.server import process as of_the_server

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
    assert janitor.shared_memory is of_the_server.shared_memory
    assert SHARED.findall(" /dev/shm/vllm_offload_server-i0.mmap\n") == [
        "/dev/shm/vllm_offload_server-i0.mmap"
    ]


def test_it_holds_nothing_open_that_somebody_waits_for_the_end_of(family: Family) -> None:
    held = Path(f"/proc/{family.core}/task/{family.core}/children").read_text().split()
    janitors = [pid for pid in held if int(pid) != family.worker]
    assert eventually(lambda: [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in janitors] == [5])


def test_in_a_directory_of_several_only_what_is_of_one_engine_is_removed(tmp_path: Path) -> None:
    theirs = ("i1.2.json", "taichi-x-i1.2.keys", "taichi-x-i10.flight", "direct-taichi-x-i3--taichi-x-i4--0")
    mine = ("i1.json", "i1.log", "taichi-x-i1.keys", "direct-taichi-x-i1--taichi-x-i3--0")
    for name in (*mine, *theirs):
        (tmp_path / name).touch()
    (tmp_path / "i1").mkdir()
    _remove(tmp_path, "i1", "taichi-x-i1")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


def test_the_directory_goes_with_the_last_of_them(tmp_path: Path) -> None:
    here = tmp_path / "taichi-x-node"
    here.mkdir()
    (here / "taichi-x-i1.keys").touch()
    (here / "kv-4711.json").write_text('{"engine_id": "taichi-x-i1"}')
    (here / "0a1b2c3d-0000-4000-8000-0123456789ab").touch()  # a socket of vLLM's own
    _remove(here, "i1", "taichi-x-i1")
    assert not here.exists()


def test_what_others_say_of_their_memory_stays(tmp_path: Path) -> None:
    (tmp_path / "kv-4711.json").write_text('{"engine_id": "taichi-x-i2"}')
    (tmp_path / "0a1b2c3d-0000-4000-8000-0123456789ab").touch()
    _remove(tmp_path, "i1", "taichi-x-i1")
    assert len(list(tmp_path.iterdir())) == 2
