"""What a front end serves: vLLM's application with our door, over a cluster in another process."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import envs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.server.blocks import Hasher
from taichi_serve.frontend import probes
from taichi_serve.frontend.application import finished_by, furnish
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.client import ClusterLLM, cluster_llm, drain_from_thread, guard_statistics
from taichi_serve.frontend.connection import Connection
from taichi_serve.frontend.errors import SHUTTING_DOWN
from taichi_serve.frontend.several import relayed
from taichi_serve.frontend.several.remote import RemoteClient, RemoteCluster, RemoteTrouble, fitted
from taichi_serve.frontend.several.shared import NOT_ACCEPTING, Shared
from taichi_serve.frontend.several.words import Serving, Spec, Welcome
from taichi_serve.frontend.terms import Promises

if TYPE_CHECKING:
    from fastapi import FastAPI

    from taichi_serve.frontend.several.line import Line


class Outside:
    """One front end: what its routes and its door look at."""

    def __init__(self, spec: Spec, args: argparse.Namespace, line: Line, welcome: Welcome) -> None:
        self.args = args
        self.shared = Shared(Path(spec.shared), spec.count)
        self.inside = relayed.Inside(spec.inside)
        config = fitted(flags.engine_config(spec.argv, spec.directory), welcome)
        self.cluster = RemoteCluster(line, welcome.standing, _hasher(config.cache_config, welcome.hashes))
        self.client = RemoteClient(self.cluster, line)
        addresses = {"mp_admission_counters": self.shared.admissions}
        several = {"client_addresses": addresses, "client_count": spec.count, "client_index": spec.index}
        self.llm: ClusterLLM = cluster_llm(config, self.client, args, **several)
        self.llm.attendance = self.attendance = Attendance(self.cluster, self.cluster)
        self.client.failed, self.client.declined = self.llm.fail, self.llm.decline
        trouble = RemoteTrouble(line)
        self.client.came = trouble.guarded("statistics", self.llm.added)
        guard_statistics(self.llm, trouble)

    def unready(self) -> str | None:
        """Why a new request would not be taken now; None where it would."""
        return SHUTTING_DOWN if self.llm.closing else self.attendance.unready()

    def _numbers(self) -> set[str]:
        return {str(instance.index) for instance in self.cluster.engines}

    def finish(self, app: FastAPI) -> None:
        """Make vLLM's application ours."""
        app.state.taichi = self
        replaced = "/metrics"
        app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) != replaced]
        promises = Promises(
            flags.classes(self.args), lambda: self.cluster.standing.slo, self.args.slo_response_headers
        )
        furnish(
            app,
            self.args,
            lambda: self.llm.closing,
            self.attendance.retry_after,
            promises,
            routers=(relayed.router(self.inside, self._numbers), probes.router),
            drained=lambda: self.cluster.drained,
        )


def _hasher(cache: object, first: str | None) -> Hasher | None:
    """Hashes as the engines make them; none where nobody asks, or where they would be other ones."""
    if first is None:
        return None
    hasher = Hasher(cache.prefix_caching_hash_algo, cache.block_size)  # type: ignore[attr-defined]
    return hasher if hasher.first == first else None


async def serve(spec: Spec, args: argparse.Namespace, line: Line, welcome: Welcome) -> None:
    """Accept connections until a signal, then finish what is open."""
    outside = Outside(spec, args, line, welcome)
    llm, loop = outside.llm, asyncio.get_running_loop()
    listening = asyncio.create_task(outside.client.listen(), name="line")
    listening.add_done_callback(_deaf)
    llm.shutdown_from_thread = partial(drain_from_thread, llm, loop)
    loads = outside.shared.loads, spec.index
    with socket.socket(fileno=spec.listening) as sock, finished_by(outside.finish):
        announced = asyncio.create_task(_announce(outside, spec.index, line))
        shutdown_task = await build_and_serve(llm, spec.address, sock, args, loads, http=Connection)
        await shutdown_task
    announced.cancel()
    listening.cancel()
    await outside.inside.close()


def _deaf(listening: asyncio.Task[None]) -> None:
    """Who hears nothing more is of no use to its clients: another process takes its place."""
    if not listening.cancelled():
        if (wrong := listening.exception()) is not None:
            traceback.print_exception(wrong)
        os._exit(1)


async def _announce(outside: Outside, index: int, line: Line) -> None:
    """Say that it serves once vLLM's server accepts: it has no callback for that."""
    while outside.shared.loads[index] == NOT_ACCEPTING:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    settle()  # after vLLM's own application is built
    envs.enable_envs_cache()  # vLLM asks for one with every token
    line.send(Serving())
