"""`taichi serve`: start the instances, put the scheduler over them, and vLLM's own API server in front."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.classes import Classes
from taichi_serve.cluster.base import drive
from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.identity import bytes_per_token, identity
from taichi_serve.cluster.vllm.misuse import one_line
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.fleet import Fleet, fleet, prepare, scratch
from taichi_serve.cluster.vllm.server.gate import Gate
from taichi_serve.cluster.vllm.server.keeper import Keeper
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.warm import measure
from taichi_serve.cluster.vllm.wire import Call
from taichi_serve.eventlog import EventLog
from taichi_serve.frontend.adviser import Rehearsing
from taichi_serve.frontend.application import our_application
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.client import ClusterLLM, cluster_llm
from taichi_serve.frontend.connection import Connection
from taichi_serve.frontend.ending import STOP_SECONDS, Ending, no_longer_than
from taichi_serve.frontend.errors import SHUTTING_DOWN
from taichi_serve.frontend.glances import feed_of
from taichi_serve.frontend.precheck import precheck
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.starting import begun, promised
from taichi_serve.frontend.traced import Traces, finish, traces
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.frontend.viewers import Viewers
from taichi_serve.frontend.voice import Voice
from taichi_serve.latency.identity import differences, refusal
from taichi_serve.latency.predict import Learned, Predictor
from taichi_serve.latency.profile import ProfileError
from taichi_serve.latency.profiled import Profiled
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import OFF, ON
from taichi_serve.slo import SLO
from taichi_serve.tuning.rehearsal import Limits
from taichi_serve.tuning.start import Start
from taichi_serve.tuning.tuner import Tuner

log = logging.getLogger("taichi")


@dataclass
class System:
    """Everything that runs, for the routes to look at."""

    cluster: VllmCluster
    scheduler: GlobalScheduler
    recorder: Recorder
    llm: ClusterLLM
    keeper: Keeper
    attendance: Attendance
    max_chunk: int
    settings: dict[str, Any]  # those it was started with
    classes: Classes
    tasks: list[asyncio.Task[None]]
    trouble: Trouble
    ending: Ending
    event_log: EventLog | None = None
    tuner: Tuner | None = None
    adviser: Rehearsing | None = None
    tracing: Traces | None = None
    viewers: Viewers = field(init=False)

    def __post_init__(self) -> None:
        self.viewers = Viewers(self.recorder, partial(feed_of, self), self.emptied)

    def emptied(self) -> bool:
        """Whether the server ends, and nothing is open any more: who only looks is to leave, too."""
        return self.llm.closing and not self.llm.output_processor.has_unfinished_requests()

    def unready(self) -> str | None:
        """Why a new request would not be taken now; None where it would."""
        return SHUTTING_DOWN if self.llm.closing else self.attendance.unready()

    def fail(self, why: str) -> None:
        """End the server because it cannot go on."""
        self.ending.fail(why)
        signal.raise_signal(signal.SIGTERM)


say = Voice()


@contextlib.asynccontextmanager
async def running(
    args: argparse.Namespace, argv: list[str], start: Start | None = None
) -> AsyncIterator[System]:
    """The whole system below the HTTP server; on leaving, no process and no socket of it is left."""
    with scratch(say) as here:
        config = flags.engine_config(argv, here.path.name)
        predictor = _predictor(args, config, start)  # first: what cannot be used is said at once
        outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        async with fleet(args, argv, config, here, outputs.put_nowait, say, say.waiting) as instances:
            await measure(instances.cluster)
            slo = await promised(args, start, instances.cluster, say)
            for engine in instances.cluster.engines:
                engine.client.tell(Call.SETTLE)
            yield _system(args, instances, predictor, outputs, slo)


def _system(
    args: argparse.Namespace,
    instances: Fleet,
    predictor: Predictor,
    outputs: asyncio.Queue[EngineCoreOutputs],
    slo: SLO,
) -> System:
    cluster, keeper = instances.cluster, instances.keeper
    capacities = {engine.name: engine.kv_capacity for engine in cluster.engines}
    block_size = cluster.hasher.block_size if cluster.hasher is not None else 0
    policy = flags.policy(args)
    if cluster.stays is not None:  # KV that cannot move cannot be fetched
        policy = replace(policy, fetch=False)
    scheduler = GlobalScheduler(flags.sliders(args), slo, predictor, policy, capacities, block_size)
    config = cluster.engines[0].client.vllm_config
    written = _event_log(args.event_log)
    trouble, ending = Trouble(say), Ending()
    recorder = Recorder(scheduler, bytes_per_token(config), written.write if written else None, trouble)
    llm = cluster_llm(config, cluster, outputs, args)
    if (statistics := llm.logger_manager) is not None:  # what fails there would end every stream
        statistics.record = trouble.guarded("statistics", statistics.record)
    llm.attendance = Attendance(cluster, keeper)
    largest = config.scheduler_config.max_num_batched_tokens
    looked_at = (cluster, scheduler, recorder, llm, keeper, llm.attendance)
    system = System(*looked_at, largest, args.settings, flags.classes(args), [], trouble, ending, written)
    keeper.told.failed, keeper.told.hopeless = llm.fail, system.fail
    system.tracing = traces(args, recorder, llm)
    if args.autotune != OFF:
        system.adviser = Rehearsing(trouble)
        limits = _limits(config, min(capacities.values()))
        guard = partial(trouble.guarded, "autotune")
        system.tuner = Tuner(recorder, scheduler, limits, system.adviser, args.autotune == ON, guard)
    driven = system.tuner or recorder
    driving = asyncio.create_task(drive(driven, Gate(cluster, keeper.quarantine, llm.decline)), name="drive")
    driving.add_done_callback(partial(_drive_ended, system))
    system.tasks += [driving, *instances.supervise()]
    return system


def _limits(config: VllmConfig, kv_capacity: int) -> Limits:
    """What instances of this configuration can hold and take."""
    scheduling = config.scheduler_config
    return Limits(
        kv_capacity,
        scheduling.max_num_seqs,
        config.model_config.max_model_len,
        scheduling.max_num_batched_tokens,
        config.cache_config.block_size,
        bytes_per_token(config),
    )


def _event_log(path: str | None) -> EventLog | None:
    try:
        return EventLog(Path(path)) if path else None
    except OSError as wrong:
        raise StartError(f"the event log {path} cannot be written: {wrong.strerror}") from wrong


def _drive_ended(system: System, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the scheduler failed; shutting down", exc_info=task.exception())
        system.fail(f"the scheduler failed: {task.exception()!r}")


def _predictor(args: argparse.Namespace, config: VllmConfig, start: Start | None) -> Predictor:
    """What the policies believe at first: a profile that fits these engines, what the start was chosen by, or
    a default that learns."""
    profile = flags.profile(args)
    if profile is None:
        known = start.known if start else None
        return known.predictor(bytes_per_token(config)) if known else Learned()
    engine = identity(config, args.model)
    if why := refusal(profile, engine):
        raise ProfileError(f"{args.profile}: {why}")
    for difference in differences(profile, engine):
        say(f"{args.profile}: {difference}; predictions will adapt")
    return Profiled.of(profile)


async def serve(args: argparse.Namespace, argv: list[str], start: Start | None = None) -> int:
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
        where = f"--uds {args.uds}" if args.uds else f"port {args.port}"
        say(f"cannot listen on {where}: {wrong.strerror or wrong}")
        return 1
    with sock:
        try:
            async with running(args, argv, start) as system:
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
            shutdown_task = await build_and_serve(system.llm, address, sock, args, http=Connection)
        await shutdown_task
        announced.cancel()
    finally:
        no_longer_than(STOP_SECONDS, lambda: system.ending.status(asked=system.llm.closing))
        system.llm.shutdown_from_thread = None
        for task in system.tasks:
            task.cancel()
        if system.adviser is not None:
            system.adviser.close()
        await asyncio.gather(*system.tasks, return_exceptions=True)
        await finish(system.tracing)
        if system.event_log is not None:
            system.trouble.guarded("event log", system.event_log.close)()


async def _announce(system: System, sock: socket.socket, address: str) -> None:
    """Say that it is ready once vLLM's server listens: it has no callback for that."""
    while not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    settle()  # after vLLM's own application is built
    envs.enable_envs_cache()  # vLLM asks for one with every token
    instances = ", ".join(f"{e.name} {e.kind.value} chunk {e.chunk}" for e in system.cluster.engines)
    say(f"ready on {address} with {instances}")


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
        precheck(args)
        args, argv, start = begun(args, args.argv, say)
        return int(uvloop.run(serve(args, argv, start)))
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
