"""The three sliders of the paper: how many instances of each kind, and the chunk of either kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

# Whether the sliders set themselves, or it is only said how they would be set, or neither: --autotune.
OFF, SUGGEST, ON = "off", "suggest", "on"
MODES = OFF, SUGGEST, ON


class Kind(Enum):
    """What an instance leans towards. Every instance can do both phases."""

    P_HEAVY = "P-heavy"
    D_HEAVY = "D-heavy"


@dataclass(frozen=True, slots=True)
class Sliders:
    """R_PD as two counts, S_P and S_D in prompt tokens per step (paper, section 4).

    The modes are values: aggregation is every instance D-heavy with one chunk, disaggregation is P-heavy
    with the largest chunk beside D-heavy with chunk 0, and the hybrid is everything between.
    """

    p_heavy: int
    d_heavy: int
    p_chunk: int
    d_chunk: int

    def __post_init__(self) -> None:
        for name in ("p_heavy", "d_heavy", "p_chunk", "d_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
        if self.instances == 0:
            raise ValueError("at least one instance is needed: p_heavy + d_heavy is 0")
        if self.p_heavy and not self.p_chunk:
            raise ValueError("p_chunk must be at least 1: a P-heavy instance that cannot prefill is useless")
        if not self.p_heavy and not self.d_chunk:
            raise ValueError("d_chunk is 0 and there is no P-heavy instance: nobody could prefill")
        if self.p_heavy and self.p_chunk < self.d_chunk:
            raise ValueError(f"p_chunk ({self.p_chunk}) must not be below d_chunk ({self.d_chunk})")

    @property
    def instances(self) -> int:
        """How many instances there are in all."""
        return self.p_heavy + self.d_heavy

    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every instance, P-heavy ones first."""
        return (Kind.P_HEAVY,) * self.p_heavy + (Kind.D_HEAVY,) * self.d_heavy

    def count(self, kind: Kind) -> int:
        """How many instances are of this kind."""
        return self.p_heavy if kind is Kind.P_HEAVY else self.d_heavy

    def chunk(self, kind: Kind) -> int:
        """Prompt tokens that an instance of this kind may take into one step."""
        return self.p_chunk if kind is Kind.P_HEAVY else self.d_chunk

    def more(self, kind: Kind, chunk: int | None = None) -> Sliders:
        """With one more of this kind. The chunk belongs to the kind: the first of a kind may bring one, and
        takes the other kind's where it brings none and its own would not do. Raises ValueError where the
        chunk is another than that of the kind, or does not fit the other kind's."""
        if self.count(kind):
            if chunk not in (None, self.chunk(kind)):
                raise ValueError(f"the chunk of {kind.value} instances is {self.chunk(kind)}, not {chunk}")
            return self._with(kind, self.count(kind) + 1)
        if kind is Kind.D_HEAVY:
            d_chunk = min(self.d_chunk, self.p_chunk) if chunk is None else chunk
            return replace(self, d_heavy=1, d_chunk=d_chunk)
        p_chunk = max(self.p_chunk, self.d_chunk) if chunk is None else chunk
        return replace(self, p_heavy=1, p_chunk=p_chunk)

    def less(self, kind: Kind) -> Sliders:
        """With one less of this kind. Raises ValueError where nobody would be left, or nobody who could
        prefill."""
        return self._with(kind, self.count(kind) - 1)

    def _with(self, kind: Kind, count: int) -> Sliders:
        return replace(self, p_heavy=count) if kind is Kind.P_HEAVY else replace(self, d_heavy=count)
