"""The engine request of one leg, made of what the user asked for and the tokens so far."""

from __future__ import annotations

import copy
from typing import Any

from msgspec.structs import replace
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.acts import ANY, Place
from taichi_serve.cluster.vllm.wire import NO_MARKS, Marks, TransferParams


def first_leg(
    request: EngineCoreRequest,
    name: str,
    reader: str | None,
    fetch: int = 0,
    place: Place = ANY,
    bound: bool = False,
) -> EngineCoreRequest:
    """The engine request of a prefill. With `reader` it ends after the first token, and what it has computed
    is pinned for the leg of that name; its first `fetch` blocks come from another instance. Once it has a
    token one that is `bound` can go on nowhere else."""
    marks = _placed(Marks(hand_over=reader is not None, reader=reader, fetch=fetch, bound=bound), place)
    if marks == NO_MARKS and name == request.request_id:
        return request
    leg = copy.copy(request)
    leg.request_id = name
    if marks != NO_MARKS and request.sampling_params is not None:  # pooling requests have none
        leg.sampling_params = _with_extra(request.sampling_params, marks.entry())
    return leg


def next_leg(
    request: EngineCoreRequest,
    name: str,
    tokens: list[int],
    kv: TransferParams | None = None,
    room: int = 0,
    place: Place = ANY,
) -> EngineCoreRequest:
    """The engine request that goes on after these output tokens, with the KV to pull if there is any; or with
    `room` for tokens that are still to come, if its KV is copied ahead."""
    leg = copy.copy(request)
    leg.request_id = name
    leg.prompt_token_ids = [*(request.prompt_token_ids or ()), *tokens]
    done = len(tokens)
    mandatory = min(done, _params(request).min_tokens)
    marks = _placed(Marks(moved=True, output=done, min_tokens_done=mandatory, ahead=room), place)
    extra = marks.entry()
    if kv is not None:
        extra["kv_transfer_params"] = dict(kv)
    params = _with_extra(_params(request), extra)
    assert params.max_tokens is not None  # the input processor fills it in
    params.max_tokens -= done
    params.min_tokens -= mandatory
    leg.sampling_params = params
    return leg


def _placed(marks: Marks, place: Place) -> Marks:
    return marks if place == ANY else replace(marks, by=place.by, best_effort=place.best_effort)


def _params(request: EngineCoreRequest) -> SamplingParams:
    params = request.sampling_params
    assert params is not None  # pooling requests never move
    return params


def _with_extra(params: SamplingParams, extra: dict[str, Any]) -> SamplingParams:
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), **extra}
    return params
