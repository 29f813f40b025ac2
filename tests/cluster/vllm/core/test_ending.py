"""An engine core ends at once where it was asked to and computes nothing; else as vLLM has it end."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.core import EngineShutdownState

from taichi_serve.cluster.vllm.core.ending import end_at_once


class Ended(BaseException):
    """Stands for the end of the process."""


def ends(monkeypatch: pytest.MonkeyPatch, state: EngineShutdownState, work: bool) -> list[str]:
    """How a core in this state ends."""
    said: list[str] = []

    class Core:
        shutdown_state = state

        def has_work(self) -> bool:
            return work

        def shutdown(self) -> None:
            said.append("torn down")

    def leave(status: int) -> None:
        said.append(f"exit {status}")
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    kind: Any = Core
    end_at_once(kind)
    end_at_once(kind)  # a second time changes nothing
    with contextlib.suppress(Ended):
        Core().shutdown()
    return said


def test_a_core_that_was_asked_to_stop_and_is_idle_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, EngineShutdownState.SHUTTING_DOWN, work=False) == ["exit 0"]


@pytest.mark.parametrize(
    ("state", "work"),
    [
        (EngineShutdownState.RUNNING, False),  # it failed
        (EngineShutdownState.REQUESTED, False),  # it never came to its loop
        (EngineShutdownState.SHUTTING_DOWN, True),  # a step is under way
    ],
)
def test_every_other_core_is_torn_down_as_vllm_does_it(
    monkeypatch: pytest.MonkeyPatch, state: EngineShutdownState, work: bool
) -> None:
    assert ends(monkeypatch, state, work) == ["torn down"]
