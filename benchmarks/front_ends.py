"""What a token costs in each process of a server with one front end and with several, over pretended engines.

    PYTHONPATH=src python benchmarks/front_ends.py [--counts 1 2] [--rounds 3] [--engines 4] [--streams 24]

Everything but the engines is the product: HTTP, tokenizer, detokenizer, scheduler, journeys, lines. Engines
are pretended in the server's process: each makes a token for each of its streams in every step, as vLLM's
bytes, which are decoded as an engine's are. What that costs is counted as the server's, with one front end
and with several alike.

A client in a process of its own keeps all streams open: as many for each front end, whatever their number,
so that each has to do with a step what the one had. The engines' steps follow each other. Counted is the
processor time of each process while so many seconds pass, divided by the output tokens of that time. With one
front end a server can use one core; with N, its N + 1 processes share N cores' worth of time here. The rounds
take turns, so that a machine whose speed changes changes it for both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from servers import FLAGS, Server

from taichi_serve.tiny import cached_tiny_model

KV_BLOCKS = 1 << 20
OUTPUT = 400  # tokens of each stream
WARM = 6.0  # seconds until all streams are in the middle

# ------------------------------------------------------------------------------------ the pretended engines


@dataclass
class Leg:
    """An engine request that runs."""

    id: str
    left: int
    token: int = 400


@dataclass(eq=False)
class PretendedCore:
    """The client's port of an engine core, and the core: a token for each leg in a step of `step` seconds."""

    vllm_config: Any
    step: float
    legs: dict[str, Leg] = field(default_factory=dict)
    dead = False
    kv_capacity = KV_BLOCKS * 16

    def add(self, request: Any) -> None:
        self.legs[request.request_id] = Leg(request.request_id, request.sampling_params.max_tokens)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.legs.pop(request_id, None)

    def tell(self, method: str, *args: Any) -> None:
        """It has no chunk, and caches nothing."""

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        return (0, time.monotonic())

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    async def run(self, receive: Any, behind: float) -> None:
        """Make steps for ever, the first one so many seconds `behind` that of the first engine."""
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        due = time.monotonic() + behind
        while True:
            due = max(due + self.step, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if self.legs:
                receive(decoder.decode(encoder.encode(self._made())))

    def _made(self) -> Any:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.metrics.stats import SchedulerStats

        from taichi_serve.cluster.vllm.wire import KEY, Record

        outputs = []
        for leg in list(self.legs.values()):
            leg.left -= 1
            leg.token = 400 + (leg.token * 31 + 7) % 3000
            over = None if leg.left else FinishReason.LENGTH
            outputs.append(EngineCoreOutput(leg.id, [leg.token], finish_reason=over))
            if over:
                del self.legs[leg.id]
        record = Record(time.monotonic(), self.step, 1, len(outputs), 16 * len(outputs))
        stats = SchedulerStats(num_running_reqs=len(self.legs), kv_connector_stats={KEY: record})
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)


@contextlib.asynccontextmanager
async def pretended_fleet(
    step: float, args: Any, argv: Any, config: Any, here: Any, deliver: Any, *_: Any
) -> AsyncIterator[Any]:
    """What the server takes for its instances."""
    from taichi_serve.cluster.vllm import args as flags
    from taichi_serve.cluster.vllm.server.clock import Patience
    from taichi_serve.cluster.vllm.server.cluster import VllmCluster
    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.cluster.vllm.server.fleet import Fleet
    from taichi_serve.cluster.vllm.server.keeper import Keeper
    from taichi_serve.cluster.vllm.server.quarantine import Quarantine
    from taichi_serve.cluster.vllm.server.supervisor import Supervisor
    from taichi_serve.cluster.vllm.server.told import Told

    config.cache_config.num_gpu_blocks = KV_BLOCKS
    sliders, copiers = flags.sliders(args), SimpleNamespace(ranks=1, send=lambda order: None)
    engines = []
    for index, kind in enumerate(sliders.kinds()):
        process = SimpleNamespace(engine_id=f"i{index}", pid=0, log=here.path / f"i{index}.log")
        core: Any = PretendedCore(config, step)
        parts: Any = (index, f"i{index}", process, core, copiers, kind, sliders.chunk(kind))
        engines.append(Engine(*parts))
    cluster, patience = VllmCluster(engines, deliver), Patience()
    supervisor = Supervisor([engine.name for engine in engines], 0)
    launcher: Any = None
    keeper = Keeper(cluster, launcher, supervisor, Quarantine(), Told(print, deliver))
    watch: Any = SimpleNamespace(run=asyncio.Event().wait)
    cores = [
        asyncio.create_task(
            engine.client.run(partial(cluster.receive, engine), step * engine.index / len(engines))
        )  # type: ignore[attr-defined]
        for engine in engines
    ]
    ticking = asyncio.create_task(patience.run())
    cluster.open()
    try:
        yield Fleet(cluster, keeper, watch, patience)
    finally:
        for task in (*cores, ticking):
            task.cancel()


