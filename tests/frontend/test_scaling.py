"""The routes that add and remove instances, over an `Elastic` that does as it is told; and what is wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI

from taichi_serve.cluster.vllm.server.elastic import RefusedError, UnknownError
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.scale import scale, told
from taichi_serve.frontend.scaling import router
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Added,
    Arrived,
    Drained,
    Finished,
    Joined,
    Lost,
    Prefilled,
    Promised,
    Slid,
    Stepped,
    Tuned,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

P, D = Kind.P_HEAVY, Kind.D_HEAVY


class Elastic:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.raises: Exception | None = None
        self.is_gone = False

    def add(self, kind: Kind, devices: str | None, chunk: int | None) -> str:
        if self.raises is not None:
            raise self.raises
        self.asked.append((kind, devices, chunk))
        return "i2"

    def remove(self, name: str, within: float) -> bool:
        if self.raises is not None:
            raise self.raises
        self.asked.append((name, within))
        return self.is_gone

    def names(self) -> list[str]:
        return ["i0", "i1"]


class Door:
    """The routes, and what is behind them."""

    def __init__(self) -> None:
        self.elastic = Elastic()
        self.front = SimpleNamespace(closing=False)
        app = FastAPI()
        app.state.taichi = SimpleNamespace(elastic=self.elastic, front=self.front, max_chunk=2048)
        app.include_router(router)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")

    async def post(self, body: Any) -> httpx.Response:
        return await self.client.post("/taichi/instances", json=body)

    async def delete(self, path: str) -> httpx.Response:
        return await self.client.delete(f"/taichi/instances/{path}")


@pytest.fixture
def door() -> Door:
    return Door()


def message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


async def test_an_instance_that_is_added_has_a_name_at_once(door: Door) -> None:
    answer = await door.post({"kind": "d-heavy"})
    assert (answer.status_code, answer.json()) == (
        202,
        {"name": "i2", "kind": "D-heavy", "standing": "starting"},
    )
    await door.post({"kind": "P-heavy", "devices": "4,5", "chunk": 1024})
    assert door.elastic.asked == [(D, None, None), (P, "4,5", 1024)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "the body must be"),
        ([], "the body must be"),
        ({"kind": "d-heavy", "name": "mine"}, "the body must be"),
        ({"kind": "heavy"}, "kind must be one of p-heavy, d-heavy, not 'heavy'"),
        ({"kind": 1}, "kind must be one of"),
        ({"kind": "d-heavy", "devices": 3}, "devices must be a text, not 3"),
        ({"kind": "d-heavy", "chunk": 2049}, "chunk must be a whole number from 0 to 2048"),
        ({"kind": "d-heavy", "chunk": True}, "chunk must be a whole number"),
        ({"kind": "d-heavy", "chunk": -1}, "chunk must be a whole number"),
    ],
)
async def test_what_cannot_be_understood_starts_nothing(door: Door, body: Any, says: str) -> None:
    answer = await door.post(body)
    assert answer.status_code == 400
    assert says in message(answer)
    assert door.elastic.asked == []


async def test_what_cannot_be_done_now_is_a_conflict_that_says_why(door: Door) -> None:
    door.elastic.raises = RefusedError("no device is free")
    answer = await door.post({"kind": "d-heavy"})
    assert (answer.status_code, message(answer)) == (409, "no device is free")
    assert (await door.delete("i0")).status_code == 409
    door.elastic.raises = ValueError("the chunk of D-heavy instances is 256, not 512")
    assert (await door.post({"kind": "d-heavy", "chunk": 512})).status_code == 400
    door.elastic.raises, door.front.closing = None, True
    assert (await door.post({"kind": "d-heavy"})).status_code == 409


async def test_an_instance_leaves_within_the_time_that_is_said(door: Door) -> None:
    answer = await door.delete("i1?within=25")
    assert (answer.status_code, answer.json()) == (202, {"name": "i1", "standing": "leaving"})
    await door.delete("i1")
    assert door.elastic.asked == [("i1", 25.0), ("i1", 600.0)]
    door.elastic.is_gone = True
    answer = await door.delete("i1")
    assert (answer.status_code, answer.json()["standing"]) == (200, "gone")


@pytest.mark.parametrize("within", ["soon", "-1", "nan", "inf", "1e9"])
async def test_a_time_that_makes_no_sense_removes_nothing(door: Door, within: str) -> None:
    answer = await door.delete(f"i1?within={within}")
    assert (answer.status_code, door.elastic.asked) == (400, [])


async def test_an_instance_that_never_was_is_not_found(door: Door) -> None:
    door.elastic.raises = UnknownError("i7")
    answer = await door.delete("i7")
    assert (answer.status_code, message(answer)) == (404, "no instance 'i7'; there are i0, i1")


# ------------------------------------------------------------------------------------------- what is wanted


def recorder() -> Recorder:
    capacities = {"i0": 10_000, "i1": 10_000}
    scheduler = GlobalScheduler(Sliders(1, 1, 1024, 256), SLO(2.0, 0.05), Learned(), Policy(), capacities)
    return Recorder(scheduler, 2048)


def busy(here: Recorder, seconds: int) -> None:
    """i0 computes prompts for nine tenths of each second."""
    for at in range(seconds + 1):
        here.on(Stepped(float(at), "i0", 0.9, 512, 0, 0))


def test_busy_p_heavy_instances_ask_for_another_after_a_minute() -> None:
    here = recorder()
    busy(here, 30)
    found = scale(here, 30.0)
    assert (found[P].wanted, found[P].why) == (1, "it was counted for 30 s only")
    here = recorder()
    busy(here, 100)
    found = scale(here, 100.0)
    assert (found[P].now, found[P].wanted, found[D].wanted) == (1, 2, 1)
    said = told(here, 100.0)
    assert (said["wanted"], said["seconds"], said["kinds"]["P-heavy"]["wanted"]) == (3, 100.0, 2)
    assert said["kinds"]["P-heavy"]["use"]["prompts"] == pytest.approx(0.909)


def test_when_the_instance_is_there_counting_begins_anew() -> None:
    here = recorder()
    busy(here, 100)
    here.on(Added(100.0, "i2", P, 10_000))
    assert [scale(here, 130.0)[kind].wanted for kind in (P, D)] == [2, 1]


def test_who_is_lost_is_not_there_and_is_not_to_leave_because_of_it() -> None:
    here = recorder()
    busy(here, 100)
    here.on(Lost(100.0, "i1", "killed by SIGKILL"))
    found = scale(here, 110.0)[D]
    assert (found.now, found.wanted, found.why) == (0, 1, "it was counted for 10 s only")
    for at in range(110, 201):
        here.on(Stepped(float(at), "i0", 0.9, 512, 0, 0))
    found = scale(here, 200.0)[D]
    assert (found.now, found.wanted, found.why) == (0, 0, "none is there")


@pytest.mark.parametrize(
    "event",
    [
        Lost(100.0, "i1", "killed by SIGKILL"),
        Drained(100.0, "i1"),
        Slid(100.0, Sliders(2, 0, 1024, 256)),
        Tuned(100.0, Sliders(2, 0, 1024, 256), 0.5, 0.8, "", 0.0),
        Promised(100.0, SLO(1.0, 0.02)),
    ],
)
def test_what_was_asked_of_other_instances_says_nothing_about_these(event: Any) -> None:
    here = recorder()
    busy(here, 100)
    here.on(event)
    assert here.load.seconds(130.0) == 30.0


def test_counting_begins_anew_when_a_lost_one_is_back() -> None:
    here = recorder()
    here.on(Lost(0.0, "i1", "killed by SIGKILL"))
    busy(here, 100)
    here.on(Joined(100.0, "i1", 10_000))
    assert here.load.seconds(130.0) == 30.0
    assert scale(here, 130.0)[D].now == 1


def test_a_chunk_that_moves_and_what_changes_nothing_begin_nothing_anew() -> None:
    here = recorder()
    busy(here, 100)
    here.on(Tuned(100.0, Sliders(1, 1, 512, 256), 0.5, 0.8, "", 0.0))
    here.on(Drained(100.0, "i1", on=False))
    assert here.load.seconds(130.0) == 130.0


def test_who_is_drained_does_not_count() -> None:
    here = recorder()
    busy(here, 100)
    here.on(Drained(100.0, "i1"))
    assert scale(here, 101.0)[D].now == 0


def test_late_requests_ask_for_one_more_where_much_is_used() -> None:
    here = recorder()
    for at in range(101):
        here.on(Stepped(float(at), "i0", 0.5, 512, 0, 0))
    for number in range(30):
        name = f"r{number}"
        here.on(Arrived(50.0, name, 100, 50, movable=False))
        on = here.scheduler.requests[name].instance
        assert on is not None
        here.on(Prefilled(55.0, name, 0, on))  # 5 s, and 2 were promised
        here.on(Finished(56.0, name, 40))
    found = scale(here, 100.0)[P]
    assert (found.wanted, found.why) == (2, "prompts 50% used, and only 0% of requests are good")
