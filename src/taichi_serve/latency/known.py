"""What is known of step times before any step was made: a shipped profile of this model on this device, or a
roofline of it where the device is described.

A profile that was measured goes before one that is composed of kernel tables, and both before the roofline.
Whatever it is, predictions are corrected by what the instances do (profiled.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.device import Shape, described, kv_capacity, roofline
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.profile import Profile, Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.latency.shipped import believed, machine, measured, measured_names, names
from taichi_serve.sliders import Kind

# What a model's name may end with and still have the shape of its siblings.
SIBLINGS = frozenset({"base", "chat", "instruct", "it", "hf"})
WHOLE = "100"  # per cent of a device
# KV between two instances of one host: half as fast as was seen with 4,000 tokens on H100 and H200
# (docs/results.md).
LINKS = tuple(Transfer(source, target, 0.005, 2e10) for source in Kind for target in Kind)


@dataclass(frozen=True, slots=True)
class Question:
    """A model on devices of one sort. Bytes of KV are of one token, memory is in bytes of one device."""

    model: str
    kv_bytes: int
    shape: Shape | None  # None: no dense model in 16 bits, and a roofline would say too much or too little
    device: str
    memory: float
    share: str = WHOLE  # per cent of a device that an instance gets


@dataclass(frozen=True, slots=True)
class Known:
    """Step times as they are known, and what a predictor believes of them; how KV moves, if anybody knows."""

    source: str
    truth: StepCurve | Roofline
    belief: Roofline
    transfers: tuple[Transfer, ...] = ()

    @classmethod
    def of(cls, profile: Profile, source: str) -> Known:
        """What a measured profile says."""
        model = profile.fit.model()
        return cls(source, model, model, tuple(profile.transfers))

    def predictor(self, kv_bytes: int) -> Profiled:
        """A predictor that starts from it; `kv_bytes` are those of one token."""
        return Profiled(self.belief, {(t.source, t.target): t for t in self.transfers}, kv_bytes)


def known(asked: Question, tensor_parallel: int) -> Known | None:
    """What is known of instances with so many devices each."""
    return (
        _measured(asked, tensor_parallel)
        or _composed(asked, tensor_parallel)
        or _roofline(asked, tensor_parallel)
    )


def family(model: str) -> str:
    """A model's name without what does not change its shape: "Qwen/Qwen2.5-14B-Instruct" is "qwen2.5-14b"."""
    words = model.rstrip("/").rsplit("/", 1)[-1].lower().split("-")
    while len(words) > 1 and words[-1] in SIBLINGS:
        words.pop()
    return "-".join(words)


def _measured(asked: Question, tensor_parallel: int) -> Known | None:
    if asked.shape is None:
        return None
    for name in measured_names():
        profile = measured(name)
        said = profile.settings
        here = (
            family(profile.model) == family(asked.model)
            and profile.bytes_per_token == asked.kv_bytes
            and profile.device == asked.device
            and said.get("tensor_parallel_size", 1) == tensor_parallel
            and said.get("mps_share", WHOLE) == asked.share
            and not said.get("neighbours")
        )
        if here:
            return Known.of(profile, f"the shipped profile {name}")
    return None


def _composed(asked: Question, tensor_parallel: int) -> Known | None:
    device = described(asked.device, asked.memory)
    if asked.shape is None or device is None or asked.share != WHOLE:
        return None
    for name in sorted(set(names()) - set(measured_names())):
        found = machine(name)
        count, _, its = found.device.partition(" x ")
        here = (
            family(found.model) == family(asked.model)
            and found.kv_bytes_per_token == asked.kv_bytes
            and described(its, device.memory) == device
            and int(count) == tensor_parallel
        )
        if here:
            return Known(f"the shipped profile {name}", found.truth, found.belief, LINKS)
    return None


def _roofline(asked: Question, tensor_parallel: int) -> Known | None:
    device = described(asked.device, asked.memory)
    if asked.shape is None or device is None or asked.share != WHOLE:
        return None
    try:
        room = kv_capacity(asked.shape, device, tensor_parallel)
    except ValueError:  # it does not fit there, and nobody need know how fast it would be
        return None
    curve = roofline(asked.shape, device, tensor_parallel)
    of = f"{tensor_parallel} x {device.name}" if tensor_parallel > 1 else device.name
    return Known(f"a roofline of {of}", curve, believed(curve, room), LINKS)
