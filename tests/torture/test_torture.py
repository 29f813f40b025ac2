"""The server's side of moves, losses and returns, tortured (torture.py): 300 worlds; and that it hurts."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import torture

from taichi_serve.cluster.vllm.server.acts import Acts, Release
from taichi_serve.cluster.vllm.server.hands import Hands
from taichi_serve.cluster.vllm.server.itinerary import Itinerary
from taichi_serve.cluster.vllm.server.journey import Journey
from taichi_serve.cluster.vllm.server.passage import Passage

WORLDS, IN_ONE = 300, 30


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Refused journeys are logged; here they are counted."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(IN_ONE, WORLDS, IN_ONE))]
)
def test_every_request_ends_once_and_nothing_is_left(first: int) -> None:
    found = {seed: wrong for seed in range(first, first + IN_ONE) if (wrong := torture.run(seed))}
    assert found == {}


def test_a_seed_makes_the_same_world_twice() -> None:
    first, second = torture.world(7)[0], torture.world(7)[0]
    assert first.got == second.got
    assert [type(event) for event, _ in first.log] == [type(event) for event, _ in second.log]


def until_found(most: int = 60) -> list[str]:
    return next((wrong for seed in range(most) if (wrong := torture.run(seed))), [])


@pytest.mark.long
def test_a_source_that_lets_go_before_the_target_has_said_so_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drop = Hands._drop

    def let_go_at_once(self: Hands, act: object) -> None:
        drop(self, act)  # type: ignore[arg-type]
        passage: Passage = act.passage  # type: ignore[attr-defined]
        passage.source.release(passage.source_leg if passage.owns else None, passage.reader)  # type: ignore[attr-defined]

    monkeypatch.setattr(Hands, "_drop", let_go_at_once)
    assert any("had let go" in wrong or "not pinned" in wrong for wrong in until_found())


@pytest.mark.long
def test_a_holder_that_lets_go_before_its_prefix_was_copied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Journey.found

    def let_go_at_once(self: Journey, passage: Passage, blocks: list[int]) -> Acts:
        return [*found(self, passage, blocks), Release(passage.source, None, passage.reader)]

    monkeypatch.setattr(Journey, "found", let_go_at_once)
    assert any("not pinned" in wrong for wrong in until_found())


@pytest.mark.long
def test_a_fetch_that_is_forgotten_with_the_move_after_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def goes_without(self: Journey) -> Acts:
        passage, self.fetch = self.fetch, None
        assert passage is not None
        return passage.drop()

    monkeypatch.setattr(Journey, "_go_without", goes_without)
    assert any("hangs" in wrong for wrong in until_found())


@pytest.mark.long
def test_a_promise_that_is_not_broken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Itinerary, "_break_promise", lambda self: [])
    assert any("pins" in wrong for wrong in until_found())


@pytest.mark.long
def test_a_request_whose_instance_was_lost_and_that_is_forgotten_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = Itinerary._begin

    def never_after_a_loss(self: Itinerary, *args: object, **more: object) -> object:
        return [] if self.tokens and self.stage.value == "waiting" else begin(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Itinerary, "_begin", never_after_a_loss)
    assert any("hangs" in wrong for wrong in until_found())
