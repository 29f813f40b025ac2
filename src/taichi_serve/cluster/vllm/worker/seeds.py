"""Seeded requests whose prompt takes several steps, on a CPU.

vLLM's V1 runner draws a token for every row of a step, also for a prompt that is not complete (a chunk, or
what is computed again after a preemption), and takes the draw back afterwards by setting the offset of the
request's random generator. A CPU's generator has none: the worker dies ("CPU Generator does not use offset").
Here the generators of such rows are not there while tokens are drawn, so there is nothing to take back: what
comes out of those rows is thrown away in any case.
"""

from __future__ import annotations

from typing import Any

MARK = "_taichi_aside"


def draw_nothing_to_take_back(runner: Any) -> None:
    """Change this class of model runners, once."""
    if hasattr(runner, MARK):
        return
    setattr(runner, MARK, {})
    sample, keep = runner._sample, runner._bookkeeping_sync

    def _sample(self: Any, *args: Any, **options: Any) -> Any:
        generators, rows = self.input_batch.generators, self.input_batch.num_reqs
        discarded = self.discard_request_mask.np[:rows]
        aside = {row: generators[row] for row in list(generators) if row < rows and discarded[row]}
        setattr(self, MARK, aside)
        for row in aside:
            del generators[row]
        return sample(self, *args, **options)

    def _bookkeeping_sync(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return keep(self, *args, **options)
        finally:
            self.input_batch.generators.update(getattr(self, MARK))
            setattr(self, MARK, {})

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync
