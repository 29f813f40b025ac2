"""Instances come and leave over pretended engines, under a real keeper and a real scheduler."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

from house import Cluster, House, on_gpus, until

from taichi_serve.cluster.vllm.server import elastic
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.elastic import Change, Elastic, RefusedError, UnknownError
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Abort,
    Added,
    Arrived,
    Drained,
    Event,
    Finished,
    Joined,
    Lost,
    Outcome,
    Prefill,
    Prefilled,
    Removed,
    Stepped,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

P, D = Kind.P_HEAVY, Kind.D_HEAVY
ALIKE = Sliders(0, 2, 0, 256)


class Members(Cluster):
    """A cluster whose facts the scheduler hears at once."""

    def __init__(self, engines: list[Engine], scheduler: GlobalScheduler) -> None:
        super().__init__(engines)
        self.scheduler = scheduler
        self.reading: set[str] = set()  # whose KV is still read

    def tell(self, event: Event) -> None:
        self.told.append(("fact", event))
        self.scheduler.on(event)

    def serves(self, engine: Engine) -> bool:
        return engine in self.engines

    def lose(self, engine: Engine, why: str) -> None:
        super().lose(engine, why)
        if engine in self.engines:
            self.scheduler.on(Lost(1.0, engine.name, why))

    def join(self, engine: Engine) -> None:
        place = next(n for n, one in enumerate(self.engines) if one.name == engine.name)
        self.engines[place] = engine
        self.scheduler.on(Joined(1.0, engine.name, 1_000))
        self.joined.set()

    def add(self, engine: Engine, chunk: int | None) -> None:
        self.engines.append(engine)
        self.tell(Added(1.0, engine.name, engine.kind, engine.kv_capacity, chunk))

    def remove(self, name: str) -> Engine:
        engine = next(one for one in self.engines if one.name == name)
        self.engines.remove(engine)
        self.tell(Removed(1.0, name))
        engine.alive = False
        return engine

    def busy(self, engine: Engine) -> bool:
        return engine.name in self.reading


class Town(House):
    """The same house, open for others to come and leave."""

    def __init__(self, directory: Path, sliders: Sliders = ALIKE) -> None:
        super().__init__(directory)
        capacities = {"i0": 1_000, "i1": 1_000}
        self.scheduler = GlobalScheduler(sliders, SLO(2.0, 0.05), Learned(), Policy(), capacities)
        self.cluster: Members = Members(self.cluster.engines, self.scheduler)
        self.keeper._cluster = self.keeper._meetings._cluster = self.cluster
        self.devices = Devices(2, 1, "0;1")
        self.entered: list[int] = []
        self.elastic = Elastic(self.cluster, self.keeper, self.devices, self.scheduler, self.entered.append)

    @property
    def names(self) -> list[str]:
        return [engine.name for engine in self.cluster.engines]

    async def added(self, kind: Kind = D, **more: Any) -> str:
        name = self.elastic.add(kind, **more)
        await until(lambda: name in self.names)
        return name

    async def gone(self, name: str, within: float = 60.0) -> None:
        assert self.elastic.remove(name, within) is False
        await until(lambda: self.elastic.remove(name) is True)

    def decodes(self, request: str, on: str, movable: bool = True) -> None:
        """A request that decodes on this instance."""
        self.scheduler.on(Drained(0.0, next(n for n in self.names if n != on)))
        self.scheduler.on(Arrived(0.0, request, 100, 50, movable))
        assert self.scheduler.requests[request].instance == on
        self.scheduler.on(Drained(0.0, next(n for n in self.names if n != on), on=False))
        self.scheduler.on(Prefilled(0.1, request, 0, on))


@pytest.fixture
async def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Town:
    monkeypatch.setattr(elastic, "LOOK", 0.0)
    return Town(tmp_path)


async def test_one_that_is_added_has_its_name_at_once_and_takes_part_when_it_has_met_all(town: Town) -> None:
    town.launcher.loads = asyncio.Event()
    assert town.elastic.add(D, "7") == "i2"
    assert list(town.elastic.coming) == ["i2"]
    assert town.names == ["i0", "i1"]
    await until(lambda: town.launcher.begun == ["i2"])
    town.launcher.loads.set()
    await until(lambda: town.names == ["i0", "i1", "i2"])
    await until(lambda: any("i2 serves" in line for line in town.said))
    assert {("i0", "i2"), ("i2", "i0"), ("i1", "i2"), ("i2", "i1"), ("i2", "i2")} <= set(town.cluster.met)
    assert (town.entered, town.elastic.coming, town.devices.of(2)) == ([2], {}, "7")
    assert town.scheduler.sliders == Sliders(0, 3, 0, 256)
    assert town.elastic.counts[Change.ADDED] == 1
    assert town.keeper.supervisor.returns("i2", 0.0) == 0.0


async def test_one_that_does_not_start_is_told_and_its_name_is_not_given_again(town: Town) -> None:
    town.launcher.failures = 1
    name = town.elastic.add(D, "7")
    await until(lambda: bool(town.elastic.failures))
    (failure,) = town.elastic.failures
    assert (failure.name, failure.why) == (name, "instance i2 did not start (exit code 1): no memory")
    assert any(line.startswith("INSTANCE i2 COULD NOT BE ADDED: ") for line in town.said)
    assert town.elastic.counts[Change.FAILED] == 1
    assert town.names == ["i0", "i1"]
    assert town.scheduler.sliders.instances == 2
    assert town.elastic.remove(name) is True
    assert await town.added(devices="7") == "i3"


async def test_one_that_is_still_starting_can_be_taken_back(town: Town) -> None:
    town.launcher.loads = asyncio.Event()
    name = town.elastic.add(D, "7")
    await until(lambda: bool(town.launcher.begun))
    await town.gone(name)
    assert town.elastic.coming == {}
    assert town.names == ["i0", "i1"]


async def test_one_that_cannot_be_let_in_leaves_nothing_behind(town: Town, monkeypatch: Any) -> None:
    def full(engine: Engine, chunk: int | None) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(town.cluster, "add", full)
    name = town.elastic.add(D, "7")
    await until(lambda: bool(town.elastic.failures))
    assert town.elastic.failures[0].why == "RuntimeError: no room"
    assert (town.elastic.coming, town.entered, town.elastic.counts[Change.ADDED]) == ({}, [], 0)
    agree(town)
    with pytest.raises(KeyError):
        town.devices.of(2)
    assert town.elastic.remove(name) is True


async def test_its_devices_are_given_back_when_its_processes_are_gone_however_often_it_is_taken_back(
    town: Town, monkeypatch: Any
) -> None:
    town.cluster.hangs = lambda at, to: True  # it is up, and meets the others
    ended = threading.Event()
    name = town.elastic.add(D, "7")
    await until(lambda: bool(town.cluster.met))
    process = town.launcher.made[0].process
    monkeypatch.setattr(process, "end", ended.wait)
    for _ in range(3):
        assert town.elastic.remove(name) is False
        await asyncio.sleep(0.01)
    assert (list(town.elastic.coming), town.devices.of(2)) == ([name], "7")
    ended.set()
    await until(lambda: town.elastic.remove(name) is True)
    assert town.launcher.made[0].client.closed  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        town.devices.of(2)


async def test_one_that_leaves_while_it_is_started_again_keeps_its_devices_until_that_start_is_undone(
    town: Town, monkeypatch: Any
) -> None:
    town.cluster.hangs = lambda at, to: True
    ended = threading.Event()
    town.keeper.exited(town.cluster.engines[1], -9)
    await until(lambda: bool(town.cluster.met))
    monkeypatch.setattr(town.launcher.made[0].process, "end", ended.wait)
    town.elastic.remove("i1", 0.0)
    await until(lambda: town.names == ["i0"])
    await asyncio.sleep(0.01)
    assert (town.elastic.remove("i1"), town.devices.of(1)) == (False, "1")
    ended.set()
    await until(lambda: town.elastic.remove("i1") is True)


async def test_what_waits_for_one_that_hangs_ends_when_that_one_is_removed(town: Town) -> None:
    town.keeper.quarantine.lost("i9", [], ["p", "q"])  # an instance died under these two
    town.runs(1, "p#1", "p")
    assert town.keeper.quarantine.admit(Prefill("p", 1, "i1", hand_over=False))
    assert not town.keeper.quarantine.admit(Prefill("q", 1, "i0", hand_over=False))
    town.keeper.silence(town.cluster.engines[1], 6)
    assert town.keeper.quarantine.suspects["p"].hangs is not None
    town.elastic.remove("i1", 0.0)
    await until(lambda: town.elastic.remove("i1") is True)
    ((request, why),) = town.failed
    assert request == "p"
    assert why.endswith("i1: it did not answer when its time to leave was over")
    assert ("send", Abort("p", Outcome.FAILED, why)) in town.cluster.told
    assert [command.request for command in town.keeper.quarantine.over("p")] == ["q"]  # type: ignore[union-attr]
    assert town.launcher.begun == []


async def test_one_that_is_added_and_dies_comes_back_under_its_name(town: Town) -> None:
    name = await town.added(devices="7")
    town.keeper.exited(town.cluster.engines[2], -9)
    await town.joined()
    assert town.launcher.begun == ["i2", "i2.2"]
    assert town.cluster.engines[2].name == name


async def test_one_leaves_when_nothing_is_on_it_any_more(town: Town) -> None:
    town.decodes("a", "i1", movable=False)
    engine = town.cluster.engines[1]
    assert town.elastic.remove("i1") is False
    await asyncio.sleep(0)
    assert town.scheduler.instances["i1"].draining
    assert town.names == ["i0", "i1"]
    town.scheduler.on(Finished(1.0, "a", 5))
    town.cluster.reading.add("i1")  # its KV is still read
    for _ in range(20):
        await asyncio.sleep(0)
    assert town.names == ["i0", "i1"]
    town.cluster.reading.clear()
    await until(lambda: town.elastic.remove("i1") is True)
    assert town.names == ["i0"]
    assert engine.process.ended and engine.client.closed  # type: ignore[attr-defined]
    assert town.scheduler.sliders == Sliders(0, 1, 0, 256)
    assert (town.elastic.leaving, town.elastic.counts[Change.REMOVED]) == ({}, 1)
    assert list(town.keeper.supervisor.places) == ["i0"]
    assert town.delivered[-1].engine_index == 1  # vLLM's gauges of it show nothing from then on


async def test_what_is_still_there_when_its_time_is_over_goes_on_elsewhere_or_fails(town: Town) -> None:
    town.decodes("a", "i1", movable=False)
    await town.gone("i1", within=0.0)
    assert "a" not in town.scheduler.requests
    assert any("1 requests were still on it" in line for line in town.said)


async def test_a_second_word_may_bring_the_end_forward_and_never_puts_it_off(town: Town) -> None:
    town.decodes("a", "i1", movable=False)
    town.elastic.remove("i1", 600.0)
    until_then = town.elastic.leaving["i1"].until
    town.elastic.remove("i1", 6_000.0)
    assert town.elastic.leaving["i1"].until == until_then
    town.elastic.remove("i1", 0.0)
    await until(lambda: town.names == ["i0"])


async def test_the_last_one_who_serves_stays(town: Town) -> None:
    town.elastic.remove("i1")
    with pytest.raises(RefusedError, match="i0 is the last one that serves"):
        town.elastic.remove("i0")
    await until(lambda: town.names == ["i0"])
    with pytest.raises(RefusedError, match="last one"):
        town.elastic.remove("i0")
    with pytest.raises(UnknownError):
        town.elastic.remove("i7")


async def test_the_only_one_who_prefills_stays(tmp_path: Path) -> None:
    town = Town(tmp_path, Sliders(1, 1, 1024, 0))
    with pytest.raises(RefusedError, match=r"without instance i0: d_chunk is 0 .* nobody could prefill"):
        town.elastic.remove("i0")


async def test_one_that_was_lost_leaves_without_being_started_again(town: Town) -> None:
    town.launcher.loads = asyncio.Event()  # it never comes back
    town.keeper.exited(town.cluster.engines[1], -9)
    await until(lambda: town.launcher.begun == ["i1.2"])
    await town.gone("i1")
    assert town.names == ["i0"]
    assert not town.keeper._returning


async def test_one_that_dies_while_it_leaves_is_not_started_again(town: Town) -> None:
    town.decodes("a", "i1")
    town.cluster.reading.add("i1")
    town.elastic.remove("i1")
    await asyncio.sleep(0)
    town.keeper.exited(town.cluster.engines[1], -9)
    await until(lambda: town.names == ["i0"])
    assert town.launcher.begun == []
    assert "a" in town.scheduler.requests  # on its way to i0


async def test_when_all_others_are_out_for_good_who_was_to_leave_stays(town: Town) -> None:
    town.keeper.supervisor.limit = 0
    town.decodes("a", "i1", movable=False)
    town.elastic.remove("i1")
    town.keeper.exited(town.cluster.engines[0], -9)
    await until(lambda: any("i0 STAYS OUT" in line for line in town.said))
    town.elastic.leaving["i1"].until = 0.0
    await until(lambda: any("i1 stays: no other one is left" in line for line in town.said))
    assert not town.scheduler.instances["i1"].draining
    assert town.names == ["i0", "i1"]


async def test_a_chunk_that_is_not_that_of_the_kind_is_refused_and_takes_no_name(town: Town) -> None:
    with pytest.raises(ValueError, match="the chunk of D-heavy instances is 256"):
        town.elastic.add(D, "7", chunk=512)
    assert await town.added(P, devices="7", chunk=2048) == "i2"
    assert town.scheduler.sliders == Sliders(1, 2, 2048, 256)


async def test_devices_of_one_that_left_are_for_the_next(town: Town, monkeypatch: Any) -> None:
    on_gpus(monkeypatch, 2)
    with pytest.raises(RefusedError, match="no device is free: an instance takes 1, and of 2 visible ones 0"):
        town.elastic.add(D)
    await town.gone("i1")
    assert await town.added() == "i2"
    assert town.devices.of(2) == "1"


@pytest.mark.parametrize("seed", range(30))
async def test_whoever_comes_and_leaves_and_dies_all_books_agree_and_no_request_is_left(
    town: Town, seed: int
) -> None:
    """Random days: requests finish only where the scheduler says that they are, and all books agree."""
    chance, arrived = Random(seed), 0
    seen: set[str] = {"i0", "i1"}
    for _ in range(120):
        match chance.choices(("arrive", "work", "add", "leave", "die", "wait"), (30, 40, 4, 4, 3, 20))[0]:
            case "arrive":
                town.scheduler.on(Arrived(1.0, f"r{arrived}", 50, 20, chance.random() < 0.8))
                arrived += 1
            case "work":
                work(town, chance)
            case "add":
                name = town.elastic.add(chance.choice((P, D)), "0")
                assert name not in seen
                seen.add(name)
            case "leave":
                refused_or_known(town, chance)
            case "die":
                town.keeper.exited(chance.choice(town.cluster.engines), -9)
            case "wait":
                await asyncio.sleep(0.001)
        agree(town)
    await until(lambda: rest(town, chance))
    await until(lambda: not town.elastic.leaving and not town.elastic.coming)
    agree(town)
    await town.keeper.stop()


def work(town: Town, chance: Random) -> None:
    """Something goes on with one request."""
    if not town.scheduler.requests:
        return
    request = chance.choice(list(town.scheduler.requests.values()))
    here = request.instance
    if request.state.value == "prefilling" and here is not None:
        town.scheduler.on(Prefilled(1.0, request.id, request.leg, here, held=False))
    elif request.state.value == "decoding" and here is not None:
        town.scheduler.on(Stepped(1.0, here, 0.01, 0, 1, 100))
        if request.id in town.scheduler.requests and chance.random() < 0.5:
            town.scheduler.on(Finished(1.0, request.id, 3))
    elif request.state.value == "moving":
        town.scheduler.on(Finished(1.0, request.id, 3))


def refused_or_known(town: Town, chance: Random) -> None:
    name = chance.choice([*town.names, *town.elastic.coming])
    try:
        town.elastic.remove(name, chance.choice((0.0, 0.01, 60.0)))
    except RefusedError:
        return


def agree(town: Town) -> None:
    """The server and the scheduler know the same instances, and nobody is without one."""
    scheduler = town.scheduler
    assert set(scheduler.instances) == set(town.names) == set(town.keeper.supervisor.places)
    assert scheduler.sliders.instances == len(town.names)
    for request in scheduler.requests.values():
        assert {request.instance, request.target} - {None} <= set(town.names)


def rest(town: Town, chance: Random) -> bool:
    work(town, chance)
    return not town.scheduler.requests
