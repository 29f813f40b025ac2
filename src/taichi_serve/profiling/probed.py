"""What a measurement needs of a cluster."""

from __future__ import annotations

from typing import Protocol

from taichi_serve.cluster.base import Cluster


class LostError(RuntimeError):
    """What is measured did not do what it was told, or ended."""


class Probed(Cluster, Protocol):
    """A cluster that takes requests of our own; the Arrived of each is a fact like any other."""

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        """A request with so many tokens, and the name it goes by. No two have a prefix in common."""
        ...
