"""SimulatedCluster: engines in miniature on a virtual clock, behind the same port as the real cluster.

One heap of (time, tie counter, what, whom): the tie counter makes equal times come in the order they were
made, so the same calls give the same facts, byte for byte. Arrivals are drawn from their source one at a time
and a request is forgotten when it is over, so memory does not grow with the length of a trace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop

from taichi_serve.cluster.base import told
from taichi_serve.cluster.simulated.agenda import Agenda, Due
from taichi_serve.cluster.simulated.engine import Engine
from taichi_serve.cluster.simulated.job import Call, Job
from taichi_serve.cluster.simulated.link import Link
from taichi_serve.cluster.simulated.orders import Orders
from taichi_serve.cluster.simulated.step import Ends, EngineShape, Step, Truth
from taichi_serve.messages import (
    Added,
    Arrived,
    Command,
    Event,
    Finished,
    Flowed,
    Joined,
    Lost,
    Prefilled,
    Removed,
    Silent,
    Stepped,
)
from taichi_serve.sliders import Sliders
from taichi_serve.stage import Stage


class SimulatedCluster:
    """Instances i0, i1, ..., P-heavy first, that obey commands on a clock of their own."""

    def __init__(
        self,
        sliders: Sliders,
        truths: Sequence[Truth],
        shape: EngineShape,
        link: Link,
        calls: Iterable[Call],
        happenings: Sequence[Event] = (),
        max_model_len: int = 1 << 20,
    ) -> None:
        """`truths` are the step times: one for all instances, or one for each.

        `calls` must be in order of time. `happenings` are facts from outside: Cancelled, Asked, Drained,
        Slid, Hopeless; Lost, which kills the instance; Joined, which starts it again, empty; and Silent,
        between whose two ends it stands still. Clients allow as many tokens as `max_model_len` leaves room
        for: nobody but the engines knows how long an output will be.
        """
        if len(truths) not in (1, sliders.instances):
            raise ValueError(f"{len(truths)} step times for {sliders.instances} instances")
        self.engines: dict[str, Engine] = {}
        for number, kind in enumerate(sliders.kinds()):
            truth = truths[number % len(truths)]
            self.engines[f"i{number}"] = Engine(f"i{number}", sliders.chunk(kind), shape, truth)
        self.shape = shape
        self.agenda = Agenda(link, Link(link.bytes_per_token, shape.host_bandwidth, 0.0))
        self.max_model_len = max_model_len
        self.jobs: dict[str, Job] = {}
        self.orders = Orders(self.engines, self.jobs, self.agenda)
        self.arrived = 0
        self.closed = False
        self._calls = iter(calls)
        for event in happenings:
            self.agenda.push(event.at, Due.FACT, event)
        self._draw()

    @property
    def capacities(self) -> Mapping[str, int]:
        """KV room of every instance in tokens."""
        return {name: e.residents.blocks * e.residents.block_size for name, e in self.engines.items()}

    # ----------------------------------------------------------------------------------------------- facts

    def events(self) -> AsyncIterator[Event]:
        """The facts, for drive()."""
        return told(self.facts())

    def facts(self) -> Iterator[Event]:
        """The facts in order of time, until nothing is left to happen or `close` was called."""
        agenda = self.agenda
        heap = agenda.heap
        while heap and not self.closed:
            agenda.now, _, due, what = heappop(heap)
            if due is Due.STEP:
                assert isinstance(what, Engine)
                step, what.stalled = what.current, what.silent
                if step is not None and what.alive and not what.silent:
                    agenda.telling, what.current = what, None
                    yield from self._step_facts(what, step)
                    agenda.telling = None
                    agenda.advance(what)
            elif due is Due.ARRIVAL:
                assert isinstance(what, Call)
                yield self._arrive(what)
                self._draw()
            elif due is Due.LANDING:
                assert isinstance(what, tuple)
                agenda.land(*what)
            elif due is Due.LEASE:
                assert isinstance(what, tuple)
                agenda.expire(*what)
            elif due is Due.READ:
                assert isinstance(what, tuple)
                agenda.arrive(*what)
            elif due is Due.TURN:
                assert isinstance(what, Call)
                yield self._arrive(what)
            else:
                event: Event = what  # type: ignore[assignment]  # a fact by its Due
                self._happen(event)
                yield event

    def close(self) -> None:
        """No further facts."""
        self.closed = True

    def _step_facts(self, engine: Engine, step: Step) -> list[Event]:
        now, name = self.agenda.now, engine.name
        ended: list[Event] = []
        for ends, job, leg in step.ends:
            if job.engine is not engine or job.leg != leg:
                continue  # it was ended, or sent elsewhere, while the step ran
            if ends is Ends.FIRST:
                held = job.hand_over
                ended.append(Prefilled(now, job.id, leg, name, max(0, job.cached), held, job.fetched))
                job.enter(Stage.HELD if held else Stage.DECODING)
                if held:
                    job.where, job.last_at = None, now
            elif ends is Ends.FLOWED:
                job.enter(Stage.DECODING)
                ended.append(self._flowed(engine, job))
            elif ends is Ends.LEFT:
                self.orders.depart(job, engine)
            else:
                self.orders.end(job)
                ended.append(Finished(now, job.id, job.output))
                if job.then is not None:
                    at = now + job.then.at
                    self.agenda.push(at, Due.TURN, replace(job.then, at=at))
        stepped = Stepped(
            now,
            name,
            step.seconds,
            step.prefill_tokens,
            step.decodes,
            engine.residents.used_tokens,
            engine.queued,
            step.missed,
        )
        return [*engine.tell(now), stepped, *ended]

    def _flowed(self, engine: Engine, job: Job) -> Flowed:
        there = job.prompt + job.began - 1 if job.pulled else max(0, job.cached)
        return Flowed(
            self.agenda.now,
            job.id,
            job.leg,
            engine.name,
            job.began + 1,
            there - job.local if job.pulled else 0,
            self.agenda.now - job.last_at,
            there,
        )

    # --------------------------------------------------------------------------------------------- orders

    def send(self, command: Command) -> None:
        """Take a decision; what cannot be done comes back as a fact. Links here copy nothing ahead."""
        self.orders.carry_out(command)

    # --------------------------------------------------------------------------------------- what happens

    def _arrive(self, call: Call) -> Arrived:
        name = call.request or f"r{self.arrived}"
        self.arrived += 1
        room = self.max_model_len - call.prompt_tokens
        if call.output_tokens > room or call.prompt_tokens + call.output_tokens > self.shape.kv_capacity:
            raise ValueError(
                f"request {name}: {call.prompt_tokens} + {call.output_tokens} tokens are over the limit "
                f"({min(self.max_model_len, self.shape.kv_capacity)})"
            )
        job = Job(name, call.at, call.prompt_tokens, call.output_tokens, call.blocks, call.then)
        self.jobs[name], job.bound = job, not call.movable
        bound_by = None if call.movable else "what it asks for"
        blocks = call.blocks[: call.prompt_tokens // self.shape.block_size]
        words = call.movable, bound_by, blocks, call.slo, call.slo_class
        return Arrived(call.at, name, call.prompt_tokens, room, *words)

    def _draw(self) -> None:
        call = next(self._calls, None)
        if call is not None:
            if call.at < self.agenda.now:
                raise ValueError(
                    f"arrivals must be in order of time: {call.at} comes after {self.agenda.now}"
                )
            self.agenda.push(call.at, Due.ARRIVAL, call)

    def _happen(self, event: Event) -> None:
        """What a fact from outside does to an engine."""
        if isinstance(event, Lost):
            self.orders.lose(self.engines[event.instance])
        elif isinstance(event, Silent):
            self.agenda.still(self.engines[event.instance], event.on)
        elif isinstance(event, Joined) and not (before := self.engines[event.instance]).alive:
            shape = replace(self.shape, kv_capacity=event.kv_capacity)
            self.engines[before.name] = Engine(before.name, before.chunk, shape, before.truth)
        elif isinstance(event, Added) and event.instance not in self.engines:
            first = next(iter(self.engines.values()))  # what a new one takes for a step, they take
            shape = replace(self.shape, kv_capacity=event.kv_capacity)
            self.engines[event.instance] = Engine(event.instance, 0, shape, first.truth)
        elif isinstance(event, Removed) and event.instance in self.engines:
            self.orders.lose(self.engines[event.instance])
