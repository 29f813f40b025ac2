"""Instances that another server started are taken as they are, or started anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from instances import Process, instance

from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.start import Launcher
from taichi_serve.sliders import Kind

KINDS = [(Kind.P_HEAVY, 1024), (Kind.D_HEAVY, 0)]


class Pretending(Launcher):
    """A launcher that finds some instances; those that were found never come up, or those that were not."""

    def begin(self, index: int, kind: Kind, turn: int = 1) -> Any:
        made = Process(self.directory, f"i{index}")
        made.found = index in self.there  # type: ignore[attr-defined]
        self.there.discard(index)  # type: ignore[attr-defined]
        self.begun.append(made)  # type: ignore[attr-defined]
        return made

    async def ready(self, process: Any, index: int, kind: Kind, chunk: int) -> Any:
        if process.found == self.found_fail:  # type: ignore[attr-defined]
            raise StartError(f"instance {process.name} cannot be had")
        engine = instance(self.directory, index)
        engine.process = process
        return engine


def launcher(directory: Path, there: set[int], found_fail: bool) -> Any:
    nothing: Any = None
    made = Pretending(nothing, [], nothing, directory, nothing, nothing, nothing, nothing, nothing)
    for name, value in (("there", there), ("found_fail", found_fail), ("begun", [])):
        object.__setattr__(made, name, value)
    return made


async def test_one_that_was_found_and_cannot_be_had_is_started_anew(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1}, found_fail=True)
    engines = await made.all(KINDS, lambda what, seconds: None)
    assert [one.name for one in made.begun] == ["i0", "i1", "i1"]
    assert engines[1].process is made.begun[2]
    assert not engines[1].process.found


async def test_where_another_instance_fails_all_are_ended_and_none_is_started_anew(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1}, found_fail=False)
    with pytest.raises(StartError, match="instance i0 cannot be had"):
        await made.all(KINDS, lambda what, seconds: None)
    assert [(one.name, one.ended, one.found) for one in made.begun] == [
        ("i0", True, False),
        ("i1", True, False),
    ]
