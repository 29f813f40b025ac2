"""What a model is before it is loaded: vLLM's configuration of it, its shape, the bytes of its weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from vllm.config import ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.transformers_utils.config import get_safetensors_params_metadata

from taichi_serve.cluster.vllm.misuse import one_line_given
from taichi_serve.latency.device import Shape, shape_of

# Bytes of an item of those types of a checkpoint that become the type that the model is served in.
CONVERTED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_FILES = ("*.bin", "*.pt", "*.gguf")


def model_config(args: argparse.Namespace, argv: list[str]) -> ModelConfig:
    """vLLM's configuration of the model of a command line; raises ValueError with one line."""
    try:
        return AsyncEngineArgs.from_cli_args(args).create_model_config()
    except Exception as error:
        raise ValueError(one_line_given(error, argv)) from error


def shape(model: ModelConfig) -> Shape | None:
    """Its shape, if it is a dense model with full attention in every layer."""
    if model.is_moe or model.use_mla or model.is_hybrid or model.is_attention_free:
        return None
    try:
        return shape_of(model.hf_text_config.to_dict(), model.model, Path(model.model))
    except ValueError:
        return None


def plain(model: ModelConfig) -> bool:
    """Whether its weights are 16 bits each: what a roofline counts on."""
    return model.quantization is None and model.dtype.itemsize == 2


def weight_bytes(model: ModelConfig) -> float | None:
    """Bytes of its weights once they are loaded, or None where neither files nor its shape say."""
    whole = model.dtype.itemsize if model.quantization is None else None
    if found := sum(_loaded(tensor, whole) for tensor in _tensors(model).values()):
        return found
    path = Path(model.model)
    files = [path] if path.is_file() else [file for form in OTHER_FILES for file in path.glob(form)]
    if found := float(sum(file.stat().st_size for file in files)):
        return found
    dense = shape(model)
    return None if dense is None or whole is None else dense.weight_bytes * whole / 2


def _loaded(tensor: Mapping[str, Any], whole: int | None) -> float:
    """Bytes of a tensor once it is loaded, where floating-point numbers become `whole` bytes each."""
    begin, end = tensor.get("data_offsets", (0, 0))  # none: a file's own words about itself
    stored = CONVERTED.get(tensor.get("dtype", ""))
    return float(end - begin) if stored is None or whole is None else (end - begin) * whole / stored


def _tensors(model: ModelConfig) -> dict[str, Any]:
    """Every tensor by its name, with type and place in its file; nothing where that cannot be had."""
    if model.model_weights:  # in a bucket: the configuration alone was fetched
        return {}
    if not Path(model.model).exists():
        try:
            kept = snapshot_download(model.model, revision=model.revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            kept = ""
        # What is here already need not be asked for.
        if kept and (found := get_safetensors_params_metadata(kept)):
            return dict(found)
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            return {}
    return dict(get_safetensors_params_metadata(model.model, revision=model.revision))
