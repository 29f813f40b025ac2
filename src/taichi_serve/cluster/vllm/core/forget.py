"""Whoever asked for what an engine core has under way is gone: all of it ends, and nothing is held.

What the prefix cache has stays there. Blocks that somebody writes into just now come back when that is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.core.scheduler import FlowScheduler


def forget(scheduler: FlowScheduler) -> None:
    """End every request and let go of every block. Questions that wait for an answer get none."""
    for leg in list(scheduler.requests):
        scheduler.drop(leg)
    readers = scheduler.prefixes.forget()
    scheduler.release(list(scheduler.requests), list(readers))
    scheduler._reads.nobody_asks()
    scheduler._side.again()
