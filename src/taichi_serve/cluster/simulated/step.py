"""What one step of an engine in miniature holds, and the two things an engine is made of besides."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from taichi_serve.cluster.simulated.job import Job


class Truth(Protocol):
    """How long a step really takes (latency/curve.py), asked once for each step."""

    def of(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int) -> float:
        """Seconds of a step with this work."""
        ...


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What an engine can hold: `kv_capacity` in tokens, `max_running` requests, blocks of `block_size`
    tokens, and copies of `host_kv` tokens in the memory of its host, which are read at `host_bandwidth`
    bytes/s."""

    kv_capacity: int
    max_running: int = 256
    block_size: int = 16
    host_kv: int = 0
    host_bandwidth: float = 20e9

    def __post_init__(self) -> None:
        if self.host_kv < 0 or not self.host_bandwidth > 0:
            raise ValueError("a host keeps at least 0 tokens, and reads them at some speed")
        if self.block_size < 1 or self.max_running < 1 or self.kv_capacity < self.block_size:
            raise ValueError("an engine needs room for at least one block and one running request")


class Ends(IntEnum):
    """What a step brings about for one job when it is done."""

    FIRST = 0  # the first token of all
    FLOWED = 1  # the first token of a later leg
    LEFT = 2  # the leg ends with this token, because of a Flow
    LAST = 3  # the last token of all


class Step:
    """One planned step: its work, and what it brings about."""

    __slots__ = ("attention", "context", "decodes", "ends", "missed", "prefill_tokens", "seconds")

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.attention = 0.0
        self.decodes = 0
        self.context = 0
        self.seconds = 0.0
        self.ends: list[tuple[Ends, Job, int]] = []  # with the leg that it is about
        self.missed: tuple[str, ...] = ()
