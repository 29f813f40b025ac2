"""`GET /taichi/config`: what a server has now, as a file that `taichi serve --config` makes the same of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from building import KEY, application
from fastapi import FastAPI
from scraping import system

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.settings import MASK
from taichi_serve.frontend.routes import router
from taichi_serve.messages import Promised, Slid, Tuned
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

MODEL = "some/model"
CLASSES = '{"gold": {"ttft_slo": 1, "keys": ["a-key"]}}'


async def config(*words: str, **changed: Any) -> str:
    """The answer of a server with one P-heavy and one D-heavy instance and this command line."""
    args = flags.parse([MODEL, "--p-heavy", "1", *words])
    here = system()
    here.settings, here.classes, here.max_chunk = args.settings, flags.classes(args), 2304
    for event in changed.get("events", ()):
        here.scheduler.on(event)
    app = application()
    app.state.taichi = here
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
        answer = await client.get("/taichi/config", headers={"Authorization": f"Bearer {KEY}"})
        assert (await client.get("/taichi/config")).status_code == 401
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/yaml")
    return answer.text


async def test_it_says_sliders_slos_and_margins_as_they_are_now(tmp_path: Path) -> None:
    moved = Sliders(0, 2, 512, 512)
    events = (
        Slid(1.0, Sliders(1, 1, 512, 128)),
        Promised(2.0, SLO(3.0, 0.05)),
        Tuned(3.0, moved, 0.6, 0.7, ""),
    )
    file = tmp_path / "now.yaml"
    file.write_text(await config("--max-model-len", "4k", "--overload", "demote", events=events))
    args = flags.parse(["--config", str(file)])
    assert (args.model, flags.sliders(args), flags.slo(args)) == (MODEL, moved, SLO(3.0, 0.05))
    policy = flags.policy(args)
    assert (policy.ttft_margin, policy.tpot_margin, policy.overload) == (0.6, 0.7, "demote")
    assert (args.max_model_len, args.max_num_batched_tokens) == (4000, 2304)
    assert args.said >= {"p_heavy", "autotune"}  # nothing is left to be chosen


async def test_keys_are_masked_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await config("--api-key", "a-key", "another", "--hf-token", "hush", "--slo-classes", CLASSES)
    assert not any(secret in said for secret in ("a-key", "another", "hush"))
    found = yaml.safe_load(said)
    assert (found["api_key"], found["hf_token"]) == ([MASK, MASK], MASK)
    assert found["slo_classes"] == {"gold": {"ttft_slo": 1.0, "keys": [MASK]}}
    assert said.startswith("# Secret, so that it must be given anew: slo_classes, api_key, hf_token")


async def test_a_server_whose_key_is_in_its_environment_does_not_become_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "now.yaml"
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    file.write_text(await config())
    assert yaml.safe_load(file.read_text())["api_key"] == [MASK]
    assert flags.parse(["--config", str(file)]).api_key is None
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(SystemExit):
        flags.parse(["--config", str(file)])


def test_openapi_says_that_the_answer_is_yaml() -> None:
    app = FastAPI()
    app.include_router(router)
    described = app.openapi()["paths"]["/taichi/config"]["get"]
    assert list(described["responses"]["200"]["content"]) == ["application/yaml"]
    assert "taichi serve --config" in described["description"]
