"""Who may come in: every route asks for the key, but for those that say nothing."""

from __future__ import annotations

import argparse

from starlette.datastructures import Headers
from starlette.types import Scope
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from taichi_serve.frontend.page import OPEN as PAGE
from taichi_serve.frontend.probes import OPEN as PROBES

# Whether the server lives and is ready, which vLLM it is, and the files of the page, which ask for a key
# before they show anything. Exactly these paths, so that a new route is closed.
OPEN = frozenset({"/health", "/ping", "/version"}) | PROBES | PAGE
METRICS = frozenset({"/metrics", "/metrics/"})


def path_of(scope: Scope) -> str:
    """The path that the routes see: without the prefix of a proxy."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class Keys:
    """The keys of a server. Without any, everybody may come in."""

    def __init__(self, keys: list[str], metrics_open: bool = False) -> None:
        # vLLM's own comparison, in constant time; its middleware around it guards only some prefixes.
        self._verify = AuthenticationMiddleware(lambda *_: None, keys).verify_token if keys else None
        self._open = OPEN | METRICS if metrics_open else OPEN

    @classmethod
    def of(cls, args: argparse.Namespace) -> Keys:
        """The keys of a command line; without `--api-key` that of $VLLM_API_KEY."""
        keys = args.api_key or ([envs.VLLM_API_KEY] if envs.VLLM_API_KEY else [])
        return cls(keys, args.metrics_without_key)

    def open(self, scope: Scope) -> bool:
        """Whether nobody is asked for a key here, and no body is read."""
        return path_of(scope) in self._open or _preflight(scope) or _browser_at_root(scope)

    def admit(self, scope: Scope, headers: Headers) -> bool:
        """Whether this request or websocket may come in."""
        return self._verify is None or self.open(scope) or self._verify(headers)


def _browser_at_root(scope: Scope) -> bool:
    # Somebody who typed the address: a browser sends no key, and is led to the page.
    if path_of(scope) != "/" or scope.get("method") != "GET":
        return False
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _preflight(scope: Scope) -> bool:
    # Browsers ask so before a request, never with a key; the CORS middleware answers, and no route sees it.
    if scope.get("method") != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names
