"""A server starts with few lines, says whether it is live and ready, and when it is idle stops at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from servers import Server

# vLLM's own teardown took 8 to 11 s; an idle machine needs less than 2, and this one may have other work.
STOP = 5.0
FIRST, SECOND = "The first request", "Another one"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that has a key, which the probes are not asked for. What PyTorch compiles is compiled anew."""
    directory = tmp_path_factory.mktemp("stops")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "compiled")}
    one = Server(directory, "--p-heavy", "1", "--d-heavy", "1", "--d-chunk", "64", api_key="k", env=env)
    try:
        yield one.wait_ready()
    finally:
        one.end()


def test_a_start_that_nobody_watches_has_a_handful_of_lines(server: Server) -> None:
    assert len([line for line in server.lines() if "waiting for" in line]) <= 8


def test_the_probes_need_no_key_and_say_yes(server: Server) -> None:
    for path in ("/live", "/ready", "/health"):
        assert httpx.get(f"{server.url}{path}").status_code == 200, path
    assert httpx.get(f"{server.url}/taichi/state").status_code == 401


def test_the_first_logprobs_come_as_fast_as_the_next(server: Server) -> None:
    def ask(prompt: str) -> float:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "logprobs": 3, "temperature": 0}
        began = time.monotonic()
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=120)
        assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == 4
        return time.monotonic() - began

    first = ask(FIRST)
    assert first < 20 * ask(SECOND) + 0.5, f"the first took {first:.2f} s"


def test_an_idle_server_stops_at_once_and_leaves_nothing(server: Server) -> None:
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < STOP
