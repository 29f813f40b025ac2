"""Where the request models of an application have fields that only this system may set."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pydantic
from fastapi import FastAPI
from fastapi.routing import APIRoute
from vllm.config import ModelConfig
from vllm.entrypoints.generate.factories import get_generate_invocation_types

Path = tuple[str, ...]
MARKS = ("transfer_params", "data_parallel", "xargs", "extra_args", "kv_connector")


def bodies(app: FastAPI, model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Every type that a route parses a body into, with the route's path."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                yield route.path, field.field_info.annotation
    for kind, _ in get_generate_invocation_types(("generate",), model):
        yield "/invocations", kind


def marked(kind: Any, seen: frozenset[Any] = frozenset()) -> Iterator[Path]:
    """The fields below a type whose names steer transfers or ranks; "*" stands for an item of a list."""
    if kind in seen:
        return
    for name, annotation in _fields(kind).items():
        if any(mark in name for mark in MARKS):
            yield (name,)
        else:
            for path in _inside(annotation, seen | {kind}):
                yield (name, *path)
    if not _fields(kind):
        yield from _inside(kind, seen)


def _inside(annotation: Any, seen: frozenset[Any]) -> Iterator[Path]:
    origin = typing.get_origin(annotation)
    if origin is None:
        if _fields(annotation):
            yield from marked(annotation, seen)
        return
    many = isinstance(origin, type) and issubclass(origin, list | tuple | dict)
    for argument in typing.get_args(annotation):
        for path in _inside(argument, seen):
            yield ("*", *path) if many else path


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and typing.get_origin(kind) is None:
        if issubclass(kind, pydantic.BaseModel):
            return {name: field.annotation for name, field in kind.model_fields.items()}
        if issubclass(kind, msgspec.Struct):
            return {field.name: field.type for field in msgspec.structs.fields(kind)}
        if dataclasses.is_dataclass(kind):
            return typing.get_type_hints(kind)
    return {}
