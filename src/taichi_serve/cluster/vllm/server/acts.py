"""What a journey answers: things to be done with engines, copiers, the scheduler and the user.

Whoever carries them out (cluster.py) decides nothing and remembers nothing of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from taichi_serve.cluster.vllm.wire import TransferParams
from taichi_serve.messages import Outcome

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.passage import Passage


class Seat(Protocol):
    """One incarnation of an instance, as far as a journey looks at it."""

    name: str
    alive: bool

    @property
    def engine_id(self) -> str:
        """Of this incarnation alone."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """A request among those that wait at an engine: the lowest `by` goes first, equal ones as they came. What
    is `best_effort` can no longer meet its TTFT."""

    by: float = 0.0
    best_effort: bool = False


ANY = Place()


@dataclass(frozen=True, slots=True)
class Add:
    """Send a leg with the prompt and all tokens so far. `reader`: it ends after its first token, and what it
    computes is pinned for that leg. `again`: its KV did not come, and is computed again. `fetch`: so many of
    its first blocks come from another instance before it is computed."""

    seat: Seat
    leg: str
    reader: str | None = None
    again: bool = False
    fetch: int = 0


@dataclass(frozen=True, slots=True)
class Send:
    """Send the leg that a passage leads to: to pull what is held (`kv`), or, before the request has left, to
    keep blocks for it and `room` tokens more."""

    passage: Passage
    kv: TransferParams | None = None
    room: int = 0


@dataclass(frozen=True, slots=True)
class PutOff:
    """A prompt that waits at an engine is best effort from now on, and takes the place `by` there."""

    seat: Seat
    leg: str
    by: float


@dataclass(frozen=True, slots=True)
class Adopt:
    """A leg that was sent ahead is the request's leg from now on: its outputs are the request's."""

    seat: Seat
    leg: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The leg decodes from now on."""

    seat: Seat
    leg: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The leg ended by itself."""

    seat: Seat
    leg: str


@dataclass(frozen=True, slots=True)
class End:
    """End a leg for which nothing is read."""

    seat: Seat
    leg: str


@dataclass(frozen=True, slots=True)
class Drop:
    """End the leg that a passage leads to. Its engine answers when nothing is read or written for it any
    more. `copied`: its copiers know of it too."""

    passage: Passage
    copied: bool


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing is read for a passage: its source lets go."""

    passage: Passage


@dataclass(frozen=True, slots=True)
class Leave:
    """Have a leg end after the token it is on, with its KV held."""

    seat: Seat
    leg: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Have the source pin what is full for a passage; the answer has the blocks."""

    passage: Passage


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of what is held of a leg that left, or of what is pinned for a reader."""

    seat: Seat
    leg: str | None
    reader: str | None


@dataclass(frozen=True, slots=True)
class Find:
    """Ask a passage's source which of the first `blocks` blocks of the prompt its prefix cache holds, and
    have them pinned."""

    passage: Passage
    blocks: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Have these blocks of the source copied at the target. With `note` or `whole` they are all there will
    be; see wire.More."""

    passage: Passage
    blocks: list[int]
    note: str = ""
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tell the target that the first blocks of a leg are here, so many of them, and no more will come."""

    passage: Passage
    blocks: int


@dataclass(frozen=True, slots=True)
class Waive:
    """Ask the target whether it can still compute a leg without what it was to fetch."""

    passage: Passage


@dataclass(frozen=True, slots=True)
class Uncopy:
    """Have the target's copiers forget a leg for which nothing is read."""

    passage: Passage


@dataclass(frozen=True, slots=True)
class Arrive:
    """Tell the target that the source made its last token: these came since the leg was sent there."""

    passage: Passage
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Await:
    """Say `late(mark)` when the patience with a move is over."""

    mark: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the scheduler that the move to `leg` does not happen."""

    leg: int
    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the scheduler that the request is over; the user too where it failed, unless an output of its
    engine said so."""

    outcome: Outcome
    said: bool = False


Act = (
    Add
    | Send
    | PutOff
    | Adopt
    | Settle
    | Forget
    | End
    | Drop
    | Close
    | Leave
    | Pin
    | Find
    | Release
    | Copy
    | Fetched
    | Waive
    | Uncopy
    | Arrive
    | Await
    | Refuse
    | Finish
)
Acts = list[Act]
