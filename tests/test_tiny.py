"""The tiny model: its files, its tokenizer, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from taichi_serve import tiny
from taichi_serve.tiny import MARKER_TOKENS, SPECIAL_TOKENS, TinyModel, cached_tiny_model, make_tiny_model

SMALL = {"hidden": 64, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 512, "max_position": 256}
PROMPTS = ("Hello, how are you?", "once upon a time " * 40, "数学は楽しいです。", "Привет, как дела? 😀")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# ------------------------------------------------------------------------------------------------- files


def test_the_same_shape_makes_the_same_files(path: Path, tmp_path: Path) -> None:
    assert contents(make_tiny_model(tmp_path / "again")) == contents(path)


def test_it_has_about_four_million_weights_that_bfloat16_can_hold(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    assert 3.5e6 < sum(tensor.size for tensor in weights.values()) < 4.5e6
    assert not any((tensor.view(np.uint32) & 0xFFFF).any() for tensor in weights.values())


def test_another_seed_changes_the_weights_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    first, second = (contents(make_tiny_model(tmp_path / str(seed), seed=seed, **SMALL)) for seed in (0, 1))
    assert first["model.safetensors"] != second["model.safetensors"]
    assert first["tokenizer.json"] == second["tokenizer.json"]


def test_a_finished_model_is_left_alone(tmp_path: Path) -> None:
    made = make_tiny_model(tmp_path / "m", **SMALL)
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    make_tiny_model(made, **SMALL)
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before


def test_a_model_of_another_shape_is_replaced(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m", **SMALL)
    make_tiny_model(tmp_path / "m", **SMALL | {"layers": 2})
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_directory_of_somebody_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="is not a tiny model"):
        make_tiny_model(tmp_path, **SMALL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny, "_weights", full)
    with pytest.raises(OSError, match="no space left"):
        make_tiny_model(tmp_path / "m", **SMALL)
    assert not list(tmp_path.iterdir())


def test_whoever_was_faster_with_the_same_model_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = tiny._write

    def write_while_another_finishes(directory: Path, model: TinyModel) -> None:
        monkeypatch.setattr(tiny, "_write", write)
        make_tiny_model(tmp_path / "m", **SMALL)
        (tmp_path / "m" / "of the other").touch()
        write(directory, model)

    monkeypatch.setattr(tiny, "_write", write_while_another_finishes)
    make_tiny_model(tmp_path / "m", **SMALL)
    assert (tmp_path / "m" / "of the other").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_the_cache_keeps_one_directory_for_each_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = cached_tiny_model(**SMALL), cached_tiny_model(seed=1, **SMALL)
    assert first == cached_tiny_model(**SMALL) != second
    assert first.parent == second.parent == tmp_path / "taichi"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"hidden": 100}, r"hidden \(100\) must be heads \(8\) times an even number"),
        ({"kv_heads": 3}, r"heads \(8\) must be a multiple of kv_heads \(3\)"),
        ({"vocab": 262}, "vocab must be at least 263"),
    ],
)
def test_an_impossible_shape_is_refused(wrong: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TinyModel(**wrong)


# --------------------------------------------------------------------------------------------- tokenizer


@given(text=st.text())
def test_any_text_comes_back_in_composed_form(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_the_added_tokens_are_the_last_ones_and_single(tokenizer: Tokenizer) -> None:
    added = SPECIAL_TOKENS + MARKER_TOKENS
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.encode("".join(added)).ids == list(range(4096 - len(added), 4096))
    assert tokenizer.decode(tokenizer.encode("".join(added)).ids) == "".join(MARKER_TOKENS)


def test_some_tokens_are_parts_of_a_character(tokenizer: Tokenizer) -> None:
    whole = [token for token in range(4096) if "\ufffd" not in tokenizer.decode([token])]
    assert 3000 < len(whole) < 4000


def test_transformers_reads_the_same_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(path)
    for text in (*PROMPTS, "it's  12,345\r\n\t<|im_end|>", "cafe\u0301"):
        assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_writes_tools_calls_and_answers(path: Path) -> None:
    from transformers import AutoTokenizer

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    chat = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    text = AutoTokenizer.from_pretrained(path).apply_chat_template(
        chat, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    assert text.endswith(
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# ------------------------------------------------------------------------------------------ what it says


def load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # threads that wait for each other stand still on a busy machine
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def greedy(model: Any, prompt: Sequence[int], count: int = 64) -> list[int]:
    import torch

    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in output[0][len(prompt) :]]


def test_greedy_output_is_varied_and_never_ends_by_itself(path: Path, tokenizer: Tokenizer) -> None:
    model = load(path)
    outputs = [greedy(model, tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    assert [len(output) for output in outputs] == [64] * len(PROMPTS)
    assert min(len(set(output)) for output in outputs) >= 16
    assert len({tuple(output) for output in outputs}) == len(PROMPTS)


def test_greedy_output_shows_another_block_far_back_in_the_prompt(path: Path) -> None:
    model = load(path)
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 4000, 700)]
    assert greedy(model, prompt, 16) != greedy(model, prompt[:320] + prompt[16:32] + prompt[336:], 16)


ENGINE = """\
import json, sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    answer, model, *prompts = json.loads(sys.argv[1])
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512)
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=64)
    )
    with open(answer, "w") as file:
        json.dump([list(output.outputs[0].token_ids) for output in outputs], file)
"""
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.engine
def test_vllm_says_the_same_as_transformers(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    # In a process of its own: an engine settles too much for the whole process. From a file, because the
    # engine's own processes import it again.
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    answer = tmp_path / "answer.json"
    command = [sys.executable, str(script), json.dumps([str(answer), str(path), *prompts])]
    run = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    model = load(path)
    assert json.loads(answer.read_text()) == [greedy(model, prompt) for prompt in prompts]
