"""Instances are lost, started again and let in; a launcher and a cluster that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from instances import instance
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.keeper import Keeper, Told
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.messages import Abort, Command, Outcome, Prefill


@dataclass
class Launcher:
    """Starts instances at once, or fails as often as it is told to."""

    directory: Path
    failures: int = 0
    begun: list[str] = field(default_factory=list)
    made: list[Engine] = field(default_factory=list)

    def begin(self, index: int, turn: int) -> Any:
        engine = instance(self.directory, index, turn)
        self.begun.append(engine.process.name)
        self.made.append(engine)
        return engine.process

    async def ready(self, process: Any, index: int, kind: Any, chunk: int) -> Engine:
        if self.failures:
            self.failures -= 1
            raise StartError(f"instance {process.name} did not start (exit code 1): no memory")
        return next(engine for engine in self.made if engine.process is process)


class Cluster:
    """A cluster that keeps what it is told; its rehearsals succeed unless it is told otherwise."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.told: list[tuple[Any, ...]] = []
        self.met: list[tuple[str, str]] = []
        self.fails: Callable[[Engine, Engine | None], bool] = lambda at, to: False
        self.hangs: Callable[[Engine, Engine | None], bool] = lambda at, to: False
        self.joined = asyncio.Event()

    def serves(self, engine: Engine) -> bool:
        return engine in self.engines

    def lose(self, engine: Engine, why: str) -> None:
        engine.alive = False
        self.told.append(("lose", engine.process.name, why))

    def join(self, engine: Engine) -> None:
        self.engines[engine.index] = engine
        self.told.append(("join", engine.process.name))
        self.joined.set()

    def silence(self, engine: Engine, on: bool) -> None:
        self.told.append(("silence", engine.process.name, on))

    def hopeless(self, why: str) -> None:
        self.told.append(("hopeless", why))

    def send(self, command: Command) -> None:
        self.told.append(("send", command))

    def rehearse(self, request: EngineCoreRequest, at: Any, to: Any) -> asyncio.Future[int]:
        self.met.append((at.process.name, (to or at).process.name))
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if not self.hangs(at, to):
            done.set_result(0 if self.fails(at, to) else 2)
        return done

    def abandon(self, request_id: str, cancelled: bool) -> None:
        self.told.append(("abandon", request_id))


class House:
    """A keeper of two instances, and whom it speaks to."""

    def __init__(self, directory: Path, restarts: int = 10) -> None:
        self.cluster = Cluster([instance(directory, 0), instance(directory, 1)])
        self.launcher = Launcher(directory)
        self.said: list[str] = []
        self.delivered: list[EngineCoreOutputs] = []
        self.failed: list[tuple[str, str]] = []
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        told = Told(
            self.said.append,
            self.delivered.append,
            lambda request, why: self.failed.append((request, why)),
            self.over.set_result,
        )
        launcher: Any = self.launcher
        self.keeper = Keeper(
            self.cluster, launcher, Supervisor(["i0", "i1"], restarts, 30.0), Quarantine(), told
        )
        self.keeper.open()

    async def joined(self) -> None:
        await asyncio.wait_for(self.cluster.joined.wait(), 10)
        await asyncio.sleep(0)

    def runs(self, index: int, leg: str, request: str, tokens: int = 0) -> None:
        """A request whose leg is there; with tokens it decodes."""
        engine = self.cluster.engines[index]
        journey: Any = SimpleNamespace(id=request, tokens=[1] * tokens, warm=None)
        engine.legs[leg] = journey
        if tokens:
            engine.residents[leg] = request


