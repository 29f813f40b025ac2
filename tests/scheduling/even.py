"""A predictor for numbers made by hand."""

from __future__ import annotations

from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed, Stepped


@dataclass
class Even:
    """`per_token` for each prompt token, 50 ms for a move; an output token takes `base`, and `each` more for
    each decode (s)."""

    per_token: float = 0.001
    base: float = 0.03
    each: float = 0.0

    def ttft(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        return (instance.queued_prefill_tokens + prompt_tokens - cached) * self.per_token

    def work(self, instance: Instance, prompt_tokens: int, cached: int = 0) -> float:
        return (prompt_tokens - cached) * self.per_token

    def since(self, instance: Instance, elapsed: float) -> float:
        return 0.0

    def tpot(self, instance: Instance, kv_tokens: int) -> float:
        return self.base + self.each * (instance.decodes + (kv_tokens > 0))

    def move(self, source: Instance, target: Instance, kv_tokens: int, held: int = 0) -> float:
        return 0.05

    def fetch(self, source: Instance, target: Instance, kv_tokens: int) -> float:
        return 0.05

    def stepped(self, instance: Instance, step: Stepped) -> None: ...

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None: ...
