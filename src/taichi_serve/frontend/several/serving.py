"""`taichi serve --api-server-count N`: HTTP in N processes, everything that decides in this one."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend.ending import STOP_SECONDS, no_longer_than
from taichi_serve.frontend.several.inside import answered
from taichi_serve.frontend.several.keeping import FrontEndKeeper, names
from taichi_serve.frontend.system import System, let_go, say

if TYPE_CHECKING:
    from taichi_serve.frontend.several.hub import FrontEnds

END_SECONDS = 10.0  # beyond --shutdown-timeout, that a front end may take to end


async def serve_several(
    system: System, fronts: FrontEnds, argv: list[str], address: str, sock: socket.socket
) -> None:
    """Serve until a signal. Raises StartError where the front ends do not start."""
    args = flags.parse(argv)
    fronts.promise(lambda: system.scheduler.slo)
    fronts.drained = system.drained
    system.recorder.observers.append(system.trouble.guarded("front end", fronts.observe))
    supervisor = Supervisor([names(index) for index in range(fronts.count)], args.restarts)
    keeper = fronts.keeper = FrontEndKeeper(fronts, argv, (address, sock), supervisor, say)
    keeper.hopeless = system.fail
    system.tasks.append(asyncio.create_task(keeper.watch(args.stall_timeout), name="front ends"))
    try:
        async with answered(system, fronts.inside):
            try:
                say(f"starting {fronts.count} front ends")
                await keeper.start()
                asked = _asked_to_stop()
                settle()
                said = ", ".join(f"{e.name} {e.kind.value} chunk {e.chunk}" for e in system.cluster.engines)
                say(f"ready on {address} with {said}, and {fronts.count} front ends")
                await asked.wait()
                fronts.closing = True
            finally:
                await keeper.stop(float(args.shutdown_timeout) + END_SECONDS)
    finally:
        no_longer_than(STOP_SECONDS, lambda: system.ending.status(asked=fronts.closing))
        await let_go(system)
        fronts.close()


def _asked_to_stop() -> asyncio.Event:
    """Set by a signal, from here on; before, one ends the start."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    return asked
