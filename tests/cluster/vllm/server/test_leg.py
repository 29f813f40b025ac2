"""The engine request of each leg, by hand: 4 prompt tokens, at most 10 out, at least 6."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.acts import Place
from taichi_serve.cluster.vllm.server.leg import first_leg, next_leg
from taichi_serve.cluster.vllm.wire import KEY


def asked(**params: object) -> EngineCoreRequest:
    wanted = {"temperature": 0.0, "max_tokens": 10, "min_tokens": 6, **params}
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3, 4],
        mm_features=None,
        sampling_params=SamplingParams(**wanted),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_a_request_that_stays_goes_to_its_engine_as_it_came() -> None:
    request = asked()
    assert first_leg(request, "a", None) is request


def test_a_prefill_that_hands_over_says_so_and_leaves_the_users_request_alone() -> None:
    request = asked()
    leg = first_leg(request, "a", "a#1")
    assert leg.sampling_params.extra_args[KEY] == {"hand_over": True, "reader": "a#1"}
    assert leg.request_id == "a"
    assert request.sampling_params.extra_args is None


def test_a_prefill_that_begins_again_elsewhere_has_another_id() -> None:
    assert first_leg(asked(), "a#1", None).request_id == "a#1"


@pytest.mark.parametrize(("done", "most", "least", "counted"), [(1, 9, 5, 1), (6, 4, 0, 6), (9, 1, 0, 6)])
def test_the_next_leg_goes_on_after_the_tokens_so_far(done: int, most: int, least: int, counted: int) -> None:
    request, tokens = asked(), list(range(50, 50 + done))
    leg = next_leg(request, "a#2", tokens)
    assert (leg.request_id, leg.prompt_token_ids) == ("a#2", [1, 2, 3, 4, *tokens])
    params = leg.sampling_params
    assert (params.max_tokens, params.min_tokens) == (most, least)
    assert params.extra_args[KEY] == {"moved": True, "output": done, "min_tokens_done": counted}
    assert "kv_transfer_params" not in params.extra_args
    assert (request.prompt_token_ids, request.sampling_params.max_tokens) == ([1, 2, 3, 4], 10)


def test_the_kv_to_pull_is_given_along_and_copied() -> None:
    held = {"do_remote_prefill": True, "remote_num_tokens": 4}
    leg = next_leg(asked(), "a#1", [50], held)
    assert leg.sampling_params.extra_args["kv_transfer_params"] == held
    assert leg.sampling_params.extra_args["kv_transfer_params"] is not held


def test_an_engine_is_told_whether_a_leg_is_best_effort_and_whether_the_first_one_is_bound() -> None:
    late = Place(7.5, best_effort=True)
    first = first_leg(asked(), "a", None, place=late, bound=True).sampling_params.extra_args[KEY]
    assert first == {"by": 7.5, "best_effort": True, "bound": True}
    later = next_leg(asked(), "a#1", [50], place=late).sampling_params.extra_args[KEY]
    assert (later["by"], later["best_effort"]) == (7.5, True)


def test_a_request_that_is_bound_says_so_though_it_stays_where_it_is() -> None:
    request = asked()
    leg = first_leg(request, "a", None, bound=True)
    assert leg.sampling_params.extra_args[KEY] == {"bound": True}
    assert request.sampling_params.extra_args is None


def test_a_request_without_sampling_parameters_brings_no_marks() -> None:
    request = asked()
    request.sampling_params = None
    assert first_leg(request, "a", None, place=Place(7.5), bound=True).sampling_params is None
