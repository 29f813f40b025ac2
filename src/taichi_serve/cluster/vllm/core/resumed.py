"""The tokens of an engine request that began elsewhere.

vLLM's V2 model runner takes output that a new request brings as what it is; the V1 runner takes it as prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taichi_serve.cluster.vllm.core.marks import marks_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


def as_output(request: Request, count: int) -> None:
    """Turn the last `count` prompt tokens of a new request back into the output they are.

    vLLM's V2 model runner takes such a request as it takes one that resumes after a preemption, so seeds
    and penalties see what they would have seen without the move. The V1 runner cannot.
    """
    params = request.sampling_params
    assert params is not None and params.max_tokens is not None and request.prompt_token_ids is not None
    tokens = request.prompt_token_ids[-count:]
    request.prompt_token_ids = request.prompt_token_ids[:-count]
    request.num_prompt_tokens -= count
    del request._all_token_ids[-count:]
    request.append_output_token_ids(tokens)
    request.prefill_stats = None  # its prefill was counted elsewhere
    params.max_tokens += count
    params.min_tokens += marks_of(request).min_tokens_done
    request.max_tokens = params.max_tokens


def keep_room(request: Request, count: int) -> None:
    """Let a request whose KV is copied ahead ask for the blocks of `count` tokens more than it has yet.

    They stand in for tokens still to come, and have no block hashes: nobody will find them in a cache.
    """
    request._all_token_ids.extend([0] * count)
    request.prefill_stats = None


def go_on(request: Request, tokens: list[int], v2: bool) -> None:
    """The source made its last token: `tokens` came since the request was sent here, in place of the room
    kept."""
    params = request.sampling_params
    assert params is not None and params.max_tokens is not None and request.prompt_token_ids is not None
    del request._all_token_ids[-marks_of(request).ahead :]
    if v2:
        request.append_output_token_ids(tokens)
        return
    request.prompt_token_ids.extend(tokens)
    request.num_prompt_tokens += len(tokens)
    request._all_token_ids.extend(tokens)
    request.update_block_hashes()
    params.max_tokens -= len(tokens)
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    request.max_tokens = params.max_tokens
