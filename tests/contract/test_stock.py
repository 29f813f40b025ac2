"""What vLLM's own server must be like to stand beside ours in a comparison."""

from __future__ import annotations

import argparse
import inspect
import json
from importlib.util import find_spec

import pytest
from vllm import envs
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.entrypoints.cli import serve
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.utils.argparse_utils import FlexibleArgumentParser

from taichi_serve.cluster.vllm import stock
from taichi_serve.cluster.vllm.args import make_parser
from taichi_serve.cluster.vllm.moved import make_arg_parser
from taichi_serve.commands.compare import CALM
from taichi_serve.commands.proxied import SIDE_HOST, SIDE_PORT, TRANSFER, prefill_body
from taichi_serve.commands.stock import BINDING, ENTRY, KV_SPACE, OURS, SWITCHES, stock_flags


def parsed(words: list[str]) -> argparse.Namespace:
    """As `vllm serve` reads them."""
    parser = FlexibleArgumentParser()
    serve.ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser.parse_args(["serve", *words])


def test_its_server_is_a_module_that_takes_ranks_and_a_budget() -> None:
    assert find_spec(ENTRY) is not None
    words = ["m", *stock_flags(("--p-heavy", "1"), 2, 192), "--host", "127.0.0.1", "--port", "1"]
    args = parsed(words)
    assert (args.model_tag, args.data_parallel_size, args.max_num_batched_tokens) == ("m", 2, 192)


def test_its_server_has_as_many_processes_that_speak_http_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []
    monkeypatch.setattr(serve, "run_multi_api_server", lambda args: began.append(args.api_server_count))
    monkeypatch.setattr(stock, "cli_env_setup", lambda: None)
    stock.main(["m", *stock_flags((), 2, 192)])
    assert began == [2]


def test_ranks_on_a_cpu_are_bound_and_given_kv_by_the_environment() -> None:
    assert {BINDING, KV_SPACE} <= set(envs.environment_variables)


def test_flags_that_are_not_for_it_are_all_of_ours() -> None:
    ours = next(a for a in make_parser()._actions if a.dest == "subparser").choices["serve"]
    group = next(group for group in ours._action_groups if group.title == "TaiChi")
    names = {action.option_strings[0].removeprefix("--"): action.nargs for action in group._group_actions}
    assert {name for name, nargs in names.items() if nargs == 0} == set(SWITCHES)
    assert {name for name, nargs in names.items() if nargs != 0} == set(OURS)


def test_an_idle_worker_leaves_its_core_alone_before_the_machine_is_probed() -> None:
    assert inspect.signature(SpinCondition).parameters["busy_loop_s"].default < CALM


def test_its_servers_hand_kv_over_by_parameters_of_requests_and_answers() -> None:
    words = ["--model", "m", "--kv-transfer-config", json.dumps(TRANSFER)]
    config = make_arg_parser(FlexibleArgumentParser()).parse_args(words).kv_transfer_config
    assert config.kv_connector in KVConnectorFactory._registry
    assert {SIDE_HOST, SIDE_PORT} <= set(envs.environment_variables)
    asked = CompletionRequest(**prefill_body({"model": "m", "prompt": [1], "min_tokens": 4, "stream": True}))
    assert (asked.max_tokens, asked.min_tokens, asked.stream) == (1, 1, False)
    assert asked.kv_transfer_params["do_remote_decode"]
    assert "kv_transfer_params" in CompletionResponse.model_fields
