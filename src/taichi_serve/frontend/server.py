"""`taichi serve`: start the instances, put the scheduler over them, and vLLM's own API server in front."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import cast

from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.front_ends import front_ends, remark
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.identity import bytes_per_token, identity
from taichi_serve.cluster.vllm.misuse import one_line
from taichi_serve.cluster.vllm.server.fleet import Fleet, Scratch, fleet, prepare, scratch
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.warm import measure
from taichi_serve.cluster.vllm.wire import Call
from taichi_serve.frontend.application import our_application
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.client import (
    ClusterClient,
    ClusterLLM,
    cluster_llm,
    drain_from_thread,
    guard_statistics,
)
from taichi_serve.frontend.connection import Connection
from taichi_serve.frontend.ending import STOP_SECONDS, no_longer_than
from taichi_serve.frontend.precheck import precheck
from taichi_serve.frontend.series import Left
from taichi_serve.frontend.several.hub import FrontEnds
from taichi_serve.frontend.several.serving import serve_several
from taichi_serve.frontend.starting import begun, promised
from taichi_serve.frontend.system import Make, System, assemble, let_go, say
from taichi_serve.frontend.traced import finish, traces
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.latency.identity import differences, refusal
from taichi_serve.latency.predict import Learned, Predictor
from taichi_serve.latency.profile import ProfileError
from taichi_serve.latency.profiled import Profiled
from taichi_serve.tuning.start import Start


@contextlib.asynccontextmanager
async def running(
    args: argparse.Namespace, argv: list[str], start: Start | None = None
) -> AsyncIterator[System]:
    """The whole system below the HTTP server; on leaving, no process and no socket of it is left."""
    with scratch(say) as here:
        config = flags.engine_config(argv, here.path.name)
        predictor = _predictor(args, config, start)  # first: what cannot be used is said at once
        deliver, make = _front(args, here)
        async with fleet(args, argv, config, here, deliver, say, say.waiting) as instances:
            await measure(instances.cluster, instances.cluster.engines)
            slo = await promised(args, start, instances.cluster, say)
            for engine in instances.cluster.engines:
                engine.client.tell(Call.SETTLE)
            yield assemble(args, instances, predictor, slo, make)


def _front(args: argparse.Namespace, here: Scratch) -> tuple[Callable[[EngineCoreOutputs], None], Make]:
    """Where the outputs of requests go, and how what is in front of the system is made."""
    if (why := remark(args)) is not None:
        say(why)
    if (count := front_ends(args)) > 1:
        fronts = FrontEnds(count, here.path)
        return fronts.deliver, fronts.open
    outputs: asyncio.Queue[EngineCoreOutputs | Left] = asyncio.Queue()
    return outputs.put_nowait, partial(_one_front, args, outputs)


def _one_front(
    args: argparse.Namespace,
    outputs: asyncio.Queue[EngineCoreOutputs | Left],
    instances: Fleet,
    attendance: Attendance,
    trouble: Trouble,
) -> ClusterLLM:
    """The front end in this process."""
    cluster = instances.cluster
    llm = cluster_llm(cluster.engines[0].client.vllm_config, ClusterClient(cluster, outputs), args)
    llm.attendance = attendance
    guard_statistics(llm, trouble)
    return llm


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
                if isinstance(system.front, FrontEnds):
                    await serve_several(system, system.front, argv, listen_address, sock)
                else:
                    await _serve_http(system, args, listen_address, sock)
        except StartError as wrong:
            say(str(wrong))
            return 1
        except asyncio.CancelledError:
            say("stopped before it was ready")
            return 130
    status = system.ending.status(asked=system.front.closing)
    say(system.ending.words)
    return status


async def _serve_http(system: System, args: argparse.Namespace, address: str, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    llm = cast(ClusterLLM, system.front)
    system.tracing = traces(args, system.recorder, llm)
    llm.shutdown_from_thread = partial(drain_from_thread, llm, loop)
    try:
        with our_application(system, args):
            announced = asyncio.create_task(_announce(system, sock, address))
            shutdown_task = await build_and_serve(llm, address, sock, args, http=Connection)
        await shutdown_task
        announced.cancel()
    finally:
        no_longer_than(STOP_SECONDS, lambda: system.ending.status(asked=system.front.closing))
        llm.shutdown_from_thread = None
        await let_go(system)
        await finish(system.tracing)


async def _announce(system: System, sock: socket.socket, address: str) -> None:
    """Say that it is ready once vLLM's server listens: it has no callback for that."""
    while not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    settle()  # after vLLM's own application is built
    envs.enable_envs_cache()  # vLLM asks for one with every token
    instances = ", ".join(f"{e.name} {e.kind.value} chunk {e.chunk}" for e in system.cluster.engines)
    say(f"ready on {address} with {instances}")


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
