"""A request on its way through instances: its tokens so far, and the engine request of each of its legs."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.wire import Marks, TransferParams
from taichi_serve.messages import Move

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.ahead import Ahead


@dataclass(slots=True)
class Held:
    """KV that waits, pinned, on the instance a request just left."""

    instance: int
    engine_request: str  # the leg's id there
    params: TransferParams
    at: float  # seconds, when the last token came


@dataclass(slots=True)
class Going:
    """A decided move whose request is still on its way out."""

    leg: int
    to: int
    move: Move


@dataclass(slots=True, eq=False)
class Live:
    """One request that the cluster has accepted and not finished."""

    request: EngineCoreRequest  # as the front end made it
    tokens: list[int] = field(default_factory=list)  # output so far
    leg: int = 0
    instance: int = -1  # whose engine runs the leg; -1 between legs
    engine_request: str = ""  # the leg's id in that engine
    awaiting: bool = True  # no token of this leg has come yet
    held: Held | None = None
    going: Going | None = None
    reader: Held | None = None  # what the current leg is pulling, until its first token
    last_at: float = 0.0  # when its last token came
    left_at: float = 0.0  # when the engine before had made its last token, by that engine's word
    deadline: asyncio.TimerHandle | None = None
    ahead: Ahead | None = None  # the next leg, while its KV is copied; this one's, until its first token
    warm: asyncio.Future[int] | None = None  # set on a warm-up request: the user never sees it

    @property
    def id(self) -> str:
        """The request's id in the front end."""
        return self.request.request_id

    def cancel_deadline(self) -> None:
        """Nothing is awaited any more."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def first_leg(live: Live, hand_over: bool) -> EngineCoreRequest:
    """The engine request of a prefill; with `hand_over` it ends after the first token, and what it has
    computed is pinned for the leg after it."""
    if not hand_over and live.leg == 0:
        return live.request
    request = copy.copy(live.request)
    request.request_id = engine_id(live)
    if hand_over:
        request.sampling_params = _with_extra(
            _params(live), Marks(hand_over=True, reader=ahead_id(live, live.leg + 1)).entry()
        )
    return request


def next_leg(live: Live, kv: TransferParams | None, name: str = "", room: int = 0) -> EngineCoreRequest:
    """The engine request that goes on after the tokens so far, with the KV to pull if there is any; or with
    `room` for tokens that are still to come, if its KV is copied ahead. It is called `name`, by default as
    its leg."""
    request = copy.copy(live.request)
    request.request_id = name or engine_id(live)
    request.prompt_token_ids = [*(live.request.prompt_token_ids or ()), *live.tokens]
    done = len(live.tokens)
    mandatory = min(done, _params(live).min_tokens)
    extra = Marks(moved=True, output=done, min_tokens_done=mandatory, ahead=room).entry()
    if kv is not None:
        extra["kv_transfer_params"] = dict(kv)
    params = _with_extra(_params(live), extra)
    assert params.max_tokens is not None  # the input processor fills it in
    params.max_tokens -= done
    params.min_tokens -= mandatory
    request.sampling_params = params
    return request


def engine_id(live: Live) -> str:
    """The id of this leg in its engine: a request that comes back must not meet its own old blocks."""
    return f"{live.id}#{live.leg}" if live.leg else live.id


def ahead_id(live: Live, leg: int) -> str:
    """The id of a leg that is copied ahead: where that comes to nothing, the leg begins anew under its
    own."""
    return f"{live.id}#{leg}+"


def _params(live: Live) -> SamplingParams:
    params = live.request.sampling_params
    assert params is not None  # pooling requests never move
    return params


def _with_extra(params: SamplingParams, extra: dict[str, object]) -> SamplingParams:
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), **extra}
    return params
