"""The commands from outside: figures, files, and one clear line for bad input."""

import argparse
import json
import re
from functools import partial

import pytest
import yaml

from taichi_serve.commands import search, simulate
from taichi_serve.latency import shipped
from taichi_serve.latency.profile import Fit, Profile, save
from taichi_serve.search.effort import Effort
from taichi_serve.tuning import proposal

BASE = "--workload sharegpt --ttft-slo 4 --tpot-slo 0.07 --seed 1"
ONE = f"{BASE} --p-heavy 1 --d-heavy 1 --p-chunk 1024 --d-chunk 128 --rate 4 --requests 60"


def parsed(command, words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words.split())


def test_simulate_prints_a_table(capsys):
    assert simulate.main(parsed(simulate, ONE)) == 0
    out = capsys.readouterr().out
    assert "attainment 100.0%" in out
    assert re.search(r"moves: hand-over \d+|moves: none", out)
    assert "{" not in out
    assert re.search(r"TPOT \(ms\)", out)


def test_sliders_that_set_themselves_are_told_with_their_reasons(capsys, monkeypatch):
    monkeypatch.setattr(proposal, "FEWEST", 60)
    monkeypatch.setattr(proposal, "MOST", 60)
    words = "--workload summarization --ttft-slo 6 --tpot-slo 0.05 --p-heavy 1 --d-heavy 1 --p-chunk 8192"
    words += " --d-chunk 512 --rate 1 --requests 60 --json"
    for mode, moved in (("off", None), ("suggest", False), ("on", True)):
        assert simulate.main(parsed(simulate, f"{words} --autotune {mode}")) == 0
        figures = json.loads(capsys.readouterr().out)
        assert (figures.get("tuned") is None) == (moved is None)
        assert all(change["act"] is moved and change["why"] for change in figures.get("tuned", ()))
    assert figures["tuned"]
    assert simulate.main(parsed(simulate, f"{words.removesuffix(' --json')} --autotune suggest")) == 0
    assert re.search(r" s  suggested: S_D 512 -> \d+", capsys.readouterr().out)


def test_classes_are_told_one_by_one_each_by_its_own_slo(capsys, tmp_path):
    file = tmp_path / "classes.yaml"
    file.write_text("never: {ttft_slo: 0.001}\nalways: {ttft_slo: 900, tpot_slo: 9, share: 3}\n")
    assert simulate.main(parsed(simulate, f"{ONE} --classes {file} --json")) == 0
    figures = json.loads(capsys.readouterr().out)
    never, always = (figures["classes"][name] for name in ("never", "always"))
    assert (never["good"], always["attainment"]) == (0, 1.0)
    assert never["in_time_tokens"] == 0 < always["in_time_tokens"]
    assert never["sent"] + always["sent"] == 60
    assert 30 < always["sent"] < 60
    assert figures["mix"] == "25% never (0.001 s and 70 ms), 75% always (900 s and 9000 ms)"
    assert simulate.main(parsed(simulate, f"{ONE} --classes {file}")) == 0
    out = capsys.readouterr().out
    assert "always (900 s and 9000 ms): attainment 100.0%" in out
    assert "; 100.0% of the prompt tokens in time" in out
    assert simulate.main(parsed(simulate, f"{ONE} --classes gone.yaml")) == 2
    assert "--classes: gone.yaml: No such file" in capsys.readouterr().err


def test_less_kv_room_than_the_profile_says_is_a_choice(capsys):
    moves = []
    for words in ("", "--kv-capacity 20000"):
        assert simulate.main(parsed(simulate, f"{ONE} --rate 20 --json {words}")) == 0
        moves.append(json.loads(capsys.readouterr().out)["moves"])
    assert "degrade" not in moves[0]
    assert moves[1]["degrade"] > 0


def test_simulate_says_the_same_in_json_every_time_and_draws(capsys, tmp_path):
    for _ in range(2):
        assert simulate.main(parsed(simulate, f"{ONE} --json --plot {tmp_path}")) == 0
    out, err = capsys.readouterr()
    assert err == f"wrote {tmp_path}/times.svg\n" * 2
    half = len(out) // 2
    assert out[:half] == out[half:]
    figures = json.loads(out[:half])
    assert figures["sent"] == figures["finished"] == 60
    assert figures["attainment"] == 1.0
    assert (tmp_path / "times.svg").stat().st_size > 1000


