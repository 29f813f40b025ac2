"""Token ids for the calls of a workload: equal where their blocks are equal, and different everywhere else.

A block's tokens are drawn from its hash, and all else anew. With them goes a salt: the same calls twice would
be answered from a prefix cache, so every run has another one. A next turn has the tokens of its answer as the
server gave them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from taichi_serve.bench.blocks import alike
from taichi_serve.cluster.simulated.job import Call

TOKENS = range(300, 4000)  # ids that every vocabulary of some size has, and that are none of its special ones


class Prompts:
    """The prompts of one run. With the same salt come the same tokens, for calls in the same order."""

    def __init__(self, salt: int, block_size: int, part: int | None = None) -> None:
        """One `part` of a run has the blocks of the others, and draws all else for itself."""
        self._salt, self._block_size = salt, block_size
        self._chance = random.Random(f"prompts {salt}" if part is None else f"prompts {salt} {part}")

    def first(self, call: Call) -> list[int]:
        """The prompt of a request that follows no other."""
        return self._filled([], call)

    def following(self, before: Sequence[int], call: Call, then: Call) -> list[int]:
        """The prompt of the turn `then` after `call`, whose prompt and answer together are `before`.

        It begins with as many of these as their blocks say: with all, where it goes on behind the answer. An
        answer that broke off is filled up, so that the next prompt has its length whatever happened.
        """
        told = list(before[: call.prompt_tokens + call.output_tokens])
        told += self._drawn(call.prompt_tokens + call.output_tokens - len(told))
        same = alike(call.blocks, then.blocks)
        kept = len(told) if same == len(call.blocks) else same * self._block_size
        return self._filled(told[: min(kept, then.prompt_tokens)], then)

    def _filled(self, tokens: list[int], call: Call) -> list[int]:
        """`tokens` and what is missing to the prompt of `call`."""
        size, wanted = self._block_size, call.prompt_tokens
        begun = -(-len(tokens) // size) if call.blocks else 0  # blocks that `tokens` has at least a part of
        if call.blocks:
            tokens += self._drawn(min(begun * size, wanted) - len(tokens))
        for block in call.blocks[begun : wanted // size]:
            tokens += random.Random(self._salt ^ block).choices(TOKENS, k=size)
        return tokens + self._drawn(wanted - len(tokens))

    def _drawn(self, count: int) -> list[int]:
        return self._chance.choices(TOKENS, k=count)
