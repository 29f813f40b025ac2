"""A prefix that another instance fetches: what the prefix cache here holds of it, pinned while it is read.

vLLM puts blocks into its cache as it gives them out, in the belief that the step will fill them. So whoever
asks is answered when every step that was under way then is over, and a block that has left the cache by then
does not count: what should have filled it went wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from taichi_serve.cluster.vllm.core.loans import Loans
    from taichi_serve.cluster.vllm.core.pins import Pins

GROUP = 0  # what moves has one group of KV (groups.py)
SPARE = 0.05  # of all blocks, so many stay free for those who run here: a fetch is worth no preemption


@dataclass(slots=True)
class Asked:
    """A question that waits for steps to be over."""

    reader: str
    found: list[tuple[BlockHash, KVCacheBlock]]
    steps: int
    answer: Future[list[int]] = field(default_factory=Future)


class Prefixes:
    """Answers who asks for a prefix. `under_way` has the steps that were scheduled and are not taken in."""

    def __init__(
        self,
        manager: KVCacheManager,
        pins: Pins,
        under_way: Collection[object],
        stays: Collection[str],
        loans: Loans | None = None,
    ) -> None:
        self._pool = manager.block_pool
        self._pins = pins
        self._under_way = under_way
        self._stays = stays
        self._asked: list[Asked] = []
        self._loans = loans

    def ask(self, reader: str, hashes: list[bytes]) -> Future[list[int]] | list[int]:
        """The blocks with these hashes that are here, from the first one on and without a gap. They stay
        until the reader's pins are released. None, where those who run here would need their room. What only
        the host has is loaded first, if there is room."""
        if self._stays:
            return []
        found = self._found(hashes)
        if self._loans is not None:
            more = self._loans.on_host(hashes[len(found) :])
            if more and self._room(found, more):
                return self._loans.begin(reader, hashes[: len(found) + more])
        if not found or not self._room(found):
            return []
        answer: Future[list[int]] = Future()
        self._pin(reader, found, answer, len(self._under_way))
        return answer.result() if answer.done() else answer

    def _found(self, hashes: list[bytes]) -> list[tuple[BlockHash, KVCacheBlock]]:
        found = []
        for one in map(BlockHash, hashes):
            blocks = self._pool.get_cached_block(one, [GROUP])
            if blocks is None:
                break
            found.append((one, blocks[0]))
        return found

    def _pin(
        self, reader: str, found: list[tuple[BlockHash, KVCacheBlock]], answer: Future[list[int]], steps: int
    ) -> None:
        self._pins.hold(reader, [block for _, block in found])
        asked = Asked(reader, found, steps, answer)
        if steps:
            self._asked.append(asked)
        else:
            answer.set_result(self._still_here(asked))

    def _room(self, found: list[tuple[BlockHash, KVCacheBlock]], more: int = 0) -> bool:
        unused = sum(not block.ref_cnt for _, block in found)  # they leave the free ones when they are pinned
        left = self._pool.get_num_free_blocks() - unused - more
        return bool(not (unused + more) or left >= SPARE * self._pool.num_gpu_blocks)

    def nobody_asks(self) -> None:
        """Whoever waits for an answer is gone. What is pinned stays so."""
        self._asked = []
        for reader in self._loans.readers() if self._loans is not None else ():
            self.let_go(reader)

    def let_go(self, reader: str) -> None:
        """Nothing is read for it here any more, and nothing will be."""
        self._pins.unpin(reader)
        if self._loans is not None and (loan := self._loans.close(reader)) is not None:
            loan.answer.set_result([])

    def loaded(self) -> None:
        """The step that is being taken in may have brought blocks from the host."""
        if self._loans is None or not len(self._loans):
            return
        for loan in self._loans.over():
            self._loans.close(loan.reader)
            if found := self._found(loan.hashes):
                self._pin(loan.reader, found, loan.answer, 1 + len(self._under_way))
            else:
                loan.answer.set_result([])

    def step_over(self) -> None:
        """The oldest step under way was taken in."""
        if not self._asked:
            return
        waiting, self._asked = self._asked, []
        for asked in waiting:
            asked.steps -= 1
            if asked.steps > 0:
                self._asked.append(asked)
            else:
                asked.answer.set_result(self._still_here(asked))

    def _still_here(self, asked: Asked) -> list[int]:
        if not self._pins.holds(asked.reader):
            return []  # it is not wanted any more, and they may be anybody's
        numbers = []
        for one, block in asked.found:
            if block.block_hash != make_block_hash_with_group_id(one, GROUP):
                break
            numbers.append(block.block_id)
        return numbers
