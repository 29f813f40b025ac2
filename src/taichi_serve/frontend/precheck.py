"""What a command line asks of the front end, tried before any instance is started."""

from __future__ import annotations

import argparse
import importlib
import ssl
from collections.abc import Callable
from pathlib import Path

from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from taichi_serve.frontend.traced import refuse as _traces


def precheck(args: argparse.Namespace) -> None:
    """Raise ValueError, with one line that names the flag, where the HTTP server could not be made."""
    for flags, check in CHECKS.items():
        try:
            check(args)
        except Exception as wrong:
            raise ValueError(f"{flags}: {_said(wrong)}") from wrong


def _said(wrong: Exception) -> str:
    match wrong:
        case OSError(strerror=str(words)) | KeyError(args=(str(words),)):
            pass
        case _:
            words = str(wrong)
    return " ".join(words.split()) or type(wrong).__name__


def _plugins(args: argparse.Namespace) -> None:
    for path, load in (
        (args.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (args.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if path and not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
        if path:
            load(path)


def _parsers(args: argparse.Namespace) -> None:
    validate_api_server_args(args)
    if args.tool_call_parser and args.tool_call_parser not in (known := ToolParserManager.list_registered()):
        raise ValueError(f"no tool parser {args.tool_call_parser}; there are {', '.join(known)}")


def _certificates(args: argparse.Namespace) -> None:
    if not args.ssl_certfile:
        if asked := [name for name in ("keyfile", "ca_certs") if getattr(args, f"ssl_{name}")]:
            raise ValueError(f"{asked[0]} without a certificate serves nothing over TLS")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, lambda: "")  # nobody is there to be asked
    if args.ssl_ca_certs:
        context.load_verify_locations(args.ssl_ca_certs)
    if args.ssl_ciphers:
        context.set_ciphers(args.ssl_ciphers)
    ssl.VerifyMode(args.ssl_cert_reqs)


def _middleware(args: argparse.Namespace) -> None:
    for name in args.middleware:
        module, dot, attribute = name.rpartition(".")
        if not dot:
            raise ValueError(f"{name} must be module.Name")
        getattr(importlib.import_module(module), attribute)


def _origins(args: argparse.Namespace) -> None:
    for given in (args.allowed_origins, args.allowed_methods, args.allowed_headers):
        if not (isinstance(given, list) and all(isinstance(word, str) for word in given)):
            raise ValueError(f"{given!r} is not a JSON list of strings")


def _template(args: argparse.Namespace) -> None:
    if not isinstance(args.default_chat_template_kwargs, dict | None):
        raise ValueError(f"{args.default_chat_template_kwargs!r} is not a JSON object")


def _socket(args: argparse.Namespace) -> None:
    if args.uds and not Path(args.uds).absolute().parent.is_dir():
        raise ValueError(f"there is no directory for {args.uds}")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"there is no port {args.port}")


def _limits(args: argparse.Namespace) -> None:
    for name in ("h11_max_header_count", "h11_max_incomplete_event_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"a limit of {value} would let nothing in")


CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "--tool-parser-plugin, --reasoning-parser-plugin": _plugins,
    "--tool-call-parser, --reasoning-parser": _parsers,
    "--ssl-certfile, --ssl-keyfile, --ssl-ca-certs, --ssl-ciphers, --ssl-cert-reqs": _certificates,
    "--middleware": _middleware,
    "--allowed-origins, --allowed-methods, --allowed-headers": _origins,
    "--default-chat-template-kwargs": _template,
    "--uds, --port": _socket,
    "--h11-max-header-count, --h11-max-incomplete-event-size": _limits,
    "--otlp-traces-endpoint": _traces,
}
