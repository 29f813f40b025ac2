"""What a server costs while nobody asks it anything: CPU seconds of it and all below it, in shares of a core.

    python benchmarks/idle.py [--seconds 60] [--after 10]

Servers that are compared stay up while others are measured (`taichi bench goodput --compare`), on the same
cores: what an idle one takes, the others lack. Ours with two instances (1P1D), and vLLM's own with
`--data-parallel-size 2`, are started one beside the other. Each is warmed with a few requests, as a server
that never served has not begun some of its idle work; then all are left alone, and the processes are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import psutil
from generator import Generator
from overhead import Stock, measure, start
from servers import Server

from taichi_serve.commands.family import cpu_seconds


def shares(pid: int, seconds: float) -> dict[str, float]:
    """For each process of the family: its share of a core over so many seconds from now."""
    this = psutil.Process(pid)

    def read() -> dict[psutil.Process, float]:
        return {p: sum(p.cpu_times()[:2]) for p in (this, *this.children(recursive=True))}

    before, began = read(), time.monotonic()
    time.sleep(seconds)
    after, took = read(), time.monotonic() - began
    return {f"{p.pid} {p.name()}": (cpu - before.get(p, 0.0)) / took for p, cpu in after.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="that are watched (default: 60)")
    parser.add_argument("--after", type=float, default=10.0, help="seconds after the load (default: 10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        servers: dict[str, Server | Stock] = {}
        for kind in ("ours", "stock"):
            servers[kind] = start(kind, 2, Path(name) / kind)  # type: ignore[arg-type]
            stack.callback(servers[kind].end)
        with Generator() as generator:
            for number, server in enumerate(servers.values()):
                measure(generator, server.url, Path(name), 20, "inf", seed=number)
        time.sleep(args.after)
        for kind, server in servers.items():
            before, began = cpu_seconds(server.process.pid), time.monotonic()
            each = shares(server.process.pid, args.seconds)
            share = (cpu_seconds(server.process.pid) - before) / (time.monotonic() - began)
            print(f"{kind}: {share:.2%} of a core while idle", flush=True)
            for process, part in each.items():
                print(f"  {process:32} {part:.2%}", flush=True)


if __name__ == "__main__":
    main()
