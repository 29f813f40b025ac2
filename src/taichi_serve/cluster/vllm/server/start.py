"""How an instance comes into being, at the server's start and again after each loss."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vllm import envs
from vllm.config import VllmConfig

from taichi_serve.cluster.vllm.server.clock import Patience
from taichi_serve.cluster.vllm.server.copiers import Copiers
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.engine_client import InstanceClient, Outputs
from taichi_serve.cluster.vllm.server.forks import Forks
from taichi_serve.cluster.vllm.server.line import MakeLine, over_files
from taichi_serve.cluster.vllm.server.process import EngineProcess, Process, StartError
from taichi_serve.cluster.vllm.wire import Call, Word
from taichi_serve.sliders import Kind

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.hosts.launching import Hosts

STOP_SECONDS = 10.0  # an engine that was asked to stop and has not is ended after this

STOPPED_SECONDS = 10.0  # that an engine which was found may still read what another server wanted

Receive = Callable[[Engine, Outputs], None]
Hear = Callable[[Word], None]
Exited = Callable[[Engine, int], None]
Waiting = Callable[[str, float], None]  # what is awaited, and for how many seconds by now
T = TypeVar("T")


@dataclass(frozen=True)
class Launcher:
    """All that the instances of a server are started with.

    `receive` gets every output of an engine, `hear` every word of a copier, and `exited` an exit status; all
    are called on the event loop.
    """

    config: VllmConfig  # as the command line says, untouched
    argv: list[str]
    devices: Devices
    directory: Path
    receive: Receive
    hear: Hear
    exited: Exited
    patience: Patience
    forks: Forks | None  # of a CPU
    make_line: MakeLine = over_files
    hosts: Hosts | None = None  # that instances run on; None: on this one

    def begin(self, index: int, kind: Kind, turn: int = 1) -> Process:
        """Start the process of instance `index`, for the `turn`th time, and return at once. Each has ids of
        its own: who knew the one before must not take this one for it."""
        name = f"i{index}" if turn == 1 else f"i{index}.{turn}"
        line = self.make_line(self.directory, name, self.config.parallel_config.world_size)
        if self.hosts is not None:
            return self.hosts.begin(index, kind, self.argv, line, (name, self.directory))
        made = self.devices.environment(index), self.forks, line
        return EngineProcess(name, self.directory, self.argv, *made)

    async def ready(self, process: Process, index: int, kind: Kind, chunk: int) -> Engine:
        """Wait until it is up and can be spoken to. Raises StartError when it ends instead, or takes longer
        than vLLM's own limit; then nothing is left of it."""
        loop = asyncio.get_running_loop()
        limit = envs.VLLM_ENGINE_READY_TIMEOUT_S
        late = self.patience.call_later(limit, process.kill)
        holder: list[Engine] = []
        client: InstanceClient | None = None
        try:
            config = await self._up(process)
            process.run_on(self.devices.spare())
            client = await in_thread(
                lambda: InstanceClient(config, process, lambda item: self.receive(holder[0], item))
            )
            if process.exitcode is not None:
                raise StartError(f"instance {process.name} ended as it came up: {process.cause()}")
            await in_thread(process.serves)
            copiers = Copiers(process.line, self.hear)
            engine = Engine(index, f"i{index}", process, client, copiers, kind, chunk)
        except BaseException as wrong:
            if client is not None:
                client.close()
            await to_the_end(process.end)
            if isinstance(wrong, TimeoutError):
                raise StartError(f"instance {process.name} came up and cannot be reached") from wrong
            raise
        finally:
            late.cancel()
        holder.append(engine)
        client.listen()
        client.tell(Call.CHUNK, chunk)
        process.on_exit(lambda code: loop.call_soon_threadsafe(self.exited, engine, code))
        return engine

    async def _first(self, processes: list[Process], index: int, kind: Kind, chunk: int) -> Engine:
        """The same; one that was found and cannot be had is started anew."""
        try:
            return await self.ready(processes[index], index, kind, chunk)
        except StartError:
            if not processes[index].found:
                raise
        processes[index] = self.begin(index, kind)
        return await self.ready(processes[index], index, kind, chunk)

    async def _up(self, process: Process) -> VllmConfig:
        """Wait until it is up; its configuration."""
        while True:
            config = deepcopy(self.config)  # the start-up handshake writes into it
            try:
                await in_thread(partial(process.wait_ready, config))
            except StartError:
                if not process.again():
                    raise
            else:
                return config

    async def all(self, kinds: list[tuple[Kind, int]], waiting: Waiting) -> list[Engine]:
        """Start every instance side by side and wait until all are up; `waiting` hears each second for whom.

        If one fails, all are ended and its StartError is raised.
        """
        processes = [self.begin(index, kind) for index, (kind, _) in enumerate(kinds)]
        tasks = [
            asyncio.create_task(self._first(processes, index, *kinds[index]), name=process.name)
            for index, process in enumerate(processes)
        ]
        began = time.monotonic()
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if pending:
                    names = ", ".join(sorted(task.get_name() for task in pending))
                    waiting(f"waiting for {names} to load the model", time.monotonic() - began)
            return await self._at_rest([task.result() for task in tasks], processes)
        except BaseException:
            for process in processes:
                process.found = False  # nobody is to be started in its place
                process.kill()
            engines = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(in_thread(process.end) for process in processes))
            for engine in engines:
                if isinstance(engine, Engine):
                    close(engine)
            raise

    async def _at_rest(self, engines: list[Engine], processes: list[Process]) -> list[Engine]:
        """These, once those that were found do nothing any more for another server. One that does not come to
        that is started anew. See core/forget.py."""
        found = [engine for engine in engines if engine.process.found]
        for engine, rests in zip(found, await asyncio.gather(*map(_stopped, found)), strict=True):
            if not rests:
                await to_the_end(engine.process.end)
                close(engine)
                process = processes[engine.index] = self.begin(engine.index, engine.kind)
                engines[engine.index] = await self.ready(process, engine.index, engine.kind, engine.chunk)
        for engine in engines:
            if engine.process.found:
                engine.client.tell(Call.LET_GO)
        return engines


