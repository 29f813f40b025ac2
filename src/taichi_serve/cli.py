"""The command `taichi`: the one file that knows every part. Parts are imported only when they are asked for."""

from __future__ import annotations

import sys

USAGE = """usage: taichi COMMAND ...

  serve MODEL   serve a model on several vLLM instances (taichi serve --help=TaiChi)
  demo          serve a tiny model on this machine, send it 40 requests, and show where they went

Every command explains itself with --help."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    match words:
        case ["serve", *rest]:
            from taichi_serve.frontend.server import main as serve

            return serve(rest)
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
            return 0
        case [unknown, *_]:
            print(f"taichi: unknown command {unknown!r}\n\n{USAGE}", file=sys.stderr)
            return 2
    return 2


if __name__ == "__main__":
    sys.exit(main())
