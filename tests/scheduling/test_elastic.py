"""Instances come and leave: the kinds that they have, and where requests are then."""

from __future__ import annotations

import pytest

from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Added,
    Arrived,
    Cached,
    Command,
    Decode,
    Drained,
    Flow,
    Move,
    Prefill,
    Prefilled,
    Removed,
    SetChunk,
    Slid,
    Stepped,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

P, D = Kind.P_HEAVY, Kind.D_HEAVY


def scheduler(sliders: Sliders, block_size: int = 0) -> GlobalScheduler:
    capacities = {f"i{n}": 10_000 for n in range(sliders.instances)}
    return GlobalScheduler(sliders, SLO(2.0, 0.05), Learned(), Policy(), capacities, block_size)


def kinds(one: GlobalScheduler) -> dict[str, tuple[Kind, int]]:
    return {i.name: (i.kind, i.chunk) for i in one.instances.values()}


def placed(commands: list[Command]) -> list[str]:
    return [c.on for c in commands if isinstance(c, Prefill)]


def test_one_that_is_added_has_the_kind_that_was_asked_for_and_nobody_else_changes() -> None:
    here = scheduler(Sliders(1, 1, 1024, 256))
    assert here.on(Added(1.0, "i2", P, 5_000)) == [SetChunk("i2", P, 1024)]
    assert here.on(Added(2.0, "i3", D, 5_000)) == [SetChunk("i3", D, 256)]
    assert here.sliders == Sliders(2, 2, 1024, 256)
    assert list(here.instances) == ["i0", "i2", "i1", "i3"]  # P-heavy ones first
    assert kinds(here) == {"i0": (P, 1024), "i2": (P, 1024), "i1": (D, 256), "i3": (D, 256)}
    assert here.instances["i2"].kv_capacity == 5_000


def test_sliders_that_move_later_are_those_of_all_that_are_there() -> None:
    here = scheduler(Sliders(1, 1, 1024, 256))
    here.on(Added(1.0, "i2", P, 5_000))
    here.on(Slid(2.0, Sliders(1, 1, 512, 128)))  # of two: they come too late
    assert here.sliders == Sliders(2, 1, 1024, 256)
    here.on(Slid(3.0, Sliders(1, 2, 1024, 256)))
    assert kinds(here) == {"i0": (P, 1024), "i2": (D, 256), "i1": (D, 256)}


def test_a_name_that_is_known_adds_nothing() -> None:
    here = scheduler(Sliders(1, 1, 1024, 256))
    assert here.on(Added(1.0, "i1", D, 5_000)) == []
    assert here.sliders.instances == 2


def test_prompts_go_to_one_that_was_added_and_not_to_one_that_left() -> None:
    here = scheduler(Sliders(0, 1, 0, 256))
    assert placed(here.on(Arrived(0.0, "a", 1_000, 10))) == ["i0"]
    here.on(Added(1.0, "i1", D, 10_000))
    assert placed(here.on(Arrived(1.0, "b", 1_000, 10))) == ["i1"]
    assert placed(here.on(Removed(2.0, "i0"))) == ["i1"]  # a, from its beginning
    assert placed(here.on(Arrived(2.0, "c", 1_000, 10))) == ["i1"]
    assert list(here.instances) == list(here.accuracy) == ["i1"]
    assert here.instances["i1"].queued_requests == 3


def test_decodes_of_one_that_is_removed_before_it_is_empty_are_rescued_and_bound_ones_fail() -> None:
    here = scheduler(Sliders(0, 2, 0, 256))
    homes = {}
    for name, movable in (("a", True), ("b", True), ("c", False), ("d", False)):
        (homes[name],) = placed(here.on(Arrived(0.0, name, 100, 10, movable)))
    for name, on in homes.items():
        here.on(Prefilled(0.5, name, 0, on))
    gone = homes["a"]
    commands = here.on(Removed(1.0, gone))
    rescued = [c.request for c in commands if isinstance(c, Decode) and c.move is Move.RESCUE]
    failed = [c.request for c in commands if not isinstance(c, Decode | SetChunk)]
    assert rescued == [name for name in "ab" if homes[name] == gone]
    assert failed == [name for name in "cd" if homes[name] == gone]
    assert set(here.requests) == set(homes) - set(failed)


