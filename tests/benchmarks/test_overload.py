"""What the benchmark of overload makes of the requests that it sent."""

from __future__ import annotations

import pytest
from overload import Figures

from taichi_serve.bench.score import Sample


def sample(number: int, prompt: int, ttft: float | None, good: bool, error: str | None = None) -> Sample:
    return Sample(1, number, prompt, 8, ttft, None if ttft is None else 0.01, good, error)


FOUR = [
    sample(0, 400, 0.5, good=True),
    sample(1, 100, 3.0, good=False),
    sample(2, 300, None, good=False, error="HTTP 503: overloaded"),
    sample(3, 200, 0.4, good=True),
]


def test_a_share_is_of_all_that_were_sent_those_turned_away_too() -> None:
    found = Figures.of(FOUR, told=1, seconds=2.0)
    assert (found.sent, found.good, found.refused, found.told, found.failed) == (4, 2, 1, 1, 0)
    assert found.cells()[:4] == ("4", "0.50", "1.00", "1 (1)")


def test_the_longest_wait_is_that_of_a_request_that_got_a_first_token() -> None:
    assert Figures.of(FOUR, told=1, seconds=2.0).longest == 3.0


def test_quartiles_are_by_length_the_shortest_first() -> None:
    assert Figures.of(FOUR, told=1, seconds=2.0).quartiles == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("error", ["HTTP 500: broken", "it ended without a finish reason"])
def test_what_went_wrong_otherwise_is_no_refusal(error: str) -> None:
    found = Figures.of([sample(0, 100, None, good=False, error=error)], told=0, seconds=1.0)
    assert (found.refused, found.failed) == (0, 1)
