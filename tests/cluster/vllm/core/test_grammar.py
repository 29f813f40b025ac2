"""The grammar of a request that moved is where it would be had the request stayed: with vLLM's own manager,
real backends and the tiny model's tokenizer, but without an engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from random import Random
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from flowbench import Instance, Stream
from flowbench import request as plain_request
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from taichi_serve.cluster.vllm.args import engine_config
from taichi_serve.cluster.vllm.core.grammar import Grammars
from taichi_serve.cluster.vllm.core.resumed import as_output, keep_room
from taichi_serve.cluster.vllm.wire import Marks
from taichi_serve.tiny import TinyModel, cached_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated")  # vLLM sets it

VOCABULARY = TinyModel().vocab
END = VOCABULARY - 5  # <|im_end|>
THOUGHT = VOCABULARY - 1  # </think>
PROMPT = [300, 301, 302]
SECONDS = 60  # that a grammar may take at most
MOST = 120  # tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 9},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "sizes", "colour"],
    "additionalProperties": False,
}
CHOICE = ["a long answer that goes on for a while", "a long answer that goes on for ever", "a long one"]
LARK = 'start: item+ "."\nitem: "<" WORD ">" | "[" item+ "]"\nWORD: /[a-z]{1,9}/'
EBNF = 'root ::= "x" item{5,20}\nitem ::= "<" [a-z]+ ">"'
CASES: list[tuple[str, dict[str, Any]]] = [
    ("xgrammar", {"json": SCHEMA}),
    ("xgrammar", {"json_object": True}),
    ("xgrammar", {"regex": "([a-z]{3,8} ){20}[0-9]{4}"}),
    ("xgrammar", {"grammar": EBNF}),
    ("xgrammar", {"grammar": LARK}),
    ("guidance", {"json": SCHEMA}),
    ("guidance", {"regex": "([a-z]{3,8} ){20}[0-9]{4}"}),
    ("guidance", {"choice": CHOICE}),
    ("guidance", {"grammar": LARK}),
    ("outlines", {"json": SCHEMA}),
    ("outlines", {"regex": "([a-z]{3,8} ){20}[0-9]{4}"}),
    ("outlines", {"choice": CHOICE}),
]


@pytest.fixture(scope="module")
def config() -> Any:
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = "18990"
    flags = ["--max-model-len", "4096", "--enforce-eager", "--d-heavy", "1"]
    return engine_config([str(cached_tiny_model()), *flags], "grammars", "/tmp")


class Engine:
    """The manager of an instance, with ours on it."""

    def __init__(self, config: Any) -> None:
        self.manager = StructuredOutputManager(config)
        self.grammars = Grammars(self.manager)

    def built(self, request: Request) -> Request:
        """Wait for its grammar."""
        assert request.structured_output_request is not None
        self.manager.grammar_init(request)
        future = request.structured_output_request._grammar
        assert isinstance(future, Future)
        future.exception(SECONDS)
        return request

    def mask(self, request: Request) -> np.ndarray[Any, Any]:
        """What the next token may be, a bit for each."""
        rows = self.manager.grammar_bitmask({"a": request}, ["a"], {})
        assert rows is not None
        return rows[0].copy()

    def made(self, request: Request, token: int) -> None:
        """A step made this token."""
        request.append_output_token_ids(token)
        assert self.manager.accept_tokens(request, [token])


def wish(kind: str, spec: dict[str, Any], tokens: Sequence[int], marks: Marks | None = None) -> Request:
    params = SamplingParams(
        max_tokens=200,
        structured_outputs=StructuredOutputsParams(**spec),
        extra_args=marks.entry() if marks is not None else None,
    )
    params._all_stop_token_ids = {END}
    assert params.structured_outputs is not None
    params.structured_outputs._backend = kind
    return Request("a", list(tokens), params, None)


def moved(kind: str, spec: dict[str, Any], output: Sequence[int], room: int = 0) -> Request:
    marks = Marks(moved=True, output=len(output), ahead=room)
    return wish(kind, spec, [*PROMPT, *output], marks)


def allowed(mask: np.ndarray[Any, Any]) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCABULARY]
    return [int(token) for token in np.nonzero(bits)[0]]


Walk = tuple[list[int], list[np.ndarray[Any, Any]]]


def walk(engine: Engine, kind: str, spec: dict[str, Any]) -> Walk:
    """An output that stays on one instance: tokens drawn from those that may be, and what might be at each
    of them."""
    request, chance = engine.built(wish(kind, spec, PROMPT)), Random(5)
    tokens: list[int] = []
    masks = [engine.mask(request)]
    while len(tokens) < MOST and END not in tokens:
        tokens.append(chance.choice(allowed(masks[-1])))
        engine.made(request, tokens[-1])
        masks.append(engine.mask(request))
    return tokens, masks


def goes_on_as(engine: Engine, request: Request, tokens: list[int], masks: Sequence[Any], at: int) -> None:
    """From this token on the request is held to what it was held to where it stayed."""
    for place in range(at, len(tokens)):
        assert (engine.mask(request) == masks[place]).all(), f"token {place} of {len(tokens)}"
        engine.made(request, tokens[place])
    assert (engine.mask(request) == masks[len(tokens)]).all()


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=[f"{kind}-{next(iter(spec))}" for kind, spec in CASES])
def test_a_request_that_moves_in_is_held_to_what_it_was_held_to_before(
    config: Any, kind: str, spec: dict[str, Any]
) -> None:
    tokens, masks = walk(Engine(config), kind, spec)
    assert len(tokens) > 3
    target = Engine(config)
    for at in {1, len(tokens) // 3, len(tokens) * 2 // 3, len(tokens) - 1}:
        request = target.built(moved(kind, spec, tokens[:at]))
        if at % 2:  # as the V2 runner has it
            as_output(request, at)
        goes_on_as(target, request, tokens, masks, at)


@pytest.mark.parametrize("known", [0, 1, 20])
def test_what_was_made_after_it_was_sent_is_fed_when_it_arrives(config: Any, known: int) -> None:
    tokens, masks = walk(Engine(config), "xgrammar", {"json": SCHEMA})
    target = Engine(config)
    request = target.built(moved("xgrammar", {"json": SCHEMA}, tokens[:known], room=32))
    keep_room(request, 32)
    assert target.grammars.go_on(request, tokens[known : known + 5])
    goes_on_as(target, request, tokens, masks, known + 5)


def test_each_request_has_the_backend_it_was_checked_for_whichever_came_first(config: Any) -> None:
    """Guidance allows white space in JSON where xgrammar does not, and the other way round."""
    alone = {kind: walk(Engine(config), kind, {"json": SCHEMA}) for kind in ("xgrammar", "guidance")}
    assert any((a != b).any() for a, b in zip(alone["xgrammar"][1], alone["guidance"][1], strict=False))
    both = Engine(config)
    for kind in ("guidance", "xgrammar", "guidance"):
        tokens, masks = alone[kind]
        goes_on_as(both, both.built(moved(kind, {"json": SCHEMA}, tokens[:9])), tokens, masks, 9)


class Reasoner:
    """Thinks until a token says that it is over; looks at the tokens before it, as some do."""

    def __init__(self, tokenizer: Any, **_: Any) -> None:
        self.thinks = 0

    def is_reasoning_end(self, tokens: Sequence[int]) -> bool:
        return THOUGHT in tokens

    def is_reasoning_end_streaming(self, tokens: Sequence[int], delta: Sequence[int]) -> bool:
        assert list(tokens[-len(delta) :]) == list(delta), "the token is the last one there is"
        return THOUGHT in delta and tokens[: len(PROMPT)] == PROMPT


@pytest.mark.parametrize("at", [1, 3, 4, 5, 9])
def test_what_it_thinks_is_no_part_of_its_document_wherever_it_moved(config: Any, at: int) -> None:
    document, masks = walk(Engine(config), "xgrammar", {"json": SCHEMA})
    thoughts = [700, 701, 702, THOUGHT]
    tokens = [*thoughts, *document]
    target = Engine(config)
    target.manager.reasoner_cls = Reasoner  # type: ignore[assignment]
    request = target.built(moved("xgrammar", {"json": SCHEMA}, tokens[:at]))
    free = np.full_like(masks[0], -1)
    goes_on_as(target, request, tokens, [*[free] * len(thoughts), *masks], at)


def test_an_output_that_its_grammar_does_not_take_is_an_error_of_this_request(config: Any) -> None:
    engine = Engine(config)
    request = engine.built(moved("xgrammar", {"regex": "[0-9]{9}"}, [700, 701]))
    assert request.structured_output_request is not None
    assert isinstance(request.structured_output_request.grammar, ValueError)
    late = engine.built(moved("xgrammar", {"regex": "[0-9]{9}"}, [], room=8))
    keep_room(late, 8)
    assert not engine.grammars.go_on(late, [700])


def test_a_backend_that_cannot_be_had_is_an_error_of_its_request_and_others_go_on(config: Any) -> None:
    engine = Engine(config)
    request = engine.built(wish("none-such", {"regex": "[0-9]{9}"}, PROMPT))
    assert request.structured_output_request is not None
    assert isinstance(request.structured_output_request.grammar, ValueError)
    tokens, _ = walk(engine, "xgrammar", {"regex": "[0-9]{9}"})
    assert len(tokens) > 3


def test_the_thread_that_takes_requests_in_does_not_wait_for_a_backend(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, may = Engine(config), Event()
    whole = StructuredOutputManager.grammar_init

    def slow(manager: StructuredOutputManager, request: Any) -> None:
        assert may.wait(SECONDS)
        whole(manager, request)

    monkeypatch.setattr(StructuredOutputManager, "grammar_init", slow)
    request = wish("xgrammar", {"regex": "[0-9]{9}"}, PROMPT)
    engine.manager.grammar_init(request)
    assert request.structured_output_request is not None
    assert not request.structured_output_request.is_grammar_ready
    may.set()
    assert isinstance(request.structured_output_request._grammar, Future)
    assert request.structured_output_request._grammar.exception(SECONDS) is None


# ------------------------------------------------------------------------------- who is in a step meanwhile


@pytest.fixture
def instance() -> Instance:
    streams = {name: Stream([number] * 64) for number, name in enumerate("abc", 20)}
    return Instance(0, Random(3), streams, chunk=32)


def arriving(instance: Instance, name: str, most: int, room: int = 0) -> tuple[Request, Future[Any]]:
    """A request that moves in with one token of its output, and the grammar that it waits for."""
    stream = instance.streams[name]
    stream.upto(64)
    marks = Marks(moved=True, output=1, ahead=room)
    regex = StructuredOutputsParams(regex="a")
    request = plain_request(name, stream.tokens[:65], most, marks, structured_outputs=regex)
    assert request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    grammar: Future[Any] = Future()
    assert request.structured_output_request is not None
    request.structured_output_request.grammar = grammar
    instance.scheduler.add_request(request)
    return request, grammar


def test_nobody_waits_for_the_grammar_of_another_and_it_goes_first_once_it_is_there(
    instance: Instance,
) -> None:
    engine = instance.scheduler
    engine.add_request(plain_request("b", instance.streams["b"].tokens[:64], 4))
    _, grammar = arriving(instance, "a", 4)
    engine.add_request(plain_request("c", instance.streams["c"].tokens[:64], 4))
    assert instance.plan().num_scheduled_tokens == {"b": 32}
    assert instance.plan().num_scheduled_tokens == {"b": 32}
    assert instance.plan().num_scheduled_tokens == {"b": 1, "c": 32}
    grammar.set_result(SimpleNamespace())
    assert "a" in instance.plan().num_scheduled_tokens, "before what is left of a prompt"


def test_a_grammar_that_cannot_be_built_ends_its_request_and_no_other(instance: Instance) -> None:
    engine = instance.scheduler
    _, grammar = arriving(instance, "a", 4)
    engine.add_request(plain_request("b", instance.streams["b"].tokens[:64], 4))
    grammar.set_exception(ValueError("no such grammar"))
    outputs = instance.run(lambda: not engine.has_requests())
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}
    assert instance.used() == 0


def test_what_is_copied_ahead_and_finds_no_room_when_its_grammar_is_there_holds_up_nobody(
    instance: Instance,
) -> None:
    engine = instance.scheduler
    _, grammar = arriving(instance, "a", 4, room=64 * 16)  # all blocks of this instance are too few
    engine.add_request(plain_request("b", instance.streams["b"].tokens[:64], 4))
    grammar.set_result(SimpleNamespace())
    assert instance.plan().num_scheduled_tokens == {"b": 32}


@pytest.mark.parametrize("takes", [True, False])
def test_who_was_copied_ahead_arrives_only_if_its_grammar_takes_what_was_made_since(
    instance: Instance, takes: bool
) -> None:
    engine = instance.scheduler
    request, grammar = arriving(instance, "a", 4, room=8)
    assert instance.plan().num_scheduled_tokens == {}
    assert not engine.arrive("a", [5]), "it has no blocks yet"
    grammar.set_result(SimpleNamespace())
    assert instance.plan().num_scheduled_tokens == {}
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    fed: list[list[int]] = []
    manager: Any = engine.structured_output_manager
    manager.accept_tokens = lambda request, tokens: fed.append(list(request.all_token_ids[65:])) or takes
    assert engine.arrive("a", [5, 6]) == takes
    assert fed == ([[5], [5, 6]] if takes else [[5]])
