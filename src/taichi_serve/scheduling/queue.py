"""The prompts queued on one instance, in the order in which its engine computes them.

The order is that of `by` (seconds, the lowest first), and of arrival among equals. What has begun is
overtaken by nobody: an engine goes on with it before it takes another in.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from taichi_serve.instance import Instance
from taichi_serve.request import Request

Key = tuple[float, int, str]
BEGUN = float("-inf")


class Queue:
    """Ids of the prompts queued on an instance, the next one first."""

    def __init__(self) -> None:
        self._order: list[Key] = []
        self._keys: dict[str, Key] = {}
        self._count = 0
        self.ordered = False  # whether any came with a place of its own: else all are in order of arrival

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[str]:
        return iter([name for _, _, name in self._order])

    def first(self) -> str | None:
        """The one that is being computed, or is next."""
        return self._order[0][2] if self._order else None

    def add(self, name: str, by: float) -> None:
        """A prompt comes: behind those with the same `by`."""
        self._count += 1
        self.ordered = self.ordered or by != 0.0
        self._put(name, (by, self._count, name))

    def move(self, name: str, by: float) -> None:
        """It takes another place, unless it has begun."""
        before, count, _ = self._keys[name]
        if before != BEGUN:
            self.remove(name)
            self._put(name, (by, count, name))

    def remove(self, name: str) -> None:
        """It is queued here no more."""
        key = self._keys.pop(name)
        del self._order[bisect_left(self._order, key)]

    def begin(self, count: int) -> None:
        """The first so many have begun, in this order."""
        for place, (by, _, name) in enumerate(self._order[:count]):
            if by != BEGUN:
                self._count += 1
                self._order[place] = self._keys[name] = (BEGUN, self._count, name)

    def waiting(self) -> list[str]:
        """Those that have not begun, the next one first."""
        return [name for by, _, name in self._order if by != BEGUN]

    def latest(self) -> float:
        """The highest `by` of those that have not begun; minus infinity where there are none."""
        return self._order[-1][0] if self._order else BEGUN

    def ends_after(self, by: float) -> bool:
        """Whether a newcomer with this `by` is computed before somebody."""
        return bool(self._order) and self._order[-1][0] > by

    def behind(self, by: float) -> Iterator[str]:
        """Those before which a newcomer with this `by` is computed, the last first."""
        for before, _, name in reversed(self._order):
            if before <= by:
                return
            yield name

    def _put(self, name: str, key: Key) -> None:
        self._keys[name] = key
        insort(self._order, key)


def plan(queue: Queue, instance: Instance, requests: Mapping[str, Request]) -> None:
    """Who of an instance's queue is in the step that runs, or in the next one, has begun: an engine plans one
    step ahead."""
    if not queue.ordered:
        return
    ahead, planned, begun = -instance.progress_tokens, instance.running_tokens + instance.chunk, 0
    for name in queue:
        if ahead >= planned:
            break
        begun += 1
        request = requests[name]
        ahead += request.prompt_tokens - request.cached
    queue.begin(begun)
