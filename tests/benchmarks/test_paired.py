from __future__ import annotations

import subprocess
import sys

import pytest
from paired import Figure, Ratios, Watch, interval, order

THROUGHPUT = Figure("throughput", "rate", at_least=0.95)
TTFT = Figure("TTFT", "ttft_ms", at_most=1.05)
TPOT = Figure("TPOT", "tpot_ms")


def test_which_server_goes_first_alternates_from_pair_to_pair() -> None:
    assert [order(pair)[0] for pair in range(4)] == ["stock", "ours", "stock", "ours"]
    assert all(sorted(order(pair)) == ["ours", "stock"] for pair in range(4))


def test_a_ratio_is_ours_over_theirs_and_the_median_is_of_ratios_not_of_figures() -> None:
    ratios = Ratios([THROUGHPUT, TTFT])
    ratios.add(ours={"rate": 9.0, "ttft_ms": 50.0}, stock={"rate": 10.0, "ttft_ms": 100.0})
    ratios.add(ours={"rate": 40.0, "ttft_ms": 30.0}, stock={"rate": 20.0, "ttft_ms": 20.0})
    ratios.add(ours={"rate": 29.1, "ttft_ms": 90.0}, stock={"rate": 30.0, "ttft_ms": 90.0})
    assert ratios.of["throughput"] == pytest.approx([0.9, 2.0, 0.97])
    assert [" ".join(row.split()) for row in ratios.rows()] == [
        "throughput 0.970 (too few) within >= 0.95 of 0.900 2.000 0.970",
        "TTFT 1.000 (too few) within <= 1.05 of 0.500 1.500 1.000",
    ]


def test_the_interval_of_a_median_is_counted_off_from_both_ends() -> None:
    # By hand: of six the median is outside all with 2 / 64, of five with 2 / 32, which is more than 5 %.
    assert interval([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 6.0)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    # Tables of the sign test: of 50, the 18th from either end.
    assert interval([float(n) for n in range(1, 51)]) == (18.0, 33.0)
    assert interval([*[float(n) for n in range(1, 50)], 1e9]) == (18.0, 33.0)


def test_throughput_must_not_be_below_its_bound_and_ttft_not_above_its_own() -> None:
    assert THROUGHPUT.verdict(0.95) == "within >= 0.95"
    assert THROUGHPUT.verdict(0.949) == "MISSES >= 0.95"
    assert TTFT.verdict(1.05) == "within <= 1.05"
    assert TTFT.verdict(1.051) == "MISSES <= 1.05"
    assert TPOT.verdict(3.0) == ""


def test_nothing_is_said_about_a_bound_that_lies_within_the_interval_of_the_median() -> None:
    assert THROUGHPUT.verdict(0.99, (0.93, 1.02)) == "open >= 0.95"
    assert THROUGHPUT.verdict(0.99, (0.96, 1.02)) == "within >= 0.95"
    assert TTFT.verdict(1.08, (1.06, 1.2)) == "MISSES <= 1.05"


def test_the_cpu_time_of_a_server_is_that_of_what_it_started_too() -> None:
    burn = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); sys.stdin.read()"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    words = [sys.executable, "-c", start]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        watch = Watch(process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        read = watch.read()
    assert 0.4 < read["cpu"] < 1.0  # it began before the watch did, and Python had to start
