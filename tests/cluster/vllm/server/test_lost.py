"""A fork server that is lost is followed by another one, and nobody waits for that one for ever."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cores import HERE, SECONDS, SOURCE, STAY, Cores, eventually, gone

from taichi_serve.cluster.vllm.forking import Refused
from taichi_serve.cluster.vllm.server import forks, spawned
from taichi_serve.cluster.vllm.server.forks import COSTS, ForkServer
from taichi_serve.cluster.vllm.server.spawned import Spawned

KILLED = "its fork server ended first, killed by SIGKILL"


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cores]:
    monkeypatch.setattr(forks, "FORK_SERVER", "forkable")
    monkeypatch.setattr(spawned, "CORE", "stay")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}")
    those = Cores(tmp_path)
    yield those
    those.forks.close()


def lose(cores: Cores) -> int:
    """Kill the fork server after it has forked a core; its pid."""
    core, pid = cores.running(), cores.server().pid
    os.kill(pid, signal.SIGKILL)
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert gone(core.pid)
    assert core.forsaken == KILLED
    assert cores.log().read_text() == f"ForkServerError: {KILLED}\n"
    return pid


def program(cores: Cores) -> None:
    """The next core is a program of its own."""
    core = cores.any(STAY)
    assert isinstance(core, Spawned)
    assert core.poll() is None
    core.kill_group()
    core.wait()
    core.close()


def test_one_that_is_killed_takes_its_cores_along_and_the_next_is_forked_by_another(
    cores: Cores,
) -> None:
    first = lose(cores)
    core = cores.running()
    assert cores.server().pid != first
    assert core.poll() is None
    assert cores.said == []


def test_when_the_one_that_followed_is_killed_within_ten_minutes_cores_are_programs(cores: Cores) -> None:
    lose(cores)
    lose(cores)
    program(cores)
    program(cores)
    assert cores.said == [f"engine processes are not forked but programs of their own: {KILLED}; {COSTS}"]
    assert cores.forks.server is None


def test_one_that_lasted_for_ten_minutes_is_followed_by_another_however_often(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forks.AGAIN_SECONDS == 600
    monkeypatch.setattr(forks, "AGAIN_SECONDS", 0.0)
    assert len({lose(cores) for _ in range(4)}) == 4
    assert cores.running().poll() is None
    assert cores.said == []


def test_one_that_never_forked_is_not_followed(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "endless")
    core = cores.begin(STAY)
    os.kill(cores.server().pid, signal.SIGKILL)
    assert core.wait(SECONDS) == -signal.SIGKILL
    program(cores)
    assert cores.said == [f"engine processes are not forked but programs of their own: {KILLED}; {COSTS}"]


@pytest.mark.parametrize("first", [True, False])
def test_where_none_can_be_made_cores_are_programs(
    first: bool, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    before = len(list(Path("/proc/self/fd").iterdir()))
    if not first:
        lose(cores)
        before += 1  # the core that nobody has closed
    monkeypatch.setattr(os, "memfd_create", forbidden)
    program(cores)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert "OSError: [Errno 1] Operation not permitted; each takes" in cores.said[0]


def test_where_the_one_that_follows_refuses_cores_are_programs(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(cores)
    monkeypatch.setenv("FORKABLE_MODULES", "threaded")
    core = cores.begin(STAY)
    assert not core.known()
    assert core.wait(SECONDS) == 1
    program(cores)
    assert len(cores.said) == 1 and "runs threads (eternal)" in cores.said[0]


def test_the_last_word_of_one_that_ended_before_it_read_all_is_heard() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"unread")
    its.send(msgspec.msgpack.encode(Refused("of a test")))
    its.close()
    server: Any = SimpleNamespace(_line=ours)
    assert ForkServer._next(server) == (Refused("of a test"), [])
    assert ForkServer._next(server) is None
    ours.close()


def test_nobody_waits_for_one_that_follows_and_does_not_come_up(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forks.IMPORT_SECONDS == 30
    monkeypatch.setattr(forks, "IMPORT_SECONDS", 0.1)
    lose(cores)
    monkeypatch.setenv("FORKABLE_MODULES", "endless")
    one, other = cores.begin(STAY), cores.begin(STAY)
    pid = cores.server().pid
    for core in (one, other):
        assert not core.known()
        assert core.forsaken == "its fork server has not answered for 0.2 s"
        cores.forks.failed(core)
        core.kill_group()
        core.close()
    program(cores)
    assert len(cores.said) == 1 and "has not answered for 0.2 s" in cores.said[0]
    assert eventually(lambda: gone(pid))


def test_one_that_nobody_needed_is_followed_and_the_next_is_not_waited_for_longer(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(cores)
    with monkeypatch.context() as hanging:
        hanging.setenv("FORKABLE_MODULES", "endless")
        core = cores.begin(STAY)
    core.kill_group()
    assert core.wait(SECONDS) == -signal.SIGKILL
    assert cores.running().poll() is None
    assert cores.server().within == forks.IMPORT_SECONDS
    lose(cores)
    program(cores)
