"""Whose KV goes when an instance has no free block left: one rule for engines and for those in miniature.

Only an engine knows in time that a block is missing, so the scheduler does not decide it. It decides who is
best effort, and whoever accepts a request knows whether it is bound to its instance; an engine is told both.
"""

from __future__ import annotations

Rank = tuple[bool, bool, bool]


def rank(*, best_effort: bool, bound: bool, prompt: bool) -> Rank:
    """The rank of a request among those that run on an instance, the lowest first. Of those with the highest
    the youngest loses its KV: it waits, and all its tokens are computed again.

    Best effort goes before everybody else; then who could go on elsewhere, before who has a token and is
    `bound` to the instance; then a `prompt`, whose tokens are not all computed, before a decode.
    """
    return best_effort, not bound, prompt
