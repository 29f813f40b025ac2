"""What a link between hosts costs is learned from its moves, and forgotten when there are none."""

from __future__ import annotations

import pytest

from taichi_serve.instance import Instance
from taichi_serve.latency.links import ALIKE, FIXED, FORGOTTEN, HALF, LEAST, MOST, REST, Links
from taichi_serve.messages import Flowed, Timeline
from taichi_serve.sliders import Kind

TOKENS = 1024 - FIXED  # that a move of 1 s has where it costs 1/1024 s a token


def instance(name: str, host: str) -> Instance:
    return Instance(name, Kind.D_HEAVY, 256, 10_000, host=host)


A1, A2, B, C = instance("a1", "a"), instance("a2", "a"), instance("b", "b"), instance("c", "c")


def moved(links: Links, source: Instance, target: Instance, gap: float, at: float = 1.0) -> None:
    links.flowed(source, target, Flowed(at, "r", 1, target.name, 5, TOKENS, gap))


def near(links: Links, source: Instance, *targets: Instance) -> str:
    return " ".join(target.name for target in links.near(source, targets))


def test_targets_on_the_own_host_are_near_where_the_network_costs_more() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 0.060)
    assert near(links, A1, A2, B) == "a2"
    assert near(links, A1, B) == "b"


def test_what_is_known_of_a_link_is_known_of_all_instances_of_its_hosts() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A2, B, 0.060)
    assert near(links, A1, A2, B, instance("b2", "b")) == "a2"


def test_where_all_links_are_alike_the_targets_are_those_that_were_asked_about() -> None:
    links, targets = Links(), [A2, B, C]
    assert links.near(A1, targets) is targets
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 0.010 * ALIKE)
    assert links.near(A1, targets) is targets
    assert links.dearer(A1, B) == 1.0


def test_a_wait_for_a_seat_and_for_a_step_is_no_price_of_a_link() -> None:
    links = Links()
    for target, seat, step in ((A2, 0.0, 0.0), (B, 2.0, 0.5)):
        arrived, began = 1.002, 1.002 + seat
        line = Timeline(
            left=1.0,
            heard=1.001,
            arrived=arrived,
            began=began,
            landed=began + 0.008,
            scheduled=began + 0.008 + step,
            made=began + 0.018 + step,
            at=began + 0.019 + step,
        )
        links.flowed(A1, target, Flowed(1.0, "r", 1, target.name, 5, TOKENS, line.at - 1.0, timeline=line))
    assert links.even
    assert links.seen["a", "b"].price == pytest.approx(0.010 / 1024)


def test_a_tail_that_is_long_on_its_way_makes_a_link_dear_though_its_blocks_were_copied_ahead() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    line = Timeline(1.0, 1.001, 1.002, 1.050, 1.060, 1.061, 1.070, 1.071, ahead=0.5, copied=0.9)
    links.flowed(A1, B, Flowed(1.1, "r", 1, "b", 5, TOKENS, 0.071, timeline=line))
    assert links.seen["a", "b"].price == pytest.approx(0.060 / 1024)
    assert near(links, A1, A2, B) == "a2"


def test_a_move_between_clocks_that_do_not_quite_agree_costs_something() -> None:
    links = Links()
    line = Timeline(1.0, 1.001, 0.999, 0.999, 0.999, 1.0, 1.01, 1.011)
    links.flowed(A1, B, Flowed(1.0, "r", 1, "b", 5, TOKENS, 0.011, timeline=line))
    assert links.seen["a", "b"].price == pytest.approx(LEAST / 1024)


def test_a_host_that_nobody_moved_to_is_tried() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 0.060)
    assert near(links, A1, A2, B, C) == "a2 c"


def test_a_short_move_and_a_long_one_over_one_link_cost_about_the_same() -> None:
    links = Links()
    links.flowed(A1, A2, Flowed(1.0, "r", 1, "a2", 5, 0, FIXED * 1e-5))
    links.flowed(A1, B, Flowed(1.0, "s", 1, "b", 5, 8000, (8000 + FIXED) * 1e-5))
    assert links.even


def test_a_move_over_a_dear_link_takes_so_many_times_the_mean() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 0.060)
    assert links.mean == pytest.approx((0.98 * 0.010 + 0.02 * 0.060) / 1024)
    assert links.dearer(A1, B) == pytest.approx(0.060 / 0.011)
    assert links.dearer(A1, A2) == pytest.approx(0.010 / 0.011)
    assert links.dearer(A1, C) == 1.0


def test_a_link_that_is_lost_is_avoided_after_one_move_that_was_given_up() -> None:
    links = Links()
    for number in range(20):
        moved(links, A1, B, 0.010, at=float(number))
        moved(links, A1, C, 0.010, at=float(number))
    moved(links, A1, B, 10.0, at=20.0)
    assert near(links, A1, B, C) == "c"


def test_a_move_that_was_refused_after_seconds_makes_its_link_dear_and_one_that_was_at_once_does_not() -> (
    None
):
    links = Links()
    links.gave_up(A1, B, 10.0, 0.5)  # before anything is known
    assert links.seen == {}
    for number in range(20):
        moved(links, A1, B, 0.010, at=float(number))
        moved(links, A1, C, 0.010, at=float(number))
    links.gave_up(A1, B, 0.001, 20.0)
    assert links.even
    links.gave_up(A1, B, 10.0, 21.0)
    links.gave_up(None, C, 10.0, 21.0)
    assert near(links, A1, B, C) == "c"


def test_links_that_nobody_used_for_minutes_are_not_known_any_more() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 0.100)
    assert not links.even
    moved(links, A1, A2, 0.010, at=1.0 + FORGOTTEN)
    assert list(links.seen) == [("a", "a")]
    assert links.even


def test_what_a_link_was_dearer_is_forgotten_when_nobody_moves_over_it() -> None:
    links = Links()
    moved(links, A1, C, 0.010)
    moved(links, A1, B, 0.100)
    assert near(links, A1, B, C) == "c"
    links.now = 1.0 + REST + HALF
    assert near(links, A1, B, C) == "c"
    links.now = 1.0 + REST + 5 * HALF
    assert near(links, A1, B, C) == "b c"


def test_no_move_counts_for_more_than_so_many_times_the_mean() -> None:
    links = Links()
    moved(links, A1, A2, 0.010)
    moved(links, A1, B, 1e6)
    assert links.seen["a", "b"].price == pytest.approx(MOST * 0.010 / 1024)


def test_where_hosts_are_not_told_apart_nothing_is_learned() -> None:
    links = Links()
    moved(links, instance("i0", ""), instance("i1", ""), 0.010)
    assert links.seen == {}
    assert links.even
