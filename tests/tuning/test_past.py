"""The last requests as a workload to rehearse."""

from __future__ import annotations

from taichi_serve.tuning.past import BLOCKS, Sort, past_of, quiet, stretch
from taichi_serve.tuning.watch import Seen


def ended(at: float, prompt: int, output: int, cached: int = 0, blocks: tuple[int, ...] = ()) -> Seen:
    return Seen(f"r{at:g}", at, prompt, 4096, blocks, at + 1.0, at + 2.0, output, cached)


def live(at: float, prompt: int = 100) -> Seen:
    return Seen(f"r{at:g}", at, prompt, 4096, (), at + 1.0)


def test_requests_that_ended_come_again_as_they_were_from_time_nought() -> None:
    past = past_of([ended(10.0, 100, 20), ended(14.0, 300, 5)], 20.0, 8192, lambda _: 0)
    assert past is not None
    assert [(c.at, c.prompt_tokens, c.output_tokens) for c in past.calls] == [(0.0, 100, 20), (4.0, 300, 5)]
    assert past.span == 10.0
    assert past.rate == 0.2


def test_one_under_way_gets_the_length_of_one_that_was_longer() -> None:
    seen = [ended(0.0, 100, 10), ended(1.0, 100, 40), live(2.0)]
    past = past_of(seen, 3.0, 8192, lambda _: 20)
    assert past is not None
    assert past.calls[2].output_tokens == 40


def test_one_that_is_longer_than_all_gets_twice_what_it_has() -> None:
    past = past_of([ended(0.0, 100, 10), live(2.0)], 3.0, 8192, lambda _: 20)
    assert past is not None
    assert past.calls[1].output_tokens == 40


def test_nothing_is_known_of_answers_before_one_has_ended() -> None:
    assert past_of([live(0.0), live(1.0)], 3.0, 8192, lambda _: 20) is None


def test_no_request_is_longer_than_instances_can_take() -> None:
    past = past_of([ended(0.0, 900, 500)], 3.0, 1000, lambda _: 0)
    assert past is not None
    assert (past.calls[0].prompt_tokens, past.calls[0].output_tokens) == (900, 100)


def test_prefixes_are_rehearsed_only_where_some_were_shared() -> None:
    blocks = (1, 2, 3)
    alone = past_of([ended(0.0, 48, 5, 0, blocks)], 3.0, 1000, lambda _: 0)
    shared = past_of([ended(0.0, 48, 5, 32, blocks)], 3.0, 1000, lambda _: 0)
    assert alone is not None
    assert shared is not None
    assert (alone.shares, shared.shares) == (False, True)


def test_a_request_that_comes_again_shares_nothing_with_itself() -> None:
    past = past_of([ended(0.0, 48, 5, 32, (1, 2, 3))], 2.0, 1000, lambda _: 0)
    assert past is not None
    first, second = past.again(2.0, 2)
    assert (first.at, second.at) == (0.0, 1.0)  # twice as fast
    assert first.blocks == (1, 2, 3)
    assert not set(first.blocks) & set(second.blocks)


def test_of_long_shared_prompts_the_last_are_rehearsed() -> None:
    many = tuple(range(BLOCKS // 2))
    seen = [ended(float(n), 48, 5, 32, many) for n in range(5)]
    past = past_of(seen, 6.0, 1000, lambda _: 0)
    assert past is not None
    assert len(past.calls) == 2


def test_another_sort_of_requests_is_told_by_their_lengths() -> None:
    chat = [ended(n * 0.1, 200 + n, 20) for n in range(100)]
    long = [ended(n * 0.1, 4000 + n, 20) for n in range(60)]
    assert Sort.of(long, 6.0).differs(Sort.of(chat, 10.0))
    assert not Sort.of(chat[50:], 5.0).differs(Sort.of(chat, 10.0))


def test_another_rate_is_told_once_it_is_certain() -> None:
    usual = Sort.of([ended(n * 0.1, 200 + n % 7, 20) for n in range(200)], 20.0)
    twice = [ended(n * 0.05, 200 + n % 7, 20) for n in range(200)]
    assert Sort.of(twice, 10.0).differs(usual)
    assert not Sort.of(twice[:6], 0.3).differs(usual)


def test_bursts_are_no_other_rate() -> None:
    """Ten requests at once every 5 s: 60 in 20 s, where 40 are usual, say nothing of the rate."""
    bursts = [ended(n // 10 * 5.0 + n % 10 * 0.01, 200, 20) for n in range(200)]
    six = [ended(n // 10 * 3.5 + n % 10 * 0.01, 200, 20) for n in range(60)]
    even = [ended(n * 0.33, 200, 20) for n in range(60)]
    usual = Sort.of(bursts, 100.0)
    assert usual.burst > 4
    assert not Sort.of(six, 20.0).differs(usual)
    assert Sort.of(even, 20.0).rate == Sort.of(six, 20.0).rate


def paused() -> list[Seen]:
    """Ten a second for 20 s, 40 s of nobody, and ten a second for 5 s."""
    return [ended(n * 0.1, 200, 20) for n in (*range(200), *range(599, 649))]


def test_a_pause_is_no_part_of_the_rate_and_makes_no_bursts() -> None:
    usual, now = Sort.of(paused()[:200], 20.0), Sort.of(paused(), 65.0)
    assert round(now.rate, 1) == 10.0  # 250 in 25 s
    assert now.burst == 1 or now.burst < 0.1
    assert not now.differs(usual)


def test_the_last_stretch_without_a_pause_that_is_long_enough_is_taken() -> None:
    seen = paused()
    before, end = stretch(seen, 65.0, 15.0, 60)
    assert (len(before), end) == (200, 19.900000000000002)  # 5 s after the pause are too few
    assert stretch(seen, 65.0, 4.0, 40) == (seen[200:], 65.0)
    assert stretch(seen, 65.0, 30.0, 60) == (seen, 65.0)  # none is


def test_rare_requests_have_no_pauses() -> None:
    seen = [ended(n * 20.0, 200, 20) for n in range(100)]
    assert stretch(seen, 2000.0, 15.0, 60) == (seen, 2000.0)
    assert not quiet(seen, 2000.0)


def test_a_load_has_ended_when_nobody_came_for_many_gaps() -> None:
    seen = [ended(n * 0.1, 200, 20) for n in range(100)]  # until 9.9 s: fifty gaps are 5 s
    assert not quiet(seen, 14.8)
    assert quiet(seen, 15.0)
    assert not quiet([], 15.0)
