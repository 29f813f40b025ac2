"""What vLLM has moved between two versions, each form by hand."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from taichi_serve.cluster.vllm import moved


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A name that is in `before.cli` or in `after.cli`, of which neither is there yet."""
    monkeypatch.setitem(moved.PLACES, "parser", ("before.cli", "after.cli"))
    for package in ("before", "after"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    made = {name: ModuleType(name) for name in ("before.cli", "after.cli")}
    for name in made:
        monkeypatch.setitem(sys.modules, name, None)  # as if there were none
    return made


@pytest.mark.parametrize("place", ["before.cli", "after.cli"])
def test_a_name_is_taken_from_where_it_is(
    place: str, places: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    places[place].parser = "found"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, place, places[place])
    assert moved.parser == "found"


def test_a_module_that_has_stayed_without_the_name_is_passed_over(
    places: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    places["after.cli"].parser = "found"  # type: ignore[attr-defined]
    for name, module in places.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert moved.parser == "found"


def test_a_name_that_has_moved_again_is_an_error_that_says_where_it_was_looked_for(
    places: dict[str, ModuleType],
) -> None:
    with pytest.raises(ImportError, match=r"vLLM has parser in none of before\.cli, after\.cli"):
        _ = moved.parser


def test_a_place_that_lacks_something_itself_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'orjson'", name="orjson")

    monkeypatch.setattr(moved, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="orjson"):
        _ = moved.make_arg_parser


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = moved.nothing


def test_rows_of_three_columns_stay_as_they_are() -> None:
    assert moved.block_rows([(1000, 64, 0), (2000, 64, 0)]).tolist() == [[1000, 64, 0], [2000, 64, 0]]


def test_rows_of_five_columns_become_one_for_each_block_region_after_region() -> None:
    """Two layers: three blocks of 64 bytes that abut, and two of 32 bytes at every 128."""
    rows = moved.block_rows(np.array([[1000, 64, 0, 64, 3], [9000, 32, 1, 128, 2]], dtype=np.uint64))
    assert rows.dtype == np.uint64
    assert rows.tolist() == [[1000, 64, 0], [1064, 64, 0], [1128, 64, 0], [9000, 32, 1], [9128, 32, 1]]


def test_addresses_beyond_63_bits_are_kept_exactly() -> None:
    top = 2**64 - 4096
    assert moved.block_rows([[top, 64, 0, 1024, 2]]).tolist() == [[top, 64, 0], [top + 1024, 64, 0]]


def test_a_list_without_blocks_has_no_rows() -> None:
    assert moved.block_rows(np.zeros((0, 5), dtype=np.uint64)).shape == (0, 3)


def test_a_switch_is_turned_off_by_no_or_by_what_it_calls_its_opposite() -> None:
    before = argparse.BooleanOptionalAction(["--enable-x"], "x")
    assert [moved.says_no(name, before) for name in before.option_strings] == [False, True]
    after = SimpleNamespace(
        option_strings=["--enable-x", "--disable-x"],
        negative_option_strings={"--disable-x", "--no-enable-x"},
    )
    assert [moved.says_no(name, after) for name in after.option_strings] == [False, True]  # type: ignore[arg-type]


def test_an_error_in_a_stream_is_a_line_or_an_object() -> None:
    assert moved.error_of('data: {"error": {"code": 500}}\n\n') == '{"error": {"code": 500}}\n\n'
    assert moved.error_of('data: {"choices": []}\n\n') is None
    error = SimpleNamespace(error=SimpleNamespace(code=500), model_dump_json=lambda: '{"error":{"code":500}}')
    assert moved.error_of(error) == '{"error":{"code":500}}'
    assert moved.error_of(SimpleNamespace(choices=[])) is None
