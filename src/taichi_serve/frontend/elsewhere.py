"""Routes of vLLM's server that mean one engine, and have no meaning, or no safe one, over a cluster.

They answer 501 with these sentences. Everything else of vLLM's works on all instances (everywhere.py).
"""

from __future__ import annotations

_PAUSE = "Instances cannot be paused or put to sleep together yet: a paused one would count as lost."
_WEIGHTS = (
    "Weights cannot be exchanged while several instances serve: start the server anew with the new ones."
)
_SIZE = "The number of instances is set at the start: see PATCH /taichi/sliders for what can change."

NOT_HERE: dict[str, str] = {
    "/pause": _PAUSE,
    "/resume": _PAUSE,
    "/sleep": _PAUSE,
    "/wake_up": _PAUSE,
    "/release_kv_cache_memory": _PAUSE,
    "/init_weight_transfer_engine": _WEIGHTS,
    "/shutdown_weight_transfer_engine": _WEIGHTS,
    "/start_weight_update": _WEIGHTS,
    "/start_draft_weight_update": _WEIGHTS,
    "/update_weights": _WEIGHTS,
    "/finish_weight_update": _WEIGHTS,
    "/update_weight_version": _WEIGHTS,
    "/weight_checker": _WEIGHTS,
    "/get_world_size": _WEIGHTS,
    "/scale_elastic_ep": _SIZE,
}
