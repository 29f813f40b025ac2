"""How close the engines in miniature come to real ones, and what the rest costs in goodput.

    python benchmarks/fidelity.py RECORDING.jsonl.gz --fitted-from OTHER.jsonl.gz [--slo 0.3 0.02]

RECORDING is played again twice: with its own step durations as truth, which holds the engines in miniature,
and with a step model fitted to OTHER, which has seen none of its steps. Then the arrivals are pressed
together until only 90 % of the requests meet the SLO: once with OTHER's step model as truth, once with the
steps that RECORDING really had (the most alike of them). The difference is what the step model costs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taichi_serve.bench.goodput import Meter
from taichi_serve.bench.recording import Jittered, Nearest, Recording
from taichi_serve.bench.replay import Times, calls_of
from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import Link, SimulatedCluster
from taichi_serve.cluster.simulated.step import Truth
from taichi_serve.latency.fit import fit, relative_errors
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profiled import Profiled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.slo import SLO

TARGET = 0.9
MOVE = 0.002  # seconds of a move, besides the target's step


def attainment(recording: Recording, truth: Truth, belief: Roofline, slo: SLO, faster: float) -> float:
    """The share of good requests when the arrivals come `faster` than recorded."""
    calls = calls_of(recording.entries)
    calls = [replace(c, at=calls[0].at + (c.at - calls[0].at) / faster) for c in calls]
    cluster = SimulatedCluster(recording.sliders, [truth], recording.shape, Link(0.0, 1.0, MOVE), calls)
    predictor, seats = Profiled(belief, {}, 2048), recording.shape.max_running
    scheduler = GlobalScheduler(recording.sliders, slo, predictor, Policy(), cluster.capacities, seats=seats)
    meter = Meter(scheduler, slo)
    run(meter, cluster)
    return meter.tally.good / len(calls)


def goodput(recording: Recording, truth: Truth, belief: Roofline, slo: SLO) -> float:
    """How much faster than recorded the requests may come."""
    low, high = 0.0, 64.0
    while high - low > 0.005 * high:
        middle = (low + high) / 2
        if attainment(recording, truth, belief, slo, middle) >= TARGET:
            low = middle
        else:
            high = middle
    return low


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--fitted-from", type=Path, required=True)
    parser.add_argument("--slo", type=float, nargs=2, default=(0.3, 0.02), metavar=("TTFT", "TPOT"))
    args = parser.parse_args()
    recording = Recording.load(args.recording)
    unseen = Recording.load(args.fitted_from).samples()
    model = fit(unseen)
    console = Console()

    table = Table("truth", "requests", "TPOT mean", "TTFT p50", "TTFT p90", title=str(args.recording.name))

    def line(name: str, times: Times, real: Times | None = None) -> None:
        shown = (times.tpot_mean, times.ttft_p50, times.ttft_p90)
        off = times.errors(real).values() if real else (None,) * 3
        cells = [
            f"{v * 1e3:.2f} ms" + (f" ({e:+.1%})" if e is not None else "")
            for v, e in zip(shown, off, strict=True)
        ]
        table.add_row(name, str(times.requests), *cells)

    real, simulated = recording.again()
    line("the recording", real)
    line("its own step durations", simulated, real)
    line("the fitted step model", recording.again(model)[1], real)
    line("the same with jitter", recording.again(Jittered(model, unseen))[1], real)
    console.print(table)

    samples = recording.samples()
    errors = sorted(relative_errors(model, samples))
    console.print(
        f"error of the model on {len(errors)} steps: median {errors[len(errors) // 2]:.1%}, "
        f"p95 {errors[len(errors) * 95 // 100]:.1%}"
    )
    slo, rate = SLO(*args.slo), recording.head["rate"]
    truths = {
        "steps as recorded": Nearest(samples),
        "fitted step model": model,
        "the same with jitter": Jittered(model, unseen),
    }
    console.print(
        f"goodput at {args.slo[0]:g} s and {args.slo[1] * 1e3:g} ms, recorded at {rate:g} requests/s"
    )
    found = {name: goodput(recording, truth, model, slo) * rate for name, truth in truths.items()}
    for name, value in found.items():
        off = value / found["steps as recorded"] - 1
        share = attainment(recording, truths[name], model, slo, 1.0)
        console.print(
            f"  {name:22s} {value:6.2f} requests/s ({off:+.1%}); good at the recorded rate: {share:.1%}"
        )


if __name__ == "__main__":
    main()
