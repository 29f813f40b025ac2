"""Who is asked, who is silent, who has stalled: seconds by hand. One may be silent for 120 s."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.pulse import Pulse, Verdict


def test_nobody_is_asked_who_spoke_within_a_second() -> None:
    pulse = Pulse(0.0, 120.0)
    pulse.heard(5.0, busy=True)
    assert pulse.look(5.9, 0.0) is None


def test_who_is_quiet_is_asked_once_until_the_answer_comes() -> None:
    pulse = Pulse(0.0, 120.0)
    assert pulse.look(1.0, 0.0) is Verdict.ASK
    assert pulse.look(2.0, 0.0) is None
    assert not pulse.answered(2.1)
    assert pulse.look(3.2, 0.0) is Verdict.ASK


def test_who_says_nothing_for_six_seconds_is_silent_and_stalls_after_the_stall_time() -> None:
    pulse = Pulse(0.0, 120.0)
    seen = [pulse.look(float(second), 0.0) for second in range(1, 121)]
    assert seen[0] is Verdict.ASK
    assert seen[5] is Verdict.SILENT
    assert seen[119] is Verdict.STALLED
    assert {*seen[1:5], *seen[6:119]} == {None}


def test_an_answer_ends_the_silence() -> None:
    pulse = Pulse(0.0, 120.0)
    pulse.look(1.0, 0.0)
    assert pulse.look(7.0, 0.0) is Verdict.SILENT
    assert pulse.answered(30.0)
    assert not pulse.silent
    assert pulse.look(30.5, 0.0) is None


def test_where_steps_take_four_seconds_one_of_ten_is_no_silence() -> None:
    pulse = Pulse(0.0, 120.0)
    for step in range(1, 5):
        pulse.heard(4.0 * step, busy=True)
    assert pulse.look(26.0, 0.0) is Verdict.ASK
    assert pulse.allowance == 12.0
    assert pulse.look(28.0, 0.0) is Verdict.SILENT


def test_one_stop_in_the_middle_of_a_step_makes_nobody_patient() -> None:
    pulse = Pulse(0.0, 120.0)
    for step in range(1, 90):
        pulse.heard(0.01 * step, busy=True)
    pulse.heard(60.0, busy=True)
    assert pulse.allowance == 6.0


def test_after_a_pause_of_the_server_an_answer_is_waited_for_anew() -> None:
    pulse = Pulse(0.0, 8.0)
    assert pulse.look(1.0, 0.0) is Verdict.ASK
    assert pulse.look(5.5, 0.0) is None
    # The clock counted half a second for it; whoever is asked has six seconds more.
    assert pulse.look(6.0, 6.0) is None
    assert pulse.look(11.9, 6.0) is None
    assert pulse.look(12.0, 6.0) is Verdict.STALLED  # eight seconds in all, six of them after the pause


def test_a_stall_time_below_the_limit_of_silence_is_obeyed() -> None:
    pulse = Pulse(0.0, 2.0)
    assert pulse.look(1.0, 0.0) is Verdict.ASK
    assert pulse.look(2.0, 0.0) is Verdict.STALLED


def test_a_question_that_failed_is_no_sign_of_life_and_is_asked_again() -> None:
    pulse = Pulse(0.0, 120.0)
    assert pulse.look(1.0, 0.0) is Verdict.ASK
    pulse.asked = False
    assert pulse.look(1.5, 0.0) is Verdict.ASK
    pulse.asked = False
    assert pulse.look(6.0, 0.0) is Verdict.SILENT
