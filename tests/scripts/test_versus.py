"""The comparison with stock on GPUs: who is compared when, and the table, from files made by hand."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from contests import TRIAL, play

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.kept import Kept, write
from taichi_serve.bench.usage import Usage

GPU = Path(__file__).parents[2] / "scripts" / "gpu"
CHUNKS = (192, 256, 384, 512)


@pytest.fixture
def versus(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module("versus")


@pytest.fixture
def standings(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module("standings")


def kept(path, trial=TRIAL, rounds=None, **cliffs):
    """A comparison of contenders that keep the target up to these rates, written; so many rounds of it."""
    names = [name.replace("_", ":") for name in cliffs]
    contest = play(dict(zip(names, cliffs.values(), strict=True)), trial)
    used = Usage(cpu=19.0, joules=950.0, gpu_bytes=70 << 30)
    made = [
        replace(done, visits=tuple(replace(visit, usage=used) for visit in done.visits))
        for done in contest.rounds
    ]
    flags = dict.fromkeys(names, ())
    found = Kept(
        "tiny", trial, flags, "2026-11-27", "2 GPUs", dict.fromkeys(names, "1"), (), tuple(made[:rounds])
    )
    write(found, path / "compare.json")
    return found


def under_heads(standings, rows):
    """The rows of a table in Markdown, each cell by its head."""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [dict(zip(standings.HEADS, row, strict=True)) for row in cells]


def test_of_a_ladder_neighbours_are_compared_until_the_next_one_is_no_better(standings):
    known = {(256, 384): True, (384, 512): False}
    assert standings.uphill(lambda *two: known.get(two), CHUNKS, 256) == 384
    known = {(256, 384): True}
    assert standings.uphill(lambda *two: known.get(two), CHUNKS, 256) == (384, 512)


def test_where_the_larger_chunk_is_no_better_the_smaller_one_is_tried(standings):
    known = {(256, 384): False}
    assert standings.uphill(lambda *two: known.get(two), CHUNKS, 256) == (256, 192)
    assert standings.uphill(lambda *two: known.get(two), CHUNKS, 512) == (512, 384)
    known[256, 192] = True
    assert standings.uphill(lambda *two: known.get(two), CHUNKS, 256) == 192


def test_which_of_two_is_ahead_is_known_when_the_comparison_is_done(standings, tmp_path):
    whole = kept(tmp_path, stock_256=2.4, stock_384=2.9)
    assert standings.ahead(whole.contest, "stock:256", "stock:384") is True
    assert standings.ahead(whole.contest, "stock:384", "stock:256") is False
    begun = kept(tmp_path, rounds=3, stock_256=2.4, stock_384=2.9)
    assert standings.ahead(begun.contest, "stock:256", "stock:384") is None


def test_the_table_has_both_of_each_pair_and_what_ours_reaches_over_stock(standings, tmp_path):
    bursts = replace(TRIAL, arrivals=Arrivals("gamma", 2.0))
    kept(tmp_path / "long" / "hybrid", stock_256=2.4, hybrid=2.6)
    kept(tmp_path / "bursts" / "auto", bursts, rounds=4, stock_256=2.4, auto=2.9)
    kept(tmp_path / "long" / "tune-256-384", stock_256=2.4, stock_384=2.6)
    head, line, *rows = standings.table(tmp_path).splitlines()
    assert head.count("|") == line.count("|") == rows[0].count("|")
    found = {(row["workload"], row["contender"]): row for row in under_heads(standings, rows)}
    assert list(found) == [
        ("sharegpt, gamma arrivals (cv 2)", "stock:256"),
        ("sharegpt, gamma arrivals (cv 2)", "auto"),
        ("sharegpt", "stock:256"),
        ("sharegpt", "hybrid"),
    ]
    ours, stock = found["sharegpt", "hybrid"], found["sharegpt", "stock:256"]
    # The rates are steps of 10 %: stock keeps 2.36, ours 2.59.
    assert (stock["goodput, requests/s"], ours["goodput, requests/s"]) == ("2.36", "2.59")
    assert ours["goodput over stock's (95 %)"].startswith("1.1")
    assert (ours["verdict"], stock["verdict"]) == ("ahead", "-")
    assert ours["more of the same requests good (95 %)"].startswith("+25.0%")
    assert (ours["joules a good request"], ours["GPU memory, GiB"]) == ("10", "70.0")
    assert found["sharegpt, gamma arrivals (cv 2)", "auto"]["rounds"] == "4, not done"


def arguments(tmp_path, **more):
    common = {
        "out": tmp_path,
        "rehearse": False,
        "share": None,
        "gpus": 2,
        "tensor_parallel_size": 1,
        "seconds": 500.0,
        "tuning": 300,
        "warm_up": 40,
        "tolerance": 0.05,
        "requests": 600,
        "seeds": "0,1,2",
        "settings": "256,8192,192",
        "contenders": None,
        "profile": None,
        "model": None,
        "memory": "0.3",
        "front_ends": None,
        "settle": 0.0,
        "kv": "6G",
        "together": None,
        "start": None,
        "step": 2.0,
        "ttft_slo": None,
        "tpot_slo": None,
        "event_logs": False,
    }
    return argparse.Namespace(**common | more)


@pytest.fixture
def calls(versus, monkeypatch):
    """What was called; nothing comes to its end."""
    made = []
    monkeypatch.setattr(versus.Field, "_called", lambda field, words: bool(made.append(words)))
    return made


def test_stock_is_tuned_by_pairs_and_then_everybody_stands_beside_it(versus, calls, tmp_path):
    field = versus.Field(arguments(tmp_path), Path("m"))
    assert not field.pairs("long")  # stock is not tuned
    assert not field.tune("bursts")  # by the requests without bursts
    assert [words[words.index("--compare") + 1] for words in calls] == ["stock:256,stock:384"]
    assert calls[0][calls[0].index("--out") + 1] == str(tmp_path / "long" / "tune-256-384")
    kept(tmp_path / "long" / "tune-256-384", stock_256=2.4, stock_384=2.0)
    kept(tmp_path / "long" / "tune-192-256", stock_192=2.0, stock_256=2.4)
    assert field.tune("bursts")
    calls.clear()
    assert not field.pairs("bursts")
    asked = [words[words.index("--compare") + 1] for words in calls]
    assert asked == [
        "stock:256,stock-pd:8192",
        "stock:256,aggregation",
        "stock:256,disaggregation",
        "stock:256,hybrid",
        "stock:256",
    ]
    assert "--contender" in calls[-1]
    assert "auto=" in calls[-1]
    assert all(words[words.index("--cv") + 1] == "2" for words in calls)
    assert all(words[words.index("--devices") + 1] == "0;1" for words in calls)


def test_those_named_together_stand_in_one_comparison_and_nothing_is_tuned(versus, calls, tmp_path):
    more = {"together": "stock:256,stock:320,hybrid,auto", "gpus": 4, "start": 13.0, "step": 1.15}
    field = versus.Field(arguments(tmp_path, **more, tpot_slo=0.014, event_logs=True), Path("m"))
    field.pairs("long")
    (words,) = calls
    said = {word: words[words.index(word) + 1] for word in words if word.startswith("--")}
    assert said["--compare"] == "stock:256,stock:320,hybrid"
    assert said["--contender"] == "auto="
    assert (said["--start"], said["--step"]) == ("13", "1.15")
    assert (said["--ttft-slo"], said["--tpot-slo"]) == ("2", "0.014")
    assert said["--event-logs"] == str(tmp_path / "long" / "together")
    assert "--at-once" in words
    assert said["--out"] == str(tmp_path / "long" / "together")


def test_of_several_the_table_has_what_each_reaches_over_the_first(standings, tmp_path):
    kept(tmp_path / "long" / "together", stock_256=2.4, stock_384=2.0, hybrid=2.6)
    _, _, *rows = standings.table(tmp_path).splitlines()
    found = under_heads(standings, rows)
    assert [row["contender"] for row in found] == ["stock:256", "stock:384", "hybrid"]
    assert [row["verdict"] for row in found] == ["-", "behind", "ahead"]


def test_instances_that_share_a_card_stand_beside_as_many_servers_in_turn(versus, calls, tmp_path):
    field = versus.Field(arguments(tmp_path, share=4), Path("m"))
    field.tune("long")
    (words,) = calls
    assert words[words.index("--compare") + 1] == "stock-rr:256,stock-rr:384"
    assert words[words.index("--instances") + 1] == "4"
    assert words[words.index("--devices") + 1] == "0;0;0;0"


def test_settings_that_were_searched_are_taken_for_their_workload_and_those_like_it(versus, calls, tmp_path):
    field = versus.Field(arguments(tmp_path, profile="p.json"), Path("m"))
    field.search("long")
    assert calls[0][:3] == ["search", "--workload", "3658/100"]
    assert "--start" not in calls[0]
    assert field.search("bursts")  # it has those of "long"
    assert field._settings("bursts")[:1] == ["--chunk"]
    (tmp_path / "long" / "tuned").mkdir(parents=True)
    (tmp_path / "long" / "tuned" / "hybrid.yaml").touch()
    assert field._settings("bursts") == ["--tuned", str(tmp_path / "long" / "tuned")]
    assert field.search("long")
    assert len(calls) == 1


def test_the_picture_has_all_requests_of_a_contender_at_a_rate_in_one_point(versus, tmp_path):
    curves = importlib.import_module("curves")
    found = kept(tmp_path, auto=2.4, stock_192=2.0)
    points = curves.points([found, found])
    assert set(points) == {"auto", "stock:192"}
    rate = round(found.contest.goodput("auto").rate, 2)
    seen = [visit.run for r in found.rounds for visit in r.visits if visit.name == "auto"]
    assert len(points["auto"][rate]) == 2 * sum(round(run.rate, 2) == rate for run in seen) > 0
    curves.draw(points, 0.9, tmp_path / "out.svg")
    assert "share of requests that are good" in (tmp_path / "out.svg").read_text()
