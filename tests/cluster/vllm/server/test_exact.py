"""Every reason that binds a request to its instance is seen, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.exact import BOUND_BY_PARAMS, BOUND_BY_REQUEST, FREE_WITH_V2, bound_by

TABLE = Path(__file__).parents[4] / "docs" / "moving.md"


def request(params: SamplingParams | None = None, **fields: Any) -> EngineCoreRequest:
    made = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params or SamplingParams(temperature=0.0, max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def asking(**params: Any) -> EngineCoreRequest:
    return request(SamplingParams(max_tokens=8, **params))


def held_by(backend: str) -> StructuredOutputsParams:
    made = StructuredOutputsParams(choice=["a", "b"])
    made._backend = backend  # as vLLM's front end has set it when it has checked the request
    return made


BINDS: dict[str, Callable[[], EngineCoreRequest]] = {
    "presence_penalty": lambda: asking(presence_penalty=-0.1),
    "frequency_penalty": lambda: asking(frequency_penalty=0.1),
    "seed": lambda: asking(seed=0, temperature=0.5),
    "lm_format_enforcer": lambda: asking(structured_outputs=held_by("lm-format-enforcer")),
    "bad_words": lambda: asking(bad_words=["x"]),
    "prompt_logprobs": lambda: asking(prompt_logprobs=0),
    "thinking_token_budget": lambda: asking(thinking_token_budget=5),
    "watermarking": lambda: asking(watermarking=True),
    "repetition_detection": lambda: asking(
        repetition_detection=RepetitionDetectionParams(max_pattern_size=4, min_count=3)
    ),
    "trace_decode_token_ids": lambda: asking(trace_decode_token_ids=[5, 6]),
    "logits_processors": lambda: asking(extra_args={"of_a_custom_one": 1}),
    "pooling": lambda: request(pooling_params=object()),
    "multimodal": lambda: request(mm_features=[object()]),
    "prompt_embeds": lambda: request(prompt_embeds=object()),
    "streaming_input": lambda: request(resumable=True),
}


def test_every_reason_has_an_example() -> None:
    assert BINDS.keys() == BOUND_BY_PARAMS.keys() | BOUND_BY_REQUEST.keys()


@pytest.mark.parametrize("name", BINDS)
def test_it_binds_and_gives_its_name(name: str) -> None:
    assert bound_by(BINDS[name]()) == name
    assert bound_by(BINDS[name](), v2=True) == (None if name in FREE_WITH_V2 else name)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 10, "min_p": 0.1},
        {"temperature": 0.0, "seed": 5},  # greedy: the seed has nothing to do
        {"stop": ["x"], "include_stop_str_in_output": True},
        {"stop_token_ids": [5], "min_tokens": 3},
        {"logprobs": 5, "logit_bias": {5: 1.0}, "allowed_token_ids": [5, 6]},
        {"repetition_penalty": 1.2},
        {"structured_outputs": held_by("xgrammar")},
        {"structured_outputs": held_by("guidance")},
        {"structured_outputs": held_by("outlines")},
        {"thinking_token_budget": -1},  # unlimited
        {"extra_args": {}},
    ],
    ids=str,
)
def test_what_moves_exactly_is_not_bound(params: dict[str, Any]) -> None:
    assert bound_by(asking(**params)) is None


def test_a_budget_of_no_thinking_at_all_binds_too() -> None:
    assert bound_by(asking(thinking_token_budget=0)) == "thinking_token_budget"


def test_the_document_says_for_both_runners_what_the_code_does() -> None:
    line = re.compile(r"^\| `(\w+)` \| (moves|stays)[^|]*\| (moves|stays)")
    rows = {m[1]: (m[2], m[3]) for text in TABLE.read_text().splitlines() if (m := line.match(text))}
    reasons = BOUND_BY_PARAMS.keys() | BOUND_BY_REQUEST.keys()
    assert {name for name, (v1, _) in rows.items() if v1 == "stays"} == reasons
    assert {name for name, (_, v2) in rows.items() if v2 == "stays"} == reasons - FREE_WITH_V2
