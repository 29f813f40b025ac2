"""What once killed a worker does so no more; and whoever is killed, nothing is left behind within seconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from servers import Server, eventually

SECONDS = 5.0  # in which everything has to be gone


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two instances with chunks far smaller than the prompts, over NIXL's and our own sockets and files."""
    one = Server(tmp_path_factory.mktemp("killed"), "--d-heavy", "2", "--d-chunk", "64")
    try:
        yield one.wait_ready()
    finally:
        one.end()


def ask(server: Server, **more: object) -> list[str]:
    """The texts of a completion's choices."""
    body = {"model": "tiny", "prompt": list(range(300, 800)), "max_tokens": 40, **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in sorted(answer.json()["choices"], key=lambda c: int(c["index"]))]


def test_seeded_choices_of_a_prompt_in_many_chunks_kill_no_worker_and_come_again(server: Server) -> None:
    wish = {"n": 3, "seed": 7, "temperature": 0.8, "stop": ["\x00never\x00"]}
    first = ask(server, **wish)
    assert len(set(first)) == 3
    assert ask(server, **wish) == first
    assert all(instance["alive"] for instance in server.state()["instances"])


def test_the_workers_of_a_killed_core_end_with_it(server: Server) -> None:
    core = psutil.Process(server.instance("i1")["pid"])
    below = core.children(recursive=True)
    assert below
    core.kill()
    _, alive = psutil.wait_procs(below, timeout=SECONDS)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_server_leaves_neither_processes_nor_memory_nor_files(server: Server) -> None:
    family, shared = server.family(), server.shared_memory()
    began = time.monotonic()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    gone = [process for process in family if process.pid != server.process.pid]

    def clean() -> bool:
        alive = [p for p in gone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        left = [path for path in shared if path.exists()]
        return not alive and not left and not list(server.directory.glob("taichi-*"))

    eventually(clean, SECONDS, f"nothing is left of {[p.pid for p in gone]}, {shared}")
    assert time.monotonic() - began < SECONDS + 1
    assert str(server.directory) not in Path("/proc/net/unix").read_text()
