"""Garbage collection that does not stop the streams.

A process that has imported PyTorch and vLLM holds about a million objects that never go away. A full
collection walks them all: 300 to 600 ms in which no token moves, measured in servers, engine cores and
workers alike. Once the server or an engine core is warm, what it holds is set aside for good.

A stream that goes on makes a few objects a token that live for a moment, and CPython looks for cycles after
every 700 of them. Nearly all are gone by themselves by then, or will be; so it looks less often.
"""

from __future__ import annotations

import gc

# Objects made and not gone before the youngest are looked at; CPython's own is 700. The few megabytes that
# cycles may hold meanwhile are less than one long prompt.
YOUNG = 5000


def settle() -> None:
    """Leave what is there out of every later collection.

    Nothing is collected first: finalizers would run beside threads that are in the middle of a handshake.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
