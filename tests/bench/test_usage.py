"""What contenders took, for each good request, at their goodputs."""

from dataclasses import replace

from contests import play

from taichi_serve.bench import usage
from taichi_serve.bench.usage import Usage


def contest(**used):
    """A keeps 2.4 requests/s and B 2.6, 95 of 100 good; every visit takes what is said."""
    made = play({"A": 2.4, "B": 2.6})
    made.rounds = [
        replace(done, visits=tuple(replace(visit, usage=used.get(visit.name)) for visit in done.visits))
        for done in made.rounds
    ]
    return made


OURS = Usage(cpu=19.0, joules=9500.0, gpu_bytes=61 << 30, moves={"hand-over": 7, "degrade": 2})


def test_processor_time_and_energy_are_told_for_each_good_request_at_the_goodput():
    found = {row[0]: row[1:] for row in usage.rows(contest(A=OURS, B=replace(OURS, cpu=38.0)))}
    rate, cpu, joules, memory, moves = found["A"]
    # Both seeds were seen whole there, once or more: every visit took as much for its 95 good requests.
    assert (rate, cpu, joules, memory) == ("2.36", "0.2", "100", "61.0")
    assert moves.startswith("hand-over ")
    assert ", degrade " in moves
    assert found["B"][:2] == ("2.59", "0.4")


def test_what_nobody_can_say_is_a_dash_and_who_told_nothing_has_no_row():
    found = usage.rows(contest(A=Usage(cpu=19.0)))
    assert found == [("A", "2.36", "0.2", "-", "-", "-")]
    assert usage.rows(contest()) == []
    assert usage.markdown(contest()) == ""


def test_a_figure_that_one_visit_lacks_is_not_told_for_the_others():
    made = contest(A=OURS)
    low = made.climb("A").low
    number = next(n for n, done in enumerate(made.rounds) if done.rung == low and done.whole("A"))
    silent = replace(OURS, joules=None)
    visits = tuple(replace(visit, usage=silent) for visit in made.rounds[number].visits if visit.name == "A")
    made.rounds[number] = replace(made.rounds[number], visits=visits)
    ((_, _, cpu, joules, *_),) = usage.rows(made)
    assert (cpu, joules) == ("0.2", "-")


def test_the_table_and_the_lines_say_the_same():
    made = contest(A=OURS)
    assert usage.markdown(made).splitlines()[2].startswith("| A | 2.36 | 0.2 | 100 | 61.0 | hand-over ")
    said = "A at 2.36 requests/s: 0.2 s of processor time and 100 J a good request, 61.0 GiB of GPU memory, "
    assert usage.lines(made)[0].startswith(said)
