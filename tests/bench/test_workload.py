"""Workloads are seeded, traces are strict."""

import statistics
from itertools import pairwise

import pytest

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.lengths import InOrder
from taichi_serve.bench.trace import TraceError
from taichi_serve.bench.traces import read_trace
from taichi_serve.bench.workload import workload


def written(path, text):
    path.write_text(text)
    return path


def test_the_same_seed_gives_the_same_requests_and_a_rate_only_stretches_time():
    load = workload("sharegpt", 32768)
    slow, fast = list(load.calls(1.0, 50, 7)), list(load.calls(4.0, 50, 7))
    assert [(c.prompt_tokens, c.output_tokens) for c in slow] == [
        (c.prompt_tokens, c.output_tokens) for c in fast
    ]
    assert [c.at / 4 for c in slow] == pytest.approx([c.at for c in fast])
    assert slow != list(load.calls(1.0, 50, 8))


@pytest.mark.parametrize(("name", "prompt", "output"), [("sharegpt", 661, 257), ("summarization", 7317, 201)])
def test_synthetic_lengths_have_the_means_of_the_paper(name, prompt, output):
    means = workload(name, 32768).means(20_000)
    assert means == (pytest.approx(prompt, rel=0.03), pytest.approx(output, rel=0.03))


def test_a_workload_can_be_given_by_its_mean_lengths():
    assert workload("1200/100", 32768).means(20_000) == (
        pytest.approx(1200, rel=0.03),
        pytest.approx(100, rel=0.03),
    )
    assert max(c.prompt_tokens for c in workload("1200/100", 4096).calls(1.0, 5000, 0)) <= 4096 - 800
    with pytest.raises(ValueError, match=r"workload '0/100': prompts and outputs have at least one token"):
        workload("0/100", 4096)


def test_gamma_arrivals_have_the_cv_that_was_asked_for():
    calls = list(workload("sharegpt", 32768, arrivals=Arrivals("gamma", 2.0)).calls(10.0, 20_000, 1))
    gaps = [b.at - a.at for a, b in pairwise(calls)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(2.0, rel=0.05)
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)


def test_the_three_formats_are_told_apart_by_their_header(tmp_path):
    azure = written(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,10,2\n2023-11-16 18:15:48.0,20,3\n",
    )
    timed = written(
        tmp_path / "b.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,10,2\n2.0,20,3\n"
    )
    lengths = written(tmp_path / "c.csv", "num_prefill_tokens,num_decode_tokens,x\n10.0,2,0\n20,3,0\n")
    traces = [read_trace(path) for path in (azure, timed, lengths)]
    assert [list(t.prompts) for t in traces] == [[10, 20]] * 3
    assert [t.rate for t in traces] == pytest.approx([1 / 1.5, 1 / 1.5, 0.0])
    replayed = list(InOrder(traces[0]).calls(Arrivals("trace"), 2.0, 3, 0))  # three times as fast
    assert [c.at for c in replayed] == pytest.approx([0.0, 0.5, 1.0])


BAD = [
    ("a,b\n1,2\n", r"row 1: columns a, b"),
    ("num_prefill_tokens,num_decode_tokens\n", r"row 2: the trace has no requests"),
    ("num_prefill_tokens,num_decode_tokens\n5,x\n", r"row 2: num_decode_tokens: .* not 'x'"),
    ("num_prefill_tokens,num_decode_tokens\n5,1\n0,1\n", r"row 3: num_prefill_tokens: .* not '0'"),
    ("num_prefill_tokens,num_decode_tokens\n5\n", r"row 2: num_decode_tokens: .* not None"),
    ("num_prefill_tokens,num_decode_tokens\n90,20\n", r"row 2: num_prefill_tokens: 90 \+ 20 .* limit of 100"),
    ("arrived_at,num_prefill_tokens,num_decode_tokens\n-1,5,1\n", r"row 2: arrived_at: .* not '-1'"),
    ("arrived_at,num_prefill_tokens,num_decode_tokens\n2,5,1\n1,5,1\n", r"row 3: arrived_at: 1 is earlier"),
    ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,1\n", r"row 2: TIMESTAMP: .* not 'noon'"),
]


@pytest.mark.parametrize(("text", "line"), BAD)
def test_every_error_names_file_row_and_field(tmp_path, text, line):
    path = written(tmp_path / "t.csv", text)
    with pytest.raises(TraceError, match=line) as error:
        read_trace(path, limit=100)
    assert str(error.value).startswith(f"{path}: row")
    assert "\n" not in str(error.value)
