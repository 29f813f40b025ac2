"""Several processes send one plan, and what they report is what one would have counted."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from answering import Answering

from taichi_serve.bench import senders
from taichi_serve.bench.endpoint import Endpoint, EndpointError, client_of
from taichi_serve.bench.openloop import OpenLoop, Plan
from taichi_serve.bench.score import Sample, Score
from taichi_serve.bench.senders import Merged, SenderError, chosen
from taichi_serve.bench.sending import First
from taichi_serve.bench.wire import Begun, Ended, Report, Request
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.slo import SLO

PROMISE = SLO(ttft=30.0, tpot=30.0)


async def loaded(server, score, calls, warm_up=0, early=False, count=3, salt=1):
    async with client_of(server.url, "Bearer secret") as client:
        loop = OpenLoop(Endpoint(client, "tiny", 4096, "0"), salt, count)
        await loop.run(Plan(5, calls, warm_up), score, early, lambda score: None)
    return score


def children() -> set[int]:
    """Processes of ours, ended ones that nobody asked for with them."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_left():
    before = children()
    yield
    assert children() <= before


def spread(count, apart=0.02):
    """So many calls, one after the other: the prompt of number n has 10 + n tokens."""
    return [Call(apart * n, 10 + n, 2) for n in range(count)]


# ------------------------------------------------------------------------------------------ what is sent


async def test_three_senders_send_what_one_would_and_number_it_alike():
    seen = {}
    for count in (1, 3):
        async with Answering().up() as server:
            score = await loaded(server, Score(PROMISE, 8, 0.9), spread(10), warm_up=2, count=count)
        run = score.run(1.0, 1.0)
        numbers = {(s.seed, s.number): (s.prompt_tokens, s.output_tokens, s.good) for s in run.samples}
        counts = run.sent, run.good, run.bad, run.kept, run.whole
        seen[count] = sorted(body["prompt"] for body in server.bodies), numbers, counts
        assert len(run.lateness.busy) == count
        assert 0 <= run.lateness.p99 == run.lag < 5
    assert seen[1] == seen[3]
    assert seen[3][1] == {(5, n): (10 + n, 2, True) for n in range(2, 10)}


class Beginnings(Score):
    """Notes from when the times of requests count."""

    def begin(self, key, live, now):
        self.began = getattr(self, "began", set()) | {live.due - 0.02 * (live.prompt_tokens - 10)}
        super().begin(key, live, now)


async def test_the_times_of_all_senders_count_from_one_instant():
    async with Answering().up() as server:
        score = await loaded(server, Beginnings(PROMISE, 9, 0.9), spread(9))
    assert max(score.began) - min(score.began) < 1e-6
    assert len(server.clients) >= 1 + 3  # a connection of each, beside the one that asks what is live


async def test_requests_go_round_robin_by_when_they_are_due():
    times = [0.0, 0.3, 0.1, 0.2, 0.4, 0.5, 0.6]
    plan = Plan(5, [Call(at, 10, 2) for at in times])
    async with client_of("http://server", None) as client:
        load = senders.Senders(Endpoint(client, "tiny", 4096, "0"), plan, Score(PROMISE, 7, 1.0), 1, 3)
    shares = [[times[request.place] for request in part] for part in load.parts()]
    assert shares == [[0.0, 0.3, 0.6], [0.1, 0.4], [0.2, 0.5]]


async def test_a_sender_has_the_key_and_the_slo_of_a_request():
    async with Answering().up() as server:
        await loaded(server, Score(PROMISE, 2, 1.0), [Call(0.0, 3, 2, slo=SLO(2.0, 0.5))] * 2, count=2)
    assert {head["authorization"] for head in server.heads} == {"Bearer secret"}
    assert {head["x-slo-ttft-ms"] for head in server.heads} == {"2000"}


