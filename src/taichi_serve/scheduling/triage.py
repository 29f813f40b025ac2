"""Overload: which prompts are computed in time, and which can no longer be, so that the others are.

Every queue is in the order of deadlines. Where a deadline in it would be missed, the longest prompt before it
that has not begun frees the most time for the fewest requests (Moore and Hodgson): it is best effort from
then on. Best effort has a late deadline of its own, and the time that it may take up until then is limited,
so its wait is too.

Every function reads the ledger and answers; none of them writes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.request import Request
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prefill import Behind, Placement
from taichi_serve.slo import SLO

# An engine plans one step ahead: the prompts of the step that runs and of the next one cannot be taken out.
PLANNED = 2  # steps


class Triage:
    """What the queues say about deadlines, as predicted."""

    def __init__(self, ledger: Ledger, predictor: Predictor, slo_of: Callable[[Request], SLO]) -> None:
        self.ledger = ledger
        self.predictor = predictor
        self.slo_of = slo_of

    def deadline(self, request: Request, policy: Policy, best_effort: bool = False) -> float:
        """Until when its first token is to be there (s). That of best effort comes one TTFT SLO before its
        patience ends: it then goes before newcomers, and has as long to be computed as they have."""
        ttft = self.slo_of(request).ttft
        return request.arrived_at + (ttft * (policy.patience - 1.0) if best_effort else ttft)

    def overtaken(self, request: Request, instances: Iterable[Instance]) -> dict[str, Behind]:
        """What would be computed after this newcomer, by instance."""
        found: dict[str, Behind] = {}
        for instance in instances:
            queue = self.ledger.queues[instance.name]
            if queue.ends_after(request.by):
                behind = [self.ledger.requests[name] for name in queue.behind(request.by)]
                tokens = sum(other.prompt_tokens - other.cached for other in behind)
                found[instance.name] = Behind(tokens, sum(other.work for other in behind))
        return found

    def victim(self, request: Request, placed: Placement) -> Request:
        """Who is best effort, where the newcomer would be late in its place: the longest before it that has
        not begun, if it is longer and all are in time without it; else the newcomer."""
        longest = request
        for other in self._movable(placed.instance):
            if other.by <= request.by and other.work > longest.work:
                longest = other
        return longest if placed.ttft - longest.work <= self.slo_of(request).ttft else request

    def room(self, request: Request, able: Sequence[Instance], policy: Policy) -> bool:
        """Whether best effort has time for one more before its patience ends: of what the instances can
        compute until then it gets the share that is kept for it. One alone always has."""
        seconds = self.slo_of(request).ttft * (policy.patience - 1.0) * policy.leftover * len(able)
        queued = sum(self.ledger.requests[name].work for name in self.ledger.best_effort)
        return not queued or queued + request.work <= seconds

    def drained(self, able: Sequence[Instance]) -> float:
        """Seconds until the first of these instances is through with all that is queued there now."""
        return min(self.predictor.ttft(instance, 0) for instance in able)

    def hopeless(self, instance: Instance, now: float) -> list[tuple[Request, float, Request]]:
        """Who of the queue is to be best effort, each for the sake of a prompt that would be late: seconds
        until its first token, and that prompt."""
        waiting = [self.ledger.requests[name] for name in self.ledger.queues[instance.name]]
        end = now + self.predictor.ttft(instance, 0) - sum(other.work for other in waiting)
        movable = {other.id for other in self._movable(instance)}
        found: list[tuple[Request, float, Request]] = []
        longest: list[tuple[float, float, str]] = []
        for other in waiting:
            end += other.work
            if other.best_effort:
                continue
            if other.id in movable:
                heappush(longest, (-other.work, -other.by, other.id))
            while end > other.by and longest:
                least, _, name = heappop(longest)
                found.append((self.ledger.requests[name], end - now, other))
                end += least
        return found

    def _movable(self, instance: Instance) -> list[Request]:
        """Those queued on an instance that keep their deadline so far and are in no step yet, in order."""
        ahead, planned = -instance.progress_tokens, PLANNED * instance.chunk
        found = []
        for name in self.ledger.queues[instance.name]:
            other = self.ledger.requests[name]
            if ahead >= planned and not other.best_effort:
                found.append(other)
            ahead += other.prompt_tokens - other.cached
        return found
