"""Ours against stock vLLM on the same GPUs: all servers up, loaded in turn with the same requests.

    scripts/gpu.sh versus OUT [--gpus 2] [--shape 14b] [--slo 2,0.018] [--contenders auto,stock:256] ...

It is `taichi bench goodput --compare` with what GPUs need: a model of a real shape without weights, graphs,
and KV that leaves room for all contenders on each card. A contender is `stock:CHUNK` (vLLM's own server with
--data-parallel-size), `aggregation:CHUNK`, `hybrid:S_P:S_D`, `disaggregation:S_P`, or `auto` (P-heavy and
D-heavy instances that set their sliders themselves, from the defaults on). After --seconds it stops as at
Ctrl-C; the same command goes on with the next round. With TAICHI_REHEARSAL=1 it runs on a CPU with a tiny
model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from pathlib import Path

from common import NO_WEIGHTS, QWEN_7B, QWEN_14B, keep_logs, shape

from taichi_serve.cli import main as taichi
from taichi_serve.tiny import cached_tiny_model

REHEARSAL = bool(os.environ.get("TAICHI_REHEARSAL"))
SHAPES = {"7b": QWEN_7B, "14b": QWEN_14B}
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
STOPPED = 128 + signal.SIGINT


def flags(args: argparse.Namespace) -> list[str]:
    """What all servers have in common."""
    limits = ["--max-model-len", "4096" if REHEARSAL else "16384", "--max-num-seqs", "128"]
    if REHEARSAL:
        return [*limits, "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}
    # Several servers are on each card and see each other's memory: they are told what is theirs.
    memory = ["--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", args.kv]
    return [*limits, *memory, *NO_WEIGHTS, "--compilation-config", json.dumps(graphs)]


def ours(name: str, gpus: int) -> list[str]:
    """A contender of ours as options of `taichi bench goodput`."""
    kind, *chunks = name.split(":")
    p_heavy = gpus // 2
    split = f"--p-heavy {p_heavy} --d-heavy {gpus - p_heavy}"
    devices = "" if REHEARSAL else f" --devices {';'.join(map(str, range(gpus)))}"
    match kind, chunks:
        case "auto", []:
            own = f"{split} --autotune on"
        case "aggregation", [chunk]:
            own = f"--p-heavy 0 --d-heavy {gpus} --d-chunk {chunk}"
        case "hybrid", [s_p, s_d]:
            own = f"{split} --p-chunk {s_p} --d-chunk {s_d}"
        case "disaggregation", [s_p]:
            own = f"{split} --p-chunk {s_p} --d-chunk 0 --watermark 1"
        case _:
            raise SystemExit(f"--contenders: {name!r} is none of those that --help names")
    return ["--contender", f"{name.replace(':', '-')}={own}{devices}"]


def main() -> int:
    """3 where something is left for another call."""
    args = parsed()
    model = cached_tiny_model()
    if not REHEARSAL:
        model = shape(model, SHAPES[args.shape], Path("/tmp") / f"taichi-{args.shape}")
    ttft, tpot = args.slo.split(",")
    load = ["--workload", args.workload, "--ttft-slo", ttft, "--tpot-slo", tpot, "--out", str(args.out)]
    load += ["--requests", str(args.requests), "--warm-up", "40", "--seeds", args.seeds]
    load += ["--start", str(args.start), "--tolerance", str(args.tolerance), "--instances", str(args.gpus)]
    load += ["--redo", "0"]  # the probes see the host's cores, and nothing of its GPUs
    names = args.contenders.split(",")
    compared = [word for name in names if not name.startswith("stock") for word in ours(name, args.gpus)]
    if stock := ",".join(name for name in names if name.startswith("stock")):
        compared += ["--compare", stock]
    timer = threading.Timer(args.seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        status = taichi(["bench", "goodput", str(model), *load, *compared, "--", *flags(args)])
    finally:
        timer.cancel()
        keep_logs(args.out)
    return 3 if status == STOPPED else status


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--contenders", default="auto,stock:256", metavar="NAMES")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--kv", default="9G", help="KV of each instance (default: 9G)")
    parser.add_argument("--workload", default="3658/100")
    parser.add_argument("--slo", default="2,0.018", metavar="TTFT,TPOT", help="seconds")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--start", type=float, default=6.0, help="first rate, requests/s")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=500.0, help="of this call")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
