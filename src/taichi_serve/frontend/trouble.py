"""What went wrong beside serving: counted under a name, told once, and never a reason to stop serving."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any


def tell(text: str) -> None:
    """A line for whoever watches the server."""
    sys.stderr.write(f"taichi: {text}\n")
    sys.stderr.flush()


class Trouble:
    """Counts by what failed; the metric `taichi_trouble_total` shows them."""

    # What there is to fail: a counter that appears with its first value has no rate until the second.
    KINDS = ("event log", "record", "metrics", "statistics", "autotune", "page", "front end", "tracing")

    def __init__(self, say: Callable[[str], object] = tell) -> None:
        """`say` gets one line at the first failure of each kind."""
        self.counts: Counter[str] = Counter(dict.fromkeys(self.KINDS, 0))
        self._say = say

    def note(self, what: str, wrong: BaseException | str) -> None:
        """Something of this kind failed."""
        self.counts[what] += 1
        if self.counts[what] == 1:
            why = " ".join(str(wrong).split()) or type(wrong).__name__
            self._say(f"{what}: {why}; serving goes on, and taichi_trouble_total counts it from here on")

    def guarded(self, what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose failures are counted and go no further; it then gives None."""

        @functools.wraps(work)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return work(*args, **kwargs)
            except Exception as wrong:  # noqa: BLE001  # whatever it is: it is not essential
                self.note(what, wrong)
                return None

        return wrapped
