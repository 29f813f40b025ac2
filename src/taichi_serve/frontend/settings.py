"""The settings that a running server has now, as a file that `taichi serve --config` takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm import envs

from taichi_serve.classes import plain
from taichi_serve.cluster.vllm.settings import MASK

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System


def settings(system: System) -> dict[str, Any]:
    """What its command line said or the start chose, with what was changed since: sliders, SLOs, margins."""
    scheduler, said = system.scheduler, system.settings
    policy, slo = scheduler.policy, scheduler.slo
    now = {
        **asdict(scheduler.sliders),
        "ttft_slo": slo.ttft,
        "tpot_slo": slo.tpot,
        "ttft_margin": policy.ttft_margin,
        "tpot_margin": policy.tpot_margin,
        # Unsaid, it would follow from the chunks that the next start has.
        "max_num_batched_tokens": system.max_chunk,
    }
    if said.get("devices"):  # in the order of the kinds, as instances may have come and left
        engines = {engine.name: engine.index for engine in system.engines}
        groups = [system.elastic.devices.of(engines[name]) for name in scheduler.instances]
        now["devices"] = ";".join(groups)
    if system.classes:
        now["slo_classes"] = plain(system.classes)
    if not said.get("api_key") and envs.VLLM_API_KEY:
        now["api_key"] = [MASK]
    return {**said, **now}
