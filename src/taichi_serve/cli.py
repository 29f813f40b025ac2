"""The command `taichi`: the one file that knows every part. Parts are imported only when asked for."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
from collections.abc import Callable

USAGE = """usage: taichi COMMAND ...

  serve MODEL   serve a model on several vLLM instances (taichi serve --help=TaiChi)
  demo          serve a tiny model on this machine, send it 40 requests, and show where they went
  bench goodput the highest request rate at which a real server keeps its SLOs
  explain ID    where a request went, and why: of a running server, or out of an event log
  profile MODEL measure real instances: what predictions of a server can start from
  simulate      one configuration on a virtual cluster: goodput, TTFT, TPOT
  search        the best sliders for a workload and an SLO

Every command explains itself with --help."""


def main(argv: list[str] | None = None) -> int:
    """The command `taichi`: with no words given it is the whole process, and ends it."""
    if argv is not None:
        return command(argv)
    try:
        status = command(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # argparse: words that were wrong, or help that was asked for
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    # Not by way of the interpreter's teardown: Triton's bindings report whatever vLLM still holds as leaks.
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def command(words: list[str]) -> int:
    """Run one command; returns the exit status."""
    run: Callable[[list[str]], int]
    rest = words[1:]
    match words[:1]:
        case ["serve"]:
            from taichi_serve.frontend.server import main as serve

            run = serve
        case ["demo"]:
            from taichi_serve.commands.demo import main as demo

            run = demo
        case ["bench"]:
            from taichi_serve.commands.bench import main as bench

            run = bench
        case ["explain"]:
            from taichi_serve.commands.explain import main as explain

            run = explain
        case ["profile"]:
            from taichi_serve.commands.profile import main as profile

            run = profile
        case ["simulate"]:
            from taichi_serve.commands import simulate

            run = _parsed("simulate", simulate.__doc__, simulate.add_arguments, simulate.main)
        case ["search"]:
            from taichi_serve.commands import search

            run = _parsed("search", search.__doc__, search.add_arguments, search.main)
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
            return 0
        case _:
            print(f"taichi: unknown command {words[0]!r}\n\n{USAGE}", file=sys.stderr)
            return 2
    return run(rest)


def _parsed(
    name: str,
    text: str | None,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> Callable[[list[str]], int]:
    parser = argparse.ArgumentParser(prog=f"taichi {name}", description=text)
    add(parser)
    return lambda words: run(parser.parse_args(words))


if __name__ == "__main__":
    main()
