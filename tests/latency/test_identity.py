"""A profile is refused for another model, and only remarked upon where the rest differs."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from taichi_serve.latency.identity import Identity, differences, refusal
from taichi_serve.latency.profile import Fit, Profile

PROFILE = Profile(
    schema=1,
    model="tiny",
    device="one core",
    versions={"vllm": "0.32.0"},
    settings={"dtype": "float32", "block_size": 16},
    kv_capacity=100_000,
    bytes_per_token=4096,
    steps=[],
    fit=Fit(0.004, 0.0, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1),
)

HERE = Identity("tiny", "one core", 4096, {"vllm": "0.32.0"}, {"dtype": "float32", "block_size": 16})


def test_profile_of_the_same_model_in_a_directory_is_taken() -> None:
    profile = msgspec.structs.replace(PROFILE, model="somebody/tiny")
    assert refusal(profile, replace(HERE, model="/models/tiny/")) is None
    assert list(differences(profile, HERE)) == []


def test_profile_of_another_model_is_refused_by_name() -> None:
    why = refusal(PROFILE, replace(HERE, model="somebody/large"))
    assert why == "model: the profile is of tiny, not of somebody/large; measure that one"


def test_profile_with_other_kv_bytes_is_refused() -> None:
    why = refusal(PROFILE, replace(HERE, bytes_per_token=2048))
    assert why is not None
    assert why.startswith("bytes_per_token: a token's KV takes 4096 bytes in the profile and 2048 here")


def test_another_device_version_or_setting_is_told_and_taken() -> None:
    here = replace(
        HERE,
        device="two cores",
        versions={"vllm": "0.33.0"},
        settings={"dtype": "float32", "block_size": 32, "unheard_of": 1},
    )
    assert refusal(PROFILE, here) is None
    assert list(differences(PROFILE, here)) == [
        "device was one core, here it is two cores",
        "version of vllm was 0.32.0, here it is 0.33.0",
        "block_size was 16, here it is 32",
    ]


def test_how_much_an_engine_may_take_is_no_difference() -> None:
    profile = msgspec.structs.replace(PROFILE, settings={"max_model_len": 4096, "max_num_seqs": 8})
    assert (
        list(differences(profile, replace(HERE, settings={"max_model_len": 512, "max_num_seqs": 256}))) == []
    )


def test_neighbours_that_were_at_work_are_told() -> None:
    profile = msgspec.structs.replace(PROFILE, settings={**PROFILE.settings, "neighbours": 3})
    assert refusal(profile, HERE) is None
    assert list(differences(profile, HERE)) == ["it was measured beside 3 more at work"]