async def test_a_conversation_stays_with_its_sender_and_goes_on_with_the_answer():
    blocks = 11, 12, 13, 14
    third = Call(0.0, 70, 2, blocks=blocks)
    second = Call(0.05, 60, 3, blocks=blocks[:3], then=third)
    talk = Call(0.0, 40, 4, blocks=blocks[:2], then=second)
    async with Answering().up() as server:
        score = await loaded(server, Score(PROMISE, 7, 1.0), [talk, Call(0.0, 5, 1), talk], count=2)
    assert (score.sent, score.good) == (7, 7)
    prompts = {n: [b["prompt"] for b in server.bodies if len(b["prompt"]) == n] for n in (40, 60, 70)}
    assert {n: len(found) for n, found in prompts.items()} == {40: 2, 60: 2, 70: 2}
    for length, answer, following in ((40, 4, 60), (60, 3, 70)):
        told = [p + [5000 + n for n in range(answer)] for p in prompts[length]]
        assert sorted(p[: length + answer] for p in prompts[following]) == sorted(told)
    assert {sample.number for sample in score.samples} == set(range(7))


# ------------------------------------------------------------------------------------------ how it ends


async def test_a_decided_rate_closes_the_connections_of_all():
    async with Answering(never=frozenset({3})).up() as server:
        calls = [Call(0.0, 3, 2)] * 20 + [Call(3600.0, 3, 2)] * 80
        score = await loaded(server, Score(SLO(1.0, 1.0), 100, 0.9), calls, early=True)
        assert (score.kept, score.sent, score.live) == (False, 20, {})
        async with asyncio.timeout(10):
            while server.cut < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert len(score.busy) == 3


async def test_a_whole_run_does_not_wait_for_what_can_only_be_bad():
    async with Answering(never=frozenset({3})).up() as server:
        score = await loaded(server, Score(SLO(0.01, 1.0), 4, 0.9), [Call(0.0, 3, 2)] * 4, count=2)
    assert (score.bad, score.sent) == (4, 4)


async def test_a_server_without_token_ids_is_named():
    talk = Call(0.0, 40, 4, then=Call(0.0, 60, 3))
    async with Answering(ids=False).up() as server:
        with pytest.raises(EndpointError, match=r"^http://127.0.0.1:\d+/?: it does not return token ids"):
            await loaded(server, Score(PROMISE, 4, 0.9), [talk, talk], count=2)


async def test_a_sender_that_dies_is_one_error_that_says_how():
    before = children()
    async with Answering(never=frozenset({3})).up() as server:
        task = asyncio.create_task(loaded(server, Score(PROMISE, 4, 0.9), [Call(0.0, 3, 2)] * 4, count=2))
        await server.asked.wait()
        victim = min(children() - before)
        os.kill(victim, signal.SIGKILL)
        said = rf"^sender \d \(process {victim}\) of the load was ended by signal 9: it wrote nothing$"
        with pytest.raises(SenderError, match=said):
            await task


async def test_a_sender_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(senders, "MODULE", "taichi_serve.bench.nobody")
    async with Answering().up() as server:
        said = r"^sender 0 \(process \d+\) of the load ended with exit code 1: .*No module named"
        with pytest.raises(SenderError, match=said):
            await loaded(server, Score(PROMISE, 4, 0.9), spread(4), count=2)


async def test_a_sender_that_stands_still_is_named(monkeypatch):
    monkeypatch.setattr(senders, "SILENT_SECONDS", 1.0)
    before = children()
    async with Answering(never=frozenset({3})).up() as server:
        task = asyncio.create_task(loaded(server, Score(PROMISE, 4, 0.9), [Call(0.0, 3, 2)] * 4, count=2))
        await server.asked.wait()
        os.kill(min(children() - before), signal.SIGSTOP)
        with pytest.raises(SenderError, match=r"of the load has said nothing for 1 s$"):
            await task


async def test_who_is_cancelled_leaves_no_process_and_no_connection():
    async with Answering(never=frozenset({3})).up() as server:
        task = asyncio.create_task(loaded(server, Score(PROMISE, 4, 0.9), [Call(0.0, 3, 2)] * 4))
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def bench(server):
    """`taichi bench goodput` with two senders that wait for answers, and their process ids."""
    words = "--workload 3/2 --ttft-slo 60 --tpot-slo 10 --start 20 --requests 100 --senders 2"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "taichi_serve.cli", "bench", "goodput", server.url, *words.split()),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        process_group=0,
    )
    await server.asked.wait()
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(found) == 2
    return process, found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_ctrl_c_ends_all_senders():
    async with Answering(never=frozenset(range(100))).up() as server:
        process, found = await bench(server)
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
        assert (process.returncode, said.decode().splitlines()[-1]) == (
            130,
            "bench: stopped; nothing is left running",
        )
        assert not any(map(alive, found))


