"""The members of the three families: which settings a search looks at, and what they are called."""

from dataclasses import replace

import pytest

from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.families import FAMILIES, aggregation, disaggregation, end_of, hybrid, mixed, nearby
from taichi_serve.sliders import Sliders


@pytest.mark.parametrize("instances", [2, 3, 8, 64])
@pytest.mark.parametrize("longest", [64, 4096])
def test_every_contender_has_legal_sliders_for_any_number_of_instances(instances, longest):
    for family in FAMILIES.values():
        field = family(instances, longest)
        assert field
        assert all(c.sliders.instances == instances for c in field)
        assert all(c.sliders.p_chunk <= longest for c in field)
        assert len({c.name for c in field}) == len(field)


def test_the_hybrid_has_every_ratio_with_chunk_0_and_small_chunks_and_flowing_decode():
    field = hybrid(8, 8192)
    for p_heavy in range(1, 8):
        mine = {c.sliders.d_chunk for c in field if c.sliders.p_heavy == p_heavy and c.policy.degrades}
        assert {0, 32, 64, 128, 256} <= mine


def test_both_ends_of_the_sliders_are_hybrids():
    field = hybrid(8, 8192)
    assert set(aggregation(8, 8192)) <= set(field)
    assert set(disaggregation(8, 8192)) <= set(field)


def test_an_end_is_known_by_its_values_alone():
    assert end_of(mixed(Sliders(0, 8, 0, 512), Policy())) == "aggregation"
    assert end_of(mixed(Sliders(6, 2, 8192, 0), Policy(watermark=1.0))) == "disaggregation"
    assert end_of(mixed(Sliders(6, 2, 8192, 0), Policy())) is None  # decodes may flow
    assert end_of(mixed(Sliders(6, 2, 8192, 32), Policy(watermark=1.0))) is None


def test_a_neighbour_differs_in_one_thing():
    one = mixed(Sliders(5, 3, 8192, 128), Policy())
    others = nearby(one)[1:]
    assert nearby(one)[0] == one
    assert Sliders(4, 4, 8192, 128) in [o.sliders for o in others]
    assert Sliders(5, 3, 8192, 96) in [o.sliders for o in others]
    assert Sliders(5, 3, 2048, 128) in [o.sliders for o in others]
    assert replace(one.policy, ttft_margin=0.3) in [o.policy for o in others]
    assert all((o.sliders == one.sliders) != (o.policy == one.policy) for o in others)


def test_neighbours_never_leave_the_legal_values():
    for sliders in (Sliders(1, 1, 64, 64), Sliders(1, 7, 1, 0), Sliders(7, 1, 8192, 1024)):
        assert all(o.sliders.instances == sliders.instances for o in nearby(mixed(sliders, Policy())))


def test_an_end_has_no_neighbours_because_it_was_tuned_by_itself():
    for end in (*aggregation(2, 4096), *disaggregation(2, 4096)):
        assert nearby(end) == [end]
