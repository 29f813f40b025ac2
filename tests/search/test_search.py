"""Goodput, its bound, and the search: small machines whose limits are known by hand."""

from dataclasses import replace

import pytest

from taichi_serve.bench.workload import LogNormal, Synthetic, Workload, workload
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.shipped import Machine, machine
from taichi_serve.scheduling.policy import DEMOTE, SERVE, Policy
from taichi_serve.search.balance import LEAST, LEVEL, MOST, alone, balance
from taichi_serve.search.bound import Mean, bound, least_seconds
from taichi_serve.search.climb import climb, together
from taichi_serve.search.crew import workers
from taichi_serve.search.curve import Curve
from taichi_serve.search.effort import Effort, plan, planned
from taichi_serve.search.families import FAMILIES
from taichi_serve.search.goodput import Contender, Scene, attain
from taichi_serve.search.report import config, config_text, found_row, promise
from taichi_serve.search.sliders import Found, best, ranked, search, with_ends
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

# A step costs 10 ms and 0.1 ms a token: a prompt of 1000 in chunks of 500 takes 120 ms.
TINY = Machine(
    "tiny", "tiny", "none", StepCurve(((0, 0.01), (1000, 0.11)), 0.0, 0.0, 0.0), 64_000, 1000, 8192
)
LOAD = Workload("even", Synthetic(LogNormal(1000, 0.0, 1000), LogNormal(20, 0.0, 20)))
SCENE = Scene(TINY, LOAD, SLO(1.0, 0.05))
AGGREGATION = Contender("aggregation 256", Sliders(0, 2, 0, 256), Policy(ttft_margin=1.0))


def goodput(scene, requests, seeds, guess, tolerance=0.02, contender=AGGREGATION, most=1e3):
    with workers(scene, 1) as crew:
        return climb(crew, [(contender, guess)], requests, seeds, tolerance, most)[0]


def test_without_a_tpot_limit_the_bound_is_the_work_alone():
    # 1000 prompt and 19 decode tokens at 0.1 ms each are 101.9 ms. KV holds 63 decodes of 1010 tokens, so 19
    # tokens take at least 0.3 steps, and each of these costs 10 ms whatever is in it.
    seconds = least_seconds(TINY, Mean.of(LOAD, 500), 100.0, 256)
    assert seconds == pytest.approx(0.1049, rel=0.01)


def test_the_bound_counts_only_tokens_that_nobody_can_have_cached():
    # Every prompt has 1000 tokens. Where 992 of these were in the one before, only 8 are computed.
    class Alike(Synthetic):
        def calls(self, arrivals, rate, requests, seed):
            for call in super().calls(arrivals, rate, requests, seed):
                yield replace(call, blocks=tuple(range(62)))

    same = Workload("same", Alike(LogNormal(1000, 0.0, 1000), LogNormal(20, 0.0, 20)))
    alone, cached = Mean.of(LOAD, 500), Mean.of(same, 500)
    assert (alone.prompt, alone.attention) == (1000.0, 500_500.0)
    assert cached.prompt == pytest.approx(8 + 992 / 500)
    assert cached.attention == pytest.approx(500_500 - 992 * 993 / 2 * 499 / 500)
    assert (cached.held, cached.context) == (alone.held, alone.context)
    assert bound(TINY, same, 0.05, 2) > 2 * bound(TINY, LOAD, 0.05, 2)


def test_a_tight_tpot_limit_lowers_the_bound_and_never_below_what_is_reached():
    loose, tight = bound(TINY, LOAD, 0.05, 2), bound(TINY, LOAD, 0.0105, 2)
    assert tight < loose
    found = goodput(SCENE, 300, [1], loose)
    assert 0.5 * loose < found.rate < loose


def test_goodput_is_where_attainment_falls_through_the_target():
    top = bound(TINY, LOAD, 0.05, 2)
    found = goodput(SCENE, 300, [1], top)
    assert attain(SCENE, AGGREGATION, found.rate * 0.98, 300, 1).attainment >= 0.9
    assert attain(SCENE, AGGREGATION, found.rate * 1.04, 300, 1).attainment < 0.9
    assert found.tally is not None
    assert found.tally.sent == 300


def shares(rate, seeds):
    return [attain(SCENE, AGGREGATION, rate, 200, seed).attainment for seed in seeds]


