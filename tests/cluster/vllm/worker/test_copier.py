"""The thread that copies beside the steps: what it copies, in which order, and when it lets go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from taichi_serve.cluster.vllm.curve import Keys, as_server, new_pair, write_keys
from taichi_serve.cluster.vllm.wire import (
    Again,
    Copied,
    Drop,
    Dropped,
    Failed,
    Given,
    Gone,
    More,
    Order,
    Return,
    Word,
    copier_endpoint,
)
from taichi_serve.cluster.vllm.worker.copier import PIECE, Copier

Read = tuple[str, list[int], list[int], str]


class Blocks:
    """A reader that keeps what it is asked for; a read is over when `gate` is open."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Semaphore(0)
        self.forgotten: list[str] = []
        self.still: set[str] = set()  # sources whose reads do not end

    def read(self, source: str, remote: list[int], local: list[int], note: str) -> Callable[[], bool]:
        if source == "gone":
            raise OSError("no such process")
        if source == "odd":
            raise ValueError("two ranks")
        self.reads.append((source, remote, local, note))
        self.asked.release()
        return lambda: self.gate.is_set() and source not in self.still

    def forget(self, source: str) -> None:
        self.forgotten.append(source)


class Bench:
    """A copier and the server's end of its line."""

    def __init__(self, directory: Path) -> None:
        self.blocks = Blocks()
        self.copier = Copier(directory, "e1", 0, self.blocks)
        self._context = zmq.Context()
        self._line = self._context.socket(zmq.PAIR)
        self._line.connect(copier_endpoint(directory, "e1", 0))
        self._line.setsockopt(zmq.RCVTIMEO, 10_000)

    def send(self, order: Order) -> None:
        self._line.send(msgspec.msgpack.encode(order))

    def hear(self) -> Word:
        """The next word."""
        return msgspec.msgpack.decode(self._line.recv(), type=Word)

    def catch_up(self) -> None:
        """Wait until the thread has taken everything before this: it looks at both of its queues in turn."""
        for turn in ("first", "second"):
            self.send(Drop(turn))
            assert self.hear() == Dropped(turn)

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    here = Bench(tmp_path)
    yield here
    here.close()


def blocks_of(word: Word) -> tuple[str, int, bool, int]:
    assert isinstance(word, Copied)
    return word.leg, word.blocks, word.last, word.copied


def test_full_blocks_are_copied_once_and_the_tail_brings_the_rest(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10, 11, 12, 13], first=1))  # block 0 is in the prefix cache here
    bench.send(More("a#1", "e0", [20, 21, 22]))
    assert blocks_of(bench.hear()) == ("a#1", 3, False, 2)
    bench.send(More("a#1", "e0", [20, 21, 22, 23], "a"))
    assert blocks_of(bench.hear()) == ("a#1", 4, True, 3)
    assert bench.blocks.reads == [("e0", [21, 22], [11, 12], ""), ("e0", [23], [13], "a")]
    assert bench.copier.wait("a#1", 10.0)


def test_it_may_hear_of_the_source_before_blocks_are_given(bench: Bench) -> None:
    bench.send(More("a#1", "e0", [20]))
    bench.send(More("b#1", "e0", []))
    bench.copier.order(Given("b#1", [12], first=0))
    assert blocks_of(bench.hear()) == ("b#1", 0, False, 0)
    bench.copier.order(Given("a#1", [10], first=0))
    assert blocks_of(bench.hear()) == ("a#1", 1, False, 1)


def test_where_nothing_is_missing_the_source_is_told_all_the_same(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10], first=1))
    bench.send(More("a#1", "e0", [20], "a"))
    assert blocks_of(bench.hear()) == ("a#1", 1, True, 0)
    assert bench.blocks.reads == [("e0", [], [], "a")]


def test_the_tail_of_a_leg_is_read_after_what_is_under_way_for_it(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10, 11], first=0))
    bench.blocks.gate.clear()
    bench.send(More("a#1", "e0", [20]))
    assert bench.blocks.asked.acquire(timeout=10)
    bench.send(More("a#1", "e0", [20, 21], "a"))
    bench.catch_up()
    assert bench.blocks.reads == [("e0", [20], [10], "")]
    bench.blocks.gate.set()
    assert blocks_of(bench.hear()) == ("a#1", 2, True, 2)
    assert bench.blocks.reads[1:] == [("e0", [21], [11], "a")]


