"""Hashes of blocks of tokens, as workloads have them: 64 bits for a block and all before it."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from hashlib import blake2b

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # odd: no two of the first 2^64 laps have the same multiple


def chained(ids: Iterable[int], before: int = 0) -> list[int]:
    """Hashes of blocks that have `ids` of at most 64 bits, behind the block with the hash `before`."""
    made = []
    for name in ids:
        digest = blake2b(struct.pack("<QQ", before, name), digest_size=8).digest()
        before = int.from_bytes(digest, "little")
        made.append(before)
    return made


def unshared(chance: random.Random, count: int) -> tuple[int, ...]:
    """Hashes of so many blocks that nothing else has: who has one of them has all before it."""
    return struct.unpack(f"<{count}Q", chance.randbytes(8 * count))


def anew(blocks: tuple[int, ...], lap: int) -> tuple[int, ...]:
    """The same blocks for a trace that is played over again: alike within a lap, unlike in all others."""
    mark = lap * GOLDEN & MASK
    return tuple(block ^ mark for block in blocks) if lap else blocks


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many blocks both begin with: as a hash stands for all before it, the last one in common says it."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle - 1)
    return low
