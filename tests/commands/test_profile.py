"""`taichi profile`: what is wrong is said before anything starts, and what was measured in a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from taichi_serve.commands.profile import instances, main, make_parser, report
from taichi_serve.latency.profile import Fit, Profile, StepRow, Transfer
from taichi_serve.sliders import Kind


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("some/model", "-o/--output"),
        ("some/model -o /nowhere/at/all/p.json", "/nowhere/at/all/p.json: cannot be written"),
        ("some/model -o {here}", "{here}: cannot be written"),
        ("some/model -o {here}/p.json --grid-chunks few", "--grid-chunks"),
        ("some/model -o {here}/p.json --grid-chunks 1", "chunks must be whole numbers of at least 2"),
        ("some/model -o {here}/p.json --grid-repeats 0", "repeats must be at least 1"),
        ("some/model -o {here}/p.json --neighbours -1", "--neighbours must be at least 0, not -1"),
    ],
)
def test_what_is_wrong_is_said_with_status_2_and_nothing_is_written(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.format(here=tmp_path).split())
    assert end.value.code == 2
    assert says.format(here=tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_not_ours_are_for_the_instances() -> None:
    args, words = make_parser().parse_known_args(
        ["some/model", "--dtype", "float32", "-o", "p.json", "--grid-decodes", "0,4", "--d-chunk", "64"]
    )
    assert words == ["some/model", "--dtype", "float32", "--d-chunk", "64"]
    assert args.grid_decodes == (0, 4)


def test_report_says_the_error_on_steps_that_the_fit_has_not_seen() -> None:
    profile = Profile(
        schema=1,
        model="tiny",
        device="one core",
        versions={},
        settings={},
        kv_capacity=1000,
        bytes_per_token=2048,
        steps=[StepRow(64, 2080.0, 0, 0, 0.01)] * 3,
        fit=Fit(0.004, 0.0, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.034, 0.102),
        transfers=[Transfer(Kind.P_HEAVY, Kind.D_HEAVY, 0.005, 2.5e9)],
    )
    console = Console(width=200)
    with console.capture() as said:
        report(profile, Path("p.json"), 61.2, console)
    lines = said.get().splitlines()
    assert lines[0] == "p.json: tiny on one core, measured in 61 s"
    assert "3.4% at the median, 10.2% at the 95th percentile" in lines[2]
    # 1,000 tokens of 2,048 bytes at 2.5 GB/s
    assert lines[3].strip() == "P-heavy -> D-heavy: 5.0 ms, and 0.82 ms for every 1,000 tokens"


@pytest.mark.parametrize(
    ("moves", "neighbours", "flags"),
    [
        (True, 0, "--p-heavy 1 --d-heavy 1"),
        (True, 1, "--p-heavy 1 --d-heavy 1"),  # it rests while requests are moved to it
        (True, 3, "--p-heavy 1 --d-heavy 3"),
        (False, 0, "--p-heavy 0 --d-heavy 1"),
        (False, 1, "--p-heavy 0 --d-heavy 2"),
    ],
)
def test_as_many_instances_start_as_are_measured_moved_to_and_at_work(
    moves: bool, neighbours: int, flags: str
) -> None:
    assert " ".join(instances(moves, neighbours)) == flags


def test_report_says_how_many_worked_beside_it() -> None:
    fit = Fit(0.004, 0.0, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1)
    profile = Profile(1, "tiny", "one core", {}, {"neighbours": 3}, 1000, 2048, [], fit)
    console = Console(width=200)
    with console.capture() as said:
        report(profile, Path("p.json"), 61.2, console)
    assert said.get().splitlines()[0] == "p.json: tiny on one core beside 3 at work, measured in 61 s"
