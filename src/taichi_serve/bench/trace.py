"""A request trace as it was read, and what all formats have in common while they are read.

Every error of a reader is one line with file, row and field.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

OVER_LIMIT = ("refuse", "skip", "cut")
MOST_TOKENS = 1_000_000_000  # of one length in a file: beyond any model, and far inside a machine word


class TraceError(ValueError):
    """A trace that cannot be used; the message names file, row and field."""


@dataclass
class Trace:
    """Lengths in tokens, and arrival times in seconds (empty where the file has none); `over` is how many
    rows were over the model's `limit` and were skipped or cut, of the `rows` that the file has.

    Where the file says which prompts begin alike, `blocks` has a tuple for each row: a hash for every full
    block of `block_size` tokens of prompt and output together, that stands for all before it too."""

    name: str
    prompts: array[int]
    outputs: array[int]
    times: array[float]
    limit: int | None = None
    over: int = 0
    rows: int = 0
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    block_size: int = 0  # 0: it has no blocks

    def __len__(self) -> int:
        return len(self.prompts)

    def note(self, over_limit: str) -> str:
        """What became of rows over the limit, in words; empty where there were none."""
        if not self.over:
            return ""
        done = {"skip": "skipped", "cut": "cut"}[over_limit]
        return (
            f"{self.name}: {self.over} of {self.rows} rows are over the model's limit of {self.limit} tokens "
            f"and were {done}"
        )

    @property
    def rate(self) -> float:
        """Requests/s of the trace's own arrivals; 0.0 where it has none."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else 0.0


class Reading:
    """A trace under way: what fits is kept, in order of time."""

    def __init__(self, trace: Trace, scale: float, over_limit: str) -> None:
        """Raises ValueError where `over_limit` is none of OVER_LIMIT."""
        if over_limit not in OVER_LIMIT:
            raise ValueError(f"over-limit {over_limit!r} is none of {', '.join(OVER_LIMIT)}")
        self.trace, self.scale, self.over_limit = trace, scale, over_limit
        self.at = -math.inf  # when the row before arrived

    def fit(self, where: str, name: str, prompt: int, output: int) -> tuple[int, int] | None:
        """The lengths (tokens) with which the row is kept; None where it is left out. `name` is the field of
        the prompt. A prompt gives way to the output, at its end, and keeps at least one token."""
        trace, limit = self.trace, self.trace.limit
        trace.rows += 1
        if limit is None or prompt + output <= limit:
            return prompt, output
        trace.over += 1
        if self.over_limit == "refuse":
            raise TraceError(
                f"{where}: {name}: {prompt} + {output} tokens are over the model's limit of "
                f"{limit} (--over-limit skip or cut takes such a trace)"
            )
        if self.over_limit == "skip":
            return None
        output = max(1, min(output, limit - 1))
        return max(1, limit - output), output

    def keep(self, prompt: int, output: int, at: float | None) -> None:
        """Add a row; `at` is when it arrives (s), None where the trace does not say."""
        self.trace.prompts.append(prompt)
        self.trace.outputs.append(output)
        if at is not None:
            self.trace.times.append(at)

    def later(self, where: str, name: str, at: float, word: object) -> float:
        """The time `at` (s) of this row, `word` in its file; no row may be earlier than the one before."""
        if at < self.at:
            raise TraceError(f"{where}: {name}: {word} is earlier than the row before")
        self.at = at
        return at
