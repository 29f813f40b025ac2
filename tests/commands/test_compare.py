"""Rounds as they are carried out, with servers, load and probe that are made by hand."""

from __future__ import annotations

import contextlib
import io
import os
import time
from dataclasses import replace
from typing import ClassVar

import pytest
from contests import TRIAL, play, run
from rich.console import Console

from taichi_serve.bench import kept as files
from taichi_serve.bench import pairtable
from taichi_serve.bench.contest import Task
from taichi_serve.bench.endpoint import EndpointGoneError
from taichi_serve.bench.kept import Kept
from taichi_serve.bench.pairs import pairs
from taichi_serve.bench.score import Others
from taichi_serve.bench.usage import Usage
from taichi_serve.commands import compare, standing
from taichi_serve.commands.contenders import Contender, at
from taichi_serve.commands.family import available, cpu_seconds
from taichi_serve.commands.metering import Reading
from taichi_serve.commands.standing import Standing
from taichi_serve.commands.subserver import ServerError

BEGUN = Kept("tiny", TRIAL, {"A": (), "B": ()}, "2026-11-26", "2 cores", {}, (), ())


class Endpoint:
    limit, version = 4096, "0.32.0"

    def __init__(self):
        self.moved = 0

    async def settle(self):
        pass

    async def moves(self):
        self.moved += 3
        return {"hand-over": self.moved, "degrade": 0}


class Servers:
    """Stand there: who is visited uses two seconds of processor time, the others none."""

    used = 0.0

    async def meet(self, name):
        return contextlib.nullcontext(Endpoint())

    def reading(self, name):
        self.used += 2.0
        return Reading(self.used, 0.0, None)


class Probe:
    """Says these speeds one after the other, and then 10 for ever."""

    def __init__(self, *speeds):
        self.speeds = list(speeds)

    def speed(self):
        return self.speeds.pop(0) if self.speeds else 10.0

    @classmethod
    def start(cls):
        return contextlib.nullcontext(cls())


@pytest.fixture
def measured(monkeypatch):
    """Whom the load was sent to, with which salt: A keeps 2.4 requests/s, B 3.1."""
    asked = []

    async def measure(loop, trial, requests, rate, early, tell, others=Others()):
        seed = trial.seeds[0]
        task = Task(0, rate, seed, early, (), ())
        name = "AB"[len(asked) % 2]
        asked.append((name, rate, seed, loop))
        return run(task, others, rate <= 2.4)

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "OpenLoop", lambda endpoint, salt=None, senders=1: salt)
    monkeypatch.setattr(compare, "CALM", 0.0)
    monkeypatch.setattr(compare, "Probe", Probe)
    return asked


def rounds(redo=2, settle=0.0):
    said = io.StringIO()
    return compare.Rounds(BEGUN, Servers(), Console(file=said, width=500), redo, settle), said


def task():
    found = BEGUN.contest.next()
    assert found is not None
    return found


async def test_everybody_is_loaded_at_the_first_rate_before_anything_counts(measured):
    doing, said = rounds(settle=30.0)
    await doing._settled(None)
    assert [(name, rate, seed) for name, rate, seed, _ in measured] == [
        ("A", TRIAL.start, compare.SETTLING),
        ("B", TRIAL.start, compare.SETTLING),
    ]
    assert said.getvalue().count("not counted") == 2
    assert not doing._contest.rounds


async def test_a_calm_round_is_done_once_and_everybody_gets_the_same_tokens(measured):
    made = await rounds()[0]._round(task(), None, Probe(10.0, 10.4, 10.2))
    assert (made.speeds, made.thrown_away) == ((10.0, 10.4, 10.2), ())
    assert [visit.name for visit in made.visits] == ["A", "B"]
    assert [visit.usage for visit in made.visits] == [Usage(cpu=2.0, moves={"hand-over": 3})] * 2
    assert made.idle == (0.0, 0.0)
    (_, _, _, salt), (_, _, _, other) = measured
    assert salt == other


async def test_a_round_during_which_the_machine_moved_is_done_again_from_its_beginning(measured):
    doing, said = rounds()
    made = await doing._round(task(), None, Probe(10.0, 10.6, 10.0, 10.1, 10.7, 10.0, 10.1, 10.2))
    # The first attempt ends after its first visit, the second after its second one.
    assert made.thrown_away == ((10.0, 10.6), (10.0, 10.1, 10.7))
    assert made.speeds == (10.0, 10.1, 10.2)
    assert len(measured) == 5
    assert len({salt for _, _, _, salt in measured}) == 3  # what was sent before is in prefix caches
    assert "the machine's speed moved by 6.0%: the round is done again" in said.getvalue()


async def test_a_round_that_moved_every_time_is_kept_and_marked(measured):
    doing, _ = rounds(redo=1)
    made = await doing._round(task(), None, Probe(10.0, 12.0, 10.0, 12.0, 9.0))
    assert (len(made.visits), made.thrown_away) == (2, ((10.0, 12.0),))
    assert made.drift == pytest.approx(12 / 9 - 1)
    assert made.run("A").remarks == ("the machine's speed moved by 33%",)


async def test_all_rounds_are_written_as_they_are_done_and_read_back(measured, tmp_path):
    doing, said = rounds()
    begun = replace(BEGUN, versions={})
    requests = tmp_path / "compare.json"
    made = await doing.run(requests)
    assert begun.same("tiny", TRIAL, made.flags)
    assert files.read(requests) == made
    assert made.contest.next() is None
    assert [result.goodput.rate for result in made.results] == pytest.approx([1.1**9] * 2)
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "A.json", "B.json"}
    assert "A kept, B kept; machine 10.0 10.0 10.0: moved by 0.0%" in said.getvalue().replace("\n", " ")
    assert not made.same("tiny", replace(TRIAL, requests=1), made.flags)
    assert not made.same("tiny", TRIAL, {"A": ()})
    requests.write_text('{"target": "ti')
    assert files.read(requests) is None


