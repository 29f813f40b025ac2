"""Decisions become engine requests and outputs become facts: two engines whose clients keep all they hear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.request import Request

from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.itinerary import ROOM
from taichi_serve.cluster.vllm.wire import KEY, LEFT, UNREAD, Copied, Drop, Failed, Gone, More, Order, direct
from taichi_serve.messages import (
    Abort,
    Ahead,
    Arrived,
    Cached,
    Cancelled,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Joined,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Stepped,
)
from taichi_serve.sliders import Kind

# What an engine says of a leg that left after two tokens: its KV of 4 tokens is in block 7.
KV = {
    "do_remote_prefill": True,
    "remote_num_tokens": 4,
    "remote_block_ids": ([7],),
    "remote_request_id": "a",
}


class Told:
    """A client that keeps what it is told."""

    class vllm_config:  # noqa: N801
        use_v2_model_runner = False
        cache_config = SimpleNamespace(
            enable_prefix_caching=True, block_size=1, prefix_caching_hash_algo="sha256"
        )
        model_config = SimpleNamespace(max_model_len=100)

    dead = False
    kv_capacity = 1000

    def __init__(self) -> None:
        self.added: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.told: list[tuple[Any, ...]] = []
        self.second = asyncio.Event()  # two legs were added
        self.pins: list[int] | None = None  # blocks that are full; None: nothing can be copied ahead
        self.prefix: list[int] = []  # blocks of a prompt that it has
        self.held = 0, 0.0  # what it says on unpinning: tokens of KV, and when
        self.dropped = asyncio.Event()  # whether nothing is read for a leg any more that was dropped
        self.dropped.set()
        self._heard = asyncio.Event()

    def add(self, request: EngineCoreRequest) -> None:
        self.added.append(request)
        if len(self.added) == 2:
            self.second.set()

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def tell(self, method: str, *args: Any) -> None:
        self.told.append((method, *args))
        self._heard.set()

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        self.tell(method, *args)
        if method == "taichi_drop":
            await self.dropped.wait()
        answers = {"taichi_pin": self.pins, "taichi_prefix": self.prefix, "taichi_release": self.held}
        return answers.get(method, True)

    async def hears(self, method: str, *args: Any) -> None:
        """Wait until it is told this."""
        while (method, *args) not in self.told:
            self._heard.clear()
            await asyncio.wait_for(self._heard.wait(), 10)


class Orders(list[Order]):
    """Copiers that keep what they are told."""

    ranks = 1

    def __init__(self) -> None:
        super().__init__()
        self._heard = asyncio.Event()

    def send(self, order: Order) -> None:
        self.append(order)
        self._heard.set()

    async def has(self, order: Order) -> None:
        """Wait until they are told this."""
        while order not in self:
            self._heard.clear()
            await asyncio.wait_for(self._heard.wait(), 10)


class Two:
    """A cluster of i0 and i1, what its users got, and its facts."""

    def __init__(self, directory: Path, move_timeout: float = 10.0) -> None:
        self.clients = Told(), Told()
        self.orders = Orders(), Orders()
        processes = [
            SimpleNamespace(
                engine_id=f"e{k}",
                log=directory / f"i{k}.log",
                reads=partial(direct, directory, f"e{k}"),
                host="",
            )
            for k in range(2)
        ]
        self.engines = [
            Engine(k, f"i{k}", processes[k], self.clients[k], self.orders[k], Kind.D_HEAVY, 256)  # type: ignore[arg-type]
            for k in range(2)
        ]
        self.got: list[EngineCoreOutput] = []
        self.cluster = VllmCluster(
            self.engines, lambda outputs: self.got.extend(outputs.outputs), move_timeout
        )

    def ask(self, *blocks: int, **params: Any) -> None:
        """Request `a`: 3 prompt tokens, at most 10 out."""
        self.cluster.accept(self.request(**params), blocks)

    def request(self, **params: Any) -> EngineCoreRequest:
        """It, as the front end gives it."""
        return EngineCoreRequest(
            request_id="a",
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=SamplingParams(**{"temperature": 0.0, "max_tokens": 10, **params}),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    def say(self, instance: int, request: str, *tokens: int, **end: Any) -> None:
        """An engine puts out tokens of a leg."""
        output = EngineCoreOutput(request, list(tokens), **end)
        self.cluster.receive(self.engines[instance], EngineCoreOutputs(outputs=[output]))

    def stepped(self, instance: int, record: list[Any]) -> None:
        """An engine's record of a step."""
        stats = SchedulerStats(kv_connector_stats={KEY: record})
        self.cluster.receive(self.engines[instance], EngineCoreOutputs(scheduler_stats=stats))

    def computed(self, instance: int, leg: str, *blocks: int) -> None:
        """A step computed a chunk of a prompt, all of whose full blocks so far are pinned."""
        self.stepped(instance, [1.0, 0.1, 16, 0, 16, {}, {leg: ("a#1", list(blocks))}])

    def leave(self, instance: int, request: str, *tokens: int) -> None:
        """The leg ends with these tokens because the request goes on elsewhere."""
        end = {"finish_reason": FinishReason.STOP, "stop_reason": LEFT, "kv_transfer_params": dict(KV)}
        self.say(instance, request, *tokens, **end)

    def prefilled_and_held(self) -> None:
        """Prefilled on i0; its KV waits there."""
        self.cluster.send(Prefill("a", 0, "i0", hand_over=True))
        self.leave(0, "a", 50)

    async def quiet(self) -> None:
        """Wait until every question was answered."""
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    @property
    def tokens(self) -> list[int]:
        """What the user got."""
        return [token for output in self.got for token in output.new_token_ids]

    def facts(self) -> list[Event]:
        """Those since the last look."""
        queue, found = self.cluster._events, []
        while not queue.empty():
            found.append(queue.get_nowait())
        return found


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    """In a running loop, whose timers deadlines are. When a request is over, nobody remembers it."""
    here = Two(tmp_path)
    yield here
    if not here.cluster.journeys:
        await here.quiet()
        assert here.cluster.hands.passages == {}
        assert [(e.legs, e.residents) for e in here.engines] == [({}, {})] * 2


