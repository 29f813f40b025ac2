"""What a composed profile is made of: the shape of a model, its parts, and a setting
(scripts/compose_profiles.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
