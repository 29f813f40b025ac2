"""Parts of a step from aiconfigurator's kernel tables: products, attention and all-reduce (parquet, ms a
call)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from composing import Array, Model, Parts, interpolate


def rows(path: Path, **equal: object) -> dict[str, Array]:
    """The rows of a parquet table whose columns equal these values."""
    table = pq.read_table(path)
    keep = np.ones(table.num_rows, dtype=bool)
    for name, value in equal.items():
        keep &= np.array([x == value for x in table[name].to_pylist()])
    return {
        name: np.array(table[name].to_pylist(), dtype=np.float64)[keep]
        for name in table.column_names
        if isinstance(table[name][0].as_py(), (int, float))
    }


def gemm(path: Path, kernel: str) -> tuple[tuple[int, ...], Callable[[int, int], Array]]:
    """The table's m, and milliseconds of a (m x k) by (k x n) product for each: log-log interpolation in n
    and k."""
    table = rows(path, gemm_dtype="bfloat16", kernel_source=kernel)
    known = {
        (int(m), int(n), int(k)): t
        for m, n, k, t in zip(table["m"], table["n"], table["k"], table["latency"], strict=True)
    }
    sizes = sorted({key[1] for key in known} & {key[2] for key in known})
    ms = tuple(sorted({m for m, n, k in known if m in MS and n == k == 5120}))

    def bracket(x: int) -> tuple[int, int, float]:
        above = next((s for s in sizes if s >= x), sizes[-1])
        below = max((s for s in sizes if s <= x), default=sizes[0])
        return below, above, 0.0 if above == below else math.log(x / below) / math.log(above / below)

    def at(n: int, k: int) -> Array:
        (n0, n1, fn), (k0, k1, fk) = bracket(n), bracket(k)
        past = n / sizes[-1] if n > sizes[-1] else 1.0

        def log(m: int, a: int, b: int) -> float:
            if (m, a, b) in known:
                return math.log(known[m, a, b])
            near = max((q for q in known if q[0] == m and q[1] * q[2] <= a * b), key=lambda q: q[1] * q[2])
            return math.log(known[near] * a * b / (near[1] * near[2]))

        return np.array(
            [
                past
                * math.exp(
                    (1 - fn) * (1 - fk) * log(m, n0, k0)
                    + (1 - fn) * fk * log(m, n0, k1)
                    + fn * (1 - fk) * log(m, n1, k0)
                    + fn * fk * log(m, n1, k1)
                )
                for m in ms
            ]
        )

    return ms, at


MS = (1, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def layers_of(model: Model, tp: int, at: Callable[[int, int], Array]) -> Array:
    """Milliseconds of the matrix products of all layers, for each m of MS."""
    hidden, inter = model.hidden, model.inter // tp
    qkv = (model.heads + 2 * model.kv_heads) * 128 // tp
    products = (
        at(qkv, hidden) + at(hidden, model.heads * 128 // tp) + at(2 * inter, hidden) + at(hidden, inter)
    )
    return model.layers * products


def from_aiconfigurator(
    system: str, version: str, model: Model, tp: int, bandwidth: float
) -> Callable[[Path], Parts]:
    """Compose a setting from the kernel tables of one system."""
    new = system.startswith("h200")
    kernel = "torch.nn.functional.linear" if new else "vllm_default"

    def compose(data: Path) -> Parts:
        root = data / "profiles/aiconfigurator" / system
        sizes, at = gemm(root / f"gemm/vllm/{version}/gemm_perf.parquet", kernel)
        linear = layers_of(model, tp, at)
        ms = np.array(sizes, dtype=np.float64)
        # Norms, rotary, activation and residual read and write about 14 hidden-sized vectors a token and
        # layer.
        linear = linear + model.layers * (14 * model.hidden + 3 * model.inter / tp) * 2 * ms / bandwidth * 1e3
        if tp > 1:
            path = root / f"comm/vllm/{version}/custom_allreduce_perf.parquet"
            ring = rows(path, num_gpus=tp, kernel_source="vLLM_custom_graph")
            order = np.argsort(ring["message_size"])
            reduce = interpolate(ring["message_size"][order], ring["latency"][order])
            linear = linear + 2 * model.layers * np.array([reduce(m * model.hidden) for m in sizes])
        head = at(model.vocab // tp, model.hidden)
        at_128 = sizes.index(128)
        per_decode = max(0.0, (head[at_128] - head[0]) / 127)
        more: dict[str, object] = {"window_size": 0, "kernel_source": "vllm_flash_attn_fa3"} if new else {}
        prompts, prefill = prompt_attention(root, version, model, tp, more)
        contexts, batches, decode = decode_attention(root, version, model, tp, more)
        line = interpolate(ms, linear + head[0])
        return Parts(
            lambda t: line(t) / 1e3,
            (per_decode + 0.002) / 1e3,
            lambda n: prefill(n) * model.layers / 1e3,
            lambda b, c: decode(b, c) * model.layers / 1e3,
            contexts,
            batches,
            prompts,
        )

    return compose


def prompt_attention(
    root: Path, version: str, model: Model, tp: int, more: dict[str, object]
) -> tuple[tuple[int, ...], Callable[[float], float]]:
    """Milliseconds of one layer's attention over a whole prompt."""
    table = rows(
        root / f"attention/vllm/{version}/context_attention_perf.parquet",
        batch_size=1,
        num_heads=model.heads // tp
        if model.heads // tp in (16, 20, 40) and more
        else near(model.heads // tp),
        num_key_value_heads=model.kv_heads // tp,
        head_dim=128,
        kv_cache_dtype="bfloat16",
        **more,
    )
    scale = 1.0 if more else (model.heads // tp) / near(model.heads // tp)
    order = np.argsort(table["isl"])
    xs, ys = table["isl"][order], table["latency"][order] * scale
    return tuple(int(x) for x in xs if x >= 256), interpolate(xs, ys)


def near(heads: int) -> int:
    """The head count of the A100 table that is nearest from above (its grid has no 20)."""
    return min(h for h in (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64) if h >= heads)


def decode_attention(
    root: Path, version: str, model: Model, tp: int, more: dict[str, object]
) -> tuple[tuple[int, ...], tuple[int, ...], Callable[[float, float], float]]:
    """Milliseconds of one layer's attention for a batch of decodes, by context. It reads KV: heads matter
    little."""
    kv = model.kv_heads // tp
    table = rows(
        root / f"attention/vllm/{version}/generation_attention_perf.parquet",
        num_heads=model.heads // tp if more else near(model.heads // tp),
        num_key_value_heads=kv,
        head_dim=128,
        kv_cache_dtype="bfloat16",
        **more,
    )
    known = {
        (int(b), int(s) + 1): t
        for b, s, t in zip(table["batch_size"], table["step"], table["latency"], strict=True)
    }
    batches = tuple(b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) if (b, 1024) in known)
    contexts = tuple(sorted({c for _, c in known if 256 <= c <= 16384}))

    def at(batch: float, context: float) -> float:
        return known.get((int(batch), int(context)), float("nan"))

    return contexts, batches, at
