"""What D-heavy instances did between two looks."""

from __future__ import annotations

from taichi_serve.messages import Stepped
from taichi_serve.tuning.steps import Done, Steps


def test_a_step_counts_as_often_as_it_has_decodes_until_it_was_asked_for() -> None:
    steps = Steps()
    steps.add(Stepped(1.0, "i1", 0.02, 128, 30, 1000))
    steps.add(Stepped(1.1, "i1", 0.01, 0, 10, 1000))
    # 30 times 20 ms and 10 times 10 ms are 17.5 ms each, with 96 prompt tokens; the SLO is 25 ms.
    done = steps.done(tpot=0.025)
    assert (round(done.pace, 9), done.prompts) == (0.7, 96.0)
    assert steps.done(tpot=0.025) == Done(0.0, 0.0)
