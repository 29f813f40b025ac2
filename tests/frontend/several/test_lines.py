"""The scheduler's process and front ends, over real sockets, without engines and without HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from several_pretended import PROMISED, Switchboard, heard, made, request, switchboard
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from taichi_serve.frontend.series import Left
from taichi_serve.frontend.several.remote import RemoteClient
from taichi_serve.messages import Decline, Finished, Lost, Promised
from taichi_serve.slo import SLO


async def until(holds: Callable[[], bool]) -> None:
    """Let the event loop run until this holds."""
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110  what is awaited says nothing
            await asyncio.sleep(0)


async def accepted(here: Switchboard, *names: str) -> None:
    """Wait until these have been taken in."""
    await until(lambda: sorted(one[0].request_id for one in here.cluster.accepted) == sorted(names))


def tokens(client: RemoteClient) -> list[tuple[str, list[int]]]:
    """What its users are to have, as it came."""
    steps = [client.outputs.get_nowait() for _ in range(client.outputs.qsize())]
    return [(output.request_id, output.new_token_ids) for step in steps for output in step.outputs]


async def test_a_request_comes_over_as_it_was_sent() -> None:
    async with switchboard() as here:
        client = await here.connect(1)
        sent = request("a", tokens=5)
        await client.add_request_async(sent)
        await accepted(here, "a")
        (came, blocks, terms) = here.cluster.accepted[0]
        assert (came.prompt_token_ids, blocks, terms.slo) == ([0, 1, 2, 3, 4], (), None)
        assert came.sampling_params == sent.sampling_params
        assert here.hub.owners.of("a") == 1
        assert here.hub.behind("outer-a") == [["a"]]


async def test_each_front_end_gets_the_tokens_of_its_requests_in_order() -> None:
    async with switchboard() as here:
        first, second = await here.connect(0), await here.connect(1)
        await first.add_request_async(request("a"))
        await accepted(here, "a")
        await second.add_request_async(request("b"))
        await accepted(here, "a", "b")
        for number in range(100):
            here.hub.deliver(EngineCoreOutputs(outputs=[made("a", number), made("b", -number)]))
        await heard(first, 100)
        await heard(second, 100)
        assert tokens(first) == [("a", [number]) for number in range(100)]
        assert tokens(second) == [("b", [-number]) for number in range(100)]


async def test_the_statistics_of_a_step_are_told_once() -> None:
    async with switchboard() as here:
        clients = [await here.connect(0), await here.connect(1)]
        for client, name in zip(clients, "ab", strict=True):
            await client.add_request_async(request(name))
        await accepted(here, *"ab")
        step = EngineCoreOutputs(outputs=[made("a", 1), made("b", 2)], scheduler_stats=SchedulerStats())
        here.hub.deliver(step)
        for client in clients:
            await heard(client)
        told = [client.outputs.get_nowait().scheduler_stats for client in clients]
        assert sum(stats is not None for stats in told) == 1


async def test_statistics_without_tokens_go_to_one_front_end_after_the_other() -> None:
    async with switchboard() as here:
        clients = [await here.connect(0), await here.connect(1)]
        for _ in range(4):
            here.hub.deliver(EngineCoreOutputs(scheduler_stats=SchedulerStats()))
        for client in clients:
            await heard(client, 2)
        assert [client.outputs.qsize() for client in clients] == [2, 2]


async def test_a_front_end_that_dies_takes_its_own_requests_with_it_and_no_others() -> None:
    async with switchboard() as here:
        first, second = await here.connect(0), await here.connect(1)
        await first.add_request_async(request("a"))
        await accepted(here, "a")
        await second.add_request_async(request("b"))
        await accepted(here, "a", "b")
        assert here.hub.lose(0) == 1
        assert here.cluster.abandoned == [("a", True)]
        here.hub.deliver(EngineCoreOutputs(outputs=[made("a", 1), made("b", 2)]))
        await heard(second)
        assert tokens(second) == [("b", [2])]
        assert here.hub.unfinished


async def test_the_next_process_of_a_front_end_is_somebody_else() -> None:
    async with switchboard() as here:
        first = await here.connect(0)
        await first.add_request_async(request("a"))
        await accepted(here, "a")
        here.hub.lose(0)
        again = await here.connect(0)
        await again.add_request_async(request("b"))  # the first HTTP request of this process, too
        await accepted(here, "a", "b")
        assert here.hub.behind("outer-a") == [["a"]]
        assert here.hub.behind("outer-b") == [["b"]]


async def test_who_leaves_is_cancelled_and_a_stop_string_is_not() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        for name in "ab":
            await client.add_request_async(request(name))
        client.cluster.abandon("a", cancelled=True)
        client.cluster.abandon("b", cancelled=False)
        client.cluster.abandon("b", cancelled=False)  # it is over
        await until(lambda: len(here.cluster.abandoned) == 2)
        assert here.cluster.abandoned == [("a", True), ("b", False)]


async def test_a_request_is_nobodys_once_the_scheduler_knows_that_it_is_over() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        await client.add_request_async(request("a"))
        await accepted(here, "a")
        here.hub.deliver(EngineCoreOutputs(outputs=[made("a", 1, over=True)]))
        assert here.hub.unfinished
        here.hub.observe(Finished(2.0, "a", 1), ())
        assert not here.hub.unfinished
        await heard(client)
        assert list(client.cluster.journeys) == []


async def test_who_is_turned_away_and_who_fails_is_told_so() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        told: list[object] = []
        client.failed = lambda request, why: told.append((request, why))
        client.declined = lambda decline: told.append((decline.request, decline.retry_after))
        for name in "ab":
            await client.add_request_async(request(name))
        await accepted(here, *"ab")
        here.hub.decline(Decline("a", 2.5, "too much"))
        here.hub.fail("b", "two instances died")
        here.hub.fail("nobody", "it is gone")
        await heard(client, 2)
        assert told == [("a", 2.5), ("b", "two instances died")]


async def test_one_request_that_cannot_be_taken_in_fails_alone() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        failed: list[str] = []
        client.failed = lambda request, why: failed.append(request)
        for name in ("poison", "a"):
            await client.add_request_async(request(name))
        await accepted(here, "a")
        await heard(client)
        assert failed == ["poison"]
        assert len(here.hub.owners) == 1
        assert "it cannot be taken in" in here.said[0]


async def test_how_instances_stand_is_told_when_it_changes() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        assert client.cluster.standing.slo == PROMISED
        assert [engine.alive for engine in client.cluster.engines] == [True, True]
        for engine in here.cluster.engines:
            engine.alive = False
        here.keeper.back = 30
        here.hub.observe(Lost(1.0, "i1", "killed"), ())
        here.hub.tell()  # nothing has changed since
        here.hub.promise(lambda: SLO(1.0, 0.05))
        here.hub.observe(Promised(2.0, SLO(1.0, 0.05)), ())
        await heard(client, 2)
        assert [engine.alive for engine in client.cluster.engines] == [False, False]
        back_at = client.cluster.standing.back_at
        assert back_at is not None
        assert client.cluster.retry_after(back_at - 12.5) == 13
        assert client.cluster.retry_after(back_at + 100) == 1
        assert client.cluster.standing.slo == SLO(1.0, 0.05)


async def test_when_what_is_queued_will_be_done_is_told_with_each_ping() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        assert client.cluster.drained == 0.0
        here.hub.drained = lambda: 2.5
        here.hub.ping()
        await heard(client)
        assert client.cluster.drained == 2.5


async def answer(client: RemoteClient, asking: asyncio.Future[object]) -> object:
    listening = asyncio.create_task(client.listen())
    try:
        async with asyncio.timeout(5):
            return await asking
    finally:
        listening.cancel()


async def test_what_every_instance_is_asked_is_answered() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        tasks = asyncio.ensure_future(client.get_supported_tasks_async())
        assert list(await answer(client, tasks)) == ["generate"]  # type: ignore[call-overload]
        assert await answer(client, asyncio.ensure_future(client.list_loras_async())) == {1, 2}
        with pytest.raises(RuntimeError, match="not now"):
            await answer(client, asyncio.ensure_future(client.reset_prefix_cache_async()))


async def test_nothing_else_can_be_called_and_nobody_answers_where_none_lives() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        with pytest.raises(RuntimeError, match="shutdown is no call"):
            await answer(client, asyncio.ensure_future(client._everywhere("shutdown")))
        for engine in here.cluster.engines:
            engine.alive = False
        with pytest.raises(EngineDeadError):
            await answer(client, asyncio.ensure_future(client.get_supported_tasks_async()))


async def test_who_is_asked_for_a_word_says_one() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        clock = itertools.count(5.0)
        here.hub.clock = lambda: next(clock)
        here.hub.ping()
        await heard(client)
        await until(lambda: here.hub.heard_at[0] >= 5.0)


async def test_statistics_forget_an_instance_that_left_after_its_last_outputs() -> None:
    async with switchboard() as here:
        client = await here.connect(0)
        await client.add_request_async(request("a"))
        await accepted(here, "a")
        here.hub.deliver(EngineCoreOutputs(engine_index=1, outputs=[made("a", 7)]))
        del here.cluster.engines[1]
        here.hub.removed(1)
        await heard(client)
        await heard(client)
        last, gone = client.outputs.get_nowait(), client.outputs.get_nowait()
        assert (last.engine_index, gone) == (1, Left(1))