def test_who_knows_of_prefixes_finds_more_of_them(capsys):
    many = "--p-heavy 0 --d-heavy 4 --p-chunk 0 --d-chunk 512 --rate 8 --requests 100 --kv-capacity 8192"
    talk = "--workload conversations:share=0.9,turns=4,think=5"
    cached = {}
    for words in ("--prefixes blind", "", "--prefixes fetch", "--prefixes blind --host-kv 400000"):
        assert simulate.main(parsed(simulate, f"{BASE} {talk} {many} {words} --json")) == 0
        figures = json.loads(capsys.readouterr().out)
        cached[words] = figures["cached"]
        assert figures["cached"] <= figures["shared"] + 0.02  # turns come in another order with each of them
        assert (figures["fetched"] > 0) == ("fetch" in words)
    assert cached["--prefixes blind"] < cached["--prefixes blind --host-kv 400000"]
    assert cached["--prefixes blind"] < cached[""] <= cached["--prefixes fetch"]


BAD = [
    ("--rate 0", "rate must be a positive number of requests/s, not 0.0"),
    ("--requests 0", "--requests: must be at least 1, not 0"),
    ("--d-heavy -1", "d_heavy must be a whole number of at least 0, not -1"),
    ("--p-chunk 64", r"p_chunk \(64\) must not be below d_chunk \(128\)"),
    ("--ttft-slo -1", "ttft SLO must be a positive number of seconds, not -1.0"),
    (
        "--workload nothing.csv",
        r"workload 'nothing.csv' is no file, and none of conversations, sharegpt, summarization, 1200/100",
    ),
    ("--arrivals trace", "workload 'sharegpt' has no arrival times of its own: take poisson or gamma"),
    ("--arrivals gamma", "--arrivals gamma needs --cv"),
    (
        "--workload conversations:share=2",
        "workload 'conversations:share=2': share must be from 0 to 1, not 2.0",
    ),
    ("--profile nothing", "profile 'nothing' is no file"),
    ("--model other/model", "profile qwen2.5-14b-tp1-a100 is for Qwen/Qwen2.5-14B, not for other/model"),
    ("--watermark 0", "watermark must be a positive number, not 0.0"),
    ("--kv-capacity 100", "--kv-capacity: must be at least 1024, not 100"),
    ("--host-kv -1", "--host-kv: must be at least 0, not -1"),
    ("--cv -1", "the coefficient of variation must be at least 0, not -1.0"),
]


@pytest.mark.parametrize(("words", "line"), BAD)
def test_bad_input_is_one_line_and_status_2(words, line, capsys):
    assert simulate.main(parsed(simulate, f"{ONE} {words}")) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"taichi simulate: {line}.*\n", err)


def test_a_measured_profile_in_the_folder_is_listed_and_simulated(capsys, tmp_path, monkeypatch):
    fit = Fit(0.004, 0.001, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1)
    save(Profile(1, "small", "One GPU", {}, {}, 100_000, 57344, [], fit), tmp_path / "small-gpu.json")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    assert "small-gpu" in parser.format_help()
    assert simulate.main(parser.parse_args(f"{ONE} --profile small-gpu --json".split())) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"] == "small"


def test_a_prompt_over_the_models_limit_names_file_row_and_field(capsys, tmp_path):
    trace = tmp_path / "long.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n10,5\n40000,5\n")
    assert simulate.main(parsed(simulate, f"{ONE} --workload {trace}")) == 2
    assert f"{trace}: row 3: num_prefill_tokens: 40000 + 5 tokens are over" in capsys.readouterr().err


def test_a_traces_own_bursts_are_harder_than_poisson_and_times_that_are_not_used_are_said(capsys, tmp_path):
    trace = tmp_path / "bursts.csv"  # 20 prompts at once, every 10 s
    rows = [f"{10 * burst},4000,2\n" for burst in range(20) for _ in range(20)]
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(rows))
    told = {}
    for arrivals in ("trace", "poisson"):
        words = f"{ONE} --workload {trace} --rate 2 --requests 400 --arrivals {arrivals} --json"
        assert simulate.main(parsed(simulate, words)) == 0
        said = capsys.readouterr()
        told[arrivals] = json.loads(said.out)
        assert ("arrival times that are not used" in said.err) == (arrivals == "poisson")
    assert told["trace"]["attainment"] < 0.8 * told["poisson"]["attainment"]
    assert told["trace"]["arrivals"] == "the trace's own arrivals"
    assert "note" not in told["trace"]


