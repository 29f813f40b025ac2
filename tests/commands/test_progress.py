"""A bar that looks for itself, and a line with what is done."""

from __future__ import annotations

import io

from rich.console import Console

from taichi_serve.commands.progress import Following, working


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


def test_a_bar_shows_how_far_the_work_is_when_it_is_drawn() -> None:
    console, done = terminal(), [3]
    with Following(console, "requests simulated", 40, lambda: done[-1]) as bar:
        bar.refresh()
        done.append(17)
        bar.refresh()
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "requests simulated" in written
    assert " 3/40" in written
    assert "17/40" in written


def test_a_line_says_what_is_done_now() -> None:
    console = terminal()
    with working(console, "searching") as tell:
        tell("hybrid: [12] contenders")
    assert "hybrid: [12] contenders" in console.file.getvalue()  # type: ignore[attr-defined]


def test_where_nobody_looks_nothing_is_written() -> None:
    out = io.StringIO()
    with working(Console(file=out), "searching") as tell:
        tell("aggregation")
    assert out.getvalue() == ""
