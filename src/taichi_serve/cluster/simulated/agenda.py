"""The virtual clock: what happens next, the steps of the engines, and KV on its way between them.

One heap of (time, tie counter, what, whom): the tie counter makes equal times come in the order they were
made, so the same calls give the same facts, byte for byte.
"""

from __future__ import annotations

from enum import IntEnum
from heapq import heappush

from taichi_serve.cluster.simulated.engine import Engine
from taichi_serve.cluster.simulated.job import Job, Where
from taichi_serve.cluster.simulated.link import Link

LEASE = 30.0  # seconds that blocks stay pinned for a pull that does not begin (vLLM's kv_lease_duration)


class Due(IntEnum):
    """What the heap holds."""

    ARRIVAL = 0
    STEP = 1
    LANDING = 2
    LEASE = 3
    FACT = 4


class Agenda:
    """Time, and what it will bring."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.now = 0.0
        self.heap: list[tuple[float, int, Due, object]] = []
        self.telling: Engine | None = None  # whose facts are being told: it plans when all are out
        self._tie = 0

    def push(self, at: float, due: Due, what: object) -> None:
        """Something will happen."""
        self._tie += 1
        heappush(self.heap, (at, self._tie, due, what))

    # ------------------------------------------------------------------------------------------- steps

    def kick(self, engine: Engine) -> None:
        """An engine with nothing in flight starts at once."""
        if engine.current is None and engine.alive and not engine.silent and engine is not self.telling:
            self.advance(engine)

    def still(self, engine: Engine, on: bool) -> None:
        """The engine stands still, or goes on with the step that it stood still in."""
        if not engine.alive:
            return
        engine.silent = on
        if not on and engine.stalled:
            engine.stalled = False
            self.push(self.now, Due.STEP, engine)
        elif not on:
            self.kick(engine)

    def advance(self, engine: Engine) -> None:
        """Begin the engine's next step, and the transfers that it made room for."""
        step = engine.advance()
        if step is not None:
            self.push(self.now + step.seconds, Due.STEP, engine)
        if engine.pulls:
            for job in engine.pulls:
                assert job.source is not None
                tokens = job.prompt + job.made - 1
                at = self.link.landing(self.now, job.source.name, engine.name, tokens)
                self.push(at, Due.LANDING, (job, job.leg))
            engine.pulls.clear()

    # ---------------------------------------------------------------------------------------------- KV

    def pull(self, job: Job, source: Engine, target: Engine) -> None:
        """Pin the job's blocks on `source`, and let `target` ask for them as soon as it has room."""
        job.source, job.pinned = source, job.blocks
        self.expect(job, target)

    def expect(self, job: Job, target: Engine) -> None:
        """Let `target` ask for what is pinned, until the lease of this leg ends."""
        job.engine = target
        target.expect(job)
        self.push(self.now + LEASE, Due.LEASE, (job, job.leg))

    def land(self, job: Job, leg: int) -> None:
        """The job's KV has arrived."""
        engine = job.engine
        if job.where is Where.PULLING and job.leg == leg and engine is not None:
            self.unpin(job)
            engine.land(job)
            self.kick(engine)

    def expire(self, job: Job, leg: int) -> None:
        """If the pull has not begun by now, the source frees its blocks and the target computes again."""
        engine = job.engine
        if job.where is Where.INBOUND and job.leg == leg and engine is not None:
            self.unpin(job)
            self.again(job, engine)

    def again(self, job: Job, engine: Engine) -> None:
        """The KV cannot be had: compute it on the target, before anybody else's prompt."""
        engine.again(job)
        self.kick(engine)

    def unpin(self, job: Job) -> None:
        """Free what is pinned for the job on the instance it came from."""
        source, job.source = job.source, None
        if source is not None and source.alive:
            source.residents.free += job.pinned
            self.kick(source)
        job.pinned = 0
