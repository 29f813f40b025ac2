"""Where a server starts when its command line has no slider: from what the model and the machine are.

Instances take as few devices as the model fits on, and there are as many as that leaves room for. Nobody
knows the workload yet. Where it is known what steps take, the sliders are those that carry chats and
summaries best, whichever they are worse for (fluid.py). Elsewhere every fourth instance is P-heavy, and fewer
than four are all alike. From there the sliders set themselves (tuner.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

from taichi_serve.latency.known import Known
from taichi_serve.latency.model import prompt_attention
from taichi_serve.sliders import ON, Sliders
from taichi_serve.slo import DEFAULT, SLO
from taichi_serve.tuning.fluid import Fluid
from taichi_serve.tuning.setting import UNIT

SHARE = 4  # of so many instances one is P-heavy
WORK_SPACE = 2.5e9  # bytes on each device beside weights and KV: activations, graphs, the runtime
HOST_SPACE = 1.5e9  # bytes that the processes of an instance take beside weights and KV, on a CPU
ROOM = 2  # requests of the longest length whose KV an instance must hold: one that runs, one that moves in
SPARE = 0.15  # of the memory that an instance must have for KV, or it could run few requests at a time
DEGREES = (1, 2, 4, 8, 16)  # tensor parallel sizes to choose from
ROOMY = 60e9  # bytes of a device from which on steps of LARGE tokens are no burden
LARGE, MODEST = 8192, 2048  # tokens of the largest steps; vLLM chooses alike
SEQS = 256  # decodes beside the prompt tokens of a step where nobody says
UNKNOWN_CHUNK = 256  # where nobody knows what a step takes
DECODES, CONTEXT = 32, 1000  # of a usual step: so many decodes, each with so many tokens of context
PROMPT = 4096  # tokens of a long prompt
ENDLESS = 1e9  # seconds: a TTFT that everybody keeps
# The paper's SLOs stand so to its models (4 s and 70 ms: 8.5 prompts, 2.7 steps of 14B on an A100).
PROMPTS, STEPS = 8.0, 2.5
TTFT_GRAIN, TPOT_GRAIN = 0.5, 0.005  # seconds that SLOs are rounded up to
GIVEN_WORD, DEFAULT_WORD = "given", "default"


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says, in instances, devices, tokens and seconds; None where it says nothing."""

    instances: int | None = None
    tensor_parallel: int | None = None
    budget: int | None = None  # tokens of a step, prompts and decodes together
    seqs: int | None = None
    ttft: float | None = None
    tpot: float | None = None
    autotune: str | None = None


