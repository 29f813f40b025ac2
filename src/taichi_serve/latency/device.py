"""Step times of any Hugging Face model on a described device: a roofline, for where nobody has measured.

    curve      the longer of reading the weights and computing, two products a token and weight; all-reduces
    beside attention  2 products a head and pair of (query, key)
    KV         read once for every token of context

The three efficiencies are what the composed A100 profiles show against the data sheet (latency/profiles):
matrix products 0.85 of the FLOP/s, prompt attention 0.65, reading weights and KV 0.72 of the bandwidth.
Against those profiles this model is up to 15 % too fast on one device and up to 35 % on four: it knows of no
small kernels, no tiles and no waiting in all-reduces. Measure before you trust a ranking to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taichi_serve.latency.curve import StepCurve

COMPUTE, ATTENTION, MEMORY = 0.85, 0.65, 0.72
ALL_REDUCE = 10e-6  # seconds a call takes before any byte


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: 16-bit FLOP/s, bytes/s of memory, bytes of memory, bytes/s to its peers."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "memory", "link"):
            if not getattr(self, field) > 0:
                raise ValueError(f"device {self.name}: {field} must be above 0, not {getattr(self, field)!r}")


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312e12, 2.039e12, 80e9, 300e9),
        Device("H100", 989e12, 3.35e12, 80e9, 450e9),
        Device("H200", 989e12, 4.8e12, 141e9, 450e9),
    )
}
# Parts of these, and slower siblings with the same name in theirs.
OTHERS = frozenset({"PCIE", "NVL", "MIG"})
ALIKE = 0.1  # that memory may differ by: a data sheet counts it otherwise than a driver


def described(name: str, memory: float) -> Device | None:
    """The device above that goes by this name and has about so many bytes of memory, if any."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & OTHERS:
        return None
    known = (device for device in DEVICES.values() if device.name in words)
    return next((device for device in known if abs(memory / device.memory - 1) <= ALIKE), None)


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a config.json decides time and memory."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    limit: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers, without embeddings."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        """Bytes in 16 bits, with embedding and output layer."""
        return 2 * (self.layer_weights + 2 * self.vocabulary * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV of one token."""
        return 4 * self.layers * self.kv_heads * self.head_dim


def read_config(path: Path) -> Shape:
    """The shape in a Hugging Face config.json; raises ValueError naming the file and the field."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: top level: expected an object")
    return shape_of(config, path.parent.name, path)


def shape_of(config: Mapping[str, Any], name: str, path: Path) -> Shape:
    """The shape that such a config says; raises ValueError naming `path` and the field."""
    heads = _whole(path, config, "num_attention_heads")
    hidden = _whole(path, config, "hidden_size")
    return Shape(
        name=str(config.get("_name_or_path") or name),
        layers=_whole(path, config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_whole(path, config, "intermediate_size"),
        heads=heads,
        kv_heads=_whole(path, config, "num_key_value_heads", heads),
        head_dim=_whole(path, config, "head_dim", hidden // heads),
        vocabulary=_whole(path, config, "vocab_size"),
        limit=_whole(path, config, "max_position_embeddings"),
    )


def _whole(path: Path, config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {field}: expected a whole number of at least 1, not {value!r}")
    return value


def roofline(shape: Shape, device: Device, tensor_parallel: int = 1) -> StepCurve:
    """The step times of this model on so many of these devices."""
    tp = tensor_parallel
    reads = (shape.weight_bytes - 2 * shape.vocabulary * shape.hidden) / tp / (device.bandwidth * MEMORY)
    computes = 2 * shape.layer_weights / tp / (device.flops * COMPUTE)
    talks = 0.0 if tp == 1 else 2 * shape.layers * ALL_REDUCE
    says = 0.0 if tp == 1 else 2 * shape.layers * 4 * shape.hidden * (tp - 1) / tp / device.link
    knee = reads / computes
    knots = tuple((t, max(reads, computes * t) + talks + says * t) for t in (0.0, knee, 2 * knee))
    return StepCurve(
        knots,
        per_attention=4 * shape.layers * shape.heads * shape.head_dim / tp / (device.flops * ATTENTION),
        per_kv_token=shape.kv_bytes / tp / (device.bandwidth * MEMORY),
        per_decode=2 * shape.vocabulary * shape.hidden / tp / (device.flops * COMPUTE),
    )


def kv_capacity(shape: Shape, device: Device, tensor_parallel: int = 1) -> int:
    """Tokens of KV: 90 % of memory, less weights and 2.5 GB of activations; raises ValueError if none is
    left."""
    free = 0.9 * device.memory - shape.weight_bytes / tensor_parallel - 2.5e9
    tokens = int(free / (shape.kv_bytes / tensor_parallel)) // 16 * 16
    if tokens <= 0:
        raise ValueError(
            f"{shape.name} does not fit {tensor_parallel} x {device.name}: no memory is left for KV"
        )
    return tokens
