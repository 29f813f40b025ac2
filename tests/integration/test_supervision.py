"""Instances that are killed, stopped or poisoned come back, and no user loses a token to it.

The tests share one server of three equal instances. The last one has a server of its own, which it uses up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import footprint
import psutil
import pytest
from documents import documents
from load import PATH, Wish, completed, streamed, wishes, wrong
from servers import SOURCE, STOP_SECONDS, Server, processes, until, workers

from taichi_serve.bench.client import Answer, stream

NAMES = ("i0", "i1", "i2")
POISON = {"PYTHONPATH": f"{Path(__file__).parent / 'poison'}:{SOURCE}"}
FLAGS = ("--d-heavy", "3", "--move-timeout", "3", "--stall-timeout", "15")
WISHES = wishes(12, seed=21, prompt=(200, 900), output=(150, 250))
# Of completions alone: this server has no parser of tools.
DOCUMENTS = documents(12, seed=8, kinds=("json", "json_object", "regex", "choice", "lark", "guidance"))
BACK_SECONDS = 60  # within which a killed instance serves again
KNOWN_SECONDS = 10  # within which a silent one is known


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("three"), *FLAGS, env=POISON)
    try:
        yield server.wait_ready()
        server.stop(logs_stay=True)  # those of the dead
    finally:
        server.end()


@pytest.fixture(scope="module")
def reference(single: Server) -> list[Answer]:
    """What one instance says."""

    async def run() -> list[Answer]:
        async with single.client() as client:
            return await streamed(client, WISHES)

    return asyncio.run(run())


async def is_up(server: Server, name: str, restarts: int) -> bool:
    """Whether it serves in the life after so many restarts."""
    instance = server.instance(name)
    return bool(instance["alive"] and not instance["silent"] and instance["restarts"] == restarts)


async def decoding(server: Server, names: tuple[str, ...] = NAMES) -> bool:
    """Whether every one of these decodes something."""
    decodes = {i["name"]: i["decodes"] for i in server.state()["instances"]}
    return all(decodes[name] for name in names)


def settled(server: Server) -> dict[str, Any]:
    """The state when no request is live and no KV is held; what was accepted has ended."""
    state = server.quiet(40)  # a lease may have to run out
    requests = state["requests"]
    assert requests["accepted"] == sum(requests[how] for how in ("finished", "cancelled", "failed"))
    return state


async def test_a_killed_instance_costs_no_token_and_is_back_within_a_minute(
    three: Server, reference: list[Answer]
) -> None:
    before = footprint.sample(three, three.quiet(40))
    victim, old = "i1", three.instance("i1")
    async with three.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES]
        await until(lambda: decoding(three), 60, "all decode")
        processes(three, victim)[0].kill()
        assert wrong(await asyncio.gather(*tasks), reference) == []
        await until(lambda: is_up(three, victim, 1), BACK_SECONDS, "i1 is back")
        new = three.instance(victim)
        assert (new["pid"], new["log"]) != (old["pid"], old["log"])
        assert "killed by SIGKILL" in new["last_loss"]["why"]
        assert Path(old["log"]).exists()

        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES]
        await until(lambda: decoding(three), 60, "all decode, the new one too")
        assert wrong(await asyncio.gather(*tasks), reference) == []
    state = settled(three)
    assert state["requests"]["failed"] == 0
    after = footprint.sample(three, state)
    held = [sample.held["all"]["files"] for sample in (before, after)]
    assert held[1] == held[0] + 1, "beside a log there is no file more than before"
    async with three.client() as client:
        text = (await client.get("/metrics")).text
    # vLLM's gauges do not stay as they were when it died.
    running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
    assert [line.rsplit(" ", 1)[1] for line in running] == ["0.0"] * 3


async def test_an_idle_instance_that_hangs_is_known_within_ten_seconds_and_used_again_when_it_answers(
    three: Server, reference: list[Answer]
) -> None:
    three.quiet(40)
    pid = three.instance("i2")["pid"]
    hanging = workers(processes(three, "i2")[0])  # the core alone would look alive
    for worker in hanging:
        worker.suspend()
    try:

        async def silent() -> bool:
            return bool(three.instance("i2")["silent"])

        await until(silent, KNOWN_SECONDS, "i2 is known to be silent")
        async with three.client() as client:
            # It is over well before --stall-timeout: who is silent for longer is ended.
            first = await asyncio.wait_for(stream(client, PATH, WISHES[0].body()), 60)
            assert (await client.get("/health")).status_code == 200
        assert wrong([first], reference[:1]) == []
    finally:
        for worker in hanging:
            worker.resume()
    await until(lambda: is_up(three, "i2", 0), KNOWN_SECONDS, "i2 is in use again")
    assert three.instance("i2")["pid"] == pid
    assert any("i2 was silent" in line for line in three.lines())


async def test_when_everything_stands_still_for_twenty_seconds_nobody_is_lost(
    three: Server, reference: list[Answer]
) -> None:
    restarts = [i["restarts"] for i in three.state()["instances"]]
    async with three.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES]
        await until(lambda: decoding(three), 60, "all decode")
        family = three.family()
        for process in family:
            process.suspend()
        await asyncio.to_thread(time.sleep, 20)  # what is tested: twice the stall time and more
        for process in family:
            process.resume()
        assert wrong(await asyncio.gather(*tasks), reference) == []
        await until(lambda: is_up(three, "i0", restarts[0]), KNOWN_SECONDS, "i0 answers")
    state = three.state()
    assert [i["restarts"] for i in state["instances"]] == restarts
    assert all(i["alive"] for i in state["instances"])


async def test_a_poisonous_request_takes_two_instances_and_is_ended_and_everybody_else_gets_every_token(
    three: Server, reference: list[Answer]
) -> None:
    before = three.state()
    restarts = {i["name"]: i["restarts"] for i in before["instances"]}
    async with three.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES]
        await until(lambda: decoding(three), 60, "all decode")
        body = Wish("a prompt that no engine survives", 20).body()
        answer = await client.post(PATH, json=body, headers={"X-Request-Id": "poison"})
        assert answer.status_code == 500
        assert "two instances died while they computed this request" in answer.json()["error"]["message"]
        assert wrong(await asyncio.gather(*tasks), reference) == []

        async def both_back() -> bool:
            now = three.state()["instances"]
            return sum(i["restarts"] - restarts[i["name"]] for i in now) == 2 and all(i["alive"] for i in now)

        await until(both_back, 2 * BACK_SECONDS, "both are back")
        assert (await completed(client, WISHES[0].body())).tokens == reference[0].tokens
    state = settled(three)
    assert state["requests"]["failed"] == before["requests"]["failed"] + 1


async def test_documents_of_a_killed_instance_are_finished_elsewhere_as_they_would_have_been(
    three: Server, single: Server
) -> None:
    restarts = three.instance("i2")["restarts"]
    await until(lambda: is_up(three, "i2", restarts), BACK_SECONDS, "i2 serves")
    async with single.client() as client:
        reference = await asyncio.gather(*(stream(client, one.path, one.body) for one in DOCUMENTS))
    async with three.client() as client:
        tasks = [asyncio.create_task(stream(client, one.path, one.body)) for one in DOCUMENTS]
        await until(lambda: decoding(three), 60, "all decode")
        processes(three, "i2")[0].kill()
        answers = await asyncio.gather(*tasks)
    assert wrong(answers, reference) == []
    assert settled(three)["moves"]["rescue"] > 0
    await until(lambda: is_up(three, "i2", restarts + 1), 2 * BACK_SECONDS, "i2 is back")


async def test_a_killed_fork_server_takes_all_along_and_all_come_back_from_another(
    three: Server, reference: list[Answer]
) -> None:
    def fork_server() -> psutil.Process:
        children = psutil.Process(three.process.pid).children()
        (found,) = [child for child in children if "core.forks" in " ".join(child.cmdline())]
        return found

    restarts = {name: three.instance(name)["restarts"] for name in NAMES}
    first = fork_server()
    below = first.children(recursive=True)
    async with three.client() as client:
        waiting = asyncio.create_task(stream(client, PATH, WISHES[0].body()))
        await until(lambda: decoding_any(three), 60, "it decodes")
        first.kill()
        for name in NAMES:
            again = restarts[name] + 1
            await until(
                lambda name=name, again=again: is_up(three, name, again), BACK_SECONDS, f"{name} is back"
            )
        assert wrong([await waiting], reference[:1]) == []
        assert fork_server().pid != first.pid
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        for name in NAMES:
            why = three.instance(name)["last_loss"]["why"]
            assert why == "killed by SIGKILL: ForkServerError: its fork server ended first, killed by SIGKILL"
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in WISHES]
        await until(lambda: decoding(three), 60, "all decode")
        processes(three, "i1")[0].kill()
        assert wrong(await asyncio.gather(*tasks), reference) == []
    await until(lambda: is_up(three, "i1", restarts["i1"] + 2), BACK_SECONDS, "i1 is back")
    assert not [line for line in three.lines() if "not forked" in line]


async def test_while_none_is_up_clients_are_told_when_and_when_none_comes_back_the_server_fails(
    tmp_path_factory: pytest.TempPathFactory, reference: list[Answer]
) -> None:
    server = Server(tmp_path_factory.mktemp("two"), "--d-heavy", "2", "--restarts", "1")
    try:
        server.wait_ready()
        async with server.client() as client:
            waiting = asyncio.create_task(stream(client, PATH, WISHES[0].body()))
            await until(lambda: decoding_any(server), 60, "it decodes")
            kill_at_once(server, "i0", "i1")

            async def none_lives() -> bool:
                return not any(i["alive"] for i in server.state()["instances"])

            await until(none_lives, 10, "both are known to be lost")
            refusal = await client.post(PATH, json=Wish("anybody", 4).body(stream=True))
            assert refusal.status_code == 503
            assert int(refusal.headers["retry-after"]) >= 1
            assert "No instance is up; one is expected back in about" in refusal.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 503
            for name in ("i0", "i1"):
                await until(lambda name=name: is_up(server, name, 1), 2 * BACK_SECONDS, f"{name} is back")
            assert wrong([await waiting], reference[:1]) == []  # it waited for one
            assert (await client.get("/health")).status_code == 200
            assert wrong([await stream(client, PATH, WISHES[1].body())], reference[1:2]) == []

            last = asyncio.create_task(stream(client, PATH, WISHES[2].body()))
            await until(lambda: decoding_any(server), 60, "it decodes")
            family = server.family()
            kill_at_once(server, "i0", "i1")
            assert not (await asyncio.wait_for(last, 60)).ok
        assert await asyncio.to_thread(server.process.wait, STOP_SECONDS) == 3
        assert "no instance is left" in server.lines()[-1] or "no instance is left" in server.lines()[-2]
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        server.end()


def kill_at_once(server: Server, *names: str) -> None:
    """Kill these instances so shortly one after the other that none of them gets a request of another: one
    that began to compute it could have died of it."""
    for victim in [processes(server, name)[0] for name in names]:
        victim.kill()


async def decoding_any(server: Server) -> bool:
    """Whether anything decodes."""
    return any(i["decodes"] for i in server.state()["instances"])
