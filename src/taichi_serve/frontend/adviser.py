"""The slow loop of a running server: rehearsals in a process of their own, at the lowest priority.

Each question gets a new process, which ends with its answer; the kernel ends it after LIMIT seconds of
processor time, and when the server dies. Run as a module this file is that process: a question as JSON in,
a proposal as JSON out.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys

import msgspec

from taichi_serve.frontend.trouble import Trouble
from taichi_serve.tuning.proposal import Proposal, Question, propose

LIMIT = 60  # seconds of processor time for one question
PR_SET_PDEATHSIG = 1


class Rehearsing:
    """An adviser (tuning/adviser.py) that has questions answered in a process beside the server."""

    def __init__(self, trouble: Trouble) -> None:
        """Where a process fails, `trouble` counts it, and there is no answer."""
        self.trouble = trouble
        self.took = 0.0
        self.seconds = 0.0  # of processor time that all answers took
        self._task: asyncio.Task[Proposal | None] | None = None

    def ask(self, now: float, question: Question) -> None:
        """Begin with the question; one that is under way is ended."""
        self.close()
        self._task = asyncio.create_task(self._answered(msgspec.json.encode(question)), name="rehearsing")

    def answer(self, now: float) -> Proposal | None:
        """What came of it, once."""
        if self._task is None or not self._task.done():
            return None
        task, self._task = self._task, None
        if task.cancelled():
            return None
        if (wrong := task.exception()) is not None:
            self.trouble.note("autotune", wrong)
            return None
        return task.result()

    def close(self) -> None:
        """End what is under way."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _answered(self, question: bytes) -> Proposal | None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __spec__.name,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            answer, _ = await process.communicate(question)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode:
            raise RuntimeError(f"rehearsals ended with status {process.returncode}")
        told = msgspec.json.decode(answer, type=Told)
        self.took = told.seconds
        self.seconds += told.seconds
        return told.proposal


class Told(msgspec.Struct, frozen=True):
    """An answer, and the processor time (seconds) that it took."""

    proposal: Proposal
    seconds: float


def main() -> None:
    """Answer the question on standard input."""
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server sees to it
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # the server died before the call
        return
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    proposal = propose(question)
    used = resource.getrusage(resource.RUSAGE_SELF)
    sys.stdout.buffer.write(msgspec.json.encode(Told(proposal, used.ru_utime + used.ru_stime)))


if __name__ == "__main__":
    main()
