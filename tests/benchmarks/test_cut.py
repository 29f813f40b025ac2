"""Recordings cut out of an event log with pauses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cut
import pytest

from taichi_serve.bench.recording import Recording
from taichi_serve.sliders import Sliders


def fact(kind: str, at: float, **about: Any) -> str:
    return json.dumps({"on": [kind, {"at": at, **about}], "do": []}) + "\n"


def arrived(at: float, request: str) -> str:
    return fact("Arrived", at, request=request, prompt_tokens=9, max_tokens=2, blocks=[1, 2])


def finished(at: float, request: str) -> str:
    return fact("Finished", at, request=request, output_tokens=2)


LOG = [
    fact("Stepped", 0.5, instance="i0", seconds=0.01, prefill_tokens=0, decodes=1, kv_tokens=9),
    arrived(1.0, "a"),
    fact("Cached", 1.1, instance="i0", stored=[7], dropped=[]),
    fact("Prefilled", 1.2, request="a", leg=0, instance="i0"),
    arrived(1.25, "b"),
    finished(1.3, "a"),
    fact("Cancelled", 1.4, request="b"),
    fact("Stepped", 1.5, instance="i0", seconds=0.01, prefill_tokens=0, decodes=1, kv_tokens=9),
    arrived(2.0, "c"),  # sooner than a pause after the one before: the same load
    finished(2.2, "c"),
    arrived(9.0, "d"),
    finished(9.1, "d"),
]


def test_a_load_ends_where_nobody_lives_for_a_second_and_has_no_prefixes() -> None:
    first, second = cut.loads(LOG)
    kinds = [one["on"][0] for one in first]
    assert kinds == ["Arrived", "Prefilled", "Arrived", "Finished", "Cancelled", "Arrived", "Finished"]
    assert [one["on"][1]["request"] for one in second] == ["d", "d"]
    assert "blocks" not in first[0]["on"][1]
    assert cut.told(1, first) == "1: 3 requests in 1.0 s, 3.00/s, 7 facts"


def test_what_is_cut_is_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "events.jsonl", tmp_path / "out.jsonl.gz"
    log.write_text("".join(LOG))
    words = ["cut.py", str(log), str(out), "--load", "2", "--sliders", "2,1,8192,80", "--kv-capacity", "500"]
    monkeypatch.setattr(sys, "argv", words)
    cut.main()
    found = Recording.load(out)
    assert found.sliders == Sliders(2, 1, 8192, 80)
    assert (found.shape.kv_capacity, len(found.entries)) == (500, 2)
    assert "2: 1 request in 0.0 s" in capsys.readouterr().out
