"""Which instance has how much of a prompt: what prefix caches hold, and what live requests will put there.

A block is known by its hash, which stands for all blocks before it too. What the caches hold is told by facts
(Cached); what live requests hold or are about to is claimed by the ledger as they come and go, so that two
prompts with one prefix find each other before a block of it is computed. Nothing here decides anything.

Memory: about 150 bytes for each block that some cache holds, however many hold it, and 100 for every 256
tokens of a live prompt on an instance. Eight instances with 2.0M tokens each, in blocks of 16, are a million
blocks. No more than `most` are kept in mind; those told beyond that are not known, which costs a hit and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from taichi_serve.messages import Cached, Tier

MOST = 4_000_000  # blocks: 600 MB
CLAIMED = 256  # tokens: what live requests have is counted in pieces of so many, or of a block


class Prefix(NamedTuple):
    """How much of a prompt one instance has, each in tokens from its start."""

    device: int = 0  # in its prefix cache
    held: int = 0  # there or on its host
    claimed: int = 0  # of requests that are on it: their blocks are in use, or will be computed before

    @property
    def cached(self) -> int:
        """Tokens that will not have to be computed there."""
        return max(self.claimed, self.held)


NONE = Prefix()
Runs = list[tuple[int, int]]  # a set of bits, and how much each of them has
Prefixes = Mapping[str, Prefix]  # by instance; who has nothing is not in it
NOTHING: Prefixes = {}


class Residency:
    """Block hash to the instances that have it, and the longest prefix that each of them has of a prompt.

    For every block one integer, in which each instance has a bit for its device, and `bits` further one for
    its host. Some bits are nobody's: who comes later takes one, and only where none is left all integers are
    made anew.
    """

    def __init__(self, names: Sequence[str], block_size: int, most: int = MOST) -> None:
        """`block_size` is the tokens that a hash stands for, 0 where no prefixes are known; `most` is a
        number of blocks."""
        if block_size < 0 or most < 1:
            raise ValueError(f"a block of {block_size} tokens, or at most {most} blocks, makes no sense")
        self.block_size = block_size
        self.most = most
        self._stride = max(1, CLAIMED // block_size) if block_size else 1  # blocks
        self.unknown = 0  # blocks told of when there were `most` already
        self.bits = len(names) + spare(len(names))
        self.bit: dict[str, int] = {}  # of each instance, its number
        self._bit: dict[tuple[str, Tier], int] = {}
        self._where: dict[int, int] = {}
        self._hosts = False  # whether any host was ever told to hold something
        self._claims: dict[str, dict[int, int]] = {}
        self._claimed: dict[int, int] = {}  # who has such a claim: a bit for each instance
        for name in names:
            self.add(name)

    def __len__(self) -> int:
        """Blocks that some cache is known to hold."""
        return len(self._where)

    # ------------------------------------------------------------------------------------ who there is

    def add(self, name: str) -> None:
        """One more instance, of which nothing is known yet. Raises ValueError where there is one already."""
        if name in self.bit:
            raise ValueError(f"there is an instance {name} already")
        if len(self.bit) == self.bits:
            self._widen()
        taken = set(self.bit.values())
        self.bit[name] = next(number for number in range(self.bits) if number not in taken)
        self._name(name)
        self._claims[name] = {}

    def remove(self, name: str) -> None:
        """An instance leaves. Raises ValueError where a request claims something there."""
        if self._claims[name]:
            raise ValueError(f"requests on {name} still claim blocks")
        self.lose(name)
        del self.bit[name], self._claims[name]
        for tier in Tier:
            del self._bit[name, tier]

    def _name(self, name: str) -> None:
        for tier in Tier:
            self._bit[name, tier] = 1 << (self.bit[name] + self.bits * (tier is Tier.HOST))

    def _widen(self) -> None:
        before, self.bits = self.bits, self.bits + spare(self.bits)
        device = (1 << before) - 1
        self._where = {
            block: mask & device | mask >> before << self.bits for block, mask in self._where.items()
        }
        for name in self.bit:
            self._name(name)

    # -------------------------------------------------------------------------------------------- facts

    def learn(self, fact: Cached) -> None:
        """Book what a cache stored and removed."""
        bit = self._bit[fact.instance, fact.tier]
        self._hosts = self._hosts or fact.tier is Tier.HOST
        if fact.reset:
            self._forget(bit)
        where = self._where
        for block in fact.stored:
            mask = where.get(block)
            if mask is not None:
                where[block] = mask | bit
            elif len(where) < self.most:
                where[block] = bit
            else:
                self.unknown += 1
        for block in fact.removed:
            mask = where.get(block, 0)
            if mask & bit:
                _put(where, block, mask ^ bit)

    def lose(self, name: str) -> None:
        """An instance is gone, with its host's copies. What is claimed there ends with each request."""
        self._forget(self._bit[name, Tier.DEVICE] | self._bit[name, Tier.HOST])

    def claim(self, name: str, blocks: Sequence[int]) -> None:
        """A request with these blocks is on this instance."""
        claims, claimed, bit = self._claims[name], self._claimed, 1 << self.bit[name]
        for block in self._pieces(blocks):
            count = claims.get(block, 0)
            claims[block] = count + 1
            if not count:
                claimed[block] = claimed.get(block, 0) | bit

    def leave(self, name: str, blocks: Sequence[int]) -> None:
        """It is there no more."""
        claims, claimed, bit = self._claims[name], self._claimed, 1 << self.bit[name]
        for block in self._pieces(blocks):
            count = claims[block]
            if count > 1:
                claims[block] = count - 1
            else:
                del claims[block]
                _put(claimed, block, claimed[block] ^ bit)

    def _pieces(self, blocks: Sequence[int]) -> Sequence[int]:
        # The last block of a piece stands for all before it, too.
        return blocks[self._stride - 1 :: self._stride]

    def _forget(self, bits: int) -> None:
        self._where = {block: left for block, mask in self._where.items() if (left := mask & ~bits)}

    # ------------------------------------------------------------------------------------------ questions

    def match(self, blocks: Sequence[int], tokens: int) -> Prefixes:
        """What every instance has of a request that comes with so many tokens, whose first have these
        hashes. The last token is always computed: a prompt that is cached as a whole lacks its last block."""
        size, bits = self.block_size, self.bits
        found: dict[str, Prefix] = {}
        held, claimed = self.runs(blocks, tokens)
        if not (held or claimed):
            return NOTHING
        caches, piece = _spread(held, bits + self.hosts), self._stride * size
        claims, hosts = _spread(claimed, bits), self.hosts
        new = tuple.__new__  # Prefix(...) itself takes twice as long, and this is done for every instance
        for name, n in self.bit.items():
            if (host := caches[n + hosts]) or claims[n]:
                found[name] = new(Prefix, (caches[n] * size, host * size, claims[n] * piece))
        return found

    def runs(self, blocks: Sequence[int], tokens: int) -> tuple[Runs, Runs]:
        """The same as bits and how many blocks, or pieces of blocks, these have: of caches, where the bit of
        a host (`hosts` further) counts what its device has, and of claims."""
        size = self.block_size
        if size and len(blocks) * size >= tokens:
            blocks = blocks[: (tokens - 1) // size]
        if not (size and blocks):
            return [], []
        held = _runs(self._where, blocks, self.hosts)
        return held, _runs(self._claimed, self._pieces(blocks), 0)

    @property
    def hosts(self) -> int:
        """How much further the bit of a host is than that of its device; 0 while no host holds anything, for
        then both have the same."""
        return self.bits if self._hosts else 0

    @property
    def piece(self) -> int:
        """Tokens of a piece, in which claims are counted."""
        return self._stride * self.block_size

    def holds(self, name: str, tier: Tier) -> set[int]:
        """The blocks that an instance is known to hold: for tests, it looks at every block."""
        bit = self._bit[name, tier]
        return {block for block, mask in self._where.items() if mask & bit}

    def claims(self, name: str) -> Mapping[int, int]:
        """How many requests on this instance have each of their pieces, by the hash of its last block."""
        return self._claims[name]


def spare(count: int) -> int:
    """How many bits there are for those who come later, beside so many instances."""
    return max(8, count // 8)


def _put(where: dict[int, int], block: int, mask: int) -> None:
    if mask:
        where[block] = mask
    else:
        del where[block]


def _runs(where: Mapping[int, int], blocks: Sequence[int], hosts: int) -> Runs:
    """How many of the blocks each bit has from the first on; a host, `hosts` bits further than its device,
    counts what the device has.

    Who has a block is taken to have all before it: caches drop a prefix from its end, and a claim is of a
    whole prompt. So each end is found by bisection. Who has not the first block has nothing.
    """
    found: Runs = []
    if not blocks:
        return found
    get, most = where.get if not hosts else _counting(where, hosts), len(blocks)
    left = get(blocks[0], 0)
    whole = left & get(blocks[-1], 0)
    have = 1  # so many blocks do all of those have that are left
    while left & ~whole:
        lost, now = most, left & whole  # and so many not all of them
        while lost - have > 1:
            middle = (have + lost) // 2
            there = left & get(blocks[middle - 1], 0)
            if there == left:
                have = middle
            else:
                lost, now = middle, there
        found.append((left ^ now, have))
        left, have = now, lost
    if left:
        found.append((left, most))
    return found


def _counting(where: Mapping[int, int], hosts: int) -> Callable[[int, int], int]:
    """What `where.get` says, where the bit of a host counts what its device has."""
    get, all_bits = where.get, (1 << 2 * hosts) - 1

    def having(block: int, nobody: int) -> int:
        mask = get(block, nobody)
        return (mask | mask << hosts) & all_bits

    return having


def _spread(runs: Runs, count: int) -> list[int]:
    lengths = [0] * count
    for bits, length in runs:
        for number in _numbers(bits):
            lengths[number] = length
    return lengths


@lru_cache(1 << 12)  # few instances have ever the same part of a prompt
def _numbers(bits: int) -> tuple[int, ...]:
    return tuple(number for number in range(bits.bit_length()) if bits >> number & 1)
