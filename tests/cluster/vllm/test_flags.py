"""Every flag of vLLM's parser, alone: it works, or it is refused in one line that names it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.moved import says_no
from taichi_serve.cluster.vllm.refused import HARMLESS, REFUSED
from taichi_serve.frontend.precheck import precheck
from taichi_serve.tiny import cached_tiny_model


def actions() -> dict[str, argparse.Action]:
    """Every option of `taichi serve` by its setting, but help and the file of options."""
    parser = flags.make_parser()
    commands = next(action for action in parser._actions if action.dest == "subparser")
    serve = commands.choices["serve"]
    return {a.dest: a for a in serve._actions if a.option_strings and a.dest not in ("help", "config")}


# Whatever is no directory would be looked up on a hub.
SAMPLES = {
    **dict.fromkeys(("model", "tokenizer", "hf_config_path"), ("/nowhere", "")),
    "fault_tolerance_config": ('{"engine_recovery_timeout_sec": 5}',),
    "aux_output_config": ('{"enable_return_routed_experts": true}',),
}


def lines(action: argparse.Action) -> Iterator[list[str]]:
    """Command lines with this option alone, with values that its declaration lets one think of."""
    names = [name for name in action.option_strings if name.startswith("--")]
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        yield from ([name] for name in names)
    elif action.choices:
        yield from ([names[0], str(choice)] for choice in list(action.choices)[:3] if choice is not None)
    else:
        kind = action.type if callable(action.type) else str
        for value in SAMPLES.get(action.dest, ("2", "-1", "{}", "x")):
            try:
                kind(value)
            except Exception:  # noqa: BLE001 - whatever a type raises: not a plausible value
                continue
            yield [names[0], value]


LINES = [line for action in actions().values() for line in lines(action)]


@pytest.mark.long
@pytest.mark.parametrize("line", LINES, ids=" ".join)
@pytest.mark.filterwarnings("ignore")
def test_every_flag_works_or_is_refused_in_one_line_that_names_it(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = line if line[0] == "--model" else [str(cached_tiny_model()), *line]
    try:
        args = flags.parse(words)
        flags.engine_config(words, "engine")
        precheck(args)
    except SystemExit:
        said = capsys.readouterr().err.strip().splitlines()[-1]
    except ValueError as wrong:
        said = str(wrong)
    else:
        return
    assert "\n" not in said
    assert line[0] in said


def values(action: argparse.Action) -> Iterator[list[str]]:
    """Command lines that set a refused option to something else than its default."""
    for line in lines(action):
        chosen = line[1] if len(line) > 1 else None
        harmless = [str(value) for value in (*HARMLESS.get(action.dest, ()), action.default)]
        if chosen is None:
            value = not says_no(line[0], action)
            if value not in (*HARMLESS.get(action.dest, ()), action.default):
                yield line
        elif chosen not in harmless and chosen != "":
            yield line


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_of_the_table_is_refused_with_its_reason(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    action = actions()[name]
    refused = 0
    for line in values(action):
        with pytest.raises(SystemExit):
            flags.parse(["some/model", *line])
        said = capsys.readouterr().err
        refused += f"{line[0]} cannot be used with taichi serve: {REFUSED[name]}" in said
    assert refused


@pytest.mark.parametrize(
    "words",
    [
        "--pipeline-parallel-size 1 --data-parallel-size 1 --nnodes 1 --api-server-count 1",
        "--runner generate --convert none --enable-chunked-prefill --async-scheduling",
        "--distributed-executor-backend mp --no-enable-sleep-mode --long-prefill-token-threshold 0",
    ],
)
def test_saying_how_things_are_anyway_is_no_harm(words: str) -> None:
    flags.parse(["some/model", *words.split()])


@pytest.mark.parametrize(
    "words",
    [
        "-dpl 2",
        "--data_parallel_rank=1",
        "--speculative-config.method ngram",
        "--kv-events-config.enable_kv_cache_events true",
        "-sc {}",
        "-pcp 2",
    ],
)
def test_another_spelling_is_no_way_around(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parse(["some/model", *words.split()])
    assert "cannot be used with taichi serve" in capsys.readouterr().err


OURS = (
    "ttft-slo",
    "tpot-slo",
    "ttft-margin",
    "tpot-margin",
    "watermark",
    "alpha",
    "move-timeout",
    "stall-timeout",
)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "", "soon"])
@pytest.mark.parametrize("name", OURS)
def test_seconds_and_shares_that_make_no_sense_are_refused(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        flags.parse(["some/model", f"--{name}={value}"])
    said = capsys.readouterr().err.strip()
    assert f"--{name}" in said
    assert len(said.splitlines()) == 1


def test_a_move_may_not_wait_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert flags.patience(flags.parse(["some/model", "--move-timeout", "300"])).move_timeout == 300
    with pytest.raises(SystemExit):
        flags.parse(["some/model", "--move-timeout", "3601"])
    assert "--move-timeout must be above 0 and at most 3600 seconds" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [[""], ["good", ""], [" "], ["a b\n"], [" padded"], ["ключ"], []], ids=str)
def test_a_key_that_is_none_is_refused(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parse(["some/model", "--api-key", *keys])
    assert "--api-key" in capsys.readouterr().err


def test_several_keys_are_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags.parse(["some/model", "--api-key", "one", "other"]).api_key == ["one", "other"]
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    with pytest.raises(SystemExit):
        flags.parse(["some/model"])
