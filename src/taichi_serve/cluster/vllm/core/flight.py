"""The flight recorder of an engine core: who was being computed, for whoever looks after its death.

Written before a step runs, into memory that the kernel keeps when the process is killed. Two halves take
turns, and one byte says which of them counts, so that a death in the middle of writing leaves the last good
one. Plain decodes are not in it: what kills an engine is nearly always somebody's prompt.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from taichi_serve.cluster.vllm.wire import FLIGHT_BYTES, FLIGHT_HALF, FLIGHT_LENGTH, flight_half

STEPS = 2  # that can be under way at once


class Flight:
    """Written by one process, read by `wire.read_flight` in another. Costs microseconds, and nothing while
    no prompts are computed."""

    def __init__(self, path: Path) -> None:
        with path.open("wb+") as file:
            file.truncate(FLIGHT_BYTES)
            self._memory = mmap.mmap(file.fileno(), FLIGHT_BYTES)
        self._steps: deque[tuple[str, ...]] = deque(maxlen=STEPS)
        self._written: list[str] = []
        self._half = 0

    def planned(self, legs: Iterable[str]) -> None:
        """The next step computes the prompts of these legs."""
        self._steps.append(tuple(legs))
        names = list(dict.fromkeys(name for step in reversed(self._steps) for name in step))
        if names != self._written:
            self._written = names
            self._write(names)

    def _write(self, names: list[str]) -> None:
        text = b"\0".join(name.encode() for name in names)
        room = FLIGHT_HALF - FLIGHT_LENGTH.size
        if len(text) > room:
            text = text[: text.rindex(b"\0", 0, room + 1)]
        half = 1 - self._half
        start = flight_half(half)
        FLIGHT_LENGTH.pack_into(self._memory, start, len(text))
        self._memory[start + FLIGHT_LENGTH.size : start + FLIGHT_LENGTH.size + len(text)] = text
        self._memory[0] = self._half = half
