"""Pretended copiers: orders and words in their order, reads that take any time, and the one check that
matters: a byte counts only if its source still held it for this reader after it was read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taichi_serve.cluster.vllm.wire import Copied, Drop, Dropped, Failed, Gone, More, Order, Word

if TYPE_CHECKING:
    from pretended import Core


@dataclass(slots=True, eq=False)
class Read:
    """Bytes on their way from a source."""

    leg: str
    source: str
    blocks: list[int]
    note: str  # the leg that is held there; "" while it still runs
    whole: bool = False  # a pull of everything, beside the copiers
    prefix: bool = False  # of a prompt's prefix
    good: bool | None = None  # None: under way


class PretendedCopiers:
    """The server's port of an instance's copiers, and the copiers. Pulls of whole legs are done here too."""

    ranks = 1

    def __init__(self, core: Core) -> None:
        self.core = core
        self.orders: deque[Order] = deque()
        self.words: deque[Word] = deque()
        self.reading: list[Read] = []
        self.pulls: dict[str, Read] = {}
        self.tails: dict[str, bool] = {}  # legs whose last block is here, or never will be
        self.refused: dict[str, None] = {}
        self.prefixes: dict[
            str, Read | None
        ] = {}  # legs that have blocks for one (None), or that are to have
        self.fetched: dict[str, int] = {}  # blocks of a prefix that are here
        self.waiting: dict[str, More] = {}  # legs of which one read is under way: what is read after it

    def send(self, order: Order) -> None:
        self.orders.append(order)

    def reads(self, leg: str) -> bool:
        """Whether anything is under way for a leg."""
        return any(read.leg == leg for read in self.reading)

    def forget(self, leg: str) -> None:
        """Nothing of it is wanted any more."""
        self.refused[leg] = None
        self.tails.pop(leg, None)
        self.pulls.pop(leg, None)
        self.prefixes.pop(leg, None)
        self.fetched.pop(leg, None)
        self.waiting.pop(leg, None)

    def given(self, leg: str) -> None:
        """The leg has blocks that its prefix is read into."""
        read = self.prefixes.setdefault(leg, None)
        if read is not None:
            self.reading.append(read)

    def _prefix(self, more: More) -> None:
        read = Read(more.leg, more.source, more.blocks, "", prefix=True)
        if more.leg in self.prefixes:
            self.reading.append(read)
        else:
            self.prefixes[more.leg] = read

    def _more(self, more: More) -> None:
        """One read of each leg is under way, as with the real ones, and one that fails is the last."""
        if self.reads(more.leg):
            self.waiting[more.leg] = more
        elif self.tails.get(more.leg) is not False:
            self.reading.append(Read(more.leg, more.source, more.blocks, more.note))

    def pull(self, leg: str, kv: dict[str, Any]) -> None:
        """Begin to read all of a leg that is held."""
        read = Read(leg, kv["remote_engine_id"], [], kv["remote_request_id"], whole=True)
        self.pulls[leg] = read
        self.reading.append(read)

    def pulled(self, leg: str) -> bool | None:
        """None while it is under way; then whether it came."""
        return self.pulls[leg].good

    def landed(self, leg: str) -> bool | None:
        """Of a leg that is copied ahead: whether its last block is here; None where that is not known."""
        return self.tails.get(leg)

    def work(self) -> None:
        """Take an order, or bring a read to its end."""
        world = self.core.world
        if self.reading and (not self.orders or world.happens(0.5)):
            self._finish(world.chance.choice(self.reading))
            return
        if not self.orders:
            return
        order = self.orders.popleft()
        match order:
            case Drop(leg=leg):
                self.refused[leg] = None
                self.prefixes.pop(leg, None)
                self.waiting.pop(leg, None)
                if not self.reads(leg):
                    self.words.append(Dropped(leg))
            case Gone():
                pass
            case More(leg=leg, whole=True) if leg not in self.refused:
                self._prefix(order)
            case More(leg=leg) if leg not in self.refused:
                self._more(order)

    def _finish(self, read: Read) -> None:
        """The last byte was read: it counts only where the source still holds it."""
        self.reading.remove(read)
        world = self.core.world
        source = world.cores.get(read.source)
        alive = source is not None and not source.dead
        if alive and source is not None:
            self._check(read, source)
        read.good = alive and not world.happens(0.05)
        if read.good and read.note and source is not None:
            source.held.pop(read.note, None)  # the reader's own word to the source
        if read.whole:
            return
        if read.note:
            self.tails[read.leg] = read.good
        if read.prefix and read.good:
            self.fetched[read.leg] = len(read.blocks)
        if read.good:
            last = bool(read.note) or read.prefix
            self.words.append(Copied(read.leg, len(read.blocks), last, 0, 0.0, 1.0, 1.0))
        else:
            self.words.append(Failed(read.leg, "a read failed"))
            if not read.prefix:
                self.tails[read.leg] = False
        if (more := self.waiting.pop(read.leg, None)) is not None:
            self._more(more)

    def _check(self, read: Read, source: Core) -> None:
        if read.note:
            if read.note not in source.held:
                self.core.world.wrong.append(f"{read.leg} read {read.note}, which {read.source} had let go")
        elif not set(read.blocks) <= source.pins.get(read.leg, set()):
            self.core.world.wrong.append(
                f"{read.leg} read blocks of {read.source} that were not pinned for it"
            )
