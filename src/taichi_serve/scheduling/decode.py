"""Algorithm 1: flowing decode scheduling. Where a decode starts, who is degraded, who flows back, where to.

Every function reads the ledger and answers; none of them writes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.latency.links import EVEN, Links
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Outlook
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import NONE, NOTHING, Prefixes
from taichi_serve.scheduling.residents import Residents
from taichi_serve.scheduling.room import load_after
from taichi_serve.sliders import Kind

Flowing = tuple[Request, Instance]
Match = Callable[[Request], Prefixes]
Find = Callable[[Sequence[Instance], int, float, Policy, Prefixes], Instance | None]


def choose_target(
    instances: Iterable[Instance],
    kv_tokens: int,
    mark: float,
    policy: Policy,
    prefixes: Prefixes = NOTHING,
) -> Instance | None:
    """The least loaded instance within `mark` (share of KV) with the newcomer; the first of equals.

    What an instance has of the newcomer is not new KV: it is not copied there, and is taken off its load when
    instances are compared. What is on its host alone does not count: a move copies it all the same. Room it
    saves only where others use it already.
    """
    best, best_load = None, mark
    for instance in instances:
        if instance.seats_left < 1:
            continue
        here = prefixes.get(instance.name)
        load = load_after(instance, kv_tokens - (here.claimed if here else 0), policy)
        if load > mark:
            continue
        if here:
            load -= max(0, here.device - here.claimed) / instance.kv_capacity
        if best is None or load < best_load:
            best, best_load = instance, load
    return best


@dataclass(frozen=True, slots=True)
class Search:
    """How a target for a request is found: what the instances have of it, and which of them
    `choose_target` takes."""

    match: Match = lambda _: NOTHING
    find: Find = choose_target
    links: Links = EVEN

    def target(
        self,
        source: Instance,
        among: Sequence[Instance],
        kv_tokens: int,
        mark: float,
        policy: Policy,
        prefixes: Prefixes,
    ) -> Instance | None:
        """Of those that are near `source` by price, whom `choose_target` takes; else of all of them."""
        near = self.links.near(source, among)
        found = self.find(near, kv_tokens, mark, policy, prefixes)
        return found if found or near is among else self.find(among, kv_tokens, mark, policy, prefixes)


ONE_BY_ONE = Search()


def outlooks(
    instances: Iterable[Instance],
    room: int,
    mark: float,
    predictor: Predictor,
    policy: Policy,
    prefixes: Prefixes = NOTHING,
) -> tuple[Outlook, ...]:
    """What a decode that needs `room` KV tokens would meet on each of these instances: the explanation."""
    looks = []
    for instance in instances:
        new = room - policy.growth - prefixes.get(instance.name, NONE).claimed
        load = load_after(instance, new, policy)
        looks.append(Outlook(instance.name, predictor.tpot(instance, room), load, load <= mark))
    return tuple(looks)


def choose_start(
    request: Request,
    here: Instance,
    instances: Sequence[Instance],
    policy: Policy,
    prefixes: Prefixes = NOTHING,
    near: Sequence[Instance] = (),
) -> tuple[Instance, str]:
    """Low-interference start: the D-heavy instance where the decode of a prefilled request begins, and why.

    One that stays below the watermark comes first; past it, any that has room at all (its longest output is
    then degraded to make way: a young request has no TPOT slack to live on a P-heavy one). Where there is
    room but no seat it waits for one: somebody ends in each few steps. With no room anywhere the request
    stays where it prefilled, unless nobody may decode on P-heavy instances: then it waits for the emptiest
    D-heavy one. Of those below the watermark the D-heavy ones that are `near` go first; there are none where
    it costs the same to reach them all.
    """
    decoders = [i for i in instances if i.kind is Kind.D_HEAVY]
    if here.kind is Kind.D_HEAVY and here in decoders and load_after(here, 0, policy) <= policy.full_mark:
        return here, "it prefilled on a D-heavy instance with room"
    kv_tokens = request.prompt_tokens + 1
    if target := choose_target(near, kv_tokens, policy.full_mark, policy, prefixes):
        return target, "of the D-heavy instances that are near the one with most room"
    if target := choose_target(decoders, kv_tokens, policy.full_mark, policy, prefixes):
        return target, "the D-heavy instance with most room"
    if target := choose_target(decoders, kv_tokens, 1.0, policy, prefixes):
        return target, "no D-heavy instance below the watermark; this one has room"
    if decoders:
        emptiest = min(decoders, key=lambda i: load_after(i, kv_tokens, policy))
        room = load_after(emptiest, kv_tokens, policy) <= 1.0
        if room or not policy.degrades:
            return emptiest, f"waits for {'a seat: none with room' if room else 'room: none'} has any"
    return here, "no D-heavy instance has room"


def choose_degrade(
    source: Instance,
    residents: Residents,
    requests: Mapping[str, Request],
    helpers: Sequence[Instance],
    now: float,
    predictor: Predictor,
    policy: Policy,
    by: Search = ONE_BY_ONE,
) -> Flowing | None:
    """Longest-first degrading: whom a D-heavy instance past the watermark sends to a P-heavy one, and where.

    The longest output has banked the most TPOT slack. It is passed over when it moved a moment ago, is about
    to end, or could not pay the gap of the move out of its slack. Those who missed the last step were
    preempted: they hold no KV that the instance would be relieved of.
    """
    if not helpers or source.kv_tokens - source.leaving_tokens <= policy.watermark * source.kv_capacity:
        return None
    longest = (name for name in residents.longest() if name not in source.missed)
    for request in _first(longest, requests, policy.scan):
        if now - request.moved_at < policy.dwell:
            continue
        output = request.output_tokens(source.ticks)
        kv_tokens = request.prompt_tokens + output
        prefixes = by.match(request)
        target = by.target(source, helpers, kv_tokens, policy.full_mark, policy, prefixes)
        if target is None:
            continue
        gap = predictor.move(source, target, kv_tokens, prefixes.get(target.name, NONE).device)
        gap *= by.links.dearer(source, target)
        if residents.slack(request, now, source.ticks) <= gap or request.max_tokens - output <= policy.growth:
            continue
        return request, target
    return None


def choose_backflow(
    source: Instance,
    residents: Residents,
    requests: Mapping[str, Request],
    decoders: Sequence[Instance],
    now: float,
    predictor: Predictor,
    policy: Policy,
    by: Search = ONE_BY_ONE,
) -> Flowing | None:
    """TPOT-aware backflow: whose running TPOT on a P-heavy instance reached alpha x SLO, and where it goes.

    It goes only if that pays: what the D-heavy instance saves over the tokens it may still produce is more
    than the gap of the move.
    """
    if not decoders:
        return None
    for request in _first(residents.crossing(now, source.ticks), requests, policy.scan):
        if now - request.moved_at < policy.dwell:
            continue
        output = request.output_tokens(source.ticks)
        kv_tokens = request.prompt_tokens + output
        prefixes = by.match(request)
        target = by.target(source, decoders, kv_tokens, policy.return_mark, policy, prefixes)
        if target is None:
            continue
        saved = predictor.tpot(source, 0) - predictor.tpot(target, kv_tokens)
        gap = predictor.move(source, target, kv_tokens, prefixes.get(target.name, NONE).device)
        gap *= by.links.dearer(source, target)
        if saved * (request.max_tokens - output) > gap:
            return request, target
    return None


def _first(names: Iterable[str], requests: Mapping[str, Request], count: int) -> list[Request]:
    return [requests[name] for _, name in zip(range(count), names, strict=False)]
