"""Many instances: who of them can win a decision, so that a prediction is made for these only.

With up to `FEW` instances everybody is asked. With more, a copy of their numbers is kept in columns
(latency/columns.py); whatever the books touched since is read again before they are used. What is left out
cannot be chosen: the choice is that of asking everybody, and tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taichi_serve.instance import Instance
from taichi_serve.latency.columns import Columns, Floats, Mask, Wide, row
from taichi_serve.latency.predict import Predictor
from taichi_serve.latency.wide import wide
from taichi_serve.request import Request
from taichi_serve.scheduling.decode import choose_target
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.lending import lender
from taichi_serve.scheduling.matched import Matched, lengths
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import NOTHING, Prefixes
from taichi_serve.scheduling.standing import Standing

FEW = 32  # instances: asking all of them takes less time than looking who can win
Status = tuple[object, ...]

# Where a decode can begin, what these instances have of it, and who of them is near (Links.nearer).
Starts = tuple[list[Instance], Prefixes, Sequence[Instance]]


class Fleet:
    """The instances of a ledger, for decisions among many of them. It changes nothing in the books."""

    def __init__(self, ledger: Ledger, predictor: Predictor) -> None:
        self.ledger = ledger
        self.asked: Wide | None = wide(predictor)
        self.least = FEW  # instances of which all are asked
        self.columns = Columns(0)
        self.instances: list[Instance] = []  # of each row
        self.rows: dict[str, int] = {}
        self._bits: npt.NDArray[np.intp] = np.zeros(0, np.intp)  # of each row, in masks of the residency
        self._changes = -1  # of the ledger, when the columns were made
        self._statuses: list[Status] = []
        self._standing: Standing | None = None
        self._masks: dict[int, Mask] = {}  # of each list of the standing

    @property
    def many(self) -> bool:
        """Whether there are so many that not everybody is asked."""
        return self.asked is not None and len(self.ledger.instances) > self.least

    def too_many(self, instances: Sequence[Instance]) -> bool:
        """Whether not all of these are asked."""
        return self.many and len(instances) > self.least

    def standing(self) -> Standing:
        """Who may be sent work. The lists stay the same objects for as long as what is in them does."""
        self.fresh()
        if self._standing is None:
            self._standing = Standing.of(self.instances)
            self._masks = {id(one): self._mask(one) for one in self._standing.lists()}
        return self._standing

    def fresh(self) -> Columns:
        """The columns, as the books are now."""
        ledger, asked = self.ledger, self.asked
        assert asked is not None
        if self._changes != ledger.changes:
            self._rebuild()
        if ledger.touched:
            changed = list(ledger.touched)
            ledger.touched.clear()
            rows = [self.rows[one.name] for one in changed]
            latest = [ledger.queues[one.name].latest() for one in changed]
            self.columns.put(rows, [*map(row, changed, latest)], [asked.look(one) for one in changed])
            for number, one in zip(rows, changed, strict=True):
                status = one.kind, one.alive, one.silent, one.draining, one.closing, one.chunk
                if status != self._statuses[number]:
                    self._statuses[number], self._standing = status, None
        return self.columns

    def _rebuild(self) -> None:
        self.instances = list(self.ledger.instances.values())
        self.rows = {one.name: number for number, one in enumerate(self.instances)}
        self.columns = Columns(len(self.instances))
        self._bits = np.array([self.ledger.residency.bit[one.name] for one in self.instances], np.intp)
        self._changes = self.ledger.changes
        self._statuses, self._standing = [()] * len(self.instances), None
        self.ledger.touched = set(self.instances)

    def mask(self, instances: Sequence[Instance]) -> Mask:
        """Which rows these instances are."""
        known = self._masks.get(id(instances)) if self._standing is not None else None
        return self._mask(instances) if known is None else known

    def _mask(self, instances: Sequence[Instance]) -> Mask:
        mask = np.zeros(len(self.instances), np.bool_)
        mask[[self.rows[one.name] for one in instances]] = True
        return mask

    def at(self, rows: Sequence[int]) -> list[Instance]:
        """The instances of these rows, in order."""
        return [self.instances[number] for number in sorted(set(rows))]

    def prefixes(self, request: Request) -> Prefixes:
        """What the instances have of a request, as Ledger.prefixes says."""
        if not self.many:
            return self.ledger.prefixes(request)
        residency = self.ledger.residency
        held, claimed = residency.runs(request.blocks, request.prompt_tokens + (request.first_at is not None))
        if not (held or claimed):
            return NOTHING
        self.fresh()
        caches, here = lengths(held, residency.bits + residency.hosts) * residency.block_size, self._bits
        claims = lengths(claimed, residency.bits)[here] * residency.piece
        return Matched(self.rows, caches[here], caches[here + residency.hosts], claims)

    def column(self, prefixes: Prefixes, of: str) -> Floats | int:
        """How many tokens of a prompt each row has, `of` one sort (a field of Prefix); 0 where none has."""
        if not prefixes:
            return 0
        if isinstance(prefixes, Matched):
            known: Floats = getattr(prefixes, of)
            return known
        tokens: Floats = np.zeros(len(self.instances))
        tokens[[self.rows[name] for name in prefixes]] = [getattr(one, of) for one in prefixes.values()]
        return tokens

    def lender(self, prefixes: Prefixes) -> tuple[Instance | None, int]:
        """Who may lend a prefix, and how many tokens of it (lending.lender)."""
        if not (self.many and prefixes):
            return lender(prefixes, self.ledger.instances)
        here = self.fresh()
        held = np.where(here.answers > 0.0, self.column(prefixes, "held"), 0)
        most = int(held.max())
        if most < 1:
            return None, 0
        rows = np.flatnonzero(held == most)
        return self.instances[int(rows[here.lends_until[rows].argmin()])], most

    # ------------------------------------------------------------------------------------------- decodes

    def targets(
        self,
        instances: Sequence[Instance],
        kv_tokens: int,
        marks: Sequence[float],
        policy: Policy,
        prefixes: Prefixes,
    ) -> list[Instance]:
        """Who of these `choose_target` can take, for any of these marks, and the least loaded of all. Loads
        are quotients of whole numbers, so they are those of `load_after` to the last bit."""
        here, mask = self.fresh(), self.mask(instances)
        load: Floats = (here.used + kv_tokens + policy.growth * (here.decodes + 1)) / here.capacity
        rows = [int(np.where(mask, load, np.inf).argmin())]
        less = load
        if prefixes:
            claimed, device = self.column(prefixes, "claimed"), self.column(prefixes, "device")
            new = kv_tokens - claimed
            load = (here.used + new + policy.growth * (here.decodes + 1)) / here.capacity
            less = load - np.maximum(0, device - claimed) / here.capacity
        open_ = mask & (here.open > 0.0)
        for mark in marks:
            fits = open_ & (load <= mark)
            if fits.any():
                rows.append(int(np.where(fits, less, np.inf).argmin()))
        return self.at(rows)

    def find(
        self,
        instances: Sequence[Instance],
        kv_tokens: int,
        mark: float,
        policy: Policy,
        prefixes: Prefixes,
    ) -> Instance | None:
        """What `choose_target` chooses."""
        if self.too_many(instances):
            instances = self.targets(instances, kv_tokens, [mark], policy, prefixes)
        return choose_target(instances, kv_tokens, mark, policy, prefixes)

    def starts(
        self,
        request: Request,
        here: Instance,
        policy: Policy,
        prefixes: Prefixes,
        near: Sequence[Instance] = (),
    ) -> list[Instance]:
        """Of those that serve, who `choose_start` can take for a request that prefilled `here`, and where its
        KV may have been copied ahead."""
        standing = self.standing()
        if len(standing.serving) <= self.least:
            return standing.serving
        marks = policy.full_mark, 1.0
        found: list[Instance] = []
        if standing.low:
            size = request.prompt_tokens + 1
            found = self.targets(standing.low, size, marks, policy, prefixes)
            if near:
                found += self.targets(near, size, marks, policy, prefixes)
        ahead = self.ledger.instances.get(request.ahead or here.name, here)
        mask = self.mask(standing.serving)
        found += [one for one in (here, ahead) if mask[self.rows[one.name]]]
        return self.at([self.rows[one.name] for one in found])
