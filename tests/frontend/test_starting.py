"""A line without a slider is completed by what the machine and the model are; others stay as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.frontend import starting
from taichi_serve.frontend.starting import begun, chosen, promised
from taichi_serve.latency.profile import Fit, Profile, save
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model
from taichi_serve.tuning.start import Start

MODEL = str(cached_tiny_model())
LIMITS = ("--max-model-len", "4096")
TINY_KV = 2 * 4 * 2 * 32 * 2  # bytes of a token in 16 bits


def parsed(*words: str) -> tuple[Any, list[str]]:
    argv = [MODEL, *LIMITS, *words]
    return flags.parse(argv), argv


def start(*words: str) -> Start:
    return chosen(*parsed(*words))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores of one node, 16 GB free."""
    monkeypatch.setattr(starting, "cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(starting, "nodes", lambda usable: 1)
    monkeypatch.setattr(starting, "free_memory", lambda: 16e9)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four H200."""
    platform = SimpleNamespace(
        is_cpu=lambda: False, device_count=lambda: 4, get_device_total_memory=lambda number: 150.7e9
    )
    monkeypatch.setattr(starting, "current_platform", platform)
    monkeypatch.setattr(starting, "device_name", lambda: "NVIDIA H200")


@pytest.mark.usefixtures("cpu")
def test_a_line_with_a_slider_stays_as_it_is() -> None:
    said: list[str] = []
    args, argv = parsed("--d-heavy", "2")
    assert begun(args, argv, said.append) == (args, argv, None)
    assert said == []


@pytest.mark.usefixtures("cpu")
def test_a_line_with_nothing_but_a_model_takes_the_cores_and_tunes_itself() -> None:
    said: list[str] = []
    args, argv, its = begun(*parsed(), said.append)
    assert its is not None
    assert flags.sliders(args) == Sliders(0, 2, 2048, 256)
    assert (args.autotune, flags.slo(args)) == ("on", SLO(4.0, 0.07))
    assert args.max_num_batched_tokens == 2048 + 256
    assert said == list(its.said)
    assert flags.parse(argv).said == args.said  # an engine that parses it again sees the same


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("words", "mode"),
    [((), "serve"), (("--ttft-slo", "2"), "demote"), (("--overload", "refuse"), "refuse")],
)
def test_slos_that_the_server_chose_demote_nobody(words: tuple[str, ...], mode: str) -> None:
    args, argv, _ = begun(*parsed(*words), lambda line: None)
    assert (args.overload, argv.count("--overload")) == (mode, 1)


@pytest.mark.usefixtures("cpu")
def test_a_line_of_vllm_serve_keeps_its_budget_and_its_number_of_instances() -> None:
    words = ("--max-num-batched-tokens", "1024", "--max-num-seqs", "8", "--data-parallel-size", "3")
    args, argv, _ = begun(*parsed(*words), lambda line: None)
    assert flags.sliders(args) == Sliders(0, 3, 1024, 1024)
    assert argv.count("--max-num-batched-tokens") == 1
    assert (args.max_num_batched_tokens, args.max_num_seqs) == (1024, 8)
    config = flags.engine_config(argv, "engine")
    assert config.scheduler_config.max_num_batched_tokens == 1024
    assert config.parallel_config.data_parallel_size == 1


@pytest.mark.usefixtures("cpu")
def test_what_is_said_of_slos_and_tuning_is_kept() -> None:
    its = start("--ttft-slo", "2", "--autotune", "off")
    assert (its.slo, its.autotune, its.unsure) == (SLO(2.0, 0.07), "off", {"tpot"})


@pytest.mark.usefixtures("cpu")
def test_groups_of_cores_are_instances() -> None:
    assert start("--devices", "0;1;2").sliders.instances == 3


@pytest.mark.usefixtures("cpu")
def test_memory_for_kv_that_is_given_counts() -> None:
    # 16 GB hold one instance with 14 GB of KV.
    assert start("--kv-cache-memory-bytes", str(14 * 10**9)).sliders.instances == 1


@pytest.mark.usefixtures("cpu")
def test_a_profile_that_is_given_says_what_steps_take(tmp_path: Any) -> None:
    fit = Fit(0.010, 0.0, 1e-4, 0.0, 0.0, 0.0, 0, 0.03, 0.1)
    path = tmp_path / "own.json"
    save(Profile(1, MODEL, "one core", {}, {}, 100_000, 2 * TINY_KV, [], fit), path)
    its = start("--dtype", "float32", "--profile", str(path))
    assert (its.slo, its.sliders.d_chunk) == (SLO(3.5, 0.035), 160)  # as in tests/tuning/test_start.py
    assert str(path) in its.said[1]


@pytest.mark.usefixtures("gpus")
def test_every_gpu_is_taken_and_the_roofline_says_what_steps_take() -> None:
    its = start("--dtype", "bfloat16")
    assert (its.tensor_parallel, its.sliders.p_heavy, its.sliders.d_heavy) == (1, 0, 4)
    assert its.known is not None and its.known.source == "a roofline of H200"
    assert its.said[0].startswith("no slider given: 4 x NVIDIA H200: 4 D-heavy (all devices)")
    assert its.unsure == frozenset()


@pytest.mark.usefixtures("gpus")
def test_weights_in_another_form_than_16_bits_have_no_roofline() -> None:
    assert start("--dtype", "float32").known is None


@pytest.mark.usefixtures("gpus")
def test_groups_of_gpus_are_instances_with_a_rank_each() -> None:
    its = start("--devices", "0,1;2,3")
    assert (its.tensor_parallel, its.sliders.instances) == (2, 2)
    shared = start("--devices", "0;0", "--gpu-memory-utilization", "0.4")
    assert (shared.tensor_parallel, shared.sliders.instances) == (1, 2)


@pytest.mark.usefixtures("gpus")
def test_a_tensor_parallel_size_that_is_given_divides_the_gpus() -> None:
    its = start("--tensor-parallel-size", "2")
    assert (its.tensor_parallel, its.sliders.instances) == (2, 2)
    assert "tensor parallel 2 (given)" in its.said[0]


async def test_slos_are_raised_by_what_the_first_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    args, argv = parsed("--tpot-slo", "0.05")
    its = chosen(args, argv)
    took: list[tuple[float, float] | None] = []
    said: list[str] = []

    async def paced(cluster: object, tokens: int) -> tuple[float, float] | None:
        return took.pop(0)

    async def after(*paces: tuple[float, float] | None) -> SLO:
        took[:] = paces
        slo = await promised(args, its, None, said.append)
        assert took == []
        return slo

    monkeypatch.setattr(starting, "paced", paced)
    args = flags.parse([*argv, *its.words(args.said)])
    assert await after((0.01, 0.3)) == SLO(4.0, 0.05)
    assert await after(None) == SLO(4.0, 0.05)
    assert await after((5.0, 0.3), (0.01, 0.3)) == SLO(4.0, 0.05)  # it was busy with something else
    assert said == []
    assert await after((2.0, 0.3), (2.5, 0.2)) == SLO(16.0, 0.05)
    assert await after((2.0, 0.3), None) == SLO(16.0, 0.05)
    assert said == ["TTFT SLO 16 s, TPOT SLO 50 ms (by what the first steps took)"] * 2


async def test_a_line_with_a_slider_is_not_timed() -> None:
    args, _ = parsed("--d-heavy", "1")
    assert await promised(args, None, None, lambda line: None) == SLO(4.0, 0.07)
