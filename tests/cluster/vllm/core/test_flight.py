"""Who was being computed when an engine died."""

from __future__ import annotations

from pathlib import Path

from taichi_serve.cluster.vllm.core.flight import Flight
from taichi_serve.cluster.vllm.wire import FLIGHT_BYTES, flight_file, read_flight


def test_the_prompts_of_the_last_two_steps_are_told_newest_first(tmp_path: Path) -> None:
    path = flight_file(tmp_path, "d-i0")
    flight = Flight(path)
    assert read_flight(path) == []
    flight.planned(["a"])
    assert read_flight(path) == ["a"]
    flight.planned(["b#1", "a"])
    assert read_flight(path) == ["b#1", "a"]
    flight.planned([])
    assert read_flight(path) == ["b#1", "a"]
    flight.planned([])
    assert read_flight(path) == []


def test_what_does_not_fit_is_left_out_whole(tmp_path: Path) -> None:
    path = flight_file(tmp_path, "d-i0")
    Flight(path).planned(f"request-{i:05d}" for i in range(9000))
    found = read_flight(path)
    assert path.stat().st_size == FLIGHT_BYTES
    assert found == [f"request-{i:05d}" for i in range(len(found))]
    assert len(found) > 2000


def test_a_death_in_the_middle_of_writing_leaves_the_last_good_one(tmp_path: Path) -> None:
    path = flight_file(tmp_path, "d-i0")
    flight = Flight(path)
    flight.planned(["a"])
    half = 1 - flight._half
    start = 8 + half * ((FLIGHT_BYTES - 8) // 2)
    flight._memory[start : start + 8] = b"\xff" * 8
    assert read_flight(path) == ["a"]


def test_there_may_be_no_file(tmp_path: Path) -> None:
    assert read_flight(tmp_path / "none") == []
    (tmp_path / "short").write_bytes(b"x")
    assert read_flight(tmp_path / "short") == []
