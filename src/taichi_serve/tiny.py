"""A tiny model made on the spot: Qwen2.5's architecture, random weights, its kind of tokenizer and chat.

It is for demos and tests: nothing is downloaded, it loads in a moment, and its text is nonsense. It is not a
language model, but it behaves like one where serving can tell: greedy output varies, and it depends on the
whole context, so a lost or mixed-up block of KV shows in the tokens. The tokenizer is byte-level: any text
in Unicode's composed form (NFC) comes back as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]

# Goes up whenever the same parameters would give other files, so that no stale copy is taken for a good one.
RECIPE = 1

STAMP = "tiny.json"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKER_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # plain text for whoever decodes
BYTES = 256


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The shape of a tiny model; equal ones have equal weights and the same tokenizer."""

    seed: int = 0
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    vocab: int = 4096
    max_position: int = 8192

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden ({self.hidden}) must be heads ({self.heads}) times an even number")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.vocab < BYTES + self.added:
            raise ValueError(f"vocab must be at least {BYTES + self.added}: all bytes and the added tokens")

    @property
    def added(self) -> int:
        """How many tokens stand outside the byte-level vocabulary; they are the last ones."""
        return len(SPECIAL_TOKENS) + len(MARKER_TOKENS)

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward part: 2.75 times the hidden size, as in the 7B of the family."""
        return self.hidden * 11 // 4

    def stamp(self) -> str:
        """What tells one finished model directory from another."""
        return json.dumps({"recipe": RECIPE, **asdict(self)}, indent=2, sort_keys=True) + "\n"


def make_tiny_model(path: Path, **shape: int) -> Path:
    """Write a checkpoint with its tokenizer into the directory `path` and return it.

    `shape` is any of TinyModel's fields; as they stand they make 3.9M weights. With the same shape the files
    are the same, and a directory that has them already is left alone.
    """
    model = TinyModel(**shape)
    if not _is_made(path, model):
        _refuse_foreign(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            fresh = scratch / "new"
            fresh.mkdir()
            _write(fresh, model)
            _put_in_place(fresh, path, scratch / "old", model)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def cached_tiny_model(**shape: int) -> Path:
    """The tiny model of that shape in the user's cache ($XDG_CACHE_HOME/taichi or ~/.cache/taichi)."""
    model = TinyModel(**shape)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "tiny-" + hashlib.sha256(model.stamp().encode()).hexdigest()[:12]
    return make_tiny_model(base / "taichi" / name, **shape)


# ------------------------------------------------------------------------------------------------- files


def _is_made(path: Path, model: TinyModel) -> bool:
    try:
        return (path / STAMP).read_text(encoding="utf-8") == model.stamp()
    except (FileNotFoundError, NotADirectoryError):
        return False


def _refuse_foreign(path: Path) -> None:
    """Only what was made here may be replaced: anybody else's directory stays as it is."""
    if path.exists() and not (path / STAMP).exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there and is not a tiny model: choose another directory")


def _write(path: Path, model: TinyModel) -> None:
    from safetensors.numpy import save_file

    _write_tokenizer(path, model)
    _write_json(path / "config.json", _config(model))
    _write_json(path / "generation_config.json", _generation_config(model))
    save_file(dict(_weights(model)), path / "model.safetensors", metadata={"format": "pt"})
    (path / STAMP).write_text(model.stamp(), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(fresh: Path, path: Path, aside: Path, model: TinyModel) -> None:
    """A reader sees the old model, or the new one, or none: never half of one."""
    if _is_made(path, model):
        return  # somebody else was faster
    with suppress(FileNotFoundError):
        path.rename(aside)
    try:
        fresh.rename(path)
    except OSError:
        # Faster still: theirs is as good as ours if it is the same model.
        if not _is_made(path, model):
            raise


def _config(model: TinyModel) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": model.max_position,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "eos_token_id": _id(model, "<|im_end|>"),
        "pad_token_id": _id(model, "<|endoftext|>"),
        "use_cache": True,
    }


