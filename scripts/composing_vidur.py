"""Parts of a step of Llama-2-70B from vidur's tables of one layer (CSV, ms)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from composing import Parts, interpolate


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def from_vidur(device: str, tp: int) -> Callable[[Path], Parts]:
    """Compose Llama-2-70B from vidur's tables of one layer; step = 80 layers x (ops + 2 x (all-reduce +
    0.02))."""
    ops = [
        "input_layernorm",
        "attn_pre_proj",
        "attn_rope",
        "attn_post_proj",
        "post_attention_layernorm",
        "mlp_up_proj",
        "mlp_act",
        "mlp_down_proj",
        "add",
    ]

    def compose(data: Path) -> Parts:
        root = data / "profiles/vidur"
        mlp = read_csv(root / f"{device}_meta-llama_Llama-2-70b-hf_mlp.csv")
        mine = sorted(
            (r for r in mlp if int(r["num_tensor_parallel_workers"]) == tp),
            key=lambda r: int(r["num_tokens"]),
        )
        tokens = np.array([float(r["num_tokens"]) for r in mine])
        one = np.array([sum(float(r[f"time_stats.{op}.median"] or 0) for op in ops) for r in mine])
        ring = [
            (float(r["size"]), float(r["time_stats.all_reduce.median"]))
            for r in read_csv(root / f"{device}_dgx_all_reduce.csv")
            if int(r["num_workers"]) == tp and int(r["devices_per_node"]) == tp
        ]
        sizes = sorted({size for size, _ in ring})
        times = np.array([np.median([t for s, t in ring if s == size]) for size in sizes])
        reduce = interpolate(np.array(sizes), times)
        whole = 80 * (one + 2 * (np.array([reduce(t * 8192 * 2) for t in tokens]) + 0.02))
        attention = [
            r
            for r in read_csv(root / "a100_attention_h64_kv8_d8192_tp2_4k.old.csv")
            if r["attention_backend"].endswith("FLASH_ATTENTION")
        ]
        return vidur_attention(attention, interpolate(tokens, whole), device)

    return compose


def vidur_attention(table: list[dict[str, str]], linear: Callable[[float], float], device: str) -> Parts:
    """Attention of the TP2 table, halved for TP4; on H100 scaled by bandwidth (decode) and FLOP/s
    (prefill)."""
    fast = {"a100": (1.0, 1.0), "h100": (2.04 / 3.35, 312 / 700)}[device]
    decode: dict[tuple[int, int], list[float]] = {}
    prompt: dict[int, list[float]] = {}
    for r in table:
        if r["is_prefill"] == "False" and r["time_stats.attn_decode.median"]:
            key = int(r["batch_size"]), int(r["kv_cache_size"])
            decode.setdefault(key, []).append(float(r["time_stats.attn_decode.median"]))
        elif r["is_prefill"] == "True" and int(r["kv_cache_size"]) == 0 and int(r["batch_size"]) == 1:
            prompt.setdefault(int(r["prefill_chunk_size"]), []).append(
                float(r["time_stats.attn_prefill.median"])
            )
    lengths = sorted(prompt)
    whole = interpolate(np.array(lengths, dtype=float), np.array([np.median(prompt[n]) for n in lengths]))
    batches = tuple(sorted({b for b, _ in decode if b <= 128}))
    contexts = tuple(sorted({c for _, c in decode if c >= 256}))
    return Parts(
        lambda t: linear(t) / 1e3,
        0.00001,
        lambda n: whole(n) * 80 / 2 * fast[1] / 1e3,
        lambda b, c: (
            float(np.median(decode.get((int(b), int(c)), [math.nan]))) * 80 / 2 * 1.1 * fast[0] / 1e3
        ),
        contexts,
        batches,
        tuple(n for n in lengths if n >= 256),
    )
