"""Command lines without a slider: a model and nothing else, and one that was written for `vllm serve`."""

from __future__ import annotations

import os

import httpx
import pytest
from load import PATH
from servers import Server

PASTED = ("--max-num-batched-tokens", "1024", "--max-num-seqs", "8", "--data-parallel-size", "2")
CORES = len(os.sched_getaffinity(0))


def answered(server: Server) -> None:
    """Six requests, some with long prompts, are answered in full."""
    for number in range(6):
        body = {"model": "tiny", "prompt": f"{number} " * (8 + 150 * (number % 2)), "max_tokens": 12}
        answer = httpx.post(f"{server.url}{PATH}", json={**body, "ignore_eos": True}, timeout=120)
        answer.raise_for_status()
        assert answer.json()["usage"]["completion_tokens"] == 12


def chosen(server: Server) -> tuple[str, str]:
    """The two lines that say what was chosen."""
    lines = server.lines()
    first = next(number for number, line in enumerate(lines) if "no slider given" in line)
    return lines[first], lines[first + 1]


def test_a_model_and_nothing_else_takes_the_cores_and_tunes_itself(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("bare"))
    try:
        server.wait_ready()
        first, second = chosen(server)
        state = server.state()
        count = len(state["instances"])
        if "memory has room" not in first:
            assert count >= min(2, CORES)
        assert f"no slider given: {CORES} core" in first
        assert state["sliders"]["p_heavy"] + state["sliders"]["d_heavy"] == count
        assert f"{state['sliders']['d_heavy']} D-heavy" in first
        assert "S_D 256" in second
        assert "--autotune on (default)" in second
        assert state["autotune"]["mode"] == "on"
        assert (state["slo"]["ttft"], state["slo"]["tpot"]) >= (4.0, 0.07)
        answered(server)
        server.stop()
    finally:
        server.end()


def test_a_line_of_vllm_serve_keeps_what_it_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server(tmp_path_factory.mktemp("bare"), *PASTED)
    try:
        server.wait_ready()
        first, second = chosen(server)
        state = server.state()
        assert state["sliders"] == {"p_heavy": 0, "d_heavy": 2, "p_chunk": 1024, "d_chunk": 1024}
        assert len(state["instances"]) == 2
        assert "2 D-heavy (given), tensor parallel 1" in first
        assert "steps of at most 1024 tokens, S_D 1024 (given)" in second
        above = httpx.patch(
            f"{server.url}/taichi/sliders", json={"d_chunk": 1025, "p_chunk": 2000}, timeout=30
        )
        assert above.status_code == 400
        assert "at most 1024 (--max-num-batched-tokens)" in above.text
        answered(server)
        server.stop()
    finally:
        server.end()