@dataclass(frozen=True, slots=True)
class Devices:
    """Accelerators, all alike or taken as the smallest; `memory` are the bytes an instance may use of one
    that has `size` bytes, and `kv` those of them for KV where somebody has said (--kv-cache-memory-bytes)."""

    name: str
    count: int
    memory: float
    size: float
    kv: float | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """CPUs: cores, NUMA nodes, bytes of memory that are free, and those that an instance takes for KV."""

    name: str
    cores: int
    nodes: int
    memory: float
    kv: float


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model decides where it fits: bytes of its weights (None: nobody knows) and of a token's KV,
    tokens of its longest request, heads."""

    weights: float | None
    kv_bytes: int
    limit: int
    heads: int
    kv_heads: int

    def fits(self, memory: float, degree: int) -> bool:
        """Whether `degree` devices with so many bytes each hold the weights and KV enough."""
        if self.weights is None:
            return True
        kept = ROOM * self.limit * self.kv_bytes / max(1, min(degree, self.kv_heads))
        return self.weights / degree + max(kept, SPARE * memory) + WORK_SPACE <= memory

    def divides(self, degree: int) -> bool:
        """Whether its heads can be divided among so many ranks; KV heads may be on several."""
        return self.heads % degree == 0 and (self.kv_heads % degree == 0 or degree % self.kv_heads == 0)

    def room(self, machine: Devices | Host, degree: int) -> float:
        """Tokens of KV that an instance of `degree` devices holds; no end where nobody knows."""
        if isinstance(machine, Host):
            left = machine.kv
        elif self.weights is None and machine.kv is None:
            return math.inf
        else:
            ranks = max(1, min(degree, self.kv_heads))  # each KV head is on several of more ranks
            each = machine.kv
            if each is None:
                each = machine.memory - (self.weights or 0.0) / degree - WORK_SPACE
            left = max(0.0, each) * ranks
        return left / self.kv_bytes if self.kv_bytes else math.inf

    @property
    def size(self) -> str:
        """Its weights in words."""
        return f"{self.weights / 1e9:.3g} GB of weights" if self.weights else "weights of unknown size"


@dataclass(frozen=True, slots=True)
class Start:
    """How a server starts, and why in two lines. `known` is what predictions begin with. Where nobody knew
    what steps take, `unsure` names those SLOs that may be raised once some were made."""

    tensor_parallel: int
    sliders: Sliders
    budget: int
    slo: SLO
    autotune: str
    known: Known | None
    unsure: frozenset[str]
    said: tuple[str, str]

    def words(self, said: frozenset[str] = frozenset()) -> list[str]:
        """The same as flags of a command line, without those whose names are in `said`."""
        s = self.sliders
        chosen: dict[str, int | float | str] = {
            "tensor_parallel_size": self.tensor_parallel,
            "p_heavy": s.p_heavy,
            "d_heavy": s.d_heavy,
            "p_chunk": s.p_chunk,
            "d_chunk": s.d_chunk,
            "max_num_batched_tokens": self.budget,
            "ttft_slo": self.slo.ttft,
            "tpot_slo": self.slo.tpot,
            "autotune": self.autotune,
        }
        unsaid = [(name, value) for name, value in chosen.items() if name not in said]
        return [word for name, value in unsaid for word in (f"--{name.replace('_', '-')}", str(value))]


def choose(
    given: Given, model: Model, machine: Devices | Host, known: Callable[[int], Known | None]
) -> Start:
    """The start on this machine; `known` says what is known of steps with a tensor parallel size."""
    degree, why = _degree(given, model, machine)
    instances, which = _instances(given, model, machine, degree)
    steps = known(degree)
    slo, whence = _slo(given, model, steps)
    sliders, budget, chunk = _sliders(given, instances, machine, steps, slo, model.room(machine, degree))
    autotune = ON if given.autotune is None else given.autotune
    limit = DEFAULT_WORD if given.budget is None else GIVEN_WORD
    told = [
        *([(f"S_P {sliders.p_chunk}", limit)] if sliders.p_heavy else []),
        (f"steps of at most {budget} tokens", limit),
        (f"S_D {sliders.d_chunk}", chunk),
        (f"TTFT SLO {slo.ttft:g} s", whence["ttft"]),
        (f"TPOT SLO {slo.tpot * 1e3:g} ms", whence["tpot"]),
        (f"--autotune {autotune}", DEFAULT_WORD if given.autotune is None else GIVEN_WORD),
    ]
    where = f"{_machine(machine, degree * instances)}: {_split(sliders)} ({which})"
    said = f"{where}, tensor parallel {degree} ({why})", _told(told)
    unsure = frozenset(name for name, its in whence.items() if its == DEFAULT_WORD)
    return Start(degree, sliders, budget, slo, autotune, steps, unsure, said)


# --------------------------------------------------------------------------------------------- instances


def _degree(given: Given, model: Model, machine: Devices | Host) -> tuple[int, str]:
    if given.tensor_parallel is not None:
        return given.tensor_parallel, GIVEN_WORD
    if isinstance(machine, Host):
        return 1, DEFAULT_WORD
    if model.weights is None:
        return 1, model.size
    most = max(1, machine.count // (given.instances or 1))
    able = [degree for degree in DEGREES if degree <= most and model.divides(degree)]
    for degree in able:
        if model.fits(machine.memory, degree):
            return degree, f"the least for {model.size}"
    return able[-1], f"{model.size} do not seem to fit"


def _instances(given: Given, model: Model, machine: Devices | Host, degree: int) -> tuple[int, str]:
    if given.instances is not None:
        return given.instances, GIVEN_WORD
    if isinstance(machine, Devices):
        return max(1, machine.count // degree), "all devices"
    each = (model.weights or 0.0) + machine.kv + HOST_SPACE
    room = int(machine.memory // each)
    # Memory is a node's, so a node is what a device is elsewhere; and with two there is something to set.
    most = min(max(machine.nodes, 2), machine.cores // degree)
    if room < most:
        return max(1, room), f"memory has room for {max(1, room)} of {each / 1e9:.3g} GB"
    share = machine.cores // max(1, most)
    return max(1, most), "a core each" if share == 1 else f"{share} cores each"


def _sliders(
    given: Given, instances: int, machine: Devices | Host, steps: Known | None, slo: SLO, room: float
) -> tuple[Sliders, int, str]:
    """The sliders, the tokens of a step that go with them, and where S_D is from. An instance has `room` for
    so many tokens of KV."""
    roomy = isinstance(machine, Devices) and machine.size >= ROOMY
    p_chunk = given.budget or (LARGE if roomy else MODEST)
    budget = given.budget or p_chunk + (given.seqs or SEQS)
    p_heavy = instances // SHARE
    if steps is not None:
        fluid = Fluid(steps.truth, slo, given.seqs or SEQS, room)
        # Where TTFT is too short for all of them small chunks would only make it longer: TPOT alone decides.
        patient = replace(fluid, slo=SLO(ENDLESS, slo.tpot))
        # Where no step is short enough the shortest ones are nearest to it.
        shortest = Sliders(p_heavy, instances - p_heavy, p_chunk, min(p_chunk, UNIT))
        suited = fluid.suited(instances, p_chunk) or patient.suited(instances, p_chunk) or shortest
        return suited, budget, steps.source
    if given.budget is not None and not p_heavy:
        d_chunk, whence = given.budget, GIVEN_WORD  # as vLLM's own server would have it
    else:
        d_chunk, whence = min(p_chunk, UNKNOWN_CHUNK), DEFAULT_WORD
    return Sliders(p_heavy, instances - p_heavy, p_chunk, d_chunk), budget, whence


# -------------------------------------------------------------------------------------------------- SLOs


def suiting(prompt: float, step: float) -> SLO:
    """SLOs that suit a machine on which a long prompt takes so many seconds, and a step of decodes."""
    return SLO(_up(PROMPTS * prompt, TTFT_GRAIN), _up(STEPS * step, TPOT_GRAIN))


def raised(start: Start, prompt: float, step: float) -> SLO:
    """The SLOs of a start once it was seen what a prompt and a step take (seconds): those that nobody gave or
    could know are raised where they could not be kept; never are they lowered."""
    seen = suiting(prompt, step)
    ttft = max(start.slo.ttft, seen.ttft) if "ttft" in start.unsure else start.slo.ttft
    return SLO(ttft, max(start.slo.tpot, seen.tpot) if "tpot" in start.unsure else start.slo.tpot)


def _up(seconds: float, grain: float) -> float:
    return round(math.ceil(seconds / grain - 1e-9) * grain, 6)


def _slo(given: Given, model: Model, steps: Known | None) -> tuple[SLO, dict[str, str]]:
    """The SLOs, and where each is from."""
    own, whence = DEFAULT, DEFAULT_WORD
    if steps is not None:
        tokens = min(PROMPT, model.limit)
        prompt = steps.truth.of(tokens, prompt_attention(tokens), 0, 0)
        own = suiting(prompt, steps.truth.of(0, 0.0, DECODES, DECODES * CONTEXT))
        whence = steps.source
    ttft = own.ttft if given.ttft is None else given.ttft
    tpot = own.tpot if given.tpot is None else given.tpot
    said = {"ttft": given.ttft, "tpot": given.tpot}
    return SLO(ttft, tpot), {name: whence if value is None else GIVEN_WORD for name, value in said.items()}


# ------------------------------------------------------------------------------------------------- words


def _machine(machine: Devices | Host, taken: int) -> str:
    if isinstance(machine, Host):
        return f"no slider given: {machine.cores} core{'s' * (machine.cores > 1)} of {machine.name}"
    idle = machine.count - taken
    return f"no slider given: {machine.count} x {machine.name}" + (f", {idle} idle" if idle > 0 else "")


def _split(sliders: Sliders) -> str:
    counts = {"P-heavy": sliders.p_heavy, "D-heavy": sliders.d_heavy}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _told(pairs: list[tuple[str, str]]) -> str:
    """What was chosen, with where it is from once for all that are from there in a row."""
    groups = groupby(pairs, key=lambda pair: pair[1])
    return ", ".join(f"{', '.join(what for what, _ in row)} ({whence})" for whence, row in groups)
