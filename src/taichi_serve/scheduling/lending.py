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
        held = prefix[1]  # by its name it takes twice as long, and this is asked for every instance
        if held < lent or not held or not (instance := instances[name]).answers:
            continue
        if found is None or held > lent or instance.lends_until < found.lends_until:
            found, lent = instance, held
    return found, lent
