"""Command lines that vLLM's parser answers with a traceback: one line, and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from pydantic import BaseModel, ValidationError, field_validator

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.misuse import one_line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no MODEL: a directory, or a name on the Hugging Face Hub"),
        ("--dtype float32", "no MODEL"),
        ("--model=", "no MODEL"),
        ("--config", "--config: no file is named"),
        ("m --config {here}/missing.yaml", "/missing.yaml: No such file or directory"),
        ("m --config {here}", "{here}: Is a directory"),
        ("m --config {here}/bad.yaml", "expected ',' or ']', but got '<stream end>'"),
        ("m --config {here}/list.yaml", "list.yaml: the file must hold keys with values"),
        ("m --config {here}/empty.yaml", "empty.yaml: the file must hold keys with values"),
        ("--config {here}/good.yaml", "no MODEL: a directory, or a name"),
        ("m --config {here}/good.yaml --config={here}/good.yaml", "--config: there can be only one"),
        ("m --config {here}/latin.yaml", "latin.yaml: 'utf-8' codec can't decode byte"),
        ("m --config {here}/unknown.yaml", "--no-such-key"),
    ],
)
def test_a_config_or_a_model_that_is_not_there_is_one_line(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "good.yaml").write_text("p_heavy: 1\n")
    (tmp_path / "unknown.yaml").write_text("no_such_key: 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SystemExit) as end:
        flags.parse(words.format(here=tmp_path).split())
    assert end.value.code == 2
    assert says.format(here=tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_the_model_may_be_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: some/model\n")
    assert flags.parse(["--config", str(tmp_path / "c.yaml")]).model == "some/model"
    assert flags.parse(["other/model", "--config", str(tmp_path / "c.yaml")]).model == "other/model"


class Checked(BaseModel):
    model: str

    @field_validator("model")
    @classmethod
    def known(cls, value: str) -> str:
        raise ValueError(f"Unrecognized model in {value}.\nShould have a key.")


def test_what_a_validator_says_is_left_of_its_report() -> None:
    with pytest.raises(ValidationError) as error:
        Checked(model="x")
    assert one_line(error.value) == "model Unrecognized model in x. Should have a key."
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(AssertionError()) == "AssertionError"
