"""Keeps every front end up: starts them, notices their end, starts them again.

When one is started again, and when no more, is decided as for instances (supervisor.py).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import multiprocess
from zmq import ZMQError

from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.remains import ending
from taichi_serve.cluster.vllm.server.start import in_thread
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend.several.hub import FrontEnds
from taichi_serve.frontend.several.process import FrontEndProcess
from taichi_serve.frontend.several.words import Spec

LOOK = 0.5  # seconds between two pings, and two looks at who answers
START_SECONDS = 600.0  # that one may take until it serves


class FrontEndKeeper:
    """Over all front ends of a server. `say` tells the operator."""

    def __init__(
        self,
        fronts: FrontEnds,
        argv: list[str],
        listening: tuple[str, socket.socket],
        supervisor: Supervisor,
        say: Callable[[str], None],
    ) -> None:
        """`listening` is the socket that all of them accept on, and its address in words."""
        self.supervisor = supervisor
        self.hopeless: Callable[[str], None] = lambda why: None
        self._fronts = fronts
        self._argv = argv
        self._address, self._socket = listening
        self._say = say
        self._metrics = fronts.directory / "metrics"
        self._metrics.mkdir()
        self._turns = [0] * fronts.count
        self._processes: dict[int, FrontEndProcess] = {}
        self._up = [asyncio.Event() for _ in range(fronts.count)]
        self._stopping = False
        self._keeping: list[asyncio.Task[None]] = []
        fronts.serving = self._serves

    def view(self, index: int) -> dict[str, Any]:
        """How this front end stands."""
        process, place = self._processes.get(index), self.supervisor.places[names(index)]
        return {
            "name": names(index),
            "pid": None if process is None else process.pid,
            "serves": self._up[index].is_set(),
            "standing": place.standing.value,
            "restarts": place.restarts,
            "last_loss": place.why,
        }

    async def start(self) -> None:
        """Start all and wait until all serve. Raises StartError where one ends instead, or takes too long."""
        self._keeping = [
            asyncio.create_task(self._keep(index), name=f"front end {index}")
            for index in range(self._fronts.count)
        ]
        serving = asyncio.create_task(self._all_serve())
        first = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait({serving, *self._keeping}, timeout=START_SECONDS, return_when=first)
            served = serving.done()
        finally:
            serving.cancel()
        if not served:
            gone = [task for task in self._keeping if task.done() and not task.cancelled()]
            why = next((str(task.exception()) for task in gone if task.exception()), "it does not answer")
            raise StartError(f"a front end did not start: {why}")

    async def _all_serve(self) -> None:
        for up in self._up:
            await up.wait()

    async def watch(self, seconds: float) -> None:
        """Ask all whether they run, and end whoever said nothing for so long; for ever."""
        look = self._fronts.trouble.guarded("front end", self.look)
        while True:
            await asyncio.sleep(LOOK)
            look(seconds)

    def look(self, seconds: float) -> None:
        """Ask all, and end those that said nothing for so long: what they are sent would pile up here. One
        that starts says nothing yet."""
        self._fronts.ping()
        self._fronts.tell()
        now = self._fronts.clock()
        for index, process in self._processes.items():
            limit = seconds if self._up[index].is_set() else START_SECONDS
            if now - self._fronts.heard_at[index] > limit:
                self._say(f"front end {index} was silent for {limit:g} s, and is ended")
                process.kill()

    async def stop(self, seconds: float) -> None:
        """Ask all to finish what is open, end those that have not after so many seconds, and wait."""
        self._stopping = True
        for index, task in enumerate(self._keeping):
            if (process := self._processes.get(index)) is not None:
                process.terminate()
            else:  # it waits for its next start
                task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=seconds)
        for process in self._processes.values():
            process.kill()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    # ------------------------------------------------------------------------------------------- one of them

    def _serves(self, index: int) -> None:
        name = names(index)
        if self._turns[index] > 1:
            self.supervisor.back(name, time.monotonic())
            self._say(f"front end {index} serves again")
        self._up[index].set()

    async def _keep(self, index: int) -> None:
        """Run its process, and the next one after it, until there is to be none."""
        delay: float | None = 0.0
        while delay is not None and not self._stopping:
            if delay:
                await asyncio.sleep(delay)
            if self._turns[index]:
                self.supervisor.starting(names(index), time.monotonic())
            how = await self._run(index)
            if self._stopping:
                return
            served = self._up[index].is_set()
            self._up[index].clear()
            if self._turns[index] == 1 and not served:
                raise StartError(how)
            delay = self.supervisor.lost(names(index), how, time.monotonic())
            when = (
                "stays out" if delay is None else f"is started again {f'in {delay:g} s' if delay else 'now'}"
            )
            self._say(f"front end {index} ended: {how}; it {when}")
        if self.supervisor.hopeless and not self._stopping:
            self.hopeless("no front end is left, and none is started again")

    async def _run(self, index: int) -> str:
        """Start its next process, and wait for its end: how it came."""
        self._turns[index] += 1
        fronts = self._fronts
        line = f"ipc://{fronts.directory}/front-{index}.{self._turns[index]}"
        try:
            fronts.join(index, line)
            process = self._processes[index] = FrontEndProcess(
                self._spec(index, line), fronts.directory / f"front-{index}.json", self._metrics
            )
            return ending(await in_thread(process.wait))
        except (OSError, ZMQError) as wrong:
            return f"it could not be started: {wrong.strerror}"
        finally:
            self._gone(index)
            Path(line.removeprefix("ipc://")).unlink(missing_ok=True)

    def _gone(self, index: int) -> None:
        if (process := self._processes.pop(index, None)) is not None:
            multiprocess.mark_process_dead(process.pid, str(self._metrics))
        if cancelled := self._fronts.lose(index):
            self._say(f"front end {index} took {cancelled} requests with it")

    def _spec(self, index: int, line: str) -> Spec:
        fronts = self._fronts
        return Spec(
            self._argv,
            index,
            fronts.count,
            os.getpid(),
            self._address,
            self._socket.fileno(),
            line,
            str(fronts.inside),
            str(fronts.shared_file),
            fronts.directory.name,
        )


def names(index: int) -> str:
    """What the supervisor calls a front end."""
    return f"f{index}"
