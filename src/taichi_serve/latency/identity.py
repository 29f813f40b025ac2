"""Does a profile belong to an engine? What both of them say about themselves, compared.

Another model is refused: its coefficients say nothing about this one. Another device, version or setting is
only told: predictions are corrected by what the instances do (profiled.py), and a profile that is nearly
right is a better start than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from taichi_serve.latency.profile import Profile

Setting = str | int | float | bool

# How much an engine may take at once: recorded for the reader, but a step's time follows from what is in it.
LIMITS = frozenset({"max_model_len", "max_num_batched_tokens", "max_num_seqs"})


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides how long an engine's steps take, apart from what is in them."""

    model: str
    device: str
    bytes_per_token: int
    versions: Mapping[str, str]
    settings: Mapping[str, Setting]


def refusal(profile: Profile, engine: Identity) -> str | None:
    """Why this profile says nothing about that engine, or None.

    A model goes by the last part of its name, so that a directory with Qwen/Qwen2.5-7B in it is the same.
    """
    if _last(profile.model) != _last(engine.model):
        return f"model: the profile is of {profile.model}, not of {engine.model}; measure that one"
    if profile.bytes_per_token != engine.bytes_per_token:
        return (
            f"bytes_per_token: a token's KV takes {profile.bytes_per_token} bytes in the profile and "
            f"{engine.bytes_per_token} here; measure it again with this --dtype and --kv-cache-dtype"
        )
    return None


def differences(profile: Profile, engine: Identity) -> Iterator[str]:
    """What else was different when it was measured, one phrase each."""
    if beside := profile.settings.get("neighbours"):
        yield f"it was measured beside {beside} more at work"
    if profile.device != engine.device:
        yield f"device was {profile.device}, here it is {engine.device}"
    for kind, then, now in (
        ("version of ", profile.versions, engine.versions),
        ("", profile.settings, engine.settings),
    ):
        for name in sorted((then.keys() & now.keys()) - LIMITS):
            if then[name] != now[name]:
                yield f"{kind}{name} was {then[name]}, here it is {now[name]}"


def _last(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
