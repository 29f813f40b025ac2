"""KV that is copied while steps run: one thread in every worker, and the words it is spoken to in.

A step never waits for it, and it never waits for a step. The server tells it which blocks of the source are
final (More), the worker's own scheduler which blocks were given to the request here (Given); it copies what
is missing, as soon as both are known, and says so. The last More of a leg brings the tail: it goes before
everything that is only copied ahead. What is under way when a leg is dropped is seen to its end, because its
target blocks may only be given away after that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from taichi_serve.cluster.vllm.wire import (
    Copied,
    Drop,
    Dropped,
    Failed,
    Given,
    Gone,
    More,
    Order,
    Return,
    Word,
    copier_endpoint,
)

log = logging.getLogger("vllm.taichi.copier")

PIECE = 96  # blocks that are copied ahead in one go: a tail behind it waits for no more than these
POLL_SECONDS = 50e-6  # between two looks at a copy under way
REMEMBER = 4096  # legs that were dropped before their blocks were known here


@dataclass(frozen=True, slots=True)
class Late:
    """A step waited for the leg in vain: it is computed again."""

    leg: str


class Reader(Protocol):
    """Reads blocks of a peer into blocks here."""

    def read(self, source: str, remote: list[int], local: list[int], note: str) -> Callable[[], bool]:
        """Begin. The answer says whether it is over; it raises OSError when that failed."""
        ...

    def forget(self, source: str) -> None:
        """Nothing is read from this peer any more: unmap what is mapped of it."""
        ...


@dataclass(slots=True)
class Leg:
    """What is known of one leg here."""

    given: Given | None = None
    more: More | None = None
    done: int = 0  # blocks from the first one on that are here
    told: int = -1  # as of the last Copied
    copied: int = 0
    seconds: float = 0.0
    began: float = 0.0
    over: bool = False  # the last block is here, or never will be
    good: bool = False

    @property
    def wanting(self) -> bool:
        """Whether there is something to do."""
        return self.given is not None and self.more is not None and not self.over

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it."""
        return self.more is not None and bool(self.more.note)


class Copier:
    """One worker's thread. What is public is for the thread of the worker's steps."""

    def __init__(self, directory: Path, engine_id: str, rank: int, reader: Reader) -> None:
        self._reader = reader
        self._legs: dict[str, Leg] = {}
        self._refused: dict[str, None] = {}  # dropped before Given came
        self._orders: deque[Given | Return | Late] = deque()
        self._returned: deque[str] = deque()
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._server = self._context.socket(zmq.PAIR)
        self._server.bind(copier_endpoint(directory, engine_id, rank))
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._rope = self._context.socket(zmq.PAIR)
        self._rope.connect("inproc://bell")
        threading.Thread(target=self._run, name="kv-ahead", daemon=True).start()

    # --------------------------------------------------------------------------- from the worker's steps

    def order(self, *orders: Given | Return | Late) -> None:
        """Blocks that were given to legs, or are wanted back: `returned` names these when nothing is written
        into them any more."""
        self._orders.extend(orders)
        self._rope.send(b"")

    def wait(self, leg: str, seconds: float) -> int | None:
        """Wait until the leg's last block is here, and forget it. None then, or where it was dropped
        meanwhile; else how many of its blocks are here: the rest is not to be had in time."""
        with self._changed:
            self._changed.wait_for(lambda: leg not in self._legs or self._legs[leg].over, seconds)
            known = self._legs.get(leg)
            if known is not None and known.over:
                del self._legs[leg]
        if known is None or known.good:
            return None
        if not known.over:
            self.order(Late(leg))
        return known.done

    def returned(self) -> set[str]:
        """Legs whose blocks may be given away, each told once."""
        found = set()
        while self._returned:
            found.add(self._returned.popleft())
        return found

    # ----------------------------------------------------------------------------------- the thread's own

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._server, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while True:
            urgent = self._next()
            for socket, _ in poller.poll(0 if urgent else None):
                message = socket.recv()
                if socket is self._server:
                    self._take(msgspec.msgpack.decode(message, type=Order))
            while self._orders:
                self._take(self._orders.popleft())
            if (leg := self._next()) is not None:
                self._copy(*leg)

    def _next(self) -> tuple[str, Leg] | None:
        """The leg to go on with: first one that is waited for, then the oldest."""
        wanting = [(name, leg) for name, leg in self._legs.items() if leg.wanting and self._open(leg)]
        return min(wanting, key=lambda item: not item[1].urgent, default=None)

    def _open(self, leg: Leg) -> bool:
        assert leg.more is not None
        return leg.urgent or len(leg.more.blocks) > leg.done or leg.told != leg.done

    def _take(self, order: Given | Return | Late | Order) -> None:
        match order:
            case Drop(leg=name):
                self._forget(name)
                self._say(Dropped(name))
            case Gone(source=source):
                self._reader.forget(source)
            case Late(leg=name):
                self._forget(name)
                self._say(Failed(name, "its last blocks were not here in time"))
            case Return(leg=name):
                self._forget(name)
                self._refused.pop(name, None)
                self._returned.append(name)
            case _ if order.leg in self._refused:
                pass  # it was dropped before
            case Given(leg=name):
                leg = self._legs.setdefault(name, Leg())
                leg.given, leg.done = order, order.first
            case More(leg=name):
                self._legs.setdefault(name, Leg()).more = order

    def _forget(self, name: str) -> None:
        with self._changed:
            self._legs.pop(name, None)
            self._changed.notify_all()
        self._refused[name] = None
        if len(self._refused) > REMEMBER:
            del self._refused[next(iter(self._refused))]

    def _copy(self, name: str, leg: Leg) -> None:
        """One piece of a leg, or the last word on it."""
        assert leg.given is not None and leg.more is not None
        more, here = leg.more, leg.given.blocks
        last = bool(more.note)
        end = len(more.blocks) if last else min(len(more.blocks), leg.done + PIECE)
        if end > len(here):
            self._over(name, leg, Failed(name, f"{end} blocks do not fit into the {len(here)} kept for it"))
            return
        began = time.monotonic()
        leg.began = began if last else leg.began or began
        try:
            if end > leg.done or last:
                over = self._reader.read(
                    more.source, more.blocks[leg.done : end], here[leg.done : end], more.note
                )
                while not over():
                    time.sleep(POLL_SECONDS)
        except (OSError, RuntimeError, KeyError) as wrong:  # NIXL's own errors are RuntimeErrors
            log.warning("KV of %s could not be copied: %r", name, wrong)
            self._over(name, leg, Failed(name, f"{type(wrong).__name__}: {wrong}"))
            return
        self._copied(name, leg, max(end, leg.done), began, last)

    def _copied(self, name: str, leg: Leg, end: int, began: float, last: bool) -> None:
        assert leg.more is not None
        ended = time.monotonic()
        leg.copied += end - leg.done
        leg.seconds += ended - began
        leg.done = end
        if end >= len(leg.more.blocks):
            leg.told = end
            word = Copied(name, end, last, leg.copied, leg.seconds, leg.began, ended)
            if last:
                self._over(name, leg, word)
            else:
                self._say(word)

    def _over(self, name: str, leg: Leg, word: Copied | Failed) -> None:
        self._say(word)
        with self._changed:
            leg.over, leg.good = True, isinstance(word, Copied)
            self._changed.notify_all()

    def _say(self, word: Word) -> None:
        with contextlib.suppress(zmq.Again):  # the server is gone, and this process is about to be
            self._server.send(msgspec.msgpack.encode(word), zmq.NOBLOCK)
