"""Which requests can change instance without changing their output. docs/moving.md is this table in words.

A later leg hands the engine prompt and output so far as one prompt. Whatever looks only at all tokens, or
only at the next one, cannot tell the difference; whatever keeps a state of its own, or tells prompt from
output, can, and such a request stays on one instance for life. vLLM's V2 model runner (GPU) takes the output
so far as output (core/resumed.py), so there less is bound than with the V1 runner (CPU). A grammar's state is
outside both: the next engine builds it anew and feeds it the output so far (core/grammar.py).
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

ENFORCER = "lm-format-enforcer"  # the backend of structured outputs that works in Python, token by token

# What binds a request to its instance: a name for counters and docs, and how to see it.
BOUND_BY_PARAMS: dict[str, Callable[[SamplingParams], object]] = {
    "presence_penalty": lambda p: p.presence_penalty,
    "frequency_penalty": lambda p: p.frequency_penalty,
    "seed": lambda p: p.seed is not None and p.temperature > 0,
    "lm_format_enforcer": lambda p: p.structured_outputs and p.structured_outputs._backend == ENFORCER,
    "bad_words": lambda p: p.bad_words,
    "prompt_logprobs": lambda p: p.prompt_logprobs is not None,
    "thinking_token_budget": lambda p: p.thinking_token_budget is not None,
    "watermarking": lambda p: p.watermarking,
    "repetition_detection": lambda p: p.repetition_detection,
    "trace_decode_token_ids": lambda p: p.trace_decode_token_ids,
    "logits_processors": lambda p: set(p.extra_args or ()) - {"kv_cache_report_mode"},
}

BOUND_BY_REQUEST: dict[str, Callable[[EngineCoreRequest], object]] = {
    "pooling": lambda r: r.pooling_params is not None,
    "multimodal": lambda r: r.mm_features,
    "prompt_embeds": lambda r: r.prompt_embeds is not None,
    "streaming_input": lambda r: r.resumable,
}


# The V2 model runner draws by seed and position, and tells the output of a moved request from its prompt.
FREE_WITH_V2 = frozenset({"presence_penalty", "frequency_penalty", "seed", "bad_words"})


def bound_by(request: EngineCoreRequest, v2: bool = False) -> str | None:
    """Why this request must stay on one instance for life, or None when it moves exactly."""
    for name, sees in BOUND_BY_REQUEST.items():
        if sees(request):
            return name
    params = request.sampling_params
    for name, looks in BOUND_BY_PARAMS.items() if params is not None else ():
        if looks(params) and not (v2 and name in FREE_WITH_V2):
            return name
    return None
