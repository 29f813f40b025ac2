"""Python runs this at its start where its folder is in PYTHONPATH (test_supervision.py): an engine core dies
as soon as it is about to compute the prompt of a request that its client called poison."""

import os
import signal
from collections.abc import Iterable

from taichi_serve.cluster.vllm.core.flight import Flight

planned = Flight.planned


def fatal(self: Flight, legs: Iterable[str]) -> None:
    legs = list(legs)
    planned(self, legs)
    if any("poison" in leg for leg in legs):
        os.kill(os.getpid(), signal.SIGKILL)


Flight.planned = fatal  # type: ignore[method-assign]
