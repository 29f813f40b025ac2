"""Who is on an engine in miniature, in which of its lists, and how requests come and go."""

from __future__ import annotations

from collections import deque

from taichi_serve.cluster.simulated.cache import PrefixCache
from taichi_serve.cluster.simulated.job import Job, Where
from taichi_serve.cluster.simulated.residents import Residents
from taichi_serve.cluster.simulated.step import EngineShape, Step, Truth
from taichi_serve.messages import Cached
from taichi_serve.stage import Stage

BEFORE_ALL = float("-inf")  # the place of what was running already


class Roster:
    """The lists of one engine, and its blocks. A job is in the list that its `where` says and in no other."""

    def __init__(self, name: str, chunk: int, shape: EngineShape, truth: Truth) -> None:
        self.name = name
        self.chunk = chunk
        self.truth = truth
        self.max_running = shape.max_running
        self.alive = True
        self.silent = False  # it stands still: a step that was to end does not, and none begins
        self.stalled = False  # its step was to end meanwhile
        self.residents = Residents(shape)
        self.cache = PrefixCache(shape.host_kv // shape.block_size)
        self.current: Step | None = None  # in flight
        self.next: Step | None = None  # planned, begins when the current one is done
        self.waiting: deque[Job] = deque()
        self.inbound: deque[Job] = deque()  # wait for blocks to be pulled into
        self.landed: deque[Job] = deque()
        self.partial: list[Job] = []  # of whose prompt a part is computed, oldest first
        self.running: dict[Job, None] = {}  # partial and decoding, oldest first
        self.leaving: list[Job] = []  # told to flow since the last plan
        self.pulls: list[Job] = []  # got their blocks in the last plan: the cluster starts their transfer
        self.reads: list[tuple[Job, int]] = []  # are to get so many tokens from the host
        self.missing: dict[Job, None] = {}  # preempted while decoding, not yet computed again

    @property
    def queued(self) -> int:
        """Requests that wait here for a prefill or for room."""
        return len(self.waiting) + len(self.inbound)

    # ------------------------------------------------------------------------------------------ coming

    def queue(self, job: Job, first: bool = False) -> None:
        """The prompt waits here, in its place or before all others."""
        job.enter(Stage.PREFILLING)
        job.where, job.run = Where.QUEUED, 0
        if first:
            self.precede(job)
        else:
            self.line_up(job)

    def precede(self, job: Job) -> None:
        """It waits here before all others, whoever comes."""
        job.by = BEFORE_ALL
        self.waiting.appendleft(job)

    def put_off(self, job: Job, by: float) -> None:
        """A prompt is best effort from now on; it takes another place where it waits, at once or once it is
        preempted."""
        job.best_effort = True
        if job.by == BEFORE_ALL:
            return
        job.by = by
        if job.where is Where.QUEUED:
            self.waiting.remove(job)
            self.line_up(job)

    def line_up(self, job: Job) -> None:
        """It waits in its place, behind those with the same one."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].by > job.by:
            place -= 1
        self.waiting.insert(place, job)

    def expect(self, job: Job) -> None:
        """The job's KV is to be pulled to this engine as soon as there is room."""
        job.enter(Stage.LANDING)
        job.where, job.run = Where.INBOUND, 0
        self.inbound.append(job)

    def keep(self, job: Job) -> None:
        """The next leg of a job whose blocks are here is here too."""
        job.enter(Stage.LANDING)
        self.land(job)

    def land(self, job: Job) -> None:
        """The job's KV is here: prompt and tokens so far, but for the last one, are computed."""
        job.computed = job.prompt + job.made - 1
        if job.hashes:
            self.fill(job)
        job.where, job.run = Where.LANDED, 0
        self.landed.append(job)

    def again(self, job: Job) -> None:
        """Its KV cannot be had, or not be kept: compute it here, before anybody else's prompt."""
        self._unlist(job)
        self.give(job.blocks, job.named)
        job.pulled, job.cached, job.fetched = False, -1, 0
        job.restart()
        self.queue(job, first=True)

    # ------------------------------------------------------------------------------------------ blocks

    def give(self, blocks: int, named: list[int]) -> None:
        """So many blocks are needed no more by a job; those that are findable stay so for a while."""
        if self.cache.idle:
            self.cache.trim(self.residents.free)
        self.residents.free += blocks - len(named) + (self.cache.give(named) if named else 0)

    def fill(self, job: Job) -> None:
        """Blocks of the job that are full are findable from now on."""
        full = min(job.computed // self.residents.block_size, len(job.hashes))
        for block in job.hashes[job.filled : full]:
            if self.cache.store(block):
                job.named.append(block)
        job.filled = max(job.filled, full)

    def tell(self, now: float) -> list[Cached]:
        """What its prefix cache stored and removed since it last told."""
        if not self.cache.used:
            return []
        self.cache.trim(self.residents.free)
        return self.cache.tell(now, self.name)

    def find(self, job: Job, blocks: int, most: int, spare: int) -> bool:
        """Give the job what the device has of its first `most` blocks, if all `blocks` that it will need
        would fit with `spare` left; nothing otherwise."""
        cache, residents = self.cache, self.residents
        cache.trim(residents.free)
        here = list(job.hashes[: cache.run(job.hashes, most)])
        if blocks - len(here) + cache.unused(here) > residents.free - spare:
            return False
        residents.free -= cache.take(here)
        job.named, job.filled, job.blocks = here, len(here), len(here)
        job.computed = len(here) * residents.block_size
        return True

    # ------------------------------------------------------------------------------------------- going

    def leave(self, job: Job) -> None:
        """A resident is planned no more; what was planned of it stays."""
        del self.running[job]
        self.residents.leave(job)
        if job.hashes:
            self.fill(job)

    def out(self, job: Job) -> int:
        """Output tokens of a job that is here, without those in steps that are not done."""
        ticks = self.residents.ticks
        done = ticks - sum(step is not None for step in (self.current, self.next))
        if job.where is Where.RESIDENT:
            more = ticks - job.since
            return job.made + more - max(0, min(job.run + more, ticks - done))
        return job.made - max(0, min(job.run, job.last - done))

    def release(self, job: Job) -> None:
        """The job is not here any more: its blocks are free, and of its tokens those stay that are out."""
        out = self.out(job)
        if job.where is Where.RESIDENT:
            self.leave(job)
        elif job.where is Where.COMPUTING:
            del self.running[job]
            self.partial.remove(job)
        self._unlist(job)
        if job in self.leaving:
            self.leaving.remove(job)
        self.missing.pop(job, None)
        self.give(job.blocks, job.named)
        job.made, job.run, job.missing = out, 0, False
        job.engine = job.where = None
        job.restart()

    def _unlist(self, job: Job) -> None:
        lists = {Where.QUEUED: self.waiting, Where.INBOUND: self.inbound, Where.LANDED: self.landed}
        if job.where in lists:
            lists[job.where].remove(job)
