"""Several servers of vLLM's own behind a proxy, as one server, to stand beside ours in a comparison.

    python -m taichi_serve.commands.proxied --model MODEL --instances 2 --prefill 1 --port P [vLLM's flags]

With `--prefill 0` the proxy sends each request to the next one. Otherwise it is vLLM's own prefill/decode
disaggregation over NIXL, as its documentation has it: every server has its NixlConnector, a request goes to
the next one of those that prefill for its first token, and with the KV parameters of that answer to the next
one of those that decode, whose answer is the user's. The first token is made twice, and the user gets the
second one of these: that is how it is done there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from types import FrameType
from typing import Any
from uuid import uuid4

import httpx

from taichi_serve.bench.client import swift
from taichi_serve.commands.gpus import VISIBLE
from taichi_serve.commands.stock import BINDING, StockServer, stock_environment
from taichi_serve.ports import LOOPBACK, port_of, reserve

SIDE_HOST, SIDE_PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
PATHS = ("/v1/completions", "/v1/chat/completions")
ALIKE = ("/health", "/version", "/v1/models")
LEAVE_SECONDS = 2  # for what is under way when the proxy is told to end
REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
Body = dict[str, Any]


class ProxiedServers(StockServer):
    """All of them and the proxy, as a child process: it answers /health when all are ready."""

    module: tuple[str, ...] = ("taichi_serve.commands.proxied", "--model")


def prefill_body(body: Body) -> Body:
    """What is asked of the server that prefills: one token, and that its KV is kept for another server."""
    limits: Body = {name: 1 for name in ("max_tokens", "max_completion_tokens", "min_tokens") if name in body}
    asked = {name: value for name, value in body.items() if name != "stream_options"}
    remote = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(REMOTE)}
    return {**asked, "max_tokens": 1, **limits, "stream": False, "kv_transfer_params": remote}


def environment(number: int, instances: int, side_port: int, devices: str) -> dict[str, str]:
    """Of one of the servers: its side channel, its GPUs, and on a CPU its own cores."""
    bound = stock_environment(instances)
    if BINDING in bound:
        bound[BINDING] = bound[BINDING].split("|")[number]
    return {**bound, VISIBLE: devices, SIDE_HOST: LOOPBACK, SIDE_PORT: str(side_port)}


def groups(devices: str | None, instances: int, ranks: int) -> list[str]:
    """The GPUs of each server: as said in "0,1;2,3", or so many after the other of those that there are."""
    if devices is not None:
        return devices.split(";")
    visible = os.environ.get(VISIBLE, "").split(",")
    every = [str(n) for n in range(instances * ranks)] if visible == [""] else visible
    return [",".join(every[n * ranks : (n + 1) * ranks]) for n in range(instances)]


class Proxy:
    """Sends every request to two servers, one after the other, or to one where none prefills for the others;
    those of a kind take turns."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], client: httpx.AsyncClient) -> None:
        """With the URLs of the servers."""
        self._prefill, self._decode, self._client = cycle(prefill), cycle(decode), client
        self._splits, self._first = bool(prefill), decode[0]

    async def complete(self, request: Any) -> Any:
        """A completion, streamed or not."""
        from starlette.responses import Response, StreamingResponse

        body, path = await request.json(), request.url.path
        headers = {"X-Request-Id": uuid4().hex}
        if self._splits:
            first = f"{next(self._prefill)}{path}"
            made = await self._client.post(first, json=prefill_body(body), headers=headers)
            if made.status_code != 200:
                kind = made.headers.get("content-type")
                return Response(made.content, made.status_code, media_type=kind)
            body |= {"kv_transfer_params": made.json().get("kv_transfer_params")}
        where = f"{next(self._decode)}{path}"
        asked = self._client.build_request("POST", where, json=body, headers=headers)
        answer = await self._client.send(asked, stream=True)
        kind = answer.headers.get("content-type")
        return StreamingResponse(_through(answer), answer.status_code, media_type=kind)

    async def ask(self, request: Any) -> Any:
        """What all of them answer alike is asked of one."""
        from starlette.responses import Response

        answer = await self._client.get(f"{self._first}{request.url.path}")
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    def application(self) -> Any:
        """Its routes, for an ASGI server."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [Route(path, self.complete, methods=["POST"]) for path in PATHS]
        return Starlette(routes=[*routes, *(Route(path, self.ask) for path in ALIKE)])


async def _through(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Its bytes as they come. A client that leaves ends the request."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


async def served(urls: Sequence[str], prefill: int, host: str, port: int) -> None:
    """The proxy before these servers, until it is told to end."""
    import uvicorn

    async with httpx.AsyncClient(timeout=None, transport=swift(), trust_env=False) as client:
        application = Proxy(urls[:prefill], urls[prefill:], client).application()
        quiet = {"log_level": "warning", "timeout_graceful_shutdown": LEAVE_SECONDS}
        await uvicorn.Server(uvicorn.Config(application, host, port, **quiet)).serve()


async def ready(servers: Sequence[StockServer]) -> None:
    """Wait until all of them answer. Raises ServerError."""

    async def one(server: StockServer) -> None:
        async for _ in server.sayings():
            pass

    await asyncio.gather(*(one(server) for server in servers))


def parsed(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own words, and those that are vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=1, help="how many of them (0: each does both)")
    parser.add_argument("--devices", help='GPUs of each one, as in "0,1;2,3" (default: one after the other)')
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    return parser.parse_known_args(words)


def main(words: Sequence[str]) -> None:
    """Start all, serve, and stop all, however it ends."""
    args, flags = parsed(words)
    ranks = args.tensor_parallel_size
    common = [args.model, *flags, "--tensor-parallel-size", str(ranks)]
    common += ["--kv-transfer-config", json.dumps(TRANSFER)] if args.prefill else []
    devices = groups(args.devices, args.instances, ranks)
    signal.signal(signal.SIGTERM, _leave)
    servers: list[StockServer] = []
    with ExitStack() as stack:
        side: list[socket.socket] = [stack.enter_context(reserve()) for _ in range(args.instances)]
        try:
            for number in range(args.instances):
                own = environment(number, args.instances, port_of(side[number]), devices[number])
                servers.append(StockServer(common, own))
            asyncio.run(ready(servers))
            asyncio.run(served([one.url for one in servers], args.prefill, args.host, args.port))
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda one: one.stop(keep=False), servers))


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
