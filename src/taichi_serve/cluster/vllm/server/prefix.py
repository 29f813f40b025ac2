"""What is to be fetched of a prompt, and the hashes of its blocks, as every engine makes them.

The hashes are whole: an instance finds in its prefix cache what has this very hash, and nobody can make up
another prompt that has it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from vllm.config import CacheConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.fetching import Prefix
from taichi_serve.cluster.vllm.server.figures import looks_up

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.messages import Prefill

AT_ONCE = 128  # blocks that are hashed before others have their turn


def to_fetch(request: EngineCoreRequest, command: Prefill, known: Mapping[str, Engine]) -> Prefix | None:
    """What a decision has a prompt fetch, in whole blocks. Its last token is computed in any case."""
    tokens, holder = request.prompt_token_ids, known.get(command.prefix_from or "")
    if holder is None or tokens is None or request.prompt_embeds is not None or request.resumable:
        return None
    cache = holder.client.vllm_config.cache_config
    blocks = min(command.prefix_tokens, len(tokens) - 1) // int(cache.block_size)
    if blocks < 1 or not looks_up(request, cache.enable_prefix_caching):
        return None
    return Prefix(holder, blocks)


async def prefix_hashes(request: EngineCoreRequest, blocks: int, cache: CacheConfig) -> list[bytes]:
    """Of the first `blocks` blocks of its prompt; fewer where it has not as many."""
    function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
    if not hasattr(kv_cache_utils, "NONE_HASH"):
        kv_cache_utils.init_none_hash(function)
    tokens, size = request.prompt_token_ids or [], cache.block_size
    found: list[BlockHash] = []
    picture = 0
    for number in range(min(blocks, len(tokens) // size)):
        if number and number % AT_ONCE == 0:
            await asyncio.sleep(0)
        begin, end = number * size, (number + 1) * size
        extra, picture = generate_block_hash_extra_keys(cast(Any, request), begin, end, picture)
        found.append(hash_block_tokens(function, found[-1] if found else None, tokens[begin:end], extra))
    return cast(list[bytes], found)
