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
    READ = 5
    TURN = 6


class Agenda:
    """Time, and what it will bring."""

    def __init__(self, link: Link, host: Link) -> None:
        """`link` is between instances, `host` between an instance and the memory of its host."""
        self.link = link
        self.host = host
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
                tokens = job.prompt + job.made - 1 - job.local
                at = self.link.landing(self.now, job.source.name, engine.name, tokens)
                self.push(at, Due.LANDING, (job, job.leg))
            engine.pulls.clear()
        if engine.reads:
            for job, tokens in engine.reads:
                at = self.host.landing(self.now, engine.name, engine.name, tokens)
                self._expect_read(job, at)
            engine.reads.clear()

    def _expect_read(self, job: Job, at: float) -> None:
        job.read += 1
        self.push(at, Due.READ, (job, job.read))

    # ---------------------------------------------------------------------------------------------- KV

    def pull(self, job: Job, source: Engine, target: Engine) -> None:
        """Pin the job's blocks on `source`, and let `target` ask for them as soon as it has room."""
        job.pin(source)
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
        source, blocks, named = job.source, job.pinned, job.pinned_named
        job.drop_pinned()
        if source is not None and source.alive:
            source.give(blocks, named)
            self.kick(source)

    # ------------------------------------------------------------------------------------------ prefixes

    def fetch(self, job: Job, lender: Engine, engine: Engine, tokens: int) -> None:
        """Copy what `engine` lacks of the first `tokens` of a prompt that waits there from the prefix cache
        of `lender`, as far as it has them, if there is room; the rest is computed."""
        size = engine.residents.block_size
        most = min(tokens, job.need - 1) // size
        lender.cache.trim(lender.residents.free)
        there = lender.cache.run(job.hashes, most)
        has = lender.cache.run_on_host(job.hashes, most, there)
        engine.cache.trim(engine.residents.free)
        local = engine.cache.run(job.hashes, most)
        if has <= local or not lender.alive or lender.silent or not engine.find(job, has, local, 0):
            return
        engine.residents.free -= has - local
        engine.cache.trim(engine.residents.free)
        job.blocks, job.reading, job.lender = has, True, lender
        job.lent = list(job.hashes[local:there])
        lender.residents.free -= lender.cache.take(job.lent)
        job.cached, job.fetched = has * size, (has - local) * size
        self._expect_read(job, self.link.landing(self.now, lender.name, engine.name, job.fetched))

    def arrive(self, job: Job, read: int) -> None:
        """KV that a prompt waited for is here."""
        engine = job.engine
        if job.reading and job.read == read and engine is not None:
            job.computed = job.blocks * engine.residents.block_size
            engine.fill(job)
            self.stop_reading(job)
            self.kick(engine)

    def stop_reading(self, job: Job) -> None:
        """It waits for no KV any more: what was pinned for it where it was fetched from is not."""
        lender, lent = job.lender, job.lent
        job.reading, job.lender, job.lent = False, None, []
        if lender is not None and lender.alive:
            lender.give(len(lent), lent)
            self.kick(lender)

    def miss(self, job: Job) -> None:
        """The lender is lost while it was read: what did not come is computed."""
        engine = job.engine
        self.stop_reading(job)
        if engine is not None:
            job.cached, job.fetched = len(job.named) * engine.residents.block_size, 0
            engine.give(job.blocks - len(job.named), [])
            job.blocks = len(job.named)
            self.kick(engine)
