"""A vLLM engine in miniature: who is in which step, who holds which blocks, and when a token is out.

It follows vLLM 0.32 (v1/core/sched/scheduler.py) with the step rule of TaiChi's scheduler class: a step takes
every resident decode and beside them up to `chunk` prompt tokens. Running requests go before waiting ones; KV
that has landed goes before prompts; waiting ones are served in the order they were given, equal ones in that
of arrival, and admitted only when all of their prompt fits; without a block one of the running requests is
preempted by the rule of preemption.py, and computed again.

Scheduling is asynchronous by one step: step k + 1 is planned when step k begins, so whatever an engine is
told while step k runs, or after its outputs, is seen by step k + 2.

What it is not: no speculative decoding, no encoder. A decode that leaves wastes no slot in
the step after its last token, which on vLLM it does.
"""

from __future__ import annotations

from taichi_serve.cluster.simulated.job import Job, Where
from taichi_serve.cluster.simulated.roster import Roster
from taichi_serve.cluster.simulated.step import Ends, Step
from taichi_serve.preemption import Rank, rank

RECOMPUTE_FLOOR = 128  # prompt tokens a step for what must be computed on an instance with chunk 0


class Engine(Roster):
    """One instance. The cluster tells it what has come; it plans steps and keeps its blocks."""

    def advance(self) -> Step | None:
        """Begin the step that was planned, plan the one after it, and return the step now in flight."""
        current = self.next
        if self.leaving:
            self._part(current)
        self.next = self._plan()
        if current is None and self.next is not None:
            current, self.next = self.next, self._plan()
        self.current = current
        if current is not None:
            current.seconds = self.truth.of(
                current.prefill_tokens, current.attention, current.decodes, current.context
            )
        return current

    def _part(self, current: Step | None) -> None:
        """Those told to flow are not planned any more; their leg ends with the token in flight."""
        later = []
        for job in self.leaving:
            if current is not None and job.where is Where.RESIDENT:
                self.leave(job)
                job.where = Where.ENDING
                current.ends.append((Ends.LEFT, job, job.leg))
            elif job.where is not Where.ENDING:  # else its last token is in flight: Finished crosses the Flow
                later.append(job)
        self.leaving = later

    def _plan(self) -> Step | None:
        """One step: resident decodes, then running prompts, then what has landed, then waiting prompts."""
        residents = self.residents
        step = Step()
        complete: list[Job] = []
        calm = True
        while residents.short():
            self._preempt()
            calm = False
        residents.grow()
        budget = self.chunk or RECOMPUTE_FLOOR
        if self.partial:
            room = self._go_on(step, budget, complete)
            calm = calm and room is not None
            budget = room or 0
        if calm:  # a step that preempts admits nobody
            if self.landed:
                self._take_landed(step)
            if (not self.inbound or self._start_pulls()) and self.waiting:
                self._admit(step, budget, complete)
        if not residents.decodes and not step.prefill_tokens:
            return self._plan() if self._yield() else None
        self._tick(step, complete)
        return step

    def _yield(self) -> bool:
        """Nothing can be done for want of room: the youngest prompt that got blocks before its turn, for KV
        that was fetched, gives them back. Whether there was one."""
        for job in reversed(self.waiting):
            if job.blocks and not job.reading:
                self.give(job.blocks, job.named)
                job.restart()
                return True
        return False

    def _tick(self, step: Step, complete: list[Job]) -> None:
        """Every resident gets its token; then those whose prompt is complete get their first one here."""
        step.decodes = self.residents.decodes
        for job in self.residents.tick():
            del self.running[job]
            if job.hashes:
                self.fill(job)
            step.ends.append((Ends.LAST, job, job.leg))
        step.context = self.residents.context
        for job in complete:
            self._first_token(step, job)
        if self.missing:
            step.missed = tuple(job.id for job in self.missing)

    def _first_token(self, step: Step, job: Job) -> None:
        """The prompt (or what had to be computed again) is through: its next token comes out of this step."""
        job.made += 1
        job.run, job.last = 1, self.residents.ticks
        if job.missing:
            job.missing = False
            del self.missing[job]
        else:
            step.ends.append((Ends.FIRST if job.made == 1 else Ends.FLOWED, job, job.leg))
        if job.made >= job.output:
            job.hand_over = False
            del self.running[job]
            job.where = Where.ENDING
            step.ends.append((Ends.LAST, job, job.leg))
        elif job.hand_over:
            del self.running[job]
            job.where = Where.ENDING
        else:
            self.residents.join(job)

    # --------------------------------------------------------------------------------- who is in the step

    def _go_on(self, step: Step, budget: int, complete: list[Job]) -> int | None:
        """Go on with prompts begun before; the budget left, or None when somebody had to be preempted."""
        calm = True
        for job in self.partial[:]:
            if budget <= 0:
                break
            take = min(budget, job.need - job.computed)
            while job.where is Where.COMPUTING and not self._take_blocks(job, job.computed + take):
                self._preempt()
                calm = False
            if job.where is Where.COMPUTING:
                self._compute(step, job, take, complete)
                budget -= take
        self.partial = [job for job in self.partial if job.computed < job.need]
        return budget if calm else None

    def _take_landed(self, step: Step) -> None:
        """A request whose KV is here computes its last token and emits the next: it goes first."""
        while self.landed and len(self.running) < self.max_running:
            job = self.landed[0]
            if not self._take_blocks(job, job.computed + 1):
                if self.running or len(self.landed) == 1:
                    return  # somebody's blocks will come free
                self.again(self.landed[-1])
                continue
            self.running[job] = None
            self.residents.join(job)
            step.ends.append((Ends.FLOWED, job, job.leg))
            self.landed.popleft()

    def _start_pulls(self) -> bool:
        """Give blocks to those that come from elsewhere; False when the first in line has to wait for
        room."""
        residents = self.residents
        promised = sum(residents.blocks_for(job.need) - job.blocks for job in self.partial)
        while self.inbound:
            job = self.inbound[0]
            blocks = residents.blocks_for(job.prompt + job.made)
            if job.hashes:
                if not self.find(job, blocks, (job.prompt + job.made - 1) // residents.block_size, promised):
                    return False
                job.local = job.computed
            elif blocks > residents.free - promised:
                return False
            residents.free -= blocks - job.blocks
            job.blocks = blocks
            job.where = Where.PULLING
            self.pulls.append(job)
            self.inbound.popleft()
        return True

    def _admit(self, step: Step, budget: int, complete: list[Job]) -> None:
        """Take waiting prompts in their order, each only if all of it would fit; those whose KV is on
        its way keep their place."""
        passed: list[Job] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            job = self.waiting[0]
            if job.hashes and not self._look_up(job):
                break
            if job.reading:
                passed.append(self.waiting.popleft())
                continue
            if self.residents.blocks_for(job.need) - job.blocks > self.residents.free:
                break
            take = min(budget, job.need - job.computed)
            budget -= take
            self._take_blocks(job, job.computed + take)
            self.running[job] = None
            job.where = Where.COMPUTING
            self._compute(step, job, take, complete)
            if job.computed < job.need:
                self.partial.append(job)
            self.waiting.popleft()
        self.waiting.extendleft(reversed(passed))

    def _look_up(self, job: Job) -> bool:
        """Give a prompt what the device has of it, and have what follows read from the host; False where
        there is no room for all of it."""
        if job.reading or job.blocks:
            return True
        cache, size = self.cache, self.residents.block_size
        most = (job.need - 1) // size  # at least the last token is computed
        if not self.find(job, self.residents.blocks_for(job.need), most, 0):
            return False
        here = len(job.named)
        found = cache.run_on_host(job.hashes, most, here)
        if found > here:
            self.residents.free -= found - here
            cache.trim(self.residents.free)
            job.blocks, job.reading = found, True
            self.reads.append((job, (found - here) * size))
        if job.cached < 0:
            job.cached = found * size
        return True

    def _compute(self, step: Step, job: Job, take: int, complete: list[Job]) -> None:
        """Put `take` prompt tokens of this job into the step."""
        step.prefill_tokens += take
        step.attention += take * job.computed + take * (take + 1) * 0.5
        job.computed += take
        if job.hashes:
            self.fill(job)
        if job.computed == job.need:
            complete.append(job)

    def _take_blocks(self, job: Job, tokens: int) -> bool:
        """Give the job the blocks for this many tokens, or nothing if they are not free."""
        more = self.residents.blocks_for(tokens) - job.blocks
        if more > self.residents.free:
            return False
        if more > 0:
            self.residents.free -= more
            job.blocks += more
        return True

    def _preempt(self) -> None:
        """Of those that run the one with the highest rank, of equals the youngest, loses its blocks and waits
        to be computed again: before all others, but for best effort, which has its place among them."""
        job = max(reversed(self.running), key=_rank)
        if job.where is Where.RESIDENT:
            self.leave(job)
            job.missing = True
            self.missing[job] = None
        else:
            self.partial.remove(job)
            del self.running[job]
        self.give(job.blocks, job.named)
        job.restart()
        job.where = Where.QUEUED
        if job.best_effort:
            self.line_up(job)
        else:
            self.precede(job)


def _rank(job: Job) -> Rank:
    # Before its first token one that is bound can begin elsewhere.
    bound = job.bound and job.made > 0
    return rank(best_effort=job.best_effort, bound=bound, prompt=job.where is Where.COMPUTING)