async def test_a_request_is_prefilled_here_decoded_there_and_its_user_sees_one_stream(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    two.say(1, "a#2", 51)
    two.say(1, "a#2", 52, finish_reason=FinishReason.LENGTH)
    await two.clients[0].hears("taichi_release", ["a"], ["a#2"])  # with the first token nobody reads any more

    first, second = two.clients[0].added[0], two.clients[1].added[0]
    assert first.request_id == "a"
    assert first.sampling_params.extra_args[KEY] == {"hand_over": True, "reader": "a#1"}
    assert (second.request_id, second.prompt_token_ids) == ("a#2", [1, 2, 3, 50])
    assert second.sampling_params.extra_args["kv_transfer_params"] == KV

    assert two.tokens == [50, 51, 52]
    assert {output.request_id for output in two.got} == {"a"}
    assert [(o.finish_reason, o.stop_reason, o.kv_transfer_params) for o in two.got] == [
        (None, None, None),
        (None, None, None),
        (FinishReason.LENGTH, None, None),
    ]
    arrived, prefilled, flowed, finished = two.facts()
    assert isinstance(arrived, Arrived)
    assert (arrived.prompt_tokens, arrived.max_tokens, arrived.movable) == (3, 10, True)
    assert isinstance(prefilled, Prefilled)
    assert (prefilled.instance, prefilled.leg, prefilled.held) == ("i0", 0, True)
    assert isinstance(flowed, Flowed)
    assert (flowed.instance, flowed.leg, flowed.output_tokens) == ("i1", 1, 2)
    assert isinstance(finished, Finished)
    assert (finished.output_tokens, finished.outcome) == (3, Outcome.FINISHED)


async def test_a_flow_lets_the_token_it_is_on_come_out_and_needs_no_second_word(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    two.say(0, "a", 51)
    await two.clients[0].hears("taichi_leave", ["a"])
    two.leave(0, "a", 52)
    two.say(1, "a#2", 53)
    assert two.tokens == [50, 51, 52, 53]
    assert [type(fact) for fact in two.facts()] == [Arrived, Prefilled, Flowed]


async def test_a_flow_between_two_legs_is_in_no_table_and_ends_the_request_alone(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    await two.clients[0].hears("taichi_release", ["a"], [])
    assert two.facts()[-1].outcome is Outcome.FAILED
    assert two.got[-1].finish_reason is FinishReason.ERROR
    assert two.cluster.hands.astray == 1


async def test_a_request_that_ends_before_it_can_leave_just_ends(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    two.say(0, "a", 51, finish_reason=FinishReason.STOP)
    assert two.clients[1].added == []
    assert two.facts()[-1].outcome is Outcome.FINISHED


async def test_on_the_same_instance_kv_is_let_go_and_found_in_the_prefix_cache(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.send(Decode("a", 1, "i0", Move.HAND_OVER))
    leg = two.clients[0].added[-1]
    assert leg.prompt_token_ids == [1, 2, 3, 50]
    assert "kv_transfer_params" not in leg.sampling_params.extra_args
    await two.clients[0].hears("taichi_release", ["a"], [])


async def test_kv_of_an_instance_that_died_is_computed_again(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.lose(two.engines[0], "exit code -9")
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    leg = two.clients[1].added[-1]
    assert leg.prompt_token_ids == [1, 2, 3, 50]
    assert "kv_transfer_params" not in leg.sampling_params.extra_args


async def test_however_long_a_decision_takes_the_source_holds_its_kv(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.journeys["a"].last_at -= 3600.0
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    assert two.clients[1].added[-1].sampling_params.extra_args["kv_transfer_params"] == KV
    assert two.clients[0].told == []


async def test_kv_that_does_not_come_is_computed_again_and_held_until_the_target_reads_no_more(
    tmp_path: Path,
) -> None:
    two = Two(tmp_path, move_timeout=0.0)
    two.clients[1].dropped.clear()
    two.ask()
    two.prefilled_and_held()
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    await asyncio.wait_for(two.clients[1].second.wait(), 10)
    await two.clients[1].hears("taichi_drop", "a#2")
    again = two.clients[1].added[1]
    assert again.request_id == "a#3"
    assert "kv_transfer_params" not in again.sampling_params.extra_args
    two.say(1, "a#2", 99)  # a late word of the pull that was given up
    two.say(1, "a#3", 51)
    assert two.tokens == [50, 51]
    assert two.engines[1].recomputed_late == 1
    assert two.clients[0].told == []
    two.clients[1].dropped.set()
    await two.clients[0].hears("taichi_release", ["a"], ["a#2"])


async def test_kv_that_could_not_be_read_within_the_step_is_computed_again_and_the_user_sees_nothing(
    two: Two,
) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    two.say(1, "a#2", finish_reason=FinishReason.ERROR, stop_reason=UNREAD)
    two.say(1, "a#3", 51, finish_reason=FinishReason.LENGTH)
    assert [request.request_id for request in two.clients[1].added] == ["a#2", "a#3"]
    assert "kv_transfer_params" not in two.clients[1].added[1].sampling_params.extra_args
    assert [(o.new_token_ids, o.finish_reason) for o in two.got] == [
        ([50], None),
        ([51], FinishReason.LENGTH),
    ]
    assert two.engines[1].recomputed_late == 1
    await two.clients[0].hears("taichi_release", ["a"], ["a#2"])
    assert two.facts()[-1].outcome is Outcome.FINISHED


async def test_a_client_that_leaves_while_its_kv_is_held_frees_it(two: Two) -> None:
    two.ask()
    two.prefilled_and_held()
    two.cluster.abandon("a", cancelled=True)
    assert isinstance(two.facts()[-1], Cancelled)
    two.cluster.send(Abort("a", Outcome.CANCELLED, "the client left"))
    await two.clients[0].hears("taichi_release", ["a"], [])
    assert two.facts()[-1].outcome is Outcome.CANCELLED
    assert two.got[-1].new_token_ids == [50]  # nobody is told anything more


async def test_a_client_that_leaves_while_it_decodes_is_aborted_and_late_tokens_are_dropped(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Abort("a", Outcome.CANCELLED, "the client left"))
    two.say(0, "a", 51)
    assert two.clients[0].aborted == ["a"]
    assert two.tokens == [50]


async def test_a_stop_string_ends_a_request_as_finished(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.abandon("a", cancelled=False)
    assert two.clients[0].aborted == ["a"]
    assert two.facts()[-1].outcome is Outcome.FINISHED


async def test_a_request_whose_instance_died_goes_on_from_its_tokens(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.lose(two.engines[0], "exit code -9")
    two.cluster.lose(two.engines[0], "told twice")
    assert [type(fact) for fact in two.facts()] == [Arrived, Prefilled, Lost]
    two.cluster.send(Decode("a", 1, "i1", Move.RESCUE))
    two.say(1, "a#1", 51)
    assert two.tokens == [50, 51]


async def test_a_request_on_its_way_out_of_an_instance_that_dies_goes_where_it_was_told_to(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    two.cluster.lose(two.engines[0], "exit code -9")
    leg = two.clients[1].added[0]
    assert (leg.request_id, leg.prompt_token_ids) == ("a#2", [1, 2, 3, 50])


async def test_a_bound_request_fails_when_its_instance_dies_after_its_first_token(two: Two) -> None:
    two.ask(presence_penalty=1.0)
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.lose(two.engines[0], "exit code -9")
    two.cluster.send(Decode("a", 1, "i1", Move.RESCUE))
    assert two.clients[1].added == []
    assert two.got[-1].finish_reason is FinishReason.ERROR
    assert two.facts()[-1].outcome is Outcome.FAILED


async def test_before_its_first_token_a_bound_request_may_begin_again_elsewhere(two: Two) -> None:
    two.ask(presence_penalty=1.0)
    two.cluster.send(Prefill("a", 0, "i0"))
    two.cluster.lose(two.engines[0], "exit code -9")
    two.cluster.send(Prefill("a", 1, "i1"))
    assert two.clients[1].added[0].request_id == "a#1"
    two.say(1, "a#1", 50)
    assert two.tokens == [50]
    assert two.facts()[-1].leg == 1


async def test_a_failed_leg_is_an_error_to_the_user_and_a_failure_in_the_books(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", finish_reason=FinishReason.ERROR)
    assert two.got[-1].finish_reason is FinishReason.ERROR
    assert two.facts()[-1].outcome is Outcome.FAILED


async def test_decisions_about_requests_that_are_gone_are_dropped(two: Two) -> None:
    for command in (Prefill("b", 0, "i0"), Decode("b", 1, "i1", Move.RESCUE), Flow("b", 1, "i1", Move.DRAIN)):
        two.cluster.send(command)
    assert [client.added for client in two.clients] == [[], []]


async def test_a_chunk_reaches_its_engine(two: Two) -> None:
    two.cluster.send(SetChunk("i1", Kind.P_HEAVY, 512))
    assert two.clients[1].told == [("taichi_chunk", 512)]
    assert (two.engines[1].kind, two.engines[1].chunk) == (Kind.P_HEAVY, 512)


# ------------------------------------------------------------------------------------- moves copied ahead


async def copied_ahead(two: Two) -> None:
    """Request `a` decodes on i0 and is to go to i1, which has copied what is full of it."""
    two.clients[0].pins = []
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    await two.orders[1].has(More("a#1", "e0", []))
    two.cluster.hands.hear(Copied("a#1", 0, False, 0, 0.0, 1.0, 1.5))


def direct_pair(tmp_path: Path) -> None:
    """e1 reads the memory of e0."""
    (tmp_path / "direct-e1--e0--0").touch()


async def test_the_target_has_the_request_before_the_source_lets_it_go_and_gets_only_what_came_since(
    two: Two, tmp_path: Path
) -> None:
    direct_pair(tmp_path)
    await copied_ahead(two)
    early = two.clients[1].added[0]
    assert (early.request_id, early.prompt_token_ids) == ("a#1", [1, 2, 3, 50])
    assert early.sampling_params.extra_args[KEY]["ahead"] == ROOM
    await two.clients[0].hears("taichi_leave", ["a"])
    two.leave(0, "a", 51)
    await two.orders[1].has(More("a#1", "e0", [7], "a"))
    await two.clients[1].hears("taichi_arrive", "a#1", [51])
    two.cluster.hands.hear(Copied("a#1", 1, True, 1, 0.5, 2.0, 2.5))
    assert not [told for told in two.clients[0].told if told[0] == "taichi_release"]
    two.say(1, "a#1", 52)
    await two.clients[0].hears("taichi_release", ["a"], ["a#1"])
    assert two.tokens == [50, 51, 52]
    assert len(two.clients[1].added) == 1
    assert [type(fact) for fact in two.facts()] == [Arrived, Prefilled, Flowed]


async def test_over_the_network_a_request_arrives_when_its_last_block_has(two: Two) -> None:
    await copied_ahead(two)
    two.leave(0, "a", 51)
    await two.orders[1].has(More("a#1", "e0", [7], "a"))
    assert ("taichi_arrive", "a#1", [51]) not in two.clients[1].told
    two.cluster.hands.hear(Copied("a#1", 1, True, 1, 0.5, 2.0, 2.5))
    await two.clients[1].hears("taichi_arrive", "a#1", [51])


async def test_a_move_whose_kv_cannot_be_copied_does_not_happen(two: Two) -> None:
    two.clients[0].pins = []
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    await two.orders[1].has(More("a#1", "e0", []))
    two.cluster.hands.hear(Failed("a#1", "no such process"))
    refused = two.facts()[-1]
    assert isinstance(refused, Refused)
    assert (refused.leg, refused.why, refused.output_tokens) == (1, "no such process", 1)
    await two.clients[1].hears("taichi_drop", "a#1")
    assert ("taichi_leave", ["a"]) not in two.clients[0].told
    two.say(0, "a", 51)
    assert two.tokens == [50, 51]


async def test_a_move_whose_grammar_cannot_be_built_there_does_not_happen(two: Two) -> None:
    two.clients[0].pins = []
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    await two.orders[1].has(More("a#1", "e0", []))
    two.say(1, "a#1", finish_reason=FinishReason.ERROR)
    refused = two.facts()[-1]
    assert isinstance(refused, Refused)
    assert (refused.leg, refused.why) == (1, "its target gave it up")
    two.say(0, "a", 51)
    assert two.tokens == [50, 51]


async def test_blocks_are_unpinned_only_when_nobody_reads_them_any_more(two: Two) -> None:
    two.clients[1].dropped.clear()
    await copied_ahead(two)
    two.cluster.send(Abort("a", Outcome.CANCELLED, "the client left"))
    await two.clients[1].hears("taichi_drop", "a#1")
    assert Drop("a#1") in two.orders[1]
    assert not [told for told in two.clients[0].told if told[0] == "taichi_release"]
    two.clients[1].dropped.set()
    await two.clients[0].hears("taichi_release", [], ["a#1"])


@pytest.mark.parametrize(("unpinned_at", "held"), [(4.0, 0), (6.0, 16)])
async def test_of_two_words_about_held_kv_the_later_said_counts_not_the_later_heard(
    two: Two, unpinned_at: float, held: int
) -> None:
    await copied_ahead(two)
    two.cluster.send(Abort("a", Outcome.CANCELLED, "the client left"))
    two.clients[0].held = 16, unpinned_at
    two.stepped(0, [5.0, 0.1, 0, 0, 0, {}, {}])  # it was done at 5.0, and nothing is held after it
    await two.clients[0].hears("taichi_release", [], ["a#1"])
    await two.quiet()
    assert two.engines[0].kv_tokens == held


async def test_a_tail_that_is_lost_is_computed_again(two: Two) -> None:
    await copied_ahead(two)
    two.leave(0, "a", 51)
    two.cluster.hands.hear(Failed("a#1", "no such process"))
    await two.clients[1].hears("taichi_drop", "a#1")
    again = two.clients[1].added[-1]
    assert (again.request_id, again.prompt_token_ids) == ("a#2", [1, 2, 3, 50, 51])
    await two.clients[0].hears("taichi_release", ["a"], ["a#1"])  # nobody else will say so
    two.say(1, "a#1", finish_reason=FinishReason.ERROR, stop_reason=UNREAD)  # its engine found out later
    assert len(two.clients[1].added) == 2


async def test_a_tail_that_its_engine_misses_first_is_computed_again_once(two: Two) -> None:
    two.clients[1].dropped.clear()
    await copied_ahead(two)
    two.leave(0, "a", 51)
    two.say(1, "a#1", finish_reason=FinishReason.ERROR, stop_reason=UNREAD)
    await two.clients[1].hears("taichi_drop", "a#1")
    assert not [told for told in two.clients[0].told if told[0] == "taichi_release"]
    two.cluster.hands.hear(Failed("a#1", "no such process"))
    assert [request.request_id for request in two.clients[1].added] == ["a#1", "a#2"]
    two.clients[1].dropped.set()
    await two.clients[0].hears("taichi_release", ["a"], ["a#1"])


async def test_when_the_target_dies_first_the_request_stays_where_it_runs(two: Two) -> None:
    await copied_ahead(two)
    two.cluster.lose(two.engines[1], "exit code -9")
    await two.clients[0].hears("taichi_release", [], ["a#1"])
    assert Gone("e1") in two.orders[0]
    await two.clients[0].hears("taichi_leave", ["a"])  # it had been told before
    two.say(0, "a", 51)
    two.cluster.send(Decode("a", 2, "i0", Move.RESCUE))
    two.leave(0, "a", 52)
    two.say(0, two.clients[0].added[-1].request_id, 53)
    assert two.tokens == [50, 51, 52, 53]
    assert isinstance(two.facts()[-1], Flowed)


async def test_when_the_target_dies_before_the_source_was_told_the_request_stays_where_it_runs(
    two: Two,
) -> None:
    two.clients[0].pins = []
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0"))
    two.say(0, "a", 50)
    two.cluster.send(Flow("a", 1, "i1", Move.OPERATOR))
    await two.orders[1].has(More("a#1", "e0", []))
    two.cluster.lose(two.engines[1], "exit code -9")
    two.cluster.send(Decode("a", 2, "i0", Move.RESCUE))
    assert isinstance(two.facts()[-1], Refused)
    two.say(0, "a", 51)
    assert two.tokens == [50, 51]
    assert ("taichi_leave", ["a"]) not in two.clients[0].told


async def first_chunk_travels(two: Two) -> None:
    """A prompt on i0 that i1 will decode: block 7 is full, and i1 copies it."""
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", hand_over=True))
    two.computed(0, "a", 7)
    two.cluster.send(Ahead("a", 1, "i1"))
    await two.orders[1].has(More("a#1", "e0", [7]))


async def test_what_a_prefill_has_computed_travels_while_it_computes_more(two: Two) -> None:
    await first_chunk_travels(two)
    assert two.clients[0].added[0].sampling_params.extra_args[KEY]["reader"] == "a#1"
    two.computed(0, "a", 7, 8)
    await two.orders[1].has(More("a#1", "e0", [7, 8]))
    two.cluster.hands.hear(Copied("a#1", 2, False, 2, 0.1, 1.0, 1.1))
    two.leave(0, "a", 50)
    two.cluster.send(Decode("a", 1, "i1", Move.HAND_OVER))
    await two.orders[1].has(More("a#1", "e0", [7], "a"))
    two.cluster.hands.hear(Copied("a#1", 1, True, 3, 0.1, 2.0, 2.1))
    assert two.clients[0].told == []
    two.say(1, "a#1", 51)
    await two.clients[0].hears("taichi_release", ["a"], ["a#1"])


async def test_what_was_pinned_for_a_leg_that_nobody_copies_ahead_is_unpinned_when_it_has_left(
    two: Two,
) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", hand_over=True))
    two.computed(0, "a", 7)
    assert two.clients[0].told == []
    two.leave(0, "a", 50)
    await two.clients[0].hears("taichi_release", [], ["a#1"])


async def test_what_was_pinned_while_its_request_was_ended_from_outside_is_unpinned(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", hand_over=True))
    two.cluster.send(Abort("a", Outcome.CANCELLED, "the client left"))
    two.computed(0, "a", 7)  # that step was on its way
    await two.clients[0].hears("taichi_release", [], ["a#1"])


async def test_what_is_pinned_once_its_copy_was_given_up_is_not_copied(two: Two) -> None:
    await first_chunk_travels(two)
    two.cluster.hands.hear(Failed("a#1", "no such process"))
    await two.clients[0].hears("taichi_release", [], ["a#1"])
    two.computed(0, "a", 7, 8)  # said before that was heard
    assert More("a#1", "e0", [7, 8]) not in two.orders[1]


async def test_what_was_copied_to_the_wrong_place_is_given_back(two: Two) -> None:
    await first_chunk_travels(two)
    two.leave(0, "a", 50)
    two.cluster.send(Decode("a", 1, "i0", Move.HAND_OVER))
    await two.clients[1].hears("taichi_drop", "a#1")
    assert Drop("a#1") in two.orders[1]


async def test_room_ends_where_the_context_of_the_model_does(two: Two) -> None:
    two.clients[1].vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9))
    await copied_ahead(two)
    early = two.clients[1].added[0]
    assert early.sampling_params.extra_args[KEY]["ahead"] == 9 - 4


async def test_a_hint_outlives_the_first_token_of_a_prefill_that_began_again(two: Two) -> None:
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", hand_over=True))
    two.cluster.send(Prefill("a", 1, "i1", hand_over=True))  # i0 is silent
    assert two.clients[0].aborted == ["a"]
    assert two.clients[1].added[0].request_id == "a#2"
    two.stepped(1, [1.0, 0.1, 16, 0, 16, {}, {"a#2": ("a#3", [7])}])
    two.cluster.send(Ahead("a", 2, "i0"))
    await two.orders[0].has(More("a#3", "e1", [7]))
    two.cluster.hands.hear(Copied("a#3", 1, False, 1, 0.1, 1.0, 1.1))
    two.leave(1, "a#2", 50)
    two.cluster.send(Decode("a", 2, "i0", Move.HAND_OVER))
    await two.orders[0].has(More("a#3", "e1", [7], "a"))


async def test_a_request_that_left_for_an_instance_that_is_lost_waits_for_another_decision(two: Two) -> None:
    await copied_ahead(two)
    two.cluster.lose(two.engines[1], "exit code -9")
    two.leave(0, "a", 51)
    two.cluster.send(Decode("a", 2, "i0", Move.RESCUE))
    assert two.clients[0].added[-1].request_id == "a#2"
    two.say(0, "a#2", 52)
    assert two.tokens == [50, 51, 52]


async def test_the_prefix_of_a_prompt_is_copied_from_its_holder_before_it_is_computed(two: Two) -> None:
    two.clients[1].prefix = [7, 9]
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", prefix_from="i1", prefix_tokens=3))
    await two.orders[0].has(More("a", "e1", [7, 9], "", whole=True))
    (leg,) = two.clients[0].added
    assert leg.request_id == "a"
    assert leg.sampling_params.extra_args[KEY] == {"fetch": 2}  # of three tokens the last is computed

    blocks = Request.from_engine_core_request(two.request(), get_request_block_hasher(1, sha256)).block_hashes
    assert two.clients[1].told == [("taichi_prefix", "a", [bytes(one) for one in blocks[:2]])]
    two.cluster.hands.hear(Copied("a", 2, True, 2, 0.1, 1.0, 1.1))
    await two.clients[0].hears("taichi_fetched", "a", 2)
    await two.clients[1].hears("taichi_release", [], ["a"])

    stats = PrefillStats()
    stats.set(3, 0, 2)
    two.say(0, "a", 50, prefill_stats=stats)
    two.say(0, "a", 51, finish_reason=FinishReason.LENGTH)
    _, prefilled, _ = two.facts()
    assert isinstance(prefilled, Prefilled)
    assert (prefilled.cached, prefilled.fetched) == (2, 2)
    assert prefilled.fetch == (1.0, 1.1)
    assert (two.got[0].prefill_stats.num_cached_tokens, two.got[0].prefill_stats.num_computed_tokens) == (
        2,
        1,
    )


async def test_a_prefix_that_its_target_still_waits_for_in_the_queue_is_waived(two: Two) -> None:
    two.clients[1].prefix = [7]
    two.ask()
    two.cluster.send(Prefill("a", 0, "i0", prefix_from="i1", prefix_tokens=2))
    await two.orders[0].has(More("a", "e1", [7], "", whole=True))
    two.cluster.hands.hear(Failed("a", "no"))
    await two.clients[0].hears("taichi_waive", "a")
    await two.orders[0].has(Drop("a"))
    assert [leg.request_id for leg in two.clients[0].added] == ["a"]
    two.say(0, "a", 50, finish_reason=FinishReason.LENGTH)


async def test_nothing_is_fetched_for_who_may_not_look_into_the_prefix_cache(two: Two) -> None:
    two.ask(prompt_logprobs=1)
    two.cluster.send(Prefill("a", 0, "i0", prefix_from="i1", prefix_tokens=3))
    assert two.clients[0].added[0].sampling_params.extra_args in (None, {"taichi": {"bound": True}})
    assert two.clients[1].told == []
    two.say(0, "a", 50, finish_reason=FinishReason.LENGTH)


# -------------------------------------------------------------------------------------- what instances cache


def of_hashes(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def knowing(two: Two) -> str:
    """The cluster can hash prompts; what its hashes begin with."""
    two.cluster.hasher = SimpleNamespace(first="f1")  # type: ignore[assignment]
    return "f1"


async def test_what_a_step_cached_is_told_before_the_step(two: Two) -> None:
    two.stepped(0, [1.0, 0.1, 16, 0, 16, {}, {}, [of_hashes(5, 2**64 - 1), of_hashes(3), False]])
    cached, stepped = two.facts()
    assert cached == Cached(cached.at, "i0", (5, 2**64 - 1), (3,))
    assert isinstance(stepped, Stepped)
    assert stepped.at == cached.at


async def test_a_step_in_which_nothing_was_computed_may_tell_of_the_cache_all_the_same(two: Two) -> None:
    two.stepped(0, [1.0, 0.1, 0, 0, 0, {}, {}, [b"", b"", True]])
    (fact,) = two.facts()
    assert fact == Cached(fact.at, "i0", reset=True)


async def test_blocks_are_counted(two: Two) -> None:
    for cached, count in (
        ([of_hashes(1, 2, 3), b"", False], 3),
        ([of_hashes(4), of_hashes(1, 2), False], 2),
        ([of_hashes(7), b"", True], 1),
        (None, 1),
    ):
        two.stepped(0, [1.0, 0.1, 16, 0, 16, {}, {}, cached])
        assert two.engines[0].cached_blocks == count
    assert two.engines[1].cached_blocks == 0


async def test_facts_begin_with_all_that_is_cached(two: Two) -> None:
    first = knowing(two)
    two.cluster.open()
    assert [client.told for client in two.clients] == [[("taichi_cached", first)]] * 2


async def test_one_that_comes_back_tells_all_that_it_cached_while_it_was_warmed(two: Two) -> None:
    first = knowing(two)
    old = two.engines[1]
    two.cluster.lose(old, "killed")
    new = Engine(1, "i1", old.process, Told(), old.copiers, Kind.D_HEAVY, 256)  # type: ignore[arg-type]
    record = [1.0, 0.1, 16, 0, 16, {}, {}, [of_hashes(1), b"", True]]
    two.cluster.receive(
        new, EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats={KEY: record}))
    )
    assert new.client.told == []  # type: ignore[attr-defined]
    two.cluster.join(new)
    assert new.client.told == [("taichi_cached", first)]  # type: ignore[attr-defined]
    assert [type(fact) for fact in two.facts()] == [Lost, Joined]


async def test_nobody_is_asked_where_hashes_would_say_nothing(two: Two) -> None:
    two.cluster.open()
    assert two.clients[0].told == []
    assert await two.cluster.blocks(two.request()) == ()


async def test_hashes_of_a_prompt_arrive_with_it(two: Two) -> None:
    two.ask(5, 6)
    (arrived,) = two.facts()
    assert isinstance(arrived, Arrived)
    assert arrived.blocks == (5, 6)
