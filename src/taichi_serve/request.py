"""One request as the scheduler knows it, and the one table of its legal life."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from taichi_serve.messages import Move
from taichi_serve.slo import SLO
from taichi_serve.stage import TransitionError


class State(Enum):
    """Where a request stands in its life."""

    __hash__ = object.__hash__  # that of Enum is computed in Python, and each change of state asks for two

    WAITING = "waiting"  # arrived, no instance could be given
    PREFILLING = "prefilling"  # queued or prefilling on an instance
    DECODING = "decoding"  # resident on an instance, one token a step
    MOVING = "moving"  # between the last token here and the first one there
    DONE = "done"


# The one table of legal transitions. Facts that come too late never get here (GlobalScheduler._current), so
# whatever is not in it is an error in the books.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILLING, State.MOVING, State.DONE}),
    State.PREFILLING: frozenset({State.PREFILLING, State.DECODING, State.MOVING, State.WAITING, State.DONE}),
    State.DECODING: frozenset({State.MOVING, State.WAITING, State.DONE}),
    State.MOVING: frozenset({State.MOVING, State.DECODING, State.WAITING, State.DONE}),
    State.DONE: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """The scheduler's ledger entry of a request. Only GlobalScheduler writes it, through `enter`.

    A resident decode gets one token in every step of its instance, so its output is not counted token by
    token: it is `base + (instance.ticks - joined)`, and keys made of `base - joined` stay in order for as
    long as it is resident (scheduling/decode.py).
    """

    id: str
    arrived_at: float
    prompt_tokens: int
    max_tokens: int
    slo: SLO  # what it is judged by
    movable: bool = True
    own_slo: bool = False  # it brought this SLO; else it has the server's, which an operator may change
    slo_class: str | None = None  # the class of requests that it belongs to
    blocks: tuple[int, ...] = ()  # hashes of the full blocks of its prompt (messages.Arrived)
    state: State = State.WAITING
    leg: int = 0
    instance: str | None = None  # where it is; while moving, where it comes from (None when that is lost)
    target: str | None = None  # while moving: where it goes
    why: Move | None = None  # while moving: for what reason
    first_at: float | None = None  # when the user got the first token
    base: int = 0  # output tokens when it joined its instance's tick clock
    joined: int = 0  # the instance's ticks at that moment
    cached: int = 0  # prompt tokens that are believed not to be computed where it is queued
    unused: int = 0  # of these, in blocks that nobody there uses yet: they take room as soon as it begins
    hand_over: bool = False  # while it prefills: whether its decode is to run elsewhere
    ahead: str | None = None  # where its KV is being copied to meanwhile
    reserved: int = 0  # while moving: KV tokens promised to it at the target
    degraded: bool = False  # moved to a P-heavy instance by Alg. 1, may flow back
    moves: dict[Move, int] = field(default_factory=dict)
    moved_at: float = float("-inf")  # when its last move was decided
    predicted_ttft: float = 0.0  # as predicted when its prefill was placed, in seconds from its arrival
    predicted_tpot: float = 0.0  # as predicted when it became resident where it is
    settled_at: float = 0.0  # when that was
    by: float = 0.0  # while it is queued: its place among the prompts there, the lowest first (seconds)
    work: float = 0.0  # while it is queued: what it adds to the queue there, as predicted (seconds)
    best_effort: bool = False  # it can no longer meet its TTFT, and must cost nobody theirs

    def enter(self, state: State) -> None:
        """Change state. Raises TransitionError where the table does not allow it."""
        if state not in TRANSITIONS[self.state]:
            raise TransitionError(f"request {self.id} went from {self.state.value} to {state.value}")
        self.state = state

    def output_tokens(self, ticks: int) -> int:
        """Tokens produced so far, by the tick clock of the instance it is resident on."""
        return self.base + (ticks - self.joined if self.state is State.DECODING else 0)
