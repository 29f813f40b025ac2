"""Who is told of what becomes of instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm.v1.engine import EngineCoreOutputs

from taichi_serve.cluster.vllm.server.scratch import Say


@dataclass(slots=True)
class Told:
    """Who is told what. `failed` gets a request and why it is ended, before it is; `hopeless` why no instance
    will come back; `deliver` outputs for the front end."""

    say: Say
    deliver: Callable[[EngineCoreOutputs], None]
    failed: Callable[[str, str], None] = lambda request, why: None
    hopeless: Callable[[str], None] = lambda why: None
