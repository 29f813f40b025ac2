"""What `taichi serve --help=TaiChi` says of our flags: each default once."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags


def said() -> dict[str, str]:
    """Each of our flags with its text, as the formatter of the parser prints it, on one line."""
    serve = next(a for a in flags.make_parser()._actions if a.dest == "subparser").choices["serve"]
    group = next(group for group in serve._action_groups if group.title == "TaiChi")
    formatter = serve._get_formatter()
    return {a.option_strings[0]: formatter._expand_help(a) for a in group._group_actions}


def test_every_default_is_said_once() -> None:
    for flag, text in said().items():
        assert len(re.findall("default", text)) == 1, f"{flag}: {text}"


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--ttft-margin", "0.5"),
        ("--p-heavy", "0; chosen where no slider is given"),
        ("--prefixes", "fetch"),
        ("--autotune", "off; on without a slider"),
        ("--devices", "consecutive GPUs, tensor-parallel size each; on CPU the cores are divided evenly"),
        ("--event-log", "None"),
    ],
)
def test_what_is_so_without_a_flag_is_said_in_its_words(flag: str, default: str) -> None:
    assert said()[flag].endswith(f"(default: {default})")