@pytest.mark.parametrize(("words", "done"), [("skip", "skipped"), ("cut", "cut")])
def test_rows_over_the_models_limit_are_counted_and_said_where_they_are_not_refused(
    words, done, capsys, tmp_path
):
    trace = tmp_path / "long.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n10,5\n40000,5\n")
    assert simulate.main(parsed(simulate, f"{ONE} --workload {trace} --over-limit {words} --json")) == 0
    told = capsys.readouterr()
    note = f"long: 1 of 2 rows are over the model's limit of 32768 tokens and were {done}"
    assert json.loads(told.out)["note"] == note
    assert told.err == f"taichi simulate: {note}\n"


def test_search_ranks_all_families_and_writes_a_config(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "Effort", partial(Effort, least=60, tolerance=0.2))
    out = tmp_path / "best.yaml"
    words = f"{BASE} --instances 2 --seconds 1 --most 60 --judging 120 --processes 1"
    words += f" --family aggregation --family disaggregation --tuned {tmp_path}/tuned"
    assert search.main(parsed(search, f"{words} --json --out {out} --plot {tmp_path}")) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    files = ["best.yaml", "pareto.svg", "attainment.svg"]
    files += ["tuned/aggregation.yaml", "tuned/disaggregation.yaml"]
    assert set(said.err.splitlines()) == {f"wrote {tmp_path}/{name}" for name in files}
    judged = [row for row in told["ranked"] if row["judged"]]
    rates = [row["goodput"] for row in judged]
    assert rates == sorted(rates, reverse=True)
    assert {row["family"] for row in judged} == {"aggregation", "disaggregation"}
    assert all(row["interval"][0] <= row["goodput"] <= row["interval"][1] for row in judged)
    assert told["ranked"][: len(judged)] == judged
    assert len(told["judging_seeds"]) == len(judged[0]["judged"]["shares"][0]) == 2
    assert not set(told["judging_seeds"]) & set(told["tuning_seeds"])
    assert told["cut"] is True
    assert yaml.safe_load(out.read_text()) == told["config"]
    tuned = {p.stem: yaml.safe_load(p.read_text()) for p in (tmp_path / "tuned").iterdir()}
    assert set(tuned) == {"aggregation", "disaggregation"}
    assert told["config"] == tuned[told["ranked"][0]["family"]]
    assert tuned["aggregation"]["p_heavy"] == 0
    assert (tmp_path / "pareto.svg").exists()
    assert (tmp_path / "attainment.svg").exists()


def test_search_prints_intervals_seeds_and_that_its_effort_was_cut(capsys, monkeypatch):
    monkeypatch.setattr(search, "Effort", partial(Effort, least=60, tolerance=0.2))
    words = "--instances 2 --seconds 1 --most 60 --judging 120 --processes 1 --family aggregation"
    assert search.main(parsed(search, f"{BASE} {words}")) == 0
    out = capsys.readouterr().out
    assert "of 2 seeds, 60 each" in out
    assert "CUT SHORT" in out
    assert re.search(r"\d ± [\d.]+ ", out)
    assert "(tuning)" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--error 0", "--error: must be above 0, not 0.0"),
        ("--judging -1", "--judging: must be at least 0, not -1"),
    ],
)
def test_an_effort_that_makes_no_sense_is_refused(words, line, capsys):
    assert search.main(parsed(search, f"{BASE} {words}")) == 2
    assert line in capsys.readouterr().err


def test_search_with_no_request_in_a_run_is_refused(capsys):
    assert search.main(parsed(search, f"{BASE} --most 0")) == 2
    assert "--most: must be at least 1" in capsys.readouterr().err


def test_search_for_one_instance_is_refused(capsys):
    assert search.main(parsed(search, f"{BASE} --instances 1")) == 2
    assert "--instances: must be at least 2" in capsys.readouterr().err


def test_beyond_its_goodput_requests_are_turned_away_and_more_are_good(capsys):
    words = "--workload summarization --ttft-slo 6 --tpot-slo 0.05 --p-heavy 1 --d-heavy 1 --p-chunk 8192"
    words += " --d-chunk 96 --rate 3 --requests 200 --json"
    good, refused = {}, {}
    for mode in ("serve", "demote", "refuse"):
        assert simulate.main(parsed(simulate, f"{words} --overload {mode}")) == 0
        figures = json.loads(capsys.readouterr().out)
        good[mode], refused[mode] = figures["good"], figures["refused"]
        assert figures["config"].get("overload", "serve") == mode
    assert refused["serve"] == 0
    assert min(refused["demote"], refused["refuse"]) > 0
    assert min(good["demote"], good["refuse"]) > 2 * good["serve"]
