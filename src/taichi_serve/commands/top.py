"""`taichi top`: the live page of a running server in a terminal, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import httpx
import msgspec
from rich.console import Console
from rich.live import Live

from taichi_serve.bench.sse import Events
from taichi_serve.commands.helping import EachDefaultOnce
from taichi_serve.commands.picture import Picture, render
from taichi_serve.commands.records import NoAnswerError
from taichi_serve.dashboard.rows import Update

SILENT = 12.0  # seconds; the server says at least every five that it lives
AGAIN = 1.0  # seconds between two attempts to reach it
RATES = 1.2  # seconds after which rates are known
REDRAWN = 4  # times a second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(default: $OPENAI_API_KEY)"
    )
    parser.add_argument("--once", action="store_true", help="print how it stands now, and end")


def main(argv: list[str]) -> int:
    """`taichi top` with these words; the exit status."""
    parser = argparse.ArgumentParser(
        prog="taichi top",
        description="Instances, requests and moves of a running server, live.",
        formatter_class=EachDefaultOnce,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        asyncio.run(once(args, console) if args.once or not console.is_terminal else follow(args, console))
    except NoAnswerError as wrong:
        print(f"taichi top: {wrong}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def once(args: argparse.Namespace, console: Console) -> None:
    """One picture, of a second or two; raises NoAnswerError where the server gives none."""
    seen = Picture()
    await _watch(args, seen, RATES)
    console.print(render(seen, args.url))


async def follow(args: argparse.Namespace, console: Console) -> None:
    """Pictures until somebody ends it. Raises NoAnswerError where the server was not there at first; where it
    goes away later it is awaited."""
    seen, link = Picture(), f"{args.url}: connecting"
    with Live(
        console=console, screen=True, refresh_per_second=REDRAWN, get_renderable=lambda: render(seen, link)
    ):
        while True:
            try:
                link = args.url
                await _watch(args, seen)
            except NoAnswerError as wrong:
                if seen.standing is None:
                    raise
                link = f"{wrong}; trying again"
            await asyncio.sleep(AGAIN)


async def _watch(args: argparse.Namespace, seen: Picture, seconds: float | None = None) -> None:
    """Feed the picture until the stream ends, or for so many seconds of the server's clock."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    route = f"{args.url.rstrip('/')}/taichi/events"
    limits = httpx.Timeout(10.0, read=SILENT)
    try:
        async with (
            httpx.AsyncClient(headers=headers, timeout=limits, trust_env=False) as client,
            client.stream("GET", route) as answer,
        ):
            if answer.status_code != 200:
                raise NoAnswerError(f"{route}: {_why(await answer.aread(), answer.status_code)}")
            events, first = Events(), float("inf")
            async for chunk in answer.aiter_raw():
                for data in events.feed(chunk):
                    if data == "{}":  # the server says goodbye
                        return
                    update = msgspec.json.decode(data, type=Update)
                    seen.apply(update)
                    first = update.at if update.whole else first
                    if seconds is not None and update.at - first >= seconds:
                        return
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as wrong:
        raise NoAnswerError(f"no answer from {args.url}: {str(wrong) or type(wrong).__name__}") from wrong


def _why(body: bytes, status: int) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return f"HTTP {status}"
