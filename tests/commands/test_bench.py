"""`taichi bench goodput` from outside, without a server: words, files, and one clear line for bad input."""

import re
import shlex
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.client import Answer
from taichi_serve.bench.lateness import Lateness
from taichi_serve.bench.report import HEADS, Result, as_json, conditions, draw, markdown, read, row, write
from taichi_serve.bench.score import Live, Run, Sample, Score
from taichi_serve.bench.trial import Goodput, Trial
from taichi_serve.commands import bench, compare, installed
from taichi_serve.commands.measure import line, so_far
from taichi_serve.slo import SLO

BASE = "--workload sharegpt --ttft-slo 4 --tpot-slo 0.07"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def told(words, capsys):
    assert bench.main(["goodput", *words.split()]) == 2
    return re.sub(r"\s*\n", "\n", capsys.readouterr().err)


BAD = [
    ("--attainment 0", "attainment must be above 0 and at most 1, not 0.0"),
    ("--attainment 1.5", "attainment must be above 0 and at most 1, not 1.5"),
    ("--ttft-slo -1", "ttft SLO must be a positive number of seconds, not -1.0"),
    (
        "--workload nothing",
        (
            "workload 'nothing' is no file, and none of conversations, sharegpt, summarization, 1200/100, "
            "mix:..., change:..."
        ),
    ),
    ("--scale 0", "scale must be a positive number, not 0.0"),
    (
        "--workload conversations:turns=0",
        "workload 'conversations:turns=0': turns must be from 1 to 1000, not 0.0",
    ),
    ("--arrivals trace", "workload 'sharegpt' has no arrival times of its own: take poisson or gamma"),
    ("--arrivals gamma", "--arrivals gamma needs --cv, the coefficient of variation of the gaps"),
    ("--arrivals poisson --cv 2", "--cv is for --arrivals gamma, not for poisson"),
    ("--cv nan", "the coefficient of variation must be at least 0, not nan"),
    ("--seeds 1,x", "--seeds: expected whole numbers with commas between, not '1,x'"),
    (
        "--compare hybrid,mixed",
        (
            "--compare: 'mixed' is none of aggregation, disaggregation, hybrid, stock, stock-pd, stock-rr "
            "and stock:TOKENS, and no URL"
        ),
    ),
    ("--compare hybrid,hybrid", "--compare: 'hybrid' is there twice"),
    ("--compare stock:x", "--compare: 'stock:x': expected tokens a step after the colon, as in stock:192"),
    ("--compare stock:0", "--compare: 'stock:0': expected tokens a step after the colon, as in stock:192"),
    ("--compare stock --instances 0", "--instances: must be at least 1, not 0"),
    ("--compare stock-pd --instances 1", "--instances: must be at least 2, not 1"),
    ("--compare hybrid --contender hybrid=", "--contender: 'hybrid' is there twice"),
    ("--contender =1", "--contender: '=1': expected NAME=FLAGS, the name of letters and digits"),
    ("--contender mine", "--contender: 'mine': expected NAME=FLAGS, the name of letters and digits"),
    ('--contender a="', "--contender: 'a=\"': No closing quotation"),
    ("--compare hybrid --redo -1", "--redo: must be at least 0, not -1"),
    ("--compare hybrid --settle -1", "--settle: must be at least 0, not -1"),
    ("--compare hybrid --instances 1", "--instances: must be at least 2, not 1"),
]


@pytest.mark.parametrize(("words", "expected"), BAD)
def test_bad_input_is_one_line_and_status_2(words, expected, model, capsys):
    assert told(f"{model} {BASE} {words}", capsys) == f"taichi bench: {expected}\n"


def test_lengths_of_a_trace_with_hashes_are_scaled_by_whole_blocks_only(model, capsys, tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [0]}')
    said = told(f"{model} {BASE} --workload {trace} --scale 0.1", capsys)
    assert said.startswith(
        f"taichi bench: {trace}: row 1: hash_ids: a block of 512 tokens times 0.1 is no whole"
    )