def _generation_config(model: TinyModel) -> dict[str, Any]:
    return {
        "eos_token_id": [_id(model, "<|im_end|>"), _id(model, "<|endoftext|>")],
        "pad_token_id": _id(model, "<|endoftext|>"),
    }


def _id(model: TinyModel, token: str) -> int:
    return model.vocab - model.added + (SPECIAL_TOKENS + MARKER_TOKENS).index(token)


# ----------------------------------------------------------------------------------------------- weights

# Measured with prompts of 700 random tokens. Sharper attention makes the output depend on single tokens far
# back, but it also makes more of float32's rounding. At 1.6 other tokens in one block of 16 in the middle
# move the logits by 0.4 of their spread, and computing the prompt in two chunks moves them by a millionth
# of it.
ATTENTION_GAIN = 1.6
# Quiet embeddings, so that the tied output layer does not just repeat the token it was given.
EMBEDDING_STD = 0.05
# The last norm alone sets how sure the model is: sampling at temperature 1 is neither uniform nor greedy.
LAST_NORM = 4.0
# Half as loud as the others, the added tokens never win: outputs end where the request says, as loads need.
ADDED_TOKEN_GAIN = 0.5
BIAS_STD = 0.1


def _weights(model: TinyModel) -> Iterator[tuple[str, Weights]]:
    """Name and values of every tensor, each from a stream of its own: its values hang on no other's shape."""
    ones = np.ones(model.hidden, dtype=np.float32)
    embedding = _normal(model, "model.embed_tokens.weight", (model.vocab, model.hidden), EMBEDDING_STD)
    embedding[model.vocab - model.added :] *= ADDED_TOKEN_GAIN
    yield "model.embed_tokens.weight", embedding
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, gain) in _matrices(model).items():
            full_name = f"{prefix}.{name}.weight"
            yield full_name, _normal(model, full_name, (rows, columns), gain / columns**0.5)
            if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                bias_name = f"{prefix}.{name}.bias"
                yield bias_name, _normal(model, bias_name, (rows,), BIAS_STD)
        yield f"{prefix}.input_layernorm.weight", ones.copy()
        yield f"{prefix}.post_attention_layernorm.weight", ones.copy()
    yield "model.norm.weight", ones * np.float32(LAST_NORM)


def _matrices(model: TinyModel) -> dict[str, tuple[int, int, float]]:
    """Rows, columns and gain of the matrices of one layer; a gain of 1 keeps the size of a vector."""
    kv = model.kv_heads * model.head
    return {
        "self_attn.q_proj": (model.hidden, model.hidden, ATTENTION_GAIN),
        "self_attn.k_proj": (kv, model.hidden, ATTENTION_GAIN),
        "self_attn.v_proj": (kv, model.hidden, 1.0),
        "self_attn.o_proj": (model.hidden, model.hidden, 1.0),
        "mlp.gate_proj": (model.intermediate, model.hidden, 1.0),
        "mlp.up_proj": (model.intermediate, model.hidden, 1.0),
        "mlp.down_proj": (model.hidden, model.intermediate, 1.0),
    }


def _normal(model: TinyModel, name: str, shape: tuple[int, ...], std: float) -> Weights:
    digest = hashlib.sha256(f"{model.seed}/{name}".encode()).digest()
    draws = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    values = draws.standard_normal(shape, dtype=np.float32) * np.float32(std)
    # Rounded to what bfloat16 can hold, so that the weights are the same whatever type they are loaded as.
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


# --------------------------------------------------------------------------------------------- tokenizer

