"""The prefix cache of an engine in miniature, and a second tier on its host.

It follows vLLM 0.32 (v1/core/block_pool.py). A block is findable once it is full, whole blocks only. In use
it stays; what nobody uses any more is free and still findable, and is taken for something else when no blank
block is left, the one longest unused first: blocks of a request come free from its tail, so that a prefix
outlives what follows it. The host keeps a copy of every block that the device stores, as vLLM's offloading
does, and forgets the one longest unused.

What is simpler: of two copies of a block, computed by two requests at once, only the first is findable; and
blocks of an output become findable when its request leaves the engine, not one by one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from taichi_serve.messages import Cached, Tier


class Changes:
    """What came into a tier and went out of it since somebody asked; what did both is in neither."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.since: dict[int, bool] = {}  # block to whether it came or went

    def note(self, block: int, there: bool) -> None:
        """The block is there from now on, or is not any more."""
        if self.since.get(block) is (not there):
            del self.since[block]
        else:
            self.since[block] = there

    def tell(self, now: float, instance: str) -> list[Cached]:
        """The fact, if there is something to tell."""
        if not self.since:
            return []
        stored = tuple(block for block, there in self.since.items() if there)
        removed = tuple(block for block, there in self.since.items() if not there)
        self.since.clear()
        return [Cached(now, instance, stored, removed, tier=self.tier)]


class Host:
    """Blocks in the memory of the host, the one longest unused first; `room` in blocks."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.changes = Changes(Tier.HOST)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def put(self, block: int) -> None:
        """Keep a copy of this block."""
        if not self.room:
            return
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return
        self._blocks[block] = None
        self.changes.note(block, there=True)
        if len(self._blocks) > self.room:
            oldest, _ = self._blocks.popitem(last=False)
            self.changes.note(oldest, there=False)

    def touch(self, block: int) -> None:
        """It was used."""
        if block in self._blocks:
            self._blocks.move_to_end(block)


class PrefixCache:
    """The findable blocks of one engine, by hash. It counts no free blocks: who takes and gives them does."""

    def __init__(self, host_blocks: int = 0) -> None:
        self.used = False  # whether anything ever was in it
        self.users: dict[int, int] = {}  # of findable blocks in use: how many jobs have them
        self.idle: OrderedDict[int, None] = OrderedDict()  # free and findable, longest unused first
        self.changes = Changes(Tier.DEVICE)
        self.host = Host(host_blocks)

    def __contains__(self, block: int) -> bool:
        return block in self.users or block in self.idle

    def run(self, blocks: Sequence[int], most: int, start: int = 0) -> int:
        """How many blocks from the first on are on the device, up to `most`; the first `start` are known to
        be."""
        users, idle = self.users, self.idle
        for number in range(start, min(most, len(blocks))):
            if blocks[number] not in users and blocks[number] not in idle:
                return number
        return max(start, min(most, len(blocks)))

    def run_on_host(self, blocks: Sequence[int], most: int, start: int) -> int:
        """How many blocks from the first on are on the device, where that ends at `start`, or after it on the
        host."""
        for number in range(start, min(most, len(blocks))):
            if blocks[number] not in self.host:
                return number
        return max(start, min(most, len(blocks)))

    def unused(self, blocks: Iterable[int]) -> int:
        """How many of these are free: they would not be any more if they were taken."""
        return sum(block in self.idle for block in blocks)

    def take(self, blocks: Sequence[int]) -> int:
        """A job uses these findable blocks too; returns how many of them were free."""
        freed = 0
        for block in blocks:
            if block in self.users:
                self.users[block] += 1
            else:
                del self.idle[block]
                self.users[block] = 1
                freed += 1
            self.host.touch(block)
        return freed

    def store(self, block: int) -> bool:
        """A block of a job's own is full: whether it is findable now, and not a copy of one that is."""
        if block in self:
            return False
        self.users[block] = 1
        self.used = True
        self.changes.note(block, there=True)
        self.host.put(block)
        return True

    def give(self, blocks: Sequence[int]) -> int:
        """A job uses these no more, the last of them first; returns how many are free now."""
        freed = 0
        for block in reversed(blocks):
            self.host.touch(block)
            if self.users[block] > 1:
                self.users[block] -= 1
            else:
                del self.users[block]
                self.idle[block] = None
                freed += 1
        return freed

    def trim(self, free: int) -> None:
        """No more than `free` blocks are free: those longest unused were taken for something else."""
        while len(self.idle) > free:
            block, _ = self.idle.popitem(last=False)
            self.changes.note(block, there=False)

    def tell(self, now: float, instance: str) -> list[Cached]:
        """What changed since it was last told."""
        return [*self.changes.tell(now, instance), *self.host.changes.tell(now, instance)]