def serve(step: float, argv: list[str]) -> int:
    """`taichi serve` with these words, over pretended engines."""
    from taichi_serve.frontend import server
    from taichi_serve.slo import SLO

    async def nothing(*_: Any) -> None:
        """There is nothing to warm."""

    async def promised(*_: Any) -> SLO:
        return SLO(10.0, 1.0)

    server.fleet = partial(pretended_fleet, step)  # type: ignore[assignment]
    server.measure, server.promised = nothing, promised  # type: ignore[assignment]
    return server.main(argv)


class PretendedServer(Server):
    """The same in a process of its own."""

    def __init__(self, directory: Path, step: float, *flags: str) -> None:
        directory.mkdir(parents=True)
        from servers import ENVIRONMENT

        from taichi_serve.ports import port_of, reserve

        self.directory, self.reserved = directory, reserve()
        self.port, self.headers = port_of(self.reserved), {}
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "server.log"
        words = [str(cached_tiny_model()), "--port", str(self.port), *FLAGS, *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(step), *words],
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )


# --------------------------------------------------------------------------------------------- the client


async def stream_for_ever(port: int, number: int) -> None:
    """One stream after the other; what comes is thrown away."""
    body = {"model": "tiny", "prompt": [400 + number % 3000] * 40, "max_tokens": OUTPUT, "stream": True}
    text = json.dumps({**body, "ignore_eos": True, "temperature": 0}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
        while await reader.read(1 << 16):
            pass
        writer.close()


async def load(port: int, streams: int) -> None:
    """So many streams, begun over a while, so that they do not end together."""
    tasks = []
    for number in range(streams):
        tasks.append(asyncio.create_task(stream_for_ever(port, number)))
        await asyncio.sleep(WARM / 2 / streams)
    await asyncio.gather(*tasks)


# -------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Cost:
    """Microseconds of processor time for each output token: of the server's process, of all front ends beside
    it, and of the client; and the tokens a second that came."""

    server: float
    fronts: float
    client: float
    rate: float

    def capacity(self, count: int) -> float:
        """Tokens a second on as many cores' worth of time as there are front ends."""
        return count * 1e6 / (self.server + self.fronts)


def seconds(process: psutil.Process) -> float:
    """Of processor time so far."""
    used = process.cpu_times()
    return float(used.user + used.system)


def tokens(url: str) -> float:
    """Output tokens so far."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total{")]
    return sum(float(line.split()[-1]) for line in lines)


def measured(count: int, plan: argparse.Namespace, directory: Path) -> Cost:
    """One server, started anew."""
    words = ("--d-heavy", str(plan.engines), "--d-chunk", "256", "--disable-uvicorn-access-log")
    server = PretendedServer(directory, plan.step, *words, "--api-server-count", str(count))
    client = None
    try:
        server.wait_ready()
        streams = plan.engines * plan.streams * count
        client = psutil.Popen([sys.executable, __file__, "--load", str(server.port), str(streams)])
        time.sleep(WARM)
        whole = psutil.Process(server.process.pid)
        fronts = [p for p in whole.children() if "several.main" in " ".join(p.cmdline())]
        assert len(fronts) == (count if count > 1 else 0)
        groups = [[whole], fronts, [client]]
        began, made, used = time.monotonic(), tokens(server.url), [sum(map(seconds, g)) for g in groups]
        time.sleep(plan.seconds)
        made, took = tokens(server.url) - made, time.monotonic() - began
        spent = [sum(map(seconds, g)) - before for g, before in zip(groups, used, strict=True)]
        return Cost(*(1e6 * one / made for one in spent), made / took)
    finally:
        if client is not None:
            client.kill()
            client.wait()
        server.end()


def main() -> None:
    """Measure, and print a line for each number of front ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of front ends")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--streams", type=int, default=24, help="of each engine, for each front end")
    parser.add_argument("--step", type=float, default=0.04, help="seconds of each step")
    parser.add_argument("--seconds", type=float, default=15.0, help="that are measured in each round")
    plan = parser.parse_args()
    found: dict[int, list[Cost]] = {count: [] for count in plan.counts}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(plan.rounds):
            for count in plan.counts if number % 2 == 0 else plan.counts[::-1]:
                cost = measured(count, plan, Path(directory) / f"{number}-{count}")
                found[count].append(cost)
                print(f"round {number + 1}, {count} front ends: {cost}", flush=True)
    print("front ends | server us/token | front ends us/token | tokens/s | of as many cores, tokens/s")
    base = median(cost.capacity(plan.counts[0]) for cost in found[plan.counts[0]])
    for count, costs in found.items():
        capacity = median(cost.capacity(count) for cost in costs)
        server, fronts, rate = [
            median(getattr(cost, name) for cost in costs) for name in ("server", "fronts", "rate")
        ]
        print(f"{count} | {server:.1f} | {fronts:.1f} | {rate:.0f} | {capacity:.0f} ({capacity / base:.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(float(sys.argv[2]), sys.argv[3:]))
    if sys.argv[1:2] == ["--load"]:
        asyncio.run(load(int(sys.argv[2]), int(sys.argv[3])))
    main()