async def until(holds: Callable[[], bool]) -> None:
    """Let the others run until this is so."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  nobody here sets an event
            await asyncio.sleep(0)


@pytest.fixture
async def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_a_lost_instance_is_ended_started_under_a_new_name_met_twice_and_let_in(house: House) -> None:
    dead = house.cluster.engines[1]
    house.keeper.exited(dead, -9)
    assert house.cluster.told == [("lose", "i1", "killed by SIGKILL")]
    await house.joined()
    assert dead.process.killed and dead.process.ended and dead.client.closed  # type: ignore[attr-defined]
    assert house.launcher.begun == ["i1.2"]
    turn = {("i1.2", "i0"), ("i0", "i1.2"), ("i1.2", "i1.2")}
    assert house.cluster.met.count(("i0", "i1.2")) == 2
    assert set(house.cluster.met) == turn
    assert house.cluster.told[1:] == [("join", "i1.2")]
    assert house.keeper.supervisor.places["i1"].restarts == 1
    assert [line.split(";")[0] for line in house.said[:2]] == [
        "instance i1 ended: killed by SIGKILL",
        "instance i1 is started again now",
    ]


async def test_the_figures_of_a_dead_instance_are_zero_at_once(house: House) -> None:
    engine = house.cluster.engines[1]
    engine.running, engine.waiting, engine.kv_tokens = 3, 2, 700
    house.keeper.exited(engine, 1)
    (outputs,) = house.delivered
    assert outputs.engine_index == 1
    assert outputs.scheduler_stats is not None
    assert (outputs.scheduler_stats.num_running_reqs, outputs.scheduler_stats.kv_cache_usage) == (0, 0.0)
    assert (engine.running, engine.waiting, engine.kv_tokens) == (0, 0, 0)


async def test_one_death_is_noticed_in_three_ways_and_counts_once(house: House) -> None:
    engine = house.cluster.engines[0]
    house.keeper.broke(engine, RuntimeError("what was that"))
    house.keeper.exited(engine, 1)
    house.keeper.stalled(engine, 120)
    await house.joined()
    assert house.cluster.told == [("lose", "i0", "RuntimeError: what was that"), ("join", "i0.2")]
    assert house.keeper.losses == 1


async def test_a_start_that_fails_is_tried_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.supervisor.LONGEST_DELAY", 0.0)
    house.launcher.failures = 2
    house.keeper.exited(house.cluster.engines[1], 1)
    await house.joined()
    assert house.launcher.begun == ["i1.2", "i1.3", "i1.4"]
    assert house.keeper.supervisor.places["i1"].restarts == 1
    assert sum("no memory" in line for line in house.said) == 2


async def test_with_no_restarts_left_it_stays_out_and_when_it_was_the_last_that_is_the_end(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, restarts=0)
    house.keeper.exited(house.cluster.engines[0], 1)
    house.keeper.exited(house.cluster.engines[1], 1)
    why = await asyncio.wait_for(house.over, 10)
    assert "none is started again" in why
    await until(lambda: sum("STAYS OUT: --restarts is 0" in line for line in house.said) == 2)
    assert [word for word in house.cluster.told if word[0] == "hopeless"] == [("hopeless", why)]
    assert sum("STAYS OUT: --restarts is 0" in line for line in house.said) == 2
    assert house.launcher.begun == []


async def test_two_that_come_back_together_meet_each_other(house: House) -> None:
    house.keeper.exited(house.cluster.engines[0], -9)
    house.keeper.exited(house.cluster.engines[1], -9)
    await house.joined()
    await until(lambda: len([word for word in house.cluster.told if word[0] == "join"]) == 2)
    assert {("i0.2", "i1.2"), ("i1.2", "i0.2")} <= set(house.cluster.met)


async def test_a_pair_that_cannot_move_is_a_start_that_failed(house: House) -> None:
    house.cluster.fails = lambda at, to: at.process.name == "i0" and to.process.name == "i1.2"
    house.keeper.exited(house.cluster.engines[1], 1)
    await until(lambda: any("i0 -> i1" in line for line in house.said))
    assert house.launcher.made[0].process.ended  # type: ignore[attr-defined]
    await house.keeper.stop()


async def test_whoever_is_too_busy_to_meet_it_keeps_nobody_out(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.keeper.MEET_SECONDS", 1.0)
    house.cluster.hangs = lambda at, to: at.process.name == "i0"
    house.keeper.exited(house.cluster.engines[1], 1)
    await house.joined()
    assert house.launcher.begun == ["i1.2"]
    assert any("without having met everybody" in line and "i0 -> i1" in line for line in house.said)
    assert [word[0] for word in house.cluster.told] == ["lose", "abandon", "join"]


async def test_who_cannot_compute_by_itself_is_not_let_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.keeper.MEET_SECONDS", 1.0)
    house.cluster.hangs = lambda at, to: at.process.name == "i1.2" and to is None
    house.keeper.exited(house.cluster.engines[1], 1)
    await until(lambda: any("could not be started again" in line for line in house.said))
    assert not house.cluster.joined.is_set()
    await house.keeper.stop()


async def test_a_silent_one_is_met_when_it_answers_and_not_before(house: House) -> None:
    house.keeper.silence(house.cluster.engines[0], 6)
    house.keeper.exited(house.cluster.engines[1], -9)
    await house.joined()
    assert set(house.cluster.met) == {("i1.2", "i1.2")}
    house.keeper.answered(house.cluster.engines[0])
    assert ("silence", "i0", False) not in house.cluster.told
    await until(lambda: ("silence", "i0", False) in house.cluster.told)
    assert {("i0", "i1.2"), ("i1.2", "i0")} <= set(house.cluster.met)


async def test_a_request_that_two_instances_die_under_is_ended_with_the_reason_and_nobody_else(
    house: House,
) -> None:
    house.runs(1, "p", "p")
    house.runs(1, "q", "q")  # queued, and not in the step
    house.runs(1, "d", "d", tokens=50)
    house.cluster.engines[1].process.computes("p")  # type: ignore[attr-defined]
    house.keeper.exited(house.cluster.engines[1], 1)
    quarantine = house.keeper.quarantine
    assert set(quarantine.suspects) == {"p", "d"}
    assert house.failed == []
    quarantine.made("d", 2)
    assert quarantine.admit(Prefill("p", 1, "i0", hand_over=False))
    house.runs(0, "p#1", "p")
    house.runs(0, "d#1", "d", tokens=52)
    house.cluster.engines[0].process.computes("p#1")  # type: ignore[attr-defined]
    house.keeper.exited(house.cluster.engines[0], 1)
    ((request, why),) = house.failed
    assert request == "p"
    assert why == "two instances died while they computed this request; i0: exit code 1"
    assert ("send", Abort("p", Outcome.FAILED, why)) in house.cluster.told
    await house.keeper.stop()


async def test_rehearsals_are_no_suspects(house: House) -> None:
    house.runs(1, "w", "taichi-warm-1", tokens=1)
    house.cluster.engines[1].legs["w"].warm = object()
    house.keeper.exited(house.cluster.engines[1], 1)
    assert not house.keeper.quarantine
    await house.keeper.stop()


async def test_where_an_engine_left_no_word_every_prompt_there_is_a_suspect(house: House) -> None:
    house.runs(1, "p", "p")
    house.runs(1, "q", "q")
    house.keeper.exited(house.cluster.engines[1], 1)
    assert set(house.keeper.quarantine.suspects) == {"p", "q"}
    await house.keeper.stop()
