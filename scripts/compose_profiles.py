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
import json
import math
from pathlib import Path

import numpy as np
from composing import LLAMA70, QWEN14, QWEN32, Model, Parts, Setting, interpolate
from composing_aiconfigurator import from_aiconfigurator
from composing_vidur import from_vidur
from scipy.optimize import nnls

KNOTS = (1, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
OUT = Path(__file__).parent.parent / "src/taichi_serve/latency/profiles"
VIDUR = "microsoft/vidur @ 7d47513363ec447a741ac5e47241580b47724fbf (MIT)"
AIC = "ai-dynamo/aiconfigurator @ 095f58a51c4ca8e61b66ec108d86f223f8d559ce (Apache-2.0)"


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
