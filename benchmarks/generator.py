"""`vllm bench serve`, unmodified, in a process that stays: importing it takes longer than a short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from servers import ENVIRONMENT

# For each line of words on standard input one run; a byte on the real standard output when it is over.
PROGRAM = """
import json, os, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

answers = os.dup(1)
os.dup2(2, 1)
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    os.write(answers, b".")
"""


class Generator:
    """The load generator. `pid` is its process: what it uses is nobody else's."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        self.pid = self._process.pid

    def run(self, words: Sequence[str], directory: Path) -> dict[str, Any]:
        """One run with these words of `vllm bench serve`, and its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        where = ("--save-result", "--result-dir", str(directory), "--result-filename", "result.json")
        (directory / "result.json").unlink(missing_ok=True)
        self._process.stdin.write(json.dumps([*words, *where]).encode() + b"\n")
        self._process.stdin.flush()
        if not self._process.stdout.read(1):
            self._said.seek(0)
            raise AssertionError(self._said.read().decode(errors="replace")[-3000:])
        result: dict[str, Any] = json.loads((directory / "result.json").read_text())
        return result

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
