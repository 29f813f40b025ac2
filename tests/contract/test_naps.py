"""What naps between two looks, and a step that is one trip, rely on (decisions 141 and 145)."""

from __future__ import annotations

import inspect
import time
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm.distributed.device_communicators import shm_broadcast  # noqa: E402


def test_a_reader_that_finds_nothing_asks_its_condition_to_wait_and_tells_it_of_each_message() -> None:
    source = inspect.getsource(shm_broadcast.MessageQueue.acquire_read)
    assert "self._spin_condition.wait(timeout_ms=" in source
    assert "self._spin_condition.record_read()" in source


def test_a_condition_knows_when_the_last_message_came_and_for_how_long_after_it_readers_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[None] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: looks.append(None))
    condition: Any = object.__new__(shm_broadcast.SpinCondition)
    condition.is_reader, condition.busy_loop_s, condition.last_read = True, 1.0, 0.0
    condition.record_read()
    assert condition.last_read == pytest.approx(time.monotonic(), abs=60)
    condition.wait()
    assert len(looks) == 1


def test_without_asynchronous_scheduling_a_core_asks_to_sample_once_what_was_computed_answers_none() -> None:
    core = pytest.importorskip("vllm.v1.engine.core")
    source = " ".join(inspect.getsource(core.EngineCore.step).split())
    assert "future = self.model_executor.execute_model(scheduler_output, non_block=True)" in source
    assert (
        "model_output = future.result() if model_output is None: "
        "model_output = self.model_executor.sample_tokens(grammar_output)"
    ) in source
    scheduler = pytest.importorskip("vllm.v1.core.sched.scheduler").Scheduler
    mask = inspect.getsource(scheduler.get_grammar_bitmask)
    assert "if not scheduler_output.has_structured_output_requests:\n            return None" in mask


def test_workers_take_their_messages_in_order_and_answers_are_taken_in_order() -> None:
    executor = pytest.importorskip("vllm.v1.executor.multiproc_executor")
    assert "self.futures_queue.pop()" in inspect.getsource(executor.FutureWrapper.result)
    assert "appendleft(self)" in inspect.getsource(executor.FutureWrapper.__init__)
    for name in ("execute_model", "sample_tokens"):
        method = getattr(executor.MultiprocExecutor, name)
        assert "non_block" in inspect.signature(method).parameters
        assert "self.collective_rpc(" in inspect.getsource(method)
