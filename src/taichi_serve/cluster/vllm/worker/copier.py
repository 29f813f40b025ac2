"""KV that is copied while steps run: one thread in every worker, and the words it is spoken to in.

A step never waits for it, and it never waits for a step, nor for a read. The server tells it which blocks of
the source are final (More), the worker's own scheduler which blocks were given to the request here (Given);
it copies what is missing, as soon as both are known, and says so. The last More of a leg brings the tail: it
goes before everything that is only copied ahead. One read of each leg may be under way. One whose source
stands still may stay so for any time; the other legs go on. Whatever ends a leg is answered when its read is
over, because its target blocks may only be given away after that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from taichi_serve.cluster.vllm.curve import as_client, read_keys
from taichi_serve.cluster.vllm.naps import nap_exactly
from taichi_serve.cluster.vllm.wire import (
    Again,
    Copied,
    Drop,
    Dropped,
    Failed,
    Given,
    Gone,
    Order,
    Ping,
    Pong,
    Return,
    Said,
    copier_endpoint,
)
from taichi_serve.cluster.vllm.worker.legs import Late, Leg, Reader, Reading

log = logging.getLogger("vllm.taichi.copier")

PIECE = 96  # blocks that are copied ahead in one go: a tail behind it waits for no more than these
SLOW = 0.05  # seconds after which the next piece does not wait for a read any more
POLL_SECONDS = 20e-6  # between two looks at a young read, and an eighth of its age later on
POLL_MOST = 0.005
REMEMBER = 4096  # legs that were dropped before their blocks were known here


class Copier:
    """One worker's thread. What is public is for the thread of the worker's steps."""

    def __init__(self, directory: Path, engine_id: str, rank: int, reader: Reader) -> None:
        self._reader = reader
        self._legs: dict[str, Leg] = {}
        self._refused: dict[str, None] = {}  # dropped before Given came
        self._orders: deque[Again | Given | Return | Late] = deque()
        self._returned: deque[str] = deque()
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._me = directory, engine_id, rank
        self._server = _to_server(self._context, *self._me)
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._rope = self._context.socket(zmq.PAIR)
        self._rope.connect("inproc://bell")
        self._poller = zmq.Poller()
        threading.Thread(target=self._run, name="kv-ahead", daemon=True).start()

    # --------------------------------------------------------------------------- from the worker's steps

    def order(self, *orders: Again | Given | Return | Late) -> None:
        """Blocks that were given to legs, or are wanted back: `returned` names these when nothing is written
        into them any more."""
        self._orders.extend(orders)
        self._rope.send(b"")

    def wait(self, leg: str, seconds: float) -> bool:
        """Wait until the leg's last block is here, and forget it. False where it is not to be had, not in
        time, or not wanted any more: nothing that was read for the leg counts then."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(leg) or self._is_ending(leg), seconds)
            if self._is_over(leg):
                return self._legs.pop(leg).good
            ending = self._is_ending(leg)
        if not ending:
            self.order(Late(leg))
        return False

    def _is_over(self, leg: str) -> bool:
        known = self._legs.get(leg)
        return known is not None and known.over

    def _is_ending(self, leg: str) -> bool:
        known = self._legs.get(leg)
        return leg in self._refused or (known is not None and bool(known.ends))

    def returned(self) -> set[str]:
        """Legs whose blocks may be given away, each told once."""
        found = set()
        while self._returned:
            found.add(self._returned.popleft())
        return found

    # ----------------------------------------------------------------------------------- the thread's own

    def _run(self) -> None:
        nap_exactly()
        try:
            self._poller.register(self._server, zmq.POLLIN)
            self._poller.register(self._bell, zmq.POLLIN)
            while True:
                for socket, _ in self._poller.poll(self._patience()):
                    self._hear(socket)
                while self._orders:
                    self._take(self._orders.popleft())
                self._look()
                while (leg := self._next()) is not None:
                    self._begin(*leg)
        except zmq.ZMQError:
            pass  # this process is about to end
        except BaseException:  # nobody would ever hear of the blocks that are lent to it
            log.exception("the copier ended")
            os._exit(1)

    def _hear(self, socket: zmq.Socket[bytes]) -> None:
        message = socket.recv()
        if socket is not self._server:
            return
        try:
            self._take(msgspec.msgpack.decode(message, type=Order))
        except (msgspec.DecodeError, msgspec.ValidationError) as wrong:
            log.error("an order that cannot be read: %s", wrong)

    def _patience(self) -> float | None:
        """Milliseconds until the next look at the reads under way; None where there are none. Sleeps itself
        for less than one."""
        now = time.monotonic()
        ages = [now - leg.reading.began for leg in self._all() if leg.reading is not None]
        if not ages:
            return None
        seconds = min(max(min(ages) / 8, POLL_SECONDS), POLL_MOST)
        if seconds >= 1e-3:
            return seconds * 1e3
        time.sleep(seconds)
        return 0

    def _all(self) -> list[Leg]:
        return list(self._legs.values())  # `wait` takes legs out of it meanwhile

    def _next(self) -> tuple[str, Leg] | None:
        """The leg to begin a read of: one that is waited for; else the oldest, if no other read is young."""
        wanting = [(name, leg) for name, leg in list(self._legs.items()) if leg.wanting]
        name, leg = min(wanting, key=lambda item: not item[1].urgent, default=("", None))
        if leg is None or leg.urgent:
            return None if leg is None else (name, leg)
        now = time.monotonic()
        reads = [one.reading for one in self._all() if one.reading is not None]
        return None if any(now - read.began < SLOW for read in reads) else (name, leg)

    def _take(self, order: Again | Given | Return | Late | Order) -> None:
        if isinstance(order, Again):
            self._meet_server()
        elif isinstance(order, Ping):
            self._say(Pong(order.number))
        elif isinstance(order, Gone):
            self._reader.forget(order.source)
        elif isinstance(order, (Drop, Return, Late)):
            known = self._legs.get(order.leg)
            if known is not None and known.reading is not None:
                with self._changed:
                    known.ends.append(order)
                    self._changed.notify_all()
            else:
                self._end(order)
        elif order.leg in self._refused:
            pass  # it was dropped before
        elif isinstance(order, Given):
            leg = self._legs.setdefault(order.leg, Leg())
            leg.given, leg.done = order, order.first
        else:
            self._legs.setdefault(order.leg, Leg()).more = order

    def _meet_server(self) -> None:
        """Another one: what the last one wanted is wanted no more, and names may be given again. What is read
        just now goes on: its blocks are given back when that is over."""
        self._poller.unregister(self._server)
        self._server.close(linger=0)
        self._server = _to_server(self._context, *self._me)
        self._poller.register(self._server, zmq.POLLIN)
        with self._changed:
            self._refused.clear()
            for name in [name for name, leg in self._legs.items() if leg.reading is None]:
                del self._legs[name]

    def _end(self, order: Drop | Return | Late) -> None:
        """Nothing is read for the leg, and nothing will be."""
        with self._changed:
            self._legs.pop(order.leg, None)
            self._refused[order.leg] = None
            if len(self._refused) > REMEMBER:
                del self._refused[next(iter(self._refused))]
            self._changed.notify_all()
        match order:
            case Drop(leg=name):
                self._say(Dropped(name))
            case Late(leg=name):
                self._say(Failed(name, "its last blocks were not here in time"))
            case Return(leg=name):
                self._refused.pop(name, None)
                self._returned.append(name)

    def _begin(self, name: str, leg: Leg) -> None:
        """One piece of a leg, or the last of it."""
        assert leg.given is not None and leg.more is not None
        more, here = leg.more, leg.given.blocks
        tail = bool(more.note)
        end = len(more.blocks) if tail else min(len(more.blocks), leg.done + PIECE)
        if end > len(here):
            self._over(name, leg, Failed(name, f"{end} blocks do not fit into the {len(here)} kept for it"))
            return
        began = time.monotonic()
        leg.began = began if tail else leg.began or began
        remote, local = more.blocks[leg.done : end], here[leg.done : end]
        last = tail or (more.whole and end == len(more.blocks))
        leg.reading = Reading(lambda: True, began, max(end, leg.done), last)
        with self._failing(name, leg):
            if local or tail:
                leg.reading.over = self._reader.read(more.source, remote, local, more.note)
        self._look_at(name, leg)

    def _look(self) -> None:
        """See to the reads under way."""
        for name, leg in list(self._legs.items()):
            self._look_at(name, leg)

    def _look_at(self, name: str, leg: Leg) -> None:
        if leg.reading is not None:
            with self._failing(name, leg):
                if leg.reading.over():
                    self._copied(name, leg, leg.reading)
        if leg.reading is None:
            for order in leg.ends:
                self._end(order)
            leg.ends = []

    @contextlib.contextmanager
    def _failing(self, name: str, leg: Leg) -> Iterator[None]:
        """Whatever goes wrong with a read ends its leg, and nothing else."""
        try:
            yield
        except Exception as wrong:  # noqa: BLE001 - NIXL's own errors have no common class
            log.warning("KV of %s could not be copied: %r", name, wrong)
            leg.reading = None
            self._over(name, leg, Failed(name, f"{type(wrong).__name__}: {wrong}"))

    def _copied(self, name: str, leg: Leg, reading: Reading) -> None:
        assert leg.more is not None
        ended = time.monotonic()
        leg.copied += reading.end - leg.done
        leg.seconds += ended - reading.began
        leg.done, leg.reading = reading.end, None
        if not reading.last and leg.done < len(leg.more.blocks):
            return
        leg.told = leg.done
        word = Copied(name, leg.done, reading.last, leg.copied, leg.seconds, leg.began, ended)
        if not reading.last:
            self._say(word)
            return
        self._over(name, leg, word)
        if leg.more.whole:  # no step waits for it, and would forget it then
            self._legs.pop(name, None)

    def _over(self, name: str, leg: Leg, word: Copied | Failed) -> None:
        self._say(word)
        with self._changed:
            leg.over, leg.good = True, isinstance(word, Copied)
            self._changed.notify_all()

    def _say(self, word: Said) -> None:
        with contextlib.suppress(zmq.Again):  # the server is gone, and this process is about to be
            self._server.send(msgspec.msgpack.encode(word), zmq.NOBLOCK)


def _to_server(context: zmq.Context[Any], directory: Path, engine_id: str, rank: int) -> zmq.Socket[Any]:
    """The worker's end of the server's socket: a file that it makes, or a port of the server's."""
    if (keys := read_keys(directory, engine_id)) is None:
        socket = context.socket(zmq.PAIR)
        socket.bind(copier_endpoint(directory, engine_id, rank))
    else:
        socket = context.socket(zmq.DEALER)
        as_client(keys.own, keys.server)(context, socket)
        socket.connect(keys.copiers[rank])
    return socket