async def _stopped(engine: Engine) -> bool:
    """Whether one that was found reads nothing any more that another server wanted, soon enough."""
    with contextlib.suppress(Exception):  # vLLM raises Exception for a call that failed
        async with asyncio.timeout(STOPPED_SECONDS):
            return bool(await engine.client.call_utility_async(Call.STOPPED))
    return False


def vanish(engine: Engine) -> None:
    """Its process is gone or about to be: no answer will come any more, and it holds nothing."""
    engine.alive = False
    engine.client.fail()
    engine.running = engine.waiting = engine.kv_tokens = 0


async def stop(engine: Engine) -> bool:
    """Have it end by itself, or end it; no socket to it is left then, and nothing else: False where the
    kernel did not end it in time."""
    try:
        return await in_thread(partial(engine.process.stop, STOP_SECONDS))
    except asyncio.CancelledError:
        await to_the_end(engine.process.end)
        raise
    finally:
        close(engine)


def close(engine: Engine) -> None:
    """Close every socket to it."""
    engine.client.close()
    engine.copiers.close()


def in_thread(call: Callable[[], T]) -> Awaitable[T]:
    """What `call` returns or raises, from a thread of its own. Not one of the event loop's pool: at its end
    the loop waits for all of those, and one of these may wait for long."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, wrong: BaseException | None) -> None:
        if answer.done():  # nobody waits any more
            return
        if wrong is not None:
            answer.set_exception(wrong)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        wrong: BaseException | None = None
        try:
            result = call()
        except BaseException as raised:  # noqa: BLE001  it is raised where the answer is awaited
            wrong = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, wrong)

    threading.Thread(target=run, daemon=True).start()
    return answer


async def to_the_end(call: Callable[[], T]) -> T:
    """The same, waited for even by who is cancelled meanwhile, however often; that is raised afterwards."""
    answer = asyncio.ensure_future(in_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not answer.done():
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError as wrong:
            cancelled = wrong
    if cancelled is not None:
        raise cancelled
    return answer.result()
