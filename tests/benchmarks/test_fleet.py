"""The table of large fleets: the same decisions either way, and a run that is there is not made again."""

from __future__ import annotations

import json
from pathlib import Path

import fleet


def test_40_instances_decide_the_same_either_way_and_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "fleet.jsonl"
    command = ["--out", str(out), "--sizes", "40", "--each", "4", "--rate", "2.0"]
    assert fleet.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["asked"] for row in rows] == ["everybody", "a few"]
    assert rows[0]["decisions"] == rows[1]["decisions"]
    assert rows[0]["attainment"] == rows[1]["attainment"] > 0.0
    assert rows[0]["requests"] == 160
    assert fleet.main(command) == 0
    assert len(out.read_text().splitlines()) == 2
