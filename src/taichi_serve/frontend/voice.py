"""What `taichi serve` says to whoever watches: lines that stay, and while it waits one that is rewritten."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

REWRITE = "\r\x1b[K"  # to the beginning of the line, and clear it
EARLY, MINUTE = (1.0, 10.0, 30.0), 60.0  # seconds of waiting after which a log has a line; then every minute


class Voice:
    """On a terminal the line of what is awaited is rewritten; in a log it comes a few times only."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Into `out`; without it into what standard error is by then."""
        self._given = out
        self._rewritten = False  # the line at the cursor is one that does not stay
        self._due = EARLY[0]

    @property
    def _out(self) -> TextIO:
        return self._given or sys.stderr

    def __call__(self, text: str) -> None:
        """A line that stays."""
        self._write(f"taichi: {text}\n")
        self._rewritten, self._due = False, EARLY[0]

    def waiting(self, text: str, seconds: float) -> None:
        """What is awaited, for so many seconds by now."""
        line = f"taichi: {text} ({seconds:.0f} s)"
        if self._out.isatty():
            # The cursor goes back, so that a line of somebody else begins where a line begins.
            self._write(f"{line[: shutil.get_terminal_size().columns - 1]}\r")
            self._rewritten = True
        elif seconds >= self._due:
            self._write(f"{line}\n")
            self._due = following(seconds)

    def _write(self, words: str) -> None:
        self._out.write(f"{REWRITE}{words}" if self._rewritten else words)
        self._out.flush()


def following(seconds: float) -> float:
    """After how many seconds of waiting the line after this one is due."""
    return next((at for at in EARLY if at > seconds), (seconds // MINUTE + 1) * MINUTE)
