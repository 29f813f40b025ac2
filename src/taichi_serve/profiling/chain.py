"""Prompts back to back beside decodes that stay: what each step held, and which of them are the usual ones.

With asynchronous scheduling an engine launches a step before it takes the output of the one before. Where
launching takes longer than computing, a step's output is therefore seen only when the next one was launched,
and a step beside one of another kind has that one's launch in its seconds: the first chunk of a prompt shows
two launches, the last one next to none. An engine that serves is never drained, and pays what the steps
between them show.
"""

from __future__ import annotations

from taichi_serve.latency.model import prompt_attention
from taichi_serve.latency.profile import StepRow
from taichi_serve.messages import Stepped
from taichi_serve.profiling.grid import Cell

LAST = 2  # chunks of the last prompt: its first, and one after it that does not count


class Chain:
    """So many prompts of a cell, of `passes` chunks each but for a shorter last one, and the steps after them
    that have decodes only."""

    def __init__(self, cell: Cell, passes: int, prompts: int) -> None:
        self._prompt_tokens = passes * cell.chunk
        last = min(passes, LAST) if prompts > 1 else passes
        self.prompt_sizes = [self._prompt_tokens] * (prompts - 1) + [last * cell.chunk]
        self.plain = 0  # steps with decodes only since the last one with prompt tokens
        self._computed = 0  # prompt tokens of all prompts together: they are computed in order
        self._rows: list[StepRow] = []
        depths = range(0, self._prompt_tokens, cell.chunk)
        self._planned = {(cell.chunk, _pairs(depth, cell.chunk), cell.decodes) for depth in depths}
        self._planned.add((0, 0.0, cell.decodes))

    def saw(self, step: Stepped, kv_tokens: int) -> None:
        """The next step of the instance, whose decodes had so many tokens together."""
        tokens = step.prefill_tokens
        self.plain = 0 if tokens else self.plain + 1
        if tokens or self._rows:  # while prompts are only being asked for, the machine is busy with that
            pairs = _pairs(self._computed % self._prompt_tokens, tokens)
            self._rows.append(StepRow(tokens, pairs, step.decodes, kv_tokens, step.seconds))
            self._computed += tokens

    def rows(self) -> list[StepRow]:
        """Steps that held what was planned, between two of their kind: with prompt tokens, or without."""
        if self._computed != sum(self.prompt_sizes):
            return []  # who was in which step is not known
        return [
            row
            for before, row, after in zip(self._rows, self._rows[1:], self._rows[2:], strict=False)
            if (row.prefill_tokens, row.attention, row.decodes) in self._planned
            and bool(before.prefill_tokens) == bool(row.prefill_tokens) == bool(after.prefill_tokens)
        ]


def _pairs(depth: int, tokens: int) -> float:
    """Attention of so many tokens after `depth` others of their prompt."""
    return float(depth * tokens + prompt_attention(tokens))
