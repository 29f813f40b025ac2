"""Flags of vLLM that have no meaning here, a misleading one, or one that would end an engine: each with why.

Everything that is not in this table is vLLM's own and applies to each instance. A test feeds every flag of
vLLM's parser, so a new one that dies is noticed.
"""

from __future__ import annotations

import argparse

from taichi_serve.cluster.vllm.moved import says_no

_INSTANCES = "instances are TaiChi's: use --data-parallel-size, or --p-heavy and --d-heavy"
_ONE_HOST = "all instances of a server are on its host"
_CONTEXT = "context parallelism is not supported: KV would be spread over ranks that a move does not know"
_SPECULATIVE = "speculative decoding is not supported yet"
_TRANSFER = "TaiChi sets up the KV transfer between its instances itself"
_EVENTS = "every instance would publish on the same port"
_OFFLOAD = "only vLLM's own offloading is known to leave moves exact"
_POOLING = "only models that generate are served: pooling models have nothing to move"
_FRONT = "requests come over HTTP"
_CHUNKS = "the chunk of an instance is set by --p-chunk and --d-chunk"
_MULTIMODAL = "it ties the front end to one engine process, and here are several"
_SLEEP = "instances cannot be put to sleep"
_REPLAY = "what an engine notes of its own steps is lost when a request moves"
_FAULTS = "TaiChi watches its instances itself"

# By vLLM's name of the setting (argparse's dest).
REFUSED: dict[str, str] = {
    "headless": _ONE_HOST,
    "nnodes": _ONE_HOST,
    "node_rank": _ONE_HOST,
    "master_addr": _ONE_HOST,
    "master_port": _ONE_HOST,
    "distributed_executor_backend": "only worker processes on this host (mp) or none (uni) are supported",
    "ray_workers_use_nsight": "Ray is not supported",
    "grpc": _FRONT,
    "grpc_port": _FRONT,
    "data_parallel_rank": _INSTANCES,
    "data_parallel_start_rank": _INSTANCES,
    "data_parallel_size_local": _INSTANCES,
    "data_parallel_address": _INSTANCES,
    "data_parallel_rpc_port": _INSTANCES,
    "data_parallel_backend": _INSTANCES,
    "data_parallel_hybrid_lb": _INSTANCES,
    "data_parallel_external_lb": _INSTANCES,
    "data_parallel_multi_port_external_lb": _INSTANCES,
    "data_parallel_supervisor_port": _INSTANCES,
    "dp_supervisor_probe_interval_s": _INSTANCES,
    "dp_supervisor_probe_timeout_s": _INSTANCES,
    "dp_supervisor_probe_failure_threshold": _INSTANCES,
    "dp_sync_interval": _INSTANCES,
    "disable_nccl_for_dp_synchronization": _INSTANCES,
    "prefill_schedule_interval": "it aligns data-parallel ranks, and " + _INSTANCES,
    "enable_elastic_ep": "instances change with the sliders, not with elastic experts",
    "elastic_ep_max_dp_size": "instances change with the sliders, not with elastic experts",
    "pipeline_parallel_size": "pipeline parallelism is not supported: use --tensor-parallel-size",
    "prefill_context_parallel_size": _CONTEXT,
    "decode_context_parallel_size": _CONTEXT,
    "dcp_comm_backend": _CONTEXT,
    "dcp_q_replicate": _CONTEXT,
    "dcp_kv_cache_interleave_size": _CONTEXT,
    "cp_kv_cache_interleave_size": _CONTEXT,
    "device_ids": "devices are given to instances by --devices",
    "numa_bind_nodes": "one list cannot fit all instances: use --numa-bind alone",
    "numa_bind_cpus": "one list cannot fit all instances: use --devices",
    "enable_fault_tolerance": _FAULTS,
    "fault_tolerance_config": _FAULTS,
    "runner": _POOLING,
    "convert": _POOLING,
    "pooler_config": _POOLING,
    "diffusion_config": "only models that generate token by token are served",
    "speculative_config": _SPECULATIVE,
    "spec_method": _SPECULATIVE,
    "spec_model": _SPECULATIVE,
    "spec_tokens": _SPECULATIVE,
    "per_request_spec_decode_metrics": _SPECULATIVE,
    "kv_transfer_config": _TRANSFER,
    "ec_transfer_config": "encoder outputs are not moved between instances",
    "mm_encoder_only": "an instance must be able to generate",
    "kv_events_config": _EVENTS,
    "kv_offloading_backend": _OFFLOAD,
    "kv_sharing_fast_prefill": "KV of layers that are skipped cannot be moved",
    "scheduler_cls": "TaiChi brings its own scheduler class",
    "async_scheduling": "TaiChi's scheduler class is the asynchronous one",
    "enable_chunked_prefill": "without it a prompt above the chunk would never be computed",
    "max_num_scheduled_tokens": _CHUNKS,
    "long_prefill_token_threshold": _CHUNKS,
    "long_prefill_token_threshold_adaptive": _CHUNKS,
    "mm_tensor_ipc": _MULTIMODAL,
    "mm_ipc_gpu_memory_gb": _MULTIMODAL,
    "enable_sleep_mode": _SLEEP,
    "sleep_mode_offload_cudagraph": _SLEEP,
    "sleep_preserve_parameter_names": _SLEEP,
    "enable_nccl_comm_suspend": _SLEEP,
    "enable_cumem_allocator": "other instances cannot read KV in memory of that allocator",
    "weight_transfer_config": "weights cannot be exchanged while several instances serve",
    "enable_return_routed_experts": _REPLAY,
    "return_sampling_mask": _REPLAY,
    "enable_trace_replay": _REPLAY,
    "aux_output_config": _REPLAY,
}

# Values beside the default that say how things are anyway.
HARMLESS: dict[str, tuple[object, ...]] = {
    "async_scheduling": (True,),
    "convert": ("none",),
    "data_parallel_size_local": (1,),
    "data_parallel_rank": (0,),
    "data_parallel_start_rank": (0,),
    "distributed_executor_backend": ("mp", "uni"),
    "enable_chunked_prefill": (True,),
    "runner": ("generate",),
}


def refusal(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """Why this command line of `serve` cannot be used, naming the first such flag, or None."""
    for action in parser._actions:
        why = REFUSED.get(action.dest)
        value = getattr(args, action.dest, action.default)
        if why is not None and value != action.default and value not in HARMLESS.get(action.dest, ()):
            flags = [name for name in action.option_strings if name.startswith("--")]
            said = next((flag for flag in flags if says_no(flag, action) == (value is False)), flags[0])
            return f"{said} cannot be used with taichi serve: {why}"
    return None
