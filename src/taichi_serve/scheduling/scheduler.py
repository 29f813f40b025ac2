"""GlobalScheduler: one fact in, the decisions that follow from it out. It owns all mutable state.

What is decided is in prefill.py and decode.py; what is booked is in ledger.py. Here the two are put together,
one method for each kind of fact. Facts that come too late (their leg is over, their request gone, their
instance lost) are dropped in `_current`, and by the table of transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import (
    Abort,
    Arrived,
    Asked,
    Cancelled,
    Command,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Slid,
    Stepped,
)
from taichi_serve.request import Request, State
from taichi_serve.scheduling.decode import (
    choose_backflow,
    choose_degrade,
    choose_start,
    choose_target,
    room_for,
)
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.prefill import choose_prefill
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO


class GlobalScheduler:
    """Both algorithms over a ledger: `on(event)` gives the commands to carry out, in order."""

    def __init__(
        self,
        sliders: Sliders,
        slo: SLO,
        predictor: Predictor,
        policy: Policy,
        capacities: Mapping[str, int],
    ) -> None:
        """`capacities` is the KV room of every instance in tokens; they are i0, i1, ..., P-heavy first."""
        self.sliders = sliders
        self.slo = slo
        self.predictor = predictor
        self.policy = policy
        self.ledger = Ledger(sliders, capacities, policy.alpha * slo.tpot, policy.max_degrades)
        self.requests = self.ledger.requests
        self.instances = self.ledger.instances
        self._deciders: dict[type[Event], Callable[..., list[Command]]] = {
            Arrived: self._arrived,
            Prefilled: self._prefilled,
            Stepped: self._stepped,
            Flowed: self._flowed,
            Finished: self._finished,
            Refused: self._refused,
            Lost: self._lost,
            Cancelled: self._cancelled,
            Asked: self._asked,
            Drained: self._drained,
            Slid: self._slid,
        }

    def on(self, event: Event) -> list[Command]:
        """Book one fact and decide what follows from it."""
        return self._deciders[type(event)](event)

    # ------------------------------------------------------------------------------- the life of a request

    def _arrived(self, event: Arrived) -> list[Command]:
        if event.request in self.requests:
            return []
        request = Request(
            event.request, event.at, event.prompt_tokens, event.max_tokens, movable=event.movable
        )
        self.requests[request.id] = request
        return self._prefill(request, event.at)

    def _prefill(self, request: Request, now: float) -> list[Command]:
        able = self._able()
        if not able:
            return [self._fail(request, "no instance is left that can prefill")]
        decoders = [i for i in self._serving() if i.kind is Kind.D_HEAVY]
        placement = choose_prefill(request, now, able, decoders, self.predictor, self.slo, self.policy)
        self.ledger.enqueue(request, placement.instance)
        return [
            Prefill(
                request.id, request.leg, placement.instance.name, placement.hand_over, placement.forecasts
            )
        ]

    def _prefilled(self, event: Prefilled) -> list[Command]:
        request = self._current(event.request, event.leg, State.PREFILLING)
        if request is None or request.instance != event.instance:
            return []
        here = self.instances[event.instance]
        self.ledger.dequeue(request, event.cached)
        request.first_at = event.at
        request.base, request.joined = 1, here.ticks
        closed = self._close(here)
        if not event.held:
            self.ledger.settle(request, here, 1)
            return closed
        target, why = choose_start(request, here, self._serving(), self.policy)
        return [*closed, self._decode(request, target, Move.HAND_OVER, event.at, why)]

    def _flowed(self, event: Flowed) -> list[Command]:
        request = self._current(event.request, event.leg, State.MOVING)
        if request is None or request.target != event.instance:
            return []
        if source := self.instances.get(request.instance):
            self.predictor.flowed(source, self.instances[request.target], event)
        self.ledger.arrive(request, event.output_tokens)
        return []

    def _refused(self, event: Refused) -> list[Command]:
        request = self._current(event.request, event.leg, State.MOVING)
        if request is None:
            return []
        if request.instance == "":
            return [self._rescue(request, event.at)]
        self.ledger.stay(request)
        return []

    def _finished(self, event: Finished) -> list[Command]:
        request = self.requests.get(event.request)
        if request is None:
            return []
        here = self.instances.get(request.instance)
        self.ledger.forget(request)
        return self._close(here) if here else []

    def _cancelled(self, event: Cancelled) -> list[Command]:
        request = self.requests.get(event.request)
        if request is None:
            return []
        here = self.instances.get(request.instance)
        self.ledger.forget(request)
        closed = self._close(here) if here else []
        return [Abort(event.request, Outcome.CANCELLED, "the client left"), *closed]

    # ---------------------------------------------------------------------------------- Algorithm 1, a step

    def _stepped(self, event: Stepped) -> list[Command]:
        instance = self.instances[event.instance]
        if not instance.alive:
            return []
        self.predictor.stepped(instance, event)
        self.ledger.step(instance, event)
        if instance.draining:
            return self._empty(instance, event.at)
        if instance.kind is Kind.D_HEAVY:
            return self._degrade(instance, event.at) if self.policy.degrades else []
        return self._backflow(instance, event.at)

    def _degrade(self, source: Instance, now: float) -> list[Command]:
        if source.kv_tokens - source.leaving_tokens <= self.policy.watermark * source.kv_capacity:
            return []
        commands: list[Command] = []
        helpers = [i for i in self.instances.values() if i.serving and i.kind is Kind.P_HEAVY]
        residents = self.ledger.residents[source.name]
        while choice := choose_degrade(
            source, residents, self.requests, helpers, now, self.predictor, self.policy
        ):
            request, target = choice
            why = f"KV of {source.name} at {source.kv_usage:.3f}, watermark {self.policy.watermark:g}"
            request.degraded = True
            commands.append(self._flow(request, target, Move.DEGRADE, now, why))
        return commands

    def _backflow(self, source: Instance, now: float) -> list[Command]:
        commands: list[Command] = []
        residents = self.ledger.residents[source.name]
        if not any(True for _ in residents.crossing(now, source.ticks)):
            return []
        decoders = [i for i in self.instances.values() if i.serving and i.kind is Kind.D_HEAVY]
        while choice := choose_backflow(
            source, residents, self.requests, decoders, now, self.predictor, self.policy
        ):
            request, target = choice
            why = f"running TPOT reached {self.policy.alpha:g} of {self.slo.tpot:g} s"
            commands.append(self._flow(request, target, Move.BACKFLOW, now, why))
        return commands

    # ----------------------------------------------------------------------------------- the operator's hand

    def _asked(self, event: Asked) -> list[Command]:
        request, target = self.requests.get(event.request), self.instances.get(event.to)
        if request is None or target is None or request.state is not State.DECODING:
            return []
        if not (request.movable and target.alive) or request.instance == target.name:
            return []
        return [self._flow(request, target, Move.OPERATOR, event.at, "an operator asked")]

    def _drained(self, event: Drained) -> list[Command]:
        instance = self.instances.get(event.instance)
        if instance is None:
            return []
        instance.draining = event.on
        return self._empty(instance, event.at) if event.on and instance.alive else []

    def _empty(self, source: Instance, now: float) -> list[Command]:
        """Send away whoever can move and finds room, like to like first; the others try again later."""
        elsewhere = [i for i in self.instances.values() if i.serving]
        alike = [i for i in elsewhere if i.kind is source.kind]
        commands: list[Command] = []
        if not elsewhere:
            return commands
        for name in self.ledger.residents[source.name].everyone():
            request = self.requests[name]
            kv_tokens = request.prompt_tokens + request.output_tokens(source.ticks)
            target = choose_target(alike, kv_tokens, 1.0, self.policy) or choose_target(
                elsewhere, kv_tokens, 1.0, self.policy
            )
            if target is None:
                break
            commands.append(self._flow(request, target, Move.DRAIN, now, f"{source.name} is draining"))
        return commands

    def _slid(self, event: Slid) -> list[Command]:
        if event.sliders.instances != len(self.instances):
            return []
        self.sliders = event.sliders
        commands: list[Command] = []
        for instance, kind in zip(self.instances.values(), event.sliders.kinds(), strict=True):
            chunk = event.sliders.chunk(kind)
            # Chunk 0 would starve the prompts that are queued here: it waits until they are through.
            instance.closing = chunk == 0 and instance.queued_requests > 0
            chunk = instance.chunk if instance.closing else chunk
            if instance.alive and (instance.kind, instance.chunk) != (kind, chunk):
                commands.append(SetChunk(instance.name, kind, chunk))
            instance.kind, instance.chunk = kind, chunk
        return commands

    def _close(self, instance: Instance) -> list[Command]:
        """Set the chunk that a slider asked for to 0 once the last queued prompt is through."""
        if not instance.closing or instance.queued_requests:
            return []
        instance.closing, instance.chunk = False, 0
        return [SetChunk(instance.name, instance.kind, 0)] if instance.alive else []

    # -------------------------------------------------------------------------------------------- bad days

    def _lost(self, event: Lost) -> list[Command]:
        instance = self.instances.get(event.instance)
        if instance is None or not instance.alive:
            return []
        instance.alive = False
        commands: list[Command] = []
        for request in list(self.requests.values()):
            if request.instance == instance.name:
                prefilling = request.state is State.PREFILLING
                on_its_way = request.state is State.MOVING and request.target != instance.name
                self.ledger.strand(request)
                if prefilling:
                    request.leg += 1
                    commands += self._prefill(request, event.at)
                elif not on_its_way:  # else the cluster goes on with the tokens so far, at the target
                    commands.append(self._rescue(request, event.at))
            elif request.target == instance.name:
                commands.append(self._rescue(request, event.at))
        instance.kv_tokens = 0
        return commands

    def _rescue(self, request: Request, now: float) -> Command:
        """Compute the tokens so far again elsewhere: where a prompt may be computed, D-heavy ones first."""
        alive = [i for i in self._serving() if i.alive]
        able = [i for i in alive if i.prefills] or alive
        if not able:
            return self._fail(request, "no instance is left")
        kv_tokens = request.prompt_tokens + request.base
        low = [i for i in able if i.kind is Kind.D_HEAVY]
        target = (
            choose_target(low, kv_tokens, self.policy.full_mark, self.policy)
            or choose_target(able, kv_tokens, 1.0, self.policy)
            or min(able, key=lambda i: i.kv_usage)
        )
        return self._decode(request, target, Move.RESCUE, now, "its instance was lost")

    def _fail(self, request: Request, why: str) -> Abort:
        self.ledger.forget(request)
        return Abort(request.id, Outcome.FAILED, why)

    # ------------------------------------------------------------------------------------------- small hands

    def _current(self, name: str, leg: int, state: State) -> Request | None:
        """The request a fact is about, or None where the fact came too late. The one place for that."""
        request = self.requests.get(name)
        return request if request and request.leg == leg and request.state is state else None

    def _serving(self) -> list[Instance]:
        """Who may get new work; when all that live are being drained, these."""
        return [i for i in self.instances.values() if i.serving] or [
            i for i in self.instances.values() if i.alive
        ]

    def _able(self) -> list[Instance]:
        """Who may get a prompt; an instance being drained only when nobody else can."""
        able = [i for i in self.instances.values() if i.prefills]
        return [i for i in able if i.serving] or able

    def _flow(self, request: Request, target: Instance, move: Move, now: float, why: str) -> Flow:
        room = self._room(request)
        self.ledger.depart(request, target, move, now, room)
        return Flow(request.id, request.leg, target.name, move, why)

    def _decode(self, request: Request, target: Instance, move: Move, now: float, why: str) -> Decode:
        self.ledger.depart(request, target, move, now, self._room(request))
        request.degraded = target.kind is Kind.P_HEAVY
        return Decode(request.id, request.leg, target.name, move, why)

    def _room(self, request: Request) -> int:
        """KV tokens to promise to a request that is about to move."""
        here = self.instances.get(request.instance)
        output = request.output_tokens(here.ticks) if here else request.base
        return room_for(request.prompt_tokens + output, self.policy)
