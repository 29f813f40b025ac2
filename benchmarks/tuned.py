"""A workload that changes under a server on this machine: chat, then summaries. How many requests are good
before and after, with sliders that stand still and with sliders that set themselves.

    python benchmarks/tuned.py [--chat 60] [--summaries 180] [--rate 2] [--modes off,on] [-- FLAGS]

One server after the other, each of two instances with the tiny model. Requests arrive as a Poisson process,
the same in every mode. Printed are the shares of good requests by their arrival, every change of the sliders,
and the processor time that rehearsals took. A busy machine makes these figures worse, and unlike each other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from load import PATH, Wish, wishes
from servers import Server

from taichi_serve.bench.client import stream
from taichi_serve.slo import SLO, tpot

Verdict = tuple[float, float, float, bool]  # arrival (s from the start), TTFT and TPOT (s), good
SLICE = 20.0  # seconds of arrivals in one line


def course(args: argparse.Namespace) -> list[tuple[float, Wish]]:
    """What is asked, and when: chat at three times the rate, then summaries."""
    chance = random.Random(args.seed)
    chat = wishes(2000, seed=1, prompt=(20, 120), output=(60, 120))
    long = wishes(2000, seed=2, prompt=(900, 1500), output=(30, 60))
    asked, at = [], 0.0
    while at < args.chat + args.summaries:
        early = at < args.chat
        asked.append((at, (chat if early else long).pop()))
        at += chance.expovariate(args.rate * (3.0 if early else 1.0))
    return asked


async def loaded(server: Server, asked: list[tuple[float, Wish]], slo: SLO) -> list[Verdict]:
    """Send everything when it is due, and judge it."""
    verdicts: list[Verdict] = []
    async with server.client() as client:
        began = time.perf_counter()

        async def one(at: float, wish: Wish) -> None:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))  # when it is due
            answer = await stream(client, PATH, wish.body())
            if not answer.times:
                verdicts.append((at, 0.0, 0.0, False))
                return
            first = answer.times[0] - began - at
            each = tpot(answer.times[0], answer.times[-1], answer.output_tokens)
            verdicts.append((at, first, each, answer.ok and slo.good(first, each)))

        await asyncio.gather(*(one(at, wish) for at, wish in asked))
    return sorted(verdicts)


def told(mode: str, verdicts: list[Verdict], state: dict[str, Any], args: argparse.Namespace) -> None:
    """Print what came of it."""
    print(f"--autotune {mode}: sliders at the end {state['sliders']}")
    end = args.chat + args.summaries
    for begin in range(0, int(end), int(SLICE)):
        part = [v for v in verdicts if begin <= v[0] < begin + SLICE]
        if part:
            p90 = [sorted(v[n] for v in part)[int(0.9 * (len(part) - 1))] for n in (1, 2)]
            good = sum(v[3] for v in part) / len(part)
            what = "chat" if begin < args.chat else "summaries"
            times = f"P90 TTFT {p90[0]:.2f} s, TPOT {p90[1] * 1e3:.0f} ms"
            print(f"  {begin:4d} s  {what:9}  {good:4.0%} of {len(part):3} good, {times}")
    tuned = state["autotune"]
    for change in tuned.get("changes", ()):
        print(f"  {change['why']}")
    if "rehearsing_seconds" in tuned:
        share = tuned["rehearsing_seconds"] / end
        print(f"  rehearsals: {tuned['rehearsing_seconds']:.1f} s of processor time, {share:.1%} of one core")


def main() -> int:
    """The command."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--chat", type=float, default=60.0, help="seconds of chat")
    parser.add_argument("--summaries", type=float, default=180.0, help="seconds of summaries after it")
    parser.add_argument(
        "--rate", type=float, default=2.0, help="summaries a second; of chat three times as many"
    )
    parser.add_argument("--ttft-slo", type=float, default=3.0)
    parser.add_argument("--tpot-slo", type=float, default=0.04)
    parser.add_argument("--modes", default="off,on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of taichi serve, after --")
    args = parser.parse_args()
    slo = SLO(args.ttft_slo, args.tpot_slo)
    words = ("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "1024", "--d-chunk", "512")
    limits = ("--ttft-slo", str(slo.ttft), "--tpot-slo", str(slo.tpot), "--overload", "serve")
    asked = course(args)
    for mode in args.modes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            server = Server(Path(directory) / mode, *words, *limits, "--autotune", mode, *args.flags)
            try:
                verdicts = asyncio.run(loaded(server.wait_ready(), asked, slo))
                told(mode, verdicts, server.state(), args)
            finally:
                server.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
