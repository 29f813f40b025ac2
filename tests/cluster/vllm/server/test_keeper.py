"""Instances are lost, started again and let in; a launcher and a cluster that do as they are told."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from house import House, until

from taichi_serve.messages import Abort, Outcome, Prefill


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
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.meetings.MEET_SECONDS", 1.0)
    house.cluster.hangs = lambda at, to: at.process.name == "i0"
    house.keeper.exited(house.cluster.engines[1], 1)
    await house.joined()
    assert house.launcher.begun == ["i1.2"]
    assert any("without having met everybody" in line and "i0 -> i1" in line for line in house.said)
    assert [word[0] for word in house.cluster.told] == ["lose", "abandon", "join"]


async def test_who_cannot_compute_by_itself_is_not_let_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taichi_serve.cluster.vllm.server.meetings.MEET_SECONDS", 1.0)
    house.cluster.hangs = lambda at, to: at.process.name == "i1.2" and to is None
    house.keeper.exited(house.cluster.engines[1], 1)
    await until(lambda: any("could not be started again" in line for line in house.said))
    assert not house.cluster.joined.is_set()
    await house.keeper.stop()


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


async def test_who_is_sent_from_one_instance_of_a_lost_host_to_the_next_is_not_ended(house: House) -> None:
    for index, engine in enumerate(list(house.cluster.engines)):
        house.runs(index, f"p#{index}", "p")
        house.runs(index, f"d#{index}", "d", tokens=50)
        engine.process.torn = True  # type: ignore[misc]  its holder is gone (hosts/held.py)
        house.keeper.exited(engine, -9)
    assert house.failed == []
    assert not house.keeper.quarantine
    await house.keeper.stop()


async def test_who_a_host_fell_silent_under_before_it_was_lost_is_no_suspect(house: House) -> None:
    for index, engine in enumerate(list(house.cluster.engines)):
        house.runs(index, f"p#{index}", "p")
        house.keeper.silence(engine, 6.0)
        assert set(house.keeper.quarantine.suspects) == {"p"}
    for engine in list(house.cluster.engines):
        engine.process.torn = True  # type: ignore[misc]
        house.keeper.exited(engine, -9)
    assert house.failed == []
    assert not house.keeper.quarantine
    await house.keeper.stop()


async def test_one_whose_connection_was_reset_is_ended_and_no_request_is_to_blame(house: House) -> None:
    engine = house.cluster.engines[1]
    house.runs(1, "p", "p")
    house.keeper.cut(engine)
    why = "a connection to it was reset, and what was on its way is lost"
    assert ("lose", "i1", why) in house.cluster.told
    assert engine.process.killed  # type: ignore[attr-defined]
    assert not house.keeper.quarantine
    await house.joined()
    assert house.launcher.begun == ["i1.2"]
    await house.keeper.stop()


async def test_who_is_given_up_is_lost_to_those_it_has_met_before_its_process_ends(house: House) -> None:
    house.cluster.fails = lambda at, to: at.process.name == "i0" and to is not None
    house.keeper.exited(house.cluster.engines[1], 1)
    await until(lambda: any("could not be started again" in line for line in house.said))
    assert house.cluster.told[1:] == [("lose", "i1.2", "it was given up")]
    await house.keeper.stop()


async def test_one_that_was_lost_while_it_was_to_leave_and_stays_comes_back_as_every_other_does(
    house: House,
) -> None:
    house.launcher.loads = asyncio.Event()
    engine = house.cluster.engines[1]
    house.keeper.leaves("i1")
    house.keeper.exited(engine, -9)
    assert house.launcher.begun == []
    house.keeper.stays(engine)
    await until(lambda: house.launcher.begun == ["i1.2"])
    house.keeper.leaves("i1")  # it is to leave again, and its start ends
    await asyncio.wait_for(house.keeper.settled("i1"), 10)
    house.keeper.stays(engine)
    house.launcher.loads.set()
    await house.joined()
    assert house.launcher.begun == ["i1.2", "i1.3"]


async def test_who_leaves_is_waited_for_as_long_as_anything_is_left_of_any_of_its_starts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    engine = house.cluster.engines[1]
    house.launcher.loads = asyncio.Event()
    monkeypatch.setattr(engine.process, "end", lambda: may_end.wait(10))
    house.cluster.fails = lambda at, to: True
    house.keeper.exited(engine, -9)
    may_end.set()
    await until(lambda: house.launcher.begun == ["i1.2"])
    may_end.clear()
    monkeypatch.setattr(house.launcher.made[0].process, "end", lambda: may_end.wait(10))
    house.launcher.loads.set()
    await until(lambda: ("lose", "i1.2", "it was given up") in house.cluster.told)
    house.keeper.leaves("i1")
    house.keeper.stays(engine)
    house.keeper.leaves("i1")  # before what it was told first is done
    settled = asyncio.ensure_future(house.keeper.settled("i1"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not settled.done()
    may_end.set()
    await asyncio.wait_for(settled, 10)
    assert house.launcher.begun == ["i1.2"]


async def test_one_that_stays_and_was_started_too_often_stays_out(tmp_path: Path) -> None:
    house = House(tmp_path, restarts=0)
    engine = house.cluster.engines[1]
    house.keeper.leaves("i1")
    house.keeper.exited(engine, -9)
    house.keeper.stays(engine)
    await until(lambda: any("i1 STAYS OUT: --restarts is 0" in line for line in house.said))
    assert house.launcher.begun == []
