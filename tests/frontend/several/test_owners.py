"""Which front end a request belongs to, and whose an output is."""

from __future__ import annotations

from dataclasses import dataclass

from taichi_serve.frontend.several.owners import Owners


@dataclass
class Output:
    request_id: str
    number: int = 0


def owners(**of: int) -> Owners:
    found = Owners()
    for request, owner in of.items():
        found.take(request, owner)
    return found


def test_outputs_go_to_their_owners_in_the_order_in_which_they_came() -> None:
    a1, b1, a2, c1 = Output("a", 1), Output("b", 1), Output("a", 2), Output("c", 1)
    assert owners(a=0, b=1, c=0).split([a1, b1, a2, c1]) == {0: [a1, a2, c1], 1: [b1]}


def test_what_belongs_to_nobody_is_left_out() -> None:
    assert owners(a=0).split([Output("gone")]) == {}


def test_a_front_end_that_is_gone_owns_nothing_and_its_requests_are_named() -> None:
    here = owners(a=0, b=1, c=0)
    assert here.lose(0) == ["a", "c"]
    assert here.split([Output("a"), Output("b")]) == {1: [Output("b")]}
    assert (len(here), here.count(0), here.count(1)) == (1, 0, 1)


def test_a_request_that_is_over_is_forgotten_and_may_be_so_twice() -> None:
    here = owners(a=0)
    here.over("a")
    here.over("a")
    assert here.of("a") is None
    assert len(here) == 0
