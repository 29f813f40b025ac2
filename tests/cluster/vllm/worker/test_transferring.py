"""A transfer that failed is over when nothing can be written for it any more, and not before."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.worker.connector import Transferring


class Agent:
    """It answers as it is told to; `busy` is how often it refuses to let go of a handle."""

    def __init__(self, states: list[str], busy: int = 0) -> None:
        self.states, self.busy, self.released = states, busy, 0

    def transfer(self, handle: str) -> None:
        if self.states[0] == "refused":
            raise RuntimeError("backend")

    def check_xfer_state(self, handle: str) -> str:
        state = self.states.pop(0)
        if state == "gone":
            raise RuntimeError("remote disconnected")
        return state

    def release_xfer_handle(self, handle: str) -> None:
        if self.busy:
            self.busy -= 1
            raise RuntimeError("in use")
        self.released += 1


def test_one_that_went_well_is_over_once_its_handle_is_released() -> None:
    agent = Agent(["PROC", "DONE"])
    one = Transferring(agent, "handle")
    assert [one.over(), one.over(), agent.released] == [False, True, 1]


@pytest.mark.parametrize("state", ["ERR", "gone", "refused"])
def test_one_that_failed_is_not_over_while_its_handle_cannot_be_released(state: str) -> None:
    agent = Agent([state], busy=2)
    one = Transferring(agent, "handle")
    assert [one.over(), one.over(), agent.released] == [False, False, 0]
    with pytest.raises(OSError, match="the transfer ended as"):
        one.over()
    assert agent.released == 1
