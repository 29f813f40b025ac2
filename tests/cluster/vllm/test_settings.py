"""Settings in a file: every flag can stand there, and what a command line said comes back as such a file."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.settings import MASK, expanded, name_of, text

MODEL = "some/model"
PARSER = flags.make_parser()
SERVE = flags.serving(PARSER)
OPTIONS = [a for a in SERVE._actions if a.option_strings and a.dest not in ("help", "config", "model")]
# What a person could write for a flag that takes a value; a type refuses those that make no sense for it.
VALUES = ("2", "-1", "0.5", "x", "-x.y", "{}", '{"a": {"b": [1, null]}}', '["x"]', "None", "25k", "off")

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parsed(words: list[str]) -> dict[str, Any]:
    """What vLLM's parser with our flags makes of these words; ValueError where it refuses them."""
    SERVE.words.clear()
    try:
        return vars(PARSER.parse_args(["serve", *words]))
    except SystemExit:
        raise ValueError(words) from None


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two parsed command lines say the same: a configuration object may not know what equals it, and
    those of transfers are given a name by chance."""
    return found == expected or UUID.sub("", repr(found)) == UUID.sub("", repr(expected))


def in_a_file(tmp_path: Path, settings: Any) -> list[str]:
    """The words that a file with these settings, or with this text, stands for."""
    file = tmp_path / "settings.yaml"
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return expanded([MODEL, "--config", str(file)], SERVE)


def long_names(action: argparse.Action) -> list[str]:
    return [name for name in action.option_strings if name.startswith("--")]


def ways(action: argparse.Action) -> Iterator[tuple[list[str], Any]]:
    """A flag on the command line, and its value in a file, for several values."""
    name = long_names(action)[0]
    if action.nargs == 0:
        yield [name], True
        yield from (([other], False) for other in long_names(action)[1:])
        return
    choices = [str(choice) for choice in action.choices or () if choice is not None]
    for value in [*choices[:3], *choices[-1:]] or VALUES:
        try:
            parsed([MODEL, f"{name}={value}"])
        except (ValueError, TypeError):
            continue
        yield [f"{name}={value}"], value
        if not isinstance(native := yaml.safe_load(value), list | bool) or action.choices:
            yield [f"{name}={value}"], native


@pytest.mark.filterwarnings("ignore")
def test_every_flag_can_stand_in_a_file_and_comes_back_as_one_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walked = set()
    for action in OPTIONS:
        for words, value in ways(action):
            expected = parsed([MODEL, *words])
            given = SERVE.given(argparse.Namespace(**expected))
            assert same(parsed(in_a_file(tmp_path, {name_of(action): value})), expected), (words, value)
            written = text(given)
            assert MASK in written or same(parsed(in_a_file(tmp_path, written)), expected), (words, written)
            walked.add(action.dest)
    capsys.readouterr()  # what argparse said of values that it refused
    assert {action.dest for action in OPTIONS} - walked == set()
    assert len(walked) > 300


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("enable_prefix_caching: false", ["--no-enable-prefix-caching"]),
        ("no-enable-prefix-caching: true", ["--no-enable-prefix-caching"]),
        ("no-enable-prefix-caching: false", ["--enable-prefix-caching"]),
        ("enable-prefix-caching:", []),
        ("fair_classes: false", []),
        ("fair-classes: yes", ["--fair-classes"]),
        ("autotune: off", ["--autotune=off"]),
        ("autotune: on", ["--autotune=on"]),
        ("event_log:", []),
        ("hf_token: true", ["--hf-token"]),
        ("gpu-memory-utilization: 0.5", ["--gpu-memory-utilization=0.5"]),
        ("allowed_origins: [a, b]", ['--allowed-origins=["a", "b"]']),
        ("middleware: [a.B, c.D]", ["--middleware=a.B", "--middleware=c.D"]),
        ("served_model_name: [-x]", ["--served-model-name=-x"]),
        ("served_model_name: [one, two]", ["--served-model-name", "one", "two"]),
        ("lora_modules: [{name: a, path: /b}]", ['--lora-modules={"name": "a", "path": "/b"}']),
        ("compilation_config: {mode: 0}", ['--compilation-config={"mode": 0}']),
        ("compilation-config.mode: 0", ["--compilation-config.mode=0"]),
    ],
)
def test_settings_become_the_words_that_one_would_say(setting: str, words: list[str], tmp_path: Path) -> None:
    assert in_a_file(tmp_path, setting) == [MODEL, *words]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("fair_classes: 1", "--fair-classes: true or false, not 1"),
        ("dtype: yes", "--dtype: needs a value, not true (a word that YAML takes for it needs quotes)"),
        ("host: [a, b]", "--host: one value, not a list"),
        ("api_key: []", "--api-key: an empty list"),
        ("served_model_name: [a, -b]", "'-b' of several cannot begin with a dash"),
        ("config: other.yaml", "a file of settings cannot name another one"),
        (
            f"api_key: ['{MASK}']",
            "--api-key: (masked) stands for what is secret: write it in, set VLLM_API_KEY",
        ),
        (f"slo_classes: {{a: {{keys: ['{MASK}']}}}}", "--slo-classes: (masked) stands for what is secret"),
    ],
)
def test_what_no_words_can_say_is_one_line_with_the_file(
    setting: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match=re.escape(says)) as wrong:
        in_a_file(tmp_path, setting)
    assert str(wrong.value).startswith(f"--config: {tmp_path / 'settings.yaml'}: ")
    assert "\n" not in str(wrong.value)


def test_the_command_line_goes_before_the_file_wherever_the_model_stands(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: own\napi_key: [a, b]\nport: 1\nenable_prefix_caching: true\n")
    keys, cached = ["--api-key", "a", "b"], "--enable-prefix-caching"
    for words, expected in (
        ([f"--config={file}"], ["own", *keys, "--port=1", cached]),
        (["--config", str(file), "m"], ["m", *keys, "--port=1", cached]),
        (["m", "--port", "2", "--config", str(file)], ["m", *keys, cached, "--port", "2"]),
        (["--config", str(file), "--model", "m"], [*keys, "--port=1", cached, "--model", "m"]),
        (["--no-enable_prefix_caching", "--config", str(file), "--port=3", "--api_key", "c"], ["own"]),
    ):
        found = expanded(words, SERVE)
        assert found[: len(expected)] == expected
    assert found[1:] == ["--no-enable_prefix_caching", "--port=3", "--api_key", "c"]
    assert flags.parse(["--config", str(file), "m"]).model == "m"


def test_the_file_is_read_once_and_engines_get_its_words(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {MODEL}\nd_heavy: 2\n")
    args = flags.parse(["--config", str(file)])
    file.unlink()
    assert args.argv == [MODEL, "--d-heavy=2"]
    assert flags.sliders(flags.parse(args.argv)).d_heavy == 2


def test_a_masked_key_may_come_from_the_command_line_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {MODEL}\napi_key: ['{MASK}']\n")
    assert flags.parse(["--config", str(file), "--api-key", "mine"]).api_key == ["mine"]
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert flags.parse(["--config", str(file)]).api_key is None
    file.write_text(f"model: {MODEL}\napi_key: ['{MASK}', '{MASK}']\n")
    with pytest.raises(SystemExit):  # two keys, and the environment has one
        flags.parse(["--config", str(file)])


def test_nothing_secret_is_written() -> None:
    shown = text(
        {
            "api_key": ["hush-1", "hush-2"],
            "hf_token": "hush-3",
            "slo_classes": {"gold": {"ttft_slo": 1.0, "keys": ["hush-4"]}},
            "model_loader_extra_config": {"s3": {"aws_secret": "hush-5"}, "threads": 4},
            "otlp_traces_endpoint": "http://me:hush-6@collector:4317",
            "override_generation_config": {"eos_token_id": 7},
        }
    )
    assert "hush" not in shown
    assert shown.startswith("# Secret, so that it must be given anew: api_key, hf_token, slo_classes, ")
    read = yaml.safe_load(shown)
    assert read["api_key"] == [MASK, MASK]
    assert read["model_loader_extra_config"] == {"s3": {"aws_secret": MASK}, "threads": 4}
    assert read["override_generation_config"] == {"eos_token_id": 7}
    assert read["slo_classes"]["gold"] == {"ttft_slo": 1.0, "keys": [MASK]}


def test_settings_of_a_command_line_are_all_of_ours_and_what_was_said_of_vllms(tmp_path: Path) -> None:
    args = flags.parse(
        [MODEL, "--data-parallel-size", "3", "--p-heavy", "1", "-tp", "2", "--max-model-len", "4k"]
    )
    settings = args.settings
    assert (settings["model"], settings["p_heavy"], settings["d_heavy"]) == (MODEL, 1, 2)
    assert (settings["tensor_parallel_size"], settings["max_model_len"]) == (2, 4000)
    assert (settings["watermark"], settings["autotune"], settings["fair_classes"]) == (0.95, "off", False)
    assert "data_parallel_size" not in settings
    file = tmp_path / "settings.yaml"
    file.write_text(text(settings))
    assert flags.parse(["--config", str(file)]).settings == settings


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"port: 1\nport: 2", "'port' is there twice, the second time in line 2"),
        (b"slo_classes: {a: {}, a: {}}", "'a' is there twice, the second time in line 1"),
        (b"enforce_eager: !!bool x", "line 1: 'x' is no value"),
        (b"port:\n  !!timestamp x", "line 2: 'x' is no value"),
        (b"port: !!int x", "line 1: 'x' is no value"),
        (b"port: " + b"9" * 5000, "line 1: '9999"),
        (b"port: " + b"[" * 100_000, "nested too deeply"),
        (b"hf_overrides: " + b"{a: " * 50_000 + b"}" * 50_000, "nested too deeply"),
        (b"hf_overrides: {2020-01-01: 1}", "--hf-overrides: it cannot be said in JSON: keys must be str"),
        (
            b"hf_overrides: {a: !!binary aGk=}",
            "--hf-overrides: it cannot be said in JSON: Object of type bytes",
        ),
        (b"hf_overrides: &a [*a]", "hf_overrides: more than 100000 values, or one that holds itself"),
        (
            b"a: &a [1,1,1,1,1,1,1,1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 8)) for n in b"bcdefghij"),
            "f: more than 100000 values",
        ),
        (b"'': 1", "'' is no name of a setting"),
        (b"'a b': 1", "'a b' is no name of a setting"),
        (b"'port=3': 1", "'port=3' is no name of a setting"),
        (b"1: 1", "'1' is no name of a setting"),
        (b"model: \xff", "can't decode byte 0xff in position 7"),
        (b"model: a\x00b", "special characters are not allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_cannot_be_is_one_line_that_names_what_is_wrong(
    tmp_path: Path, file: bytes, says: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(file)
    with pytest.raises(ValueError, match=re.escape(says)) as wrong:
        expanded([MODEL, "--config", str(path)], SERVE)
    said = str(wrong.value)
    assert said.startswith(f"--config: {path}: ")
    assert "\n" not in said
    assert len(said) < 500


def test_an_unknown_setting_is_named_by_the_parser_and_merged_keys_are_not_twice_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("no_such_key: 1")
    with pytest.raises(SystemExit):
        flags.parse([MODEL, "--config", str(path)])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --no-such-key=1\n")
    path.write_text("hf_overrides: {a: &a {x: 1}, b: {<<: *a, x: 2}}")
    words = expanded([MODEL, "--config", str(path)], SERVE)
    assert words[1:] == ['--hf-overrides={"a": {"x": 1}, "b": {"x": 2}}']


@given(st.binary(max_size=200) | st.text(alphabet="ab:-&*![]{}<?|'\"\n 019.~%@,#", max_size=80))
def test_whatever_stands_in_a_file_is_words_or_one_error(file: bytes | str) -> None:
    with tempfile.NamedTemporaryFile() as place:
        Path(place.name).write_bytes(file if isinstance(file, bytes) else file.encode())
        with contextlib.suppress(ValueError):
            expanded([MODEL, "--config", place.name], SERVE)
