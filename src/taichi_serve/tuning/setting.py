"""What tuning may set: the sliders, and the two margins of Algorithm 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from taichi_serve.scheduling.policy import Policy
from taichi_serve.sliders import Sliders

UNIT = 16  # chunks are multiples of so many tokens: a block of KV


def largest(seconds: Callable[[int], float], limit: float, most: int) -> int:
    """The largest chunk, of at most `most` tokens, with which a step takes at most `limit` seconds; 0 where
    none does."""
    low, high = 0, most // UNIT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seconds(middle * UNIT) <= limit else (low, middle - 1)
    return low * UNIT


@dataclass(frozen=True, slots=True)
class Setting:
    """Sliders, and the shares of the TTFT and TPOT SLOs that Algorithm 2 fills instances up to."""

    sliders: Sliders
    ttft_margin: float
    tpot_margin: float

    @classmethod
    def of(cls, sliders: Sliders, policy: Policy) -> Setting:
        """The one in force."""
        return cls(sliders, policy.ttft_margin, policy.tpot_margin)

    def policy(self, policy: Policy) -> Policy:
        """This policy with these margins."""
        return replace(policy, ttft_margin=self.ttft_margin, tpot_margin=self.tpot_margin)

    def with_d_chunk(self, tokens: float, most: int) -> Setting:
        """Another S_D, rounded, at most `most` and no more than S_P where there are P-heavy instances; no
        less than one unit where nobody else prefills."""
        sliders = self.sliders
        limit = min(most, sliders.p_chunk) if sliders.p_heavy else most
        d_chunk = min(round(tokens / UNIT) * UNIT, limit)
        if not sliders.p_heavy:
            d_chunk = max(UNIT, d_chunk)
            return replace(
                self, sliders=replace(sliders, p_chunk=max(sliders.p_chunk, d_chunk), d_chunk=d_chunk)
            )
        return replace(self, sliders=replace(sliders, d_chunk=max(0, d_chunk)))

    def with_p_heavy(self, count: int, most: int) -> Setting:
        """So many instances P-heavy, with a chunk of `most` tokens where S_P says nothing yet; the others are
        D-heavy. Raises ValueError where nobody could prefill."""
        s = self.sliders
        p_chunk = s.p_chunk if s.p_chunk >= max(1, s.d_chunk) else most
        return replace(self, sliders=Sliders(count, s.instances - count, p_chunk, s.d_chunk))

    def towards(self, target: Setting, most: int) -> Setting:
        """The target, or where its R_PD is more than one instance away: all of it with R_PD one instance from
        here, and S_D as far on its way. Where more instances decode each has fewer decodes, so that a larger
        chunk fits beside them, and where fewer are P-heavy it is needed."""
        count, chunk = self.sliders.p_heavy, self.sliders.d_chunk
        turns = target.sliders.p_heavy - count
        if abs(turns) <= 1:
            return target
        split = target.with_p_heavy(count + (1 if turns > 0 else -1), most)
        return split.with_d_chunk(chunk + (target.sliders.d_chunk - chunk) / abs(turns), most)

    def difference(self, other: Setting) -> str:
        """What `other` has otherwise, in the names of the paper: "S_D 256 -> 192, 4P4D -> 5P3D"."""
        ours, theirs = self._words(), other._words()
        return ", ".join(
            f"{name} {ours[name]} -> {theirs[name]}" for name in ours if ours[name] != theirs[name]
        )

    def _words(self) -> dict[str, str]:
        s = self.sliders
        return {
            "R_PD": f"{s.p_heavy}P{s.d_heavy}D",
            "S_P": str(s.p_chunk),
            "S_D": str(s.d_chunk),
            "TTFT margin": f"{self.ttft_margin:g}",
            "TPOT margin": f"{self.tpot_margin:g}",
        }
