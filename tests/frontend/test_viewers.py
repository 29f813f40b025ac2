"""Who looks at the page: nothing runs while nobody does, and a slow viewer holds nobody up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("vllm")

from pretended_server import Miniature

from taichi_serve.frontend import viewers as module
from taichi_serve.frontend.viewers import ALIVE, BEHIND, MOST, OVER, Viewer
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


def system() -> Miniature:
    """Two pretended instances, ten seconds after their first request."""
    made = Miniature(Sliders(1, 1, 1024, 256), rate=4.0, slo=SLO(1.0, 0.06))
    made.step(10.0)
    return made


def data(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


async def said(stream: AsyncGenerator[bytes, None]) -> Any:
    return data(await asyncio.wait_for(anext(stream), 5))


async def test_a_viewer_gets_everything_and_then_what_changes() -> None:
    here = system()
    stream = here.viewers.stream()
    whole = await said(stream)
    assert whole["whole"]
    assert [one["name"] for one in whole["instances"]] == ["i0", "i1"]
    assert {row[0] for row in whole["requests"]} == set(here.scheduler.requests)
    assert whole["standing"]["p_chunk"] == 1024
    assert whole["points"]
    here.step(11.0)
    update = await said(stream)
    assert "whole" not in update
    assert update["requests"]
    await stream.aclose()


async def test_nothing_runs_while_nobody_looks() -> None:
    here = system()
    assert here.recorder.observers == []
    before = asyncio.all_tasks()
    one, two = here.viewers.stream(), here.viewers.stream()
    await said(one)
    await said(two)
    assert len(here.recorder.observers) == 1
    assert [task.get_name() for task in asyncio.all_tasks() - before] == ["page"]
    await one.aclose()
    assert len(here.recorder.observers) == 1
    await two.aclose()
    await asyncio.sleep(0)
    assert here.recorder.observers == []
    assert asyncio.all_tasks() == before


async def test_a_viewer_that_does_not_read_gets_everything_anew() -> None:
    slow = Viewer()
    slow.behind = False
    for number in range(BEHIND):
        slow.give(b"%d " % number)
    assert not slow.behind
    slow.give(b"too many")
    assert slow.behind
    assert slow.take() == b""
    slow.give(b"one more")  # it is not even kept
    assert slow.take() == b""


async def test_a_snapshot_makes_up_for_what_a_slow_viewer_missed() -> None:
    here = system()
    stream = here.viewers.stream()
    await said(stream)
    (viewer,) = here.viewers._viewers
    viewer.behind = True
    viewer.wake()
    assert (await said(stream))["whole"]
    await stream.aclose()


async def test_a_quiet_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    monkeypatch.setattr(module, "PAUSE", 10.0)
    here = system()
    stream = here.viewers.stream()
    await said(stream)
    assert await asyncio.wait_for(anext(stream), 5) == ALIVE
    await stream.aclose()


async def test_streams_end_with_the_server() -> None:
    here = system()
    over = False
    here.viewers._over = lambda: over
    stream = here.viewers.stream()
    await said(stream)
    over = True
    rest = [event async for event in stream]
    assert rest[-1] == OVER
    assert here.recorder.observers == []


async def test_updates_come_at_most_ten_times_a_second() -> None:
    here = system()
    living = asyncio.create_task(here.live(ahead=10.0))
    stream = here.viewers.stream()
    await said(stream)
    loop = asyncio.get_running_loop()
    began, count = loop.time(), 0
    while loop.time() - began < 1.0:
        count += (await asyncio.wait_for(anext(stream), 5)).count(b"data: ")
    assert 1 <= count <= 11
    await stream.aclose()
    living.cancel()


async def test_there_is_an_end_to_how_many_may_look() -> None:
    here = system()
    streams = [here.viewers.stream() for _ in range(MOST)]
    for stream in streams:
        await said(stream)
    assert here.viewers.full
    await streams.pop().aclose()
    assert not here.viewers.full
    for stream in streams:
        await stream.aclose()


async def test_what_goes_wrong_for_viewers_harms_no_request() -> None:
    here = system()
    stream = here.viewers.stream()
    await said(stream)

    def broken(*_: Any) -> None:
        raise RuntimeError("no such row")

    here.viewers._feed.observe = broken  # what the recorder holds is the guarded one
    here.recorder.observers[:] = [here.recorder.trouble.guarded("page", broken)]
    here.viewers._observe = here.recorder.observers[0]
    here.step(12.0)
    assert here.recorder.trouble.counts["page"] > 0
    assert here.recorder.trouble.counts["record"] == 0
    await stream.aclose()
