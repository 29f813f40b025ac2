"""Traces as they are found: other clocks, other editors, rows that no model takes."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.bench.trace import TraceError
from taichi_serve.bench.traces import read_trace
from taichi_serve.bench.workload import workload

LENGTHS = "num_prefill_tokens,num_decode_tokens\n"
TIMED = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "t.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path, **more):
    with pytest.raises(TraceError) as error:
        read_trace(path, **more)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))
    return str(error.value).removeprefix(f"{path}: ")


def test_times_with_an_offset_are_moments(written):
    trace = read_trace(
        written(
            AZURE + "2024-05-10 00:00:00.009930+00:00,10,2\n2024-05-10 02:00:00.009930+02:00,10,2\n"
            "2024-05-10T00:00:01.5099300Z,10,2\n"
        )
    )
    assert [at - trace.times[0] for at in trace.times] == pytest.approx([0.0, 0.0, 1.5])


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
@pytest.mark.parametrize("day", ["2023-03-26", "2023-10-29", "2023-03-12", "2023-11-05"])
def test_naive_times_do_not_feel_the_clocks_of_whoever_reads_them(written, monkeypatch, zone, day):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        rows = "".join(f"{day} 0{hour}:30:00.0000001,10,2\n" for hour in range(6))
        trace = read_trace(written(AZURE + rows))
        assert [at - trace.times[0] for at in trace.times] == [3600.0 * hour for hour in range(6)]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_editors_and_spreadsheets_add_is_read_over(written):
    text = b'\xef\xbb\xbf"num_prefill_tokens", num_decode_tokens\r\n"12","3"\r\n\r\n 7 , 2.0 \r\n1e3,1\r\n'
    trace = read_trace(written(text))
    assert (list(trace.prompts), list(trace.outputs)) == ([12, 7, 1000], [3, 2, 1])


BAD = [
    ("", "row 1: columns (none); expected TIMESTAMP"),
    (b"\xff\xfe\x00a", "cannot be read: 'utf-8' codec"),
    (LENGTHS, "row 2: the trace has no requests"),
    (LENGTHS + "inf,1\n", "row 2: num_prefill_tokens: expected a whole number of at least 1, not 'inf'"),
    (LENGTHS + "1,-Infinity\n", "row 2: num_decode_tokens: expected a whole number"),
    (LENGTHS + "nan,1\n", "row 2: num_prefill_tokens: expected a whole number"),
    (LENGTHS + "1,-5\n", "row 2: num_decode_tokens: expected a whole number"),
    (LENGTHS + "1e400,1\n", "row 2: num_prefill_tokens: expected a whole number of at least 1 and at most"),
    (LENGTHS + "1e15,1\n", "row 2: num_prefill_tokens: expected a whole number of at least 1 and at most"),
    (LENGTHS + "1_0,1\n", "row 2: num_prefill_tokens: expected a whole number"),
    (LENGTHS + "٣,1\n", "row 2: num_prefill_tokens: expected a whole number"),
    (LENGTHS + "1.5,1\n", "row 2: num_prefill_tokens: expected a whole number"),
    (LENGTHS + "5,1\n\n1,2,3\n", "row 4: 3 fields under a header of 2"),
    (LENGTHS + '5,1\n"5,1\n5,1\n', "row 3: no CSV: unexpected end of data"),
    (LENGTHS + f"{'9x' * 5000},1\n", "row 2: num_prefill_tokens: expected a whole number of at least 1, not"),
    (TIMED + "nan,5,1\n", "row 2: arrived_at: expected seconds of at least 0, not 'nan'"),
    (TIMED + "inf,5,1\n", "row 2: arrived_at: expected seconds"),
    (TIMED + "3,5,1\n2,5,1\n", "row 3: arrived_at: 2 is earlier than the row before"),
    (AZURE + "2024-05-10 00:00:01,5,1\n2024-05-10 00:00:00,5,1\n", "row 3: TIMESTAMP: 2024"),
    (AZURE + "2024-05-10 00:00:01,5,1\n2024-05-10 00:00:02Z,5,1\n", "row 3: TIMESTAMP: 2024-"),
    (AZURE + "2024-13-10 00:00:01,5,1\n", "row 2: TIMESTAMP: expected a date and time, not '2024-13-10"),
    (AZURE + ",5,1\n", "row 2: TIMESTAMP: expected a date and time, not ''"),
    ("[1, 2]\n", "row 1: columns [1, 2]; expected TIMESTAMP"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), BAD)
def test_what_cannot_be_right_is_one_line(written, text, line):
    assert refused(written(text)).startswith(line)


def test_a_folder_is_no_trace(tmp_path):
    assert refused(tmp_path).startswith("cannot be read: ")


WORDS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["2024-05-10 00:00:00", "2024-05-10T00:00:01Z", '"', "", "1e3", "5"]),
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.sampled_from([LENGTHS, TIMED, AZURE]),
    rows=st.lists(st.lists(WORDS, max_size=4).map(",".join), max_size=4),
)
def test_hostile_rows_are_read_or_refused_in_one_line(tmp_path_factory, header, rows):
    path = tmp_path_factory.getbasetemp() / "hostile.csv"
    path.write_bytes((header + "\n".join(rows)).encode(errors="surrogatepass"))
    trace, said = read_or_said(path)
    if trace is None:
        assert said.startswith(f"{path}: ")
        assert "\n" not in said
    else:
        assert len(trace) == len(trace.outputs) > 0
        assert len(trace.times) == (0 if header == LENGTHS else len(trace))


def read_or_said(path):
    """The trace, or what is wrong with it."""
    try:
        return read_trace(path), ""
    except TraceError as error:
        return None, str(error)


LONG = LENGTHS + "90,10\n91,10\n50,200\n3,99\n"


def test_rows_over_the_limit_are_refused_skipped_or_cut_and_counted(written):
    path = written(LONG)
    assert refused(path, limit=100).startswith("row 3: num_prefill_tokens: 91 + 10 tokens are over")
    skipped = read_trace(path, 100, over_limit="skip")
    assert (list(skipped.prompts), list(skipped.outputs)) == ([90], [10])
    assert skipped.note("skip") == (
        "t: 3 of 4 rows are over the model's limit of 100 tokens and were skipped"
    )
    cut = read_trace(path, 100, over_limit="cut")
    assert list(zip(cut.prompts, cut.outputs, strict=True)) == [(90, 10), (90, 10), (1, 99), (1, 99)]
    assert workload(str(path), 100, over_limit="cut").note.endswith("and were cut")
    assert workload(str(path), 1000).note == ""
    assert (
        refused(path, limit=10, over_limit="skip")
        == "row 2: every row is over the model's limit of 10 tokens"
    )


def test_a_skipped_row_still_has_its_place_in_time(written):
    path = written(TIMED + "5,90,20\n6,1,1\n5.5,1,1\n")
    assert (
        refused(path, limit=100, over_limit="skip") == "row 4: arrived_at: 5.5 is earlier than the row before"
    )


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "rate"),
    [("azure_conv_2023", 19366, 5.53), ("arxiv_summarization", 28257, 0.0), ("sharegpt_300", 300, 10.26)],
)
def test_public_traces_are_read(data_directory, name, rows, rate):
    trace = read_trace(data_directory / "traces" / f"{name}.csv")
    assert (len(trace), trace.rate) == (rows, pytest.approx(rate, abs=0.01))
