"""The routes under /taichi: look at the cluster, move its sliders, move its requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from taichi_serve.cluster.vllm.settings import text
from taichi_serve.dashboard.story import lines
from taichi_serve.frontend.errors import error
from taichi_serve.frontend.parsed import strictly
from taichi_serve.frontend.settings import settings
from taichi_serve.frontend.state import state
from taichi_serve.messages import Asked, Drained, Promised, Slid
from taichi_serve.request import State
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System

router = APIRouter(prefix="/taichi")
YAML = "application/yaml"


def system_of(request: Request) -> System:
    """The running system."""
    system: System = request.app.state.taichi
    return system


def bad(message: str, parameter: str | None = None) -> JSONResponse:
    """A request that cannot be understood."""
    return error(400, "invalid_request_error", message, parameter)


def missing(message: str) -> JSONResponse:
    """There is no such thing."""
    return error(404, "not_found_error", message)


def conflict(message: str) -> JSONResponse:
    """It cannot be done now."""
    return error(409, "conflict_error", message)


async def object_of(request: Request) -> dict[str, Any] | None:
    """The body as an object, empty where there is none; None where it is no object, or no JSON. Raises
    Refusal where it is JSON that is not taken (parsed.py)."""
    body = await request.body()
    try:
        data = strictly(body) if body else {}
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


@router.get("/state")
async def get_state(request: Request) -> JSONResponse:
    """Sliders, instances and counters, now."""
    return JSONResponse(state(system_of(request)))


@router.get("/config", response_class=Response, responses={200: {"content": {YAML: {}}}})
async def get_config(request: Request) -> Response:
    """The settings that the server has now, in YAML: a file for `taichi serve --config`. Keys are masked."""
    return Response(text(settings(system_of(request))), media_type=YAML)


def _behind(system: System, request_id: str) -> list[str]:
    """The engine requests behind one request of a client: the latest with this id, and a live one first."""
    histories = system.recorder.histories
    if request_id in histories:
        return [request_id]
    found = system.front.behind(request_id)
    live = [names for names in found if any(name in system.scheduler.requests for name in names)]
    return [name for name in (live or found or [[]])[0] if name in histories]


# An id may have any character, slashes too: it is all between "/requests/" and the end.
@router.get("/requests/{request_id:path}")
async def get_request(request_id: str, request: Request) -> JSONResponse:
    """The legs and decisions of a request, by its id in the OpenAI response; its `story` is the same in
    words: seconds since its arrival, what happened, and why."""
    system = system_of(request)
    found = _behind(system, request_id)
    if not found:
        return missing(f"no request {request_id!r} among the last ones")
    views = [system.recorder.view(name) for name in found]
    told = [{**view, "story": list(lines(view))} for view in views]
    return JSONResponse({"id": request_id, "requests": told})


@router.post("/requests/{request_id:path}/flow")
async def post_flow(request_id: str, request: Request) -> JSONResponse:
    """Move a running request to the instance named in {"to": ...}."""
    system = system_of(request)
    data = await object_of(request)
    if data is None or not isinstance(data.get("to"), str) or set(data) != {"to"}:
        return bad('the body must be {"to": "<instance>"}', "to")
    target = system.scheduler.instances.get(data["to"])
    if target is None:
        return missing(f"no instance {data['to']!r}; there are {', '.join(system.scheduler.instances)}")
    if not target.answers:
        why = "does not answer at present" if target.alive else "is not alive"
        return conflict(f"instance {target.name} {why}")
    found = _behind(system, request_id)
    if not found:
        return missing(f"no request {request_id!r} among the last ones")
    asked = [name for name in found if _can_move(system, name)]
    if not asked:
        return conflict(_why_not(system, found))
    for name in asked:
        system.cluster.tell(Asked(time.monotonic(), name, target.name))
    return JSONResponse({"id": request_id, "to": target.name, "asked": asked}, status_code=202)


def _can_move(system: System, name: str) -> bool:
    live = system.scheduler.requests.get(name)
    return live is not None and live.state is State.DECODING and live.movable


def _why_not(system: System, found: list[str]) -> str:
    live = [r for name in found if (r := system.scheduler.requests.get(name)) is not None]
    if not live:
        return "the request is over"
    if not any(r.movable for r in live):
        return "the request is bound to its instance: it could not be moved exactly (docs/moving.md)"
    return f"the request is {live[0].state.value}, and only a decoding one can be moved"


@router.patch("/sliders")
async def patch_sliders(request: Request) -> JSONResponse:
    """Change chunks, or turn instances from one kind into the other; their number stays."""
    system = system_of(request)
    data = await object_of(request)
    names = ("p_heavy", "d_heavy", "p_chunk", "d_chunk")
    if not data:
        return bad(f"the body must be an object with some of {', '.join(names)}")
    if unknown := sorted(set(data) - set(names)):
        return bad(f"unknown slider {unknown[0]!r}; there are {', '.join(names)}", unknown[0])
    now = system.scheduler.sliders
    try:
        sliders = Sliders(**{name: data.get(name, getattr(now, name)) for name in names})
    except ValueError as wrong:
        return bad(str(wrong))
    if sliders.instances != now.instances:
        return bad(f"p_heavy + d_heavy must stay {now.instances}: POST /taichi/instances adds one")
    for name in ("p_chunk", "d_chunk"):
        if getattr(sliders, name) > system.max_chunk:
            return bad(f"{name} must be at most {system.max_chunk} (--max-num-batched-tokens)", name)
    system.cluster.tell(Slid(time.monotonic(), sliders))
    return JSONResponse({name: getattr(sliders, name) for name in names})


@router.patch("/slo")
async def patch_slo(request: Request) -> JSONResponse:
    """Promise another TTFT or TPOT (seconds) from now on, to those under way too."""
    system = system_of(request)
    data = await object_of(request)
    names = ("ttft", "tpot")
    if not data:
        return bad(f"the body must be an object with some of {', '.join(names)}")
    if unknown := sorted(set(data) - set(names)):
        return bad(f"unknown SLO {unknown[0]!r}; there are {', '.join(names)}", unknown[0])
    now = system.scheduler.slo
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return bad(f"{name} must be a number of seconds, not {value!r}", name)
    try:
        promised = SLO(**{name: float(data.get(name, getattr(now, name))) for name in names})
    except OverflowError:
        return bad("ttft and tpot must be numbers of seconds, and not as large as that")
    except ValueError as wrong:
        return bad(str(wrong))
    system.cluster.tell(Promised(time.monotonic(), promised))
    return JSONResponse({name: getattr(promised, name) for name in names})


@router.post("/instances/{name}/drain")
async def post_drain(name: str, request: Request) -> JSONResponse:
    """Its running requests flow away, and new ones avoid it."""
    return _drain(system_of(request), name, on=True)


@router.post("/instances/{name}/resume")
async def post_resume(name: str, request: Request) -> JSONResponse:
    """It takes new requests again."""
    return _drain(system_of(request), name, on=False)


def _drain(system: System, name: str, on: bool) -> JSONResponse:
    instance = system.scheduler.instances.get(name)
    if instance is None:
        return missing(f"no instance {name!r}; there are {', '.join(system.scheduler.instances)}")
    if not instance.alive:
        return conflict(f"instance {name} is not alive")
    if name in system.elastic.leaving:
        return conflict(f"instance {name} leaves")
    others = [i for i in system.scheduler.instances.values() if i.serving and i is not instance]
    if on and not others:
        return conflict(f"instance {name} is the last one that serves")
    system.cluster.tell(Drained(time.monotonic(), name, on))
    return JSONResponse({"instance": name, "draining": on}, status_code=202)
