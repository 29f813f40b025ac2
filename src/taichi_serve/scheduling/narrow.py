"""Of many instances those that Algorithm 2 can choose for a prompt: it is asked about these only.

The keys of prefill.py are made for all instances at once (latency/columns.py). Counts in them are exact,
seconds are within a `margin`. So an instance is left out only where its key is higher than that of another by
more than the margin, and one whose key depends on which side of a limit it is, within the margin, is kept.
Whoever has the lowest key among all therefore is among those that are kept, and every other key is as it was:
`choose_prefill` among them chooses as it would among all.

A prefix that would be fetched is the one thing that depends on the order in which instances are asked: what
would be too late to win is not fetched, and what wins so far changes. The instance with the lowest key is
asked in any order, because its fetch is in time for that key, where the prediction with the prefix is no
shorter than the queue before it. Where that does not hold, all that could be the best so far are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taichi_serve.instance import Instance
from taichi_serve.latency.columns import SURE, Columns, Floats, Mask, Wide, margin
from taichi_serve.latency.predict import Predictor
from taichi_serve.request import Request
from taichi_serve.scheduling.fleet import Fleet
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prompt import Known, Prompt, hand_over_seconds, limits_of
from taichi_serve.slo import SLO

NO_ROOM, LATE, SLOW = 30.0, 20.0, 10.0  # groups of keys: above those of ranks 0 to 2, which are feasible
LEFT = 4  # so many may be left without looking whether some of them are the same to the last bit
ALIKE = 7  # columns up to `context` are what predictions depend on


class Keys(NamedTuple):
    """The keys of all rows: a group (rank and worse), tokens to compute, seconds; and which are `sure`: not
    so near to a limit that they may be in another group."""

    group: Floats
    tokens: Floats
    seconds: Floats
    sure: Mask

    def best(self, among: Mask) -> tuple[float, float, float] | None:
        """The lowest key of those among these that are sure."""
        left = among & self.sure
        if not left.any():
            return None
        group = self.group[left].min()
        left &= self.group == group
        tokens = self.tokens[left].min()
        left &= self.tokens == tokens
        return float(group), float(tokens), float(self.seconds[left].min())

    def below(self, key: tuple[float, float, float] | None, among: Mask) -> Mask:
        """Which of these may have a key as low as this one."""
        if key is None:
            return among
        group, tokens, seconds = key
        within = (self.tokens < tokens) | (
            (self.tokens == tokens) & (self.seconds <= seconds + margin(seconds))
        )
        lower = (self.group < group) | ((self.group == group) & within)
        kept: Mask = among & (lower | ~self.sure)
        return kept


@dataclass(slots=True)
class Narrowing:
    """A prompt, and the columns that it is held against."""

    prompt: Prompt
    columns: Columns
    asked: Wide
    cached: Floats | int
    claimed: Floats | int
    to_come: Floats
    tpots: Floats
    prices: Floats | float  # what copying from the lender costs, as a multiple of what it costs on the mean

    @property
    def length(self) -> int:
        """Prompt tokens."""
        return self.prompt.request.prompt_tokens

    def keys(self, seconds: Floats, cached: Floats | int, fits: Mask) -> Keys:
        """The keys of instances that have so much of the prompt and take so many seconds for it."""
        here, limits = self.columns, self.prompt.limits
        seconds = seconds + self.to_come
        feasible = fits & (seconds <= limits.ttft)
        sure = np.abs(seconds - limits.ttft) > margin(limits.ttft)
        tpots = self.tpots
        if limits.tpot < float("inf"):
            feasible &= ~here.low | (tpots <= limits.tpot)
            sure &= ~here.low | (np.abs(tpots - limits.tpot) > margin(limits.tpot))
        rank = np.where(here.low, 1.0, 2.0)
        if limits.bears > 0.0:
            rank[~here.low & (tpots <= limits.bears)] = 0.0
            sure &= here.low | (np.abs(tpots - limits.bears) > margin(limits.bears))
        if limits.quick < limits.ttft:
            rank += SLOW * (seconds > limits.quick)
            sure &= np.abs(seconds - limits.quick) > margin(limits.quick)
        group = np.where(feasible, rank, np.where(fits, LATE, NO_ROOM))
        return Keys(group, np.where(feasible, here.ahead - cached, 0.0), seconds, sure)

    def fits(self) -> Mask:
        """Which have room in their KV, exactly as `load_after` says, and a seat."""
        here, policy = self.columns, self.prompt.policy
        used = here.used + (self.length - self.claimed) + policy.growth * (here.decodes + 1)
        room: Mask = (used / here.capacity <= policy.full_mark) & (here.open > 0.0)
        return room

    def rows(self, among: Mask, known: Known, lender: int | None) -> Mask:
        """Which of these can be chosen."""
        seconds = np.maximum(0.0, self.asked.ttfts(self.columns, self.length, self.cached))
        fits = self.fits()
        keys = self.keys(seconds, self.cached, fits)
        alone = keys.best(among)
        kept = keys.below(alone, among)
        if lender is None:
            return kept
        could = among & fits & (self.cached < known.lent)
        could[lender] = False
        return kept | self._fetching(seconds, fits, could, known, alone) if could.any() else kept

    def _fetching(
        self,
        computed: Floats,
        fits: Mask,
        could: Mask,
        known: Known,
        alone: tuple[float, float, float] | None,
    ) -> Mask:
        """Which of those that `could` get the prefix may be chosen with it (Prompt.fetching)."""
        assert known.lender is not None
        within, ahead = self.prompt.policy.fetch_within, self.columns.ahead
        fetches = self.asked.fetches(self.columns, known.lender, known.lent - self.cached)
        copied = known.behind + self.prices * fetches
        queue = computed * ahead / (ahead + self.length - self.cached)
        later = np.maximum(0.0, self.asked.ttfts(self.columns, self.length, known.lent))
        seconds = np.maximum(0.0, copied - queue) + later
        longest = SURE * (1.0 + computed + copied)
        slack = np.minimum(within - np.maximum(queue, copied), computed - np.maximum(seconds, copied))
        keys = self.keys(seconds, known.lent, fits)
        sure = keys.sure & (np.abs(slack) > longest)
        keys = keys._replace(sure=sure)
        could &= (slack > 0.0) | ~sure
        better = keys.best(could)
        best = better if alone is None or (better is not None and better < alone) else alone
        kept = keys.below(best, could)
        in_order = later - queue > longest
        return kept if bool(in_order[kept].all()) else keys.below(alone, could)

    def different(self, kept: Mask) -> list[int]:
        """Of rows that are the same in all that a key depends on the first one, which would be chosen."""
        rows, found = np.flatnonzero(kept), list[int]()
        if len(rows) <= LEFT:
            return [*map(int, rows)]
        numbers = [self.columns.numbers[:ALIKE, rows], self.asked.alike(self.columns, rows)]
        numbers.append(self.fits()[None, rows].astype(np.float64))
        others_too = (self.cached, self.claimed, self.prices)
        numbers += [of[None, rows] for of in others_too if isinstance(of, np.ndarray)]
        left = np.concatenate(numbers)
        while len(rows) > LEFT and len(found) < LEFT:
            others = (left != left[:, :1]).any(axis=0)
            found.append(int(rows[0]))
            left, rows = left[:, others], rows[others]
        return [*found, *map(int, rows)]


def narrowed(
    fleet: Fleet,
    request: Request,
    now: float,
    among: tuple[Sequence[Instance], Sequence[Instance]],
    known: Known,
    predictor: Predictor,
    policy: Policy,
    beside: SLO,
) -> tuple[list[Instance], list[Instance]]:
    """Who of those `among` which a prompt is to be placed, and to which its decode may go, `choose_prefill`
    has to be asked about."""
    instances, decoders = among
    columns, asked, mask = fleet.fresh(), fleet.asked, fleet.mask(instances)
    assert asked is not None
    device = fleet.column(known.prefixes, "device")
    low: list[Instance] = []
    if decoders:
        used = np.where(fleet.mask(decoders), (columns.kv_tokens - device) / columns.capacity, np.inf)
        low = [fleet.instances[int(used.argmin())]]
    high = mask & ~columns.low
    source = [fleet.instances[int(high.argmax())]] if high.any() else []
    move = hand_over_seconds(request, source, low, predictor, known)
    waited = now - request.arrived_at
    later = waited if move is None else waited + move
    prompt = Prompt(request, waited, later, limits_of(request, beside, policy), predictor, policy)
    claimed = fleet.column(known.prefixes, "claimed")
    cached = np.maximum(claimed, fleet.column(known.prefixes, "held")) if known.prefixes else 0
    to_come = np.where(columns.low, waited, later)
    tpots = asked.tpots(columns, request.prompt_tokens)
    prices: Floats | float = 1.0
    if known.lender is not None and not known.links.even:
        prices = np.array(known.links.prices(known.lender, fleet.instances))
    narrowing = Narrowing(prompt, columns, asked, cached, claimed, to_come, tpots, prices)
    lender = None if known.lender is None else fleet.rows[known.lender.name]
    return fleet.at(narrowing.different(narrowing.rows(mask, known, lender))), low
