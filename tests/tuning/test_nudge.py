"""The fast loop: which chunk follows from which SLO is short."""

from __future__ import annotations

from taichi_serve.sliders import Sliders
from taichi_serve.tuning.nudge import ENOUGH, harmed, nudge
from taichi_serve.tuning.setting import Setting
from taichi_serve.tuning.steps import Done
from taichi_serve.tuning.watch import View

NOW = Setting(Sliders(2, 2, 1024, 256), 0.5, 0.8)


def view(ttft: float, tpot: float, count: int = 100) -> View:
    late, slow = 0.1 * (ttft > 1), 0.1 * (tpot > 1)
    return View(count, count, count, ttft, tpot, late, slow, 1 - late - slow)


def chunk(
    ttft: float, tpot: float, now: Setting = NOW, count: int = 100, done: Done | None = None
) -> int | None:
    found = nudge(view(ttft, tpot, count), done or Done(tpot), now, 2048)
    return None if found is None else found[0].sliders.d_chunk


def test_a_short_tpot_with_ttft_to_spare_makes_the_d_heavy_chunk_smaller() -> None:
    assert chunk(ttft=0.5, tpot=1.1) == 192


def test_a_short_ttft_with_tpot_to_spare_makes_it_larger() -> None:
    assert chunk(ttft=1.2, tpot=0.6) == 336  # 256 * 4 / 3, in blocks of 16


def test_two_slos_with_time_to_spare_leave_it_alone() -> None:
    assert chunk(ttft=0.7, tpot=0.7) is None


def test_two_short_slos_leave_it_alone() -> None:
    assert chunk(ttft=1.5, tpot=1.5) is None


def test_between_short_and_spare_nothing_happens() -> None:
    assert chunk(ttft=0.9, tpot=1.1) is None
    assert chunk(ttft=1.1, tpot=0.9) is None


def test_a_tpot_that_is_short_for_another_reason_than_long_steps_leaves_it_alone() -> None:
    assert chunk(ttft=0.5, tpot=1.3, done=Done(0.7)) is None
    assert chunk(ttft=0.5, tpot=1.3, done=Done(0.9)) == 192


def test_a_few_requests_say_nothing() -> None:
    assert chunk(ttft=0.5, tpot=1.1, count=ENOUGH - 1) is None
    assert chunk(ttft=0.5, tpot=1.1, count=ENOUGH) == 192


def test_the_chunk_stays_within_one_block_and_the_chunk_of_p_heavy_instances() -> None:
    small = Setting(Sliders(2, 2, 1024, 16), 0.5, 0.8)
    large = Setting(Sliders(2, 2, 1024, 1024), 0.5, 0.8)
    none = Setting(Sliders(2, 2, 1024, 0), 0.5, 0.8)
    assert chunk(ttft=0.5, tpot=1.1, now=small) is None
    assert chunk(ttft=0.5, tpot=1.1, now=none) is None
    assert chunk(ttft=1.2, tpot=0.6, now=large) is None


def test_a_chunk_that_prompts_fill_becomes_no_smaller_where_nobody_else_computes_them() -> None:
    alike = Setting(Sliders(0, 4, 1024, 128), 1.0, 0.8)
    # Of 96 tokens 95 % are 91.2: 85 a step fit, and of 100 a step a chunk of 112 carries 95 %.
    assert chunk(ttft=0.5, tpot=1.1, now=alike, done=Done(1.0, 85.0)) == 96
    assert chunk(ttft=0.5, tpot=1.1, now=alike, done=Done(1.0, 100.0)) == 112
    assert chunk(ttft=0.5, tpot=1.1, now=alike, done=Done(1.0, 125.0)) is None
    # P-heavy instances take what is left of them.
    split = Setting(Sliders(2, 2, 1024, 128), 0.5, 0.8)
    assert chunk(ttft=0.5, tpot=1.1, now=split, done=Done(1.0, 125.0)) == 96


def test_without_p_heavy_instances_the_one_chunk_grows_to_what_instances_can_take() -> None:
    alike = Setting(Sliders(0, 4, 0, 1800), 1.0, 0.8)
    assert chunk(ttft=1.2, tpot=0.6, now=alike) == 2048


def test_the_reason_says_how_much_of_either_slo_is_used() -> None:
    found = nudge(view(0.5, 1.1), Done(1.0), NOW, 2048)
    assert found is not None
    assert (
        found[1]
        == "TPOT is short and TTFT has time to spare: P90 at 50% of the TTFT and 110% of the TPOT SLO"
    )


def of(good: float, ttft: float, tpot: float = 0.99, slow: float = 0.04) -> int | None:
    """The chunk where so many are good, and 4 % of those under way are slow."""
    found = nudge(View(100, 100, 100, ttft, tpot, 0.0, slow, good), Done(tpot), NOW, 2048)
    return None if found is None else found[0].sliders.d_chunk


def test_where_nearly_all_are_good_no_chunk_becomes_smaller() -> None:
    assert of(good=0.96, ttft=0.3) is None
    assert of(good=0.94, ttft=0.3) == 192


def test_where_most_are_good_more_of_ttft_is_to_be_spare() -> None:
    assert of(good=0.92, ttft=0.7) is None  # it would be a queue soon
    assert of(good=0.88, ttft=0.7) == 192


def test_a_step_did_harm_where_too_few_are_good_and_fewer_than_before() -> None:
    def since(good: float, count: int = 100) -> View:
        return View(count, count, count, 1.0, 1.0, 0.0, 0.0, good)

    assert harmed(since(0.7), before=0.8)
    assert not harmed(since(0.77), before=0.8)  # nearly as many
    assert not harmed(since(0.91), before=0.99)  # enough
    assert not harmed(since(0.0, ENOUGH - 1), before=0.99)
