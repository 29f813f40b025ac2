"""What is known of steps before any was made: measured profiles first, then composed ones, then rooflines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from taichi_serve.latency import shipped
from taichi_serve.latency.device import DEVICES, Shape, described, shape_of
from taichi_serve.latency.known import LINKS, Known, Question, family, known
from taichi_serve.latency.profile import Fit, Profile, StepRow, Transfer, save
from taichi_serve.sliders import Kind

QWEN_14B = Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064, 32768)
OTHER = Shape("Other-3B", 36, 2048, 11008, 16, 2, 128, 151936, 32768)
H200 = Question("Qwen/Qwen2.5-14B-Instruct", 196608, QWEN_14B, "NVIDIA H200", 150.7e9)
A100 = replace(H200, device="NVIDIA A100-SXM4-80GB", memory=85.9e9)
MEASURED = Profile(
    schema=1,
    model="somebody/small",
    device="One GPU",
    versions={},
    settings={"tensor_parallel_size": 2, "mps_share": "25"},
    kv_capacity=100_000,
    bytes_per_token=4096,
    steps=[StepRow(0, 0.0, 4, 4004, 0.005)],
    fit=Fit(0.004, 0.001, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1),
    transfers=[Transfer(Kind.P_HEAVY, Kind.D_HEAVY, 0.002, 5e10)],
)
SMALL = Question("small-chat", 4096, OTHER, "One GPU", 1e9, share="25")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of profiles with a measured one of a small model."""
    save(MEASURED, tmp_path / "small.json")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    return tmp_path


def source(asked: Question, tensor_parallel: int = 1) -> str | None:
    found = known(asked, tensor_parallel)
    return found.source if found else None


def test_a_measured_profile_of_this_model_on_this_device_comes_first() -> None:
    assert source(H200) == "the shipped profile qwen2.5-14b-tp1-h200-measured"


def test_without_one_a_profile_of_kernel_tables_is_next() -> None:
    assert source(A100) == "the shipped profile qwen2.5-14b-tp1-a100"
    qwen_32b = Shape("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064, 32768)
    larger = replace(A100, model="/models/Qwen2.5-32B", kv_bytes=262144, shape=qwen_32b)
    assert source(larger, 2) == "the shipped profile qwen2.5-32b-tp2-a100"
    assert source(larger, 4) == "a roofline of 4 x A100"


def test_a_model_that_nobody_measured_has_a_roofline_of_its_device() -> None:
    found = known(replace(H200, model="Other-3B", kv_bytes=36864, shape=OTHER), 1)
    assert found is not None
    assert found.source == "a roofline of H200"
    # 5.5 GB of layers at 72 % of 4.8 TB/s.
    assert found.truth.of(0, 0.0, 1, 0) == pytest.approx(0.0016, rel=0.15)
    assert found.belief.of(0, 0.0, 1, 0) == pytest.approx(found.truth.of(0, 0.0, 1, 0), rel=0.15)
    assert found.transfers == LINKS


@pytest.mark.parametrize(
    "device",
    ["NVIDIA L4", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "cpu", "AMD EPYC"],
)
def test_of_a_device_that_is_not_described_nothing_is_known(device: str) -> None:
    assert source(replace(H200, device=device, memory=85.9e9)) is None


def test_a_part_of_a_device_is_not_the_device() -> None:
    assert source(replace(A100, memory=42.9e9)) is None  # 40 GB
    assert source(replace(A100, device="NVIDIA A100-SXM4-80GB MIG 3g.40gb", memory=42.9e9)) is None
    assert source(replace(A100, share="25")) is None


def test_a_model_without_a_dense_shape_in_16_bits_has_nothing() -> None:
    assert source(replace(H200, shape=None)) is None


def test_a_model_with_other_kv_is_another_model() -> None:
    assert source(replace(H200, kv_bytes=98304)) == "a roofline of H200"


def test_a_model_that_does_not_fit_has_no_roofline() -> None:
    huge = Shape("huge", 80, 8192, 28672, 64, 8, 128, 128256, 8192)
    assert source(replace(H200, model="huge", kv_bytes=327680, shape=huge), 1) is None
    assert source(replace(H200, model="huge", kv_bytes=327680, shape=huge), 2) == "a roofline of 2 x H200"


@pytest.mark.usefixtures("folder")
def test_a_measured_profile_is_of_its_model_device_ranks_and_share_only() -> None:
    assert source(SMALL, 2) == "the shipped profile small"
    assert source(SMALL, 1) is None
    assert source(replace(SMALL, share="50"), 2) is None
    assert source(replace(SMALL, device="Two GPU"), 2) is None
    assert source(replace(SMALL, kv_bytes=2048), 2) is None
    assert source(replace(SMALL, model="smaller"), 2) is None


def test_a_profile_that_was_measured_beside_neighbours_is_of_no_instance_by_itself(folder: Path) -> None:
    beside = msgspec.structs.replace(MEASURED, settings={**MEASURED.settings, "neighbours": 3})
    save(beside, folder / "small.json")
    assert source(SMALL, 2) is None


def test_a_predictor_begins_with_what_was_measured_and_with_its_moves() -> None:
    predictor = Known.of(MEASURED, "a file").predictor(4096)
    assert predictor.model == MEASURED.fit.model()
    assert predictor.transfers == {(Kind.P_HEAVY, Kind.D_HEAVY): MEASURED.transfers[0]}
    assert predictor.bytes_per_token == 4096


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("Qwen/Qwen2.5-14B-Instruct", "qwen2.5-14b"),
        ("/models/Qwen2.5-14B/", "qwen2.5-14b"),
        ("meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("Qwen/Qwen2.5-14B-Instruct-AWQ", "qwen2.5-14b-instruct-awq"),
        ("chat", "chat"),
    ],
)
def test_a_family_is_a_name_without_what_leaves_the_shape_alone(name: str, same: str) -> None:
    assert family(name) == same


@pytest.mark.parametrize(
    ("name", "memory", "device"),
    [
        ("NVIDIA H200", 150.7e9, "H200"),
        ("NVIDIA H100 80GB HBM3", 85.5e9, "H100"),
        ("NVIDIA A100-SXM4-80GB", 85.9e9, "A100"),
        ("H200-SXM-141GB", 141e9, "H200"),
    ],
)
def test_a_device_goes_by_the_name_that_its_driver_says(name: str, memory: float, device: str) -> None:
    assert described(name, memory) == DEVICES[device]


def test_a_config_that_lacks_a_field_has_no_shape() -> None:
    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads"):
        shape_of({}, "none", Path("config.json"))
