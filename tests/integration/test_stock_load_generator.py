"""vLLM's own load generator, unmodified, runs against the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import ENVIRONMENT, Server

from taichi_serve.tiny import cached_tiny_model

# `vllm bench serve`, for builds of vLLM whose console script does not start.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.parametrize("backend", ["openai-chat", "openai"])
def test_vllm_bench_serve_has_no_failures(backend: str, hybrid: Server, tmp_path: Path) -> None:
    path = "/v1/chat/completions" if backend == "openai-chat" else "/v1/completions"
    words = ["--backend", backend, "--base-url", hybrid.url, "--endpoint", path, "--model", "tiny"]
    words += ["--tokenizer", str(cached_tiny_model()), "--dataset-name", "random", "--ignore-eos"]
    words += ["--random-input-len", "200", "--random-output-len", "32", "--num-prompts", "16"]
    words += ["--request-rate", "8", "--goodput", "ttft:60000", "tpot:10000", "--seed", "1"]
    words += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    run = subprocess.run(
        [sys.executable, "-c", BENCH, *words],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (16, 0)
    assert result["total_output_tokens"] == 16 * 32
    assert result["request_goodput"] > 0
