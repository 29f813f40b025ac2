"""SimulatedCluster: engines in miniature on a virtual clock, behind the same port as the real cluster.

One heap of (time, tie counter, what, whom): the tie counter makes equal times come in the order they were
made, so the same calls give the same facts, byte for byte. Arrivals are drawn from their source one at a time
and a request is forgotten when it is over, so memory does not grow with the length of a trace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from heapq import heappop

from taichi_serve.cluster.base import told
from taichi_serve.cluster.simulated.agenda import Agenda, Due
from taichi_serve.cluster.simulated.engine import Engine
from taichi_serve.cluster.simulated.job import Call, Job, Where
from taichi_serve.cluster.simulated.link import Link
from taichi_serve.cluster.simulated.step import Ends, EngineShape, Step, Truth
from taichi_serve.messages import (
    Abort,
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Lost,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Stepped,
)
from taichi_serve.sliders import Sliders


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

        `calls` must be in order of time. `happenings` are facts from outside (Cancelled, Asked, Drained,
        Slid, and Lost, which kills the instance). Clients allow as many tokens as `max_model_len` leaves room
        for: nobody but the engines knows how long an output will be.
        """
        if len(truths) not in (1, sliders.instances):
            raise ValueError(f"{len(truths)} step times for {sliders.instances} instances")
        self.engines: dict[str, Engine] = {}
        for number, kind in enumerate(sliders.kinds()):
            truth = truths[number % len(truths)]
            self.engines[f"i{number}"] = Engine(f"i{number}", sliders.chunk(kind), shape, truth)
        self.shape = shape
        self.agenda = Agenda(link)
        self.max_model_len = max_model_len
        self.jobs: dict[str, Job] = {}
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
            self.agenda.now, _, due, what = heappop(heap)
            if due is Due.STEP:
                assert isinstance(what, Engine)
                if what.alive and what.current is not None:
                    self.agenda.telling = what
                    yield from self._step_facts(what, what.current)
                    self.agenda.telling = None
                    self.agenda.advance(what)
            elif due is Due.ARRIVAL:
                assert isinstance(what, Call)
                yield self._arrive(what)
                self._draw()
            elif due is Due.LANDING:
                assert isinstance(what, tuple)
                self.agenda.land(*what)
            elif due is Due.LEASE:
                assert isinstance(what, tuple)
                self.agenda.expire(*what)
            else:
                if isinstance(what, Lost):
                    self._kill(what.instance)
                yield what  # type: ignore[misc]  # a fact by its Due

    def close(self) -> None:
        """No further facts."""
        self.closed = True

    def _step_facts(self, engine: Engine, step: Step) -> list[Event]:
        now, name = self.agenda.now, engine.name
        ended: list[Event] = []
        for ends, job in step.ends:
            if job.where is Where.DONE or job.engine is not engine:
                continue
            if ends is Ends.FIRST:
                held = job.hand_over
                ended.append(Prefilled(now, job.id, job.leg, name, 0, held))
                if held:
                    job.where, job.last_at = Where.HELD, now
            elif ends is Ends.FLOWED:
                ended.append(self._flowed(engine, job))
            elif ends is Ends.LEFT:
                self._depart(job)
            else:
                engine.residents.free += job.blocks
                job.where = Where.DONE
                del self.jobs[job.id]
                ended.append(Finished(now, job.id, job.output))
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
        return [stepped, *ended]

    def _flowed(self, engine: Engine, job: Job) -> Flowed:
        pulled = job.prompt + job.began - 1 if job.pulled else 0
        return Flowed(
            self.agenda.now,
            job.id,
            job.leg,
            engine.name,
            job.began + 1,
            pulled,
            self.agenda.now - job.last_at,
            pulled,
        )

    # ---------------------------------------------------------------------------------------------- orders

    def send(self, command: Command) -> None:
        """Take a decision; what cannot be done comes back as a fact. Links here copy nothing ahead."""
        if isinstance(command, SetChunk):
            self.engines[command.instance].chunk = command.chunk
            return
        job = self.jobs.get(command.request)
        if job is None:
            return  # it is over: Finished crosses the command
        if isinstance(command, Prefill):
            self._prefill(job, command)
        elif isinstance(command, Decode):
            self._decode(job, command)
        elif isinstance(command, Flow):
            self._flow(job, command)
        elif isinstance(command, Abort):
            self._abort(job, command)

    def _prefill(self, job: Job, command: Prefill) -> None:
        engine = self.engines[command.on]
        job.leg, job.hand_over, job.began, job.pulled = command.leg, command.hand_over, job.made, False
        if not engine.alive:
            self._refuse(job, command.leg, f"{engine.name} is lost")
            return
        job.restart()
        engine.queue(job)
        self.agenda.kick(engine)

    def _decode(self, job: Job, command: Decode) -> None:
        target, source = self.engines[command.on], job.engine
        if not target.alive:
            self._refuse(job, command.leg, f"{target.name} is lost")
            if job.where is Where.HELD and source is not None:  # it goes on where it was
                job.hand_over = False
                source.land(job)
                self.agenda.kick(source)
            return
        if job.where is Where.DECODING and source is not None and source is not target:
            self._leave(job, source, command.leg, target)  # it was to go where an instance was lost
            return
        if job.where is Where.DECODING or job.where is Where.ENDING:
            job.target = None
            self._refuse(job, command.leg, "it still runs there")
            return
        if job.where is not Where.HELD or source is None or not source.alive:
            self._stranded(job, command.leg, target)
            return
        job.leg, job.hand_over, job.began, job.pulled = command.leg, False, job.made, True
        if source is target:
            target.land(job)
        else:
            self.agenda.pull(job, source, target)
        self.agenda.kick(target)

    def _stranded(self, job: Job, leg: int, target: Engine) -> None:
        """A leg without KV to pull, or with a pull that never began: from what is left."""
        job.leg, job.hand_over, job.began, job.pulled = leg, False, job.made, False
        if job.source is target and job.where is Where.NOWHERE:  # back where its KV still is
            job.blocks, job.pinned, job.source, job.engine = job.pinned, 0, None, target
            job.pulled = True
            target.land(job)
        elif job.source is not None and job.source.alive and job.where is Where.NOWHERE:
            job.pulled = True
            self.agenda.expect(job, target)
        else:
            job.restart()
            target.queue(job, first=job.made > 0)
        self.agenda.kick(target)

    def _flow(self, job: Job, command: Flow) -> None:
        target, source = self.engines[command.to], job.engine
        if job.where is Where.ENDING:
            return  # its last token is in flight
        if job.where is not Where.DECODING or source is None or source is target or not target.alive:
            self._refuse(job, command.leg, f"it is {job.where.value}, or {target.name} cannot take it")
            return
        self._leave(job, source, command.leg, target)

    def _leave(self, job: Job, source: Engine, leg: int, target: Engine) -> None:
        job.target = (leg, target)
        if job not in source.leaving:
            source.leaving.append(job)

    def _abort(self, job: Job, command: Abort) -> None:
        engine, made = job.engine, self._made(job)
        if engine is not None and engine.alive:
            engine.drop(job)
        self.agenda.unpin(job)
        job.where = Where.DONE
        del self.jobs[job.id]
        self.agenda.push(self.agenda.now, Due.FACT, Finished(self.agenda.now, job.id, made, command.outcome))
        if engine is not None:
            self.agenda.kick(engine)

    def _made(self, job: Job) -> int:
        """Output tokens that are out."""
        if job.where is Where.DECODING and job.engine is not None:
            return job.made + job.engine.emitted(job)
        return job.made

    def _refuse(self, job: Job, leg: int, why: str) -> None:
        self.agenda.push(
            self.agenda.now, Due.FACT, Refused(self.agenda.now, job.id, leg, why, self._made(job))
        )

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
        self.jobs[name] = Job(name, call.at, call.prompt_tokens, call.output_tokens)
        return Arrived(call.at, name, call.prompt_tokens, room)

    def _draw(self) -> None:
        call = next(self._calls, None)
        if call is not None:
            if call.at < self.agenda.now:
                raise ValueError(
                    f"arrivals must be in order of time: {call.at} comes after {self.agenda.now}"
                )
            self.agenda.push(call.at, Due.ARRIVAL, call)

    def _depart(self, job: Job) -> None:
        """The leg is over because of a Flow: its blocks are pinned and the target asks for them."""
        source = job.engine
        assert source is not None
        job.last_at = self.agenda.now
        leg, target = job.target or (job.leg, source)
        job.target = None
        job.leg, job.began, job.pulled = leg, job.made, True
        if not target.alive:
            self._refuse(job, leg, f"{target.name} is lost")
            job.leg = leg - 1
            source.land(job)
            return
        self.agenda.pull(job, source, target)
        self.agenda.kick(target)

    def _kill(self, name: str) -> None:
        """It is gone with all its KV; who was on it waits for orders, or goes on where it was to go."""
        lost = self.engines[name]
        lost.alive = False
        for job in list(self.jobs.values()):
            if job.source is lost:
                job.source, job.pinned = None, 0
                if job.engine is not None and job.engine.alive:
                    self.agenda.again(job, job.engine)
            if job.engine is lost:
                lost.strand(job)
                if job.target is not None:
                    (leg, target), job.target = job.target, None
                    self._stranded(job, leg, target)