def test_of_several_seeds_it_is_where_all_their_requests_together_fall_through_the_target():
    top, seeds = bound(TINY, LOAD, 0.05, 2), (1, 2, 3)
    rate = goodput(SCENE, 200, seeds, top).rate
    assert sum(shares(rate * 0.98, seeds)) >= 3 * 0.9 > sum(shares(rate * 1.04, seeds))
    alone = [goodput(SCENE, 200, [seed], top).rate for seed in seeds]
    assert min(alone) < rate < max(alone)


def test_rates_are_tried_until_no_single_seed_leaves_the_goodput_open():
    curve = goodput(SCENE, 200, [1, 2, 3], bound(TINY, LOAD, 0.05, 2)).curve
    assert all(curve.rates[0] < curve.goodput(without) < curve.rates[-1] for without in (None, 0, 1, 2))


def test_runs_of_several_seeds_are_one_tally():
    runs = [attain(SCENE, AGGREGATION, 8.0, 50, seed) for seed in (1, 2)]
    whole = together(runs)
    assert (whole.sent, whole.good, whole.steps) == tuple(
        sum(getattr(run, name) for run in runs) for name in ("sent", "good", "steps")
    )
    assert whole.prompt_tokens == 100 * 1000
    assert whole.ttft.count == 100
    assert whole.ttft.mean == pytest.approx((runs[0].ttft.mean + runs[1].ttft.mean) / 2)
    assert whole.ttft.quantile(1.0) == max(run.ttft.quantile(1.0) for run in runs)
    assert whole.busy["i0"] == pytest.approx(sum(run.busy["i0"] for run in runs))


def test_a_wrong_guess_changes_the_goodput_by_no_more_than_the_tolerance():
    top = bound(TINY, LOAD, 0.05, 2)
    rates = [goodput(SCENE, 300, [1], guess).rate for guess in (1.0, top * 0.99, 5 * top)]
    assert max(rates) <= min(rates) * 1.05


def test_a_slower_truth_than_believed_costs_attainment():
    top = bound(TINY, LOAD, 0.05, 2)
    rate = goodput(SCENE, 300, [1], top, 0.01).rate
    slower = attain(replace(SCENE, slower=1.2), AGGREGATION, rate, 300, 1)
    assert slower.attainment < attain(SCENE, AGGREGATION, rate, 300, 1).attainment


def test_a_balanced_slo_is_the_tightest_ttft_at_which_disaggregation_is_as_good():
    # Disaggregation prefills on one of two instances, 9 prompts of 0.11 s a second: above that its queue
    # grows, and of 100 requests the more are good the longer they may wait.
    effort = Effort(seconds=10, least=100, most=100, tuners=(1, 1), judging=0)
    found = balance(SCENE, 2, 3, effort, processes=1)
    assert found.level
    assert LEAST * alone(SCENE) < found.ttft < MOST * alone(SCENE)
    tighter = replace(SCENE, slo=SLO(found.ttft / 1.2, SCENE.slo.tpot))
    firsts = best(search(tighter, 2, 3, ("aggregation", "disaggregation"), effort, 1))
    assert firsts["disaggregation"].rate < LEVEL * firsts["aggregation"].rate


def test_a_prompt_alone_takes_one_step_of_its_length():
    assert alone(SCENE) == pytest.approx(0.01 + 1000 * 0.0001)


def test_where_one_family_is_ahead_throughout_no_slo_is_balanced():
    # 128 tokens take 23 ms: with 20 ms a token hardly a prompt may be beside decodes.
    with pytest.raises(ValueError, match=r"no TTFT SLO is balanced: at 0.44 s disaggregation is ahead"):
        balance(
            replace(SCENE, slo=SLO(1.0, 0.02)),
            2,
            3,
            Effort(10, 100, 100, 0.1, tuners=(1, 1), judging=0),
            processes=1,
        )


QUICK = Effort(seconds=5, least=80, most=100, tolerance=0.1, judging=300)


def test_the_search_tunes_every_family_and_judges_the_best_of_each():
    found = search(SCENE, 2, 3, effort=QUICK, processes=1)
    assert set(best(found)) == set(FAMILIES)
    assert found == ranked(found)
    judged = [f for f in found if f.judged]
    assert found[: len(judged)] == judged
    assert {f.family for f in judged} == set(FAMILIES)
    assert len(judged) == len(FAMILIES)
    assert all(f.rate > 0 and f.share == pytest.approx(f.rate / bound(TINY, LOAD, 0.05, 2)) for f in found)


