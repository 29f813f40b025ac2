"""The options that `simulate` and `search` share, and what they make of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from taichi_serve.bench.arrivals import ARRIVALS, Arrivals
from taichi_serve.bench.mix import Mix
from taichi_serve.bench.trace import OVER_LIMIT
from taichi_serve.bench.workload import workload
from taichi_serve.classes import read_classes
from taichi_serve.latency.shipped import machine, names
from taichi_serve.scheduling.policy import KNOWN, PREFIXES
from taichi_serve.search.goodput import Scene
from taichi_serve.slo import SLO


def add_scene(
    parser: argparse.ArgumentParser, ttft: Callable[[str], float | None] = float, more: str = ""
) -> None:
    """Workload, SLO and machine. `ttft` reads the TTFT SLO, and `more` says what it takes beside seconds."""
    add_workload(parser)
    parser.add_argument("--ttft-slo", type=ttft, required=True, metavar="S", help=f"seconds{more}")
    parser.add_argument("--tpot-slo", type=float, required=True, metavar="S", help="seconds per output token")
    parser.add_argument(
        "--profile",
        default="qwen2.5-14b-tp1-a100",
        help=f"a `taichi profile` file, a Hugging Face config.json, or one of {', '.join(names())}",
    )
    parser.add_argument("--model", help="refuse a profile that is for another model")
    parser.add_argument("--device", default="A100", help="for a config.json: A100, H100 or H200")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="for a config.json")
    parser.add_argument(
        "--bandwidth", type=float, default=50e9, metavar="B/S", help="KV out of an instance (default: 50e9)"
    )
    parser.add_argument("--link-latency", type=float, default=0.005, metavar="S", help="of a KV transfer")
    parser.add_argument(
        "--kv-capacity", type=int, metavar="TOKENS", help="of an instance (default: what the profile says)"
    )
    parser.add_argument(
        "--max-running", type=int, metavar="N", help="requests in one step (default: as profiled, or 256)"
    )
    parser.add_argument(
        "--host-kv",
        type=int,
        default=0,
        metavar="TOKENS",
        help="of KV that an instance keeps in the memory of its host beside its own (default: none)",
    )
    parser.add_argument(
        "--prefixes",
        choices=PREFIXES,
        default=KNOWN,
        help="what the scheduler does about prefix caches: it is not told of them, reckons with them, or has "
        "prefixes fetched from one instance to another, too (default: known)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FOLDER", help="write pictures there")


def add_workload(parser: argparse.ArgumentParser) -> None:
    """What is asked, and when."""
    parser.add_argument(
        "--workload",
        required=True,
        help="sharegpt, summarization, mean lengths as in 1200/100, conversations (with settings as in "
        "conversations:share=0.8,turns=5,think=20), several of these at once (mix:sharegpt,1200/100) or one "
        "after the other (change:1200/100,661/257@5), or the path of a trace (CSV, or Mooncake's JSON lines)",
    )
    parser.add_argument(
        "--arrivals",
        choices=ARRIVALS,
        help="trace: the trace's own, faster or slower, so that the whole of it has the rate; poisson; gamma "
        "with the coefficient of variation --cv (default: poisson, or gamma with --cv)",
    )
    parser.add_argument(
        "--cv", type=float, metavar="X", help="of the gaps between gamma arrivals: 1 is Poisson, 2 has bursts"
    )
    parser.add_argument(
        "--over-limit",
        choices=OVER_LIMIT,
        default=OVER_LIMIT[0],
        help="rows of a trace with more tokens than the model takes: an error, left out, or prompts cut to "
        "fit (default: refuse)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="classes of requests, as --slo-classes of `taichi serve` takes them: each request is of one of "
        "them, drawn by their shares, and judged by its SLO",
    )


def mix_of(args: argparse.Namespace, slo: SLO) -> Mix:
    """The classes of the requests, where those that have no SLO have this one; ValueError is one line that
    says what is wrong."""
    try:
        return Mix.of(read_classes(args.classes), slo) if args.classes else Mix()
    except ValueError as wrong:
        raise ValueError(f"--classes: {wrong}") from None


def arrivals_of(args: argparse.Namespace) -> Arrivals:
    """When requests arrive; ValueError is one line that says what is wrong."""
    return Arrivals.of(args.arrivals, args.cv)


def scene_of(args: argparse.Namespace) -> Scene:
    """What the options describe; ValueError is one line that says what is wrong."""
    if args.tensor_parallel < 1:
        raise ValueError(f"--tensor-parallel: must be at least 1, not {args.tensor_parallel}")
    found = machine(args.profile, args.device, args.tensor_parallel)
    if args.model and args.model != found.model:
        raise ValueError(f"profile {found.name} is for {found.model}, not for {args.model}")
    if args.kv_capacity is not None:
        if args.kv_capacity < 1024:
            raise ValueError(f"--kv-capacity: must be at least 1024, not {args.kv_capacity}")
        found = replace(found, kv_capacity=args.kv_capacity)
    running = found.max_running if args.max_running is None else args.max_running
    if running < 1:
        raise ValueError(f"--max-running: must be at least 1, not {running}")
    if not (args.bandwidth > 0 and args.link_latency >= 0):
        raise ValueError("--bandwidth must be above 0 and --link-latency at least 0")
    if args.host_kv < 0:
        raise ValueError(f"--host-kv: must be at least 0, not {args.host_kv}")
    limit = min(found.max_model_len, found.kv_capacity)
    slo = SLO(args.ttft_slo, args.tpot_slo)
    asked = {"over_limit": args.over_limit, "arrivals": arrivals_of(args), "mix": mix_of(args, slo)}
    return Scene(
        found,
        workload(args.workload, limit, **asked),
        slo,
        args.bandwidth,
        args.link_latency,
        running,
        args.kv_capacity,
        host_kv=args.host_kv,
        prefixes=args.prefixes,
    )
