"""Lines that stay, and the one that is rewritten while a start is waited for."""

from __future__ import annotations

import io

from taichi_serve.frontend.voice import REWRITE, Voice, following


class Terminal(io.StringIO):
    """Somebody looks at it."""

    def isatty(self) -> bool:
        return True


def waited(out: io.StringIO, seconds: int) -> str:
    """What is written by somebody who waits so long, is told so once a second, and is then ready."""
    voice = Voice(out)
    for second in range(1, seconds + 1):
        voice.waiting("waiting for i0 to load the model", second + 0.02)
    voice("ready")
    return out.getvalue()


def test_on_a_terminal_one_line_is_rewritten_and_gone_in_the_end() -> None:
    written = waited(Terminal(), 112)
    assert written.count("\n") == 1
    assert written.count(REWRITE) == 112
    assert written.endswith(f"taichi: waiting for i0 to load the model (112 s)\r{REWRITE}taichi: ready\n")


def test_a_log_has_few_lines_however_long_it_takes() -> None:
    lines = waited(io.StringIO(), 200).splitlines()
    said = [line.removeprefix("taichi: waiting for i0 to load the model ") for line in lines[:-1]]
    assert said == ["(1 s)", "(10 s)", "(30 s)", "(60 s)", "(120 s)", "(180 s)"]
    assert lines[-1] == "taichi: ready"


def test_a_log_has_nothing_to_rewrite() -> None:
    written = waited(io.StringIO(), 20)
    assert "\r" not in written
    assert "\x1b" not in written


def test_whoever_waits_anew_is_told_anew() -> None:
    out = io.StringIO()
    voice = Voice(out)
    for second in (1.0, 2.0):
        voice.waiting("for one thing", second)
    voice("that is there")
    voice.waiting("for another", 1.0)
    assert out.getvalue() == "taichi: for one thing (1 s)\ntaichi: that is there\ntaichi: for another (1 s)\n"


def test_lines_of_a_long_wait_come_every_minute() -> None:
    assert [following(at) for at in (1.0, 12.0, 30.0, 61.0, 125.0)] == [10.0, 30.0, 60.0, 120.0, 180.0]
