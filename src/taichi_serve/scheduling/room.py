"""Room in a KV cache: how much to promise to a request, and how full an instance will be with it."""

from __future__ import annotations

from collections.abc import Sequence

from taichi_serve.instance import Instance
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.residency import Prefixes


def room_for(kv_tokens: int, policy: Policy) -> int:
    """KV tokens to promise to a request that comes with `kv_tokens`: it grows while it is on its way."""
    return kv_tokens + policy.growth


def load_after(instance: Instance, kv_tokens: int, policy: Policy) -> float:
    """Share of the KV cache in use once a request with `kv_tokens` has landed on this instance.

    Counted are the blocks in use, the room already promised, the prompts queued here, and that every
    resident grows while the move is under way. Of the newcomer and of who is queued, tokens in blocks that
    others use already count once; those that are cached and used by nobody take room like new ones.
    """
    grown = policy.growth * (instance.decodes + 1)
    queued = instance.queued_tokens - instance.progress_tokens + instance.queued_unused
    used = instance.kv_tokens + instance.reserved_tokens + queued
    return (used + kv_tokens + grown) / instance.kv_capacity


def roomiest(decoders: Sequence[Instance], prefixes: Prefixes) -> tuple[Instance, int]:
    """The one whose KV is used least, and how many tokens of the prompt it has."""
    least, roomiest = float("inf"), (decoders[0], 0)
    for decoder in decoders:
        held = 0
        if prefixes and (prefix := prefixes.get(decoder.name)) is not None:
            held = prefix.device
        used = (decoder.kv_tokens - held) / decoder.kv_capacity
        if used < least:
            least, roomiest = used, (decoder, held)
    return roomiest
