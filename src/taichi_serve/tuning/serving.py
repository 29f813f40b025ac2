"""What the tuner asks the scheduler that serves."""

from __future__ import annotations

from taichi_serve.scheduling.scheduler import GlobalScheduler


def calm(core: GlobalScheduler) -> bool:
    """Whether every instance serves and is what the sliders say: no drain, no loss, nobody silent."""
    instances = core.instances.values()
    kinds = core.sliders.kinds()
    return all(i.serving and i.kind is kind for i, kind in zip(instances, kinds, strict=True))


def made(core: GlobalScheduler, name: str) -> int:
    """Output tokens of a request under way."""
    request = core.requests.get(name)
    if request is None:
        return 0
    here = core.ledger.source(request)
    return request.output_tokens(here.ticks) if here else request.base
