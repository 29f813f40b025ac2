"""How long a prompt and a step take, timed on an idle instance; the clock goes on when a request is sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from instances import Client

from taichi_serve.cluster.vllm.server import warm
from taichi_serve.cluster.vllm.server.warm import DECODES, STEPS, paced


class Cluster:
    """One instance that takes half a second for a long prompt, and a tenth for each short request."""

    def __init__(self, answers: bool = True, chunk: int = 64) -> None:
        self.engines = [SimpleNamespace(index=0, chunk=chunk, client=Client())]
        self.answers = answers
        self.now = 0.0
        self.asked: list[tuple[int, int]] = []  # prompt and output tokens
        self.abandoned = 0

    def rehearse(self, request: Any, at: int, to: int | None) -> asyncio.Future[int]:
        assert (at, to) == (0, None)
        self.asked.append((len(request.prompt_token_ids), request.sampling_params.max_tokens))
        self.now += 0.5 if len(self.asked) == 1 else 0.1
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.answers:
            answer.set_result(1)
        return answer

    def abandon(self, request_id: str, cancelled: bool) -> None:
        self.abandoned += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(warm, "time", SimpleNamespace(monotonic=lambda: made.now, time=lambda: made.now))
    return made


async def test_a_prompt_and_a_step_of_several_decodes_are_timed_by_themselves(cluster: Cluster) -> None:
    prompt, step = await paced(cluster, 4096) or (0.0, 0.0)
    assert step == pytest.approx(DECODES * 0.1 / STEPS)
    assert prompt == pytest.approx(0.5 - step)  # it had a second token
    assert cluster.asked == [(997, 2), *[(35, STEPS)] * DECODES]  # the instance takes 1,000 tokens


async def test_an_instance_that_does_not_answer_is_not_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.answers = False
    monkeypatch.setattr(warm, "SECONDS", 0.01)
    assert await paced(cluster, 100) is None
    assert cluster.abandoned == 1  # nothing else was asked


async def test_an_instance_without_prefill_is_not_timed() -> None:
    assert await paced(Cluster(chunk=0), 100) is None
