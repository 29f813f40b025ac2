"""How a server starts whose command line has no slider: from numbers made by hand, nothing is looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from taichi_serve.latency.known import Known
from taichi_serve.latency.model import Roofline
from taichi_serve.sliders import OFF, ON, SUGGEST, Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.fluid import Fluid
from taichi_serve.tuning.setting import largest
from taichi_serve.tuning.start import Devices, Given, Host, Model, Start, choose, raised, suiting

# Bytes an instance may use of a card: 92 % of what the driver says.
A100, L4 = Devices("A100", 8, 79.0e9, 85e9), Devices("L4", 1, 22.2e9, 24e9)
CPU = Host("CPU", cores=2, nodes=1, memory=16e9, kv=1 << 30)
M7 = Model(weights=15.2e9, kv_bytes=57344, limit=32768, heads=28, kv_heads=4)
M14 = Model(weights=29.5e9, kv_bytes=196608, limit=32768, heads=40, kv_heads=8)
M32 = Model(weights=65.5e9, kv_bytes=262144, limit=32768, heads=40, kv_heads=8)
M70 = Model(weights=141e9, kv_bytes=327680, limit=8192, heads=64, kv_heads=8)
TINY = Model(weights=15e6, kv_bytes=2048, limit=8192, heads=8, kv_heads=2)
# A step takes 10 ms, and 0.1 ms for each token: 13.2 ms with 32 decodes, 419.6 ms with 4,096 prompt tokens.
LINE = Roofline(launch=0.010, token=0.0001)
LINED = Known("a line", LINE, LINE)


def none(degree: int) -> Known | None:
    return None


def line(degree: int) -> Known | None:
    return LINED


def start(
    model: Model = M14,
    machine: Devices | Host = A100,
    known: Callable[[int], Known | None] = none,
    **given: int | float | str,
) -> Start:
    return choose(Given(**given), model, machine, known)


def cards(count: int, card: Devices = A100) -> Devices:
    return replace(card, count=count)


# ------------------------------------------------------------------------------- tensor parallel size


def test_a_model_that_fits_one_device_takes_one() -> None:
    # 29.5 GB, KV of two requests of 32,768 tokens 12.9 GB, work space 2.5 GB: 44.9 of 79 GB.
    assert start(M14).tensor_parallel == 1


def test_a_model_with_weights_that_fit_but_no_room_for_kv_takes_two() -> None:
    # 65.5 + 17.2 + 2.5 GB are more than 79; half of it is 43.8.
    assert start(M32).tensor_parallel == 2


def test_a_model_that_would_have_little_kv_on_two_takes_four() -> None:
    # 70.5 + 2.5 GB of 79 leave 6: two long requests (2.7 GB), but less than 15 %.
    assert start(M70).tensor_parallel == 4


def test_a_7b_model_fits_a_card_of_24_gb() -> None:
    assert start(M7, L4).tensor_parallel == 1


def test_a_long_context_needs_room_for_two_requests() -> None:
    # 128 K tokens of 57 KB twice are 15 GB: 32.7 of 22.2 GB, but 17.6 on each of two cards.
    long = replace(M7, limit=131072)
    assert start(long, cards(2, L4)).tensor_parallel == 2


def test_kv_heads_are_on_several_ranks_where_there_are_more_ranks_and_save_nothing_there() -> None:
    few = replace(M7, limit=131072, kv_heads=1)  # 15.2 / 4 + 15 + 2.5 of 22.2 GB on four, 7.6 + 17.5 on two
    assert start(few, cards(4, L4)).tensor_parallel == 4


def test_heads_that_four_does_not_divide_go_on_two_or_not_at_all() -> None:
    odd = replace(M70, heads=62, kv_heads=2)
    chosen = start(odd)
    assert chosen.tensor_parallel == 2
    assert "141 GB of weights do not seem to fit" in chosen.said[0]


def test_a_model_that_fits_nowhere_takes_all_devices_and_says_so() -> None:
    chosen = start(M70, cards(1))
    assert (chosen.tensor_parallel, chosen.sliders.instances) == (1, 1)
    assert "do not seem to fit" in chosen.said[0]


def test_a_size_that_is_given_is_taken_whatever_fits() -> None:
    chosen = start(M14, tensor_parallel=4)
    assert (chosen.tensor_parallel, chosen.sliders.instances) == (4, 2)
    assert "tensor parallel 4 (given)" in chosen.said[0]


def test_weights_of_unknown_size_are_taken_to_fit_one() -> None:
    chosen = start(replace(M14, weights=None))
    assert chosen.tensor_parallel == 1
    assert "weights of unknown size" in chosen.said[0]


def test_a_number_of_instances_leaves_each_its_share_of_the_devices() -> None:
    # Eight cards for four instances: two each, and 141 GB do not fit on two.
    chosen = start(M70, instances=4)
    assert (chosen.tensor_parallel, chosen.sliders.instances) == (2, 4)
    assert "do not seem to fit" in chosen.said[0]


def test_a_model_without_attention_has_no_kv() -> None:
    assert start(Model(2e9, kv_bytes=0, limit=1 << 20, heads=0, kv_heads=0)).tensor_parallel == 1


# ------------------------------------------------------------------------------------------ instances


@pytest.mark.parametrize(
    ("count", "model", "p_heavy", "d_heavy"),
    [
        (1, M14, 0, 1),
        (2, M14, 0, 2),
        (3, M14, 0, 3),
        (4, M14, 1, 3),
        (5, M14, 1, 4),
        (8, M14, 2, 6),
        (2, M32, 0, 1),
        (8, M32, 1, 3),
        (8, M70, 0, 2),
    ],
)
def test_every_device_is_taken_and_every_fourth_instance_is_p_heavy(
    count: int, model: Model, p_heavy: int, d_heavy: int
) -> None:
    sliders = start(model, cards(count)).sliders
    assert (sliders.p_heavy, sliders.d_heavy) == (p_heavy, d_heavy)


def test_devices_that_are_left_over_are_said() -> None:
    chosen = start(M32, cards(3))
    assert chosen.sliders.instances == 1
    assert chosen.said[0].startswith("no slider given: 3 x A100, 1 idle: 1 D-heavy (all devices), ")


def test_a_data_parallel_size_is_the_number_of_instances() -> None:
    chosen = start(M14, instances=2)
    assert chosen.sliders.instances == 2
    assert "8 x A100, 6 idle: 2 D-heavy (given), tensor parallel 1" in chosen.said[0]


def test_more_instances_than_devices_are_left_to_whoever_gives_out_devices() -> None:
    assert start(M14, cards(2), instances=4).sliders.instances == 4


def test_without_a_device_there_is_one_instance_that_will_say_so() -> None:
    assert start(M14, Devices("GPU", 0, 0.0, 0.0)).sliders.instances == 1


def test_two_cores_are_two_instances() -> None:
    chosen = start(TINY, CPU)
    assert (chosen.tensor_parallel, chosen.sliders.instances) == (1, 2)
    assert chosen.said[0].startswith("no slider given: 2 cores of CPU: 2 D-heavy (a core each)")


def test_one_core_is_one_instance() -> None:
    assert start(TINY, replace(CPU, cores=1)).sliders.instances == 1


def test_every_numa_node_is_an_instance() -> None:
    sliders = start(TINY, replace(CPU, cores=64, nodes=4, memory=256e9)).sliders
    assert (sliders.p_heavy, sliders.d_heavy) == (1, 3)


def test_memory_limits_the_instances_of_a_host() -> None:
    # 15.2 GB of weights, 1.07 of KV and 1.5 beside: 17.8 each.
    host = replace(CPU, cores=64, nodes=4, memory=40e9)
    chosen = start(M7, host)
    assert chosen.sliders.instances == 2
    assert "memory has room for 2 of 17.8 GB" in chosen.said[0]
    assert start(M7, replace(host, memory=10e9)).sliders.instances == 1


def test_ranks_share_the_cores_of_a_host() -> None:
    assert start(TINY, CPU, tensor_parallel=2).sliders.instances == 1


def test_a_number_that_is_given_is_taken_on_a_host_too() -> None:
    assert start(TINY, CPU, instances=3).sliders.instances == 3


def test_room_for_kv_is_that_of_as_many_ranks_as_there_are_kv_heads() -> None:
    # Of 79 GB a device, (79 - 15.2 / 8 - 2.5) are for KV; four of eight ranks hold what the others do.
    assert M7.room(A100, 8) == pytest.approx(4 * 74.6e9 / 57344)
    assert M7.room(A100, 1) == pytest.approx(61.3e9 / 57344)


def test_room_for_kv_is_what_was_said_where_somebody_has() -> None:
    said = replace(A100, kv=5.7344e9)  # on each device
    assert M7.room(said, 1) == pytest.approx(100_000)
    assert M7.room(said, 2) == pytest.approx(200_000)
    assert replace(M7, weights=None).room(said, 1) == pytest.approx(100_000)


# --------------------------------------------------------------------------------------------- chunks


def test_sliders_are_those_that_carry_chats_and_summaries_best() -> None:
    # KV of (79 - 29.5 - 2.5) GB, 196,608 bytes a token; the default SLO is 3.5 s and 35 ms.
    fluid = Fluid(LINE, SLO(3.5, 0.035), 256, 47.0e9 / 196608)
    assert start(known=line).sliders == fluid.suited(8, 8192)
    strict = replace(fluid, slo=SLO(3.5, 0.020), seqs=64)
    assert start(known=line, tpot=0.020, seqs=64).sliders == strict.suited(8, 8192)


def test_where_no_step_is_short_enough_chunks_are_the_smallest() -> None:
    assert start(known=line, tpot=0.010).sliders == Sliders(2, 6, 8192, 16)


def test_a_ttft_that_one_instance_cannot_keep_for_summaries_makes_no_chunks_small() -> None:
    # 3,658 tokens alone take 0.38 s; with chunks of 16 tokens they would take 2.7.
    assert (
        start(machine=cards(1), known=line, ttft=0.3).sliders
        == start(machine=cards(1), known=line, ttft=9.0).sliders
    )
    assert start(machine=cards(1), known=line, ttft=0.3).sliders.d_chunk > 100


def test_where_nobody_knows_what_a_step_takes_the_chunk_is_256() -> None:
    assert start().sliders.d_chunk == 256


def test_large_devices_take_large_steps_and_others_modest_ones() -> None:
    assert (start().sliders.p_chunk, start().budget) == (8192, 8192 + 256)
    small = start(M7, cards(4, L4))
    assert (small.sliders.p_chunk, small.budget) == (2048, 2048 + 256)
    half = start(machine=Devices("A100", 8, 42e9, 85e9))  # of each, beside another server
    assert (half.sliders.p_chunk, half.budget) == (8192, 8192 + 256)
    assert (start(TINY, CPU).sliders.p_chunk, start(TINY, CPU).budget) == (2048, 2304)


def test_decodes_that_are_given_have_their_place_beside_the_chunk() -> None:
    assert start(seqs=1024).budget == 8192 + 1024


def test_a_budget_that_is_given_bounds_every_chunk() -> None:
    chosen = start(known=line, budget=128)
    assert (chosen.sliders, chosen.budget) == (Sliders(0, 8, 128, 128), 128)
    assert "steps of at most 128 tokens (given), S_D 128" in chosen.said[1]


def test_a_large_budget_makes_no_step_longer_than_tpot_allows() -> None:
    chosen = start(machine=cards(2), known=line, budget=8192)
    assert (chosen.sliders, chosen.budget) == (Sliders(1, 1, 8192, 160), 8192)


def test_few_instances_of_unknown_speed_take_the_budget_that_is_given_as_vllm_does() -> None:
    chosen = start(TINY, CPU, budget=1024, seqs=8, instances=2)
    assert (chosen.sliders, chosen.budget) == (Sliders(0, 2, 1024, 1024), 1024)
    assert "steps of at most 1024 tokens, S_D 1024 (given)" in chosen.said[1]


def test_many_instances_of_unknown_speed_give_it_to_the_p_heavy_ones() -> None:
    assert start(budget=1024).sliders == Sliders(2, 6, 1024, 256)


def test_the_first_that_becomes_p_heavy_has_a_large_chunk() -> None:
    assert start(machine=cards(2)).sliders == Sliders(0, 2, 8192, 256)


def test_what_is_known_is_asked_for_the_size_that_was_chosen() -> None:
    asked = []

    def known(degree: int) -> Known | None:
        asked.append(degree)
        return LINED

    assert start(M32, known=known).known is LINED
    assert asked == [2]


# ----------------------------------------------------------------------------------------------- SLOs


def test_slos_suit_what_a_long_prompt_and_a_step_take() -> None:
    assert suiting(0.4196, 0.0132) == SLO(3.5, 0.035)  # 3.36 s and 33 ms, rounded up
    assert start(known=line).slo == SLO(3.5, 0.035)


def test_slos_of_14b_on_an_a100_are_about_those_of_the_paper() -> None:
    assert suiting(0.47, 0.0258) == SLO(4.0, 0.065)


def test_a_whole_multiple_is_not_rounded_up() -> None:
    assert suiting(0.5, 0.028) == SLO(4.0, 0.07)


def test_a_short_model_is_judged_by_its_own_longest_prompt() -> None:
    # 1,024 tokens take 112.4 ms: 0.9 s.
    assert start(replace(M14, limit=1024), known=line).slo.ttft == 1.0


def test_where_nobody_knows_the_slos_are_those_of_other_command_lines() -> None:
    assert start().slo == SLO(4.0, 0.07)


@pytest.mark.parametrize("known", [none, line])
def test_slos_that_are_given_are_kept(known: Callable[[int], Known | None]) -> None:
    chosen = start(known=known, ttft=9.0, tpot=0.5)
    assert chosen.slo == SLO(9.0, 0.5)
    assert chosen.unsure == frozenset()
    assert "TTFT SLO 9 s, TPOT SLO 500 ms (given)" in chosen.said[1]


def test_one_slo_that_is_given_leaves_the_other_as_it_suits() -> None:
    chosen = start(known=line, ttft=9.0)
    assert chosen.slo == SLO(9.0, 0.035)
    assert "TTFT SLO 9 s (given), TPOT SLO 35 ms (a line)" in chosen.said[1]


def test_slos_that_nobody_knew_are_raised_to_what_was_seen_and_never_lowered() -> None:
    guess = start()
    assert guess.unsure == {"ttft", "tpot"}
    assert raised(guess, prompt=2.0, step=0.2) == SLO(16.0, 0.5)
    assert raised(guess, prompt=0.01, step=0.2) == SLO(4.0, 0.5)
    assert raised(guess, prompt=0.01, step=0.001) == SLO(4.0, 0.07)


def test_slos_that_somebody_gave_or_knew_are_not_raised() -> None:
    assert raised(start(known=line), prompt=9.0, step=9.0) == SLO(3.5, 0.035)
    assert raised(start(tpot=0.05), prompt=2.0, step=9.0) == SLO(16.0, 0.05)


# ------------------------------------------------------------------------------ self-tuning, and words


def test_a_server_without_sliders_tunes_itself_unless_it_is_told_otherwise() -> None:
    assert start().autotune == ON
    assert [start(autotune=mode).autotune for mode in (OFF, SUGGEST, ON)] == [OFF, SUGGEST, ON]


def test_the_choice_is_said_in_two_lines_with_where_each_part_is_from() -> None:
    first, second = start(machine=cards(4), known=line).said
    assert first == (
        "no slider given: 4 x A100: 2 P-heavy, 2 D-heavy (all devices), "
        "tensor parallel 1 (the least for 29.5 GB of weights)"
    )
    assert second == (
        "S_P 8192, steps of at most 8448 tokens (default), "
        "S_D 160, TTFT SLO 3.5 s, TPOT SLO 35 ms (a line), --autotune on (default)"
    )


def test_the_choice_is_flags_of_a_command_line() -> None:
    words = start(machine=cards(4), known=line).words()
    assert " ".join(words) == (
        "--tensor-parallel-size 1 --p-heavy 2 --d-heavy 2 --p-chunk 8192 --d-chunk 160 "
        "--max-num-batched-tokens 8448 --ttft-slo 3.5 --tpot-slo 0.035 --autotune on"
    )


def test_the_largest_chunk_is_found_in_units_of_a_block() -> None:
    assert largest(float, 100.0, 8192) == 96
    assert largest(float, 1e9, 100) == 96  # of at most 100 tokens
    assert largest(float, 15.0, 8192) == 0
