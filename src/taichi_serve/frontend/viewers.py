"""Who looks at the page: each gets everything at first, and then at most ten updates a second.

While nobody looks there is nothing: no observer, no timer. All viewers share one feed, and an update is
encoded once. One that cannot keep up loses what it has not read, and gets everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from taichi_serve.dashboard.feed import Feed
from taichi_serve.frontend.record import Recorder

PAUSE = 1 / 10  # seconds between two updates
BEHIND = 20  # updates that may wait for a viewer: two seconds
HEARTBEAT = 5.0  # seconds after which a stream on which nothing happens says that it lives
MOST = 32  # viewers at once
ALIVE = b": nothing new\n\n"
OVER = b"event: over\ndata: {}\n\n"


class Viewer:
    """One stream. It begins behind: it knows nothing."""

    def __init__(self) -> None:
        self._updates: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.behind = True

    def give(self, update: bytes) -> None:
        """An update; where too many wait, they are dropped for a snapshot."""
        if len(self._updates) >= BEHIND:
            self._updates.clear()
            self.behind = True
        if not self.behind:
            self._updates.append(update)
        self.wake()

    def wake(self) -> None:
        """There is something to say."""
        self._news.set()

    def take(self) -> bytes:
        """All updates that wait."""
        taken = b"".join(self._updates)
        self._updates.clear()
        return taken

    async def wait(self) -> bool:
        """Until there is something to say; False where it took too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT):
                await self._news.wait()
        heard = self._news.is_set()
        self._news.clear()
        return heard


class Viewers:
    """All of them, and the feed while there is one."""

    def __init__(
        self, recorder: Recorder, feed: Callable[[], Feed], over: Callable[[], bool] = lambda: False
    ) -> None:
        """`feed` makes one; once the server is `over` all streams end."""
        self._recorder = recorder
        self._make = feed
        self._over = over
        self._viewers: set[Viewer] = set()
        self._feed: Feed | None = None
        self._observe: Callable[..., Any] | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._encoder = msgspec.json.Encoder()

    @property
    def count(self) -> int:
        """How many look."""
        return len(self._viewers)

    @property
    def full(self) -> bool:
        """Whether nobody else may look."""
        return self.count >= MOST

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one viewer, until it leaves or the server ends."""
        viewer = self._join()
        try:
            while not self._over():
                if viewer.behind:
                    viewer.take()
                    viewer.behind = False  # what comes while this is sent is news
                    yield self._snapshot()
                heard = await viewer.wait()
                if not viewer.behind and (said := viewer.take() if heard else ALIVE):
                    yield said
            yield OVER
        finally:
            self._leave(viewer)

    def _snapshot(self) -> bytes:
        assert self._feed is not None
        found = self._recorder.trouble.guarded("page", self._feed.snapshot)(time.monotonic())
        return self._encoded(found) if found is not None else ALIVE

    def _join(self) -> Viewer:
        if self._feed is None:
            self._feed = self._make()
            self._observe = self._recorder.trouble.guarded("page", self._feed.observe)
            self._recorder.observers.append(self._observe)
            self._ticking = asyncio.create_task(self._tick(self._feed), name="page")
        viewer = Viewer()
        self._viewers.add(viewer)
        return viewer

    def _leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        if self._viewers or self._feed is None:
            return
        assert self._observe is not None
        assert self._ticking is not None
        self._recorder.observers.remove(self._observe)
        self._ticking.cancel()
        self._feed = self._observe = self._ticking = None

    async def _tick(self, feed: Feed) -> None:
        update = self._recorder.trouble.guarded("page", feed.update)
        while not self._over():
            await asyncio.sleep(PAUSE)
            found = update(time.monotonic())
            if found is not None:
                encoded = self._encoded(found)
                for viewer in self._viewers:
                    viewer.give(encoded)
        for viewer in self._viewers:
            viewer.wake()

    def _encoded(self, update: Any) -> bytes:
        return b"data: " + self._encoder.encode(update) + b"\n\n"
