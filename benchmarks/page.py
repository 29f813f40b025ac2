"""What the live page costs a server: processor time with a viewer against without, in pairs.

    PYTHONPATH=src python benchmarks/page.py [--live 2000] [--pairs 12] [--seconds 5] [--viewers 1]

The system is pretended (pretended_server.py): simulated engines keep real time; the scheduler, the recorder,
the feed and the HTTP server are the real ones. It runs at a load at which about `--live` requests are live.
Then stretches of `--seconds` follow each other in pairs, one with viewers and one without, who goes first in
turn. Printed is by how much of a core the server worked more with them: processor time counts, so other work
on the machine changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

import uvicorn
import uvloop
from paired import interval
from pretended_server import Miniature, application

from taichi_serve.ports import LOOPBACK, port_of, reserve
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SLIDERS = Sliders(12, 20, 2048, 256)
PROMISED = SLO(1.0, 0.06)
GUESS = 12.5  # seconds that a request lives here
FILL = 40.0  # seconds until as many end as arrive
# Reads as fast as it can, in a process of its own: what it takes is not the server's.
READER = "import sys, urllib.request as u; f = u.urlopen(sys.argv[1])\nwhile f.read1(65536): pass"


async def filled(live: int) -> tuple[Miniature, asyncio.Task[None]]:
    """A system in which about so many requests are live."""
    system = Miniature(SLIDERS, live / GUESS, PROMISED)
    living = asyncio.create_task(system.live(FILL))
    while system.sim.agenda.now < FILL:  # noqa: ASYNC110  # it has no callback
        await asyncio.sleep(0.2)
    return system, living


async def stretch(url: str, viewers: int, seconds: float) -> float:
    """Share of a core that the server worked, with so many viewers."""
    command = [sys.executable, "-c", READER, url]
    readers = [await asyncio.create_subprocess_exec(*command) for _ in range(viewers)]
    await asyncio.sleep(1.0)  # they are there, and have everything
    began, before = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    share = (time.process_time() - before) / (time.monotonic() - began)
    for reader in readers:
        reader.kill()
        await reader.wait()
    await asyncio.sleep(0.3)
    return share


async def measure(args: argparse.Namespace) -> None:
    """Every pair, and what they say together."""
    system, living = await filled(args.live)
    with reserve() as held:
        port = port_of(held)
    config = uvicorn.Config(application(system), host=LOOPBACK, port=port, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    url, more = f"http://{LOOPBACK}:{port}/taichi/events", []
    for pair in range(args.pairs):
        shares = {}
        for viewers in (args.viewers, 0) if pair % 2 else (0, args.viewers):
            shares[viewers] = await stretch(url, viewers, args.seconds)
        more.append(shares[args.viewers] - shares[0])
        live = len(system.scheduler.requests)
        words = f"{shares[args.viewers]:.2%} of a core with, {shares[0]:.2%} without"
        print(f"pair {pair + 1}  {live} live  {words}: {more[-1]:+.2%}", flush=True)
    found = interval(more)
    within = f" ({found[0]:+.2%} to {found[1]:+.2%})" if found else ""
    print(f"{args.viewers} viewers cost {statistics.median(more):+.2%}{within} of a core")
    server.should_exit = True
    await serving
    living.cancel()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--viewers", type=int, default=1)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
