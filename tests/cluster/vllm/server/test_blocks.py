"""The server's hashes of a prompt's blocks are those of an engine's own request."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from taichi_serve.cluster.vllm.server import blocks
from taichi_serve.cluster.vllm.server.blocks import Hasher, agreed

BLOCK = 16
TOKENS = [(7 * k + 3) % 5000 for k in range(5 * BLOCK + 5)]


def engine_request(tokens: list[int] | None = TOKENS, **fields: Any) -> EngineCoreRequest:
    """As it goes to an engine."""
    params = fields.pop("params", SamplingParams(max_tokens=5))
    mine = {"mm_features": None, "lora_request": None, "cache_salt": None, **fields}
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=tokens,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        data_parallel_rank=None,
        **mine,
    )


def of_an_engine(request: EngineCoreRequest, algorithm: str) -> list[int]:
    """What vLLM's engine core makes of it."""
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name(algorithm))
    made = Request.from_engine_core_request(request, hasher).block_hashes
    return [int.from_bytes(one[:8], "little") for one in made]


def picture(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    """A picture whose tokens are there."""
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=length))


ADAPTER = LoRARequest("adapter", 1, "somewhere/adapter")
REQUESTS = {
    "plain": engine_request(),
    "a part of a block": engine_request(TOKENS[: BLOCK - 1]),
    "one block": engine_request(TOKENS[:BLOCK]),
    "salt": engine_request(cache_salt="mine"),
    "adapter": engine_request(lora_request=ADAPTER),
    "adapter and salt": engine_request(lora_request=ADAPTER, cache_salt="mine"),
    "pictures": engine_request(
        mm_features=[picture("cat", 3, 20), picture("dog", 40, 30)], cache_salt="mine"
    ),
    "a picture far behind": engine_request(mm_features=[picture("cat", 60, 10)]),
}


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("name", REQUESTS)
async def test_every_full_block_has_the_hash_that_an_engine_gives_it(name: str, algorithm: str) -> None:
    request = REQUESTS[name]
    found = await Hasher(algorithm, BLOCK).of(request)
    assert list(found) == of_an_engine(request, algorithm)
    assert len(found) == len(request.prompt_token_ids or ()) // BLOCK


async def test_what_sets_prompts_apart_sets_their_hashes_apart() -> None:
    hasher = Hasher("sha256", BLOCK)
    found = [(await hasher.of(request))[-1] for name, request in REQUESTS.items() if "block" not in name]
    assert len(set(found)) == len(found)


async def test_equal_beginnings_have_equal_hashes_up_to_where_they_differ() -> None:
    hasher = Hasher("sha256", BLOCK)
    other = [*TOKENS[: 3 * BLOCK + 2], 1, 2, 3, *TOKENS[3 * BLOCK + 5 :]]
    one, two = await hasher.of(engine_request()), await hasher.of(engine_request(other))
    assert [a == b for a, b in zip(one, two, strict=True)] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "request_",
    [
        engine_request(None),
        engine_request(prompt_embeds=torch.zeros(len(TOKENS), 4)),
        engine_request(resumable=True),
        engine_request(params=SamplingParams(max_tokens=5, prompt_logprobs=1)),
        engine_request(params=SamplingParams(max_tokens=5, skip_reading_prefix_cache=True)),
    ],
)
async def test_a_prompt_that_is_not_looked_up_by_its_tokens_has_no_hashes(request_: Any) -> None:
    assert await Hasher("sha256", BLOCK).of(request_) == ()


async def test_a_long_prompt_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "AT_ONCE", 2 * BLOCK)
    hashing = asyncio.create_task(Hasher("sha256", BLOCK).of(engine_request()))
    turns = 0
    while not hashing.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns == 3  # two blocks, two blocks, one block
    assert list(hashing.result()) == of_an_engine(engine_request(), "sha256")


# ------------------------------------------------------------------------------- whether hashes say the same


@dataclasses.dataclass
class Core:
    """An engine core that answers so; `Exception` where it died."""

    answer: Any
    asked: tuple[Any, ...] = ()
    caching: bool = True

    @property
    def vllm_config(self) -> Any:
        cache = SimpleNamespace(
            enable_prefix_caching=self.caching, prefix_caching_hash_algo="sha256", block_size=BLOCK
        )
        return SimpleNamespace(cache_config=cache)

    async def call_utility_async(self, *asked: Any) -> Any:
        self.asked = asked
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def agree(*cores: Core) -> tuple[Hasher | None, list[str]]:
    said: list[str] = []
    engines: list[Any] = [SimpleNamespace(client=core) for core in cores]
    return await agreed(engines, said.append), said


async def test_instances_are_told_how_the_servers_hashes_begin() -> None:
    one, two = Core(BLOCK), Core(BLOCK)
    hasher, said = await agree(one, two)
    assert hasher is not None
    assert hasher.block_size == BLOCK
    assert one.asked == two.asked == ("taichi_cached", hasher.first)
    assert said == []


async def test_an_instance_that_cannot_tell_is_named_once_with_its_reason() -> None:
    assert await agree(Core(BLOCK), Core("its hashes have a seed of their own")) == (
        None,
        ["what instances have cached is not known: its hashes have a seed of their own"],
    )


async def test_blocks_of_another_size_are_not_known() -> None:
    hasher, said = await agree(Core(BLOCK), Core(32))
    assert hasher is None
    assert len(said) == 1


async def test_an_instance_that_dies_meanwhile_is_no_reason() -> None:
    hasher, said = await agree(Core(RuntimeError("dead")), Core(BLOCK))
    assert hasher is not None
    assert said == []


async def test_without_a_prefix_cache_nobody_is_asked_and_nothing_is_said() -> None:
    core = Core(BLOCK, caching=False)
    assert await agree(core) == (None, [])
    assert core.asked == ()
