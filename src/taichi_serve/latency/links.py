"""What a move costs between two hosts, beside what moves cost elsewhere: learned from moves.

Between instances of one host KV goes through memory, between hosts over a network, and any of these may be
slow for a while or lost. Nobody says which is which: a link is known by what its moves took. Where hosts are
not told apart there is none, and nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

from taichi_serve.instance import Instance
from taichi_serve.messages import Flowed

Pair: TypeAlias = tuple[str, str]  # two hosts: from, to

KEEP = 0.8  # the weight that the past of a link retains at each move
KEEP_ALL = 0.98  # and that of all links together
ALIKE = 2.0  # links up to so many times as dear as the cheapest are alike
REST = 30.0  # seconds for which a link without moves is taken to be as it was
HALF = 30.0  # seconds after those in which half of what it was dearer is forgotten
# A move costs a step and words even where it has no KV to copy: as much as that of so many tokens.
FIXED = 512
# A move that is given up has cost seconds: no sample counts for more than so many times the mean, or a link
# that is whole again would be avoided for ever.
MOST = 50.0
LEAST = 1e-4  # seconds: clocks of two hosts are not known better
FORGOTTEN = REST + 10 * HALF  # seconds without moves after which nothing is known of a link any more
LOOK = 1.0  # seconds between two looks at all links, as long as some are dearer than others


@dataclass(slots=True)
class Link:
    """From one host to another, or to itself: seconds a token, and when its last move was over."""

    price: float
    at: float


@dataclass(slots=True)
class Counted:
    """What went over a link since the server began, for whoever watches it."""

    moves: int = 0
    kv_tokens: int = 0
    gaps: float = 0.0  # their sum (seconds)
    refused: int = 0


@dataclass(slots=True, eq=False)
class Links:
    """All links that moves were seen on. Times are those of the facts (seconds)."""

    seen: dict[Pair, Link] = field(default_factory=dict)
    counted: dict[Pair, Counted] = field(default_factory=dict)
    mean: float = 0.0  # seconds a token of all moves
    now: float = 0.0
    even: bool = True  # none is dearer than another: nobody need ask
    _least: float = inf  # of the prices since the last look at all of them
    _most: float = 0.0
    _looked: float = -inf

    def flowed(self, source: Instance, target: Instance, move: Flowed) -> None:
        """Learn from a move that is over."""
        if not source.host or not target.host:
            return
        self.now = max(self.now, move.at)
        counted = self.counted.setdefault((source.host, target.host), Counted())
        counted.moves += 1
        counted.kv_tokens += move.kv_tokens
        counted.gaps += move.gap
        sample = self._bounded(_on_the_way(move) / (move.kv_tokens + FIXED))
        self.mean = KEEP_ALL * self.mean + (1.0 - KEEP_ALL) * sample if self.mean else sample
        self._learn((source.host, target.host), sample)

    def gave_up(self, source: Instance | None, target: Instance | None, seconds: float, now: float) -> None:
        """A move did not come about after so many seconds. Short ones say nothing of the link: there was no
        room, or it was not asked for any more."""
        if source is None or target is None or not source.host or not target.host:
            return
        self.now = max(self.now, now)
        self.counted.setdefault((source.host, target.host), Counted()).refused += 1
        sample = self._bounded(seconds / FIXED)
        if 0.0 < ALIKE * self.mean < sample:
            self._learn((source.host, target.host), sample)

    def _bounded(self, sample: float) -> float:
        return min(sample, MOST * self.mean) if self.mean else sample

    def _learn(self, pair: Pair, sample: float) -> None:
        known = self.seen.get(pair)
        price = sample if known is None else KEEP * self._faded(known) + (1.0 - KEEP) * sample
        self.seen[pair] = Link(price, self.now)
        self._least, self._most = min(self._least, price), max(self._most, price)
        may_be_even = self._most <= ALIKE * self._least
        if not may_be_even and (self.even or self.now >= self._looked + LOOK):
            self._look()

    def _look(self) -> None:
        """See whether all are alike: there may be thousands, so not at every move."""
        self._looked = self.now
        self.seen = {pair: link for pair, link in self.seen.items() if self.now - link.at < FORGOTTEN}
        prices = [self._faded(link) for link in self.seen.values()]
        self._least, self._most = min(prices), max(prices)
        self.even = self._most <= ALIKE * self._least

    def near(self, source: Instance, targets: Sequence[Instance]) -> Sequence[Instance]:
        """Those of these that are not much dearer to reach than the cheapest of them, in their order.

        A link that nobody used yet counts as cheap: somebody has to go there to see. What was dear is
        forgotten, slowly, for the same reason.
        """
        if self.even or len(targets) < 2:
            return targets
        prices = [self._price(source, target) for target in targets]
        known = [price for price in prices if price is not None]
        if not known:
            return targets
        most = ALIKE * min(known)
        near = [t for t, price in zip(targets, prices, strict=True) if price is None or price <= most]
        return near if len(near) < len(targets) else targets

    def nearer(self, source: Instance, targets: Sequence[Instance]) -> Sequence[Instance]:
        """The same, but nobody where all are alike."""
        return () if (near := self.near(source, targets)) is targets else near

    def dearer(self, source: Instance, target: Instance) -> float:
        """How many times what moves take on the mean one between these takes; 1.0 where nothing is known."""
        return 1.0 if self.even else self.ratio((source.host, target.host))

    def prices(self, source: Instance, targets: Sequence[Instance]) -> list[float]:
        """The same for each of these."""
        to = {host: self.ratio((source.host, host)) for host in {target.host for target in targets}}
        return [to[target.host] for target in targets]

    def ratio(self, pair: Pair) -> float:
        """The price of a link as a multiple of the mean; 1.0 where nothing is known."""
        known = self.seen.get(pair)
        return 1.0 if known is None or not self.mean else self._faded(known) / self.mean

    def _price(self, source: Instance, target: Instance) -> float | None:
        known = self.seen.get((source.host, target.host))
        return None if known is None else self._faded(known)

    def _faded(self, link: Link) -> float:
        idle = self.now - link.at - REST
        if link.price <= self.mean or idle <= 0.0:
            return link.price
        return self.mean + (link.price - self.mean) * float(0.5 ** (idle / HALF))


EVEN = Links()  # of whoever knows of none; nobody writes into it


def _on_the_way(move: Flowed) -> float:
    """What the link had of a gap: from the last token at the source until the KV is there. That there was no
    seat for it yet, or a step to wait for, says nothing of the link."""
    line = move.timeline
    if line is None or not (line.left and line.landed):
        return move.gap
    waited = line.began - line.arrived if line.arrived and not line.ahead else 0.0
    return max(LEAST, line.landed - line.left - max(0.0, waited))
