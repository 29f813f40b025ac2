"""From a choice to a command: asks the algorithms where, books it in the ledger, and words the decision.

A command and its booking are made in one place, so that none goes out that the ledger does not know of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from taichi_serve.instance import Instance
from taichi_serve.latency.links import Links
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import (
    Abort,
    Ahead,
    Command,
    Decline,
    Decode,
    Demote,
    Flow,
    Move,
    Outcome,
    Outlook,
    Prefill,
    SetChunk,
)
from taichi_serve.request import Request
from taichi_serve.scheduling.counters import Counters
from taichi_serve.scheduling.decode import Search, choose_start, outlooks
from taichi_serve.scheduling.door import Door
from taichi_serve.scheduling.fleet import Fleet, Starts
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.narrow import narrowed
from taichi_serve.scheduling.policy import SERVE, Policy
from taichi_serve.scheduling.precedence import Precedence
from taichi_serve.scheduling.prefill import Placement, choose_prefill
from taichi_serve.scheduling.prompt import UNKNOWN, Behind, Known
from taichi_serve.scheduling.residency import NONE
from taichi_serve.scheduling.room import load_after, room_for
from taichi_serve.scheduling.standing import able, able_and_low, decoders, of_kind, serving
from taichi_serve.scheduling.triage import Triage, drained
from taichi_serve.sliders import Kind, Sliders

NOBODY: Mapping[str, Behind] = {}  # comes after a prompt where all are served in order of arrival


class Dispatcher:
    """Makes commands, and books each of them as it is made."""

    def __init__(self, ledger: Ledger, predictor: Predictor, policy: Policy, counters: Counters) -> None:
        self.ledger = ledger
        self.predictor = predictor
        self.policy = policy
        self.counters = counters
        self.fleet = Fleet(ledger, predictor)
        self.links = Links()
        self.search = Search(self.fleet.prefixes, self.fleet.find, self.links)
        self.triage = Triage(ledger, predictor, Precedence(policy))

    def serving(self) -> list[Instance]:
        """Who may get new work (see standing.py)."""
        return self.fleet.standing().serving if self.fleet.many else serving(self._all)

    def able(self) -> list[Instance]:
        """Who may get a prompt."""
        return self.fleet.standing().able if self.fleet.many else able(self._all)

    def low(self) -> list[Instance]:
        """The D-heavy ones that a decode may go to."""
        return self.fleet.standing().low if self.fleet.many else decoders(self.serving())

    def of_kind(self, kind: Kind) -> list[Instance]:
        """Who may get new work and is of this kind."""
        return self.fleet.standing().kinds[kind] if self.fleet.many else of_kind(self._all, kind)

    @property
    def _all(self) -> Collection[Instance]:
        return self.ledger.instances.values()

    def place(self, request: Request, now: float, sliders: Sliders) -> list[Command]:
        """A place for a request that has none: as a prompt, or with the tokens it has, as a rescue."""
        if request.first_at is None:
            return self.prefill(request, now, sliders)
        return self.rescue(request, now)

    def prefill(self, request: Request, now: float, sliders: Sliders, new: bool = False) -> list[Command]:
        """Place a prompt by Algorithm 2. Where all who prefill are lost, one of the rest becomes P-heavy;
        with no instance left the prompt waits. One that is `new` may be turned away."""
        commands: list[Command] = []
        takers, low = (self.able(), self.low()) if self.fleet.many else able_and_low(self._all)
        if not takers:
            left = self.serving()
            if not left:
                return commands
            heir = min(left, key=lambda i: i.decodes)
            heir.kind, heir.closing = Kind.P_HEAVY, False
            heir.chunk = max(sliders.p_chunk, sliders.d_chunk)
            self.ledger.touch(heir)
            commands.append(SetChunk(heir.name, heir.kind, heir.chunk))
            takers, low = [heir], self.low()
        if self.policy.overload == SERVE:
            placed, known = self.choose(request, now, takers, low)
            commands.append(self.enqueue(request, placed, known, now))
        else:
            commands += self._triaged(request, now, takers, low, new)
        return commands

    def choose(
        self, request: Request, now: float, able: list[Instance], low: list[Instance]
    ) -> tuple[Placement, Known]:
        """The place for a prompt among these, where `low` are the D-heavy ones that its decode may go to; and
        what they have of it."""
        known = self._known(request, now, able)
        beside = self.ledger.strictest.beside(request.slo)
        if self.fleet.too_many(able) and self.policy.overload == SERVE:
            among, policy = (able, low), self.policy
            able, low = narrowed(self.fleet, request, now, among, known, self.predictor, policy, beside)
        return choose_prefill(request, now, able, low, self.predictor, self.policy, known, beside), known

    def _triaged(
        self, request: Request, now: float, able: list[Instance], low: list[Instance], new: bool
    ) -> list[Command]:
        """Place a prompt by its deadline. Where it would be missed, it or the longest before it is best
        effort, or it is turned away."""
        triage, policy = self.triage, self.policy
        if new:
            triage.came(request)
        request.by = triage.deadline(request, policy, request.best_effort)
        placed, known = self.choose(request, now, able, low)
        request.work = self.predictor.work(placed.instance, request.prompt_tokens, placed.cached)
        verdict = Door(triage, policy, able, low, now, new).judge(request, placed)
        if verdict.declined:
            return [self._decline(request, now, placed, able, verdict.why)]
        if verdict.best_effort:
            triage.precedence.lost(request, now, 0 if new else request.prompt_tokens - placed.cached)
            request.best_effort, request.by = True, triage.deadline(request, policy, best_effort=True)
            self.counters.best_effort += 1
            placed, known = self.choose(request, now, able, low)
            request.work = self.predictor.work(placed.instance, request.prompt_tokens, placed.cached)
            placed.why = f"best effort: {verdict.why}; {placed.why}"
        elif new:
            triage.precedence.taken(request, request.prompt_tokens - placed.cached)
        placed.ttft -= sum(victim.work for victim in verdict.victims if victim.by <= request.by)
        if placed.instance.seats_left < 1:
            placed.ttft = max(placed.ttft, now - request.arrived_at + triage.seats.wait(placed.instance))
        demoted = [self.demote(victim, now, verdict.why) for victim in verdict.victims]
        return [*demoted, self.enqueue(request, placed, known, now)]

    def demote(self, victim: Request, now: float, why: str) -> Demote:
        """A queued prompt is best effort from now on."""
        self.triage.precedence.lost(victim, now, victim.prompt_tokens - victim.cached)
        by = self.triage.deadline(victim, self.policy, best_effort=True)
        self.ledger.demote(victim, by)
        self.counters.best_effort += 1
        return Demote(victim.id, victim.leg, by, why)

    def _decline(
        self, request: Request, now: float, placed: Placement, able: list[Instance], why: str
    ) -> Decline:
        self.triage.precedence.lost(request, now)
        self.counters.ended(Outcome.REFUSED, 0)
        self.counters.judge(request, Outcome.REFUSED, now)
        self.ledger.forget(request)
        return Decline(request.id, drained(able, self.predictor), why, placed.forecasts)

    def enqueue(self, request: Request, placed: Placement, known: Known, now: float) -> Prefill:
        """Book it there, and say so."""
        here = placed.instance
        if not (here.decodes or here.queued_requests):  # idle: a step with it begins at once
            here.stepped_at = now
        self.ledger.enqueue(request, placed.instance, placed.cached, placed.used)
        after = known.overtaken.get(here.name)
        request.predicted_ttft = placed.ttft - (after.reserve if after else 0.0)
        request.hand_over, request.ahead = placed.hand_over, None
        lender = placed.lender
        if lender is not None:
            missing = placed.cached - known.prefixes.get(placed.instance.name, NONE).cached
            seconds = self.predictor.fetch(lender, placed.instance, missing)
            self.ledger.lend(lender, now, seconds * self.links.dearer(lender, placed.instance))
        there = here.name, placed.hand_over, placed.forecasts, placed.why
        lent: tuple[str | None, int] = (None, 0) if lender is None else (lender.name, placed.cached)
        return Prefill(request.id, request.leg, *there, *lent, request.by, request.best_effort)

    def _known(self, request: Request, now: float, able: list[Instance]) -> Known:
        """What the instances have of a prompt, and what comes after it on those that are `able` to take it.
        Of those that answer the one with most of it may lend, and of equals the one that has lent least."""
        serve = self.policy.overload == SERVE
        overtaken = NOBODY if serve else self.triage.overtaken(request, now, able)
        # Everybody is asked for their own where deadlines count: then not as arrays.
        prefixes = self.fleet.prefixes(request) if serve else self.ledger.prefixes(request)
        if not prefixes:
            return Known(prefixes, overtaken=overtaken) if overtaken else UNKNOWN
        if not self.policy.fetch:
            return Known(prefixes, overtaken=overtaken)
        lender, lent = self.fleet.lender(prefixes)
        behind = max(0.0, lender.lends_until - now) if lender else 0.0
        return Known(prefixes, lender, lent, behind, overtaken, self.links)

    def hand_over(self, request: Request, here: Instance, now: float) -> Decode:
        """Start the decode of a request whose prefill on `here` is over (Alg. 1, low-interference start)."""
        among, prefixes, near = self._starts(request, here)
        target, why = choose_start(request, here, among, self.policy, prefixes, near)
        seated = target is not here and target.seats_left > 0
        for known in decoders(among):
            # What it takes there is in that instance's own figures already. Where it has to wait for a seat
            # anyhow it waits there.
            room = load_after(known, 0, self.policy) <= self.policy.full_mark
            if known.name == request.ahead and room and (known.seats_left > 0 or not seated):
                target, why = known, "a D-heavy instance with room, and most of its KV is there"
        return self._decode(request, target, Move.HAND_OVER, now, why, among)

    def _starts(self, request: Request, here: Instance) -> Starts:
        """Where the decode of a request that prefilled `here` can begin."""
        prefixes, near = self.fleet.prefixes(request), self.links.nearer(here, self.low())
        if not self.fleet.many:
            return self.serving(), prefixes, near
        among = self.fleet.starts(request, here, self.policy, prefixes, near)
        return among, prefixes, [one for one in among if one in near]

    def copy_ahead(self, here: Instance) -> list[Command]:
        """Where the prompt that is being computed on `here` will decode, if more chunks of it are to come."""
        request = self.ledger.first(here)
        if request is None or not request.hand_over or request.ahead:
            return []
        if not 0 < here.progress_tokens < request.prompt_tokens - request.cached:
            return []
        among, prefixes, near = self._starts(request, here)
        target, why = choose_start(request, here, among, self.policy, prefixes, near)
        if target is here:
            return []
        request.ahead = target.name
        return [Ahead(request.id, request.leg + 1, target.name, why)]

    def rescue(self, request: Request, now: float) -> list[Command]:
        """Compute the tokens so far again: where a prompt may be computed, D-heavy ones first. With no
        instance left the request waits."""
        if not request.movable:
            return [self.fail(request, now, "its instance was lost, and no other can go on exactly")]
        alive = self.serving()
        takers = [i for i in alive if i.prefills] or alive
        if not takers:
            self.ledger.wait(request)
            return []
        kv_tokens = request.prompt_tokens + request.base
        low = decoders(takers)
        prefixes = self.fleet.prefixes(request)
        target = (
            self.fleet.find(low, kv_tokens, self.policy.full_mark, self.policy, prefixes)
            or self.fleet.find(takers, kv_tokens, 1.0, self.policy, prefixes)
            or min(takers, key=lambda i: i.kv_usage)
        )
        return [self._decode(request, target, Move.RESCUE, now, "its instance was lost", takers)]

    def flow(
        self, request: Request, target: Instance, move: Move, now: float, why: str, among: list[Instance]
    ) -> Flow:
        """Move a running request to `target`, which was chosen `among` these instances."""
        looks = self._depart(request, target, move, now, among)
        request.degraded = move is Move.DEGRADE
        return Flow(request.id, request.leg, target.name, move, why, looks)

    def _decode(
        self, request: Request, target: Instance, move: Move, now: float, why: str, among: list[Instance]
    ) -> Decode:
        looks = self._depart(request, target, move, now, among)
        request.degraded = target.kind is Kind.P_HEAVY
        return Decode(request.id, request.leg, target.name, move, why, looks)

    def _depart(
        self, request: Request, target: Instance, move: Move, now: float, among: list[Instance]
    ) -> tuple[Outlook, ...]:
        """Book the move; what the request has in blocks that are in use there needs no room."""
        room, prefixes = self._room(request), self.fleet.prefixes(request)
        if self.fleet.too_many(among):
            among = [target]  # of many the others are not named
        looks = outlooks(among, room, self._mark(move), self.predictor, self.policy, prefixes)
        self.ledger.depart(request, target, move, now, room - prefixes.get(target.name, NONE).claimed)
        return looks

    def fail(self, request: Request, now: float, why: str) -> Abort:
        """Nothing can be done for the request any more."""
        self.counters.ended(Outcome.FAILED, 0)
        self.counters.judge(request, Outcome.FAILED, now)
        self.ledger.forget(request)
        return Abort(request.id, Outcome.FAILED, why)

    def _room(self, request: Request) -> int:
        """KV tokens to promise to a request that is about to move."""
        here = self.ledger.source(request)
        output = request.output_tokens(here.ticks) if here else request.base
        return room_for(request.prompt_tokens + output, self.policy)

    def _mark(self, move: Move) -> float:
        """The share of KV that a target was asked to stay within."""
        if move is Move.BACKFLOW:
            return self.policy.return_mark
        return 1.0 if move in (Move.OPERATOR, Move.DRAIN) else self.policy.full_mark
