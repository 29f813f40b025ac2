"""The instances of one server from their first process to their last: start, warm, notice ends, stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from vllm.config import VllmConfig
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.instance import environments, start_engines
from taichi_serve.cluster.vllm.server.warm import warm
from taichi_serve.cluster.vllm.wire import Word

STOP_SECONDS = 10.0  # an engine that was asked to stop and has not is ended after this

Say = Callable[[str], None]
Deliver = Callable[[EngineCoreOutputs], None]


def prepare() -> None:
    """vLLM's own settings of the environment; engines inherit them, so this comes before any is started."""
    cli_env_setup()


@dataclass(slots=True)
class Scratch:
    """The directory of one server's logs and sockets; `keep` is set when somebody will want the logs."""

    path: Path
    keep: bool = False


@contextlib.contextmanager
def scratch(say: Say) -> Iterator[Scratch]:
    """A directory that goes in the end; when something went wrong its logs stay, and it is said where."""
    here = Scratch(Path(tempfile.mkdtemp(prefix="taichi-")))  # mode 0700
    try:
        yield here
    except asyncio.CancelledError:  # somebody stopped it: nothing went wrong
        raise
    except BaseException:
        here.keep = True
        raise
    finally:
        if here.keep and any(here.path.glob("*.log")):
            for path in here.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.suffix != ".log":
                    path.unlink()
            say(f"logs are kept in {here.path}")
        else:
            shutil.rmtree(here.path, ignore_errors=True)


@contextlib.asynccontextmanager
async def fleet(
    args: argparse.Namespace, argv: list[str], config: VllmConfig, here: Scratch, deliver: Deliver, say: Say
) -> AsyncIterator[VllmCluster]:
    """The instances that the sliders ask for, warm and facts open; no process of them is left afterwards."""
    engines: list[Engine] = []
    try:
        cluster = await _start(args, argv, config, here.path, engines, deliver, say)
        say(f"warming {len(engines) * (len(engines) - 1)} pairs of instances")
        await warm(cluster)
        cluster.open()
        yield cluster
        here.keep = here.keep or not all(engine.alive for engine in engines)
    finally:
        await _stop(engines)


async def _start(
    args: argparse.Namespace,
    argv: list[str],
    config: VllmConfig,
    directory: Path,
    engines: list[Engine],
    deliver: Deliver,
    say: Say,
) -> VllmCluster:
    sliders = flags.sliders(args)
    settings = environments(sliders.instances, config.parallel_config.world_size, args.devices)
    holder: list[VllmCluster] = []

    def receive(engine: Engine, item: EngineCoreOutputs | Exception) -> None:
        if isinstance(item, Exception):
            holder[0].lose(engine, f"{type(item).__name__}: {item}")
            engine.process.kill()
        else:
            holder[0].receive(engine, item)

    kinds = [(kind, sliders.chunk(kind)) for kind in sliders.kinds()]
    configs = [deepcopy(config) for _ in kinds]

    def hear(word: Word) -> None:
        holder[0].hands.hear(word)

    engines += await start_engines(configs, argv, settings, kinds, directory, receive, hear, say)
    cluster = VllmCluster(engines, deliver, args.move_timeout)
    holder.append(cluster)
    loop = asyncio.get_running_loop()
    for engine in engines:
        engine.process.on_exit(_in_loop(loop, cluster, engine, say))
    return cluster


def _in_loop(
    loop: asyncio.AbstractEventLoop, cluster: VllmCluster, engine: Engine, say: Say
) -> Callable[[int], object]:
    return lambda code: loop.call_soon_threadsafe(_exited, cluster, engine, say, code)


def _exited(cluster: VllmCluster, engine: Engine, say: Say, code: int) -> None:
    if not engine.process.stopping:
        say(f"instance {engine.name} ended with exit code {code}; its log is {engine.process.log}")
        engine.process.kill()  # its workers, if any are left
    cluster.lose(engine, f"exit code {code}")


async def _stop(engines: list[Engine]) -> None:
    for engine in engines:
        engine.alive = False
    await asyncio.gather(*(asyncio.to_thread(engine.process.stop, STOP_SECONDS) for engine in engines))
    for engine in engines:
        engine.client.close()
        engine.copiers.close()
