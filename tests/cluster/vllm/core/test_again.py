"""An engine core whose server was killed: what it does when its holder tells it of the next one."""

from __future__ import annotations

import os
import queue
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.core import again
from taichi_serve.cluster.vllm.core.again import outlive
from taichi_serve.cluster.vllm.curve import Keys, new_pair, replace_keys, write_keys
from taichi_serve.cluster.vllm.spec import SIGNAL

SOON = 5.0
DEAD = b"dead"


class Cache:
    """Of pictures."""

    cleared = False

    def clear_cache(self) -> None:
        self.cleared = True


def core() -> Any:
    """A class of cores with vLLM's two threads, which note what they are begun with."""

    class Core:
        ENGINE_CORE_DEAD = DEAD
        engine_index = 0

        def __init__(self) -> None:
            self.input_queue: queue.Queue[Any] = queue.Queue()
            self.output_queue: queue.Queue[Any] = queue.Queue()
            self.begun: queue.Queue[Any] = queue.Queue()
            self.sent: list[Any] = []
            self.scheduler = SimpleNamespace()
            self.mm_receiver_cache = Cache()
            self.output_thread = threading.Thread(target=self._send, daemon=True)
            self.output_thread.start()

        def _send(self) -> None:
            while (item := self.output_queue.get()) != DEAD:
                self.sent.append(item)

        def process_output_sockets(self, paths: list[str], coordinator: None, index: int) -> None:
            self.begun.put(("sends", paths, index))
            self._send()

        def process_input_sockets(self, paths: list[str], coordinator: None, name: bytes, _: Any) -> None:
            self.begun.put(("hears", paths, name))

        def run_busy_loop(self) -> None:
            """One turn."""
            os.kill(os.getpid(), SIGNAL)
            _, (_, _, method, arguments) = self.input_queue.get(timeout=SOON)
            self.answer = getattr(self, method)(*arguments)

    return Core


def test_it_forgets_and_then_hears_and_sends_at_the_next_servers_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[Any] = []
    monkeypatch.setattr(again, "stop", forgotten.append)
    monkeypatch.setattr(again, "dress_core", lambda directory, engine_id: None)
    write_keys(tmp_path, "e1", keys := Keys("server", new_pair(), new_pair(), []))
    kind = core()
    outlive(tmp_path, "e1", kind)
    outlive(tmp_path, "e1", kind)
    replace_keys(tmp_path, "e1", replace(keys, server="next", inputs="tcp://in", outputs="tcp://out"))
    before = signal.getsignal(SIGNAL)
    try:
        one = kind()
        first = one.output_thread
        one.output_queue.put("of the old server")
        one.run_busy_loop()
    finally:
        signal.signal(SIGNAL, before)
    assert forgotten == [one.scheduler]
    assert one.mm_receiver_cache.cleared
    begun = sorted(one.begun.get(timeout=SOON) for _ in range(2))
    assert begun == [("hears", ["tcp://in"], b"\0\0"), ("sends", ["tcp://out"], 0)]
    one.taichi_again()  # told a second time
    assert one.begun.empty()
    first.join(SOON)
    assert not first.is_alive()
    assert one.sent == ["of the old server"]
    assert not one.answer.done()  # nobody asked
    one.output_queue.put("of the new one")
    one.output_queue.put(DEAD)
    one.output_thread.join(SOON)
    assert one.sent == ["of the old server", "of the new one"]
