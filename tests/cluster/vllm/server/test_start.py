"""A core that its fork server failed is started again at once, unless it is to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cores import HERE, SOURCE, eventually

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server import forks, spawned
from taichi_serve.cluster.vllm.server.forks import Forks
from taichi_serve.cluster.vllm.server.process import EngineProcess, StartError
from taichi_serve.cluster.vllm.server.start import Launcher


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers without vLLM, in which an import starts a thread; programs that stay."""
    monkeypatch.setattr(forks, "FORK_SERVER", "forkable")
    monkeypatch.setattr(spawned, "CORE", "stay")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}")
    monkeypatch.setenv("FORKABLE_MODULES", "threaded")


def test_one_that_is_not_forked_is_a_program_with_the_same_name_log_and_directory(
    traced: None, tmp_path: Path
) -> None:
    said: list[str] = []
    its = Forks(tmp_path, said.append)
    one = EngineProcess("i0", tmp_path, [], {}, its)
    config: Any = None
    with pytest.raises(StartError, match=r"runs threads \(eternal\)"):
        one.wait_ready(config)
    assert one.again()
    assert one.pid and one.exitcode is None
    assert one.log.read_text() == ""
    assert not one.again(), "it is no fork server's any more"
    other = EngineProcess("i1", tmp_path, [], {}, its)
    assert other.pid and other.exitcode is None, "nobody asks a fork server again"
    assert len(said) == 1 and "runs threads (eternal)" in said[0]
    assert one.end() and other.end()
    its.close()


def test_one_whose_fork_server_is_killed_meanwhile_is_forked_by_another(
    traced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKABLE_MODULES", "numpy")
    said: list[str] = []
    its = Forks(tmp_path, said.append)
    config: Any = None
    one = EngineProcess("i0", tmp_path, [], {}, its)
    assert eventually(lambda: one.pid)
    assert not one.again(), "nobody failed it"
    assert its.server is not None
    first = its.server.pid
    os.kill(first, signal.SIGSTOP)
    others = [EngineProcess(name, tmp_path, [], {}, its) for name in ("i1", "i2")]
    os.kill(first, signal.SIGKILL)
    for other in others:
        with pytest.raises(StartError, match="killed by SIGKILL"):
            other.wait_ready(config)
    assert all(other.again() for other in others)
    assert its.server.pid != first
    assert eventually(lambda: all(other.pid for other in others))
    assert said == []
    assert all(process.end() for process in (one, *others))
    its.close()


def test_one_that_is_to_end_is_not_started_again(traced: None, tmp_path: Path) -> None:
    its = Forks(tmp_path, print)
    one = EngineProcess("i0", tmp_path, [], {}, its)
    config: Any = None
    with pytest.raises(StartError):
        one.wait_ready(config)
    one.kill()
    assert not one.again()
    assert one.end()
    its.close()


def test_where_there_can_be_no_program_either_the_error_says_so(
    traced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = Forks(tmp_path, print)
    one = EngineProcess("i0", tmp_path, [], {}, its)
    config: Any = None
    with pytest.raises(StartError):
        one.wait_ready(config)

    def full(*args: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(forks, "Spawned", full)
    with pytest.raises(StartError, match=r"instance i0 could not be started: .* temporarily unavailable"):
        one.again()
    assert one.end()
    its.close()


class Failing:
    """A process whose first starts fail, some of them by a fork server's fault."""

    def __init__(self, *faults: bool) -> None:
        self.faults = list(faults)
        self.configs: list[Any] = []

    def wait_ready(self, config: Any) -> None:
        self.configs.append(config)
        if self.faults:
            raise StartError("instance i0 did not start")

    def again(self) -> bool:
        return self.faults.pop(0)


async def test_a_start_is_repeated_where_a_fork_server_died_in_it_and_with_a_fresh_configuration() -> None:
    launcher: Any = SimpleNamespace(config={"blocks": None})
    fine: Any = Failing(True)
    assert await Launcher._up(launcher, fine) is fine.configs[1]
    assert fine.configs[0] is not fine.configs[1]
    broken: Any = Failing(True, False)
    with pytest.raises(StartError):
        await Launcher._up(launcher, broken)
