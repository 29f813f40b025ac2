"""What the outputs of an engine say, as facts for the scheduler."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from taichi_serve.cluster.vllm.server.passage import Times
from taichi_serve.cluster.vllm.wire import HASH_BYTES, KEY, Caching, MovedIn, Record
from taichi_serve.messages import Cached, Flowed, Prefilled, Stepped, Tier, Timeline

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.cluster.vllm.server.journey import Journey


def told(engine: Engine, outputs: EngineCoreOutputs, now: float) -> list[Cached | Stepped]:
    """What the record of a step says, if these outputs have one: what its prefix cache holds since, and the
    step, if anything was computed in it. Takes the record out of them."""
    stats = outputs.scheduler_stats
    record = stats.kv_connector_stats.pop(KEY, None) if stats and stats.kv_connector_stats else None
    if record is None or stats is None:
        return []
    stats.kv_connector_stats = stats.kv_connector_stats or None
    step = msgspec.convert(record, Record)
    engine.made_at = engine.offset.here(step.made)
    engine.moved_in, engine.news = step.moved_in, step.news
    engine.holds(step.kv_tokens, step.made)
    engine.running, engine.waiting = stats.num_running_reqs, stats.num_waiting_reqs
    found: list[Cached | Stepped] = []
    for caching, tier in ((step.cached, Tier.DEVICE), (step.host, Tier.HOST)):
        if caching is not None:
            found.append(_cached(engine, caching, tier, now))
    if step.prefill_tokens or step.decodes:
        missed = engine.residents.keys() - {output.request_id for output in outputs.outputs}
        found.append(
            Stepped(
                at=now,
                instance=engine.name,
                seconds=step.seconds,
                prefill_tokens=step.prefill_tokens,
                decodes=step.decodes,
                kv_tokens=step.kv_tokens,
                waiting=engine.waiting,
                missed=tuple(engine.residents[i] for i in missed),
            )
        )
    return found


def _cached(engine: Engine, caching: Caching, tier: Tier, now: float) -> Cached:
    fact = Cached(now, engine.name, hashes(caching.stored), hashes(caching.removed), caching.reset, tier)
    more = len(fact.stored) - len(fact.removed)
    if tier is Tier.DEVICE:
        engine.cached_blocks = more + (0 if fact.reset else engine.cached_blocks)
    else:
        engine.host_blocks = more + (0 if fact.reset else engine.host_blocks or 0)
    return fact


def hashes(packed: bytes) -> tuple[int, ...]:
    """Hashes of blocks, out of the bytes that are told of them."""
    return struct.unpack(f"<{len(packed) // HASH_BYTES}Q", packed)


def began(
    engine: Engine, journey: Journey, output: EngineCoreOutput, gap: float, held: bool
) -> Prefilled | Flowed:
    """The first token of a leg that is about to be told to its journey."""
    now = journey.last_at
    if journey.placed:
        stats, waits = output.prefill_stats, held and journey.going is None
        cached, came = (stats.num_cached_tokens, stats.num_external_cached_tokens) if stats else (0, 0)
        fetched, loaded = (came, 0) if journey.has_fetched else (0, came)
        where = journey.id, journey.leg, engine.name
        copied = _fetch(journey.fetch_times) if fetched else None
        return Prefilled(now, *where, int(cached), waits, int(fetched), int(loaded), copied)
    moved_in = engine.moved_in.get(journey.leg_id, MovedIn())
    return Flowed(
        now,
        journey.id,
        journey.leg,
        engine.name,
        len(journey.tokens),
        int(moved_in.pulled),
        gap,
        int(moved_in.reused),
        _timeline(engine, journey, moved_in, now - gap) if moved_in.scheduled else None,
    )


def _fetch(copied: Times | None) -> tuple[float, float] | None:
    """From when to when a prefix was copied; it may have come in one piece."""
    return None if copied is None else (copied.began or copied.tail_began, copied.landed)


def _timeline(engine: Engine, journey: Journey, moved_in: MovedIn, heard: float) -> Timeline:
    copied, here = journey.passage.times if journey.passage is not None else None, engine.offset.here
    if copied is None or not copied.tail_began:  # it was not copied ahead
        copied = Times(tail_began=here(moved_in.began), landed=here(moved_in.landed))
    return Timeline(
        left=journey.left_at,
        heard=heard,
        arrived=here(moved_in.arrived),
        began=copied.tail_began,
        landed=copied.landed,
        scheduled=here(moved_in.scheduled),
        made=engine.made_at,
        at=journey.last_at,
        before=here(moved_in.before),
        ahead=copied.began,
        copied=copied.copied,
        copied_blocks=copied.blocks,
        copy_seconds=copied.seconds,
    )