def test_a_tail_goes_before_what_is_only_copied_ahead(bench: Bench) -> None:
    many = list(range(3 * PIECE))
    bench.send(More("a#1", "e0", many))
    bench.send(More("b#1", "e0", [600], "b"))
    bench.catch_up()
    bench.copier.order(Given("a#1", many, first=0), Given("b#1", [500], first=0))
    assert [bench.hear().leg for _ in range(2)] == ["b#1", "a#1"]
    assert [len(read[1]) for read in bench.blocks.reads] == [1, PIECE, PIECE, PIECE]


def test_what_cannot_be_read_is_told_and_counts_for_nothing_in_the_step(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10, 11], first=1))
    bench.send(More("a#1", "gone", [20, 21], "a"))
    assert bench.hear() == Failed("a#1", "OSError: no such process")
    assert not bench.copier.wait("a#1", 10.0)


def test_more_than_was_kept_for_it_is_refused(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "e0", [20, 21], "a"))
    assert bench.hear() == Failed("a#1", "2 blocks do not fit into the 1 kept for it")


def test_dropped_is_said_only_after_what_was_under_way(bench: Bench) -> None:
    bench.blocks.gate.clear()
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "e0", [20]))
    assert bench.blocks.asked.acquire(timeout=10)
    bench.send(Drop("a#1"))
    bench.copier.order(Return("a#1"))
    assert bench.copier.returned() == set()
    bench.blocks.gate.set()
    assert blocks_of(bench.hear()) == ("a#1", 1, False, 1)
    assert bench.hear() == Dropped("a#1")
    bench.catch_up()
    assert bench.copier.returned() == {"a#1"}
    assert bench.copier.returned() == set()


def test_a_leg_that_was_dropped_before_its_blocks_were_given_is_not_begun(bench: Bench) -> None:
    bench.send(Drop("a#1"))
    assert bench.hear() == Dropped("a#1")
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "e0", [20]))
    bench.copier.order(Return("a#1"))
    bench.catch_up()
    assert bench.blocks.reads == []
    assert bench.copier.returned() == {"a#1"}


def test_the_memory_of_a_lost_engine_is_let_go(bench: Bench) -> None:
    bench.send(Gone("e0"))
    bench.catch_up()
    assert bench.blocks.forgotten == ["e0"]


def test_a_step_does_not_wait_for_ever_and_the_server_hears_of_it(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10, 11], first=1))
    bench.catch_up()
    assert not bench.copier.wait("a#1", 0.01)
    assert bench.hear() == Failed("a#1", "its last blocks were not here in time")


def test_a_leg_that_was_dropped_meanwhile_is_not_here_and_the_step_does_not_wait_for_it(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(Drop("a#1"))
    assert bench.hear() == Dropped("a#1")
    assert not bench.copier.wait("a#1", 10.0)


def test_a_leg_that_the_thread_has_not_heard_of_yet_is_not_here(bench: Bench) -> None:
    assert not bench.copier.wait("a#1", 0.01)


def test_all_blocks_but_the_last_are_not_enough(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10, 11], first=0))
    bench.send(More("a#1", "e0", [20]))
    assert blocks_of(bench.hear()) == ("a#1", 1, False, 1)
    assert not bench.copier.wait("a#1", 0.01)


def test_a_step_waits_no_longer_for_a_leg_that_is_dropped_while_its_read_stands_still(bench: Bench) -> None:
    bench.blocks.gate.clear()
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "e0", [20], "a"))
    assert bench.blocks.asked.acquire(timeout=10)
    bench.send(Drop("a#1"))
    assert not bench.copier.wait("a#1", 10.0)


def test_late_is_told_when_the_read_under_way_is_over_and_not_before(bench: Bench) -> None:
    bench.blocks.gate.clear()
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "e0", [20], "a"))
    assert bench.blocks.asked.acquire(timeout=10)
    assert not bench.copier.wait("a#1", 0.01)
    bench.copier.order(Return("a#1"))
    bench.catch_up()
    assert bench.copier.returned() == set()
    bench.blocks.gate.set()
    assert blocks_of(bench.hear()) == ("a#1", 1, True, 1)
    assert bench.hear() == Failed("a#1", "its last blocks were not here in time")
    bench.catch_up()
    assert bench.copier.returned() == {"a#1"}


