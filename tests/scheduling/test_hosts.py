"""Targets that are near by what moves took are preferred, as long as they have room."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.latency.links import Links
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Flowed, Placed
from taichi_serve.request import Request
from taichi_serve.scheduling.decode import Search, choose_start
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import NOTHING
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

POLICY = Policy()
REQUEST = Request("r", 0.0, 1000, 100, SLO(1.0, 0.1))


def instance(name: str, host: str, kind: Kind = Kind.D_HEAVY, kv_tokens: int = 0) -> Instance:
    return Instance(name, kind, 256, 10_000, kv_tokens=kv_tokens, host=host)


HERE = instance("p", "a", Kind.P_HEAVY)


def links(**gaps: float) -> Links:
    """Of moves from host `a` to these, of 488 tokens each."""
    made = Links()
    for host, gap in gaps.items():
        made.flowed(HERE, instance("x", host), Flowed(1.0, "q", 1, "x", 2, 488, gap))
    return made


def start(others: list[Instance], **gaps: float) -> tuple[Instance, str]:
    """Where the decode of a request that prefilled at HERE begins, after moves that took so long."""
    near = links(**gaps).nearer(HERE, others)
    return choose_start(REQUEST, HERE, [HERE, *others], POLICY, NOTHING, near)


def test_a_decode_starts_on_the_own_host_although_another_has_more_room() -> None:
    near, far = instance("near", "a", kv_tokens=5_000), instance("far", "b")
    target, why = start([near, far], a=0.01, b=0.10)
    assert target is near
    assert why == "of the D-heavy instances that are near the one with most room"


def test_it_starts_elsewhere_where_the_own_host_has_no_room() -> None:
    near, far = instance("near", "a", kv_tokens=9_400), instance("far", "b")
    target, _ = start([near, far], a=0.01, b=0.10)
    assert target is far


def test_the_one_with_most_room_is_taken_where_links_are_alike() -> None:
    near, far = instance("near", "a", kv_tokens=5_000), instance("far", "b")
    assert start([near, far], a=0.01, b=0.015)[0] is far


def test_a_link_that_was_lost_is_gone_round() -> None:
    """Nobody is on the own host; a move to `b` was given up after ten seconds."""
    lost, well = instance("lost", "b"), instance("well", "c", kv_tokens=5_000)
    assert start([lost, well], c=0.01, b=10.0)[0] is well


def test_whoever_is_degraded_or_flows_back_goes_to_the_near_ones_first() -> None:
    near, far = instance("near", "a", kv_tokens=5_000), instance("far", "b")
    search = Search(links=links(a=0.01, b=0.10))
    assert search.target(HERE, [near, far], 1_000, 0.95, POLICY, NOTHING) is near
    full = instance("full", "a", kv_tokens=9_500)
    assert search.target(HERE, [full, far], 1_000, 0.95, POLICY, NOTHING) is far


def test_an_instance_is_where_the_facts_say() -> None:
    sliders = Sliders(p_heavy=1, d_heavy=1, p_chunk=1024, d_chunk=256)
    scheduler = GlobalScheduler(sliders, SLO(1.0, 0.1), Learned(), POLICY, {"i0": 10_000, "i1": 10_000})
    assert scheduler.on(Placed(0.0, "i1", "10.0.0.2")) == []
    assert [one.host for one in scheduler.instances.values()] == ["", "10.0.0.2"]
    assert scheduler.on(Placed(0.0, "i9", "10.0.0.2")) == []
