"""Front ends are started, waited for, started again and ended; their processes are pretended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from several_pretended import Switchboard, request, switchboard

from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend.several import keeping
from taichi_serve.frontend.several.keeping import FrontEndKeeper, names
from taichi_serve.frontend.several.words import Serving, Spec

KILLED, ENDED = -9, 0


@dataclass(eq=False)
class Process:
    """One that ends when it is told to, or when the test says so."""

    spec: Spec
    pid: int
    over: threading.Event = field(default_factory=threading.Event)
    code: int = ENDED
    obeys: bool = True

    def wait(self) -> int:
        assert self.over.wait(20)
        return self.code

    def terminate(self) -> None:
        if self.obeys:
            self.over.set()

    def kill(self) -> None:
        self.die(KILLED)

    def die(self, code: int) -> None:
        if not self.over.is_set():
            self.code = code
        self.over.set()


@dataclass
class World:
    """A keeper of two front ends, and every process that it has started."""

    here: Switchboard
    keeper: FrontEndKeeper
    said: list[str]
    processes: list[Process] = field(default_factory=list)

    async def until(self, count: int) -> None:
        """Let the event loop run until so many processes were started."""
        async with asyncio.timeout(10):
            while len(self.processes) < count:  # noqa: ASYNC110  threads end, too
                await asyncio.sleep(0.001)

    async def serving(self) -> None:
        """Start both, and have both say that they serve."""
        starting = asyncio.create_task(self.keeper.start())
        await self.until(2)
        for index in range(2):
            self.here.hub._take(index, Serving(), None)
        await starting


@asynccontextmanager
async def world(monkeypatch: pytest.MonkeyPatch, restarts: int = 3) -> AsyncIterator[World]:
    async with switchboard() as here:
        said: list[str] = []
        listening: Any = SimpleNamespace(fileno=lambda: 7)
        supervisor = Supervisor([names(0), names(1)], restarts)
        keeper = FrontEndKeeper(here.hub, ["model"], ("http://x", listening), supervisor, said.append)
        found = World(here, keeper, said)

        def started(spec: Spec, path: Path, metrics: Path) -> Process:
            found.processes.append(Process(spec, 1000 + len(found.processes)))
            return found.processes[-1]

        monkeypatch.setattr(keeping, "FrontEndProcess", started)
        try:
            yield found
        finally:
            await keeper.stop(0.1)


async def test_the_start_is_over_when_both_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        await here.serving()
        assert [process.spec.index for process in here.processes] == [0, 1]
        assert here.processes[0].spec.line != here.processes[1].spec.line
        assert [here.keeper.view(index)["serves"] for index in (0, 1)] == [True, True]


async def test_one_that_ends_before_it_serves_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        starting = asyncio.create_task(here.keeper.start())
        await here.until(2)
        here.processes[1].die(1)
        with pytest.raises(StartError, match="a front end did not start: exit code 1"):
            await starting


async def test_one_that_dies_is_started_again_and_its_requests_are_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        await here.serving()
        hub = here.here.hub
        hub.owners.take("a", 0)
        hub.owners.take("b", 1)
        here.processes[0].die(KILLED)
        await here.until(3)
        assert here.here.cluster.abandoned == [("a", True)]
        assert here.processes[2].spec.line not in {here.processes[0].spec.line, here.processes[1].spec.line}
        assert here.keeper.view(0)["standing"] == "starting"
        hub._take(0, Serving(), None)
        view = here.keeper.view(0)
        assert (view["serves"], view["restarts"], view["last_loss"]) == (True, 1, "killed by SIGKILL")
        assert here.said == [
            "front end 0 took 1 requests with it",
            "front end 0 ended: killed by SIGKILL; it is started again now",
            "front end 0 serves again",
        ]


async def test_when_none_is_left_and_none_is_started_again_the_server_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch, restarts=0) as here:
        hopeless = asyncio.get_running_loop().create_future()
        here.keeper.hopeless = hopeless.set_result
        await here.serving()
        here.processes[0].die(KILLED)
        async with asyncio.timeout(10):
            await here.keeper._keeping[0]
        assert not hopeless.done()
        here.processes[1].die(KILLED)
        async with asyncio.timeout(10):
            assert await hopeless == "no front end is left, and none is started again"
        assert len(here.processes) == 2


async def test_one_that_says_nothing_for_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        await here.serving()
        hub = here.here.hub
        hub.clock = lambda: 130.0
        hub.heard_at = [5.0, 20.0]
        here.keeper.look(seconds=120.0)
        assert [process.over.is_set() for process in here.processes] == [True, False]
        await here.until(3)
        assert here.said[0] == "front end 0 was silent for 120 s, and is ended"


async def test_at_the_end_all_are_asked_and_who_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        await here.serving()
        here.processes[1].obeys = False
        await here.keeper.stop(0.05)
        assert [process.code for process in here.processes] == [ENDED, KILLED]
        assert len(here.processes) == 2


async def test_who_is_sent_what_nobody_reads_is_not_in_the_way_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        await here.serving()
        line = here.here.hub.lines[0]
        assert line is not None
        for number in range(2000):  # beyond the usual mark of ZeroMQ; nobody is connected
            line.send(Serving(), request(f"r{number}"))
        assert here.here.hub.lines[1] is not line
