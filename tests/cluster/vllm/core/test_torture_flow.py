"""Whatever is read, fails, is late, dropped, aborted or preempted, in any order: no wrong token, nobody waits
for ever, no block is lost, none is given away while it is written into, and every step tells what is cached.
"""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm")

from flow_torture import torture

RUNS = 40


@pytest.mark.parametrize("batch", range(6))
def test_nothing_that_can_happen_between_instances_makes_a_wrong_token(batch: int) -> None:
    seen = tortured(batch, host=False)
    for what in (
        "ahead",
        "dropped",
        "moved",
        "read failed",
        "tail here",
        "tail failed",
        "unread",
        "preempted",
        "best effort preempted",
        "fetched",
        "found later",
        "fetch begun anew",
        "went without",
        "reset",
        "evicted",
    ):
        assert seen[what] > 0, what


@pytest.mark.parametrize("batch", range(3))
def test_nor_does_it_where_kv_is_offloaded_to_hosts_meanwhile(batch: int) -> None:
    seen = tortured(100 + batch, host=True)
    for what in ("stored", "loaded", "waited for", "host reset", "host told", "moved", "fetched", "unread"):
        assert seen[what] > 0, what


@pytest.mark.parametrize("host", [False, True])
def test_nor_where_the_server_is_killed_in_between_and_the_next_one_takes_the_engines(host: bool) -> None:
    seen = tortured(200, host=host, killed=200)
    for what in ("forgotten", "forgotten while read", "moved", "fetched"):
        assert seen[what] > 0, what


def tortured(batch: int, host: bool, killed: int | None = None) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(batch * RUNS, (batch + 1) * RUNS):
        faults, counts = torture(seed, host=host, killed=killed)
        assert faults == [], f"seed {seed}"
        seen += counts
    return seen


def test_a_run_is_told_by_its_seed() -> None:
    assert torture(7) == torture(7)
