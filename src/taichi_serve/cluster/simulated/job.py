"""One request as the simulated cluster knows it: what it wants, where it is, and what it holds there.

This is the truth, with the length of the output in it; the scheduler has a ledger of its own and is told
facts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taichi_serve.cluster.simulated.engine import Engine


@dataclass(frozen=True, slots=True)
class Call:
    """A request that will arrive: `at` in seconds, its lengths in tokens. `request` may name it."""

    at: float
    prompt_tokens: int
    output_tokens: int
    request: str = ""


class Where(Enum):
    """Where a job stands on its engine."""

    NOWHERE = "nowhere"  # arrived, or its instance was lost
    WAITING = "waiting"  # in the queue of prompts, no block taken
    PREFILLING = "prefilling"  # a part of its tokens is computed
    DECODING = "decoding"  # one token a step
    ENDING = "ending"  # the last token of its leg is in a step that is not done
    HELD = "held"  # leg over, blocks pinned, no order yet where to go
    INBOUND = "inbound"  # waits on the target for blocks
    PULLING = "pulling"  # has blocks on the target, its KV is on the way
    LANDED = "landed"  # its KV is here, the next step takes it
    DONE = "done"


class Job:
    """A request's truth. Only its engine and the cluster write it.

    Of a resident decode, `computed` and `made` are as they were when it joined, at the engine's tick `since`.
    """

    __slots__ = (
        "arrived_at", "began", "blocks", "computed", "engine", "finish_tick", "hand_over", "id", "last_at",
        "leg", "made", "missing", "need", "output", "pinned", "prompt", "pulled", "since", "source", "target",
        "where",
    )  # fmt: skip

    def __init__(self, name: str, arrived_at: float, prompt: int, output: int) -> None:
        self.id = name
        self.arrived_at = arrived_at
        self.prompt = prompt
        self.output = output
        self.leg = 0
        self.where = Where.NOWHERE
        self.engine: Engine | None = None  # where it waits, runs or is held
        self.source: Engine | None = None  # where blocks of the leg before are pinned until it is pulled
        self.pinned = 0  # how many
        self.target: tuple[int, Engine] | None = None  # the leg and engine that a Flow sends it to
        self.hand_over = False
        self.pulled = False  # whether the KV of this leg came over from elsewhere
        self.missing = False  # it was decoding, was preempted, and is computed again
        self.need = prompt  # tokens to compute before the next one comes out
        self.computed = 0  # tokens whose KV is there
        self.made = 0  # output tokens so far, those in flight with them
        self.began = 0  # output tokens when this leg began
        self.since = 0
        self.finish_tick = 0  # the tick that makes its last token
        self.blocks = 0  # blocks on `engine`; of a resident decode, when it joined
        self.last_at = arrived_at  # when the last token of the leg before came out

    def restart(self) -> None:
        """Forget all KV: the prompt and every token so far are to be computed again."""
        self.computed = 0
        self.blocks = 0
        self.need = self.prompt + self.made
