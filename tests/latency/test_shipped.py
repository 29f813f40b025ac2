"""A file in the folder of profiles is a name: for a simulation always, for a server if it was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from taichi_serve.latency import shipped
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.latency.profile import Fit, Profile, ProfileError, StepRow, save
from taichi_serve.latency.shipped import machine, measured, measured_names, names

MEASURED = Profile(
    schema=1,
    model="small",
    device="One GPU",
    versions={"vllm": "0.32.0"},
    settings={"dtype": "bfloat16", "max_model_len": 16384},
    kv_capacity=100_000,
    bytes_per_token=57344,
    steps=[StepRow(0, 0.0, 4, 4004, 0.005)],
    fit=Fit(0.004, 0.001, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1),
)
DOCS = Path(__file__).parents[2] / "docs" / "simulation.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it is shipped, and one measured profile that was dropped into it."""
    for path in shipped.SHIPPED.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save(MEASURED, tmp_path / "small-gpu.json")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_measured_profile_in_the_folder_is_a_name_to_simulate() -> None:
    assert "small-gpu" in names()
    found = machine("small-gpu")
    assert (found.name, found.model, found.device) == ("small-gpu", "small", "One GPU")
    assert (found.kv_capacity, found.kv_bytes_per_token, found.max_model_len) == (100_000, 57344, 16384)
    assert found.belief == Roofline(0.004, 0.001, 1e-5, 0.0, 1e-4, 1e-8, knee=64)
    # 4 ms + 64 tokens at the knee x 10 us + 4 decodes x 0.1 ms + 1000 tokens of KV x 10 ns.
    assert found.truth.seconds(Batch(decodes=4, kv_tokens=1000)) == pytest.approx(0.00505)


@pytest.mark.usefixtures("folder")
def test_a_measured_profile_in_the_folder_is_a_name_to_serve_with() -> None:
    assert "small-gpu" in measured_names()
    assert measured("small-gpu") == MEASURED


def test_a_path_is_taken_as_a_path_whatever_it_is_called(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    save(MEASURED, other / "qwen2.5-14b-tp1-a100.json")
    assert measured(str(other / "qwen2.5-14b-tp1-a100.json")) == MEASURED
    assert machine(str(other / "qwen2.5-14b-tp1-a100.json")).model == "small"
    assert machine("qwen2.5-14b-tp1-a100").model == "Qwen/Qwen2.5-14B"


def test_a_composed_profile_is_no_start_for_a_server() -> None:
    with pytest.raises(ProfileError, match=r"qwen2.5-14b-tp1-a100: composed from kernel tables"):
        measured("qwen2.5-14b-tp1-a100")


def test_a_torn_file_in_the_folder_is_one_clear_error(folder: Path) -> None:
    broken = json.loads((folder / "small-gpu.json").read_text()) | {"kv_capacity": 0}
    (folder / "small-gpu.json").write_text(json.dumps(broken))
    with pytest.raises(ProfileError, match=r"small-gpu.json: kv_capacity: Expected `int` >= 1"):
        machine("small-gpu")


def test_every_shipped_profile_is_small_can_be_simulated_and_is_in_the_documents() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    told = dict(rows)
    for name in names():
        assert (shipped.SHIPPED / f"{name}.json").stat().st_size <= 25_000, name
        assert machine(name).truth.of(256, 256 * 257 / 2, 4, 4000) > 0.0
        assert name in told
    for name in measured_names():
        profile = measured(name)
        assert profile.device in told[name]
        assert f"vLLM {profile.versions['vllm']}" in told[name]
