"""How the server came to its end: only an end that somebody asked for has exit code 0."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

STOP_SECONDS = 45.0  # from the last answer to the end of the process

FAILED = 3  # exit code of a server that had to end, and that nobody asked to


@dataclass(slots=True)
class Ending:
    """Why the server ends of itself; nothing while it need not."""

    why: str | None = None

    def fail(self, why: str) -> None:
        """It cannot go on. The first reason stands: others follow from it."""
        self.why = self.why or why

    def status(self, asked: bool) -> int:
        """The exit code; `asked` says whether a signal made it drain. Where one did, and it would have ended
        anyway, it failed."""
        if self.why is None and not asked:
            self.fail("nobody asked for it")
        return 0 if self.why is None else FAILED

    @property
    def words(self) -> str:
        """The last line of the server."""
        return "stopped" if self.why is None else f"stopped: {self.why}"


def no_longer_than(seconds: float, status: Callable[[], int]) -> None:
    """End this process by force where stopping takes longer, and write what every thread was at. The kernel
    ends the engines with it, and their janitors take away what they leave."""

    def by_force() -> None:
        sys.stderr.write(f"taichi: stopping took longer than {seconds:g} s: ended by force\n")
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(status())

    timer = threading.Timer(seconds, by_force)
    timer.daemon = True
    timer.start()
