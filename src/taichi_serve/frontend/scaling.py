"""The routes that add instances to a server that serves, and take them away."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from taichi_serve.cluster.vllm.server.elastic import WITHIN, RefusedError, UnknownError
from taichi_serve.frontend.routes import bad, conflict, missing, object_of, system_of
from taichi_serve.frontend.scale import told
from taichi_serve.sliders import Kind

router = APIRouter(prefix="/taichi")
KINDS = {kind.value.lower(): kind for kind in Kind}
BODY = '{"kind": "d-heavy" or "p-heavy"}, with "devices" and "chunk" where they matter'
LONGEST = 86_400.0  # seconds that a drain may take


@router.post("/instances")
async def post_instance(request: Request) -> JSONResponse:
    """Start one more instance; its name at once. It takes part as soon as it is ready."""
    system, data = system_of(request), await object_of(request)
    if (why := _wrong(data, system.max_chunk)) is not None:
        return bad(*why)
    if system.front.closing:
        return conflict("the server is about to end")
    assert data is not None
    kind = KINDS[data["kind"].lower()]
    try:
        name = system.elastic.add(kind, data.get("devices"), data.get("chunk"))
    except RefusedError as why_not:
        return conflict(str(why_not))
    except ValueError as wrong:
        return bad(str(wrong))
    return JSONResponse({"name": name, "kind": kind.value, "standing": "starting"}, status_code=202)


@router.get("/scale")
async def get_scale(request: Request) -> JSONResponse:
    """How many instances of which kind the last minutes asked for, and why."""
    return JSONResponse(told(system_of(request).recorder, time.monotonic()))


def _wrong(data: dict[str, Any] | None, most: int) -> tuple[str, str | None] | None:
    """What is wrong with what is asked for, and with which part of it."""
    if not data or set(data) - {"kind", "devices", "chunk"}:
        return f"the body must be {BODY}", None
    kind, devices, chunk = data.get("kind"), data.get("devices"), data.get("chunk")
    if not isinstance(kind, str) or kind.lower() not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}, not {kind!r}", "kind"
    if devices is not None and not isinstance(devices, str):
        return f"devices must be a text, not {devices!r}", "devices"
    if chunk is not None and (
        isinstance(chunk, bool) or not isinstance(chunk, int) or not 0 <= chunk <= most
    ):
        return f"chunk must be a whole number from 0 to {most} (--max-num-batched-tokens)", "chunk"
    return None


@router.delete("/instances/{name}")
async def delete_instance(name: str, request: Request) -> JSONResponse:
    """Drain an instance, for `within` seconds at most, then end it and give its devices back. Whoever asks
    again is told how far that is."""
    system = system_of(request)
    try:
        within = float(request.query_params.get("within", WITHIN))
    except ValueError:
        within = math.nan
    if not 0 <= within <= LONGEST:
        return bad(f"within must be a number of seconds from 0 to {LONGEST:g}", "within")
    try:
        gone = system.elastic.remove(name, within)
    except UnknownError:
        return missing(f"no instance {name!r}; there are {', '.join(system.elastic.names())}")
    except RefusedError as why_not:
        return conflict(str(why_not))
    standing = "gone" if gone else "leaving"
    return JSONResponse({"name": name, "standing": standing}, status_code=200 if gone else 202)
