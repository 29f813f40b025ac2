"""The hashes of a prompt's full blocks, made by the server as every engine makes them.

They are made by vLLM's own functions, so what tells prompts with the same tokens apart (adapters, salts,
pictures) does so here too. An instance tells the same hashes of what it caches (core/cached.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens

from taichi_serve.cluster.vllm.server.facts import hashes
from taichi_serve.cluster.vllm.server.figures import looks_up
from taichi_serve.cluster.vllm.wire import HASH_BYTES, Call

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.engine import EngineCoreRequest

    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.cluster.vllm.server.scratch import Say

AT_ONCE = 2048  # tokens that are hashed before others have their turn: a quarter of a millisecond


class Hasher:
    """Hashes blocks of `block_size` tokens. `first` is what the hash of a first block is chained to, as hex:
    who begins otherwise makes other hashes."""

    def __init__(self, algorithm: str, block_size: int) -> None:
        """`algorithm` is one of vLLM's --prefix-caching-hash-algo."""
        self.block_size = block_size
        self._function = get_hash_fn_by_name(algorithm)
        kv_cache_utils.init_none_hash(self._function)
        self.first = kv_cache_utils.NONE_HASH.hex()

    async def of(self, request: EngineCoreRequest) -> tuple[int, ...]:
        """64 bits of the hash of each full block of its prompt, in order; no hashes where vLLM would not look
        for them, or where the tokens do not say what is computed."""
        count = len(request.prompt_token_ids or ()) // self.block_size
        if not count or not is_looked_for(request, caching=True):
            return ()
        found = await block_hashes(request, count, self.block_size, self._function)
        return hashes(b"".join([one[:HASH_BYTES] for one in found]))


def is_looked_for(request: EngineCoreRequest, caching: bool) -> bool:
    """Whether vLLM looks for the blocks of its prompt in a prefix cache, where `caching` says that there is
    one, and its tokens say what is computed."""
    plain = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.resumable
    return plain and looks_up(request, caching)


async def block_hashes(
    request: EngineCoreRequest, count: int, size: int, function: Callable[[Any], bytes]
) -> list[BlockHash]:
    """Of the first `count` blocks of `size` tokens of its prompt; fewer where it has not as many."""
    tokens = request.prompt_token_ids or []
    at_once = max(1, AT_ONCE // size)
    found: list[BlockHash] = []
    parent: BlockHash | None = None
    extra: tuple[Any, ...] | None = None
    picture = 0
    for number in range(min(count, len(tokens) // size)):
        if number and number % at_once == 0:
            await asyncio.sleep(0)
        begin, end = number * size, (number + 1) * size
        if number < 2 or request.mm_features:  # nothing else sets a later block apart from the second
            extra, picture = generate_block_hash_extra_keys(cast(Any, request), begin, end, picture)
        parent = hash_block_tokens(function, parent, tokens[begin:end], extra)
        found.append(parent)
    return found


async def agreed(engines: Sequence[Engine], say: Say) -> Hasher | None:
    """Have all instances tell what they cache; None where one cannot, which is said, or where caching is off.

    One that is lost meanwhile is no reason: whoever takes its place is asked as well.
    """
    cache = engines[0].client.vllm_config.cache_config
    if not cache.enable_prefix_caching:
        return None
    hasher = Hasher(cache.prefix_caching_hash_algo, cache.block_size)
    calls = (engine.client.call_utility_async(Call.CACHED, hasher.first) for engine in engines)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    why = next((answer for answer in answers if isinstance(answer, str)), None)
    if why is None and any(isinstance(answer, int) and answer != hasher.block_size for answer in answers):
        why = f"its blocks have other sizes than {hasher.block_size} tokens"
    if why is None:
        return hasher
    say(f"what instances have cached is not known: {why}")
    return None
