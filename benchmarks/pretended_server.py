"""The page and its routes over simulated engines that keep real time: a system of any size, on one core.

    PYTHONPATH=src python benchmarks/pretended_server.py --p-heavy 3 --d-heavy 5 --rate 60 --port 8200

It shows what a server with many instances shows, and what an update costs there; no engine is started.
Requests are not answered by it: they come from a workload. Sliders, drains and moves by hand act on the
simulated engines.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from taichi_serve.bench.workload import workload
from taichi_serve.cluster.simulated import SimulatedCluster
from taichi_serve.cluster.simulated.agenda import Due
from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend import page, routes
from taichi_serve.frontend.glances import feed_of
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.viewers import Viewers
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Event, Joined, Lost
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.search.goodput import Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

MACHINE = "qwen2.5-14b-tp1-a100"
MAX_CHUNK = 8192


@dataclass
class PretendedEngine:
    """What glances ask of a real engine."""

    name: str
    cluster: SimulatedCluster
    scheduler: GlobalScheduler

    @property
    def _ledger(self) -> Any:
        return self.scheduler.instances[self.name]

    @property
    def alive(self) -> bool:
        return self._ledger.alive

    @property
    def running(self) -> int:
        return self._ledger.decodes

    @property
    def waiting(self) -> int:
        return self._ledger.queued_requests

    @property
    def kv_tokens(self) -> int:
        return self._ledger.kv_tokens

    @property
    def kv_capacity(self) -> int:
        return self._ledger.kv_capacity


class Miniature:
    """A system that the routes and the feed take for a real one."""

    def __init__(self, sliders: Sliders, rate: float, slo: SLO, kv: int | None = None, seed: int = 0) -> None:
        """`rate` is requests a second; `kv` tokens that an instance holds, where not what the machine has."""
        found = machine(MACHINE)
        found = replace(found, kv_capacity=kv) if kv else found
        self.scene = Scene(found, workload("sharegpt", min(found.max_model_len, found.kv_capacity)), slo)
        self.sim = self.scene.cluster(sliders, rate, 1_000_000, seed)
        self.scheduler = self.scene.scheduler(sliders, Policy(), self.sim.capacities)
        self.recorder = Recorder(self.scheduler, found.kv_bytes_per_token)
        engines = [PretendedEngine(name, self.sim, self.scheduler) for name in self.scheduler.instances]
        self.engines = engines
        self.elastic = SimpleNamespace(leaving={})
        self.cluster = SimpleNamespace(engines=engines, tell=self.tell)
        self.keeper = SimpleNamespace(supervisor=Supervisor(list(self.scheduler.instances), 10))
        self.front = SimpleNamespace(behind=lambda _: [], processes=list)
        self.tuner = self.adviser = None
        self.max_chunk = MAX_CHUNK
        self.viewers = Viewers(self.recorder, partial(feed_of, self))
        self._facts = self.sim.facts()

    def tell(self, event: Event) -> None:
        """What an operator does, on the simulated clock."""
        now = self.sim.agenda.now
        self.sim.agenda.push(now, Due.FACT, replace(event, at=now))

    def lose(self, name: str, seconds: float, why: str = "killed by SIGKILL") -> None:
        """Kill an instance now, and bring it back after so many seconds."""
        now, capacity = self.sim.agenda.now, self.sim.capacities[name]
        self.sim.agenda.push(now, Due.FACT, Lost(now, name, why))
        self.sim.agenda.push(now + seconds, Due.FACT, Joined(now + seconds, name, capacity))

    def step(self, until: float, clock: float = 0.0) -> None:
        """All up to this moment of the simulated clock; facts are told with `clock` added to their times."""
        while self.sim.agenda.heap and self.sim.agenda.heap[0][0] <= until:
            fact = next(self._facts, None)
            if fact is None:
                return
            for command in self.recorder.on(replace(fact, at=fact.at + clock)):
                self.sim.send(command)

    async def live(self, ahead: float = 0.0) -> None:
        """Keep real time, for ever; at first go `ahead` so many seconds at once."""
        began = time.monotonic() - ahead
        while True:
            self.step(time.monotonic() - began, began)
            await asyncio.sleep(0.005)


def application(system: Miniature) -> FastAPI:
    """Our routes over it."""
    app = FastAPI()
    app.state.taichi = system
    app.include_router(routes.router)
    app.include_router(page.router)
    return app


async def serve(args: argparse.Namespace) -> None:
    """Until Ctrl-C."""
    import uvicorn

    sliders = Sliders(args.p_heavy, args.d_heavy, args.p_chunk, args.d_chunk)
    system = Miniature(sliders, args.rate, SLO(args.ttft_slo, args.tpot_slo), args.kv)
    living = asyncio.create_task(system.live(args.ahead))
    if args.lose:
        asyncio.get_running_loop().call_later(args.lose, system.lose, "i1", 12.0)
    config = uvicorn.Config(application(system), port=args.port, log_level="warning")
    await uvicorn.Server(config).serve()
    living.cancel()


def main() -> None:
    """Serve the page of a pretended system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--p-heavy", type=int, default=3)
    parser.add_argument("--d-heavy", type=int, default=5)
    parser.add_argument("--p-chunk", type=int, default=2048)
    parser.add_argument("--d-chunk", type=int, default=256)
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    parser.add_argument("--ttft-slo", type=float, default=1.0)
    parser.add_argument("--tpot-slo", type=float, default=0.06)
    parser.add_argument("--kv", type=int, help="tokens that an instance holds")
    parser.add_argument("--ahead", type=float, default=30.0, help="seconds that are past at the start")
    parser.add_argument("--lose", type=float, default=0.0, help="seconds after which i1 is lost for a while")
    parser.add_argument("--port", type=int, default=8200)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
