"""One instance as the cluster sees it: its process, its client, the legs that run on it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.copiers import Copiers
from taichi_serve.cluster.vllm.server.engine_client import InstanceClient, Outputs
from taichi_serve.cluster.vllm.server.leg import Live, ahead_id
from taichi_serve.cluster.vllm.server.process import EngineProcess, StartError
from taichi_serve.cluster.vllm.wire import Call, MovedIn, News, Word
from taichi_serve.messages import SetChunk
from taichi_serve.sliders import Kind

# Environment of every CPU instance. UCX, under NIXL, else hooks into each mapping of memory, which costs a
# step of the model 3 %; without its hooks it registers memory when told to, which is all that KV needs.
ON_CPU = {"UCX_MEM_EVENTS": "n"}


@dataclass(slots=True, eq=False)
class Engine:
    """A running instance. Ids in `legs` and `residents` are those of the engine (leg.engine_id)."""

    index: int
    name: str
    process: EngineProcess
    client: InstanceClient
    copiers: Copiers
    kind: Kind
    chunk: int
    legs: dict[str, Live] = field(default_factory=dict)
    residents: dict[str, str] = field(default_factory=dict)  # decoding here: engine id -> request id
    alive: bool = True
    heard_at: float = field(default_factory=time.monotonic)
    kv_tokens: int = 0  # see holds
    held_at: float = 0.0
    running: int = 0
    waiting: int = 0
    made_at: float = 0.0  # when its last step was done, by its own word
    moved_in: dict[str, MovedIn] = field(default_factory=dict)  # of its last step
    news: dict[str, News] = field(default_factory=dict)  # of its last step
    # legs whose full blocks are pinned for the leg after: these blocks, until somebody copies them
    pinned: dict[str, list[int] | None] = field(default_factory=dict)
    recomputed_late: int = 0  # legs whose KV did not come in time

    @property
    def kv_capacity(self) -> int:
        """Tokens its KV cache holds."""
        return self.client.kv_capacity

    def holds(self, kv_tokens: int, at: float) -> None:
        """Tokens of KV that were held at `at` of the engine's own clock. A step and the answer to a call may
        be heard in another order than they were said in: what is older than what is known says nothing."""
        if at >= self.held_at:
            self.kv_tokens, self.held_at = kv_tokens, at

    def set_chunk(self, command: SetChunk) -> None:
        """Prompt tokens per step from now on."""
        self.kind, self.chunk = command.kind, command.chunk
        self.client.tell(Call.CHUNK, command.chunk)

    def add(self, live: Live, request: EngineCoreRequest) -> None:
        """Send a leg. A dead engine takes it silently: its loss is about to be told."""
        if not self.legs:
            self.heard_at = time.monotonic()
        self.legs[request.request_id] = live
        if not self.client.dead:
            self.client.add(request)

    def adopt(self, live: Live) -> None:
        """A leg is here already: it was sent when its KV began to be copied."""
        if not self.legs:
            self.heard_at = time.monotonic()
        self.legs[live.engine_request] = live

    def settle(self, live: Live) -> None:
        """The leg's first token is out: it is a resident decode now."""
        self.residents[live.engine_request] = live.id

    def leave(self, engine_request: str) -> None:
        """Have a leg end after the token it is on."""
        self.client.tell(Call.LEAVE, [engine_request])

    def release(self, engine_request: str) -> None:
        """Free the blocks of a leg that ended and that nobody will read."""
        self.client.tell(Call.RELEASE, [engine_request])

    def unpin(self, reader: str) -> None:
        """What was pinned for this leg is read no more."""
        if self.alive:
            call = self.client.call_utility_async(Call.UNPIN, reader)
            asyncio.ensure_future(call).add_done_callback(self._unpinned)

    def _unpinned(self, answer: asyncio.Task[tuple[int, float]]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self.holds(*answer.result())

    def forget(self, live: Live) -> None:
        """The leg is over by itself."""
        self.legs.pop(live.engine_request, None)
        self.residents.pop(live.engine_request, None)
        if self.pinned.pop(live.engine_request, None):
            self.unpin(ahead_id(live, live.leg + 1))

    def drop(self, live: Live) -> None:
        """End the leg from outside."""
        if live.engine_request in self.legs:
            self.client.abort([live.engine_request])
            self.forget(live)


Receive = Callable[[Engine, Outputs], None]
Hear = Callable[[Word], None]


async def start_engines(
    configs: list[VllmConfig],
    argv: list[str],
    environments: list[dict[str, str]],
    kinds: list[tuple[Kind, int]],
    directory: Path,
    receive: Receive,
    hear: Hear,
    say: Callable[[str], None],
) -> list[Engine]:
    """Start every instance side by side and wait until all are up; one line a second says what is awaited.

    If one fails, all are ended and its StartError is raised.
    """
    processes = [
        EngineProcess(f"i{i}", directory, argv, environment) for i, environment in enumerate(environments)
    ]
    waiting = {
        asyncio.create_task(asyncio.to_thread(process.wait_ready, config)): process.name
        for process, config in zip(processes, configs, strict=True)
    }
    began = time.monotonic()
    try:
        pending = set(waiting)
        while pending:
            done, pending = await asyncio.wait(pending, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if pending:
                names = ", ".join(sorted(waiting[task] for task in pending))
                say(f"waiting for {names} to load the model ({time.monotonic() - began:.0f} s)")
        return [
            _engine(i, process, config, kind, chunk, receive, hear)
            for i, (process, config, (kind, chunk)) in enumerate(zip(processes, configs, kinds, strict=True))
        ]
    except BaseException:
        for process in processes:
            process.end()
        await asyncio.gather(*waiting, return_exceptions=True)
        raise


def _engine(
    index: int,
    process: EngineProcess,
    config: VllmConfig,
    kind: Kind,
    chunk: int,
    receive: Receive,
    hear: Hear,
) -> Engine:
    holder: list[Engine] = []
    client = InstanceClient(config, process, lambda outputs: receive(holder[0], outputs))
    ranks = config.parallel_config.world_size
    copiers = Copiers(process.log.parent, process.engine_id, ranks, hear)
    engine = Engine(index, process.name, process, client, copiers, kind, chunk)
    holder.append(engine)
    client.tell(Call.CHUNK, chunk)
    return engine


def environments(count: int, per_instance: int, devices: str | None) -> list[dict[str, str]]:
    """What the instances' environments have beside the server's own: devices and cores.

    Raises StartError when there are fewer devices than asked for, or `devices` has the wrong form.
    """
    groups = _groups(count, per_instance, devices)
    on_cpu = current_platform.is_cpu()
    variable = "VLLM_CPU_OMP_THREADS_BIND" if on_cpu else "CUDA_VISIBLE_DEVICES"
    common = {k: v for k, v in ON_CPU.items() if k not in os.environ} if on_cpu else {}
    return [common | ({variable: group} if group else {}) for group in groups]


def _groups(count: int, per_instance: int, devices: str | None) -> list[str]:
    if devices is not None:
        groups = [group.strip() for group in devices.split(";")]
        if len(groups) != count or not all(groups):
            raise StartError(f"--devices {devices!r} names {len(groups)} groups for {count} instances")
        return groups
    if current_platform.is_cpu():
        if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
            return [""] * count
        return _cores(count, per_instance)
    available = current_platform.device_count()
    if count * per_instance > available:
        raise StartError(
            f"{count} instances of {per_instance} GPUs need {count * per_instance}, and there are "
            f"{available}; "
            'let instances share with --devices, as in --devices "0;0"'
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if visible != [""] else [str(i) for i in range(available)]
    return [",".join(names[i * per_instance : (i + 1) * per_instance]) for i in range(count)]


def _cores(count: int, ranks: int) -> list[str]:
    """The cores this process may use, divided evenly over instances and their tensor-parallel ranks.

    With fewer cores than ranks they are shared. The form is vLLM's: ranks split by "|".
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // (count * ranks))
    chunks = [
        ",".join(str(cores[(rank * share + k) % len(cores)]) for k in range(share))
        for rank in range(count * ranks)
    ]
    return ["|".join(chunks[i * ranks : (i + 1) * ranks]) for i in range(count)]
