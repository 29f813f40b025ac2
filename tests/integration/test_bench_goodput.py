"""`taichi bench goodput` against real engines: one rate of a tiny workload, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import ENVIRONMENT, Server, eventually

from taichi_serve.bench.endpoint import meet
from taichi_serve.bench.openloop import OpenLoop
from taichi_serve.bench.score import Run
from taichi_serve.bench.trial import Trial, measure
from taichi_serve.slo import SLO


async def measured(server: Server, slo: SLO, rate: float, early: bool) -> Run:
    trial = Trial("sharegpt", slo, scale=0.1, attainment=0.5, requests=20, warm_up=4, seeds=(0, 1))
    async with meet(server.url, None) as endpoint:
        assert (endpoint.model, endpoint.limit, endpoint.version) == ("tiny", 4096, "0.32.0")
        requests = trial.lengths(endpoint.limit)
        return await measure(OpenLoop(endpoint), trial, requests, rate, early, lambda score: None)


async def test_every_request_of_a_whole_run_has_its_lengths_and_its_times(hybrid: Server) -> None:
    run = await measured(hybrid, SLO(60.0, 10.0), rate=10.0, early=False)
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