def test_what_is_told_was_held_of_seeds_that_the_tuning_has_not_seen():
    first = search(SCENE, 2, 3, ["aggregation"], QUICK, 1)[0]
    top = bound(TINY, LOAD, 0.05, 2)
    made = plan(SCENE, top, QUICK, 3)
    assert not set(made.tuning) & set(made.judging)
    again = goodput(SCENE, made.requests, made.judging, first.tuned, 0.1, first.contender)
    assert (first.judged, first.rate) == (again.curve, again.rate)
    assert first.tally is not None
    assert first.tally.sent == made.requests * len(made.judging)
    assert first.interval is not None
    assert (first.interval.mean, first.interval.seeds) == (pytest.approx(first.rate), 3)


def test_without_judging_the_rates_are_those_of_the_tuning():
    found = search(SCENE, 2, 3, ["aggregation"], replace(QUICK, judging=0), 1)
    assert all((f.judged, f.interval, f.rate) == (None, None, f.tuned) for f in found)
    assert [f.rate for f in found] == sorted((f.rate for f in found), reverse=True)


def test_a_goodput_above_the_bound_is_told_as_it_is():
    # 100 requests of 0.105 s take two instances 5.2 s: sent half as fast again, nobody waits 3 s.
    top = bound(TINY, LOAD, 0.05, 2)
    scene = replace(SCENE, slo=SLO(3.0, 0.05))
    assert goodput(scene, 100, [1], top).rate > top
    effort = replace(QUICK, least=100)
    assert all(f.share > 1 for f in search(scene, 2, 3, ["aggregation"], effort, 1))


def test_a_run_of_so_few_requests_that_all_are_good_at_once_has_an_end_too():
    for guess in (10.0, 70.0, 5000.0):
        found = goodput(replace(SCENE, slo=SLO(60.0, 10.0)), 20, [1], guess, most=80.0)
        assert found.rate == found.curve.rates[-1] == 80.0


def test_where_nothing_can_be_held_the_goodput_is_nothing():
    found = goodput(replace(SCENE, slo=SLO(0.01, 0.05)), 50, [1], 10.0)
    assert (found.rate, found.tally) == (0.0, None)


def test_two_processes_find_the_same_table_as_one():
    effort = Effort(seconds=5, least=60, most=60, tolerance=0.2, judging=120)
    one, two = (search(SCENE, 2, 3, ["disaggregation"], effort, n) for n in (1, 2))
    assert one == two
    assert one


@pytest.mark.parametrize("tpot", [0.0135, 0.05])
def test_a_tuned_hybrid_is_not_behind_a_tuned_baseline(tpot):
    # A decode alone takes 10.1 ms and a chunk of 32 adds 3.2: at 13.5 ms it is best to keep prompts away.
    scene = replace(SCENE, slo=SLO(1.0, tpot))
    effort = Effort(seconds=5, least=100, most=100, tuners=(1, 1), judging=0)
    first = best(search(scene, 3, 3, effort=effort, processes=1))
    assert first["hybrid"].rate >= max(first["aggregation"].rate, first["disaggregation"].rate)


def test_where_an_end_of_the_sliders_is_the_best_hybrid_the_table_says_so():
    aggregation, disaggregation = (FAMILIES[name](2, 4096)[0] for name in ("aggregation", "disaggregation"))
    between = Contender("1P1D S_P 4096 S_D 64 margin 0.5", Sliders(1, 1, 4096, 64))
    found = [
        Found("aggregation", aggregation, 3.0, 0.3, None),
        Found("disaggregation", disaggregation, 5.0, 0.5, None),
        Found("hybrid", between, 4.0, 0.4, None),
    ]
    first = best(sorted(with_ends(found), key=lambda f: -f.rate))["hybrid"]
    assert (first.rate, first.end, first.label) == (5.0, "disaggregation", "hybrid = disaggregation: 1P1D")
    assert found[1].label == "disaggregation: 1P1D"
    assert found[2].label == "hybrid: 1P1D S_P 4096 S_D 64 margin 0.5"


def test_a_hybrid_that_leads_needs_no_end_of_the_sliders():
    between = Contender("1P1D S_P 4096 S_D 64 margin 0.5", Sliders(1, 1, 4096, 64))
    found = [Found("aggregation", AGGREGATION, 3.0, 0.3, None), Found("hybrid", between, 3.0, 0.3, None)]
    assert with_ends(found) == found


