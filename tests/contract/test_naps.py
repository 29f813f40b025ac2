"""What naps between two looks rely on (decision 141): vLLM's readers yield by a name of their module."""

from __future__ import annotations

import time
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm.distributed.device_communicators import shm_broadcast  # noqa: E402


def test_for_a_second_after_a_message_a_reader_yields_by_the_name_that_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    naps: list[None] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: naps.append(None))
    condition: Any = object.__new__(shm_broadcast.SpinCondition)
    condition.is_reader, condition.busy_loop_s, condition.last_read = True, 1.0, time.monotonic() + 60
    condition.wait()
    assert len(naps) == 1
