"""`taichi bench goodput --compare` with real engines: ours and vLLM's own server, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from servers import ENVIRONMENT, FLAGS

from taichi_serve.bench.kept import read
from taichi_serve.tiny import cached_tiny_model

LOOSE = "--workload 120/12 --ttft-slo 60 --tpot-slo 10 --requests 6 --warm-up 2 --seeds 0,1"
# Rates 2, 8, 32 and 128: every one is kept, and the last two seeds decide.
STEPS = "--start 2 --tolerance 3 --redo 0 --compare hybrid,stock:256 --d-chunk 128"


def bench(out: Path, seconds: float) -> str:
    # vLLM's host and port flags are chosen for each server; a name and a length are common to both.
    words = [str(cached_tiny_model()), *LOOSE.split(), *STEPS.split(), "--out", str(out), "--", *FLAGS]
    done = subprocess.run(
        [sys.executable, "-m", "taichi_serve.cli", "bench", "goodput", *words],
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_ours_and_stock_get_the_same_requests_in_turn_and_nothing_is_left(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    said = bench(tmp_path, 540)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    assert "hybrid / stock:256" in said
    kept = read(tmp_path / "compare.json")
    assert kept is not None
    assert list(kept.flags) == ["hybrid", "stock:256"]
    assert all(len(done.speeds) == len(done.visits) + 1 == 3 for done in kept.rounds)
    assert {visit.run.failed for done in kept.rounds for visit in done.visits} == {0}
    for done in kept.rounds:  # of whole visits every request is there, and it is the same one
        ours, stock = (visit.run for visit in sorted(done.visits, key=lambda visit: visit.name))
        if ours.whole and stock.whole:
            lengths = [
                sorted((s.number, s.prompt_tokens, s.output_tokens) for s in run.samples)
                for run in (ours, stock)
            ]
            assert lengths[0] == lengths[1]
            assert len(lengths[0]) == 6
    assert kept.contest.goodput("hybrid").at_least
    (pair,) = json.loads((tmp_path / "pairs.json").read_text())["pairs"]
    assert (pair["differences"][-1]["requests"], pair["ratio"]) == (12, None)
    assert (tmp_path / "stock-256.json").exists()

    rounds = len(kept.rounds)
    again = bench(tmp_path, 60)  # all is there: no server is started
    assert f"{rounds} rounds of {kept.date} are taken from" in again
    assert read(tmp_path / "compare.json") == kept
