"""What many instances have of a prompt, as arrays: where a system prompt is everywhere, it is in a thousand
caches, and a dictionary of them would take longer than the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from taichi_serve.scheduling.residency import Prefix

Counts = npt.NDArray[np.float64]  # whole numbers, as the columns that they are held against


class Matched(Mapping[str, Prefix]):
    """By instance what it has of a prompt; who has nothing is not in it. The arrays are tokens, with a number
    for each instance."""

    __slots__ = ("_rows", "claimed", "device", "held")

    def __init__(self, rows: Mapping[str, int], device: Counts, held: Counts, claimed: Counts) -> None:
        self._rows = rows
        self.device, self.held, self.claimed = device, held, claimed

    def __getitem__(self, name: str) -> Prefix:
        row = self._rows[name]
        found = Prefix(int(self.device[row]), int(self.held[row]), int(self.claimed[row]))
        if not (found.held or found.claimed):
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._rows if name in self)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.held + self.claimed))

    def __bool__(self) -> bool:
        return bool(self.held.any() or self.claimed.any())


def lengths(runs: Sequence[tuple[int, int]], count: int) -> Counts:
    """Of pairs of a set of bits and a number, for each of so many bits the number that it is in."""
    found = np.zeros(count)
    for bits, length in runs:
        found[_rows(bits, count)] = length
    return found


@lru_cache(1 << 12)  # few instances have ever the same part of a prompt, and all have a system prompt
def _rows(bits: int, count: int) -> npt.NDArray[np.intp]:
    packed = np.frombuffer(bits.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(packed, count=count, bitorder="little"))
