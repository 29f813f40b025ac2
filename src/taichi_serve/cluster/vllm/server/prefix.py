"""What is to be fetched of a prompt, and the hashes of its blocks, as every engine makes them.

The hashes are whole: an instance finds in its prefix cache what has this very hash, and nobody can make up
another prompt that has it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from vllm.config import CacheConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.blocks import block_hashes, is_looked_for
from taichi_serve.cluster.vllm.server.fetching import Prefix

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.engine import Engine
    from taichi_serve.messages import Prefill


def to_fetch(request: EngineCoreRequest, command: Prefill, known: Mapping[str, Engine]) -> Prefix | None:
    """What a decision has a prompt fetch, in whole blocks. Its last token is computed in any case."""
    holder = known.get(command.prefix_from or "")
    if holder is None:
        return None
    cache = holder.client.vllm_config.cache_config
    tokens = min(command.prefix_tokens, len(request.prompt_token_ids or ()) - 1)
    blocks = tokens // int(cache.block_size)
    if blocks < 1 or not is_looked_for(request, cache.enable_prefix_caching):
        return None
    return Prefix(holder, blocks)


async def prefix_hashes(request: EngineCoreRequest, blocks: int, cache: CacheConfig) -> list[bytes]:
    """Of the first `blocks` blocks of its prompt; fewer where it has not as many."""
    function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
    if not hasattr(kv_cache_utils, "NONE_HASH"):
        kv_cache_utils.init_none_hash(function)
    return cast(list[bytes], await block_hashes(request, blocks, cache.block_size, function))
