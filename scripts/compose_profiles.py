"""Compose step times from public kernel tables and fit the coefficients that the project ships.

Usage: python scripts/compose_profiles.py DATA_DIR [--write]

DATA_DIR holds profiles/vidur and profiles/aiconfigurator (see `sources` in each written file). For every
setting the tables are composed into rows (batch -> seconds of one step), a StepCurve is fitted to four fifths
of them and its error on the fifth that was held out is printed and stored. Where a table ends the fit goes on
in a straight line; a decode step is never allowed to be faster than reading weights and KV at the device's
bandwidth (checked, not clamped).

Needs pyarrow, numpy and scipy, which the product does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
KNOTS = (1, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
OUT = Path(__file__).parent.parent / "src/taichi_serve/latency/profiles"
VIDUR = "microsoft/vidur @ 7d47513363ec447a741ac5e47241580b47724fbf (MIT)"
AIC = "ai-dynamo/aiconfigurator @ 095f58a51c4ca8e61b66ec108d86f223f8d559ce (Apache-2.0)"


@dataclass(frozen=True)
class Model:
    """The shape of a transformer, as its config.json has it."""

    name: str
    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    vocab: int
    limit: int

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in 16 bits, embeddings counted twice."""
        attention = self.hidden * 128 * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * (self.layers * (attention + 3 * self.hidden * self.inter) + 2 * self.hidden * self.vocab)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV of one token, over all layers and devices."""
        return self.layers * 2 * self.kv_heads * 128 * 2


QWEN14 = Model("Qwen/Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064, 32768)
QWEN32 = Model("Qwen/Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064, 32768)
LLAMA70 = Model("meta-llama/Llama-2-70b-hf", 80, 8192, 28672, 64, 8, 32000, 4096)


@dataclass(frozen=True)
class Parts:
    """The composed times of one setting, in seconds for a whole step."""

    linear: Callable[[float], float]  # of tokens in the step: everything that is not attention
    per_decode: float  # sampling and the output layer, for each sequence
    prefill_attention: Callable[[float], float]  # of the length of a prompt taken whole
    decode_attention: Callable[[float, float], float]  # of batch and context
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """One model on one kind of device."""

    name: str
    model: Model
    tp: int
    device: str
    memory: float  # bytes of one device
    bandwidth: float  # bytes/s of one device
    sources: tuple[str, ...]
    parts: Callable[[Path], Parts]

    @property
    def kv_capacity(self) -> int:
        """Tokens of KV: 90 % of memory, less weights and 2.5 GB of activations."""
        free = 0.9 * self.memory - self.model.weight_bytes / self.tp - 2.5e9
        return int(free / (self.model.kv_bytes / self.tp)) // 16 * 16


def interpolate(xs: Array, ys: Array) -> Callable[[float], float]:
    """Piecewise linear, the last slope going on beyond the end; constant below the first point."""
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])

    def at(x: float) -> float:
        return float(ys[-1] + slope * (x - xs[-1]) if x > xs[-1] else np.interp(x, xs, ys))

    return at


# ------------------------------------------------------------------------------------------ aiconfigurator


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


# --------------------------------------------------------------------------------------------------- vidur


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def from_vidur(device: str, tp: int) -> Callable[[Path], Parts]:
    """Compose Llama-2-70B from vidur's tables of one layer; step = 80 layers x (ops + 2 x (all-reduce +
    0.02))."""
    ops = (
        "input_layernorm attn_pre_proj attn_rope attn_post_proj post_attention_layernorm "
        "mlp_up_proj mlp_act mlp_down_proj add"
    ).split()

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


# --------------------------------------------------------------------------------------------------- the fit


def fit(setting: Setting, parts: Parts) -> dict[str, object]:
    """Fit the three parts of a StepCurve to the composed rows and measure the error on the held-out fifth."""
    knots = [k for k in KNOTS if not (setting.model.limit < k)]
    lin = np.array([parts.linear(k) for k in knots])
    pairs = np.array([[n * (n + 1) / 2, n] for n in parts.prompts], dtype=np.float64)
    took = np.array([parts.prefill_attention(n) for n in parts.prompts])
    per_attention, per_attended = nnls(pairs / took[:, None], np.ones(len(took)))[0]
    cells = [(b, c, parts.decode_attention(b, c)) for b in parts.batches for c in parts.contexts]
    # Small launches are latency, not bandwidth: the slope is read where KV dominates, and where tables are
    # full.
    cells = [(b, c, t) for b, c, t in cells if not math.isnan(t)]
    held = cells[::5]
    used = [x for i, x in enumerate(cells) if i % 5]
    design = np.array([[1.0, b, b * c] for b, c, _ in used])
    seconds = np.array([t for *_, t in used])
    weight = np.array(
        [1 / (t + parts.linear(b)) for b, _, t in used]
    )  # relative to the step, which is what counts
    base, per_decode, per_kv = nnls(design * weight[:, None], seconds * weight)[0]
    curve = [float(x + base) for x in lin]
    per_decode += parts.per_decode
    line = interpolate(np.array(knots, dtype=float), np.array(curve))
    errors = []
    for b, c, t in held:
        truth = parts.linear(b) + t + b * parts.per_decode
        errors.append((line(b) + per_decode * b + per_kv * b * c) / truth - 1)
    for n in range(100, 8000 if setting.model.limit > 8000 else 4096, 333):
        truth = parts.linear(n) + parts.prefill_attention(n) + base + parts.per_decode
        mine = line(n) + per_attention * n * (n + 1) / 2 + per_attended * n + parts.per_decode
        errors.append(mine / truth - 1)
    per_token = [(k, s + per_attended * k) for k, s in zip(knots, curve, strict=True)]
    return {
        "knots": [[k, float(f"{s:.6g}")] for k, s in per_token],
        "per_attention": float(f"{per_attention:.6g}"),
        "per_kv_token": float(f"{per_kv:.6g}"),
        "per_decode": float(f"{per_decode:.6g}"),
        "held_out": {
            "rows": len(errors),
            "mean_abs": round(float(np.mean(np.abs(errors))), 4),
            "max_abs": round(float(np.max(np.abs(errors))), 4),
        },
    }


def check_bandwidth(setting: Setting, fitted: dict[str, object]) -> list[str]:
    """Steps that would read weights and KV faster than the device's memory allows."""
    wrong = []
    kv_second = setting.model.kv_bytes / setting.tp / setting.bandwidth
    if float(fitted["per_kv_token"]) < kv_second:  # type: ignore[arg-type]
        wrong.append(
            f"per_kv_token {fitted['per_kv_token']} is below the {kv_second:.3g} that bandwidth allows"
        )
    floor = setting.model.weight_bytes / setting.tp / setting.bandwidth
    if fitted["knots"][0][1] < 0.95 * floor:  # type: ignore[index]
        wrong.append(f"a step of one token takes {fitted['knots'][0][1]}, weights alone {floor:.4f}")  # type: ignore[index]
    return wrong


