"""vLLM's own command `vllm serve`, as a module: what stands beside ours in a comparison.

    python -m taichi_serve.cluster.vllm.stock MODEL [vLLM's flags]

The console script of vLLM asks for the version of the package `vllm` first, and does not start where it is
installed under another name, as its CPU build is. The server of `vllm.entrypoints.launchers.api_server` does,
but has one process that speaks HTTP where `vllm serve --data-parallel-size N` has N.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from taichi_serve.cluster.vllm.moved import cli_env_setup


def main(words: Sequence[str] | None = None) -> None:
    """Serve until told to end."""
    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(["serve", *(words if words is not None else sys.argv[1:])])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()
