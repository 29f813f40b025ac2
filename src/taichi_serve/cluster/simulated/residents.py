"""The blocks of an engine, and its resident decodes: how many, how much KV, who needs a block when, who ends
when.

All resident decodes move on together by one token a tick, so nothing here is counted token by token: joining,
leaving and a tick cost O(log n) whatever the crowd.
"""

from __future__ import annotations

from heapq import heappop, heappush

from taichi_serve.cluster.simulated.job import Job, Where
from taichi_serve.cluster.simulated.step import EngineShape


class Residents:
    """What decodes on one engine, and the blocks of all that is there."""

    def __init__(self, shape: EngineShape) -> None:
        self.block_size = shape.block_size
        self.blocks = shape.kv_capacity // shape.block_size
        self.free = self.blocks
        self.ticks = 0  # steps planned
        self.decodes = 0
        self.context = 0  # KV tokens of all decodes
        self._grown = -1  # the tick that blocks have been taken for
        self._phases = [
            0
        ] * shape.block_size  # decodes by the tick, modulo block size, that needs a new block
        self._finishing: list[tuple[int, int, Job]] = []
        self._tie = 0

    @property
    def used_tokens(self) -> int:
        """Blocks in use times block size."""
        return (self.blocks - self.free) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that this many tokens take."""
        return -(-tokens // self.block_size)

    def short(self) -> bool:
        """Whether the next tick needs more blocks than are free."""
        return self._phases[(self.ticks + 1) % self.block_size] > self.free

    def grow(self) -> None:
        """Take the blocks that the next tick needs."""
        self._grown = self.ticks + 1
        self.free -= self._phases[self._grown % self.block_size]

    def join(self, job: Job) -> None:
        """From the next tick on this job gets a token in each."""
        job.where = Where.RESIDENT
        job.since = self.ticks
        job.finish_tick = self.ticks + job.output - job.made
        self._phases[(self.ticks + 1 - job.computed) % self.block_size] += 1
        self._tie += 1
        heappush(self._finishing, (job.finish_tick, self._tie, job))
        self.decodes += 1
        self.context += job.computed

    def leave(self, job: Job) -> None:
        """This job stops being resident, with the tokens that were planned up to now."""
        phase = (job.since + 1 - job.computed) % self.block_size
        tokens = self.ticks - job.since
        job.computed += tokens
        job.made += tokens
        job.run, job.last = job.run + tokens, self.ticks
        job.blocks = -(-job.computed // self.block_size)
        if self._grown > self.ticks and phase == self._grown % self.block_size:
            job.blocks += 1
        self._phases[phase] -= 1
        self.decodes -= 1
        self.context -= job.computed

    def tick(self) -> list[Job]:
        """One token for every resident; returns those that leave because it was their last."""
        self.ticks += 1
        self.context += self.decodes
        finishing = self._finishing
        done: list[Job] = []
        while finishing and finishing[0][0] <= self.ticks:
            finish, _, job = heappop(finishing)
            # A job that left in the meantime has an entry that no longer counts.
            engine = job.engine
            mine = engine is not None and engine.residents is self
            if mine and job.where is Where.RESIDENT and job.finish_tick == finish:
                self.leave(job)
                job.where = Where.ENDING
                done.append(job)
        return done
