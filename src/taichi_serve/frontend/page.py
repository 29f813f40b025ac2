"""The live page: its files, which are open because they hold nothing, and the stream of what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from taichi_serve.dashboard.files import FILES, INDEX, File
from taichi_serve.frontend.errors import error

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System

# The browser runs what this server sent and nothing else, asks nobody else, and shows the page in no other.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy would gather updates
RETRY = 5  # seconds, for a viewer too many

# No key is asked for here (keys.py).
OPEN = frozenset({"/taichi", "/taichi/", *(f"/taichi/page/{name}" for name in FILES)})

router = APIRouter(include_in_schema=False)


@router.get("/")
async def get_root(request: Request) -> Response:
    """A browser is led to the page; for everybody else there is nothing here, as before."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("taichi/")
    return error(404, "not_found_error", "Not Found.")


@router.get("/taichi")
async def get_page_without_slash() -> Response:
    """The page's own links are relative to the path with the slash."""
    return RedirectResponse("taichi/")


@router.get("/taichi/")
async def get_page() -> Response:
    """The page."""
    return _answer(FILES[INDEX])


@router.get("/taichi/page/{name}")
async def get_file(name: str) -> Response:
    """A file of the page."""
    found = FILES.get(name)
    return error(404, "not_found_error", "Not Found.") if found is None else _answer(found)


@router.get("/taichi/events")
async def get_events(request: Request) -> Response:
    """What the page shows, as server-sent events: everything, then what changes."""
    system: System = request.app.state.taichi
    if system.viewers.full:
        return error(503, "overloaded_error", "Too many look at the page.", retry_after=RETRY)
    return StreamingResponse(system.viewers.stream(), media_type="text/event-stream", headers=STREAM)


def _answer(file: File) -> Response:
    return Response(file.content, media_type=file.type, headers=HEADERS)
