"""How often an output enters each file on its way through the server: received, taken in, delivered."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("vllm")

from test_cluster import Two
from vllm.v1.engine import FinishReason

import taichi_serve.cluster.vllm.server
from taichi_serve.messages import Flow, Move, Prefill

SERVER = str(Path(taichi_serve.cluster.vllm.server.__file__).parent)


def watched(word: Callable[[], None], note: Callable[[FrameType, str, Any], None]) -> None:
    """Say the word, and tell of every call and return meanwhile."""
    sys.setprofile(note)
    try:
        word()
    finally:
        sys.setprofile(None)


def entered(word: Callable[[], None]) -> Counter[str]:
    """How often each file of the server's side is entered on the way: by a call from another one that goes on
    to a third. Who is only asked, and asks nobody, is beside the way."""
    found = Counter[str]()
    way: list[tuple[FrameType, str]] = []
    counted = set[FrameType]()

    def called(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "return" and way and way[-1][0] is frame:
            way.pop()
        if event != "call" or not path.startswith(SERVER):
            return
        if way and way[-1][1] != path:
            here = way[-1][1]
            *_, (entry, _path) = takewhile(lambda step: step[1] == here, reversed(way))
            if entry not in counted:
                counted.add(entry)
                found[Path(here).name] += 1
        way.append((frame, path))

    watched(word, called)
    return found


async def test_a_token_on_its_way_to_its_user_enters_each_file_at_most_twice(tmp_path: Path) -> None:
    two = Two(tmp_path)
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "return"):
            seen = frame if event == "call" else frame.f_back
            name = seen.f_code.co_filename if seen is not None else ""
            if "taichi_serve" in name and "/src/" in name and files[-1:] != [name]:
                files.append(name)

    watched(lambda: two.say(0, "a", 51), note)
    assert two.tokens == [50, 51]
    assert files
    assert max(Counter(files).values()) <= 2


async def test_an_output_enters_each_file_at_most_twice(tmp_path: Path) -> None:
    two = Two(tmp_path)
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", hand_over=False))
    words: list[tuple[str, Callable[[], None]]] = [
        ("the first token", lambda: two.say(0, "a", 50)),
        ("a token", lambda: two.say(0, "a", 51)),
    ]
    paths = {what: entered(word) for what, word in words}
    two.cluster.send(Flow("a", 0, "i1", Move.DEGRADE))
    paths["the token it leaves with"] = entered(lambda: two.leave(0, "a", 52))
    paths["the first one elsewhere"] = entered(lambda: two.say(1, "a#2", 53))
    paths["the last"] = entered(lambda: two.say(1, "a#2", 54, finish_reason=FinishReason.LENGTH))
    await two.quiet()
    assert two.tokens == [50, 51, 52, 53, 54]
    assert paths["a token"] == {"cluster.py": 1}
    assert {"cluster.py", "hands.py"} <= paths["the token it leaves with"].keys()
    assert {what: path for what, path in paths.items() if max(path.values()) > 2} == {}
