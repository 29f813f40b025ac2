"""vLLM's real application behind our door, with every route that it can have; no engine is there."""

from __future__ import annotations

import argparse
import os
from unittest import mock

from fastapi import FastAPI
from vllm.config import ModelConfig
from vllm.entrypoints.launchers.app import build_app
from vllm.tasks import POOLING_TASKS

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.frontend.application import furnish
from taichi_serve.tiny import cached_tiny_model

EVERY_ROUTE = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
EVERY_TASK = ("generate", "render", "transcription", "realtime", *POOLING_TASKS)
WORDS = ("--enable-tokenizer-info-endpoint", "--enable-offline-docs")
KEY = "a-key"


def arguments(*words: str) -> argparse.Namespace:
    """A command line of the tiny model."""
    return flags.parse([str(cached_tiny_model()), *words])


def application(
    *words: str, tasks: tuple[str, ...] = ("generate",), development: bool = True, closing: bool = False
) -> FastAPI:
    """The application that `taichi serve` with these words has; without an engine its routes fail inside."""
    args = arguments("--api-key", KEY, *words)
    environment = EVERY_ROUTE if development else {}
    with mock.patch.dict(os.environ, environment):
        app = build_app(args, tasks, ModelConfig(model=args.model))
    furnish(app, args, lambda: closing)
    return app
