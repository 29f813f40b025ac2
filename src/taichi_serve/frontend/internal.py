"""Parameters that only this system may set, and where vLLM's requests have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Words that steer KV transfers and choose ranks; vLLM would trust them from anybody.
PARAMETERS = ("kv_transfer_params", "ec_transfer_params", "data_parallel_rank")
# Beside these, what we ourselves put among the extra arguments of a request (wire.py).
EXTRA = (*PARAMETERS, "taichi")
HEADERS = ("x-data-parallel-rank",)
# Fields whose words become extra arguments of vLLM's SamplingParams, and fields that hold such an object.
EXTRA_FIELDS = ("vllm_xargs", "extra_args")
SAMPLING_FIELDS = ("sampling_params",)


def forbidden(data: Any) -> str | None:
    """The internal parameter that a parsed body tries to set, or None.

    It looks where a request model of vLLM has them, and nowhere else: a prompt or the schema of a tool may
    use these words. `null` sets nothing. A test compares the places with the models of all routes.
    """
    if not isinstance(data, Mapping):
        return None
    places: list[tuple[Any, tuple[str, ...]]] = [(data, PARAMETERS)]
    for holder in (data, *(data.get(name) for name in SAMPLING_FIELDS)):
        if isinstance(holder, Mapping):
            places += [(holder.get(name), EXTRA) for name in EXTRA_FIELDS]
    for place, names in places:
        if isinstance(place, Mapping):
            for name in names:
                if place.get(name) is not None:
                    return name
    return None