# ChatML with tool calls, the way the Qwen2.5 family writes them.
CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
    {%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set system, turns = 'You are a helpful assistant.', messages -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
    {{- '\\n\\n# Tools\\n\\nYou may call functions. They are, one JSON object a line:\\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each call answer with\\n<tool_call>\\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in turns -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set arguments = function.arguments -%}
            {{- '\\n<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {{- (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Where Qwen2.5 cuts text before it looks for tokens: words with the sign before them, digits one by one.
WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

ENGLISH = """\
a about after again all also always an and another any are as ask at away back be because been before began
below between big book both bring but by call came can care change city close cold come could country day
did different do does done door down each early earth easy eat end enough even ever every eye face fact
family far fast father few find fire first follow food for form found four from full gave get give go good
great ground group grow had half hand hard has have he head hear heard help her here high him his hold home
hour house how if important in into is it its just keep kind knew know land large last late learn leave left
less let letter life light like line list
"""

# Building blocks of made-up words. What a script looks like in bytes is what counts here, not what it says.
SCRIPTS = (
    "ба во ги да же за ие ко ла ме на ор па ра со те ум фи хо ца че ша ще эт ю я",
    "αλ βε γα δη εν ζω θη ικ κα λο με νο ξε ος πο ρα σι τη υπ φω χρ ψη ωρ",
    "אב בג דה וז חט יכ למ נס עפ צק רש ת",
    "ال بت جد خر سل شم عن في قو كم نا هي",
    "का कि गी चे जो टा ती दे ना पु बी मा यो रा ले वी सा हो",
    "กา ขี คำ งู จะ ดี ตา ทำ นะ บุ ปี มา ยา รู วัน สี หา ไม่",
    "あ い う か き く さ し す た ち つ な に の は ま や ゆ ら り る を ん ア イ カ キ ク サ ス ト",
    "가 나 다 라 마 바 사 아 자 차 하 고 노 도 로 모 보 소 오 조 기 니 디 리 미 비 시 이 지 은 을 는 를 에",
    "日 月 火 水 木 金 土 人 大 小 中 国 山 川 上 下 天 气 学 生 年 时 分 来 去 有 无 是 不 我 你 他 的 了",
    "😀 😂 🎉 🚀 🌍 🔥 💡 🐼 👍 👩‍💻 é è ü ö ñ ç å ø ß ő ł ž",
)
PUNCTUATION = [". ", ", ", "; ", ": ", "! ", "? ", "\n", " - ", " (", ") ", "。", "、", " = ", "{", "}"]


def _write_tokenizer(path: Path, model: TinyModel) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer = Tokenizer(models.BPE())
    # As Qwen2.5's own, because transformers puts these two in place for a qwen2 model whatever the file says.
    tokenizer.normalizer = normalizers.NFC()
    bytewise = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(WORDS), behavior="isolated"), bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    learned = model.vocab - model.added
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_sentences(learned), trainer)
    if tokenizer.get_vocab_size() != learned:
        raise RuntimeError(f"the text taught {tokenizer.get_vocab_size()} tokens, {learned} were wanted")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKER_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": model.max_position,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)


def _sentences(vocab: int) -> Iterator[str]:
    """Text to learn a vocabulary of that size from; it hangs on nothing else, so shapes share tokenizers."""
    chance = random.Random(vocab)
    english = ENGLISH.split()
    scripts = [script.split() for script in SCRIPTS]
    # Made-up words come from a fixed stock, so that whole words repeat and become tokens.
    stock = [
        ["".join(chance.choices(pieces, k=chance.randint(1, 3))) for _ in range(vocab // 20 + 50)]
        for pieces in scripts
    ]
    for number in range(vocab):
        words = english if number % 2 else chance.choice(stock)
        yield "".join(_sentence(words, chance))


def _sentence(words: list[str], chance: random.Random) -> Iterator[str]:
    for place in range(chance.randint(6, 14)):
        word = chance.choice(words)
        yield word.capitalize() if place == 0 else word
        yield " " if chance.random() < 0.8 else chance.choice(PUNCTUATION)
    yield f"{chance.randint(0, 2100)}."
