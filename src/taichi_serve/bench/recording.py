"""A recording of real engines: the event log of a server, and in its first line what the run was.

benchmarks/record.py makes one; bench/replay.py plays it again on engines in miniature.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taichi_serve.bench.replay import RecordedSteps, Times, again, moved
from taichi_serve.cluster.simulated import EngineShape
from taichi_serve.cluster.simulated.step import Truth
from taichi_serve.eventlog import Entry, LogError, read
from taichi_serve.latency.fit import Sample
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.messages import Move, Stepped
from taichi_serve.sliders import Sliders


class Listening:
    """Recorded durations as truth, and with each one what the step in miniature held."""

    def __init__(self, steps: RecordedSteps) -> None:
        self.steps = steps
        self.samples: list[Sample] = []

    def of(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int) -> float:
        """The recorded duration, written down."""
        seconds = self.steps.of(prefill_tokens, attention, decodes, kv_tokens)
        if seconds > 0:
            self.samples.append(Sample(Batch(prefill_tokens, attention, decodes, kv_tokens), seconds))
        return seconds


class Nearest:
    """Recorded steps as the truth of other runs: a step takes what one of those most like it took.

    Likeness is the relative distance in tokens, attention, decodes and context; the NEAR nearest take turns.
    """

    NEAR = 8

    def __init__(self, samples: Sequence[Sample]) -> None:
        rows = [
            (s.batch.prefill_tokens, s.batch.attention, s.batch.decodes, s.batch.kv_tokens) for s in samples
        ]
        self.logs = np.log1p(np.array(rows, dtype=np.float64))
        self.seconds = np.array([s.seconds for s in samples])
        self.turn = 0

    def of(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int) -> float:
        """Seconds of the next one of the steps most like this."""
        here = np.log1p(np.array((prefill_tokens, attention, decodes, kv_tokens), dtype=np.float64))
        distance = ((self.logs - here) ** 2).sum(axis=1)
        near = np.argpartition(distance, self.NEAR)[: self.NEAR]
        self.turn += 1
        return float(self.seconds[near[self.turn % self.NEAR]])


class Jittered:
    """A step model as truth, with what real steps took over what it said: their ratios, in their order."""

    def __init__(self, model: Roofline, samples: Sequence[Sample]) -> None:
        self.model = model
        self.ratios = [s.seconds / model.seconds(s.batch) for s in samples]
        self.turn = 0

    def of(self, prefill_tokens: int, attention: float, decodes: int, kv_tokens: int) -> float:
        """Seconds of a step with this work, jitter and all."""
        self.turn += 1
        ratio = self.ratios[self.turn % len(self.ratios)]
        return self.model.of(prefill_tokens, attention, decodes, kv_tokens) * ratio


@dataclass(frozen=True)
class Recording:
    """What was run (`head`: sliders, kv_capacity in tokens of each instance, ...), and the facts."""

    head: dict[str, Any]
    entries: list[Entry]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a recording; raises LogError naming the file and the line."""
        try:
            with gzip.open(path, "rt") as file:
                head = json.loads(file.readline())
                return cls(head, list(read(file)))
        except (OSError, EOFError, ValueError) as wrong:
            raise LogError(f"{path}: {wrong}") from wrong

    @property
    def sliders(self) -> Sliders:
        """As the server had them."""
        return Sliders(**self.head["sliders"])

    @property
    def shape(self) -> EngineShape:
        """The blocks of the real engines: all instances have the same. An older recording does not say how
        large blocks are: there KV is ample, and it makes no difference."""
        capacity, size = min(self.head["kv_capacity"]), self.head.get("block_size")
        return EngineShape(capacity) if size is None else EngineShape(capacity, block_size=size)

    @property
    def moves(self) -> Counter[Move]:
        """How often its requests moved, by why."""
        return moved(self.entries)

    def again(self, truth: Truth | None = None) -> tuple[Times, Times]:
        """The recorded times, and those of engines in miniature (bench/replay.py)."""
        return again(self.entries, self.sliders, self.shape, truth)

    def samples(self) -> list[Sample]:
        """What was in each step, and how long it took: of all instances."""
        steps = [event for event, _ in self.entries if isinstance(event, Stepped)]
        names = [f"i{number}" for number in range(self.sliders.instances)]
        truths = [Listening(RecordedSteps(s for s in steps if s.instance == name)) for name in names]
        again(self.entries, self.sliders, self.shape, truths)
        return [sample for truth in truths for sample in truth.samples]