def test_who_was_drained_first_takes_nothing_along() -> None:
    here = scheduler(Sliders(0, 2, 0, 256))
    (home,) = placed(here.on(Arrived(0.0, "a", 100, 10)))
    here.on(Prefilled(0.5, "a", 0, home))
    (flow,) = here.on(Drained(1.0, home))
    assert isinstance(flow, Flow)
    assert flow.move is Move.DRAIN


def test_the_last_one_who_could_prefill_leaves_its_kind_behind() -> None:
    here = scheduler(Sliders(1, 2, 1024, 0))
    commands = here.on(Removed(1.0, "i0"))
    assert here.sliders == Sliders(1, 1, 1024, 0)
    assert SetChunk("i1", P, 1024) in commands
    assert kinds(here) == {"i1": (P, 1024), "i2": (D, 0)}


def test_the_last_instance_is_never_forgotten() -> None:
    here = scheduler(Sliders(0, 1, 0, 256))
    here.on(Removed(1.0, "i0"))
    assert list(here.instances) == ["i0"]
    assert not here.instances["i0"].alive
    (added, *_) = here.on(Added(2.0, "i1", D, 10_000))
    assert added == SetChunk("i1", D, 256)
    assert placed(here.on(Arrived(3.0, "a", 100, 10))) == ["i1"]


def test_who_waits_for_an_instance_goes_to_one_that_was_added() -> None:
    here = scheduler(Sliders(0, 1, 0, 256))
    here.on(Removed(1.0, "i0"))
    assert here.on(Arrived(2.0, "a", 100, 10)) == []
    assert placed(here.on(Added(3.0, "i1", D, 10_000))) == ["i1"]


def test_facts_of_one_that_left_are_dropped() -> None:
    here = scheduler(Sliders(0, 2, 0, 256), block_size=16)
    here.on(Removed(1.0, "i0"))
    assert here.on(Stepped(1.1, "i0", 0.01, 0, 0, 0)) == []
    assert here.on(Cached(1.1, "i0", (1, 2))) == []
    assert here.on(Removed(1.2, "i0")) == []
    assert here.on(Drained(1.2, "i0")) == []


def test_what_one_had_cached_is_nobodys_when_it_left_and_another_came() -> None:
    here = scheduler(Sliders(0, 2, 0, 256), block_size=16)
    blocks = tuple(range(20))
    here.on(Cached(0.5, "i0", blocks))
    here.on(Removed(1.0, "i0"))
    here.on(Added(2.0, "i2", D, 10_000))
    here.on(Arrived(3.0, "a", 330, 10, blocks=blocks))
    prefixes = here.ledger.prefixes(here.requests["a"])
    assert not any(one.held for one in prefixes.values())
    here.on(Cached(4.0, "i2", blocks))
    assert here.ledger.prefixes(here.requests["a"])["i2"].held == 320


@pytest.mark.parametrize(
    ("sliders", "kind", "chunk", "then"),
    [
        (Sliders(1, 1, 1024, 256), D, None, Sliders(1, 2, 1024, 256)),
        (Sliders(1, 1, 1024, 256), D, 256, Sliders(1, 2, 1024, 256)),
        (Sliders(0, 2, 0, 256), P, None, Sliders(1, 2, 256, 256)),
        (Sliders(0, 2, 0, 256), P, 2048, Sliders(1, 2, 2048, 256)),
        (Sliders(2, 0, 1024, 0), D, None, Sliders(2, 1, 1024, 0)),
        (Sliders(2, 0, 1024, 0), D, 128, Sliders(2, 1, 1024, 128)),
    ],
)
def test_one_more_of_a_kind(sliders: Sliders, kind: Kind, chunk: int | None, then: Sliders) -> None:
    assert sliders.more(kind, chunk) == then


def test_a_chunk_belongs_to_the_kind() -> None:
    with pytest.raises(ValueError, match="the chunk of D-heavy instances is 256, not 512"):
        Sliders(1, 1, 1024, 256).more(D, 512)
    with pytest.raises(ValueError, match="must not be below"):
        Sliders(0, 2, 0, 256).more(P, 128)


def test_one_less_of_a_kind_leaves_somebody_who_prefills() -> None:
    assert Sliders(1, 2, 1024, 0).less(D) == Sliders(1, 1, 1024, 0)
    with pytest.raises(ValueError, match="nobody could prefill"):
        Sliders(1, 2, 1024, 0).less(P)
    with pytest.raises(ValueError, match="at least one instance"):
        Sliders(0, 1, 0, 256).less(D)
