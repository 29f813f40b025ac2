"""Overload: what becomes of a prompt that has just been placed, and of those before it.

It is served in time, is best effort, or is turned away; or others are best effort so that it is in time. What
its class says comes first: who may not be refused is never turned away, who may not be demoted is never best
effort, and who may be neither is served, late or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import REFUSE, Policy
from taichi_serve.scheduling.prefill import Placement
from taichi_serve.scheduling.triage import Lack, Triage


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a prompt, and `why`: it is turned away (`declined`), or best effort; or it is served,
    and the `victims` are best effort in its place."""

    why: str = ""
    declined: bool = False
    best_effort: bool = False
    victims: tuple[Request, ...] = ()


SERVED = Verdict()


@dataclass(slots=True)  # not frozen: one is made at each arrival
class Door:
    """Judges a prompt that has a place, of those that were `able` to take it. One that is not `new` was
    accepted before, and is not turned away any more."""

    triage: Triage
    policy: Policy
    able: Sequence[Instance]
    decoders: Sequence[Instance]
    now: float
    new: bool

    def judge(self, request: Request, placed: Placement) -> Verdict:
        """What becomes of it."""
        fixed = placed.hand_over and not self.policy.degrades
        if self.new and self.triage.pace.slow(request, placed, self.decoders, fixed=fixed):
            why = f"its TPOT, and that of others, would be above {request.slo.tpot * 1e3:g} ms"
            return self._away(request, why)
        if request.best_effort:
            return SERVED
        lack = self.triage.lacking(request, placed)
        if lack is None and self.new:
            lack = self.triage.harming(request, placed.instance, self.now)
        if lack is not None:
            return self._late(request, placed, lack)
        return self._in_time(request, placed) if self.new else SERVED

    def _in_time(self, request: Request, placed: Placement) -> Verdict:
        """Of a newcomer that would be in time but for a seat, and for those that need what is left more."""
        if placed.instance.seats_left < 1 and (wait := self._seat(request, placed.instance)):
            return self._instead(request, f"its seat would be free in {wait:.3g} s", self._refusing(request))
        above = self.triage.crowded(request, placed, self.decoders, self.now)
        if above is None:
            return SERVED
        why = f"it would leave no room for class {above.of.name}"
        if above.decoding:
            return self._away(request, why)
        return self._instead(request, why, self._refusing(request))

    def _seat(self, request: Request, here: Instance) -> float:
        """Seconds that it has to wait for a seat, where that is too long."""
        wait = self.triage.seats.wait(here)
        in_time = request.slo.ttft * (1.0 - self.triage.margin.share) - (self.now - request.arrived_at)
        return wait if wait > in_time else 0.0

    def _late(self, request: Request, placed: Placement, lack: Lack) -> Verdict:
        triage, slo = self.triage, request.slo
        late = f"TTFT {placed.ttft:.3g} s of {slo.ttft:g} s"
        if lack.of is not request:
            late = f"{lack.of.id} after it would be {lack.seconds:.3g} s late"
        refusing = self._refusing(request) and request.work <= slo.ttft  # else it is not for want of time
        victims = triage.victims(request, placed.instance, lack, lower=refusing)
        if not victims:
            own = refusing and lack.of is request
            return self._instead(request, f"it would be late: {late}" if own else late, refusing)
        if self._refusable(request) and not triage.room(victims, self.able, self.policy):
            return Verdict(f"{late}, and best effort would wait too long", declined=True)
        return Verdict(self._instead_of(request, victims, lack, late), victims=tuple(victims))

    def _instead_of(self, request: Request, victims: Sequence[Request], lack: Lack, late: str) -> str:
        place = self.triage.precedence.place
        if place(victims[0]) < place(request):
            return f"its class gives way to that of {request.id}: {late}"
        if lack.of is request:
            return f"the longest before {request.id}, which would be late: {late}"
        return f"the longest beside {request.id}: {late}"

    def _instead(self, request: Request, why: str, refusing: bool) -> Verdict:
        # It makes way itself.
        may = self.triage.precedence.rights(request)
        if refusing or (self._refusable(request) and not may.demote and request.work <= request.slo.ttft):
            return Verdict(why, declined=True)
        room = not may.demote or self.triage.room([request], self.able, self.policy)
        if self._refusable(request) and not room:
            return Verdict(f"{why}, and best effort would wait too long", declined=True)
        return self._put_off(request, why)

    def _away(self, request: Request, why: str) -> Verdict:
        # Best effort would decode like any other.
        return Verdict(why, declined=True) if self._refusable(request) else self._put_off(request, why)

    def _put_off(self, request: Request, why: str) -> Verdict:
        return Verdict(why, best_effort=True) if self.triage.precedence.rights(request).demote else SERVED

    def _refusable(self, request: Request) -> bool:
        return self.new and self.triage.precedence.rights(request).refuse

    def _refusing(self, request: Request) -> bool:
        return self._refusable(request) and self.policy.overload == REFUSE
