"""Engines that hang or die, and a server that is told to stop: no user gets an error, and none a wrong token.

The tests share one server of three equal instances and use it up in the order in which they stand here.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from conftest import OVER_NIXL
from load import PATH, Wish, instances_of, push, streamed, view, wishes, wrong
from servers import STOP_SECONDS, Server, eventually, processes, until

from taichi_serve.bench.client import Answer, stream

NAMES = ("i0", "i1", "i2")
FLAGS = (
    "--d-heavy",
    "3",
    "--move-timeout",
    "2",
    "--stall-timeout",
    "10",
    "--restarts",
    "0",
    "--shutdown-timeout",
    "60",
    *OVER_NIXL,
)
APART = ("--p-heavy", "1", "--d-heavy", "1", "--d-chunk", "0", "--move-timeout", "2", *OVER_NIXL)
WISHES = wishes(12, seed=11, prompt=(200, 900), output=(150, 250))
# The first one lasts: it is the one that engines are stopped around.
WISHES[0] = Wish(WISHES[0].prompt, 1200)


@dataclass
class Pair:
    """The server that the tests use up, and one for the last of them."""

    three: Server
    last: Server
    alive: list[str] = field(default_factory=lambda: list(NAMES))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    three = Server(tmp_path_factory.mktemp("three"), *FLAGS)
    last = Server(tmp_path_factory.mktemp("last"), *APART)
    try:
        yield Pair(three.wait_ready(), last.wait_ready())
    finally:
        three.end()
        last.end()


@pytest.fixture(scope="module")
def reference(single: Server) -> list[Answer]:
    """What one instance says."""

    async def run() -> list[Answer]:
        async with single.client() as client:
            return await streamed(client, WISHES)

    return asyncio.run(run())


def halt(those: list[psutil.Process]) -> None:
    for process in those:
        process.suspend()


def go_on(those: list[psutil.Process]) -> None:
    for process in those:
        process.resume()


@dataclass
class Running:
    """Streams on their way."""

    tasks: list[asyncio.Task[Answer]]
    ids: list[str]


async def begin(client: httpx.AsyncClient, server: Server, names: list[str]) -> Running:
    """Start the streams, and spread them until every one of `names` decodes some."""
    ids: list[str] = []

    async def note(answer: Answer) -> None:
        if answer.id not in ids:
            ids.append(answer.id)

    running = Running([asyncio.create_task(stream(client, PATH, w.body(), note)) for w in WISHES], ids)

    async def spread() -> bool:
        decodes = {i["name"]: i["decodes"] for i in server.state()["instances"]}
        if all(decodes[name] for name in names) and len(ids) == len(WISHES):
            return True
        for request_id in ids[:6]:
            await push(client, request_id, names)
        return False

    await until(spread, 60, f"{names} all decode")
    return running


async def test_where_the_target_hangs_a_request_stays_and_loses_nothing(
    servers: Pair, reference: list[Answer]
) -> None:
    server = servers.three
    async with server.client() as client:
        seen: list[str] = []

        async def note(answer: Answer) -> None:
            seen.append(answer.id)

        task = asyncio.create_task(stream(client, PATH, WISHES[0].body(), note))
        await until(lambda: _true(len(seen) > 5), 60, "some tokens are out")
        source = (await instances_of(client, seen[0]))[-1]
        target = next(name for name in NAMES if name != source)
        there = processes(server, target)
        halt(there)
        try:
            answer = await client.post(f"/taichi/requests/{seen[0]}/flow", json={"to": target})
            assert answer.status_code == 202

            async def refused() -> bool:
                return any(row["type"] == "Refused" for row in (await view(client, seen[0]))["log"])

            await until(refused, 10, "the move is given up")
            assert not task.done(), "it was over before"
        finally:
            go_on(there)
        result = await asyncio.wait_for(task, 60)
        assert wrong([result], reference[:1]) == []
        assert await instances_of(client, seen[0]) == [source]
    after = server.quiet(10)  # what the target keeps for it is given back, and what was pinned at the source
    assert all(instance["alive"] for instance in after["instances"])


async def test_a_source_that_hangs_before_its_kv_is_read_costs_time_and_no_token(
    servers: Pair, reference: list[Answer]
) -> None:
    server, wish = servers.last, WISHES[1]
    before = server.quiet(10)
    there, here = processes(server, "i1"), processes(server, "i0")
    async with server.client() as client:
        seen: list[str] = []

        async def note(answer: Answer) -> None:
            seen.append(answer.id)

        # The target hangs until the prompt has been computed; then the source does, and sends no KV.
        halt(there)
        try:
            task = asyncio.create_task(stream(client, PATH, wish.body(), note))
            await until(lambda: _true(bool(seen)), 60, "the first token is out")
            halt(here)
            go_on(there)
            result = await asyncio.wait_for(task, 60)
        finally:
            go_on([*there, *here])
        assert wrong([result], reference[1:2]) == []
        assert await instances_of(client, seen[0]) == ["i0", "i1"]
        assert server.instance("i1")["late_kv"] == 1
        # The KV that came too late is in nobody's cache: the same prompt says the same.
        assert wrong([await stream(client, PATH, wish.body())], reference[1:2]) == []
    after = server.quiet(40)  # a lease may have to run out at the source
    assert all(instance["alive"] for instance in after["instances"])
    assert after["requests"]["failed"] == before["requests"]["failed"]


async def _true(holds: bool) -> bool:
    return holds


async def test_streams_of_an_engine_that_hangs_go_on_elsewhere(
    servers: Pair, reference: list[Answer]
) -> None:
    server, victim = servers.three, "i2"
    async with server.client() as client:
        running = await begin(client, server, list(NAMES))
        those = processes(server, victim)
        halt(those)
        answers = await asyncio.gather(*running.tasks)
        assert wrong(answers, reference) == []
    assert not server.instance(victim)["alive"]
    assert server.state()["moves"]["rescue"] > 0
    assert server.state()["requests"]["failed"] == 0
    _, alive = psutil.wait_procs(those, timeout=5)
    assert not alive
    assert any("i2 was silent" in line for line in server.lines())


async def test_streams_of_an_engine_that_is_killed_go_on_elsewhere(
    servers: Pair, reference: list[Answer]
) -> None:
    server, victim = servers.three, "i1"
    before = server.state()["moves"]["rescue"]
    async with server.client() as client:
        running = await begin(client, server, ["i0", "i1"])
        those = processes(server, victim)
        those[0].kill()
        answers = await asyncio.gather(*running.tasks)
        assert wrong(answers, reference) == []
        state = server.state()
        assert [i["alive"] for i in state["instances"]] == [True, False, False]
        assert state["moves"]["rescue"] > before
        assert state["requests"]["failed"] == 0
        assert (await client.get("/health")).status_code == 200
    _, alive = psutil.wait_procs(those, timeout=5)
    assert not alive
    assert any("i1 ended" in line and ".log" in line for line in server.lines())


async def test_nothing_can_be_sent_to_a_dead_instance(servers: Pair) -> None:
    async with servers.three.client() as client:
        seen: list[str] = []

        async def note(answer: Answer) -> None:
            seen.append(answer.id)

        task = asyncio.create_task(stream(client, PATH, Wish([3] * 50, 100).body(), note))
        await until(lambda: _true(bool(seen)), 30, "a token is out")
        for path, body in (
            (f"/taichi/requests/{seen[0]}/flow", {"to": "i1"}),
            ("/taichi/instances/i1/drain", None),
            ("/taichi/instances/i2/resume", None),
        ):
            refusal = await client.post(path, json=body)
            assert refusal.status_code == 409
            assert "is not alive" in refusal.json()["error"]["message"]
        assert (await task).ok


async def test_sigterm_lets_streams_finish_and_refuses_new_ones(
    servers: Pair, reference: list[Answer]
) -> None:
    server = servers.three
    async with server.client() as client:
        running = await begin(client, server, ["i0"])
        family, shared = server.family(), server.shared_memory()
        open_for_more = server.client()
        server.signal(signal.SIGTERM)

        async def refused() -> bool:
            try:
                answer = await open_for_more.post(PATH, json=Wish("too late", 4).body())
            except httpx.HTTPError:
                return True  # it listens no more
            return answer.status_code == 503

        await until(refused, 20, "new requests are refused")
        answers = await asyncio.gather(*running.tasks)
        await open_for_more.aclose()
    assert wrong(answers, reference) == []
    await asyncio.to_thread(server.gone, 0, family, shared, True)  # the logs of the dead engines are kept


async def test_when_the_server_itself_is_killed_no_engine_survives(servers: Pair) -> None:
    server = servers.last
    async with server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES[:4]]
        await until(lambda: _true(server.state()["requests"]["live"] > 0), 30, "something runs")
        family = server.family()
        assert len(family) >= 3
        server.signal(signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
    assert not any(answer.ok for answer in answers), "a stream that broke off must not look finished"
    assert server.process.wait(STOP_SECONDS) == -signal.SIGKILL
    eventually(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family),
        30,
        "all ended",
    )
