"""Overload: which prompts are computed in time, and which can no longer be, so that the others are.

Every queue is in the order of deadlines. Where a deadline in it would be missed, the longest prompt before it
that has not begun frees the most time for the fewest requests (Moore and Hodgson): it is best effort from
then on. Best effort has a late deadline of its own, and the time that it may take up until then is limited,
so its wait is too.

Every function reads the ledger and answers; none of them writes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from taichi_serve.classes import SLOClass
from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Average, Predictor
from taichi_serve.request import Request
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.margin import LEAST, Margin
from taichi_serve.scheduling.pace import Pace
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.precedence import Precedence
from taichi_serve.scheduling.prefill import Placement
from taichi_serve.scheduling.prompt import Behind
from taichi_serve.scheduling.seats import Seats

# Share of the TTFT SLO: who is queued keeps its place until it is predicted to be later than its deadline by
# so much.
GRACE = 0.05
LARGE = 512  # prompt tokens of a step that is long enough to ask when it began
KEEP = 0.99  # weight of the past at each prompt: about the last hundred count
# Mean length of the prompts that are in time over that of all: down to FAIR nothing is done about it, from
# UNFAIR on all that can be.
FAIR, UNFAIR = 0.95, 0.9
LONG = 1.3  # times the length of the prompt that a token belongs to on average: such prompts are protected
MOST = 0.75  # of the TTFT SLO: where a long prompt takes more, none is waited for


@dataclass(frozen=True, slots=True)
class Lack:
    """So many `seconds` the first token `of` a prompt would be too late."""

    seconds: float
    of: Request


@dataclass(frozen=True, slots=True)
class Crowd:
    """No room is left for the next prompt of a class; or none for it while it is `decoding`."""

    of: SLOClass
    decoding: bool = False


class Triage:
    """What the queues say about deadlines, as predicted."""

    def __init__(self, ledger: Ledger, predictor: Predictor, precedence: Precedence) -> None:
        self.ledger = ledger
        self.predictor = predictor
        self.precedence = precedence
        self.seats, self.margin = Seats(), Margin()
        self.arrived = Average()  # mean length of all prompts, and of those that were in time
        self.kept = Average()
        self.longer = Average()  # mean length of the prompt that a token belongs to
        self.pace = Pace(ledger, predictor, self.arrived)

    def came(self, request: Request) -> None:
        """A request is new."""
        length = float(request.prompt_tokens)
        self.arrived.add(length, 1.0, KEEP)
        self.longer.add(length * length, length, KEEP)
        self.precedence.came(request)

    def through(self, request: Request, now: float) -> None:
        """The first token of one that kept its deadline so far is out."""
        self.kept.add(float(request.prompt_tokens), 1.0, KEEP)
        if request.predicted_ttft <= request.slo.ttft:
            self.margin.through(now - request.arrived_at > request.slo.ttft)

    def unfair(self) -> float:
        """How much long prompts have to be protected, 0 to 1: those in time are shorter than all."""
        if not (self.arrived.below and self.kept.below):
            return 0.0
        share = self.kept.value(0.0) / self.arrived.value(1.0)
        return min(1.0, max(0.0, (FAIR - share) / (FAIR - UNFAIR)))

    def protected(self) -> int:
        """Tokens of a long prompt, as long ones are lately."""
        return int(LONG * self.longer.value(0.0))

    def reserve(self, request: Request, instance: Instance, unfair: float, length: int) -> float:
        """Seconds that a prompt has to leave free before its deadline, where a longer one could be in time:
        it gets in no easier than that one. `length` is of the longer one (tokens)."""
        if request.prompt_tokens >= length:
            return 0.0
        ttft = request.slo.ttft
        longer = self.predictor.work(instance, length)
        if longer > MOST * ttft:
            return 0.0
        own = longer * request.prompt_tokens / length  # nearly: attention is more than linear
        return unfair * max(0.0, min(longer, ttft / 2) - own)

    def deadline(self, request: Request, policy: Policy, best_effort: bool = False) -> float:
        """Until when its first token is to be there (s). That of best effort comes one TTFT SLO before its
        patience ends: it then goes before newcomers, and has as long to be computed as they have."""
        ttft = request.slo.ttft
        return request.arrived_at + (ttft * (policy.patience - 1.0) if best_effort else ttft)

    def overtaken(self, request: Request, now: float, instances: Iterable[Instance]) -> dict[str, Behind]:
        """What would be computed after this newcomer, by instance; only where there is something to say."""
        found: dict[str, Behind] = {}
        queues, since, by = self.ledger.queues, self.predictor.since, request.by
        unfair = 0.0 if request.best_effort else self.unfair()
        length = self.protected() if unfair else 0
        for instance in instances:
            queue, tokens, seconds = queues[instance.name], 0, 0.0
            large, overtakes = instance.running_tokens >= LARGE, queue.ends_after(by)
            if not (large or overtakes or unfair):
                continue
            if large:
                seconds -= since(instance, now - instance.stepped_at)
            if overtakes:
                behind = [self.ledger.requests[name] for name in queue.behind(by)]
                tokens = sum(other.prompt_tokens - other.cached for other in behind)
                seconds += sum(other.work for other in behind)
            reserve = self.reserve(request, instance, unfair, length) if unfair else 0.0
            found[instance.name] = Behind(tokens, seconds - reserve, reserve)
        return found

    def crowded(
        self, request: Request, placed: Placement, decoders: Sequence[Instance], now: float
    ) -> Crowd | None:
        """The class for whose next prompt no room would be left in this place, or no decode, if the newcomer
        gives way to it. All that is queued counts, whatever its deadline: it will be due, too. Not so best
        effort, unless its patience is about to end."""
        here = placed.instance
        above = self.precedence.above(request, now)
        if not (above and (here.queued_requests or here.decodes)):
            return None
        put_off = [self.ledger.requests[name] for name in self.ledger.best_effort]
        end = self.predictor.ttft(here, 0) + self.predictor.since(here, now - here.stepped_at) + request.work
        for one in above:
            slo = self.ledger.strictest.promised(one.of)
            length = int(LONG * one.longer.value(0.0))
            following = self.predictor.work(here, length) * (1.0 + self.unfair())
            after = sum(o.work for o in put_off if o.instance == here.name and o.by > now + slo.ttft)
            due = end - after + min(following, slo.ttft / 2)
            if here.queued_requests and due > slo.ttft * (1.0 - self.margin.share):
                return Crowd(one.of)
            if self.pace.slow(request, placed, decoders, slo.tpot, keep=True):
                return Crowd(one.of, decoding=True)
        return None

    def lacking(self, request: Request, placed: Placement) -> Lack | None:
        """What the newcomer lacks to be in time in its place. Where nobody else is the margin is the least:
        else those that take longer would never be accepted again, and it would never shrink."""
        here = placed.instance
        share = self.margin.share if here.queued_requests or here.decodes else LEAST
        seconds = placed.ttft - request.slo.ttft * (1.0 - share)
        return Lack(seconds, request) if seconds > 0.0 else None

    def harming(self, request: Request, here: Instance, now: float, everybody: bool = False) -> Lack | None:
        """What those lack that have later deadlines, where the newcomer is computed before them: the one that
        would be latest. Unless `everybody` counts, only where there are shares to hold, or between classes in
        different places; else the stricter one is helped first, as ever."""
        precedence, queue, found = self.precedence, self.ledger.queues[here.name], None
        if (precedence.equal and not everybody) or not queue.ends_after(request.by):
            return None
        end = now + self.predictor.ttft(here, 0) + self.predictor.since(here, now - here.stepped_at)
        for name in queue.behind(request.by):
            other = self.ledger.requests[name]
            seconds = end + request.work - other.by
            if (
                seconds > (found.seconds if found else 0.0)
                and not other.best_effort
                and (everybody or precedence.fair or precedence.place(other) != precedence.place(request))
            ):
                found = Lack(seconds, other)
            end -= other.work
        return found

    def victims(self, request: Request, here: Instance, lack: Lack, lower: bool = False) -> list[Request]:
        """Who is best effort so that nobody lacks time when the newcomer comes: of those before the one that
        would, itself among them, that have not begun those whose class gives way to the newcomer's, the last
        class first and the longest of each, as many as it takes. Failing that, unless only a `lower` one may
        be, the longest of the same place that is longer than the newcomer. Nobody where it is not enough."""
        place, mine = self.precedence.place, self.precedence.place(request)
        bound = not self.precedence.rights(request).demote  # all in the same place come after it
        equal = self.precedence.equal
        before = [other for other in self._movable(here) if other.by <= lack.of.by]
        giving: list[Request] = []
        if bound or not equal:
            giving = [other for other in before if place(other) < mine or (bound and place(other) == mine)]
        found: list[Request] = []
        freed = 0.0
        for other in sorted(giving, key=lambda one: (place(one), -one.work, one.by)):
            found.append(other)
            freed += other.work
            if freed >= lack.seconds:
                return found
        if lower or self.unfair() >= 1.0:
            return []
        longest = request
        for other in before:
            if other.work > longest.work and (equal or place(other) == mine):
                longest = other
        return [] if longest is request or longest.work < lack.seconds else [longest]

    def room(self, victims: Sequence[Request], able: Sequence[Instance], policy: Policy) -> bool:
        """Whether best effort has time for these before their patience ends: of what the instances can
        compute until then it gets the share that is kept for it, and half of all while nobody else waits.
        One alone always has."""
        others = sum(instance.queued_requests for instance in able) - len(self.ledger.best_effort)
        share = policy.leftover if others > 0 else 0.5
        ttft = min(one.slo.ttft for one in victims)
        seconds = ttft * (policy.patience - 1.0) * share * len(able)
        queued = sum((self.ledger.requests[name].work for name in self.ledger.best_effort), 0.0)
        alone = not queued and len(victims) == 1
        return alone or queued + sum((one.work for one in victims), 0.0) <= seconds

    def hopeless(self, instance: Instance, now: float) -> list[tuple[Request, float, Request]]:
        """Who of the queue is to be best effort, each for the sake of a prompt that would be late: seconds
        until its first token, and that prompt."""
        waiting = [self.ledger.requests[name] for name in self.ledger.queues[instance.name]]
        running = self.predictor.since(instance, now - instance.stepped_at)
        end = now + self.predictor.ttft(instance, 0) + running - sum([other.work for other in waiting])
        if not _late(waiting, end):
            return []
        movable = {other.id for other in self._movable(instance)}
        found: list[tuple[Request, float, Request]] = []
        first: list[tuple[float, float, float, str]] = []
        place = self.precedence.place
        for other in waiting:
            end += other.work
            if other.best_effort:
                continue
            if other.id in movable:
                heappush(first, (place(other), -other.work, -other.by, other.id))
            while end > other.by + GRACE * other.slo.ttft and first:
                _, least, _, name = heappop(first)
                found.append((self.ledger.requests[name], end - now, other))
                end += least
        return found

    def _movable(self, instance: Instance) -> list[Request]:
        """Those queued on an instance that keep their deadline so far, are in no step yet and may be demoted,
        in order."""
        waiting = (self.ledger.requests[name] for name in self.ledger.queues[instance.name].waiting())
        movable = [other for other in waiting if not other.best_effort]
        if self.precedence.demotable:
            return movable
        return [other for other in movable if self.precedence.rights(other).demote]


def _late(waiting: Iterable[Request], end: float) -> bool:
    """Whether one of these, computed from `end` on (s), keeps its deadline so far and would miss it."""
    for other in waiting:
        end += other.work
        if end > other.by + GRACE * other.slo.ttft and not other.best_effort:
            return True
    return False


def drained(instances: Iterable[Instance], predictor: Predictor) -> float:
    """Seconds until the first of these is predicted to be through with all prompts queued there now."""
    return min((predictor.ttft(instance, 0) for instance in instances), default=0.0)
