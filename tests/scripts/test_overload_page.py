"""The tables on overload, from runs whose figures are made by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("overload_page")


@pytest.fixture
def fates(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("overload_fates")


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("overload_runs")


def one_run(attainment: float, good: float, wait: float = 1.0, longest: float = 0.5, refused: float = 0.0):
    return {
        "attainment": attainment,
        "good": good,
        "wait": wait,
        "refused": refused,
        "best_effort": 0.0,
        "quartiles": [attainment, attainment, attainment, longest],
    }


def keep(folder: Path, load: float, *made, mode: str = "demote", cv: float = 1.0, family: str = "hybrid"):
    """A file as scripts/overload.py writes it, of as many seeds as there are runs."""
    kind = {"setting": "14b", "family": family, "cv": cv, "mode": mode, "load": load, "own": 5.936}
    seen = {"seeds": [*range(len(made))], "seconds": 300.0, "runs": made}
    folder.joinpath(f"14b.{family}.cv{cv:g}.{mode}.{load:g}.json").write_text(json.dumps(kind | seen))


def keep_all(folder: Path, **kind) -> None:
    keep(folder, 1.0, one_run(0.9, 9.0, longest=0.8), one_run(1.0, 11.0, longest=0.8), **kind)
    keep(folder, 1.25, *[one_run(0.8, 12.0, wait=2.0, longest=0.6)] * 2, **kind)
    keep(folder, 2.0, *[one_run(0.5, 9.0, wait=1.5, longest=0.3, refused=0.4)] * 2, **kind)


def test_a_row_has_means_over_seeds_with_their_interval(page, tmp_path):
    keep_all(tmp_path)
    (row,) = page.read(tmp_path)
    # Two seeds, .9 and 1: Student's 12.7 times .05.
    mode, *shares, least, wait, longest, refused = row.cells()
    assert (mode, shares) == ("`demote`", ["0.95 ± 0.64", "0.80 ± 0.00", "0.50 ± 0.00"])
    assert (least, wait, longest, refused) == ("75%", "2.0", "0.60", "40%")


def test_the_least_of_peak_looks_at_lower_loads_only(page, tmp_path):
    keep_all(tmp_path)
    keep(tmp_path, 0.9, one_run(0.9, 20.0), one_run(0.9, 20.0))
    (row,) = page.read(tmp_path)
    assert row.least == pytest.approx(9 / 20)  # but .9 itself is below the own goodput, and is no least


def test_what_has_not_run_at_every_load_that_is_shown_is_left_out(page, tmp_path):
    keep(tmp_path, 1.0, one_run(0.9, 9.0))
    tmp_path.joinpath("14b.hybrid.cv1.own.json").write_text("5.936")
    assert page.read(tmp_path) == []


def test_modes_of_one_way_of_serving_stand_together_serve_first_under_its_goodput(page, tmp_path):
    for mode in ("refuse", "demote", "serve"):
        keep_all(tmp_path, mode=mode)
    keep_all(tmp_path, mode="serve", cv=2.0)
    title, _, _, *lines, bursts, _, _, last = page.tables(page.read(tmp_path))
    assert (title, bursts) == ("\n## Poisson arrivals\n", "\n## Bursts: gamma arrivals, CV 2\n")
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 14b, hybrid", "5.94", "`serve`"],
        ["| ", "", "`demote`"],
        ["| ", "", "`refuse`"],
    ]
    assert last.startswith("| 14b, hybrid | 5.94 | `serve` |")


def test_the_page_says_how_many_seeds_there_were_and_has_its_picture(page, tmp_path):
    kept, docs = tmp_path / "kept", tmp_path / "docs"
    kept.mkdir()
    docs.joinpath("img").mkdir(parents=True)
    for mode in ("serve", "demote"):
        keep_all(kept, mode=mode)
    page.write(kept, docs)
    said = docs.joinpath("overload-tables.md").read_text()
    assert "means of 2 seeds with 95 % intervals,\n300 s of traffic a run" in said
    assert docs.joinpath(page.PICTURE).read_text().lstrip().startswith("<?xml")


def test_figures_are_of_all_that_were_sent_those_refused_too(fates, runs):
    from taichi_serve.slo import SLO

    fate = fates.Fate
    sent = [
        fate(0.0, 400, None, 2.0, 0.04),
        fate(1.0, 100, None, 5.0, 0.04),  # late
        fate(2.0, 300, None, None, None, refused=True),
        fate(4.0, 200, None, 1.0, 0.06),  # too slow
    ]
    found = runs.figures(sent, best_effort=1, slo=SLO(4.0, 0.05))
    assert (found.attainment, found.good, found.refused, found.best_effort) == (0.25, 0.25, 0.25, 0.25)
    assert (found.wait, found.quartiles) == (1.25, (0.0, 0.0, 0.0, 1.0))