def falls(*goodputs):
    """Shares that fall by 10 points for each request/s, through 90 % at the goodput of each seed."""
    rates = (1.0, 2.0, 3.0, 4.0, 5.0)
    return Curve(rates, tuple(tuple(0.9 - 0.1 * (rate - at) for at in goodputs) for rate in rates))


def test_rates_that_were_judged_stand_before_those_that_were_only_tuned():
    tuned = Found("aggregation", AGGREGATION, 9.0, 0.9, None, tuned=9.0)
    low = Found("disaggregation", AGGREGATION, 2.0, 0.2, None, falls(2.0, 2.0), 2.5)
    high = Found("hybrid", AGGREGATION, 3.0, 0.3, None, falls(2.5, 3.5), 2.5)
    assert ranked([tuned, low, high]) == [high, low, tuned]


def test_a_row_has_its_interval_and_its_distance_from_the_first():
    first = Found("hybrid", AGGREGATION, 3.0, 0.3, None, falls(3.0, 3.0), 3.1)
    other = Found("aggregation", AGGREGATION, 2.7, 0.27, None, falls(2.4, 3.0), 3.0)
    row = found_row(other, first)
    # Two seeds, half a difference of 0.6 off their mean: 12.706 times 0.3; of the first that is a tenth.
    assert row["interval"] == pytest.approx([2.7 - 12.706 * 0.3, 2.7 + 12.706 * 0.3])
    assert row["against_first"] == pytest.approx([-0.1, -0.1 - 12.706 * 0.1, -0.1 + 12.706 * 0.1])
    assert row["tuned"] == 3.0
    assert row["judged"]["rates"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert found_row(first, first)["against_first"] is None


def test_a_promise_says_on_how_many_seeds_it_stands_and_what_was_cut():
    whole = promise(planned(2.0, 1.0, Effort(), 0))
    assert "90 % good of the requests of 25 seeds, 800 each; tuned on 3 other seeds; standard error" in whole
    assert "CUT" not in whole
    cut = promise(planned(20.0, 1.0, Effort(most=4000), 0))
    assert "judged with 1.8%. CUT SHORT" in cut
    assert "not judged" in promise(planned(2.0, 1.0, Effort(judging=0), 0))


SLIDERS = ["p_heavy", "d_heavy", "p_chunk", "d_chunk"]
POLICY = ["ttft_margin", "tpot_margin", "watermark", "alpha", "overload"]


def test_the_config_has_the_keys_that_serve_takes():
    keys = ["model", "max_num_seqs", *SLIDERS, "ttft_slo", "tpot_slo", *POLICY]
    assert list(config(SCENE, AGGREGATION)) == keys


def test_what_is_searched_under_overload_does_the_same_when_it_is_served():
    first = search(SCENE, 2, 3, ["hybrid"], replace(QUICK, judging=0), 1, overload=DEMOTE)[0]
    assert first.contender.policy.overload == DEMOTE
    assert config(SCENE, first.contender)["overload"] == DEMOTE
    assert config(SCENE, AGGREGATION)["overload"] == SERVE  # else a server with an SLO demotes


def test_a_config_says_what_was_done_about_prefixes_where_the_workload_has_some():
    talks = replace(SCENE, workload=workload("conversations", 8192), prefixes="fetch")
    assert config(talks, AGGREGATION)["prefixes"] == "fetch"
    assert "prefixes" not in config(replace(SCENE, prefixes="fetch"), AGGREGATION)


def test_a_config_holds_what_its_profile_was_for():
    tp4 = replace(SCENE, machine=machine("llama-2-70b-tp4-h100"), max_running=64, kv_capacity=100_000)
    found = config(tp4, AGGREGATION)
    assert (found["tensor_parallel_size"], found["max_num_seqs"]) == (4, 64)
    assert found["kv_cache_memory_bytes"] == 100_000 * 327680 // 4
    assert "profile" not in found  # kernel tables are nothing that a server could start from
    assert config_text(tp4, AGGREGATION).startswith(
        "# aggregation 256, for even within 1 s and 50 ms a token\n"
        "# step times: llama-2-70b-tp4-h100, 4 x H100-SXM5-80GB\nmodel: meta-llama"
    )


def test_a_config_from_a_measured_profile_names_it_and_has_its_settings():
    name = "qwen2.5-7b-quarter-h200-measured"
    scene = replace(SCENE, machine=machine(name), max_running=machine(name).max_running)
    found = config(scene, AGGREGATION)
    assert {key: found[key] for key in found if key not in (*SLIDERS, *POLICY, "ttft_slo", "tpot_slo")} == {
        "model": "Qwen2.5-7B",
        "profile": name,
        "tensor_parallel_size": 1,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 16384,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "block_size": 16,
    }
    larger = Contender("1P1D", Sliders(1, 1, 16384, 0))
    assert config(scene, larger)["max_num_batched_tokens"] == 16384
    assert ", mps_share 25\n" in config_text(scene, AGGREGATION)


def test_shipped_machines_never_read_memory_faster_than_the_device_does():
    bandwidth = {"A100-SXM4-80GB": 2.039e12, "H100-SXM5-80GB": 3.35e12, "H200-SXM-141GB": 4.8e12}
    for name in (
        "llama-2-70b-tp4-a100",
        "qwen2.5-14b-tp1-a100",
        "qwen2.5-32b-tp2-a100",
        "qwen2.5-14b-tp1-h200",
    ):
        found = machine(name)
        count, _, device = found.device.partition(" x ")
        rate = found.kv_bytes_per_token / int(count) / bandwidth[device]
        assert isinstance(found.truth, StepCurve)
        assert found.truth.per_kv_token >= rate


@pytest.mark.parametrize(
    ("work", "ms"),
    [
        ((1024, 1024 * 1025 / 2, 0, 0), 228),
        ((4096, 4096 * 4097 / 2, 0, 0), 829),
        ((0, 0, 32, 32 * 2600), 39),
        ((0, 0, 128, 128 * 2600), 64),
        ((512, 512 * 1300, 32, 32 * 2600), 135),
    ],
)
def test_llama_on_a100_is_within_a_tenth_of_a_composition_made_apart_from_ours(work, ms):
    assert machine("llama-2-70b-tp4-a100").truth.of(*work) * 1e3 == pytest.approx(ms, rel=0.1)


@pytest.mark.parametrize(
    ("work", "ms"),
    [
        ((0, 0, 1, 1000), 19.8),
        ((0, 0, 32, 32_000), 24.9),
        ((0, 0, 64, 64_000), 28.6),
        ((0, 0, 32, 240_000), 56),
        ((1024, 1024 * 1025 / 2, 0, 0), 110),
        ((8192, 8192 * 8193 / 2, 0, 0), 948),
        ((1024, 1024 * 3750, 32, 240_000), 169),
    ],
)
def test_qwen_on_a100_is_within_a_tenth_of_a_composition_made_apart_from_ours(work, ms):
    assert machine("qwen2.5-14b-tp1-a100").truth.of(*work) * 1e3 == pytest.approx(ms, rel=0.1)


@pytest.mark.parametrize(
    ("profile", "work", "ms"),
    [
        ("qwen2.5-32b-tp2-a100", (0, 0, 1, 1000), 24.1),
        ("qwen2.5-32b-tp2-a100", (0, 0, 64, 64_000), 32.2),
        ("qwen2.5-32b-tp2-a100", (1024, 1024 * 1025 / 2, 0, 0), 141),
        ("qwen2.5-32b-tp2-a100", (8192, 8192 * 8193 / 2, 0, 0), 1104),
        ("qwen2.5-14b-tp1-h200", (0, 0, 1, 1000), 7.9),
        ("qwen2.5-14b-tp1-h200", (0, 0, 64, 64_000), 11.9),
        ("qwen2.5-14b-tp1-h200", (256, 256 * 257 / 2, 32, 32_000), 14.7),
        ("qwen2.5-14b-tp1-h200", (2048, 2048 * 2049 / 2, 32, 32_000), 79),
    ],
)
def test_the_larger_model_and_the_newer_device_are_within_a_tenth_too(profile, work, ms):
    assert machine(profile).truth.of(*work) * 1e3 == pytest.approx(ms, rel=0.1)


def test_an_unknown_profile_and_a_wrong_config_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"profile 'nothing' is no file, and none of .*qwen2.5-14b-tp1-a100"):
        machine("nothing")
    path = tmp_path / "config.json"
    path.write_text('{"num_attention_heads": 8, "hidden_size": "x"}')
    with pytest.raises(ValueError, match=r"config.json: hidden_size: expected a whole number"):
        machine(str(path))
