"""The grammar of a request that began elsewhere: built here anew, and fed with the output so far.

vLLM builds the grammar of a request in a thread, beside the steps, and lets the request into a step when it
is built. For a request that moved in, the same thread feeds it the output so far before it counts as built.
So its first token here is held to what it would have been held to there; nobody else waits for it; and where
the grammar cannot be built, or does not take the output, the request ends with an error, it alone. What was
made after the request was sent here (it was copied ahead) is fed when the request arrives.

Tokens are fed one by one through vLLM's own `accept_tokens`, each with the tokens before it and the prompt
as they were then: where a reasoning parser says that tokens do not count before the reasoning is over, that
is found again at the same token.

vLLM also builds one backend in an engine, of the kind that its first request with a grammar was checked for,
and gives it to all others. With the backend `auto` requests differ in that, so instances would, too. Here
every request has the backend that it was checked for, whichever instance it is on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from taichi_serve.cluster.vllm.core.marks import marks_of

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
    from vllm.v1.structured_output.request import StructuredOutputRequest

log = logging.getLogger("vllm.taichi.grammar")


def is_built(request: Request) -> bool:
    """Whether the request can be let into a step, as far as its grammar goes: it has none, or it is built,
    or it could not be, which vLLM finds out when it is shown the request."""
    if request.status != RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        return True
    return bool(cast(Any, request.structured_output_request).is_grammar_ready)


@dataclass(slots=True)
class _AsItWas:
    """What vLLM looks at of a request when its grammar is built and a token of it was made; here for tokens
    that were made elsewhere."""

    request_id: str
    sampling_params: SamplingParams | None
    structured_output_request: StructuredOutputRequest
    prompt_token_ids: Sequence[int]
    all_token_ids: list[int]
    use_structured_output: bool = True

    def accepts(self, manager: StructuredOutputManager, tokens: Sequence[int]) -> bool:
        """Feed these tokens, which came next; whether the grammar took each of them."""
        for token in tokens:
            self.all_token_ids.append(token)
            if not manager.accept_tokens(cast(Any, self), [token]):
                log.error("the grammar of %s does not take its output so far", self.request_id)
                return False
        return True


class Grammars:
    """Stands before the method of a StructuredOutputManager that begins to build a request's grammar."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self._manager = manager
        # By kind of backend, a manager with that one that builds at once. They share everything else.
        self._of: dict[str | None, StructuredOutputManager] = {}
        self._lock = Lock()
        setattr(manager, "grammar_init", self._begin)  # noqa: B010

    def _begin(self, request: Request) -> None:
        """In the thread that takes requests in, where nothing may take long: a backend takes seconds."""
        wanted = request.structured_output_request
        if wanted is None:
            return
        count = marks_of(request).output
        tokens = list(request.prompt_token_ids or ())  # later on the engine core takes the request apart
        output = tokens[len(tokens) - count :]
        del tokens[len(tokens) - count :]
        own = replace(wanted, _grammar=None)
        then = _AsItWas(request.request_id, request.sampling_params, own, tokens.copy(), tokens)
        wanted.grammar = self._manager.executor.submit(self._build, wanted, then, output)

    def _build(
        self, wanted: StructuredOutputRequest, then: _AsItWas, output: list[int]
    ) -> StructuredOutputGrammar:
        """In a thread of its own. Raises what vLLM raises where the grammar cannot be built, and ValueError
        where it does not take the output."""
        own = then.structured_output_request
        one = self._init(wanted.params._backend, then)
        if isinstance(own.grammar, Exception):
            raise own.grammar
        if not then.accepts(one, output):
            raise ValueError("the grammar does not take the output so far")
        wanted.reasoning_ended, wanted.reasoner = own.reasoning_ended, own.reasoner
        return cast(Any, own.grammar)

    def _init(self, kind: str | None, then: _AsItWas) -> StructuredOutputManager:
        """Have vLLM build the grammar with the backend of this kind, and the backend before if there is
        none."""
        one = self._of.get(kind)
        if one is None:
            with self._lock:
                one = self._of.get(kind)
                if one is None:
                    return self._first(kind, then)
        StructuredOutputManager.grammar_init(one, cast(Any, then))
        return one

    def _first(self, kind: str | None, then: _AsItWas) -> StructuredOutputManager:
        one = copy.copy(self._manager)
        one.backend, one._use_async_grammar_compilation = None, False
        StructuredOutputManager.grammar_init(one, cast(Any, then))
        assert one.backend is not None
        # All grammars fill rows of one array, which the manager's own backend makes.
        if self._manager.backend is None:
            self._manager.backend = one.backend
        widths = [
            backend.allocate_token_bitmask(1).shape[1] for backend in (self._manager.backend, one.backend)
        ]
        if widths[0] != widths[1]:  # its tokenizer has more tokens than the model
            raise ValueError(f"a mask of {kind} has {widths[1]} words, and not {widths[0]}")
        self._of[kind] = one
        return one

    def go_on(self, request: Request, tokens: Sequence[int]) -> bool:
        """A request whose KV was copied ahead, and whose grammar is built, arrives with these tokens made
        since it was sent here. False where its grammar does not take them."""
        wanted = request.structured_output_request
        if wanted is None:
            return True
        known = request.num_tokens - marks_of(request).ahead  # room was kept for others
        before = list(request.all_token_ids[:known])
        prompt = request.prompt_token_ids or ()
        then = _AsItWas(request.request_id, request.sampling_params, wanted, prompt, before)
        return then.accepts(self._manager, tokens)
