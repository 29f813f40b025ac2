"""Which kinds of KV move exactly between instances. docs/moving.md is this table in words.

A move hands over blocks: a list of numbers that means the same at both ends only where a request has one
list, a block holds all layers of its tokens and nothing else, and is never written again once it is full.
That is vLLM's plain full attention in one group. Everything else stays until somebody has shown that it
moves exactly, also what a later vLLM brings: a kind that is not in the table stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Classes of vLLM's KVCacheSpec, by name: why one stays, or None where it moves. Without the hybrid manager
# sliding windows and chunked local attention are FullAttentionSpec too: all their blocks are kept.
KINDS: dict[str, str | None] = {
    "FullAttentionSpec": None,
    "MLAAttentionSpec": "latent attention has not been shown to move exactly",
    "HiddenStateCacheSpec": "hidden states have not been shown to move exactly",
    "RSWASpec": "blocks in the middle of a request are given back",
    "SinkFullAttentionSpec": "sinks live in blocks of no request",
    "SlidingWindowSpec": "blocks before the window are given back, so the lists at both ends differ",
    "SlidingWindowMLASpec": "blocks before the window are given back, so the lists at both ends differ",
    "ChunkedLocalAttentionSpec": "blocks before the chunk are given back, so the lists at both ends differ",
    "CircularBufferSpec": "its one block is written over and over",
    "MambaSpec": "a recurrent state: the step under way has moved it on",
    "EncoderOnlyAttentionSpec": "an encoder keeps no KV of tokens",
    "CrossAttentionSpec": "KV of the encoder's input, not of tokens",
    "HiSparseHotSpec": "a replica of blocks that live elsewhere",
    "HiSparseResidentSpec": "its blocks live in the host's memory",
    "UniformTypeKVCacheSpecs": "layers of different shapes have not been shown to move exactly",
    # What the others are made from; no layer has them.
    "KVCacheSpec": "nothing is known of it",
    "AttentionSpec": "nothing is known of it",
}
UNKNOWN = "this kind of KV is not known"


def stays(config: KVCacheConfig, vllm_config: VllmConfig | None = None) -> list[str]:
    """Why requests of an engine with this KV stay where they are, a sentence for each reason; empty where
    they move."""
    groups = config.kv_cache_groups
    found = [f"the model's KV is of {len(groups)} groups, not of one"] if len(groups) != 1 else []
    for group in groups:
        kind = type(group.kv_cache_spec).__name__
        if (why := KINDS.get(kind, UNKNOWN)) is not None:
            found.append(f"{kind}: {why}")
        mode = getattr(group.kv_cache_spec, "kv_quant_mode", None)
        if mode is not None and mode.is_per_token_head:
            found.append("KV with a scale for each token has not been shown to move exactly")
    # The scheduler is shown one layer of a group whose layers differ; where they lie gives it away.
    shapes = {(tensor.layer_stride, tensor.block_stride) for tensor in config.kv_cache_tensors}
    if len(groups) == 1 and len(shapes) > 1:
        found.append(f"UniformTypeKVCacheSpecs: {KINDS['UniformTypeKVCacheSpecs']}")
    if vllm_config is not None:
        parallel = vllm_config.parallel_config
        if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
            found.append("context parallelism spreads the tokens of a block over ranks")
    return list(dict.fromkeys(found))
