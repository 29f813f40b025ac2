"""A step on a CPU as one trip to the workers: what is sent when, and whose answer is taken."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from taichi_serve.cluster.vllm.core.executor import OneTrip, executor_of


class Workers:
    """Answer to each message what it is to be answered; a message whose answer nobody awaits is left."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any, bool]] = []
        self.answers: dict[str, Any] = {"execute_model": None, "sample_tokens": "tokens"}

    def answer(self, method: str, args: tuple[Any, ...], non_block: bool) -> Any:
        """As MultiprocExecutor.collective_rpc: a future where nobody waits."""
        self.sent.append((method, args[0], non_block))
        future: Future[Any] = Future()
        said = self.answers[method]
        if isinstance(said, Exception):
            future.set_exception(said)
        else:
            future.set_result(said)
        return future if non_block else future.result()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    made = Workers()

    def rpc(executor: Any, method: str, args: Any = (), non_block: bool = False, **more: Any) -> Any:
        return made.answer(method, args, non_block)

    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", rpc)
    return made


def executor() -> OneTrip:
    made = object.__new__(OneTrip)
    made.output_rank = 0
    made.kv_output_aggregator = made.ec_output_aggregator = None
    return made


def step(tokens: int, grammar: bool = False) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=tokens, has_structured_output_requests=grammar)


def test_what_is_computed_and_what_is_sampled_are_asked_for_before_either_answer(workers: Workers) -> None:
    ours, planned = executor(), step(5)
    computed = ours.execute_model(planned, non_block=True)
    assert workers.sent == [("execute_model", planned, True), ("sample_tokens", None, True)]
    assert computed.result() is None  # which makes the core ask for what is sampled
    assert ours.sample_tokens(None) == "tokens"
    assert len(workers.sent) == 2
    assert ours._trip is None


def test_a_step_with_a_grammar_is_sampled_when_its_mask_is_known(workers: Workers) -> None:
    ours, planned = executor(), step(5, grammar=True)
    assert ours.execute_model(planned, non_block=True).result() is None
    assert [sent[0] for sent in workers.sent] == ["execute_model"]
    assert ours.sample_tokens("mask") == "tokens"
    assert workers.sent[1] == ("sample_tokens", "mask", False)


def test_of_a_step_without_tokens_nothing_is_sampled(workers: Workers) -> None:
    ours = executor()
    workers.answers["execute_model"] = "only what the connector says"
    assert ours.execute_model(step(0), non_block=True).result() == "only what the connector says"
    assert [sent[0] for sent in workers.sent] == ["execute_model"]


def test_who_waits_for_the_computed_is_answered_as_before(workers: Workers) -> None:
    assert executor().execute_model(step(5)) is None
    assert [sent[0] for sent in workers.sent] == ["execute_model"]


def test_what_goes_wrong_while_it_is_computed_is_raised_with_the_output(
    workers: Workers,
) -> None:
    ours = executor()
    workers.answers["execute_model"] = RuntimeError("Worker failed with error 'out of memory'")
    ours.execute_model(step(5), non_block=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.sample_tokens(None)
    workers.answers["execute_model"] = None
    ours.execute_model(step(5), non_block=True)
    assert ours.sample_tokens(None) == "tokens"  # of this step, not of the one before


def test_a_model_that_answers_with_its_output_at_once_is_taken_by_its_word(workers: Workers) -> None:
    ours = executor()
    workers.answers["execute_model"] = "output"
    ours.execute_model(step(5), non_block=True)
    assert ours.sample_tokens(None) == "output"


@pytest.mark.parametrize(
    ("chosen", "stages", "expected"),
    [(MultiprocExecutor, 1, OneTrip), (MultiprocExecutor, 2, MultiprocExecutor), (str, 1, str)],
)
def test_only_vllms_executor_for_the_workers_of_one_host_is_replaced(
    chosen: type[Any], stages: int, expected: type[Any]
) -> None:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=stages))
    assert executor_of(config, chosen) is expected
