"""Which steps are measured: prompts of every chunk, in several chunks each, beside decodes that stay.

A cell is one chunk beside one set of decodes. Its prompts take `passes` chunks, so each gives a step without
context and some with more and more of it; after the prompts come steps with decodes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from taichi_serve.sliders import Kind

PASSES = 4  # chunks of one prompt: attention of the last one is over three times its own length before it
FEWEST = 2  # with less, the next prompt but one could not come before the one that is computed ends
MOST_PROMPTS, ENOUGH = 3, 384  # prompts of a cell in one round, and one chunk of each of them in tokens
TOGETHER = 2  # prompts that hold KV at the same time: one is computed, the one before is about to be freed
OUTPUT = 1024  # tokens that a decode of a set can make before it has to be set up again
KEEP_FREE = 0.1  # share of the KV cache that no set of decodes takes: nobody is preempted


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine can take: tokens of KV, of one sequence, of one step, and sequences in a step."""

    kv_capacity: int
    sequence: int
    step: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Prompts that are computed `chunk` tokens a step, beside `decodes` with `context` tokens each."""

    chunk: int
    decodes: int
    context: int


@dataclass(frozen=True, slots=True)
class Hop:
    """A move of a request with so many tokens between instances of these kinds."""

    source: Kind
    target: Kind
    tokens: int


@dataclass(frozen=True, slots=True)
class Grid:
    """What is asked for; what an engine cannot take is left out.

    `fill` bounds the context of a set of decodes together: all of it must be computed before the set stands.
    Everything is measured in `repeats` rounds through all of it.
    """

    chunks: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048)
    decodes: tuple[int, ...] = (0, 1, 4, 16, 64)
    contexts: tuple[int, ...] = (128, 1024, 4096)
    moves: tuple[int, ...] = (128, 1024, 4096)
    fill: int = 32_768
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("chunks", "decodes", "contexts", "moves"):
            least = 0 if name == "decodes" else 2  # a step cannot tell a prompt of one token from a decode
            if not (values := getattr(self, name)) or min(values) < least:
                raise ValueError(f"{name} must be whole numbers of at least {least}, not {values}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")

    def cells(self, limits: Limits) -> list[Cell]:
        """All cells, those beside the same decodes one after the other."""
        return [
            Cell(chunk, decodes, context)
            for decodes, context in self._beside(limits)
            for chunk in self.chunks
            if chunk + decodes <= limits.step and passes(chunk, limits) >= FEWEST
        ]

    def hops(self, limits: Limits) -> list[Hop]:
        """All moves, those between the same kinds one after the other."""
        longest = min(limits.sequence, limits.kv_capacity) - OUTPUT // 8
        sizes = _clipped(self.moves, longest)
        return [Hop(source, target, tokens) for source, target in product(Kind, Kind) for tokens in sizes]

    def _beside(self, limits: Limits) -> Iterator[tuple[int, int]]:
        if 0 in self.decodes:
            yield 0, 0
        contexts = _clipped(self.contexts, limits.sequence - room(limits) - 1)
        prompts = TOGETHER * max(chunk * passes(chunk, limits) for chunk in self.chunks)
        room_for_all = limits.kv_capacity * (1 - KEEP_FREE) - prompts
        for decodes, context in product(self.decodes, contexts):
            fits = decodes * (context + room(limits)) <= room_for_all
            fits = fits and decodes + TOGETHER <= limits.sequences
            if decodes and fits and decodes * context <= max(self.fill, context):
                yield decodes, context


def passes(chunk: int, limits: Limits) -> int:
    """Chunks of one prompt of a cell."""
    held = min(limits.sequence - 1, limits.kv_capacity // TOGETHER)
    return min(PASSES, held // chunk, max(FEWEST, 4096 // chunk))


def prompts(chunk: int) -> int:
    """Prompts of a cell that count in one round: more of those that are over soon, whose steps vary most."""
    return max(1, min(MOST_PROMPTS, ENOUGH // chunk))


def room(limits: Limits) -> int:
    """Tokens that a decode of a set can make."""
    return min(OUTPUT, limits.sequence // 2)


def _clipped(values: tuple[int, ...], longest: int) -> list[int]:
    """The values in order, those above `longest` as `longest`, each once."""
    return sorted({min(value, longest) for value in values if longest > 0})
