"""The tables of states: what is legal is written down once, and anything else is an error with a name."""

import pytest

from taichi_serve.request import TRANSITIONS, Request, State
from taichi_serve.slo import SLO
from taichi_serve.stage import STAGES, Stage, TransitionError, step


def test_every_stage_and_every_state_has_its_row() -> None:
    assert set(STAGES) == set(Stage)
    assert set(TRANSITIONS) == set(State)


def test_from_every_stage_there_is_a_way_to_the_end_and_none_beyond_it() -> None:
    assert all(Stage.OVER in after for stage, after in STAGES.items() if stage is not Stage.OVER)
    assert STAGES[Stage.OVER] == TRANSITIONS[State.DONE] == frozenset()


def test_a_stage_that_must_not_follow_is_an_error_with_the_name_of_the_request() -> None:
    assert step("a", Stage.HELD, Stage.LANDING) is Stage.LANDING
    with pytest.raises(TransitionError, match="request a went from held to decoding"):
        step("a", Stage.HELD, Stage.DECODING)


def test_a_state_that_must_not_follow_is_an_error_with_the_name_of_the_request() -> None:
    request = Request("a", 0.0, 10, 10, SLO(1.0, 0.1), state=State.DECODING)
    with pytest.raises(TransitionError, match="request a went from decoding to prefilling"):
        request.enter(State.PREFILLING)
    assert request.state is State.DECODING
