"""`taichi profile` of the shapes that the shipped profiles are of: the 7B one on a quarter of a GPU, the 14B
one on a whole one. Two instances share the card, so that moves can be measured; one is idle while the other
is measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common import QWEN_7B, QWEN_14B, out_directory, shape

from taichi_serve.cli import main as taichi
from taichi_serve.tiny import cached_tiny_model

# name: shape, share of the streaming multiprocessors in percent, KV of each instance
SHAPES = {"7b": (QWEN_7B, "25", "6G"), "14b": (QWEN_14B, "100", "24G")}
GRID = ["--grid-chunks", "16,64,128,256,512,1024,2048,4096", "--grid-decodes", "0,1,4,16,64,128"]
GRID += ["--grid-fill", "131072"]
ENGINE = ["--devices", "0;0", "--gpu-memory-utilization", "0.4", "--load-format", "dummy"]
ENGINE += [
    "--max-model-len",
    "16384",
    "--max-num-batched-tokens",
    "8192",
    "--p-chunk",
    "4096",
    "--d-chunk",
    "256",
]
ENGINE += ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']


def main() -> int:
    """The shapes named after the directory, one after the other; by default all of them."""
    out, status = out_directory(), 0
    for name in sys.argv[2:] or SHAPES:
        config, share, memory = SHAPES[name]
        os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = share
        model = shape(cached_tiny_model(), config, Path(f"/tmp/qwen2.5-{name}"))
        file = str(out / f"qwen2.5-{name}.json")
        status |= taichi(
            ["profile", str(model), "-o", file, *GRID, *ENGINE, "--kv-cache-memory-bytes", memory]
        )
    return status


if __name__ == "__main__":
    raise SystemExit(main())
