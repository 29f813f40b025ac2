"""Whoever asked for what an engine core has under way is gone: all of it ends, and nothing is held.

In two steps, because a source holds what somebody may read until it is told (decision 118), and others may
hear of it later: what they read meanwhile would be in their prefix caches. First each one ends its requests.
When nothing is read in any of them any more, each lets go of what it holds. What prefix caches have stays.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.core.scheduler import FlowScheduler


def stop(scheduler: FlowScheduler) -> None:
    """End every request. Questions that wait for an answer get none."""
    for leg in list(scheduler.requests):
        scheduler.drop(leg)
    scheduler.prefixes.nobody_asks()
    scheduler._reads.nobody_asks()
    scheduler._side.again()


def stopped(scheduler: FlowScheduler) -> Future[bool] | bool:
    """True when nothing is read from others any more, nor written into blocks here: at once, or later."""
    return scheduler._reads.none()


def let_go(scheduler: FlowScheduler) -> None:
    """Nobody reads here any more: hold nothing for anybody."""
    scheduler.release(list(scheduler.requests), scheduler._pins.readers())
