"""The marks of a request, decoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taichi_serve.cluster.vllm.wire import KEY, NO_MARKS, Marks, marks

if TYPE_CHECKING:
    from vllm.v1.request import Request


def marks_of(request: Request) -> Marks:
    """Our entry in the request's sampling parameters. It is looked at for every token, so what was decoded
    takes the place of what came."""
    params = request.sampling_params
    if params is None or params.extra_args is None:
        return NO_MARKS
    found = params.extra_args.get(KEY)
    if found is not None and not isinstance(found, Marks):
        found = params.extra_args[KEY] = marks(params.extra_args)
    return found or NO_MARKS


def remark(request: Request, new: Marks) -> None:
    """These are its marks from now on."""
    assert request.sampling_params is not None and request.sampling_params.extra_args is not None
    request.sampling_params.extra_args[KEY] = new
