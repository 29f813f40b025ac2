"""The command line of `taichi serve`: vLLM's own, with the sliders and the SLOs added to it.

It is vLLM's parser, so a command line of `vllm serve` can be pasted and an unknown flag fails as it does
there. The engine processes parse the same command line again: configuration is never pickled.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from taichi_serve.classes import Classes, read_classes
from taichi_serve.cluster.vllm import unsaid
from taichi_serve.cluster.vllm.cluster_host import cluster_host, on_hosts
from taichi_serve.cluster.vllm.edges import edges
from taichi_serve.cluster.vllm.front_ends import front_ends
from taichi_serve.cluster.vllm.misuse import given, one_line_given
from taichi_serve.cluster.vllm.moved import make_arg_parser, validate_parsed_serve_args
from taichi_serve.cluster.vllm.options import FLAGS, TITLE, add_options
from taichi_serve.cluster.vllm.patience import Patience
from taichi_serve.cluster.vllm.refused import refusal
from taichi_serve.cluster.vllm.settings import Recording, expanded, name_of
from taichi_serve.cluster.vllm.transfer import host_bytes, transfer_config
from taichi_serve.cluster.vllm.unsaid import complete
from taichi_serve.latency.profile import Profile
from taichi_serve.latency.shipped import measured
from taichi_serve.scheduling.policy import FETCH, SERVE, Policy
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER = "taichi_serve.cluster.vllm.core.scheduler.FlowScheduler"
# Several CPU instances share one memory: each takes at most this much for KV unless told otherwise.
CPU_KV_BYTES = 1 << 30


class OneLineParser(Recording, FlexibleArgumentParser):
    """vLLM's parser; what is wrong is said in one line, as pydantic's words are several."""

    def error(self, message: str) -> NoReturn:
        """Say it, and exit with status 2."""
        self._print_message(f"{self.prog}: error: {' '.join(message.split())}\n", sys.stderr)
        raise SystemExit(2)


def make_parser() -> OneLineParser:
    """vLLM's serve parser with a group of our own."""
    parser = OneLineParser(prog="taichi")
    commands = parser.add_subparsers(dest="subparser")
    serve = commands.add_parser(
        "serve",
        description="Serve one model on several vLLM instances. Every flag of `vllm serve` applies to each "
        "instance; `--help=TaiChi` shows the flags added here, `--help=all` everything.",
        usage="taichi serve MODEL [--p-heavy N --d-heavy N ...] [any flag of vllm serve]",
    )
    make_arg_parser(serve)
    serve.set_defaults(model=None)  # vLLM would serve a model of its own choice
    add_options(serve)
    return parser


def serving(parser: OneLineParser) -> OneLineParser:
    """The part of the parser that takes the words after `taichi serve`."""
    commands: Any = next(action for action in parser._actions if action.dest == "subparser")
    found: OneLineParser = commands.choices["serve"]
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the words after `taichi serve`; exits as argparse does when they are wrong. `args.argv` has them
    with what a file of `--config` says in its place, and `args.settings` what such a file would say."""
    parser = make_parser()
    serve = serving(parser)
    args = _parsed(parser, serve, argv)
    if (why := refusal(serve, args)) is not None:
        parser.error(why)
    args.watermark = 0.0  # vLLM's own, which our flag displaced
    said = serve.given(args)
    try:
        complete(args)
        _check_keys(args)
        validate_parsed_serve_args(args)
        sliders(args)
        slo(args)
        classes(args)
        supervision(args)
        cluster_host(args)
        on_hosts(args)
        host_bytes(args)
        policy(args)
        patience(args)
        profile(args)
        front_ends(args)
    except (TypeError, ValueError, VLLMError) as error:
        words = str(error)
        told = words if words.startswith("--slo-classes") else _with_flags(words)
        parser.error(told if "--" in told else told + given(args.argv))
    args.settings = _settings(serve, args, said)
    return args


def _parsed(parser: OneLineParser, serve: OneLineParser, argv: list[str]) -> argparse.Namespace:
    try:
        words = expanded(argv, serve)
        args = parser.parse_args(["serve", *words])
    except ValueError as wrong:  # of a file of settings, or vLLM's own
        parser.error(str(wrong))
        raise  # never: it has ended the process
    args.argv = words
    if args.model_tag is not None:
        args.model = args.model_tag
    if not args.model:
        parser.error("no MODEL: a directory, or a name on the Hugging Face Hub (as --model, too)")
    return args


def _settings(serve: OneLineParser, args: argparse.Namespace, said: dict[str, Any]) -> dict[str, Any]:
    """What a file of `--config` would say: all flags of ours, and those of vLLM that were given."""
    group = next(group for group in serve._action_groups if group.title == TITLE)
    ours = {name_of(action): getattr(args, action.dest) for action in group._group_actions}
    known = {name: value for name, value in ours.items() if value is not None}
    elsewhere = {*ours, "model", "data_parallel_size"}  # how many instances there are is said by the sliders
    others = {name: value for name, value in said.items() if name not in elsewhere}
    return {"model": args.model, **known, **others}


def _check_keys(args: argparse.Namespace) -> None:
    for key in () if args.api_key is None else (args.api_key or [""]):
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ValueError(
                "--api-key needs printable ASCII characters without spaces around them: "
                "an empty key would leave the door open, and others cannot be sent in a header"
            )
    if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
        raise ValueError(
            "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION cannot be used: two requests with one id would be mixed up"
        )


def _with_flags(message: str) -> str:
    """An error of a value object in the words of the command line: its fields are our flags."""
    message = message.replace("ttft SLO", "--ttft-slo").replace("tpot SLO", "--tpot-slo")
    names = "|".join(name.replace("-", "_") for name, *_ in FLAGS)
    return re.sub(rf"(?<![\w-])({names})\b", lambda m: "--" + m[1].replace("_", "-"), message)


sliders = unsaid.sliders  # of a parsed command line


def supervision(args: argparse.Namespace) -> None:
    """Raises ValueError where the number of restarts makes no sense."""
    if args.restarts < 0:
        raise ValueError(f"--restarts must be at least 0, not {args.restarts}")


def slo(args: argparse.Namespace) -> SLO:
    """The SLOs of a parsed command line."""
    return SLO(args.ttft_slo, args.tpot_slo)


def classes(args: argparse.Namespace) -> Classes:
    """The classes of a parsed command line. A key of one must be a key of the server."""
    if args.slo_classes is None:
        return {}
    try:
        found = read_classes(args.slo_classes)
        known = args.api_key or [envs.VLLM_API_KEY]
        for one in found.values():
            if not set(one.keys) <= set(known):
                raise ValueError(f"class {one.name}: one of its keys is no key of the server (--api-key)")
    except ValueError as wrong:
        raise ValueError(f"--slo-classes: {wrong}") from None
    return found


def policy(args: argparse.Namespace) -> Policy:
    """The policy of a parsed command line. A low watermark is most likely vLLM's flag of that name."""
    if args.degrade_watermark < 0.5:
        raise ValueError(
            f"--watermark {args.degrade_watermark} is below 0.5: here it is the share of KV memory above "
            "which requests are degraded; vLLM's own flag of that name (a share to keep free) is not there"
        )
    knobs = args.degrade_watermark, args.alpha, args.ttft_margin, args.tpot_margin
    if args.overload != SERVE and args.scheduling_policy != "fcfs":
        said = f"--scheduling-policy {args.scheduling_policy}"
        raise ValueError(f"{said} cannot be used with --overload {args.overload}")
    fetch, within = args.prefixes == FETCH, args.move_timeout
    known = tuple(replace(one, keys=()) for one in classes(args).values())  # keys are nobody's business there
    late, fair = args.overload, args.fair_classes
    return Policy(
        *knobs, ahead=True, fetch=fetch, fetch_within=within, overload=late, classes=known, fair=fair
    )


