"""When a seat becomes free: an instance runs so many requests at once, not more (vLLM's --max-num-seqs)."""

from __future__ import annotations

from math import ceil

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Average

KEEP = 0.99  # weight of the past at each decode that ends: about the last hundred count


class Seats:
    """How long decodes have a seat, as those that ended lately had theirs."""

    def __init__(self) -> None:
        self.stays = Average()

    def left(self, seconds: float) -> None:
        """A decode has ended, so long after it had taken its seat."""
        self.stays.add(seconds, 1.0, KEEP)

    def wait(self, instance: Instance) -> float:
        """Seconds until a newcomer has a seat there, behind all who are to have one before it. Decodes end as
        evenly as if they had begun evenly, and within one stay every seat becomes free once."""
        left = instance.seats_left
        if left > 0 or not instance.decodes:
            return 0.0
        stays = min((1 - left) / instance.decodes, ceil((1 - left) / instance.seats))
        return stays * self.stays.value(0.0)
