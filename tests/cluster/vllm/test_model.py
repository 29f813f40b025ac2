"""What a model is before it is loaded: of the tiny one and of directories with nothing but headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.identity import kv_bytes
from taichi_serve.cluster.vllm.model import model_config, plain, shape, weight_bytes
from taichi_serve.tiny import TinyModel, cached_tiny_model

TINY = TinyModel()


def config(directory: Path, *words: str) -> Any:
    argv = [str(directory), "--max-model-len", "1024", *words]
    return model_config(flags.parse(argv), argv)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    kept = cached_tiny_model()
    for path in kept.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def header(tensors: dict[str, tuple[str, int]]) -> bytes:
    """The head of a safetensors file with tensors of a type and so many bytes, and without these bytes."""
    begin, said = 0, {}
    for name, (kind, size) in tensors.items():
        said[name] = {"dtype": kind, "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(said).encode()
    return len(text).to_bytes(8, "little") + text


def test_the_weights_of_a_file_are_what_its_header_says() -> None:
    found = config(cached_tiny_model(), "--dtype", "float32")
    size = sum(path.stat().st_size for path in cached_tiny_model().glob("*.safetensors"))
    assert weight_bytes(found) == pytest.approx(size, rel=0.01)


def test_weights_that_are_loaded_in_another_type_take_its_bytes() -> None:
    whole = weight_bytes(config(cached_tiny_model(), "--dtype", "float32"))
    assert whole is not None
    assert weight_bytes(config(cached_tiny_model(), "--dtype", "bfloat16")) == whole / 2


def test_the_weights_of_several_files_are_added_and_whole_numbers_stay_what_they_are(bare: Path) -> None:
    (bare / "model-1.safetensors").write_bytes(header({"a": ("BF16", 1000), "b": ("I32", 400)}))
    (bare / "model-2.safetensors").write_bytes(header({"c": ("F32", 800)}))
    assert weight_bytes(config(bare, "--dtype", "bfloat16")) == 1000 + 400 + 400


def test_without_such_files_the_size_of_others_counts(bare: Path) -> None:
    (bare / "pytorch_model.bin").write_bytes(b"x" * 1234)
    assert weight_bytes(config(bare)) == 1234


def test_without_any_file_the_shape_says(bare: Path) -> None:
    its = shape(config(bare))
    assert its is not None
    assert (its.layers, its.hidden, its.kv_heads) == (TINY.layers, TINY.hidden, TINY.kv_heads)
    assert weight_bytes(config(bare, "--dtype", "bfloat16")) == its.weight_bytes
    assert weight_bytes(config(bare, "--dtype", "float32")) == 2 * its.weight_bytes


def test_a_model_that_is_not_there_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="/nowhere") as wrong:
        model_config(flags.parse(["/nowhere"]), ["/nowhere"])
    assert "\n" not in str(wrong.value)


def test_only_16_bits_are_plain(bare: Path) -> None:
    assert plain(config(bare, "--dtype", "bfloat16"))
    assert not plain(config(bare, "--dtype", "float32"))


def described(**more: Any) -> Any:
    """As much of a configuration as the bytes of KV depend on: 4 layers, 2 heads of 32 numbers."""
    return SimpleNamespace(
        dtype=SimpleNamespace(itemsize=2),
        use_mla=False,
        get_total_num_hidden_layers=lambda: 4,
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 32,
        **more,
    )


def test_a_token_has_keys_and_values_for_every_head_and_layer() -> None:
    assert kv_bytes(described(), "auto") == 2 * 4 * 2 * 32 * 2
    assert kv_bytes(described(), "fp8_e4m3") == 2 * 4 * 2 * 32


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    model = described()
    model.use_mla = True
    assert kv_bytes(model, "auto") == 4 * 32 * 2


@pytest.mark.parametrize("what", ["is_moe", "use_mla", "is_hybrid", "is_attention_free"])
def test_what_is_not_dense_with_full_attention_has_no_shape(what: str) -> None:
    flags_ = dict.fromkeys(("is_moe", "use_mla", "is_hybrid", "is_attention_free"), False)
    assert shape(SimpleNamespace(**{**flags_, what: True})) is None
