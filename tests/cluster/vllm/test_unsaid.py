"""What a command line leaves unsaid, and a number of instances that is said as for vLLM's own server."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.unsaid import bare
from taichi_serve.sliders import OFF, Sliders

MODEL = "some/model"


def sliders(words: str) -> Sliders:
    return flags.sliders(flags.parse([MODEL, *words.split()]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", True),
        ("--max-num-batched-tokens 1024 --max-num-seqs 8 --data-parallel-size 2", True),
        ("--ttft-slo 2 --tpot-slo 0.03 --autotune off --ttft-margin 0.3", True),
        ("--d-heavy 1", False),
        ("--p-heavy 0", False),
        ("--d-chunk 256", False),
        ("--p-chunk 1024", False),
    ],
)
def test_a_line_is_bare_that_names_no_slider_even_if_it_names_a_default(words: str, expected: bool) -> None:
    assert bare(flags.parse([MODEL, *words.split()])) is expected


def test_a_line_with_a_slider_tunes_nothing_by_itself() -> None:
    args = flags.parse([MODEL, "--d-heavy", "2"])
    assert (args.autotune, args.ttft_slo, args.tpot_slo) == (OFF, 4.0, 0.07)
    assert args.said == {"d_heavy"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data-parallel-size 2", Sliders(0, 2, 256, 256)),
        ("-dp 3 --d-chunk 128", Sliders(0, 3, 128, 128)),
        ("--data-parallel-size 4 --p-heavy 1", Sliders(1, 3, 1024, 256)),
        ("--data_parallel_size=4 --d-heavy 3", Sliders(1, 3, 1024, 256)),
        ("--data-parallel-size 2 --p-heavy 1 --d-heavy 1", Sliders(1, 1, 1024, 256)),
        ("--data-parallel-size 1 --d-heavy 3", Sliders(0, 3, 256, 256)),
    ],
)
def test_a_data_parallel_size_is_a_number_of_instances(words: str, expected: Sliders) -> None:
    assert sliders(words) == expected


def test_no_engine_hears_of_a_data_parallel_size() -> None:
    args = flags.parse([MODEL, "--data-parallel-size", "2"])
    assert (args.data_parallel_size, args.instances) == (1, 2)
    assert flags.parse([MODEL]).instances is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--data-parallel-size 2 --d-heavy 3", "--data-parallel-size 2 and --p-heavy 0 --d-heavy 3"),
        ("--data-parallel-size 2 --p-heavy 3", "--data-parallel-size 2 and --p-heavy 3 --d-heavy 0"),
        ("--data-parallel-size 3 --p-heavy 1 --d-heavy 1", "different numbers of instances"),
        ("--data-parallel-size 0", "--data-parallel-size must be at least 1, not 0"),
        ("--data-parallel-size -1", "--data-parallel-size must be at least 1, not -1"),
    ],
)
def test_numbers_of_instances_that_contradict_each_other_are_refused(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        flags.parse([MODEL, *words.split()])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_p_heavy_chunk_is_kept_for_the_first_that_becomes_p_heavy() -> None:
    assert sliders("--p-heavy 0 --d-heavy 2 --p-chunk 8192 --d-chunk 128") == Sliders(0, 2, 8192, 128)
    assert sliders("--d-heavy 2 --p-chunk 64 --d-chunk 128") == Sliders(0, 2, 128, 128)
