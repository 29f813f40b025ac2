"""The command `taichi`: the one file that knows every part. Parts are imported only when they are asked for."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn

USAGE = """usage: taichi COMMAND ...

  serve MODEL   serve a model on several vLLM instances (taichi serve --help=TaiChi)
  demo          serve a tiny model on this machine, send it 40 requests, and show where they went
  explain ID    where a request of a running server went, and why

Every command explains itself with --help."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    match words:
        case ["serve", *rest]:
            from taichi_serve.frontend.server import main as serve

            return serve(rest)
        case ["demo", *rest]:
            from taichi_serve.commands.demo import main as demo

            return demo(rest)
        case ["explain", *rest]:
            from taichi_serve.commands.explain import main as explain

            return explain(rest)
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
            return 0
        case [unknown, *_]:
            print(f"taichi: unknown command {unknown!r}\n\n{USAGE}", file=sys.stderr)
            return 2
    return 2


def program() -> NoReturn:
    """The command as a process of its own."""
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    # Not by way of the interpreter's teardown: Triton's bindings report whatever vLLM still holds as leaks.
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    program()
