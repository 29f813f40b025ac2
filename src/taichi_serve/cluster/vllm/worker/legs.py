"""What the copier's thread knows of the legs whose KV it copies, and what it needs to copy it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from taichi_serve.cluster.vllm.wire import Drop, Given, More, Return


@dataclass(frozen=True, slots=True)
class Late:
    """A step waited for the leg in vain: it is computed again."""

    leg: str


class Reader(Protocol):
    """Reads blocks of a peer into blocks here."""

    def read(self, source: str, remote: list[int], local: list[int], note: str) -> Callable[[], bool]:
        """Begin. The answer says whether it is over; it raises OSError when that failed."""
        ...

    def forget(self, source: str) -> None:
        """Nothing is read from this peer any more: unmap what is mapped of it."""
        ...


@dataclass(slots=True)
class Reading:
    """A read under way."""

    over: Callable[[], bool]
    began: float
    end: int  # blocks from the first one on that are here then
    last: bool


@dataclass(slots=True)
class Leg:
    """What is known of one leg here."""

    given: Given | None = None
    more: More | None = None
    done: int = 0  # blocks from the first one on that are here
    told: int = -1  # as of the last Copied
    copied: int = 0
    seconds: float = 0.0
    began: float = 0.0
    reading: Reading | None = None
    ends: list[Drop | Return | Late] = field(default_factory=list)  # answered when its read is over
    over: bool = False  # the last block is here, or never will be
    good: bool = False

    @property
    def wanting(self) -> bool:
        """Whether there is something to begin."""
        if self.given is None or self.more is None or self.over or self.reading is not None or self.ends:
            return False
        return self.urgent or len(self.more.blocks) > self.done or self.told != self.done

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it."""
        return self.more is not None and bool(self.more.note)
