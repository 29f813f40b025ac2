"""A machine to simulate: step times, KV room and limits, from a shipped profile, a measured one, or a
config.json.

Shipped are files of two sorts. Composed ones are coefficients fitted to public kernel tables
(scripts/compose_profiles.py); each names its sources and its error on held-out rows. Measured ones are files
of `taichi profile` as they are, and a server can start its predictions from them too. A file put into the
folder is a name from then on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.device import DEVICES, kv_capacity, read_config, roofline
from taichi_serve.latency.fit import Sample, fit
from taichi_serve.latency.identity import Setting
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.latency.profile import Profile, ProfileError, load

# Settings of a profile that are flags of `taichi serve`, by the same names.
FLAGS = (
    "tensor_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "dtype",
    "kv_cache_dtype",
    "quantization",
    "block_size",
    "enforce_eager",
)
MAX_RUNNING = 256  # requests in one step where nobody says
SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Machine:
    """One instance's model and device. Tokens, bytes, seconds."""

    name: str
    model: str
    device: str
    truth: StepCurve | Roofline
    kv_capacity: int
    kv_bytes_per_token: int
    max_model_len: int
    settings: tuple[tuple[str, Setting], ...] = ()  # flags of `taichi serve` that make an instance this one
    beside: tuple[str, ...] = ()  # what else it was, and no flag can say

    @property
    def max_running(self) -> int:
        """Requests in one step, as it was measured."""
        return int(dict(self.settings).get("max_num_seqs", MAX_RUNNING))

    @property
    def belief(self) -> Roofline:
        """What a predictor that was fitted to this machine's steps would think: a simpler model than the
        truth."""
        if isinstance(self.truth, Roofline):
            return self.truth
        return believed(self.truth, self.kv_capacity)

    def scaled(self, by: float) -> StepCurve:
        """The truth, slower or faster than the belief."""
        if isinstance(self.truth, Roofline):
            raise ValueError(f"{self.name}: only a shipped profile can be scaled")
        return self.truth.scaled(by)


def names() -> list[str]:
    """The shipped profiles."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def measured_names() -> list[str]:
    """Those of them that `taichi profile` wrote."""
    return [name for name in names() if _is_measured(SHIPPED / f"{name}.json")]


def machine(profile: str, device: str = "A100", tensor_parallel: int = 1) -> Machine:
    """A shipped name, the path of a `taichi profile` file, or of a config.json (then `device` counts).

    Raises ValueError naming the file and the field.
    """
    shipped = _shipped(profile)
    if shipped is not None and not _is_measured(shipped):
        return _composed(shipped)
    path = shipped or Path(profile)
    if not path.is_file():
        raise ValueError(f"profile {profile!r} is no file, and none of {', '.join(names())}")
    if path.name == "config.json":
        return _described(path, device, tensor_parallel)
    return _measured(load(path), path.stem, profile if shipped else str(path.absolute()))


def measured(profile: str) -> Profile:
    """The `taichi profile` of a shipped name or a path; raises ProfileError naming file and field."""
    shipped = _shipped(profile)
    if shipped is not None and not _is_measured(shipped):
        known = ", ".join(measured_names()) or "none is shipped"
        raise ProfileError(f"{profile}: composed from kernel tables, no measurement (those: {known})")
    return load(shipped or Path(profile))


def _shipped(profile: str) -> Path | None:
    """The file of a shipped name."""
    path = SHIPPED / f"{profile}.json"
    return path if "/" not in profile and path.is_file() else None


def _is_measured(path: Path) -> bool:
    return "schema" in json.loads(path.read_text())


def _measured(found: Profile, name: str, profile: str) -> Machine:
    """The machine of a `taichi profile`; `profile` is what `taichi serve --profile` takes for it."""
    said = found.settings
    # A flag that is off, and a quantization of "none", are what an instance has without a word.
    flags = tuple((k, said[k]) for k in FLAGS if k in said and said[k] is not False and said[k] != "none")
    beside = tuple(f"{k} {v}" for k, v in said.items() if k not in FLAGS)
    limit = found.settings.get("max_model_len", found.kv_capacity)
    return Machine(
        name,
        found.model,
        found.device,
        found.fit.model(),
        found.kv_capacity,
        found.bytes_per_token,
        limit if isinstance(limit, int) else found.kv_capacity,
        (("profile", profile), *flags),
        beside,
    )


def _composed(path: Path) -> Machine:
    body: dict[str, Any] = json.loads(path.read_text())
    curve = StepCurve(
        tuple((float(t), float(s)) for t, s in body["knots"]),
        float(body["per_attention"]),
        float(body["per_kv_token"]),
        float(body["per_decode"]),
    )
    return Machine(
        str(body["name"]),
        str(body["model"]),
        f"{body['tensor_parallel']} x {body['device']}",
        curve,
        int(body["kv_capacity"]),
        int(body["kv_bytes_per_token"]),
        int(body["max_model_len"]),
        (("tensor_parallel_size", int(body["tensor_parallel"])),),
    )


def _described(path: Path, device: str, tensor_parallel: int) -> Machine:
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is none of {', '.join(DEVICES)}")
    shape = read_config(path)
    room = kv_capacity(shape, DEVICES[device], tensor_parallel)
    curve = roofline(shape, DEVICES[device], tensor_parallel)
    return Machine(
        f"{shape.name} (roofline)",
        shape.name,
        f"{tensor_parallel} x {device}",
        curve,
        room,
        shape.kv_bytes,
        shape.limit,
        (("tensor_parallel_size", tensor_parallel),),
    )


@cache
def believed(truth: StepCurve, capacity: int) -> Roofline:
    """What a predictor that was fitted to these steps would think, with KV of up to `capacity` tokens."""
    samples = []
    for decodes in (0, 1, 16, 64, 128):
        for prompt in (0, 128, 256, 512, 1024, 2048, 4096):
            for share in (0.1, 0.5, 0.9) if decodes else (0.0,):
                if decodes or prompt:
                    kv = int(capacity * share * min(1.0, decodes / 64))
                    batch = Batch(prompt, prompt * (prompt + 2000.0) / 2, decodes, kv)
                    samples.append(Sample(batch, truth.seconds(batch)))
    return fit(samples)