def test_a_trace_with_other_columns_is_named_before_a_server_is_started(model, capsys, tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("prompt,output\n1,2\n")
    said = told(f"{model} {BASE} --workload {trace}", capsys)
    assert said.startswith(f"taichi bench: {trace}: row 1: columns prompt, output; expected TIMESTAMP")


def test_an_unreachable_url_is_named(capsys):
    said = told(f"http://127.0.0.1:1 {BASE}", capsys)
    assert said.startswith("taichi bench: http://127.0.0.1:1: cannot be reached: ")


def test_a_directory_that_is_no_model_is_named(tmp_path, capsys):
    assert (
        told(f"{tmp_path} {BASE}", capsys) == f"taichi bench: {tmp_path}: no model: it has no config.json\n"
    )


def test_flags_of_serve_need_a_model(capsys):
    said = told(f"http://127.0.0.1:1 {BASE} -- --p-heavy 1", capsys)
    expected = "flags of taichi serve, and contenders that are no URL, need a MODEL, not a URL"
    assert said == f"taichi bench: {expected}\n"
    for words in ("--compare hybrid", "--contender mine="):
        said = told(f"http://127.0.0.1:1 {BASE} {words}", capsys)
        assert said == f"taichi bench: {expected}\n"


def asked(words):
    parser = bench.argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(shlex.split(words))


def test_the_contenders_are_values_of_the_sliders(model):
    args = asked(f"{model} {BASE} --compare aggregation,disaggregation,hybrid")
    jobs = bench.jobs_of(args, ("--enforce-eager",), bench.trial_of(args))
    # The user's own flags stand between: the SLOs may be others for the server, a contender's sliders not.
    before = "--ttft-slo 4.0 --tpot-slo 0.07 --overload serve --enforce-eager"
    assert {name: " ".join(job.flags) for name, job in jobs.items()} == {
        "aggregation": f"{before} --p-heavy 0 --d-heavy 2 --d-chunk 512",
        "disaggregation": f"{before} --p-heavy 1 --d-heavy 1 --p-chunk 1024 --d-chunk 0 --watermark 1",
        "hybrid": f"{before} --p-heavy 1 --d-heavy 1 --p-chunk 1024 --d-chunk 256",
    }


def test_vllms_own_server_gets_vllms_flags_only_and_its_budget_last(model):
    args = asked(f"{model} {BASE} --compare stock,stock:192 --instances 3")
    flags = ("--profile", "p.json", "--enforce-eager", "--kv-over=nixl", "--max-num-seqs", "64")
    flags += ("--metrics-without-key", "--p_heavy", "1", "--max-num-batched-tokens", "512")
    jobs = bench.jobs_of(args, flags, bench.trial_of(args))
    kept = ("--enforce-eager", "--max-num-seqs", "64", "--max-num-batched-tokens", "512")
    ranks = ("--data-parallel-size", "3")
    assert jobs["stock"].flags == (*kept, *ranks)
    assert jobs["stock:192"].flags == (*kept, *ranks, "--max-num-batched-tokens", "192")
    assert {(job.kind, job.instances) for job in jobs.values()} == {("stock", 3)}


def test_vllms_own_servers_behind_a_proxy_are_on_our_devices_and_half_of_them_prefill(model):
    args = asked(f"{model} {BASE} --compare stock-pd:2048,stock-rr --instances 4")
    flags = ("--devices", "0;0;1;1", "--p-chunk", "8192", "--enforce-eager")
    jobs = bench.jobs_of(args, flags, bench.trial_of(args))
    split, alike = jobs["stock-pd:2048"], jobs["stock-rr"]
    budget = "--enforce-eager --max-num-batched-tokens 2048"
    assert " ".join(split.flags) == f"{budget} --instances 4 --prefill 2 --devices 0;0;1;1"
    assert " ".join(alike.flags) == "--enforce-eager --instances 4 --prefill 0 --devices 0;0;1;1"
    assert (split.kind, alike.kind) == ("proxied", "proxied")


def test_urls_stand_beside_configurations_and_beside_one_another(model):
    args = asked(f"{model} {BASE} --compare hybrid,http://gpu:8000/,https://other")
    jobs = bench.jobs_of(args, (), bench.trial_of(args))
    assert [(name, job.kind, job.url) for name, job in jobs.items()][1:] == [
        ("gpu:8000", "url", "http://gpu:8000"),
        ("other", "url", "https://other"),
    ]
    assert compare.file_name("gpu:8000/v1") == "gpu-8000-v1"
    args = asked(f"http://gpu:8000 {BASE} --compare http://other:8000")
    assert list(bench.jobs_of(args, (), bench.trial_of(args))) == ["gpu:8000", "other:8000"]


def test_a_contender_of_ones_own_has_a_name_and_flags(model):
    args = asked(f"{model} {BASE} --compare hybrid --contender 'h48=--p-heavy 1 --d-chunk 48' --contender b=")
    jobs = bench.jobs_of(args, ("--enforce-eager",), bench.trial_of(args))
    assert list(jobs) == ["hybrid", "h48", "b"]
    assert jobs["h48"].flags[-5:] == ("--enforce-eager", "--p-heavy", "1", "--d-chunk", "48")


def test_each_of_ours_has_an_event_log_of_its_own_where_they_are_asked_for(model, tmp_path):
    args = asked(f"{model} {BASE} --compare hybrid,stock --contender b= --event-logs {tmp_path / 'kept'}")
    jobs = bench.jobs_of(args, (), bench.trial_of(args))
    for name in ("hybrid", "b"):
        assert jobs[name].flags[-2:] == ("--event-log", str(tmp_path / "kept" / f"{name}.jsonl"))
    assert "--event-log" not in jobs["stock"].flags
    assert (tmp_path / "kept").is_dir()


TUNED = """
model: tiny
p_heavy: 1
d_heavy: 1
p_chunk: 2048
d_chunk: 192
ttft_slo: 4.0
tpot_slo: 0.07
ttft_margin: 0.65
tpot_margin: 1.0
watermark: 0.98
alpha: 0.96
overload: demote
"""


def test_tuned_settings_come_from_the_files_of_a_search(model, tmp_path):
    (tmp_path / "hybrid.yaml").write_text(TUNED)
    args = asked(f"{model} {BASE} --compare hybrid --tuned {tmp_path}")
    found = bench.jobs_of(args, (), bench.trial_of(args))
    assert {name: " ".join(one.flags[6:]) for name, one in found.items()} == {
        "hybrid": "--overload demote --p-heavy 1 --d-heavy 1 --p-chunk 2048 --d-chunk 192 --ttft-margin 0.65 "
        "--tpot-margin 1.0 --watermark 0.98 --alpha 0.96"
    }


def test_tuned_settings_bring_the_instances_they_were_found_for_and_the_user_may_overrule_those(
    model, tmp_path
):
    more = "tensor_parallel_size: 4\nprofile: p.json\nenforce_eager: true\nasync_scheduling: false\n"
    (tmp_path / "hybrid.yaml").write_text(TUNED + more)
    args = asked(f"{model} {BASE} --compare hybrid --tuned {tmp_path}")
    words = bench.jobs_of(args, ("--tensor-parallel-size", "2"), bench.trial_of(args))["hybrid"].flags
    assert " ".join(words).startswith(
        "--ttft-slo 4.0 --tpot-slo 0.07 --overload serve --overload demote --tensor-parallel-size 4 "
        "--profile p.json --enforce-eager --tensor-parallel-size 2 --p-heavy 1"
    )


BAD_TUNED = [
    ("--tuned {here}", "--tuned needs --compare, which says what is to be measured"),
    (
        "--tuned {here} --compare aggregation",
        "--tuned: {here}/aggregation.yaml: cannot be read: No such file",
    ),
    (
        "--tuned {here} --compare hybrid --ttft-slo 3",
        "--tuned: {here}/hybrid.yaml: was tuned for 4 s and 70 ms, not for 3 s and 70 ms",
    ),
    (
        "--tuned {here} --compare disaggregation",
        "--tuned: {here}/disaggregation.yaml: is no config of `taichi search`: 'd_chunk'",
    ),
]


@pytest.mark.parametrize(("words", "expected"), BAD_TUNED)
def test_tuned_settings_that_are_missing_or_for_another_slo_are_named(
    words, expected, model, tmp_path, capsys
):
    (tmp_path / "hybrid.yaml").write_text(TUNED)
    (tmp_path / "disaggregation.yaml").write_text(TUNED.replace("d_chunk: 192\n", ""))
    said = told(f"{model} {BASE} {words.format(here=tmp_path)}", capsys)
    assert said.startswith(f"taichi bench: {expected.format(here=tmp_path)}")


def test_an_api_key_is_not_written_down():
    flags = ("--port", "1", "--api-key", "secret", "--api-key=secret", "--d-heavy", "2")
    assert bench.without_key(flags) == ("--port", "1", "--api-key", "***", "--api-key=***", "--d-heavy", "2")


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(model, capsys):
    assert str(model / "config.json") in told(f"{model} {BASE} --out {model}/config.json", capsys)


def sample(number, ttft, tpot, error=None):
    return Sample(0, number, 20, 11, ttft, tpot, error is None and ttft <= 4.0, error)


SAMPLES = (*(sample(n, 0.1 * (n + 1), 0.01) for n in range(9)), sample(9, 5.0, 0.02))
THERE = Run(2.0, 10, 10, 9, 1, True, 6.0, 0.0, SAMPLES)
MISSED = Run(4.0, 10, 5, 1, 2, False, 2.0, 0.2, (sample(0, None, None, "HTTP 503: full"),))


def result(name="hybrid", goodput=None):
    trial = Trial("sharegpt", SLO(4.0, 0.07), 0.1, requests=10, warm_up=2, seeds=(0,))
    found = goodput or Goodput(2.0, (THERE, MISSED), THERE)
    return Result(name, "tiny", trial, ("--d-heavy", "2"), found, "2026-11-23", "vLLM 0.32.0", "2 cores")


def test_a_row_of_the_table_by_hand():
    assert dict(zip(HEADS, row(result()), strict=True)) == {
        "configuration": "hybrid",
        "goodput, requests/s": "2",
        "attainment there (95 %)": "90.0% (59.6% to 98.2%)",
        "good of sent": "9 of 10",
        "failed": "0",
        "TTFT p50 / p90, s": "0.5 / 0.9",
        "TPOT p50 / p90, ms": "10 / 10",
        "missed at, requests/s": "4",
        "remarks": "-",
    }


def test_the_conditions_say_how_requests_arrived():
    assert "sharegpt x 0.1, Poisson arrivals, SLO 4 s" in conditions(result())
    bursts = replace(result(), trial=replace(result().trial, arrivals=Arrivals("gamma", 2.0)))
    assert "gamma arrivals (cv 2), SLO" in conditions(bursts)


def test_a_configuration_that_keeps_nothing_has_a_row_too():
    assert row(result(goodput=Goodput(0.0, (MISSED,), None))) == ("hybrid", "below 4", *("-",) * 5, "4", "-")


def test_a_rate_that_was_never_missed_is_a_lower_bound_wherever_it_is_told(tmp_path):
    bound = Goodput.of(2.0, (THERE,), THERE)
    assert row(result(goodput=bound))[1:3] == ("at least 2", "90.0% (59.6% to 98.2%)")
    assert row(result(goodput=Goodput.of(2.0, (THERE, MISSED), THERE)))[1] == "2"
    results = [result(), result("aggregation", bound)]
    assert "| aggregation | at least 2 | " in markdown(results)
    assert b'"goodput, requests/s": "at least 2"' in as_json(results)
    draw(results, tmp_path / "goodput.svg")
    write(results[1], tmp_path / "aggregation.json")
    assert b'"at_least": true' in (tmp_path / "aggregation.json").read_bytes()
    old = (tmp_path / "aggregation.json").read_text().replace('"at_least": true', '"nothing": 0')
    (tmp_path / "old.json").write_text(old)  # from before there was such a word
    assert read(tmp_path / "old.json").goodput.at_least


def test_a_table_says_what_is_doubtful_about_its_figures():
    short = replace(THERE, span=5.0, lost=("i1",))
    marked = result(goodput=Goodput.of(2.0, (short, MISSED), short))
    assert row(marked)[-1] == "lost i1; too short: 5 s of traffic"
    other = replace(MISSED, lost=("i0", "i1"))
    assert row(result(goodput=Goodput.of(2.0, (THERE, other), THERE)))[-1] == "lost i0 i1"
    noted = replace(marked, notes=("t: 3 of 4 rows were skipped",))
    assert markdown([noted, noted]).endswith("\n- t: 3 of 4 rows were skipped\n")
    assert b'"t: 3 of 4 rows were skipped"' in as_json([noted])


def test_a_result_is_read_back_as_it_was_and_answers_no_other_question(tmp_path):
    made = result()
    write(made, tmp_path / "hybrid.json")
    assert read(tmp_path / "hybrid.json") == made
    assert made.same("tiny", made.trial, made.flags)
    assert not made.same("tiny", made.trial, ("--d-heavy", "3"))
    assert read(tmp_path / "none.json") is None
    (tmp_path / "cut.json").write_text('{"name": "hyb')
    assert read(tmp_path / "cut.json") is None


def test_table_and_picture_are_written_for_any_number_of_configurations(tmp_path):
    results = [result("aggregation", Goodput(0.0, (MISSED,), None)), result()]
    text = markdown(results)
    assert "target 90% of 10 requests for each of the seeds 0, after 2 that are not counted" in text
    assert text.count("\n| ") == 4
    assert b'"good of sent": "9 of 10"' in as_json(results)
    draw(results, tmp_path / "new" / "goodput.svg")
    assert (tmp_path / "new" / "goodput.svg").stat().st_size > 1000


def test_a_rate_that_ended_early_says_what_is_known_of_it():
    assert line("hybrid", MISSED) == (
        "hybrid  4 requests/s: missed, attainment 10.0% to 80.0% of 10, 5 sent, 1 failed, "
        "the client was up to 0.20 s late, 2 s"
    )
    assert line("hybrid", THERE) == "hybrid  2 requests/s: kept, attainment 90.0% of 10, 10 sent, 6 s"
    told = replace(THERE, samples=tuple(replace(s, cached_tokens=15) for s in SAMPLES))
    assert "10 sent, 75.0% of the prompt tokens cached, 6 s" in line("hybrid", told)
    late = replace(THERE, lateness=Lateness(0.2, (0.97,)))
    assert line("hybrid", late) == (
        "hybrid  2 requests/s: kept, attainment 90.0% of 10, 10 sent, 6 s, 1 sender at 97% of a core, "
        "200 ms late (p99), the load generator was 0.2 s late (p99)"
    )
    assert line("hybrid", replace(THERE, span=5.0, lost=("i1",))) == (
        "hybrid  2 requests/s: kept, attainment 90.0% of 10, 10 sent, 6 s, lost i1, too short: 5 s of traffic"
    )


def test_a_source_tree_that_was_never_installed_can_measure_too(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    assert installed.own_version() == "from source"
    assert installed.versions() == "taichi-serve from source, no engines installed"


def test_every_file_of_a_measurement_is_named(tmp_path, capsys):
    write(result(), tmp_path / "hybrid.json")
    bench.report([result()], str(tmp_path))
    names = ["hybrid.json", "goodput.md", "goodput.json", "goodput.svg"]
    assert capsys.readouterr().err.splitlines() == [f"wrote {tmp_path}/{name}" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_while_a_rate_is_measured_its_attainment_so_far_is_said():
    score = Score(SLO(1.0, 0.1), 10, 0.9)
    assert so_far(score) == "0 good, 0 bad of at most 1, 0 under way"
    for number, seconds in enumerate((0.5, 0.5, 0.5, 2.0)):
        score.begin((0, number), Live(0.0, 5, 1), 0.0)
        score.end((0, number), Answer(0.0, tokens=[7], times=[seconds], output_tokens=1, finish="length"))
    score.begin((0, 4), Live(0.0, 5, 1), 0.0)
    assert so_far(score) == "attainment 75.0%, 3 good, 1 bad of at most 1, 1 under way"
