"""A prefix that another instance fetches, and that only the host here has: it is loaded to the device first.

It is vLLM's scheduler that loads it, as it does for any prompt: for a request with the hashes that were asked
for, and tokens that stand for nothing. Such a request is in no step, ever: where nothing is to be loaded for
it, it is passed over (host_tier.py). When its blocks are here they are in the prefix cache, and it is over.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request, RequestStatus

from taichi_serve.cluster.vllm.wire import Marks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from taichi_serve.cluster.vllm.core.host_tier import HostTier


class Loan(NamedTuple):
    """Who asked for which blocks, and waits."""

    reader: str
    hashes: list[bytes]
    answer: Future[list[int]]


class Loans:
    """The loads of one scheduler that are made for others."""

    def __init__(self, scheduler: AsyncScheduler, tier: HostTier) -> None:
        self._scheduler = scheduler
        self._tier = tier
        self._loans: dict[str, Loan] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def readers(self) -> list[str]:
        """For whom something is loaded."""
        return [loan.reader for loan in self._loans.values()]

    def on_host(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks the host has, from the first one on."""
        return next((n for n, one in enumerate(hashes) if not self._tier.has(one)), len(hashes))

    def begin(self, reader: str, hashes: list[bytes]) -> Future[list[int]]:
        """Load what the device lacks of these blocks. It goes before prompts, as a request that moves in."""
        leg, size = _leg(reader), self._scheduler.block_size
        params = SamplingParams(max_tokens=1, extra_args=Marks(moved=True).entry())
        request = Request(leg, [0] * (len(hashes) * size + 1), params, None)
        request.block_hashes = [BlockHash(one) for one in hashes]
        loan = self._loans[leg] = Loan(reader, hashes, Future())
        self._tier.only_loads[leg] = False
        self._scheduler.add_request(request)
        return loan.answer

    def over(self) -> list[Loan]:
        """Those that are loaded by now, and those for which nothing is: there was no room, or nothing any
        more."""
        scheduler, found = self._scheduler, []
        for leg, loan in list(self._loans.items()):
            request = scheduler.requests.get(leg)
            if request is None:
                pass  # all requests were ended from outside
            elif leg in scheduler.finished_recving_kv_req_ids:
                scheduler._update_waiting_for_remote_kv(request)  # its blocks are in the prefix cache
                request.status = RequestStatus.WAITING
            elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or not self._tier.only_loads[leg]:
                continue
            found.append(loan)
        return found

    def close(self, reader: str) -> Loan | None:
        """Nothing is loaded for this reader any more, and nobody waits for that. What was, if it was."""
        leg = _leg(reader)
        loan = self._loans.pop(leg, None)
        if loan is not None:
            self._scheduler.finish_requests(leg, RequestStatus.FINISHED_ABORTED)
            del self._tier.only_loads[leg]
        return loan


def _leg(reader: str) -> str:
    return f"{reader}/loan"


def loans(scheduler: AsyncScheduler) -> Loans | None:
    """Those of a scheduler; None where nothing is on a host."""
    tier = getattr(scheduler.connector, "host_tier", None)
    return None if tier is None else Loans(scheduler, tier)
