"""`taichi profile` of the 7B shape on a quarter of a GPU and of the 14B one on all of it.

A file of it that is copied into src/taichi_serve/latency/profiles is a name for simulate, search and serve.
Two instances share the card, so that moves can be measured; one is idle while the other is measured. For
`7b-beside` four share it, and three are at work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from common import QWEN_7B, QWEN_14B, out_directory, shape

from taichi_serve.cli import main as taichi
from taichi_serve.latency.profile import load
from taichi_serve.tiny import cached_tiny_model

# name: model and its shape, the profile's name, share of the multiprocessors in percent, KV of each instance,
# neighbours at work
SHAPES = {
    "7b": ("Qwen2.5-7B", QWEN_7B, "qwen2.5-7b-quarter-h200-measured", "25", "12G", 0),
    "7b-beside": ("Qwen2.5-7B", QWEN_7B, "qwen2.5-7b-quarter-h200-beside-3-measured", "25", "12G", 3),
    "14b": ("Qwen2.5-14B", QWEN_14B, "qwen2.5-14b-tp1-h200-measured", "100", "24G", 0),
}
GRID = ["--grid-chunks", "32,256,512,1024,2048,4096", "--grid-decodes", "0,1,16,64,128"]
GRID += ["--grid-contexts", "128,4096", "--grid-fill", "131072"]
# Full graphs for steps with prompts too: launching 28 layers kernel by kernel takes 20 to 30 ms, more than
# the work of a small chunk. A step runs as large as the next size captured: the steps of the grid, and
# others.
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 272, 320, 384, 512, 528, 576, 640]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}
LIMITS = ["--max-model-len", "16384", "--max-num-batched-tokens", "8192", "--max-num-seqs", "256"]
ENGINE = ["--load-format", "dummy", *LIMITS, "--p-chunk", "4096", "--d-chunk", "256"]


def graphs() -> list[str]:
    """Flags with which small steps are launched as one."""
    return ["--compilation-config", json.dumps(GRAPHS)]


def sharing(count: int) -> list[str]:
    """Flags for so many instances on one card."""
    return ["--devices", ";".join("0" * count), "--gpu-memory-utilization", f"{0.8 / count:g}"]


def survey_flags(neighbours: int) -> list[str]:
    """Flags for a survey with so many neighbours; two rounds, not three, where all of it is slower."""
    rounds = "2" if neighbours else "3"
    return ["--grid-repeats", rounds, "--neighbours", str(neighbours), *sharing(max(2, 1 + neighbours))]


def row(path: Path, share: str) -> str:
    """The profile's line in the table of docs/simulation.md."""
    found = load(path)
    device = found.device if share == "100" else f"{share} % of {found.device}"
    versions = ", ".join(
        f"{name} {found.versions[key]}" for name, key in (("vLLM", "vllm"), ("torch", "torch"))
    )
    error = f"{found.fit.error_median:.1%} / {found.fit.error_p95:.1%}"
    return f"| {path.stem} | {device} | {versions} | {len(found.steps)} | {error} | {found.kv_capacity:,} |"


def main() -> int:
    """The shapes named after the directory, one after the other; by default all of them."""
    out, status = out_directory(), 0
    for name in sys.argv[2:] or SHAPES:
        model, config, profile, share, memory, neighbours = SHAPES[name]
        os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = share
        directory = shape(cached_tiny_model(), config, Path("/tmp") / model)
        path = out / f"{profile}.json"
        words = [
            "profile",
            str(directory),
            "-o",
            str(path),
            *GRID,
            *survey_flags(neighbours),
            *ENGINE,
            *graphs(),
            "--kv-cache-memory-bytes",
            memory,
        ]
        status |= taichi(words)
        if path.exists():
            print(row(path, share))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
