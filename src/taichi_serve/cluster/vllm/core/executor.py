"""On a CPU a step is one trip to the workers and back (decision 145).

Without asynchronous scheduling, which vLLM has not on a CPU, its engine core asks the workers to compute,
waits for their word that they did, asks them to sample, and waits again. The second message does not depend
on the first answer unless a grammar holds a request of the step, so both are sent at once.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


def executor_of(config: VllmConfig, chosen: type[Any]) -> type[Any]:
    """The executor for the core of a CPU, where vLLM has chosen this one: ours in place of its own for one
    host, unless the layers of the model are on several workers, of which only the last one samples."""
    alone = config.parallel_config.pipeline_parallel_size == 1
    return OneTrip if chosen is MultiprocExecutor and alone else chosen


class OneTrip(MultiprocExecutor):
    """vLLM's own, which sends what is to be sampled along with what is to be computed where it can."""

    _trip: tuple[Future[Any], Future[Any]] | None = None  # what was sent together, and is not taken yet

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """vLLM's own, or a future that is done: its answer is taken with that of `sample_tokens`."""
        computed = super().execute_model(scheduler_output, non_block)
        empty = not scheduler_output.total_num_scheduled_tokens  # is answered at once, and nothing sampled
        if not non_block or empty or scheduler_output.has_structured_output_requests:
            return computed
        self._trip = cast("Future[Any]", computed), cast("Future[Any]", super().sample_tokens(None, True))
        gone: Future[None] = Future()
        gone.set_result(None)
        return gone

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """The output of the step. What went wrong while it was computed is raised here."""
        if self._trip is None:
            return super().sample_tokens(grammar_output, non_block)
        assert grammar_output is None
        (computed, sampled), self._trip = self._trip, None
        output = computed.result()
        return sampled.result() if output is None else output
