"""The settings of a running server are a file with which another becomes the same server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from load import PATH
from servers import Server, eventually

KEYS = ("the-first-key", "another-key")
CLASSES = '{"gold": {"ttft_slo": 1, "keys": ["another-key"]}, "batch": {"ttft_slo": 30, "weight": 0.5}}'
STARTED = (
    *("--data-parallel-size", "2", "--p-heavy", "1", "--slo-classes", CLASSES, "--no-enable-log-deltas"),
    *("--allowed-origins", '["http://a", "http://b"]', "--compilation-config.mode", "0"),
)
MOVED = {"p_heavy": 1, "d_heavy": 1, "p_chunk": 768, "d_chunk": 128}


def config(server: Server) -> str:
    """What it answers, with its key."""
    answer = httpx.get(f"{server.url}/taichi/config", headers=server.headers, timeout=30)
    answer.raise_for_status()
    assert answer.headers["content-type"] == "application/yaml"
    return answer.text


def ask(server: Server, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.request(method, server.url + path, json=body, headers=server.headers, timeout=60)


@pytest.mark.timeout(900)
def test_a_server_with_the_config_of_another_is_the_same_server(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path / "now.yaml"
    first = Server(tmp_path_factory.mktemp("first"), *STARTED, "--api-key", *KEYS)
    first.headers = {"Authorization": f"Bearer {KEYS[0]}"}
    try:
        first.wait_ready()
        assert httpx.get(f"{first.url}/taichi/config", timeout=30).status_code == 401
        assert ask(first, "PATCH", "/taichi/sliders", MOVED).status_code == 200
        assert ask(first, "PATCH", "/taichi/slo", {"ttft": 3.5}).status_code == 200
        eventually(lambda: first.state()["sliders"] == MOVED, 10, "the sliders moved")
        said, state = config(first), first.state()
        file.write_text(said)
        first.stop()
    finally:
        first.end()
    assert not any(key in said for key in KEYS)
    anew = ("--api-key", *KEYS, "--slo-classes", CLASSES)  # where keys are
    second = Server(tmp_path_factory.mktemp("second"), *anew, config=file)
    second.headers = first.headers
    try:
        second.wait_ready()
        again, other = config(second), second.state()
        answer = ask(second, "POST", PATH, {"model": "tiny", "prompt": "hello", "max_tokens": 4})
        assert answer.status_code == 200
        second.stop()
    finally:
        second.end()
    one, two = yaml.safe_load(said), yaml.safe_load(again)
    assert (one.pop("port"), two.pop("port")) == (first.port, second.port)
    assert one == two
    assert {name: one[name] for name in MOVED} == MOVED
    assert (one["ttft_slo"], one["compilation_config"], one["enable_log_deltas"]) == (3.5, {"mode": 0}, False)
    for part in ("sliders", "slo", "policy", "classes"):
        assert state[part] == other[part]
