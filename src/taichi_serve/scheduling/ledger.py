"""The books: which request is where, and what every instance therefore holds and expects.

Every change of a request's place goes through one of these methods, so that the sums of an instance are
changed in the same line as the state of the request. They decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from taichi_serve.instance import Instance
from taichi_serve.latency.model import prompt_attention
from taichi_serve.messages import Move, Stepped
from taichi_serve.request import Request, State
from taichi_serve.scheduling.queue import Queue, plan
from taichi_serve.scheduling.residency import NOTHING, Prefixes, Residency
from taichi_serve.scheduling.residents import Residents
from taichi_serve.scheduling.strictest import Strictest
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO


class Ledger:
    """Live requests, instances, and the ordered residents of every instance."""

    def __init__(
        self,
        sliders: Sliders,
        capacities: Mapping[str, int],
        alpha: float,
        max_degrades: int,
        block_size: int = 0,
    ) -> None:
        """Instances are i0, i1, ..., P-heavy first; `capacities` is their KV room in tokens. A decode crosses
        at `alpha` of its TPOT SLO. A hash stands for a block of `block_size` tokens (0: none are known)."""
        self.requests: dict[str, Request] = {}
        self.instances: dict[str, Instance] = {}
        for number, kind in enumerate(sliders.kinds()):
            name = f"i{number}"
            if capacities.get(name, 0) < 1:
                raise ValueError(f"the KV capacity of {name} is missing or not positive")
            self.instances[name] = Instance(name, kind, sliders.chunk(kind), capacities[name])
        self.changes = 0  # how often an instance was added or removed
        self.fresh = partial(Residents, alpha, max_degrades)  # nobody, on one more instance
        self.queues = {name: Queue() for name in self.instances}
        self.best_effort: dict[str, None] = {}  # ids of the queued prompts that are: an ordered set
        self.residents = {name: self.fresh() for name in self.instances}
        self.residency = Residency(list(self.instances), block_size)
        self.strictest = Strictest()
        self.touched = set(self.instances.values())  # of which something changed since somebody last looked

    def touch(self, *instances: Instance) -> None:
        """Something of these instances changed, or is about to."""
        self.touched.update(instances)

    def admit(self, request: Request) -> None:
        """A request has arrived; it is nowhere yet."""
        self.requests[request.id] = request
        self.strictest.add(request.slo)

    def promise(self, slo: SLO) -> None:
        """Requests that have no SLO of their own have this one from now on."""
        self.strictest.promise(slo, self.requests.values())
        for residents in self.residents.values():
            residents.renew(self.requests)

    def home(self, request: Request) -> Instance:
        """The instance of a request that is on one: it is queued, or decodes, or its move began there."""
        assert request.instance is not None, f"request {request.id} is on no instance"
        return self.instances[request.instance]

    def source(self, request: Request) -> Instance | None:
        """The instance of a request, None where that is lost or was never given."""
        return None if request.instance is None else self.instances[request.instance]

    def prefixes(self, request: Request) -> Prefixes:
        """What the instances have of a request, wherever it is."""
        if not request.blocks:
            return NOTHING
        known = request.prompt_tokens + (request.first_at is not None)  # with an output the prompt may match
        return self.residency.match(request.blocks, known)

    def enqueue(self, request: Request, instance: Instance, cached: int = 0, used: int = 0) -> None:
        """The prompt waits on this instance, where the first `cached` tokens of it need not be computed, and
        the first `used` are in blocks that others use."""
        request.enter(State.PREFILLING)
        request.instance, request.cached, request.unused = instance.name, cached, max(0, cached - used)
        new = request.prompt_tokens - cached
        self.touch(instance)
        if not (instance.decodes or instance.queued_requests):  # idle: a step with it begins at once
            instance.running_tokens = min(instance.chunk, new)
        self.queues[instance.name].add(request.id, request.by)
        if request.best_effort:
            self.best_effort[request.id] = None
        instance.queued_tokens += new
        instance.queued_requests += 1
        instance.queued_attention += prompt_attention(request.prompt_tokens, cached)
        instance.queued_unused += request.unused
        if request.blocks:
            self.residency.claim(instance.name, request.blocks)
        if instance.running_tokens:
            plan(self.queues[instance.name], instance, self.requests)

    def lend(self, lender: Instance, now: float, seconds: float) -> None:
        """A prefix is copied from this instance, behind others: its port takes one after the other."""
        self.touch(lender)
        lender.lends_until = max(now, lender.lends_until) + seconds

    def dequeue(self, request: Request, cached: int = 0) -> None:
        """The prompt is through; `cached` tokens of it did not have to be computed."""
        instance = self.home(request)
        self._unqueue(request, instance, instance.progress_tokens - (request.prompt_tokens - cached))

    def demote(self, request: Request, by: float) -> None:
        """A queued prompt is best effort from now on, with another place in its queue."""
        request.best_effort, request.by = True, by
        instance = self.home(request)
        self.queues[instance.name].move(request.id, by)
        self.touch(instance)
        self.best_effort[request.id] = None

    def first(self, instance: Instance) -> Request | None:
        """The prompt that an instance is computing, or will compute next."""
        name = self.queues[instance.name].first()
        return None if name is None else self.requests[name]

    def take_back(self, request: Request) -> None:
        """The leg ends before its first token: the prompt is queued nowhere, its next place is a new leg."""
        self._drop(request)
        request.leg += 1

    def _drop(self, request: Request) -> None:
        # Not computed any further here. What was computed is that of the first prompt.
        instance = self.home(request)
        first = self.queues[instance.name].first() == request.id
        self._unqueue(request, instance, 0 if first else instance.progress_tokens)
        self._unclaim(request)

    def _unclaim(self, request: Request) -> None:
        if request.blocks and request.instance is not None:
            self.residency.leave(request.instance, request.blocks)

    def _unqueue(self, request: Request, instance: Instance, progress: int) -> None:
        self.touch(instance)
        self.queues[instance.name].remove(request.id)
        self.best_effort.pop(request.id, None)
        instance.queued_tokens -= request.prompt_tokens - request.cached
        instance.queued_requests -= 1
        instance.queued_attention -= prompt_attention(request.prompt_tokens, request.cached)
        instance.queued_unused -= request.unused
        request.unused = 0
        instance.progress_tokens = min(max(0, progress), instance.queued_tokens)
        instance.running_tokens = min(instance.running_tokens, instance.queued_prefill_tokens)
        plan(self.queues[instance.name], instance, self.requests)
        self._rest(instance)

    def settle(self, request: Request, instance: Instance, output_tokens: int) -> None:
        """The request is resident here, with so many tokens out as of the instance's last step."""
        request.enter(State.DECODING)
        if request.blocks and request.instance != instance.name:
            self._unclaim(request)
            self.residency.claim(instance.name, request.blocks)
        request.instance, request.target, request.why = instance.name, None, None
        request.base, request.joined = output_tokens, instance.ticks
        request.degraded = request.degraded and instance.kind is Kind.P_HEAVY
        self.touch(instance)
        instance.decodes += 1
        instance.context_base += request.prompt_tokens + request.base - request.joined
        if request.movable:
            self.residents[instance.name].add(request)

    def strand(self, request: Request) -> None:
        """The request's instance is lost: it waits, with the tokens it has, for a place elsewhere."""
        if request.state is State.MOVING:
            self.home(request).leaving_tokens -= request.reserved
            self._unclaim(request)
        elif request.state is State.PREFILLING:
            self.take_back(request)
            request.enter(State.WAITING)
        elif request.state is State.DECODING:
            self.lift(request)
            self._unclaim(request)
            request.enter(State.WAITING)
        request.instance = None

    def wait(self, request: Request) -> None:
        """A stranded request has nowhere to go: it waits for an instance, and nothing is promised to it."""
        if request.state is State.MOVING:
            self._release(request)
            request.enter(State.WAITING)
            request.target, request.why = None, None

    def waiting(self) -> list[Request]:
        """Those that wait for an instance, in order of arrival."""
        return [request for request in self.requests.values() if request.state is State.WAITING]

    def revive(self, instance: Instance, kv_capacity: int) -> None:
        """The instance is back and holds nothing; its tick clock goes on. Raises ValueError without KV."""
        if kv_capacity < 1:
            raise ValueError(f"{instance.name} came back with a KV capacity of {kv_capacity} tokens")
        self.touch(instance)
        instance.alive, instance.silent, instance.closing = True, False, False
        instance.kv_capacity, instance.kv_tokens = kv_capacity, 0

    def lift(self, request: Request) -> None:
        """The request is resident no more; its output so far stays in `base`."""
        self.touch(instance := self.home(request))
        if request.movable:
            self.residents[instance.name].remove(request)
        instance.decodes -= 1
        instance.context_base -= request.prompt_tokens + request.base - request.joined
        request.base, request.joined = request.output_tokens(instance.ticks), instance.ticks

    def depart(self, request: Request, target: Instance, move: Move, now: float, room: int) -> None:
        """The request leaves for `target`, where `room` KV tokens are promised to it."""
        if request.state is State.DECODING:
            self.lift(request)
        if request.state is State.MOVING:
            self._release(request)
        request.enter(State.MOVING)
        request.leg += 1
        request.target, request.why, request.moved_at, request.reserved = target.name, move, now, room
        request.moves[move] = request.moves.get(move, 0) + 1
        self.touch(target)
        target.arriving += 1
        target.reserved_tokens += room
        if source := self.source(request):
            source.leaving_tokens += room

    def arrive(self, request: Request) -> None:
        """The request is at its target: what was promised to it there is now in the target's own figures."""
        self._release(request)

    def stay(self, request: Request, output_tokens: int) -> None:
        """The move did not happen: the request is resident where it came from."""
        self._release(request)
        if request.why is not None:
            request.moves[request.why] -= 1
        self.settle(request, self.home(request), max(request.base, output_tokens))

    def forget(self, request: Request) -> None:
        """The request is over: nothing of it is left in any sum."""
        match request.state:
            case State.PREFILLING:
                self._drop(request)
            case State.DECODING:
                self.lift(request)
                self._unclaim(request)
            case State.MOVING:
                self._release(request)
                self._unclaim(request)
        request.enter(State.DONE)
        del self.requests[request.id]
        self.strictest.drop(request.slo)
        for name in {request.instance, request.target}:
            if name is not None:
                self._rest(self.instances[name])

    def step(self, instance: Instance, step: Stepped) -> None:
        """One step of an instance: its tick clock goes on, for everybody but those who missed it."""
        self.touch(instance)
        instance.ticks += 1
        instance.kv_tokens, instance.stepped_at, instance.missed = step.kv_tokens, step.at, step.missed
        progress = instance.progress_tokens + step.prefill_tokens
        instance.progress_tokens = min(progress, instance.queued_tokens)
        instance.running_tokens = min(instance.chunk, instance.queued_prefill_tokens)
        plan(self.queues[instance.name], instance, self.requests)
        if instance.queued_unused and step.prefill_tokens and (request := self.first(instance)) is not None:
            # What it found in the cache is in the instance's own figures from now on.
            instance.queued_unused -= request.unused
            request.unused = 0
        for name in step.missed:
            request = self.requests.get(name)
            if request is None or request.instance != instance.name:
                continue
            keyed = request.state is State.DECODING and request.movable
            if keyed:
                self.residents[instance.name].remove(request)
            request.joined += 1
            if request.state is State.DECODING:
                instance.context_base -= 1
            if keyed:
                self.residents[instance.name].add(request)

    def _release(self, request: Request) -> None:
        assert request.target is not None, f"request {request.id} goes nowhere"
        target = self.instances[request.target]
        self.touch(target)
        target.arriving -= 1
        target.reserved_tokens -= request.reserved
        if source := self.source(request):
            source.leaving_tokens -= request.reserved
        request.reserved = 0

    def _rest(self, instance: Instance) -> None:
        # An idle instance makes no steps that would report its KV: with nobody left it holds nothing.
        if not (instance.decodes or instance.queued_requests or instance.leaving_tokens):
            self.touch(instance)
            instance.kv_tokens = instance.progress_tokens = 0
