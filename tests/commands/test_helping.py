"""`--help` of every command of ours says each default once, and no key."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from taichi_serve.cli import COMMANDS

ALONE = ("top", "explain", "profile", "simulate", "search", "demo")
OWN: dict[str, tuple[str, ...]] = {**dict.fromkeys(ALONE, ()), "bench": ("goodput",)}


def options(text: str) -> Iterator[str]:
    """What is said of each option, on one line."""
    for part in re.split(r"\n  (?=-)", text)[1:]:
        yield " ".join(part.split())


@pytest.mark.parametrize("name", OWN)
def test_each_default_is_said_once(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(SystemExit):
        COMMANDS[name]()([*OWN[name], "--help"])
    text = capsys.readouterr().out
    assert "sk-secret" not in text
    found = list(options(text))
    assert len(found) >= 3
    assert [one for one in found if one.count("default") > 1] == []


def test_a_default_that_no_text_names_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS["simulate"]()(["--help"])
    said = {one.split()[0]: one for one in options(capsys.readouterr().out)}
    assert said["--requests"].endswith("(default: 2000)")
    assert said["--ttft-margin"].endswith("(default: 0.5)")
    assert "default" not in said["--rate"]  # it must be given
    assert "default" not in said["--json"]


def test_every_command_is_looked_at() -> None:
    assert set(OWN) | {"serve"} == set(COMMANDS)
