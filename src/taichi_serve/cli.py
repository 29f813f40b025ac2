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
  top           instances, requests and moves of a running server, live in the terminal
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
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # argparse: words that were wrong, or help that was asked for
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # whoever reads what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    # Not by way of the interpreter's teardown: Triton's bindings report whatever vLLM still holds as leaks.
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def command(words: list[str]) -> int:
    """Run one command; returns the exit status."""
    match words[:1]:
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
        case ["--version"]:
            from taichi_serve.commands.installed import versions

            print(versions())
        case [name] if name in COMMANDS:
            return COMMANDS[name]()(words[1:])
        case _:
            print(
                f"taichi: unknown command {words[0]!r}; there are {', '.join(COMMANDS)} (see taichi --help)",
                file=sys.stderr,
            )
            return 2
    return 0


Run = Callable[[list[str]], int]


def _serve() -> Run:
    from taichi_serve.commands.installed import without_engines

    if why := without_engines():
        return _refused("serve", why)
    try:
        from taichi_serve.frontend.server import main as run
    except ImportError as wrong:  # half an installation
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            raise
        return _refused("serve", f"vLLM is installed, but not whole: {wrong}")
    return run


def _refused(name: str, why: str) -> Run:
    def run(words: list[str]) -> int:
        print(f"taichi {name}: {why}", file=sys.stderr)
        return 2

    return run


def _demo() -> Run:
    from taichi_serve.commands.demo import main as run

    return run


def _bench() -> Run:
    from taichi_serve.commands.bench import main as run

    return run


def _explain() -> Run:
    from taichi_serve.commands.explain import main as run

    return run


def _top() -> Run:
    from taichi_serve.commands.top import main as run

    return run


def _profile() -> Run:
    from taichi_serve.commands.profile import main as run

    return run


def _simulate() -> Run:
    from taichi_serve.commands import simulate

    return _parsed("simulate", simulate.__doc__, simulate.add_arguments, simulate.main)


def _search() -> Run:
    from taichi_serve.commands import search

    return _parsed("search", search.__doc__, search.add_arguments, search.main)


COMMANDS: dict[str, Callable[[], Run]] = {
    "serve": _serve,
    "demo": _demo,
    "bench": _bench,
    "top": _top,
    "explain": _explain,
    "profile": _profile,
    "simulate": _simulate,
    "search": _search,
}


def _parsed(
    name: str,
    text: str | None,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> Run:
    from taichi_serve.commands.helping import EachDefaultOnce

    parser = argparse.ArgumentParser(prog=f"taichi {name}", description=text, formatter_class=EachDefaultOnce)
    add(parser)
    return lambda words: run(parser.parse_args(words))


if __name__ == "__main__":
    main()
