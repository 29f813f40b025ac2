"""`taichi serve`: start the instances, put the scheduler over them, and vLLM's own API server in front."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.cluster.base import drive
from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.identity import bytes_per_token, identity
from taichi_serve.cluster.vllm.misuse import one_line
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.fleet import fleet, prepare, scratch
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.warm import measure
from taichi_serve.cluster.vllm.wire import Call
from taichi_serve.eventlog import EventLog
from taichi_serve.frontend.application import our_application
from taichi_serve.frontend.client import ClusterLLM, cluster_llm
from taichi_serve.frontend.ending import Ending
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.latency.identity import differences, refusal
from taichi_serve.latency.predict import Learned, Predictor
from taichi_serve.latency.profile import ProfileError
from taichi_serve.latency.profiled import Profiled
from taichi_serve.scheduling.scheduler import GlobalScheduler

log = logging.getLogger("taichi")


@dataclass
class System:
    """Everything that runs, for the routes to look at."""

    cluster: VllmCluster
    scheduler: GlobalScheduler
    recorder: Recorder
    llm: ClusterLLM
    max_chunk: int
    tasks: list[asyncio.Task[None]]
    trouble: Trouble
    ending: Ending
    event_log: EventLog | None = None


def say(text: str) -> None:
    """A line for whoever watches the start."""
    sys.stderr.write(f"taichi: {text}\n")
    sys.stderr.flush()


@contextlib.asynccontextmanager
async def running(args: argparse.Namespace, argv: list[str]) -> AsyncIterator[System]:
    """The whole system below the HTTP server; on leaving, no process and no socket of it is left."""
    with scratch(say) as here:
        config = flags.engine_config(argv, here.path.name)
        predictor = _predictor(args, config)  # before the engines: what cannot be used is said at once
        outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        async with fleet(args, argv, config, here, outputs.put_nowait, say) as cluster:
            await measure(cluster)
            for engine in cluster.engines:
                engine.client.tell(Call.SETTLE)
            yield _system(args, cluster, predictor, outputs)


def _system(
    args: argparse.Namespace,
    cluster: VllmCluster,
    predictor: Predictor,
    outputs: asyncio.Queue[EngineCoreOutputs],
) -> System:
    capacities = {engine.name: engine.kv_capacity for engine in cluster.engines}
    scheduler = GlobalScheduler(
        flags.sliders(args), flags.slo(args), predictor, flags.policy(args), capacities
    )
    config = cluster.engines[0].client.vllm_config
    written = _event_log(args.event_log)
    trouble, ending = Trouble(say), Ending()
    recorder = Recorder(scheduler, bytes_per_token(config), written.write if written else None, trouble)
    llm = cluster_llm(config, cluster, outputs, args)
    if (statistics := llm.logger_manager) is not None:  # what fails there would end every stream
        statistics.record = trouble.guarded("statistics", statistics.record)
    tasks = [
        asyncio.create_task(drive(recorder, cluster), name="drive"),
        asyncio.create_task(_watch(cluster, args.stall_timeout), name="watch"),
    ]
    tasks[0].add_done_callback(partial(_drive_ended, ending))
    largest = config.scheduler_config.max_num_batched_tokens
    return System(cluster, scheduler, recorder, llm, largest, tasks, trouble, ending, written)


def _event_log(path: str | None) -> EventLog | None:
    try:
        return EventLog(Path(path)) if path else None
    except OSError as wrong:
        raise StartError(f"the event log {path} cannot be written: {wrong.strerror}") from wrong


def _drive_ended(ending: Ending, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the scheduler failed; shutting down", exc_info=task.exception())
        ending.fail("the scheduler failed")
        signal.raise_signal(signal.SIGTERM)


async def _watch(cluster: VllmCluster, stall_timeout: float) -> None:
    """An instance that has work and says nothing for too long counts as lost."""
    while True:
        await asyncio.sleep(1)
        for engine in cluster.engines:
            silent = time.monotonic() - engine.heard_at
            if engine.alive and engine.legs and silent > stall_timeout:
                say(
                    f"instance {engine.name} was silent for {silent:.0f} s with work to do: it counts as lost"
                )
                cluster.lose(engine, f"silent for {silent:.0f} s")
                engine.process.kill()


def _predictor(args: argparse.Namespace, config: VllmConfig) -> Predictor:
    """What the policies believe at first: a profile that fits these engines, or a default that learns."""
    profile = flags.profile(args)
    if profile is None:
        return Learned()
    engine = identity(config, args.model)
    if why := refusal(profile, engine):
        raise ProfileError(f"{args.profile}: {why}")
    for difference in differences(profile, engine):
        say(f"{args.profile}: {difference}; predictions will adapt")
    return Profiled.of(profile)


async def serve(args: argparse.Namespace, argv: list[str]) -> int:
    """Serve until a signal; the exit status."""
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None
    # Until the HTTP server is up and takes the signals over, they end the start.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.cancel)
    try:
        listen_address, sock = setup_server(args, reuse_port=False)
    except OSError as wrong:
        say(f"cannot listen on port {args.port}: {wrong.strerror or wrong}")
        return 1
    with sock:
        try:
            async with running(args, argv) as system:
                await _serve_http(system, args, listen_address, sock)
        except StartError as wrong:
            say(str(wrong))
            return 1
        except asyncio.CancelledError:
            say("stopped before it was ready")
            return 130
    status = system.ending.status(asked=system.llm.closing)
    say(system.ending.words)
    return status


async def _serve_http(system: System, args: argparse.Namespace, address: str, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    timeout = float(system.llm.vllm_config.shutdown_timeout)
    # vLLM's server calls this in a thread when a signal comes, and closes its connections afterwards.
    system.llm.shutdown_from_thread = partial(_drain_from_thread, system, loop, timeout)
    try:
        with our_application(system, args):
            announced = asyncio.create_task(_announce(system, sock, address))
            shutdown_task = await build_and_serve(system.llm, address, sock, args)
        await shutdown_task
        announced.cancel()
    finally:
        system.llm.shutdown_from_thread = None
        for task in system.tasks:
            task.cancel()
        await asyncio.gather(*system.tasks, return_exceptions=True)
        if system.event_log is not None:
            system.trouble.guarded("event log", system.event_log.close)()


async def _announce(system: System, sock: socket.socket, address: str) -> None:
    """Say that it is ready once vLLM's server listens: it has no callback for that."""
    while not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    settle()  # after vLLM's own application is built
    say(f"ready on {address} with {_summary(system)}")


def _summary(system: System) -> str:
    return ", ".join(f"{e.name} {e.kind.value} chunk {e.chunk}" for e in system.cluster.engines)


def _drain_from_thread(system: System, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
    asyncio.run_coroutine_threadsafe(_drain(system, timeout), loop).result()


async def _drain(system: System, timeout: float) -> None:
    """Let what runs finish, at most `timeout` seconds; then end it. New requests get 503 meanwhile."""
    system.llm.closing = True
    if not await system.llm.drained(timeout):
        system.llm.reject_rest()
        await system.llm.drained(1.0)


def main(argv: list[str]) -> int:
    """`taichi serve` with these words; the exit status."""
    import uvloop

    prepare()
    args = flags.parse(argv)
    try:
        return int(uvloop.run(serve(args, argv)))
    except KeyboardInterrupt:
        return 130
    except ProfileError as wrong:
        say(str(wrong))
        return 2
    except (ValueError, OSError) as wrong:  # vLLM's words on a model path or a configuration
        if envs.VLLM_LOGGING_LEVEL == "DEBUG":
            raise
        say(f"{args.model}: {one_line(wrong)}")
        return 1
