"""The instances of one server from their first process to their last: start, warm, keep up, stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.curve import Pair
from taichi_serve.cluster.vllm.hosts.launching import Hosts, on_ray
from taichi_serve.cluster.vllm.moved import cli_env_setup
from taichi_serve.cluster.vllm.server.blocks import agreed
from taichi_serve.cluster.vllm.server.clock import Patience
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.engine_client import Outputs
from taichi_serve.cluster.vllm.server.forks import Forks
from taichi_serve.cluster.vllm.server.keeper import Keeper
from taichi_serve.cluster.vllm.server.line import MakeLine, Wires, over_files
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.cluster.vllm.server.scratch import Say, Scratch, scratch
from taichi_serve.cluster.vllm.server.start import Launcher, Waiting, in_thread, stop, vanish
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.cluster.vllm.server.told import Told
from taichi_serve.cluster.vllm.server.warm import warm
from taichi_serve.cluster.vllm.server.watch import Watch
from taichi_serve.cluster.vllm.wire import Call, Word
from taichi_serve.scheduling.policy import BLIND

__all__ = ["Fleet", "Scratch", "fleet", "prepare", "scratch"]

Deliver = Callable[[EngineCoreOutputs], None]


@dataclass(frozen=True)
class Made:
    """What instances are begun by: their devices; what forks them, or the hosts that they run on; and what
    they are spoken to on."""

    devices: Devices
    line: MakeLine
    forks: Forks | None = None
    hosts: Hosts | None = None

    def close(self) -> None:
        """All of them have ended."""
        if self.forks is not None:
            self.forks.close()


async def _made(
    args: argparse.Namespace, argv: list[str], config: VllmConfig, here: Scratch, say: Say
) -> Made:
    world = config.parallel_config.world_size
    if args.ray:
        hosts, address = await in_thread(lambda: on_ray(args, argv, world, here.path.name, say))
        return Made(hosts.devices, _lines(address, hosts.mesh), hosts=hosts)
    line = _lines(args.cluster_host)
    devices = Devices(flags.sliders(args).instances, world, args.devices)
    # CUDA and forks do not go together.
    return Made(devices, line, Forks(here.path, say) if current_platform.is_cpu() else None)


def prepare() -> None:
    """vLLM's own settings of the environment; engines inherit them, so this comes before any is started."""
    cli_env_setup()


@dataclass
class Fleet:
    """All instances, warm, and what looks after them."""

    cluster: VllmCluster
    keeper: Keeper
    watch: Watch
    patience: Patience
    launcher: Launcher

    def supervise(self) -> list[asyncio.Task[None]]:
        """From here on lost instances come back, and silent ones are noticed; the tasks of it."""
        self.keeper.open()
        return [asyncio.create_task(self.watch.run(), name="watch")]


@contextlib.asynccontextmanager
async def fleet(
    args: argparse.Namespace,
    argv: list[str],
    config: VllmConfig,
    here: Scratch,
    deliver: Deliver,
    say: Say,
    waiting: Waiting,
) -> AsyncIterator[Fleet]:
    """The instances that the sliders ask for, warm and facts open; no process of them is left afterwards.
    `waiting` is told once a second what is awaited, and for how many seconds by now. As long as nobody calls
    `supervise`, an instance that is lost stays so."""
    patience = Patience()
    ticking = asyncio.create_task(patience.run(), name="clock")
    all_of_them: list[Fleet] = []
    made: Made | None = None
    began = time.monotonic()
    try:
        made = await _made(args, argv, config, here, say)
        launcher = _launcher(argv, config, here, patience, made, all_of_them)
        sliders = flags.sliders(args)
        engines = await launcher.all([(kind, sliders.chunk(kind)) for kind in sliders.kinds()], waiting)
        cluster = VllmCluster(engines, deliver, args.move_timeout, patience.call_later)
        cluster.stays = await _stays(engines[0], say)
        cluster.hasher = None if args.prefixes == BLIND else await agreed(engines, say)
        supervisor = Supervisor([engine.name for engine in engines], args.restarts)
        keeper = Keeper(cluster, launcher, supervisor, Quarantine(), Told(say, deliver))
        watch = Watch(lambda: cluster.engines, patience, args.stall_timeout, keeper)
        all_of_them.append(Fleet(cluster, keeper, watch, patience, launcher))
        try:
            say(f"warming {len(engines) * (len(engines) - 1)} pairs of instances")
            await warm(cluster)
            supervisor.took = time.monotonic() - began
            cluster.open()
            yield all_of_them[0]
            here.keep = here.keep or keeper.losses > 0 or not all(engine.alive for engine in cluster.engines)
        finally:
            await keeper.stop()
            await _stop(cluster.engines)
    finally:
        ticking.cancel()
        if made is not None:
            made.close()


async def _stays(engine: Engine, say: Say) -> str | None:
    """Why no request of this model can move, or None."""
    reasons: list[str] = await engine.client.call_utility_async(Call.KV)
    if not reasons:
        return None
    say(f"requests stay where they prefill: {'; '.join(reasons)}")
    return "; ".join(reasons)


def _launcher(
    argv: list[str],
    config: VllmConfig,
    here: Scratch,
    patience: Patience,
    made: Made,
    fleets: list[Fleet],
) -> Launcher:
    """How its instances are started. `fleets` will have the one that they are of."""

    def receive(engine: Engine, item: Outputs) -> None:
        if not engine.alive or not fleets:
            return  # it is lost, and what it said before is known or never will be
        if engine.cut:  # before this came something else may have been lost
            fleets[0].keeper.cut(engine)
        elif isinstance(item, Exception):
            fleets[0].keeper.broke(engine, item)
        else:
            fleets[0].watch.heard(engine)
            fleets[0].cluster.receive(engine, item)

    def hear(word: Word) -> None:
        if fleets:  # before, it can only be meant for another server
            fleets[0].cluster.hands.hear(word)

    def exited(engine: Engine, code: int) -> None:
        if fleets:
            fleets[0].keeper.exited(engine, code)
        else:  # others still load: whoever asks it something will see it
            vanish(engine)

    heard, begun_by = (receive, hear, exited), (made.forks, made.line, made.hosts)
    return Launcher(config, argv, made.devices, here.path, *heard, patience, *begun_by)


def _lines(host: str | None, mesh: Pair | None = None) -> MakeLine:
    """What instances are spoken to on, with the key of those that are there already. Raises StartError where
    this host does not have the address."""
    try:
        return over_files if host is None else Wires(host, mesh)
    except OSError as wrong:
        raise StartError(f"--cluster-host {host}: {wrong.strerror}") from wrong


async def _stop(engines: list[Engine]) -> None:
    for engine in engines:
        engine.alive = False
    await asyncio.gather(*map(stop, engines))
