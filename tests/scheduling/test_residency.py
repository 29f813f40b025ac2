"""What is known of prefix caches, block by block. Hashes are small numbers here; a block has 16 tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taichi_serve.messages import Cached, Tier
from taichi_serve.scheduling.residency import NOTHING, Prefix, Residency

FOUR = (11, 12, 13, 14)


def residency(*names: str) -> Residency:
    return Residency(names or ("i0", "i1", "i2"), 16)


def stored(name: str, *blocks: int, tier: Tier = Tier.DEVICE) -> Cached:
    return Cached(0.0, name, blocks, tier=tier)


def removed(name: str, *blocks: int, tier: Tier = Tier.DEVICE) -> Cached:
    return Cached(0.0, name, (), blocks, tier=tier)


def test_longest_prefix_of_every_instance() -> None:
    known = residency()
    known.learn(stored("i0", 11, 12, 13))
    known.learn(stored("i1", 11))
    assert known.match(FOUR, 100) == {"i0": Prefix(48, 48), "i1": Prefix(16, 16)}


def test_block_without_the_one_before_it_is_no_prefix() -> None:
    known = residency()
    known.learn(stored("i0", 12, 13, 14))
    known.learn(stored("i1", 11, 12))
    assert known.match(FOUR, 100) == {"i1": Prefix(32, 32)}


def test_last_token_is_always_computed() -> None:
    known = residency()
    known.learn(stored("i0", *FOUR))
    assert known.match(FOUR, 64)["i0"].cached == 48  # a full hit lacks its last block
    assert known.match(FOUR, 65)["i0"].cached == 64
    assert known.match((11,), 16) == NOTHING


def test_host_goes_on_where_the_device_ends() -> None:
    known = residency()
    known.learn(stored("i0", 11, 12))
    known.learn(stored("i0", 12, 13, tier=Tier.HOST))
    known.learn(removed("i0", 12))
    assert known.match(FOUR, 100) == {"i0": Prefix(16, 48)}


def test_removed_and_reset_are_known_at_once() -> None:
    known = residency()
    known.learn(stored("i0", *FOUR))
    known.learn(stored("i1", *FOUR))
    known.learn(removed("i0", 13, 14))
    assert known.match(FOUR, 100)["i0"] == Prefix(32, 32)
    known.learn(Cached(0.0, "i1", (11,), reset=True))
    assert known.match(FOUR, 100)["i1"] == Prefix(16, 16)
    known.learn(removed("i0", 11, 12))
    known.learn(removed("i1", 11))
    assert len(known) == 0


def test_lost_instance_holds_nothing_on_device_and_host() -> None:
    known = residency()
    known.learn(stored("i0", *FOUR))
    known.learn(stored("i0", *FOUR, tier=Tier.HOST))
    known.learn(stored("i1", 11))
    known.lose("i0")
    assert known.match(FOUR, 100) == {"i1": Prefix(16, 16)}


def test_what_is_removed_from_the_host_stays_on_the_device() -> None:
    known = residency()
    known.learn(stored("i0", 11))
    known.learn(stored("i0", 11, tier=Tier.HOST))
    known.learn(removed("i0", 11, tier=Tier.HOST))
    known.learn(removed("i0", 12, tier=Tier.HOST))  # of which nobody ever spoke
    assert known.match(FOUR, 100) == {"i0": Prefix(16, 16)}


def test_prefix_of_a_live_request_is_claimed_until_the_last_that_has_it_leaves() -> None:
    known = Residency(("i0", "i1", "i2"), 256)
    known.claim("i2", (11, 12, 13))
    known.claim("i2", (11, 12, 23))
    assert known.match(FOUR, 1_000) == {"i2": Prefix(claimed=3 * 256)}
    known.leave("i2", (11, 12, 13))
    assert known.match(FOUR, 1_000) == {"i2": Prefix(claimed=2 * 256)}
    known.leave("i2", (11, 12, 23))
    assert known.match(FOUR, 1_000) == NOTHING


def test_claims_are_counted_in_pieces_of_256_tokens() -> None:
    known, blocks = residency(), tuple(range(1, 41))
    known.claim("i0", blocks)
    assert known.match(blocks, 1_000) == {"i0": Prefix(claimed=512)}  # of 640
    assert dict(known.claims("i0")) == {16: 1, 32: 1}


def test_without_a_block_size_nothing_is_known() -> None:
    known = Residency(("i0",), 0)
    known.learn(stored("i0", *FOUR))
    assert known.match(FOUR, 100) == NOTHING
    assert residency().match((), 100) == NOTHING
    with pytest.raises(ValueError, match="makes no sense"):
        Residency(("i0",), -1)


def test_no_more_blocks_are_kept_in_mind_than_the_bound() -> None:
    known = Residency(("i0", "i1"), 16, most=3)
    known.learn(stored("i0", *FOUR))
    known.learn(stored("i1", *FOUR))
    assert len(known) == 3
    assert known.unknown == 2
    assert known.match(FOUR, 100) == {"i0": Prefix(48, 48), "i1": Prefix(48, 48)}
    known.learn(removed("i0", 13))
    known.learn(removed("i1", 13))
    known.learn(stored("i0", 15))
    assert known.holds("i0", Tier.DEVICE) == {11, 12, 15}


DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["store", "remove", "reset", "lose", "claim", "leave"]),
        st.integers(0, 2),
        st.sampled_from(list(Tier)),
        st.integers(0, 3),
        st.integers(0, 70),
    ),
    max_size=60,
)


@given(DEEDS)
def test_it_equals_plain_sets_whatever_happens(deeds: list[tuple[str, int, Tier, int, int]]) -> None:
    """Chains fork: block k of chain c is shared by all chains up to block 20. Where a block is removed, all
    that follow it are: caches drop a prefix from its end."""
    known = residency()
    plain: dict[tuple[str, Tier], set[int]] = {(f"i{n}", tier): set() for n in range(3) for tier in Tier}
    claims: dict[str, list[tuple[int, ...]]] = {f"i{n}": [] for n in range(3)}
    chains = [tuple(k if k < 20 else 100 * (c + 1) + k for k in range(70)) for c in range(4)]
    for what, n, tier, chain, length in deeds:
        name, blocks = f"i{n}", chains[chain][:length]
        if what == "store":
            known.learn(stored(name, *blocks, tier=tier))
            plain[name, tier] |= set(blocks)
        elif what == "remove":
            gone = [b for c in chains if c[:length] == blocks for b in c[length:]]
            known.learn(removed(name, *gone, tier=tier))
            plain[name, tier] -= set(gone)
        elif what == "reset":
            known.learn(Cached(0.0, name, blocks, reset=True, tier=tier))
            plain[name, tier] = set(blocks)
        elif what == "lose":
            known.lose(name)
            plain[name, Tier.DEVICE], plain[name, Tier.HOST] = set(), set()
        elif what == "claim":
            known.claim(name, blocks)
            claims[name].append(blocks)
        elif claims[name]:
            known.leave(name, claims[name].pop(chain % len(claims[name])))
        check(known, plain, claims, chains)


def check(
    known: Residency,
    plain: dict[tuple[str, Tier], set[int]],
    claims: dict[str, list[tuple[int, ...]]],
    chains: list[tuple[int, ...]],
) -> None:
    def run(chain: tuple[int, ...], *there: set[int]) -> int:
        return next((n for n, b in enumerate(chain) if not any(b in t for t in there)), len(chain)) * 16

    claimed = {name: Counter(b for blocks in each for b in blocks[15::16]) for name, each in claims.items()}
    for name, blocks in claimed.items():
        assert known.holds(name, Tier.DEVICE) == plain[name, Tier.DEVICE]
        assert known.holds(name, Tier.HOST) == plain[name, Tier.HOST]
        assert Counter(known.claims(name)) == blocks
    for chain in chains:
        found = known.match(chain, 2_000)
        for name, blocks in claimed.items():
            device, host = plain[name, Tier.DEVICE], plain[name, Tier.HOST]
            in_use = run(chain[15::16], set(blocks)) * 16
            here = Prefix(run(chain, device), run(chain, device, host), in_use)
            assert found.get(name, Prefix()) == here


def test_who_comes_later_takes_a_bit_that_is_free_and_more_are_made_when_none_is() -> None:
    known = residency()
    known.learn(Cached(1.0, "i1", (1, 2, 3)))
    known.learn(Cached(1.0, "i2", (1, 2), tier=Tier.HOST))
    bits = known.bits
    for number in range(3, bits):
        known.add(f"i{number}")
    assert known.bits == bits
    known.learn(Cached(2.0, f"i{bits - 1}", (1,)))
    known.add("late")  # all integers are made anew
    assert known.bits > bits
    known.learn(Cached(3.0, "late", (1, 2, 3, 4), tier=Tier.HOST))
    found = known.match((1, 2, 3, 4), 100)
    held = {name: (one.device, one.held) for name, one in found.items()}
    assert held == {"i1": (48, 48), "i2": (0, 32), f"i{bits - 1}": (16, 16), "late": (0, 64)}
    known.remove("i1")
    known.add("other")
    assert known.bit["other"] == 1
    assert "other" not in known.match((1, 2, 3, 4), 100)


def test_a_name_is_there_once_and_one_with_requests_on_it_cannot_be_forgotten() -> None:
    known = residency()
    with pytest.raises(ValueError, match="there is an instance i1 already"):
        known.add("i1")
    known.claim("i1", tuple(range(16)))
    with pytest.raises(ValueError, match="requests on i1 still claim blocks"):
        known.remove("i1")
