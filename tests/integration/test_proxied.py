"""vLLM's own servers behind the proxy of a comparison: what they say, and that nothing of them is left."""

from __future__ import annotations

import httpx
import psutil
import pytest
from load import streamed, wishes, wrong
from servers import ENVIRONMENT, FLAGS, Server

from taichi_serve.bench.client import MANY
from taichi_serve.commands.proxied import ProxiedServers
from taichi_serve.tiny import cached_tiny_model

WISHES = wishes(8, seed=21, prompt=(16, 600), output=(8, 40))


@pytest.mark.parametrize("prefill", [1, 0], ids=["disaggregation", "in turn"])
async def test_two_servers_behind_the_proxy_say_what_one_instance_says(prefill: int, single: Server) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    words = [str(cached_tiny_model()), *FLAGS, "--instances", "2", "--prefill", str(prefill)]
    server = ProxiedServers(words, ENVIRONMENT)
    try:
        async for _ in server.sayings():
            pass
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=MANY) as client:
            answers = await streamed(client, WISHES)
            model = (await client.get("/v1/models")).json()["data"][0]
    finally:
        code = server.stop(keep=False)
    assert code == 0
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    async with single.client() as client:
        reference = await streamed(client, WISHES)
    assert wrong(answers, reference) == []
    assert (model["id"], model["max_model_len"]) == ("tiny", 4096)
