"""What the core tells its workers with a step in which nothing is read, held or given back: nearly every one.

vLLM's metadata of such a step is as large as of any other; it is pickled, sent and unpickled with each. This
one travels by its name.
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

from taichi_serve.cluster.vllm.wire import Orders


class Nothing(NixlConnectorMetadata):
    """Metadata without content. There is one of it in each process, which nobody changes."""

    taichi = Orders()

    def __reduce__(self) -> str:
        """The name under which the other process has its own."""
        return "NOTHING"


NOTHING = Nothing()


def is_nothing(meta: NixlConnectorMetadata, orders: Orders) -> bool:
    """Whether workers have nothing to do for this metadata and these orders. The clock alone says nothing."""
    said = (value for name, value in vars(meta).items() if name != "scheduler_clock")
    return not (orders.copier or orders.awaited or any(said))