async def test_senders_end_when_who_started_them_is_killed():
    async with Answering(never=frozenset(range(100))).up() as server:
        process, found = await bench(server)
        process.kill()
        await process.communicate()
        async with asyncio.timeout(10):
            while any(map(alive, found)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_dead_sender_ends_the_command_with_one_line():
    async with Answering(never=frozenset(range(100))).up() as server:
        process, found = await bench(server)
        os.kill(int(found[1]), signal.SIGKILL)
        _, said = await process.communicate()
    assert process.returncode == 1
    last = f"taichi bench: sender 1 (process {found[1]}) of the load was ended by signal 9: it wrote nothing"
    assert said.decode().splitlines()[-1] == last


# ------------------------------------------------------------------------------------------ put together


def sample(which):
    return Sample(5, 0, which[0], 2, 0.1, 0.01, True, None)


def report(mark, *sent, ended=(), lost=()):
    begun = [Begun((place, 0), due, due + 0.01) for place, due in sent]
    return Report(mark, begun, [(n, 0) for n in lost], [Ended((n, 0), sample((n, 0))) for n in ended])


def merged(count=4, warm_up=0, total=4):
    score = Score(PROMISE, total, 1.0)
    return Merged(Plan(5, spread(count), warm_up), score, 2), score


def test_numbers_are_given_when_nobody_can_have_sent_anything_before():
    both, score = merged()
    both.take(1, report(3.5, (1, 1.0), (3, 3.0), ended=[3]))
    assert score.sent == 0  # the other one may have sent something that was due before
    both.take(0, report(2.5, (0, 0.5), (2, 2.0)))
    assert (score.sent, list(score.live)) == (3, [(5, 0), (5, 1), (5, 2)])
    both.take(0, report(float("inf"), ended=[0]))
    assert [(s.number, s.prompt_tokens) for s in score.samples] == [(0, 0), (3, 3)]


def test_a_warm_up_is_of_those_that_were_due_first_whoever_sent_them():
    both, score = merged(warm_up=3, total=1)
    both.take(1, report(9.0, (1, 1.0), (3, 3.0), ended=[1, 3]))
    both.take(0, report(9.0, (0, 0.5), (2, 2.0), ended=[0]))
    assert (score.sent, [(s.number, s.prompt_tokens) for s in score.samples]) == (1, [(3, 3)])


def test_what_was_said_to_be_lost_counts_once_and_not_when_it_has_ended():
    both, score = merged()
    both.take(0, report(5.0, (0, 0.5), (2, 2.0), lost=[0, 2]))
    both.take(1, report(1.0))
    assert (score.sent, score.lost, score.bad) == (1, {(5, 0)}, 1)
    both.take(0, report(5.0, ended=[0, 2]))
    both.take(1, report(5.0, (1, 1.0), lost=[1]))
    assert (score.sent, score.good, score.lost, score.open) == (3, 2, {(5, 1)}, 0)


def test_a_conversation_goes_through_the_pipe_turn_by_turn():
    long = Call(0.0, 3, 1, blocks=(1 << 63,))
    for _ in range(2000):
        long = Call(1.0, 3, 1, then=long)
    first = Request.of(First(7, long, [1, 2, 3])).first()
    call, turns = first.call, 1
    while call.then is not None:
        call, turns = call.then, turns + 1
    assert (first.place, first.prompt, turns, call.blocks) == (7, [1, 2, 3], 2001, (1 << 63,))


@pytest.mark.parametrize(
    ("asked", "cores", "count"),
    [(0, 2, 1), (0, 15, 1), (0, 16, 2), (0, 64, 4), (0, 999, 16), (1, 64, 1), (3, 2, 3)],
)
def test_senders_are_as_many_as_asked_for_or_by_the_cores(asked, cores, count):
    assert chosen(asked, cores) == count


@pytest.mark.parametrize("asked", [-1, 17])
def test_a_number_of_senders_that_cannot_be_is_named(asked):
    with pytest.raises(ValueError, match=f"^--senders must be between 0 and 16, not {asked}$"):
        chosen(asked)
