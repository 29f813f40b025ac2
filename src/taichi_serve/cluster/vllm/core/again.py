"""An engine core that outlives its server: it drops all that it did for it, and speaks to the next one.

Its holder has put where the next server listens, and with which keys, into the core's file of keys, and sends
SIGNAL (hosts/holder.py). Between two steps the core then ends every request and opens its sockets anew, by
vLLM's own two threads. The old one that hears stays, and hears nothing: nobody who has the old server's key
is there any more. The next server has all of them let go of what they hold (forget.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreRequestType, core

from taichi_serve.cluster.vllm.core.forget import stop
from taichi_serve.cluster.vllm.curve import Keys, read_keys
from taichi_serve.cluster.vllm.sockets import dress_core
from taichi_serve.cluster.vllm.spec import SIGNAL

METHOD = "taichi_again"  # not one of wire.Call: no server asks for it
MARK = "_taichi_stock_busy_loop"


def outlive(directory: Path, engine_id: str, kind: Any = core.EngineCoreProc) -> None:
    """Have this class of engine cores do so, once."""
    if hasattr(kind, MARK):
        return
    stock = kind.run_busy_loop
    setattr(kind, MARK, stock)

    def run_busy_loop(self: Any) -> None:
        _listen(self)
        stock(self)

    known = [read_keys(directory, engine_id)]

    def again(self: Any) -> Future[None]:
        keys = read_keys(directory, engine_id)
        if keys is not None and keys not in known:  # it may be told twice
            known.append(keys)
            meet(self, keys)
        return Future()  # no answer: whom it would go to did not ask

    def meet(self: Any, keys: Keys) -> None:
        stop(self.scheduler)
        if self.mm_receiver_cache is not None:  # the next server's own is empty, too
            self.mm_receiver_cache.clear_cache()
        dress_core(directory, engine_id)
        _reopen(self, keys.inputs, keys.outputs)

    kind.run_busy_loop = run_busy_loop
    setattr(kind, METHOD, again)


def _listen(engine: Any) -> None:
    """Put what is to be done into the core's queue when the signal comes. By a thread: the signal's own
    handler may have interrupted whoever holds the queue's lock."""
    heard, told = os.pipe()
    signal.signal(SIGNAL, lambda *_: os.write(told, b"\0"))

    def run() -> None:
        while os.read(heard, 1):
            engine.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (0, 0, METHOD, [])))

    threading.Thread(target=run, name="again", daemon=True).start()


def _reopen(engine: Any, inputs: str, outputs: str) -> None:
    """New threads at new sockets. The one that sends ends first, or both would take from one queue."""
    last = engine.ENGINE_CORE_DEAD
    engine.output_queue.put_nowait(last)
    while any(item is last for item in list(engine.output_queue.queue)):
        time.sleep(0.001)
    number = engine.engine_index
    engine.output_thread = threading.Thread(
        target=engine.process_output_sockets, args=([outputs], None, number), daemon=True
    )
    engine.output_thread.start()
    name = number.to_bytes(length=2, byteorder="little")
    arguments = ([inputs], None, name, threading.Event())
    threading.Thread(target=engine.process_input_sockets, args=arguments, daemon=True).start()
