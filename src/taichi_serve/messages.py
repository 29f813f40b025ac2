"""Facts and decisions: all that ever crosses between the scheduler and a cluster.

An event is a fact with the time it happened (`at`, seconds on the cluster's clock). A command is a decision.
Tokens never pass through here. A request lives in legs: leg 0 is its prefill, and every move to another
instance starts a leg with the next number. Facts about a leg that is over are dropped by that number.

The facts of one step come in this order: the Stepped first, then what the step brought about (Prefilled,
Flowed, Finished).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO


class Move(Enum):
    """Why a request changes instance."""

    HAND_OVER = (
        "hand-over"  # after prefill, to the instance where it decodes (Alg. 1, low-interference start)
    )
    DEGRADE = "degrade"  # out of a D-heavy instance past the watermark (Alg. 1, longest first)
    BACKFLOW = "backflow"  # back to a D-heavy instance before its TPOT is lost (Alg. 1)
    OPERATOR = "operator"  # somebody asked for it
    DRAIN = "drain"  # its instance is being drained
    RESCUE = "rescue"  # its instance was lost: the tokens so far are computed again elsewhere


class Tier(Enum):
    """Where an instance keeps blocks of its prefix cache."""

    DEVICE = "device"
    HOST = "host"  # memory of its host, to which what the device evicts may go


class Outcome(Enum):
    """How the life of a request ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"  # turned away at the door under overload, before its first token


# ------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request is here. `movable` is False where the engine could not move it exactly, for the reason
    `bound_by` (docs/moving.md; a log of an older server may not know it). `blocks` are 64 bits of the hash of
    each full block of its prompt, in order; a hash stands for the block and all before it. `slo` is its own
    where that is not the server's, and `slo_class` the name of the class that it belongs to."""

    at: float
    request: str
    prompt_tokens: int
    max_tokens: int
    movable: bool = True
    bound_by: str | None = None
    blocks: tuple[int, ...] = ()
    slo: SLO | None = None
    slo_class: str | None = None


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The first token of a request is out, computed by the leg's instance. `cached` prompt tokens were not
    computed; `fetched` of these came from another instance, `loaded` from the memory of its host. With `held`
    the leg ended there and its KV waits for a Decode; otherwise it decodes in place. `fetch` says
    from when to when the fetched ones were copied."""

    at: float
    request: str
    leg: int
    instance: str
    cached: int = 0
    held: bool = False
    fetched: int = 0
    loaded: int = 0
    fetch: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step of an instance is done: every resident decode got one token, but for those `missed`.

    `prefill_tokens` prompt tokens were computed in it, it took `seconds` from the end of the one before (or
    from when there was work), and the KV cache now holds `kv_tokens` (blocks in use times block size).
    """

    at: float
    instance: str
    seconds: float
    prefill_tokens: int
    decodes: int
    kv_tokens: int
    waiting: int = 0
    missed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cached:
    """What the prefix cache of an instance `stored` and `removed` since the last such fact, as hashes of
    blocks (see Arrived), in this order; with `reset` all that was there before is gone. Told before the
    Stepped of the step that it came with."""

    at: float
    instance: str
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    reset: bool = False
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Timeline:
    """The parts of one move, each the time in seconds at which it ended, on the cluster's clock; 0 where
    there was no such part. The gap has three: `left` to `landed` is the move's own, `landed` to `scheduled`
    the target's step that has to end, `scheduled` to `made` the one it is in."""

    left: float  # the source made its last token
    heard: float  # the server has it
    arrived: float  # the target's engine has the request
    began: float  # copying what is missing (the tail, where the rest was copied ahead) begins
    landed: float  # the last byte is there
    scheduled: float  # it is in a step of the target
    made: float  # that step has made its token
    at: float  # the server has it
    before: float = 0.0  # the target's last step without it was scheduled
    ahead: float = 0.0  # copying of full blocks began, while the request still ran at the source
    copied: float = 0.0  # they were there
    copied_blocks: int = 0  # all that was copied
    copy_seconds: float = 0.0  # what copying took, ahead and after


@dataclass(frozen=True, slots=True)
class Flowed:
    """The first token of leg `leg` is out on `instance`; with it `output_tokens` have been produced.
    `kv_tokens` came over from the instance before; `reused` counts these and what was still cached here, and
    the rest was computed again. `gap` is the time in seconds between the last token there and this one."""

    at: float
    request: str
    leg: int
    instance: str
    output_tokens: int
    kv_tokens: int
    gap: float
    reused: int = 0
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is over, on whatever leg; every block it held is free or about to be."""

    at: float
    request: str
    output_tokens: int
    outcome: Outcome = Outcome.FINISHED


@dataclass(frozen=True, slots=True)
class Refused:
    """Leg `leg` did not begin. After a move the request goes on where it was, on the leg before, with
    `output_tokens` produced so far (0: not known; it is then counted as if it had stood still). A prompt that
    was not taken in is placed anew."""

    at: float
    request: str
    leg: int
    why: str
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Silent:
    """An instance does not answer (`on` True), or answers again (`on` False). What runs there goes on as soon
    as it does: it may be slow, and is not lost before a Lost says so."""

    at: float
    instance: str
    on: bool = True


@dataclass(frozen=True, slots=True)
class Lost:
    """An instance is gone with all its KV. Requests on it wait for a Decode or Prefill elsewhere."""

    at: float
    instance: str
    why: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A lost instance is back, empty and warm, with a KV cache of `kv_capacity` tokens."""

    at: float
    instance: str
    kv_capacity: int