def patience(args: argparse.Namespace) -> Patience:
    """What a parsed command line waits for."""
    return Patience(args.move_timeout, args.stall_timeout)


def profile(args: argparse.Namespace) -> Profile | None:
    """The profile that a parsed command line names; raises ProfileError naming the file and the field."""
    return None if args.profile is None else measured(args.profile)


def engine_config(argv: list[str], engine_id: str, directory: str = "") -> VllmConfig:
    """vLLM's configuration of one instance, from the server's command line.

    All instances get the same step budget, so that a D-heavy one can turn P-heavy while serving. Raises
    ValueError with one line where vLLM, or we, cannot serve with it.
    """
    args = parse(argv)
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        _set(engine_args, args, engine_id, directory)
        config = engine_args.create_engine_config()
    except Exception as error:
        raise ValueError(one_line_given(error, argv)) from error
    _check(config, sliders(args))
    return config


def _set(engine_args: AsyncEngineArgs, args: argparse.Namespace, engine_id: str, directory: str) -> None:
    engine_args.scheduler_cls = SCHEDULER
    engine_args.kv_transfer_config = transfer_config(
        engine_id, directory, args.kv_over == "auto", host_bytes(args)
    )
    promised = [slo(args), *(one.slo(slo(args)) or slo(args) for one in classes(args).values())]
    engine_args.custom_histogram_buckets = edges(promised, engine_args.custom_histogram_buckets)
    engine_args.kv_offloading_size = None  # vLLM would put its own connector in the place of ours
    chosen = sliders(args)
    if engine_args.max_num_batched_tokens is None:
        seqs = engine_args.max_num_seqs or 256
        engine_args.max_num_batched_tokens = max(chosen.p_chunk, chosen.d_chunk, 2048) + seqs
    unsaid = engine_args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if current_platform.is_cpu() and unsaid:
        engine_args.kv_cache_memory_bytes = CPU_KV_BYTES
    if chosen.instances > 1 or front_ends(args) > 1:
        # The front end would believe that every engine has what one of them was sent.
        engine_args.mm_processor_cache_gb = 0


def _check(config: VllmConfig, chosen: Sliders) -> None:
    """What vLLM would start, and we could not serve with."""
    if config.model_config.runner_type != "generate":
        raise ValueError("it is a pooling model, and only models that generate are served")
    if not config.scheduler_config.enable_chunked_prefill:
        raise ValueError("vLLM cannot prefill this model in chunks, and instances differ in nothing else")
    largest = max(chosen.chunk(kind) for kind in chosen.kinds())
    budget = config.scheduler_config.max_num_batched_tokens
    if largest > budget:
        raise ValueError(f"a chunk of {largest} tokens is above --max-num-batched-tokens {budget}")
