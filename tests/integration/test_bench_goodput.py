"""`taichi bench goodput` against real engines: one rate of a tiny workload, and nothing is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from servers import ENVIRONMENT, Server, eventually

from taichi_serve.bench.endpoint import meet
from taichi_serve.bench.openloop import OpenLoop, Plan
from taichi_serve.bench.score import Run, Score
from taichi_serve.bench.trial import Trial, measure
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.slo import SLO


async def measured(server: Server, slo: SLO, rate: float, early: bool, senders: int = 1) -> Run:
    trial = Trial("sharegpt", slo, scale=0.1, attainment=0.5, requests=20, warm_up=4, seeds=(0, 1))
    async with meet(server.url, None) as endpoint:
        assert (endpoint.model, endpoint.limit, endpoint.version) == ("tiny", 4096, "0.32.0")
        requests = trial.lengths(endpoint.limit)
        loop = OpenLoop(endpoint, senders=senders)
        return await measure(loop, trial, requests, rate, early, lambda score: None)


@pytest.mark.parametrize("senders", [1, 3])
async def test_every_request_of_a_whole_run_has_its_lengths_and_its_times(
    senders: int, hybrid: Server
) -> None:
    run = await measured(hybrid, SLO(60.0, 10.0), rate=10.0, early=False, senders=senders)
    assert run.lateness is not None
    assert len(run.lateness.busy) == senders
    assert (run.sent, run.good, run.failed, run.whole) == (40, 40, 0, True)
    assert {(s.seed, s.number) for s in run.samples} == {(seed, n) for seed in (0, 1) for n in range(4, 24)}
    assert all(s.ttft > 0 for s in run.samples)
    # The server sends what has gathered in one piece: a short answer can come whole, and then takes no time.
    assert all(s.tpot > 0 or s.output_tokens < 8 for s in run.samples)
    assert sum(s.tpot > 0 for s in run.samples) > len(run.samples) / 2
    hybrid.quiet()


@pytest.mark.parametrize(("ttft", "kept"), [(60.0, True), (1e-6, False)])
async def test_a_decided_run_aborts_what_is_left_of_it(ttft: float, kept: bool, hybrid: Server) -> None:
    run = await measured(hybrid, SLO(ttft, 10.0), rate=50.0, early=True)
    assert run.kept is kept
    assert (
        run.sent < run.total
    )  # 20 good ones are enough, and 21 bad ones: the second seed is cut, or not begun
    hybrid.quiet()


def metrics(server: Server) -> str:
    return httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=30).text


def cached(server: Server) -> float:
    """Prompt tokens that the server's prefix caches had, so far."""
    counts = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics(server), re.MULTILINE)
    assert counts
    return sum(map(float, counts))


def call(prompt: int, output: int, at: float = 0.0, then: Call | None = None) -> Call:
    """With blocks of 16 tokens, the same ones in every such call as far as it goes."""
    return Call(at, prompt, output, blocks=tuple(range((prompt + output) // 16)), then=then)


async def test_a_next_turn_finds_the_kv_of_its_whole_past_with_the_answer(single: Server) -> None:
    (size,) = {int(found) for found in re.findall(r'[{,]block_size="(\d+)"', metrics(single))}
    talk = call(9 * size, 3)
    talk = call(6 * size + 8, size, 0.1, talk)
    talk = call(3 * size + 4, 2 * size, 0.0, talk)
    before, slo = cached(single), SLO(60.0, 10.0)
    async with meet(single.url, None) as endpoint:
        loop = OpenLoop(endpoint)
        score = Score(slo, 3, 1.0)
        await loop.run(Plan(0, [talk]), score, False, lambda score: None)
        assert (score.good, score.samples[-1].prompt_tokens) == (3, 9 * size)
        # Full blocks of what was said before: 5 of the first turn with its answer, 7 of the second.
        assert cached(single) - before == (5 + 7) * size
        score = Score(slo, 2, 1.0)
        two = [call(2 * size, 16), call(4 * size, 2, at=1.0)]
        await loop.run(Plan(1, two), score, False, lambda score: None)
        # Another run has tokens of its own; in it both prompts begin with the same two blocks.
        assert cached(single) - before == (5 + 7 + 2) * size
    single.quiet()


async def test_conversations_are_sent_turn_by_turn_to_several_instances(hybrid: Server) -> None:
    words = "conversations:think=0.2,wait=0.1,system=200,message=40,result=60,answer=20,call=10"
    trial = Trial(words, SLO(60.0, 10.0), attainment=0.5, requests=40, warm_up=5)
    async with meet(hybrid.url, None) as endpoint:
        requests = trial.lengths(endpoint.limit)
        run = await measure(OpenLoop(endpoint), trial, requests, 8.0, False, lambda score: None)
    assert (run.sent, run.good, run.failed, run.whole) == (40, 40, 0, True)
    assert {sample.number for sample in run.samples} == set(range(5, 45))
    hybrid.quiet()


def test_ctrl_c_aborts_what_is_under_way_and_writes_nothing(hybrid: Server, tmp_path: Path) -> None:
    words = [hybrid.url, "--workload", "sharegpt", "--scale", "0.5", "--ttft-slo", "60", "--tpot-slo", "10"]
    words += ["--start", "20", "--requests", "2000", "--out", str(tmp_path / "out")]
    with (tmp_path / "said").open("wb") as said:
        bench = subprocess.Popen(
            [sys.executable, "-m", "taichi_serve.cli", "bench", "goodput", *words],
            env={**os.environ, **ENVIRONMENT},
            stdout=said,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    eventually(lambda: hybrid.state()["requests"]["live"] > 0, 60, "requests are under way")
    bench.send_signal(signal.SIGINT)
    assert bench.wait(30) == 130
    text = (tmp_path / "said").read_text()
    assert text.splitlines()[-1] == "bench: stopped; nothing is left running"
    assert "Traceback" not in text
    assert not list((tmp_path / "out").iterdir())
    hybrid.quiet()
