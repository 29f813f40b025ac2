"""Mooncake's traces: which prompts begin alike, whose answer is known, and lines that cannot be right."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.sharing import shared
from taichi_serve.bench.trace import TraceError
from taichi_serve.bench.traces import read_trace
from taichi_serve.bench.workload import workload


def row(at, prompt, output, ids):
    return json.dumps({"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": ids})


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "t.jsonl"
        path.write_bytes("\n".join(lines).encode() if isinstance(lines[0], str) else lines[0])
        return path

    return write


def refused(path, **more):
    with pytest.raises(TraceError) as error:
        read_trace(path, **more)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))
    return str(error.value).removeprefix(f"{path}: ")


def test_lengths_times_and_full_blocks_of_a_prompt_are_read(written):
    trace = read_trace(written(row(0, 1200, 5, [7, 8, 9]), "", row(2500, 512, 3, [7]), row(2500, 20, 1, [4])))
    assert (list(trace.prompts), list(trace.outputs), list(trace.times)) == (
        [1200, 512, 20], [5, 3, 1], [0.0, 2.5, 2.5],
    )  # fmt: skip
    # Block 9 has only 176 tokens of the prompt, and block 4 has 20: neither is full.
    assert [len(blocks) for blocks in trace.blocks] == [2, 1, 0]
    assert trace.blocks[0][0] == trace.blocks[1][0]
    assert (trace.block_size, trace.rate) == (512, 2 / 2.5)


def test_a_hash_stands_for_all_before_it_too(written):
    trace = read_trace(written(row(0, 1024, 1, [1, 2]), row(0, 1024, 1, [3, 2]), row(0, 1024, 1, [2, 1])))
    assert len({block for blocks in trace.blocks for block in blocks}) == 6


def test_the_answer_has_the_blocks_of_the_next_turn(written):
    # Of 1600 tokens 3 blocks are full; the second has the end of the prompt, and the answer begins in it.
    trace = read_trace(written(row(0, 1000, 600, [1, 2]), row(9000, 2048, 1, [1, 5, 6, 7])))
    first, second = trace.blocks
    assert first == second[:3]


def test_nobody_has_the_blocks_of_an_answer_with_two_continuations(written):
    more = row(9000, 2048, 1, [1, 5, 6, 7]), row(9000, 2048, 1, [1, 9, 6, 7])
    trace = read_trace(written(row(0, 1000, 600, [1, 2]), *more))
    first = trace.blocks[0]
    assert len(first) == 3
    assert first[0] == trace.blocks[1][0] == trace.blocks[2][0]
    assert not set(first[1:]) & {block for blocks in trace.blocks[1:] for block in blocks}


@pytest.mark.parametrize(
    "following",
    [
        (9000, 1599, 1, [1, 5, 6, 7]),  # too short for prompt and answer
        (9000, 2048, 1, [3, 5, 6, 7]),  # another beginning
    ],
)
def test_a_prompt_that_cannot_hold_the_answer_does_not_say_what_it_is(written, following):
    trace = read_trace(written(row(0, 1000, 600, [1, 2]), row(*following)))
    assert len(trace.blocks[0]) == 3
    assert not set(trace.blocks[0][1:]) & set(trace.blocks[1])


def test_an_earlier_prompt_is_no_next_turn(written):
    trace = read_trace(written(row(0, 2048, 1, [1, 5, 6, 7]), row(9000, 1000, 600, [1, 2])))
    assert not set(trace.blocks[1][1:]) & set(trace.blocks[0])


def test_answers_of_prompts_without_a_full_block_are_unlike(written):
    trace = read_trace(written(*(row(0, 300, 300, [1]) for _ in range(5)), row(0, 700, 1, [1, 2])))
    assert len({trace.blocks[n] for n in range(6)}) == 6


def test_a_scale_takes_the_blocks_with_it(written):
    path = written(row(0, 1023, 100, [1, 2]), row(0, 1024, 100, [1, 3]))
    trace = read_trace(path, scale=0.125)
    assert trace.block_size == 64
    assert list(zip(trace.prompts, trace.outputs, strict=True)) == [(127, 12), (128, 12)]
    # 127 tokens have one full block, and the answer fills the second.
    assert [len(blocks) for blocks in trace.blocks] == [2, 2]
    assert trace.blocks[0][0] == trace.blocks[1][0]
    for wrong in (0.3, 1 / 64):
        assert refused(path, scale=wrong).startswith(
            f"row 1: hash_ids: a block of 512 tokens times {wrong:g}"
        )


def test_a_row_that_is_cut_keeps_the_blocks_of_its_beginning(written):
    path = written(row(0, 2000, 600, [1, 2, 3, 4]), row(9, 2000, 10, [1, 2, 3, 9]))
    assert refused(path, limit=2300).startswith("row 1: input_length: 2000 + 600 tokens are over the model's")
    trace = read_trace(path, limit=2300, over_limit="cut")
    assert (list(trace.prompts), trace.over) == ([1700, 2000], 1)
    assert trace.blocks[0][:3] == trace.blocks[1][:3]
    # What would be its answer is the rest of its prompt: nobody has that.
    assert not set(trace.blocks[0][3:]) & set(trace.blocks[1])
    skipped = read_trace(path, limit=2300, over_limit="skip")
    assert (list(skipped.prompts), len(skipped.blocks), len(skipped.times)) == ([2000], 1, 1)


GOOD = {"timestamp": 5, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}
BAD = [
    ("{", "row 2: no JSON: Expecting property name"),
    ("[1, 2]", "row 2: expected an object with timestamp, input_length, output_length, hash_ids"),
    ("7", "row 2: expected an object"),
    ('{"a":' * 100_000, "row 2: no JSON: "),
    ('{"timestamp": ' + "9" * 5000 + "}", "row 2: no JSON: "),
    ({"input_length": None}, "row 2: input_length: expected {TOKENS}, not null"),
    ({"input_length": 0}, "row 2: input_length: expected a whole number"),
    ({"input_length": 600.0}, "row 2: input_length: expected {TOKENS}, not 600.0"),
    ({"input_length": True}, "row 2: input_length: expected a whole number"),
    ({"input_length": 10**30}, "row 2: input_length: expected {TOKENS}, not a number beyond"),
    ({"output_length": "5"}, "row 2: output_length: expected {TOKENS}, not \"5\""),
    ({"output_length": -1}, "row 2: output_length: expected"),
    ({"timestamp": -1}, "row 2: timestamp: expected {MS}, not -1"),
    ({"timestamp": float("nan")}, "row 2: timestamp: expected milliseconds"),
    ({"timestamp": float("inf")}, "row 2: timestamp: expected milliseconds"),
    ({"timestamp": 10**400}, "row 2: timestamp: expected {MS}, not a number beyond 2^63"),
    ({"timestamp": "0"}, "row 2: timestamp: expected milliseconds"),
    ({"timestamp": 4}, "row 2: timestamp: 4 is earlier than the row before"),
    ({"hash_ids": None}, "row 2: hash_ids: expected a list of whole numbers, not null"),
    ({"hash_ids": "12"}, "row 2: hash_ids: expected a list"),
    ({"hash_ids": [1]}, "row 2: hash_ids: 1 ids for 600 tokens, expected 2: one for every 512"),
    ({"hash_ids": [1, 2, 3]}, "row 2: hash_ids: 3 ids for 600 tokens, expected 2"),
    ({"hash_ids": [1, -2]}, "row 2: hash_ids: expected whole numbers of at least 0 and below 2^63, not -2"),
    ({"hash_ids": [1, 2**63]}, "row 2: hash_ids: expected whole numbers"),
    ({"hash_ids": [1, 1.5]}, "row 2: hash_ids: expected whole numbers"),
    ({"hash_ids": [1, False]}, "row 2: hash_ids: expected whole numbers"),
    ({"hash_ids": [1, ["x" * 500]]}, "row 2: hash_ids: expected whole numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "line"), BAD)
def test_what_cannot_be_right_is_one_line(written, wrong, line):
    second = wrong if isinstance(wrong, str) else json.dumps(GOOD | wrong)
    assert refused(written(json.dumps(GOOD), second)).startswith(
        line.format(
            TOKENS="a whole number of at least 1 and at most 1000000000",
            MS="milliseconds of at least 0 and at most 1e+15",
        )
    )


def test_a_field_that_is_missing_is_named(written):
    for field in GOOD:
        less = {key: value for key, value in GOOD.items() if key != field}
        assert refused(written(json.dumps(less))).startswith(f"row 1: {field}: expected ")


def test_bytes_that_are_no_text_are_told(written):
    assert refused(written(b'{"timestamp": 0, "x": "\xff"}')).startswith("cannot be read: 'utf-8' codec")
    assert read_trace(written(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")).prompts[0] == 600


def test_a_file_without_a_row_that_fits_is_refused(written):
    path = written(json.dumps(GOOD))
    assert (
        refused(path, limit=100, over_limit="skip")
        == "row 1: every row is over the model's limit of 100 tokens"
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from([*GOOD, "chat_id"]), VALUES)
HOSTILE = st.one_of(
    ROWS.map(lambda wrong: json.dumps(GOOD | wrong)),
    VALUES.map(json.dumps),
    st.text(max_size=40),
    st.just(json.dumps(GOOD)),
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(HOSTILE, min_size=1, max_size=4), over=st.sampled_from(["refuse", "skip", "cut"]))
def test_hostile_lines_are_read_or_refused_in_one_line(tmp_path_factory, lines, over):
    path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    path.write_bytes("\n".join([json.dumps(GOOD), *lines]).encode(errors="surrogatepass"))
    trace, said = read_or_said(path, 700, over)
    if trace is None:
        assert said.startswith(f"{path}: ")
        assert said.isprintable()
    else:
        assert len(trace) == len(trace.blocks) == len(trace.times) == len(trace.outputs)
        assert all(p + o <= 700 for p, o in zip(trace.prompts, trace.outputs, strict=True))


def read_or_said(path, limit, over):
    """The trace, or what is wrong with it."""
    try:
        return read_trace(path, limit, over_limit=over), ""
    except TraceError as error:
        return None, str(error)


@st.composite
def conversations(draw):
    """Some conversations, in turns one after another: the tokens of each prompt and of its answer."""
    rows, kinds = [], draw(st.integers(1, 4))
    told = [[number * 1000] * draw(st.integers(1, 1500)) for number in range(kinds)]
    for number in draw(st.lists(st.integers(0, kinds - 1), min_size=1, max_size=10)):
        new = [len(rows) + 1] * draw(st.integers(1, 900))
        prompt = told[number] + new
        answer = [-len(rows) - 1] * draw(st.integers(1, 900))
        rows.append((prompt, answer))
        if draw(st.booleans()):
            told[number] = prompt + answer
    return rows


def ids_of(prompts):
    """As Mooncake made them: equal for equal beginnings."""
    names = {}
    return [
        [names.setdefault(tuple(p[: at + 512]), len(names)) for at in range(0, len(p), 512)] for p in prompts
    ]


@settings(max_examples=100, deadline=None)
@given(rows=conversations())
def test_equal_blocks_of_prompts_are_equal_tokens(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "talks.jsonl"
    ids = ids_of([prompt for prompt, _ in rows])
    path.write_text(
        "\n".join(row(n, len(p), len(a), i) for n, ((p, a), i) in enumerate(zip(rows, ids, strict=True)))
    )
    trace = read_trace(path)
    for number, (prompt, answer) in enumerate(rows):
        blocks = trace.blocks[number]
        assert len(blocks) == (len(prompt) + len(answer)) // 512
        for other, _ in rows[number + 1 :]:
            theirs = trace.blocks[rows.index((other, _))][: len(other) // 512]
            full = min(len(prompt), len(other)) // 512
            for place in range(full):
                end = 512 * (place + 1)
                assert (blocks[place] == theirs[place]) == (prompt[:end] == other[:end])


@pytest.fixture
def timed(written):
    return str(written(*(row(1000 * n * n, 600 + n, 2, [n, 99]) for n in range(5))))  # at 0, 1, 4, 9 and 16 s


def played(name, arrivals, rate, count, seed=0):
    return list(workload(name, 4096, arrivals=arrivals).calls(rate, count, seed))


def test_own_arrivals_at_the_traces_own_rate_are_those_of_the_file(timed):
    calls = played(timed, Arrivals("trace"), 4 / 16, 5)
    assert [call.at for call in calls] == pytest.approx([0, 1, 4, 9, 16])
    assert [call.at for call in played(timed, Arrivals("trace"), 1.0, 5)] == pytest.approx(
        [0, 0.25, 1, 2.25, 4]
    )


def test_a_trace_begins_again_after_its_last_row_with_blocks_that_nobody_has(timed):
    calls = played(timed, Arrivals("trace"), 4 / 16, 10)
    assert [call.at for call in calls[5:]] == pytest.approx([20, 21, 24, 29, 36])
    assert [call.prompt_tokens for call in calls] == 2 * [600, 601, 602, 603, 604]
    assert shared(calls, 512) == 0.0


def test_seeds_begin_at_rows_of_their_own_and_seed_0_at_the_first(timed):
    firsts = {seed: played(timed, Arrivals("trace"), 0.25, 5, seed)[0].prompt_tokens for seed in range(20)}
    assert firsts[0] == 600
    assert len(set(firsts.values())) == 5
    calls = played(timed, Arrivals("trace"), 0.25, 5, next(s for s, p in firsts.items() if p == 603))
    assert [call.at for call in calls] == pytest.approx([0, 7, 11, 12, 15])
    assert len({call.blocks for call in calls}) == 5


def test_rows_with_blocks_keep_their_order_whatever_the_arrivals(timed):
    slow, fast = (played(timed, Arrivals(), rate, 5) for rate in (1.0, 2.0))
    assert [call.prompt_tokens for call in slow] == [600, 601, 602, 603, 604]
    assert [call.at / 2 for call in slow] == pytest.approx([call.at for call in fast])
    assert all(a.at < b.at for a, b in pairwise(slow))


def test_times_that_are_not_used_are_said(timed, tmp_path):
    assert "t has arrival times that are not used: Poisson arrivals can promise" in workload(timed, 4096).note
    assert workload(timed, 4096, arrivals=Arrivals("trace")).note == ""
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("num_prefill_tokens,num_decode_tokens\n1,1\n")
    assert workload(str(lengths), 4096).note == ""


@pytest.mark.data
def test_the_public_trace_is_read_and_shares_what_it_shares(data_directory):
    path = data_directory / "traces" / "mooncake_conversation.jsonl"
    trace = read_trace(path)
    assert (len(trace), trace.rate) == (12031, pytest.approx(3.40, abs=0.01))
    load = workload(str(path), 1 << 40, arrivals=Arrivals("trace"))
    calls = list(load.calls(trace.rate, 12031, 0))
    assert calls[-1].at == pytest.approx(3536.999)
    assert shared(calls, load.block_size) == pytest.approx(0.382, abs=0.001)