def test_the_table_of_pairs_by_hand():
    contest = play({"A": 2.4, "B": 2.6, "C": 1e9})
    found = pairs(contest)
    first, second, *_ = pairtable.rows(found)
    assert first[:2] == ("A / B", "0.909 (0.909 to 0.909)")
    assert first[2:4] == ("behind", "2.36")
    assert second[:4] == ("", "", "", "2.59")
    assert second[5] == "0 and 50 of 200"
    assert ("A / C", "-", "one of them is only a bound", "-", "-", "-") in pairtable.rows(found)
    assert pairtable.lines(found)[0] == "A / B: goodput 0.909 (0.909 to 0.909), behind"
    contest.rounds[0] = replace(
        contest.rounds[0], speeds=(10.0, 11.0, 10.0, 10.0), thrown_away=((10.0, 12.0),), idle=(0.02, 0.03)
    )
    assert pairtable.machine(contest) == (
        f"The machine's speed moved by 10.0% over all {len(contest.rounds)} rounds, and by 10.0% at most "
        "within one that counts; done again 1, kept though it moved by more than 5% 1. Idle servers used "
        "0.030 cores at most."
    )
    assert pairtable.machine(contest) in pairtable.markdown(contest, found)
    assert b'"only_second": 50' in pairtable.as_json(contest, found)


# ----------------------------------------------------------------------------------------- servers that stand


class Server:
    """Starts unless there is one too many of them."""

    room = 2
    up: ClassVar[list[str]] = []

    def __init__(self, words, env=None):
        self.name, self.pid, self.log, self.ended = words[-1], os.getpid(), "the log", None
        self.url = f"http://{self.name}"

    async def sayings(self):
        if len(self.up) == self.room:
            raise ServerError("no room")
        self.up.append(self.name)
        yield "loading"

    def stop(self, keep):
        if self.name in self.up:
            self.up.remove(self.name)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(standing, "Subserver", Server)
    monkeypatch.setattr(standing, "StockServer", Server)
    monkeypatch.setattr(Server, "up", [])
    monkeypatch.setattr(standing, "available", lambda: 1 << 30)
    return Server


def stand(said=None, at_once=False):
    field = {name: Contender(name, "ours", (name,)) for name in "abc"} | {"u": at("http://u:1/")}
    return Standing(field, "tiny", None, Console(file=said or io.StringIO()), at_once)


async def test_servers_stay_up_and_are_met_again(server, monkeypatch):
    monkeypatch.setattr(Server, "room", 3)
    standing = stand()
    for name in "abcab":
        await standing._url(name)
    assert server.up == ["a", "b", "c"]
    assert await standing._url("u") == "http://u:1"
    standing.stop()
    assert server.up == []


async def test_servers_that_start_at_once_are_all_begun_by_the_first_that_is_met(server, monkeypatch):
    monkeypatch.setattr(Server, "room", 3)
    servers = stand(at_once=True)
    await servers._url("b")
    assert (server.up, sorted(servers._begun)) == (["b"], ["a", "c"])
    await servers._url("u")
    await servers._url("a")
    assert (server.up, sorted(servers._begun)) == (["b", "a"], ["c"])
    ended = []
    monkeypatch.setattr(Server, "stop", lambda self, keep: ended.append(self.name))
    servers.stop()
    assert sorted(ended) == ["a", "b", "c"]
    assert servers._begun == servers._up == {}


async def test_of_servers_that_start_at_once_one_without_room_makes_it_one_at_a_time(server):
    servers = stand(at_once=True)
    for name in "abc":
        await servers._url(name)
    assert (server.up, servers.alone, servers._begun) == (["c"], True, {})


async def test_where_one_finds_no_room_beside_the_others_one_at_a_time_is_up(server):
    said = io.StringIO()
    standing = stand(said)
    for name in "abc":
        await standing._url(name)
    assert (server.up, standing.alone) == (["c"], True)
    assert "c does not start beside the others (c: no room): from now on one" in said.getvalue()
    await standing._url("a")
    assert server.up == ["a"]


async def test_where_memory_is_short_nobody_is_started_beside_the_others(server, monkeypatch):
    free = [10 << 30]
    monkeypatch.setattr(standing, "available", lambda: free[0])
    monkeypatch.setattr(Server, "room", 3)
    servers = stand()
    taken = Server.sayings

    async def sayings(self):
        free[0] -= 6 << 30
        async for said in taken(self):
            yield said

    monkeypatch.setattr(Server, "sayings", sayings)
    await servers._url("a")
    await servers._url("b")  # 4 GiB are left, and 1.2 times 6 are needed
    assert (server.up, servers.alone) == (["b"], True)


async def test_a_contender_that_starts_not_even_alone_is_named(server, monkeypatch):
    monkeypatch.setattr(Server, "room", 0)
    with pytest.raises(ServerError, match="a: no room\nits log is the log"):
        await stand()._url("a")


async def test_a_server_that_has_ended_meanwhile_is_gone(server):
    servers = stand()
    await servers._url("a")
    servers._up["a"].ended = -9
    with pytest.raises(EndpointGoneError, match="its server has ended with exit code -9"):
        await servers._url("a")


def test_processor_time_of_a_family_grows_with_what_it_does():
    before, until = cpu_seconds(os.getpid()), time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert 0.05 < cpu_seconds(os.getpid()) - before < 5
    assert cpu_seconds(1 << 30) == 0.0
    assert available() > 1 << 20