A100 = (80e9, 2.039e12)
H100 = (80e9, 3.35e12)
H200 = (141e9, 4.8e12)


def aic(name: str, model: Model, tp: int, device: str) -> Setting:
    """A setting composed from aiconfigurator's tables."""
    memory, bandwidth = A100 if device == "A100-SXM4-80GB" else H200
    system, version = ("a100_sxm", "0.14.0") if memory == 80e9 else ("h200_sxm", "0.24.0")
    compose = from_aiconfigurator(system, version, model, tp, bandwidth)
    files = (f"{AIC}: systems/{system}, vLLM {version}: gemm, attention, all-reduce",)
    return Setting(name, model, tp, device, memory, bandwidth, files, compose)


def vidur(name: str, device: str, known: tuple[float, float], extra: tuple[str, ...] = ()) -> Setting:
    """Llama-2-70B TP4 composed from vidur's tables."""
    files = (f"{VIDUR}: compute, all-reduce; attention of A100 TP2, halved for TP4", *extra)
    return Setting(name, LLAMA70, 4, device, *known, files, from_vidur(name.rsplit("-", 1)[1], 4))


SETTINGS = (
    vidur("llama-2-70b-tp4-a100", "A100-SXM4-80GB", A100),
    vidur(
        "llama-2-70b-tp4-h100",
        "H100-SXM5-80GB",
        H100,
        ("attention scaled from A100 by bandwidth and FLOP/s",),
    ),
    aic("qwen2.5-14b-tp1-a100", QWEN14, 1, "A100-SXM4-80GB"),
    aic("qwen2.5-32b-tp2-a100", QWEN32, 2, "A100-SXM4-80GB"),
    aic("qwen2.5-14b-tp1-h200", QWEN14, 1, "H200-SXM-141GB"),
)


def main() -> None:
    """Compose, fit, check, print; with --write also store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for setting in SETTINGS:
        fitted = fit(setting, setting.parts(args.data))
        print(setting.name, json.dumps(fitted), "KV tokens", setting.kv_capacity)
        for line in check_bandwidth(setting, fitted):
            print("  CHECK:", line)
        report(fitted)
        if args.write:
            OUT.mkdir(parents=True, exist_ok=True)
            body = {
                "name": setting.name,
                "model": setting.model.name,
                "device": setting.device,
                "tensor_parallel": setting.tp,
                "kv_capacity": setting.kv_capacity,
                "kv_bytes_per_token": setting.model.kv_bytes,
                "max_model_len": setting.model.limit,
                **fitted,
                "sources": list(setting.sources),
            }
            (OUT / f"{setting.name}.json").write_text(json.dumps(body, indent=1) + "\n")


def report(fitted: dict[str, object]) -> None:
    """Print the steps that a reader can compare with other work, in ms."""
    knots = np.array(fitted["knots"])
    line = interpolate(knots[:, 0], knots[:, 1])
    kv, pairs, each = (float(fitted[k]) for k in ("per_kv_token", "per_attention", "per_decode"))  # type: ignore[arg-type]

    def step(prompt: int, decodes: int, context: int) -> str:
        seconds = (
            line(prompt + decodes)
            + pairs * prompt * (prompt + 1) / 2
            + each * decodes
            + kv * decodes * context
        )
        return f"{seconds * 1e3:.1f}"

    print("  prefill 512/1k/2k/4k/8k:", *(step(n, 0, 0) for n in (512, 1024, 2048, 4096, 8192)))
    print("  decode 1/32/64/128 at 1k:", *(step(0, b, 1024) for b in (1, 32, 64, 128)))
    print("  decode 32/64/128 at 2.6k:", *(step(0, b, 2600) for b in (32, 64, 128)))
    print(
        "  32 decodes at 2.6k + chunk 128..2048:", *(step(c, 32, 2600) for c in (128, 256, 512, 1024, 2048))
    )
    print(
        "  32 decodes at 7.5k + chunk 0,256..2048:", *(step(c, 32, 7500) for c in (0, 256, 512, 1024, 2048))
    )


if __name__ == "__main__":
    main()
