"""The command line: vLLM's words are taken as they are, ours are checked, contradictions are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs

from taichi_serve.bench.workload import workload
from taichi_serve.classes import SLOClass
from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.edges import edges
from taichi_serve.latency.shipped import machine, measured, measured_names, names
from taichi_serve.search.families import hybrid
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.search.report import config, config_text
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model

MODEL = "some/model"


def test_a_command_line_of_vllm_serve_is_one_d_heavy_instance() -> None:
    args = flags.parse(
        [MODEL, "--max-model-len", "4096", "--dtype=float32", "--enforce-eager", "--port", "8123"]
    )
    assert (args.model, args.max_model_len, args.dtype, args.port) == (MODEL, 4096, "float32", 8123)
    assert flags.sliders(args) == Sliders(0, 1, 256, 256)
    assert flags.slo(args) == SLO(4.0, 0.07)


def test_our_flags_set_sliders_slos_and_policy() -> None:
    words = (
        "--p-heavy 2 --d-heavy 3 --p-chunk 2048 --d-chunk 128 --ttft-slo 6 --tpot-slo 0.1 --ttft-margin 0.3"
    )
    words += " --tpot-margin 0.9"
    args = flags.parse([MODEL, *words.split(), "--watermark", "0.9", "--alpha", "0.8"])
    assert flags.sliders(args) == Sliders(2, 3, 2048, 128)
    assert flags.slo(args) == SLO(6.0, 0.1)
    policy = flags.policy(args)
    assert (policy.watermark, policy.alpha, policy.ttft_margin) == (0.9, 0.8, 0.3)
    assert policy.tpot_margin == 0.9


def test_classes_come_as_a_file_as_json_or_nested_in_the_config(tmp_path: Path) -> None:
    classes = {"batch": {"ttft_slo": 10, "weight": 0.5}}
    expected = {"batch": SLOClass("batch", ttft_slo=10.0, weight=0.5)}
    file, whole = tmp_path / "classes.yaml", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(classes))
    whole.write_text(yaml.safe_dump({"model": MODEL, "slo_classes": classes}))
    assert flags.classes(flags.parse([MODEL])) == {}
    for words in ([MODEL, "--slo-classes", str(file)], [MODEL, "--slo-classes", json.dumps(classes)]):
        assert flags.classes(flags.parse(words)) == expected
    assert flags.classes(flags.parse(["--config", str(whole)])) == expected


def test_a_wrong_class_is_named_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        ({"a": {"ttft_slo": -1}}, "--slo-classes: class a: ttft_slo must be a positive number, not -1.0"),
        ({"a": {"keys": ["sk"]}}, "--slo-classes: class a: one of its keys is no key of the server"),
    ):
        with pytest.raises(SystemExit):
            flags.parse([MODEL, "--slo-classes", json.dumps(words), "--api-key", "other"])
        assert says in capsys.readouterr().err
    words = json.dumps({"a": {"keys": ["sk"]}})
    assert flags.classes(flags.parse([MODEL, "--slo-classes", words, "--api-key", "sk", "other"]))


def test_the_scheduler_knows_classes_without_their_keys() -> None:
    words = json.dumps({"a": {"keys": ["sk"], "weight": 3, "refuse": False}})
    given = [MODEL, "--slo-classes", words, "--api-key", "sk", "--overload", "demote"]
    policy = flags.policy(flags.parse([*given, "--fair-classes"]))
    assert (policy.classes, policy.fair) == ((SLOClass("a", weight=3.0, refuse=False),), True)
    assert "sk" not in str(asdict(policy))
    assert not flags.policy(flags.parse(given)).fair
    assert flags.policy(flags.parse([MODEL])).classes == ()


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ((), "serve"),
        (("--p-heavy", "1"), "serve"),
        (("--ttft-slo", "2"), "demote"),
        (("--tpot-slo", "0.05"), "demote"),
        (("--slo-classes", '{"chat": {"ttft_slo": 1}}'), "demote"),
        (("--ttft-slo", "2", "--overload", "serve"), "serve"),
        (("--overload", "refuse"), "refuse"),
        (("--ttft-slo", "2", "--scheduling-policy", "priority"), "serve"),
    ],
)
def test_who_has_said_what_late_is_has_late_ones_demoted(words: tuple[str, ...], mode: str) -> None:
    args = flags.parse([MODEL, *words])
    assert (args.overload, flags.policy(args).overload) == (mode, mode)


def test_slos_are_edges_of_the_histograms_of_times() -> None:
    found = edges([SLO(4.0, 0.07), SLO(3.0, 0.2)], {"inter_token_latency": [0.1], "request_latency": [9.0]})
    assert {3.0, 4.0, 2.5, 5.0} <= set(found["time_to_first_token"])
    assert found["time_to_first_token"] == sorted(found["time_to_first_token"])
    assert (found["inter_token_latency"], found["request_latency"]) == ([0.07, 0.1, 0.2], [9.0])


def test_prefixes_are_fetched_unless_the_command_line_says_less() -> None:
    assert flags.policy(flags.parse([MODEL])).fetch
    for word, fetch in (("blind", False), ("known", False), ("fetch", True)):
        args = flags.parse([MODEL, "--prefixes", word])
        assert (args.prefixes, flags.policy(args).fetch) == (word, fetch)
    with pytest.raises(SystemExit):
        flags.parse([MODEL, "--prefixes", "all"])


def test_memory_of_the_host_is_that_of_each_instance_and_goes_to_vllms_own_offloading() -> None:
    words = [str(cached_tiny_model()), "--max-model-len", "512", "--enforce-eager"]
    plain = flags.engine_config(words, "e0").kv_transfer_config
    assert (plain.kv_connector, plain.engine_id) == ("FlowConnector", "e0")
    made = flags.engine_config([*words, "--kv-offloading-size", "0.5"], "e0", "somewhere")
    assert made.cache_config.kv_offloading_size is None
    tiered = made.kv_transfer_config
    assert (tiered.kv_connector, tiered.engine_id) == ("TieredConnector", "e0")
    assert (tiered.kv_role, tiered.kv_load_failure_policy) == ("kv_both", "recompute")
    ours, host = tiered.kv_connector_extra_config["connectors"]
    assert ours["kv_connector_extra_config"]["taichi_directory"] == "somewhere"
    assert host["kv_connector"] == "OffloadingConnector"
    settings = host["kv_connector_extra_config"]
    assert (settings["cpu_bytes_to_use"], settings["offload_prompt_only"]) == (1 << 29, False)


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan"])
def test_a_host_tier_without_a_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parse([MODEL, "--kv-offloading-size", size])
    assert "--kv-offloading-size must be GiB above 0" in capsys.readouterr().err


def test_our_watermark_does_not_reach_vllms_flag_of_that_name() -> None:
    assert flags.parse([MODEL, "--watermark", "0.9"]).watermark == 0.0


def test_disaggregation_and_aggregation_are_values() -> None:
    apart = flags.parse([MODEL, "--p-heavy", "1", "--d-chunk", "0", "--watermark", "1"])
    assert flags.sliders(apart) == Sliders(1, 1, 1024, 0)
    assert not flags.policy(apart).degrades
    assert flags.sliders(flags.parse([MODEL, "--d-heavy", "2"])) == Sliders(0, 2, 256, 256)


@pytest.mark.parametrize("contender", hybrid(2, 8192))
def test_serve_takes_the_config_that_a_search_writes(contender: Contender, tmp_path: Path) -> None:
    found = machine("qwen2.5-14b-tp1-a100")
    scene = Scene(found, workload("sharegpt", found.max_model_len), SLO(4.0, 0.07))
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(config(scene, contender), sort_keys=False))
    args = flags.parse(["--config", str(path)])
    sliders = flags.sliders(args)
    assert (sliders.kinds(), sliders.d_chunk) == (contender.sliders.kinds(), contender.sliders.d_chunk)
    # Real links copy ahead, and prefixes are fetched.
    assert flags.policy(args) == replace(contender.policy, ahead=True, fetch=True)
    assert (args.model, flags.slo(args)) == (found.model, scene.slo)


@pytest.mark.parametrize("name", names())
def test_serve_has_the_instances_of_the_profile_that_a_config_was_found_with(
    name: str, tmp_path: Path
) -> None:
    found = machine(name)
    scene = Scene(found, workload("sharegpt", found.max_model_len), SLO(4.0, 0.07), kv_capacity=50_000)
    contender = Contender("hybrid", Sliders(1, 2, 2048, 128))
    path = tmp_path / "best.yaml"
    path.write_text(config_text(scene, contender))
    args = flags.parse(["--config", str(path)])
    written = config(scene, contender)
    assert {key: getattr(args, key) for key in written if key != "watermark"} == {
        key: written[key] for key in written if key != "watermark"
    }
    devices = int(found.device.split(" x ")[0]) if " x " in found.device else 1
    assert args.tensor_parallel_size == devices
    assert args.kv_cache_memory_bytes == 50_000 * found.kv_bytes_per_token // devices
    assert flags.profile(args) == (measured(name) if name in measured_names() else None)


def test_without_a_profile_nothing_is_loaded() -> None:
    assert flags.profile(flags.parse([MODEL])) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--no-such-flag", "--no-such-flag"),
        ("--p-heavy two", "--p-heavy"),
        ("--p-heavy -1", "--p-heavy must be a whole number"),
        ("--d-heavy 0", "at least one instance"),
        ("--d-heavy 2 --d-chunk 0", "nobody could prefill"),
        ("--p-heavy 1 --p-chunk 0 --d-chunk 0", "--p-chunk must be at least 1"),
        ("--p-heavy 1 --p-chunk 100 --d-chunk 200", "must not be below"),
        ("--tpot-slo -1", "tpot"),
        ("--watermark 0.01", "vLLM's own flag of that name"),
        ("--alpha nan", "alpha must be a positive number"),
        ("--data-parallel-rank 1", "use --data-parallel-size, or --p-heavy and --d-heavy"),
        ("--pipeline-parallel-size 2", "use --tensor-parallel-size"),
        ("--kv-over pigeon", "--kv-over"),
        ("--profile /nowhere/p.json", "/nowhere/p.json: cannot be read"),
        ("--headless", "all instances of a server are on its host"),
        ("--scheduler-cls a.B", "its own scheduler class"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_status_2(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        flags.parse([MODEL, *words.split()])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["Qwen2ForRewardModel", "Qwen2ForSequenceClassification"])
def test_a_model_that_does_not_generate_is_refused_before_an_engine_starts(architecture: str) -> None:
    overrides = json.dumps({"architectures": [architecture]})
    with pytest.raises(ValueError, match="pooling model, and only models that generate"):
        flags.engine_config([str(cached_tiny_model()), "--hf-overrides", overrides], "engine")


def test_front_end_and_engines_share_no_cache_of_inputs_where_there_are_several() -> None:
    for count, gigabytes in (("1", 4), ("2", 0)):
        args = flags.parse([MODEL, "--d-heavy", count])
        engine_args = AsyncEngineArgs.from_cli_args(args)
        flags._set(engine_args, args, "engine", "")
        assert engine_args.mm_processor_cache_gb == gigabytes