@dataclass(frozen=True, slots=True)
class Added:
    """One more instance of this kind, with a name that none had before: empty and warm, with a KV cache of
    `kv_capacity` tokens. `chunk` is that of its kind where it is the first of it; None leaves it open."""

    at: float
    instance: str
    kind: Kind
    kv_capacity: int
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """An instance runs on this host, by an address of it. Told where instances may be on several."""

    at: float
    instance: str
    host: str


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance left for good. What is still on it waits for another place, as after a Lost."""

    at: float
    instance: str


@dataclass(frozen=True, slots=True)
class Hopeless:
    """No lost instance will come back: who waits for one waits in vain."""

    at: float
    why: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client left: the request is to be aborted wherever it is."""

    at: float
    request: str


@dataclass(frozen=True, slots=True)
class Asked:
    """An operator asks for a running request to move to an instance."""

    at: float
    request: str
    to: str


@dataclass(frozen=True, slots=True)
class Drained:
    """An operator drains an instance (`on` True) or takes it back into service (`on` False)."""

    at: float
    instance: str
    on: bool = True


@dataclass(frozen=True, slots=True)
class Slid:
    """An operator moved the sliders; the number of instances stays."""

    at: float
    sliders: Sliders


@dataclass(frozen=True, slots=True)
class Tuned:
    """The server itself set the sliders and the margins of Algorithm 2 (shares of the SLOs), by what it saw:
    `why`. `gain` is the share of all requests that are good beyond those now, as predicted; None where
    nothing was predicted. One that does not `act` is a suggestion, and changes nothing."""

    at: float
    sliders: Sliders
    ttft_margin: float
    tpot_margin: float
    why: str
    gain: float | None = None
    act: bool = True


@dataclass(frozen=True, slots=True)
class Promised:
    """An operator set the SLO of the server, for all requests that have none of their own, those under way
    too."""

    at: float
    slo: SLO


Event = (
    Arrived
    | Prefilled
    | Stepped
    | Cached
    | Flowed
    | Finished
    | Refused
    | Silent
    | Lost
    | Joined
    | Added
    | Placed
    | Removed
    | Hopeless
    | Cancelled
    | Asked
    | Drained
    | Slid
    | Tuned
    | Promised
)


# ---------------------------------------------------------------------------------------------- commands


# Not frozen: that takes seven times as long to make, and one is made for each instance at each arrival.
@dataclass(slots=True, unsafe_hash=True)
class Forecast:
    """What was predicted for one instance when a prompt was placed: TTFT in seconds, the prompt tokens queued
    before it, whether that is feasible, whether its KV cache has room for the prompt (`fits`), whether
    its decodes can bear more prompts beside them (`calm`), and how many tokens of the prompt are believed to
    be in its prefix cache, or fetched into it, by then (`cached`)."""

    instance: str
    ttft: float
    queued_prefill_tokens: int
    feasible: bool
    fits: bool = True
    calm: bool = True
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a decode would meet on one instance: seconds per token, share of KV in use once it has landed,
    and whether that is within the mark that was asked for."""

    instance: str
    tpot: float
    load: float
    fits: bool


# Not frozen, like a Forecast: one is made at each arrival.
@dataclass(slots=True, unsafe_hash=True)
class Prefill:
    """Start the request here. With `hand_over` the leg ends after the first token and a Decode follows. With
    `prefix_from` the KV of its first `prefix_tokens` tokens is fetched from that instance's prefix cache.

    Prompts queued on an instance are computed in the order of `by` (seconds), the lowest first, and equal
    ones in order of arrival. What is `best_effort` can no longer meet its TTFT."""

    request: str
    leg: int
    on: str
    hand_over: bool = False
    forecasts: tuple[Forecast, ...] = ()
    why: str = ""
    prefix_from: str | None = None
    prefix_tokens: int = 0
    by: float = 0.0
    best_effort: bool = False


@dataclass(frozen=True, slots=True)
class Ahead:
    """A request that is still being prefilled will decode on `to`, on leg `leg`: its KV may be copied there
    as it is computed. A hint: where it decodes is decided when its first token is out."""

    request: str
    leg: int
    to: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Decode:
    """Begin leg `leg` of a held or stranded request on this instance, with whatever KV can be had."""

    request: str
    leg: int
    on: str
    move: Move
    why: str = ""
    outlooks: tuple[Outlook, ...] = ()


@dataclass(frozen=True, slots=True)
class Flow:
    """A running request stops after the token it is on and begins leg `leg` on `to`."""

    request: str
    leg: int
    to: str
    move: Move
    why: str = ""
    outlooks: tuple[Outlook, ...] = ()


@dataclass(frozen=True, slots=True)
class Abort:
    """End the request now, on every leg."""

    request: str
    outcome: Outcome
    why: str


@dataclass(frozen=True, slots=True)
class Demote:
    """A prompt that is queued on leg `leg` is best effort from now on: of those queued there it is computed
    in the order of `by` (seconds; see Prefill). One that has begun meanwhile goes on."""

    request: str
    leg: int
    by: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Decline:
    """Turn the request away at the door: it was sent to no instance. It may come back after `retry_after`
    seconds, when what is queued is predicted to be through."""

    request: str
    retry_after: float
    why: str
    forecasts: tuple[Forecast, ...] = ()


@dataclass(frozen=True, slots=True)
class SetChunk:
    """The instance takes at most `chunk` prompt tokens into each step from now on; 0 keeps prompts away."""

    instance: str
    kind: Kind
    chunk: int


Command = Prefill | Ahead | Decode | Flow | Abort | SetChunk | Demote | Decline
