"""Aggregation, disaggregation and the hybrid, each tuned for one SLO, on four instances of the 7B shape.

`measure 7b-beside` in the same directory first: the search stands on that profile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common import NO_WEIGHTS, QWEN_7B, out_directory, shape
from measure import LIMITS, SHAPES, graphs, sharing

from taichi_serve.cli import main as taichi
from taichi_serve.tiny import cached_tiny_model

INSTANCES = 4
# Summarization at half its length, log-normal; the search has the baselines within 6 % of each other there.
GOAL = ["--workload", "3658/100", "--ttft-slo", "2", "--tpot-slo", "0.03"]
LOAD = ["--requests", "200", "--warm-up", "20", "--start", "7"]


def main() -> int:
    """The families named after the directory, or all, each in a folder there; none is measured twice."""
    out = out_directory()
    name, _, profile, share, memory, _ = SHAPES["7b-beside"]
    os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = share
    measured, tuned = out / f"{profile}.json", out / "tuned"
    if not (best := tuned / "hybrid.yaml").exists() or best.stat().st_mtime < measured.stat().st_mtime:
        search = [
            "search",
            "--profile",
            str(measured),
            *GOAL,
            "--instances",
            str(INSTANCES),
            "--seconds",
            "60",
        ]
        if status := taichi([*search, "--tuned", str(tuned)]):
            return status
    model = shape(cached_tiny_model(), QWEN_7B, Path("/tmp") / name)
    # One after the other: twelve instances find no room on one GPU.
    for family in sys.argv[2:] or ("hybrid", "disaggregation", "aggregation"):
        words = ["bench", "goodput", str(model), "--compare", family, "--tuned", str(tuned), *GOAL, *LOAD]
        words += ["--out", str(out / family), "--", "--profile", str(measured)]
        words += ["--kv-cache-memory-bytes", memory, *NO_WEIGHTS, *sharing(INSTANCES), *LIMITS, *graphs()]
        if status := taichi(words):
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
