"""What the server may call on an engine core. vLLM names a utility call by a method of EngineCore and has no
other way in, so these are added to it (contract: tests/contract)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

from vllm.v1.engine.core import EngineCore

from taichi_serve.cluster.vllm.core.connector import FlowConnectorScheduler
from taichi_serve.cluster.vllm.core.forget import let_go, stopped
from taichi_serve.cluster.vllm.core.order import put_off
from taichi_serve.cluster.vllm.core.scheduler import FlowScheduler
from taichi_serve.cluster.vllm.heap import settle
from taichi_serve.cluster.vllm.wire import Call


def _scheduler(core: EngineCore) -> FlowScheduler:
    return cast(FlowScheduler, core.scheduler)


def taichi_leave(core: EngineCore, request_ids: list[str]) -> None:
    """Utility call: see FlowScheduler.leave."""
    _scheduler(core).leave(request_ids)


def taichi_release(
    core: EngineCore, request_ids: list[str], readers: Sequence[str] = ()
) -> tuple[int, float]:
    """Utility call: see FlowScheduler.release."""
    return _scheduler(core).release(request_ids, readers)


def taichi_drop(core: EngineCore, leg: str) -> Future[bool] | bool:
    """Utility call: see FlowScheduler.drop. vLLM answers when the future is done."""
    return _scheduler(core).drop(leg)


def taichi_direct(core: EngineCore) -> list[str]:
    """Utility call: engines whose memory every rank here reads itself. Who is on another host cannot look."""
    side = cast(FlowConnectorScheduler, cast(Any, _scheduler(core).connector).connector_scheduler)
    return side.directly()


def taichi_stopped(core: EngineCore) -> Future[bool] | bool:
    """Utility call: see forget.stopped. vLLM answers when the future is done."""
    return stopped(_scheduler(core))


def taichi_let_go(core: EngineCore) -> None:
    """Utility call: see forget.let_go."""
    let_go(_scheduler(core))


def taichi_here(core: EngineCore) -> None:
    """Utility call: the engine core runs. It makes no step and speaks to no worker: vLLM's workers spin for a
    second after each message."""


def taichi_kv(core: EngineCore) -> list[str]:
    """Utility call: why requests of this engine stay where they are (groups.py); empty where they move."""
    return _scheduler(core).stays


def taichi_pin(core: EngineCore, request_id: str, reader: str) -> list[int] | None:
    """Utility call: see FlowScheduler.pin."""
    return _scheduler(core).pin(request_id, reader)


def taichi_prefix(core: EngineCore, reader: str, hashes: list[bytes]) -> Future[list[int]] | list[int]:
    """Utility call: see Prefixes.ask. vLLM answers when the future is done."""
    return _scheduler(core).prefixes.ask(reader, hashes)


def taichi_fetched(core: EngineCore, leg: str, blocks: int) -> None:
    """Utility call: see Fetches.fetched."""
    _scheduler(core).fetches.fetched(leg, blocks)


def taichi_waive(core: EngineCore, leg: str) -> bool:
    """Utility call: see Fetches.waive."""
    return _scheduler(core).fetches.waive(leg)


def taichi_arrive(core: EngineCore, request_id: str, tokens: list[int]) -> bool:
    """Utility call: see FlowScheduler.arrive."""
    return _scheduler(core).arrive(request_id, tokens)


def taichi_cached(core: EngineCore, first: str) -> int | str:
    """Utility call: see CachedBlocks.follow."""
    return _scheduler(core).cached.follow(first)


def taichi_chunk(core: EngineCore, chunk: int) -> None:
    """Utility call: at most `chunk` prompt tokens in each step from the next one on."""
    _scheduler(core).chunk = chunk


def taichi_put_off(core: EngineCore, leg: str, by: float) -> None:
    """Utility call: see order.put_off."""
    put_off(_scheduler(core), leg, by)


def taichi_settle(core: EngineCore) -> None:
    """Utility call: the engine core is warm."""
    settle()


CALLS = {
    Call.ARRIVE: taichi_arrive,
    Call.CACHED: taichi_cached,
    Call.CHUNK: taichi_chunk,
    Call.DROP: taichi_drop,
    Call.FETCHED: taichi_fetched,
    Call.DIRECT: taichi_direct,
    Call.HERE: taichi_here,
    Call.KV: taichi_kv,
    Call.LEAVE: taichi_leave,
    Call.LET_GO: taichi_let_go,
    Call.PIN: taichi_pin,
    Call.PREFIX: taichi_prefix,
    Call.PUT_OFF: taichi_put_off,
    Call.RELEASE: taichi_release,
    Call.SETTLE: taichi_settle,
    Call.STOPPED: taichi_stopped,
    Call.WAIVE: taichi_waive,
}


def install() -> None:
    """Add them."""
    for name, function in CALLS.items():
        setattr(EngineCore, name, function)
