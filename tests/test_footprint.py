"""The verdict on growth, on numbers made by hand: ten counts, one after every thousand moves."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from pathlib import Path

import pytest
from footprint import Held, Sample, by_process, grown, of_process, rates, shared_memory

MIB = 1 << 20
ENGINE: Held = {
    "descriptors": 60, "sockets": 9, "threads": 12, "mappings": 900, "rss": 900 * MIB, "private": 500 * MIB,
}  # fmt: skip
ALL: Held = {"files": 8, "shared": 4, "kv_tokens": 0}


def run(**more: float) -> list[Sample]:
    """Ten samples in which one engine, or what is shared, gets so much more of each at every move."""

    def held(base: Held, moves: int) -> Held:
        return {what: number + int(more.get(what, 0.0) * moves) for what, number in base.items()}

    return [Sample(n, {"i0": held(ENGINE, n), "all": held(ALL, n)}) for n in range(1000, 11_000, 1000)]


def test_a_server_that_stays_as_it_is_has_not_grown() -> None:
    assert grown(run()) == []


def test_what_comes_and_goes_is_no_growth() -> None:
    samples = run()
    samples[4].held["i0"].update(descriptors=90, mappings=2000)
    samples[-1].held["i0"].update(descriptors=62, threads=14, mappings=916)
    assert grown(samples) == []


@pytest.mark.parametrize("what", ["descriptors", "sockets", "threads", "mappings"])
def test_one_left_behind_at_every_hundredth_move_is_growth(what: str) -> None:
    (line,) = grown(run(**{what: 0.01}))
    assert line.startswith(f"i0: {what} {ENGINE[what] + 10} -> {ENGINE[what] + 100}, ")


@pytest.mark.parametrize("what", ["files", "shared", "kv_tokens"])
def test_not_one_file_may_stay_and_no_kv(what: str) -> None:
    samples = run()
    samples[-1].held["all"][what] += 1
    assert grown(samples) == [f"all: {what} {ALL[what]} -> {ALL[what] + 1}, 0 more are allowed"]


@pytest.mark.parametrize("what", ["rss", "private"])
def test_memory_may_grow_by_a_kibibyte_a_move_and_not_by_two(what: str) -> None:
    assert grown(run(**{what: 1024})) == []
    assert grown(run(**{what: 2048})) == [f"i0: {what} grows steadily by 2048 bytes a move, 1024 are allowed"]


def test_one_leap_of_a_heap_is_no_growth_and_two_are() -> None:
    once, twice = run(), run()
    for number, (one, two) in enumerate(zip(once, twice, strict=True)):
        one.held["i0"]["rss"] += 32 * MIB * (number >= 5)
        two.held["i0"]["rss"] += 32 * MIB * (number >= 5) + 32 * MIB * (number >= 8)
    assert grown(once) == []
    assert grown(twice) == ["i0: rss grows by leaps, of 7457 bytes a move in all, 4096 are allowed"]


def test_what_every_move_leaves_is_found_though_the_heap_gave_back_more() -> None:
    samples = run(private=2000)
    for number, sample in enumerate(samples):
        sample.held["i0"]["private"] -= 100 * MIB * (number >= 3)
    assert grown(samples) == ["i0: private grows steadily by 2000 bytes a move, 1024 are allowed"]


def test_what_a_process_keeps_by_design_is_allowed_to_it_alone() -> None:
    samples = run(private=1800)
    assert grown(samples, {"i0": 800}) == []
    assert grown(samples, {"server": 800}) == [
        "i0: private grows steadily by 1800 bytes a move, 1024 are allowed"
    ]


def test_memory_of_a_gpu_is_judged_where_it_is_told() -> None:
    samples = run()
    for sample in samples:
        sample.held["i0"]["gpu"] = 4000 * MIB + 10_000 * sample.moves
    assert grown(samples) == ["i0: gpu grows steadily by 10000 bytes a move, 1024 are allowed"]


def test_a_process_that_came_or_went_is_named() -> None:
    samples = run()
    del samples[0].held["i0"]
    assert grown(samples) == ["process i0 has come"]
    assert grown(samples[::-1]) == ["process i0 is gone"]


def test_a_stretch_is_counted_by_its_own_moves() -> None:
    assert rates([(0, 0), (10, 500), (20, 520), (40, 570)]) == [50, 2, 2.5]


def test_a_process_with_memory_on_two_gpus_is_counted_once() -> None:
    assert by_process("12, 300\n12, 20\n77, [N/A]\n") == {12: 320 * MIB}


def test_shared_memory_is_ours_or_a_stray_and_not_counted_where_only_others_have_it() -> None:
    me = {os.getpid()}
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        ours, strays = shared_memory(me)
        assert (file.name in ours, file.name in strays) == (False, True)
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            ours, strays = shared_memory(me)
            assert (file.name in ours, file.name in strays) == (True, False)
            ours, strays = shared_memory(set())
            assert (file.name in ours, file.name in strays) == (False, False)


def test_of_this_process_one_more_socket_is_seen_as_descriptor_and_socket() -> None:
    before = of_process(os.getpid())
    with socket.socket():
        after = of_process(os.getpid())
    assert (after["descriptors"], after["sockets"]) == (before["descriptors"] + 1, before["sockets"] + 1)
    assert before["threads"] == len(list(Path("/proc/self/task").iterdir()))
    assert 0 < before["private"] <= before["rss"]
