"""Every process of a server stands still while KV moves: the server's own, the engine cores, their workers;
for each time, directly and over NIXL.

    python benchmarks/stalls.py [--seconds 5 35 45 90] [--victims server "target worker"] [--over auto nixl]

Streams are compared, token by token, with what one instance says; the same prompts are sent once more
afterwards, since a wrong block may have stayed in a prefix cache. The exit status is 1 when one differed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from servers import Server
from stalls import FLAGS, SCARCE, VICTIMS, WISHES, said, stall


async def tried(server: Server, over: str, args: argparse.Namespace, reference: list[list[int]]) -> int:
    """All stalls of one server; how many of them made a wrong token."""
    bad = 0
    for victim in args.victims:
        for seconds in args.seconds:
            began = time.monotonic()
            outcome = await stall(server, victim, seconds, reference)
            found = [*outcome.wrong, *outcome.wrong_again]
            bad += bool(found)
            print(
                f"{over:5} {victim:14} {seconds:4.0f} s  {found or 'identical'}, "
                f"longest gap {outcome.longest_gap:5.1f} s, {outcome.begun} had begun, "
                f"{time.monotonic() - began:4.0f} s in all",
                flush=True,
            )
            server.quiet(60)
    return bad


async def run(args: argparse.Namespace, directory: Path) -> int:
    """Both paths side by side: they sleep most of the time."""
    single = Server(directory / "single", "--d-heavy", "1")
    servers = {
        over: Server(directory / over, *FLAGS, *SCARCE, "--kv-over", over)
        for over in dict.fromkeys(args.over)
    }
    try:
        reference = [answer.tokens for answer in await said(single.wait_ready(), WISHES)]
        single.end()
        ready = {over: server.wait_ready() for over, server in servers.items()}
        return sum(await asyncio.gather(*(tried(s, over, args, reference) for over, s in ready.items())))
    finally:
        for server in (single, *servers.values()):
            server.end()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[5, 35, 45, 90])
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--over", nargs="+", choices=("auto", "nixl"), default=["auto", "nixl"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bad = asyncio.run(run(args, Path(directory)))
    print(f"{bad} stalls made a wrong token")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
