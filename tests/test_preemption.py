"""Who loses its KV first."""

from __future__ import annotations

from taichi_serve.preemption import rank


def test_best_effort_goes_first_and_who_is_bound_last() -> None:
    order = [
        rank(best_effort=False, bound=True, prompt=False),
        rank(best_effort=False, bound=True, prompt=True),
        rank(best_effort=False, bound=False, prompt=False),
        rank(best_effort=False, bound=False, prompt=True),
        rank(best_effort=True, bound=True, prompt=False),
        rank(best_effort=True, bound=True, prompt=True),
        rank(best_effort=True, bound=False, prompt=False),
        rank(best_effort=True, bound=False, prompt=True),
    ]
    assert order == sorted(order)
    assert len(set(order)) == 8