def test_a_read_whose_source_stands_still_keeps_nobody_else_waiting(bench: Bench) -> None:
    bench.blocks.still = {"e0"}
    bench.copier.order(Given("a#1", [10], first=0), Given("b#1", [11], first=0), Given("c#1", [12], first=0))
    bench.send(More("a#1", "e0", [20]))
    assert bench.blocks.asked.acquire(timeout=10)
    bench.send(More("b#1", "e2", [30], "b"))  # a tail begins at once
    assert blocks_of(bench.hear()) == ("b#1", 1, True, 1)
    assert bench.copier.wait("b#1", 10.0)
    bench.send(More("c#1", "e2", [31]))  # what is copied ahead, when the read before it is slow
    assert blocks_of(bench.hear()) == ("c#1", 1, False, 1)
    bench.send(Drop("a#1"))
    bench.send(Drop("c#1"))
    assert bench.hear() == Dropped("c#1")
    bench.blocks.still = set()
    assert blocks_of(bench.hear()) == ("a#1", 1, False, 1)
    assert bench.hear() == Dropped("a#1")


def test_whatever_a_read_raises_ends_its_leg_and_nothing_else(bench: Bench) -> None:
    bench.copier.order(Given("a#1", [10], first=0))
    bench.send(More("a#1", "odd", [20]))
    assert bench.hear() == Failed("a#1", "ValueError: two ranks")
    bench.catch_up()


def test_an_order_that_cannot_be_read_is_passed_over(bench: Bench) -> None:
    bench._line.send(b"\xff")
    bench.catch_up()


def test_a_prefix_is_copied_in_pieces_whole_and_its_source_is_told_nothing(bench: Bench) -> None:
    long = PIECE + 4
    here = list(range(1000, 1000 + long))
    bench.send(More("a", "s", list(range(long)), "", whole=True))
    bench.catch_up()
    bench.copier.order(Given("a", here, 1))
    assert blocks_of(bench.hear()) == ("a", long, True, long - 1)
    assert [(len(remote), note) for _, remote, _, note in bench.blocks.reads] == [(PIECE, ""), (3, "")]
    bench.catch_up()
    assert bench.copier._legs == {}
    bench.copier.order(Return("a"))  # its request was aborted before it heard of that
    bench.catch_up()
    assert bench.copier.returned() == {"a"}


def test_a_prefix_that_is_shorter_than_what_is_here_is_copied_without_a_read(bench: Bench) -> None:
    bench.copier.order(Given("a", [5, 6, 7], 2))
    bench.catch_up()
    bench.send(More("a", "s", [1], "", whole=True))
    assert blocks_of(bench.hear()) == ("a", 2, True, 0)
    assert bench.blocks.reads == []


def test_a_prefix_that_cannot_be_read_is_told_and_its_blocks_come_back_when_they_are_wanted(
    bench: Bench,
) -> None:
    bench.copier.order(Given("a", [5, 6], 0))
    bench.catch_up()
    bench.send(More("a", "gone", [1, 2], "", whole=True))
    assert bench.hear() == Failed("a", "OSError: no such process")
    bench.send(Drop("a"))
    assert bench.hear() == Dropped("a")
    bench.copier.order(Return("a"))
    bench.catch_up()
    assert bench.copier.returned() == {"a"}


def test_another_server_is_met_where_the_keys_say_and_names_may_be_given_again(
    bench: Bench, tmp_path: Path
) -> None:
    bench.send(Drop("a#1"))  # of the first server
    assert bench.hear() == Dropped("a#1")
    bench.copier.order(Given("b#1", [13], first=0))
    bench.close()
    own, theirs, here = new_pair(), new_pair(), zmq.Context()
    line = here.socket(zmq.DEALER)
    line.setsockopt(zmq.RCVTIMEO, 10_000)
    as_server(own, [theirs.public])(here, line)
    port = line.bind_to_random_port("tcp://127.0.0.1")
    write_keys(tmp_path, "e1", Keys(own.public, theirs, new_pair(), [f"tcp://127.0.0.1:{port}"]))
    bench.copier.order(Return("b#1"), Again(), Given("a#1", [10, 11], first=0))
    line.send(msgspec.msgpack.encode(More("a#1", "e0", [20, 21], "a")))
    assert blocks_of(msgspec.msgpack.decode(line.recv(), type=Word)) == ("a#1", 2, True, 2)
    assert bench.copier.returned() == {"b#1"}
    here.destroy(linger=0)
