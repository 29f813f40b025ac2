"""What a viewer is told: everything at first, then one row for each request that something happened to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from taichi_serve.dashboard.attainment import Attainment
from taichi_serve.dashboard.feed import Feed
from taichi_serve.dashboard.rows import Hop, Update
from taichi_serve.latency.predict import Average, Learned
from taichi_serve.messages import (
    Arrived,
    Asked,
    Drained,
    Event,
    Finished,
    Flowed,
    Joined,
    Lost,
    Prefilled,
    Refused,
    Slid,
    Stepped,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO


class World:
    """A scheduler over i0 P-heavy and i1 D-heavy, and a feed that is told everything."""

    def __init__(self) -> None:
        capacities = {"i0": 100_000, "i1": 100_000}
        # With a TTFT SLO that nothing meets, the fastest instance prefills: i1 is known to be slow.
        slow = Learned(fixed={"i1": Average(100.0, 1.0)})
        sliders = Sliders(1, 1, 1024, 256)
        self.scheduler = GlobalScheduler(sliders, SLO(1e-6, 0.07), slow, Policy(), capacities)
        self.attainment = Attainment(lambda: self.scheduler.slo)
        self.happened: list[Event] = []
        self.feed = self.new_feed()

    def new_feed(self) -> Feed:
        def stand(now: float) -> Any:
            return None

        return Feed(self.scheduler, self.attainment, list, stand, self.happened)

    def on(self, *facts: Event) -> None:
        for fact in facts:
            commands = self.scheduler.on(fact)
            if not isinstance(fact, Stepped):
                self.attainment.on(fact)
            self.feed.observe(fact, commands)

    def update(self, now: float) -> Update:
        found = self.feed.update(now)
        assert found is not None
        return found


def test_who_left_is_told_once() -> None:
    world, there = World(), ["i0", "i1"]

    def glance(name: str) -> Any:
        return SimpleNamespace(name=name)

    known = {name: glance(name) for name in there}
    look: Any = lambda: [known[name] for name in there]  # noqa: E731
    feed = Feed(world.scheduler, world.attainment, look, lambda now: None, [])  # type: ignore[arg-type]
    first = feed.update(0.0)
    assert first is not None
    assert ([one.name for one in first.instances], first.left) == (["i0", "i1"], [])
    there.remove("i0")
    second = feed.update(1.0)
    assert second is not None
    assert (second.instances, second.left) == ([], ["i0"])
    assert feed.update(2.0) is None


BORN = (
    Arrived(0.0, "a", 100, 5),
    Stepped(1.0, "i0", 0.5, 100, 0, 112),
    Prefilled(1.0, "a", 0, "i0", held=True),
)


def test_many_facts_of_one_request_are_one_row() -> None:
    world = World()
    world.on(*BORN)
    update = world.update(1.0)
    (row,) = update.requests
    assert (row.id, row.state, row.instance, row.target, row.move) == ("a", "moving", "i0", "i1", "hand-over")
    assert (row.base, row.first_at, row.arrived_at) == (1, 1.0, 0.0)
    assert not update.hops
    assert not update.whole


def test_nothing_is_said_where_nothing_happened() -> None:
    world = World()
    world.on(*BORN)
    world.update(1.0)
    assert world.feed.update(1.1) is None


def test_a_move_is_told_with_its_kind_its_ends_and_its_gap() -> None:
    world = World()
    world.on(*BORN, Flowed(1.1, "a", 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100))
    world.on(Asked(1.2, "a", "i0"), Flowed(1.5, "a", 2, "i0", 4, kv_tokens=7, gap=0.3, reused=107))
    update = world.update(1.5)
    assert update.hops == [
        Hop(1.1, "a", "hand-over", "i0", "i1", 100, 0.1),
        Hop(1.5, "a", "operator", "i1", "i0", 7, 0.3),
    ]
    assert [(row.state, row.instance) for row in update.requests] == [("decoding", "i0")]


def test_a_move_that_began_before_anybody_looked_is_known_by_its_kind() -> None:
    world = World()
    world.on(*BORN)
    world.feed = world.new_feed()
    world.on(Flowed(1.1, "a", 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100))
    assert world.update(1.1).hops[0].move == "hand-over"


def test_a_hand_over_to_the_instance_of_the_prompt_is_no_move() -> None:
    world = World()
    world.on(*BORN)
    world.feed.observe(Flowed(1.1, "a", 1, "i0", 2, kv_tokens=0, gap=0.1, reused=100), [])
    assert not world.update(1.1).hops


def test_a_refused_move_is_no_move() -> None:
    world = World()
    world.on(*BORN, Flowed(1.1, "a", 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100))
    world.update(1.1)
    world.on(Asked(1.2, "a", "i0"), Refused(1.4, "a", 2, "late", 3))
    update = world.update(1.5)
    assert not update.hops
    assert [(row.state, row.instance, row.target) for row in update.requests] == [("decoding", "i1", None)]


def test_a_request_that_is_over_is_gone_and_leaves_a_point() -> None:
    world = World()
    world.on(*BORN, Flowed(1.1, "a", 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100))
    world.update(1.1)
    world.on(Finished(2.0, "a", 5))
    update = world.update(2.0)
    assert (update.gone, update.requests) == (["a"], [])
    assert [(p.at, p.ttft, p.good) for p in update.points] == [(2.0, 1.0, False)]
    world.on(Arrived(2.1, "b", 10, 5))
    assert not world.update(2.1).points  # they are told once


def test_a_rescue_comes_from_nowhere() -> None:
    world = World()
    world.on(*BORN, Flowed(1.1, "a", 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100))
    world.on(Lost(1.2, "i1", "killed by SIGKILL"))
    leg = world.scheduler.requests["a"].leg
    world.on(Flowed(1.9, "a", leg, "i0", 3, kv_tokens=0, gap=0.7))
    update = world.update(2.0)
    assert update.hops[-1] == Hop(1.9, "a", "rescue", None, "i0", 0, 0.7)
    assert [(note.text, note.tone) for note in update.notes] == [("i1 was lost: killed by SIGKILL", "bad")]


def test_a_snapshot_has_every_live_request_and_what_happened_before() -> None:
    world = World()
    world.happened += [Joined(0.5, "i1", 100_000), Drained(0.6, "i0")]
    world.on(*BORN, Arrived(1.2, "b", 10, 5))
    whole = world.feed.snapshot(1.3)
    assert whole.whole
    assert [row.id for row in whole.requests] == ["a", "b"]
    assert [note.text for note in whole.notes] == ["i1 serves again", "i0 is drained"]


def test_a_change_of_sliders_is_a_mark_on_the_time_axis() -> None:
    world = World()
    world.on(Slid(3.0, Sliders(1, 1, 512, 128)))
    (note,) = world.update(3.0).notes
    assert note.mark
    assert note.text == "sliders: 1 P-heavy with chunk 512, 1 D-heavy with chunk 128"
