"""Brings a lost instance back: ends what is left of it, starts it again, has it meet the others, lets it in.

What is decided is in supervisor.py (when) and quarantine.py (who may have done it); here it is carried out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from vllm.v1.engine.exceptions import EngineDeadError

from taichi_serve.cluster.vllm.server import figures
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.meetings import Meetings
from taichi_serve.cluster.vllm.server.process import reason
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.cluster.vllm.server.remains import ending, forget_logs
from taichi_serve.cluster.vllm.server.start import Launcher, close, in_thread, to_the_end, vanish
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.cluster.vllm.server.suspects import computed, computed_prompts
from taichi_serve.cluster.vllm.server.told import Told
from taichi_serve.cluster.vllm.server.warm import Rehearsing
from taichi_serve.cluster.vllm.wire import Call
from taichi_serve.messages import Abort, Command, Outcome
from taichi_serve.sliders import Kind


class Cluster(Rehearsing, Protocol):
    """What is needed of the cluster: what follows, and rehearsals."""

    engines: list[Engine]

    def serves(self, engine: Engine) -> bool:
        """Whether this incarnation is the one that work goes to."""
        ...

    def lose(self, engine: Engine, why: str) -> None:
        """This incarnation is gone."""
        ...

    def join(self, engine: Engine) -> None:
        """A warm one takes the place of the dead one with its index."""
        ...

    def silence(self, engine: Engine, on: bool) -> None:
        """It does not answer, or answers again."""
        ...

    def hopeless(self, why: str) -> None:
        """No instance will come back."""
        ...

    def send(self, command: Command) -> None:
        """Carry out a decision."""
        ...


class Keeper:
    """Keeps the instances of one server up. Before `open` and after `stop` it only notes losses."""

    def __init__(
        self, cluster: Cluster, launcher: Launcher, supervisor: Supervisor, quarantine: Quarantine, told: Told
    ) -> None:
        self.supervisor = supervisor
        self.quarantine = quarantine
        self.told = told
        self.losses = 0  # since the server began
        self.silent: set[Engine] = set()
        self._cluster = cluster
        self._launcher = launcher
        self._open = self._given_up = False
        self._turns = Counter(range(len(supervisor.places)))  # processes so far, by number
        self._returning: dict[str, list[asyncio.Task[None]]] = {}  # those that are brought back, by name
        self._leaving: set[str] = set()
        self._meetings = Meetings(cluster, self.silent, told.say)
        self._late: dict[Engine, asyncio.Task[None]] = {}  # that answer again, and have others to meet first
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """From here on whoever is lost comes back."""
        self._open = True

    async def stop(self) -> None:
        """Bring nobody back any more; whoever was being started is ended."""
        self._open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------- what is noticed

    def exited(self, engine: Engine, code: int) -> None:
        """Its process ended."""
        self.lost(engine, engine.process.end_of(ending(code)), blame=not engine.process.torn)

    def broke(self, engine: Engine, wrong: Exception) -> None:
        """It said that it dies, or could not be understood."""
        what = f"{type(wrong).__name__}: {wrong}"
        dead = isinstance(wrong, EngineDeadError)
        self.lost(engine, engine.process.end_of("its engine core failed" if dead else what))

    def cut(self, engine: Engine) -> None:
        """A connection to it was lost while both lived, and ZeroMQ made it anew."""
        self.lost(engine, "a connection to it was reset, and what was on its way is lost", blame=False)

    def stalled(self, engine: Engine, seconds: float) -> None:
        """It said nothing for so long that it counts as lost."""
        self.lost(engine, f"silent for {seconds:.0f} s, and ended")

    def silence(self, engine: Engine, seconds: float) -> None:
        """It does not answer: it gets no work. Nor does one that answered and was not yet let in."""
        self._meets_no_more(engine)
        self.silent.add(engine)
        self.told.say(
            f"instance {engine.name} was silent for {seconds:.0f} s: it gets no work until it answers"
        )
        self.quarantine.silent(engine.process.engine_id, computed_prompts(engine))
        self._cluster.silence(engine, True)

    def answered(self, engine: Engine) -> None:
        """It answers again: it gets work, when it has met whoever came meanwhile."""
        if self._meetings.owed(engine):
            self._late[engine] = self.begin(self._meet_late(engine))
        else:
            self._answers(engine)

    def _answers(self, engine: Engine) -> None:
        if engine not in self.silent or not engine.alive:
            return
        self.silent.discard(engine)
        self.told.say(f"instance {engine.name} answers again")
        self._cluster.silence(engine, False)
        self._send(self.quarantine.answered(engine.process.engine_id))

    def lost(self, engine: Engine, why: str, blame: bool = True) -> None:
        """It is gone, or is to be. Its requests, if any of them can be to `blame` they are suspects, go on
        elsewhere at once, and it is started again."""
        if not engine.alive:
            return
        engine.process.kill()
        serves = self._open and self._cluster.serves(engine)
        if serves and blame:
            self._blame(engine, why)
        self._cluster.lose(engine, why)
        vanish(engine)
        self._forget(engine)
        if not blame:
            self._send(self.quarantine.answered(engine.process.engine_id))
        if not self._open and engine in self._cluster.engines:
            self._say_end(engine, why)
        if serves:
            self.losses += 1
            # A dead engine says no more of itself: vLLM's gauges would stay as they were.
            self.told.deliver(figures.gone(engine.index))
            delay = self.supervisor.lost(engine.name, why, time.monotonic())
            if engine.name in self._leaving:
                self._say_end(engine, why)
            else:
                self._bring_back(engine.name, self._replace(engine, delay, why))

    def _send(self, commands: list[Command]) -> None:
        for command in commands:
            self._cluster.send(command)

    def _blame(self, engine: Engine, why: str) -> None:
        """Whoever it died under the second time is ended; the others are looked at from now on."""
        decodes, prompts = computed(engine)
        for request in self.quarantine.lost(engine.process.engine_id, decodes, prompts):
            text = f"two instances died while they computed this request; {engine.name}: {why}"
            self.told.failed(request, text)
            self.told.say(f"request {request} is ended: {text}")
            self._cluster.send(Abort(request, Outcome.FAILED, text))

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do this beside all else; it is cancelled by `stop`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def leaves(self, name: str) -> None:
        """An instance is to leave: if it is lost, it is not started again."""
        self._leaving.add(name)
        for task in self._returning.get(name, []):
            task.cancel()

    async def settled(self, name: str) -> None:
        """Wait until nothing is left of the process that was being started in the place of a lost one."""
        if tasks := self._returning.pop(name, []):
            await asyncio.wait(tasks)

    def stays(self, engine: Engine) -> None:
        """It is to stay after all; if it was lost meanwhile, it is started again as every other one is."""
        self._leaving.discard(engine.name)
        if not engine.alive:
            self._bring_back(engine.name, self._return(engine, self._returning.get(engine.name, [])))

    def left(self, engine: Engine) -> None:
        """It is gone for good."""
        self.supervisor.remove(engine.name)
        self._leaving.discard(engine.name)
        self._forget(engine)
        self.told.deliver(figures.gone(engine.index))

    # ---------------------------------------------------------------------------------------- coming back

    def _bring_back(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Begin it; who was being brought back before may not have ended yet."""
        before = [task for task in self._returning.get(name, []) if not task.done()]
        self._returning[name] = [*before, self.begin(work)]

    async def _return(self, dead: Engine, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        why = self.supervisor.places[dead.name].why or "it was lost while it was to leave"
        await self._replace(dead, self.supervisor.due(dead.name, time.monotonic()), why)

    async def _replace(self, dead: Engine, delay: float | None, why: str) -> None:
        name = dead.name
        if not await in_thread(dead.process.end):
            self.told.say(f"instance {name}: the kernel has not ended process {dead.process.pid} yet")
        close(dead)
        forget_logs(dead.process.directory, name)
        self._say_end(dead, why)
        while delay is not None:
            self.told.say(f"instance {name} is started again {f'in {delay:g} s' if delay else 'now'}")
            await asyncio.sleep(delay)
            self.supervisor.starting(name, time.monotonic())
            try:
                await self.bring(dead.index, dead.kind, dead.chunk, self._cluster.join)
            except Exception as wrong:  # noqa: BLE001  whatever it is, the others serve on
                why = reason(wrong)
                self.told.say(f"instance {name} could not be started again: {why}")
                delay = self.supervisor.lost(name, why, time.monotonic())
                continue
            self.supervisor.back(name, time.monotonic())
            self.told.say(f"instance {name} serves again after {self.supervisor.took:.0f} s")
            return
        self._stays_out(name, why)

    def _say_end(self, engine: Engine, why: str) -> None:
        self.told.say(f"instance {engine.name} ended: {why}; its log is {engine.process.log}")

    def _stays_out(self, name: str, why: str) -> None:
        limit = f"it was started again {self.supervisor.limit} times within an hour"
        out = limit if self.supervisor.limit else "--restarts is 0"
        self.told.say(f"INSTANCE {name} STAYS OUT: {out}; its last end: {why}")
        if self.supervisor.hopeless and not self._given_up:
            self._given_up = True
            text = f"no instance is left, and none is started again; the last, {name}: {why}"
            self._cluster.hopeless(text)
            self.told.hopeless(text)

    async def bring(self, index: int, kind: Kind, chunk: int, enter: Callable[[Engine], None]) -> Engine:
        """Start its next process, which meets the others and may then `enter`. Raises StartError."""
        self._turns[index] += 1
        process = self._launcher.begin(index, kind, self._turns[index])
        engine = await self._launcher.ready(process, index, kind, chunk)
        try:
            async with self._meetings.one_by_one:
                await self._meetings.meet(engine)
                engine.client.tell(Call.SETTLE)
                enter(engine)
                return engine
        except BaseException:
            self._cluster.lose(engine, "it was given up")  # those it has met may still read from it
            self._meetings.forget(engine)
            vanish(engine)
            try:
                await to_the_end(process.end)
            finally:
                close(engine)
            raise

    async def _meet_late(self, engine: Engine) -> None:
        await self._meetings.catch_up(engine)
        self._late.pop(engine, None)
        self._answers(engine)

    def _forget(self, engine: Engine) -> None:
        """It is gone."""
        self._meets_no_more(engine)
        self.silent.discard(engine)
        self._meetings.forget(engine)

    def _meets_no_more(self, engine: Engine) -> None:
        if (task := self._late.pop(engine, None)) is not None:
            task.cancel()
