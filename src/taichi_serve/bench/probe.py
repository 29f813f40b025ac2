"""How fast this machine is right now: a fixed piece of work on each core, timed.

A virtual machine's speed moves by half within minutes. Two measurements say something about their servers
only where the machine was as fast for the one as for the other, so it is probed before, between and after.

Run as a program it is the worker of one core: for each line on its standard input it does the work, and
prints pieces of work a second. It ends with its input: nothing is left of it when its owner ends, however.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MOST_CORES = 8  # of a large machine some, evenly spread
PIECES = 21  # of about 9 ms: the median is blind to those that were interrupted
ROUNDS, LOOPS, SIDE = 12, 40_000, 192


def drift(speeds: Iterable[float]) -> float:
    """How far the machine's speed moved: the highest over the lowest of these, less 1; 0.0 with none."""
    each = list(speeds)
    return max(each) / min(each) - 1 if each else 0.0


def work() -> None:
    """The fixed piece: what servers and clients do most, steps of an interpreter and of a linear algebra."""
    import numpy as np

    matrix = np.full((SIDE, SIDE), 1.0 / SIDE, dtype=np.float32)
    for _ in range(ROUNDS):
        total = 0
        for number in range(LOOPS // ROUNDS):
            total += number & 7
        for _ in range(3):
            matrix = matrix @ matrix


def timed(pieces: int = PIECES) -> float:
    """Pieces of work a second on the core that this process runs on: the median of some."""
    rates = []
    for _ in range(pieces):
        began = time.perf_counter()
        work()
        rates.append(1.0 / (time.perf_counter() - began))
    return statistics.median(rates)


def spread(cores: Sequence[int], most: int = MOST_CORES) -> list[int]:
    """All of them, or so many, evenly spread."""
    if len(cores) <= most:
        return list(cores)
    return [cores[place * len(cores) // most] for place in range(most)]


@dataclass(slots=True)
class Probe:
    """Workers on the cores of this process, asked all at once; between that they wait and cost nothing."""

    workers: list[subprocess.Popen[str]]

    @classmethod
    def start(cls) -> Probe:
        """One for each core, warm. Whoever starts it calls `end`, or uses it as a context."""
        probe = cls([_worker(core) for core in spread(sorted(os.sched_getaffinity(0)))])
        probe.speed()  # what is slow once: imports, memory, a core that slept
        return probe

    def speed(self) -> float:
        """Pieces of work a second, the mean over the cores, in 0.2 s. RuntimeError: a worker is gone."""
        try:
            for worker in self.workers:
                assert worker.stdin is not None
                print(file=worker.stdin, flush=True)
            said = [worker.stdout.readline() for worker in self.workers if worker.stdout]
        except BrokenPipeError:
            said = [""]
        if not all(said):
            raise RuntimeError("the probe of the machine's speed has ended")
        return statistics.fmean(map(float, said))

    def end(self) -> None:
        """Stop the workers."""
        for worker in self.workers:
            worker.kill()
            worker.communicate()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _worker(core: int) -> subprocess.Popen[str]:
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__)), str(core)],  # -P: modules beside this file stay out
        env={**os.environ, **one},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C in a terminal is its owner's business
    )


def main(core: int) -> None:
    """The worker of one core."""
    os.sched_setaffinity(0, {core})
    for _ in sys.stdin:
        sys.stdout.write(f"{timed()!r}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
