"""What one scheduled step holds until its output is there, and what is told of it then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from taichi_serve.cluster.vllm.wire import MovedIn, News, Record

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from taichi_serve.cluster.vllm.core.cached import CachedBlocks


class Step(NamedTuple):
    """One step that was scheduled. Times are time.monotonic()."""

    scheduled_at: float
    prefill_tokens: int
    decodes: int
    moved_in: dict[str, MovedIn]  # by engine id
    reading: list[str]  # legs that it reads KV for, or whose last blocks it waits for

    def told(self, since: float, held: int, news: dict[str, News], cached: CachedBlocks) -> Record:
        """The record of it, now that it is done; the step before was done at `since`."""
        now = time.monotonic()
        seconds = now - max(self.scheduled_at, since)
        caching = cached.take(), cached.take_host()
        return Record(now, seconds, self.prefill_tokens, self.decodes, held, self.moved_in, news, *caching)


class Arrivals:
    """Requests that are moving in: when they came, when their KV was here, when they went into a step."""

    def __init__(self) -> None:
        self._arrived: dict[str, float] = {}
        self._landed: dict[str, float] = {}
        self._before = 0.0  # when the last step with anything in it was scheduled

    def __len__(self) -> int:
        return len(self._arrived) + len(self._landed)

    def came(self, leg: str, at: float) -> None:
        """The request is here."""
        self._arrived[leg] = at

    def landed(self, leg: str, at: float) -> None:
        """Its KV is."""
        if leg in self._arrived:
            self._landed[leg] = at

    def forget(self, leg: str) -> None:
        """It is over."""
        self._arrived.pop(leg, None)
        self._landed.pop(leg, None)

    def in_step(
        self, output: SchedulerOutput, now: float, pulled: dict[str, tuple[int, float]]
    ) -> dict[str, MovedIn]:
        """Those of this step, by leg. `pulled`: how many of their tokens come from the instance before, and
        since when; what is told here is taken out of it."""
        found: dict[str, MovedIn] = {}
        for new in output.scheduled_new_reqs:
            if (arrived := self._arrived.pop(new.req_id, None)) is None:
                continue
            tokens, began = pulled.pop(new.req_id, (0, arrived))
            reused, landed = new.num_computed_tokens, self._landed.pop(new.req_id, began)
            found[new.req_id] = MovedIn(
                reused, min(tokens, reused), arrived, began, landed, self._before, now
            )
        self._before = now if output.total_num_scheduled_tokens else self._before
        return found
