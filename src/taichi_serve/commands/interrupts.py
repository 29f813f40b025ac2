"""Ctrl-C, SIGTERM and SIGHUP at any moment: the work ends where it is, cleaning up is never cut short."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
T = TypeVar("T")


class Stopped(BaseException):
    """Somebody asked this process to end; carries the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """The first signal raises Stopped, or does so at the end of `hold`; later ones change nothing."""

    def __init__(self) -> None:
        self._got: int | None = None
        self._held = False
        self._install()

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        if self._got is None:
            self._got = number
            if not self._held:
                raise Stopped(number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """What must not be cut short: starting and stopping processes."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._got is not None:
            raise Stopped(self._got)

    async def watch(self, work: Coroutine[None, None, T]) -> T:
        """Await `work`; a signal cancels it, as asyncio wants it, and Stopped comes out."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def stop(number: int) -> None:
            if self._got is None:
                self._got = number
                task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            if self._got is None:
                raise
            raise Stopped(self._got) from None
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
            self._install()
