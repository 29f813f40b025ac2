"""Instances that another server started are taken as they are, or started anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from instances import Client, Process, instance

from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.cluster.vllm.server.start import Launcher
from taichi_serve.cluster.vllm.wire import Call
from taichi_serve.sliders import Kind

KINDS = [(Kind.P_HEAVY, 1024), (Kind.D_HEAVY, 0)]


class Asked(Client):
    """One that says whether it has stopped, or that it cannot say."""

    def __init__(self, stops: bool) -> None:
        super().__init__()
        self.stops = stops

    async def call_utility_async(self, method: str) -> Any:
        assert method == Call.STOPPED
        if not self.stops:
            raise Exception("Call to taichi_stopped method failed")  # as vLLM does
        return True


class Pretending(Launcher):
    """A launcher that finds some instances. Some of those do not come up, or do not stop; or some that it did
    not find do not come up."""

    there: set[int]
    fail: set[str]
    begun: list[Any]

    def begin(self, index: int, kind: Kind, turn: int = 1) -> Any:
        made = Process(self.directory, f"i{index}")
        made.found = index in self.there
        self.there.discard(index)
        self.begun.append(made)
        return made

    async def ready(self, process: Any, index: int, kind: Kind, chunk: int) -> Any:
        if ("found" if process.found else "new") in self.fail:
            raise StartError(f"instance {process.name} cannot be had")
        engine = instance(self.directory, index)
        engine.process, engine.kind, engine.chunk = process, kind, chunk
        client: Any = Asked("reads" not in self.fail)
        engine.client = client
        return engine


def launcher(directory: Path, there: set[int], *fail: str) -> Any:
    nothing: Any = None
    made = Pretending(nothing, [], nothing, directory, nothing, nothing, nothing, nothing, nothing)
    for name, value in (("there", there), ("fail", set(fail)), ("begun", [])):
        object.__setattr__(made, name, value)
    return made


def ignore(what: str, seconds: float) -> None:
    """Nobody waits."""


async def test_those_that_were_found_let_go_when_all_of_them_have_stopped(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1})
    engines = await made.all(KINDS, ignore)
    assert [one.name for one in made.begun] == ["i0", "i1"]
    assert [engine.client.told for engine in engines] == [[], [(Call.LET_GO,)]]


async def test_one_that_was_found_and_cannot_be_had_is_started_anew(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1}, "found")
    engines = await made.all(KINDS, ignore)
    assert [one.name for one in made.begun] == ["i0", "i1", "i1"]
    assert engines[1].process is made.begun[2]
    assert [engine.client.told for engine in engines] == [[], []]


async def test_one_that_still_reads_for_another_server_is_ended_and_started_anew(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1}, "reads")
    engines = await made.all(KINDS, ignore)
    assert [(one.name, one.ended) for one in made.begun] == [("i0", False), ("i1", True), ("i1", False)]
    assert engines[1].process is made.begun[2]
    assert (engines[1].kind, engines[1].chunk) == KINDS[1]


async def test_where_another_instance_fails_all_are_ended_and_none_is_started_anew(tmp_path: Path) -> None:
    made = launcher(tmp_path, {1}, "new")
    with pytest.raises(StartError, match="instance i0 cannot be had"):
        await made.all(KINDS, ignore)
    assert [(one.name, one.ended, one.found) for one in made.begun] == [
        ("i0", True, False),
        ("i1", True, False),
    ]
