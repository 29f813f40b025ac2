"""The order of the prompts on one instance."""

from __future__ import annotations

from taichi_serve.scheduling.queue import Queue


def queue(**places: float) -> Queue:
    made = Queue()
    for name, by in places.items():
        made.add(name, by)
    return made


def test_prompts_with_the_same_place_are_computed_in_order_of_arrival() -> None:
    assert [*queue(b=0.0, a=0.0, c=0.0)] == ["b", "a", "c"]


def test_the_earlier_deadline_comes_first() -> None:
    assert [*queue(a=6.0, b=4.0, c=5.0)] == ["b", "c", "a"]


def test_a_prompt_that_is_put_off_comes_behind_those_with_an_earlier_place() -> None:
    made = queue(a=4.0, b=5.0, c=6.0)
    made.move("a", 5.5)
    assert [*made] == ["b", "a", "c"]


def test_nobody_overtakes_a_prompt_that_has_begun_nor_puts_it_off() -> None:
    made = queue(a=6.0)
    made.begin(1)
    made.add("b", 4.0)
    made.move("a", 9.0)
    assert [*made] == ["a", "b"]
    assert made.first() == "a"


def test_those_that_have_begun_stay_in_their_order() -> None:
    made = queue(a=9.0, b=4.0, c=5.0)
    made.begin(3)
    made.remove("b")
    assert [*made] == ["c", "a"]
    assert made.waiting() == []


def test_behind_a_newcomer_are_those_with_a_later_place_the_last_first() -> None:
    made = queue(a=4.0, b=5.0, c=6.0, d=7.0)
    assert [*made.behind(5.0)] == ["d", "c"]
    assert made.ends_after(6.5)
    assert not made.ends_after(7.0)


def test_who_is_taken_out_leaves_the_others_in_their_order() -> None:
    made = queue(a=4.0, b=5.0, c=4.0)
    made.remove("a")
    assert [*made] == ["c", "b"]
    assert len(made) == 2
