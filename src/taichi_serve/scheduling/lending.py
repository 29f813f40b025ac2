"""Whose prefix of a prompt may be fetched by others."""

from __future__ import annotations

from collections.abc import Mapping

from taichi_serve.instance import Instance
from taichi_serve.scheduling.residency import Prefixes


def lender(prefixes: Prefixes, instances: Mapping[str, Instance]) -> tuple[Instance | None, int]:
    """Of those that answer the one with most of the prompt may lend, and of equals the one that has lent
    least; and how many tokens that is."""
    found, lent = None, 0
    for name, prefix in prefixes.items():
        instance = instances[name]
        if prefix.held < max(1, lent) or not instance.answers:
            continue
        if found is None or prefix.held > lent or instance.lends_until < found.lends_until:
            found, lent = instance, prefix.held
    return found, lent
