"""GlobalScheduler: one fact in, the decisions that follow from it out. It owns all mutable state.

What is decided is in prefill.py and decode.py, what is booked in ledger.py, and dispatch.py makes commands of
it; here is what follows from each kind of fact. Facts that come too late (their leg is over, their request
gone, their instance lost) are dropped in `_current`; a transition that is not in the table of request.py is
an error in the books, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from taichi_serve.instance import UNBOUNDED, Instance
from taichi_serve.latency.accuracy import Accuracy
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import (
    Abort,
    Added,
    Arrived,
    Asked,
    Cached,
    Cancelled,
    Command,
    Drained,
    Event,
    Finished,
    Flowed,
    Hopeless,
    Joined,
    Lost,
    Move,
    Outcome,
    Placed,
    Prefilled,
    Promised,
    Refused,
    Removed,
    Silent,
    Slid,
    Stepped,
    Tuned,
)
from taichi_serve.request import Request, State
from taichi_serve.scheduling.behind import sort
from taichi_serve.scheduling.counters import Counters
from taichi_serve.scheduling.decode import choose_backflow, choose_degrade
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.scheduling.elastic import add, placed, remove
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.operations import ask, close, drain, empty, slide
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.supervision import despair, join, lose, silence
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

ENOUGH_TOKENS = 8  # decoded in one place before its TPOT says anything about a prediction


class GlobalScheduler:
    """Both algorithms over a ledger: `on(event)` gives the commands to carry out, in order."""

    def __init__(
        self,
        sliders: Sliders,
        slo: SLO,
        predictor: Predictor,
        policy: Policy,
        capacities: Mapping[str, int],
        block_size: int = 0,
        seats: int = UNBOUNDED,
    ) -> None:
        """`capacities` are tokens of KV of i0, i1, ..., P-heavy first; each runs `seats` requests. A hash of
        a block stands for `block_size` tokens (0: no prefixes), `slo` is of requests without one."""
        self.sliders, self.slo, self.predictor, self.policy = sliders, slo, predictor, policy
        self.ledger = Ledger(sliders, capacities, policy.alpha, policy.max_degrades, block_size)
        self.ledger.strictest.bound(slo, policy.classes)
        self.requests, self.instances = self.ledger.requests, self.ledger.instances
        for one in self.instances.values():
            one.seats = seats
        self.counters = Counters()
        self._despaired: str | None = None  # why no lost instance will come back
        self.accuracy = {name: Accuracy() for name in self.instances}
        self._dispatcher = Dispatcher(self.ledger, predictor, policy, self.counters)
        self.links = self._dispatcher.links
        self._deciders: dict[type[Event], Callable[..., list[Command]]] = {
            Arrived: self._arrived,
            Prefilled: self._prefilled,
            Stepped: self._stepped,
            Cached: self._cached,
            Flowed: self._flowed,
            Finished: self._finished,
            Refused: self._refused,
            Silent: lambda event: silence(self._dispatcher, event, self.sliders),
            Lost: lambda event: lose(self._dispatcher, event, self.sliders),
            Joined: self._joined,
            Added: self._added,
            Placed: partial(placed, self.ledger),
            Removed: partial(remove, self, self._dispatcher),
            Hopeless: self._hopeless,
            Cancelled: self._cancelled,
            Asked: partial(ask, self._dispatcher),
            Drained: partial(drain, self._dispatcher),
            Slid: self._slid,
            Tuned: self._tuned,
            Promised: self._promised,
        }

    def on(self, event: Event) -> list[Command]:
        """Book one fact and decide what follows from it."""
        return self._deciders[type(event)](event)

    # ------------------------------------------------------------------------------- the life of a request

    def _arrived(self, event: Arrived) -> list[Command]:
        if event.request in self.requests:
            return []
        request = Request(
            event.request,
            event.at,
            event.prompt_tokens,
            event.max_tokens,
            event.slo or self.slo,
            event.movable,
            event.slo is not None,
            event.slo_class,
        )
        if self.ledger.residency.block_size:
            request.blocks = event.blocks
        self.ledger.admit(request)
        if self._despaired is not None and not any(i.alive for i in self.instances.values()):
            return [self._dispatcher.fail(request, event.at, self._despaired)]
        return self._dispatcher.prefill(request, event.at, self.sliders, new=True)

    def _prefilled(self, event: Prefilled) -> list[Command]:
        request = self._current(event.request, event.leg, State.PREFILLING)
        if request is None or request.instance != event.instance:
            return []
        here = self.instances[event.instance]
        self.ledger.dequeue(request, event.cached)
        self.counters.through(here.name, request.prompt_tokens, request.cached, event.cached)
        if not request.best_effort:  # nobody knew how many would go before it
            self._dispatcher.triage.through(request, event.at)
            self.accuracy[here.name].ttft.add(request.predicted_ttft, event.at - request.arrived_at)
        request.first_at = event.at
        request.base, request.joined = 1, here.ticks
        after = [*close(self.ledger, here), *sort(self._dispatcher, here, event.at)]
        if event.held:
            return [*after, self._dispatcher.hand_over(request, here, event.at)]
        self._settle(request, here, 1, event.at)
        return after

    def _flowed(self, event: Flowed) -> list[Command]:
        request = self._current(event.request, event.leg, State.MOVING)
        if request is None or request.target != event.instance:
            return []
        source, target = self.ledger.source(request), self.instances[event.instance]
        if source:
            self.predictor.flowed(source, target, event)
            self.links.flowed(source, target, event)
        if request.why:
            self.counters.moves[request.why] += 1
        self.ledger.arrive(request)
        self._settle(request, target, event.output_tokens, event.at)
        return []

    def _settle(self, request: Request, here: Instance, output_tokens: int, now: float) -> None:
        request.predicted_tpot = self.predictor.tpot(here, request.prompt_tokens + output_tokens)
        request.settled_at = now
        self.ledger.settle(request, here, output_tokens)

    def _refused(self, event: Refused) -> list[Command]:
        prompt = self._current(event.request, event.leg, State.PREFILLING)
        if prompt is not None:
            self.ledger.take_back(prompt)
            return self._dispatcher.prefill(prompt, event.at, self.sliders)
        request = self._current(event.request, event.leg, State.MOVING)
        if request is None:
            return []
        if request.why:
            self.counters.refused[request.why] += 1
        source, target = self.ledger.source(request), self.instances.get(request.target or "")
        self.links.gave_up(source, target, event.at - request.moved_at, event.at)
        if request.instance is None:
            return self._dispatcher.rescue(request, event.at)
        self.ledger.stay(request, event.output_tokens)
        return []

    def _finished(self, event: Finished) -> list[Command]:
        request = self.requests.get(event.request)
        return self._end(request, event.outcome, event.at, event.output_tokens) if request else []

    def _cancelled(self, event: Cancelled) -> list[Command]:
        request = self.requests.get(event.request)
        if request is None:
            return []
        abort = Abort(request.id, Outcome.CANCELLED, "the client left")
        return [abort, *self._end(request, Outcome.CANCELLED, event.at)]

    def _end(self, request: Request, outcome: Outcome, now: float, output_tokens: int = 0) -> list[Command]:
        here = self.ledger.source(request)
        if here and request.state is State.DECODING:
            tokens = here.ticks - request.joined
            self._dispatcher.triage.seats.left(now - request.settled_at)
            if tokens >= ENOUGH_TOKENS:
                actual = (now - request.settled_at) / tokens
                self.accuracy[here.name].tpot.add(request.predicted_tpot, actual)
        self.counters.ended(outcome, request.moves.get(Move.BACKFLOW, 0))
        self.counters.judge(request, outcome, now, output_tokens)
        self.ledger.forget(request)
        return close(self.ledger, here) if here else []

    # ---------------------------------------------------------------------------------- Algorithm 1, a step

    def _stepped(self, event: Stepped) -> list[Command]:
        instance = self.instances.get(event.instance)
        if instance is None or not instance.alive:
            return []
        self.predictor.stepped(instance, event)
        self.ledger.step(instance, event)
        if instance.draining:
            return empty(self._dispatcher, instance, event.at)
        if instance.kind is Kind.D_HEAVY:
            return self._degrade(instance, event.at) if self.policy.degrades else []
        ahead = self._dispatcher.copy_ahead(instance) if self.policy.ahead and event.prefill_tokens else []
        return [*ahead, *self._backflow(instance, event.at)]

    def _cached(self, event: Cached) -> list[Command]:
        if (instance := self.instances.get(event.instance)) and instance.alive:
            self.ledger.residency.learn(event)
        return []

    def _degrade(self, source: Instance, now: float) -> list[Command]:
        if source.kv_tokens - source.leaving_tokens <= self.policy.watermark * source.kv_capacity:
            return []
        commands: list[Command] = []
        helpers, search = self._dispatcher.of_kind(Kind.P_HEAVY), self._dispatcher.search
        residents = self.ledger.residents[source.name]
        while choice := choose_degrade(
            source, residents, self.requests, helpers, now, self.predictor, self.policy, search
        ):
            request, target = choice
            why = f"KV of {source.name} at {source.kv_usage:.3f}, watermark {self.policy.watermark:g}"
            commands.append(self._dispatcher.flow(request, target, Move.DEGRADE, now, why, helpers))
        return commands

    def _backflow(self, source: Instance, now: float) -> list[Command]:
        residents = self.ledger.residents[source.name]
        if not any(True for _ in residents.crossing(now, source.ticks)):
            return []
        commands: list[Command] = []
        decoders, search = self._dispatcher.of_kind(Kind.D_HEAVY), self._dispatcher.search
        while choice := choose_backflow(
            source, residents, self.requests, decoders, now, self.predictor, self.policy, search
        ):
            request, target = choice
            why = f"running TPOT reached {self.policy.alpha:g} of {request.slo.tpot:g} s"
            commands.append(self._dispatcher.flow(request, target, Move.BACKFLOW, now, why, decoders))
        return commands

    # ------------------------------------------------------------------------ an operator's hand, a bad day

    def _slid(self, event: Slid) -> list[Command]:
        if event.sliders.instances != len(self.instances):
            return []
        self.sliders = event.sliders
        return slide(self._dispatcher, event.sliders)

    def _tuned(self, event: Tuned) -> list[Command]:
        if not event.act or event.sliders.instances != len(self.instances):
            return []
        self.sliders = event.sliders
        policy = replace(self.policy, ttft_margin=event.ttft_margin, tpot_margin=event.tpot_margin)
        self.policy = self._dispatcher.policy = policy
        return slide(self._dispatcher, event.sliders)

    def _promised(self, event: Promised) -> list[Command]:
        self.slo = event.slo
        self.ledger.promise(event.slo)
        return []

    def _joined(self, event: Joined) -> list[Command]:
        self._despaired = None
        return join(self._dispatcher, event, self.sliders)

    def _added(self, event: Added) -> list[Command]:
        self._despaired = None
        return add(self, self._dispatcher, event)

    def _hopeless(self, event: Hopeless) -> list[Command]:
        self._despaired = event.why
        return despair(self._dispatcher, event)

    # ------------------------------------------------------------------------------------------ small things

    def _current(self, name: str, leg: int, state: State) -> Request | None:
        """The request a fact is about, or None where the fact came too late. The one place for that."""
        request = self.requests.get(name)
        return request if request and request.leg == leg and request.state is state else None
