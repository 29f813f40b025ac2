"""The hashes of the blocks of a prompt that are to be fetched, as every engine makes them.

They are whole: an instance finds in its prefix cache what has this very hash, and nobody can make up another
prompt that has it, too.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from vllm.config import CacheConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.engine import EngineCoreRequest

AT_ONCE = 128  # blocks that are hashed before others have their turn


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
