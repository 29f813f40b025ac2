"""Token ids: equal where blocks are equal, and nowhere else."""

from taichi_serve.bench.prompts import TOKENS, Prompts
from taichi_serve.cluster.simulated.job import Call

A = Call(0.0, 40, 10, blocks=(1, 2, 3))
B = Call(0.0, 50, 10, blocks=(1, 2, 9))


def test_prompts_have_the_tokens_of_their_blocks_and_a_rest_of_their_own():
    prompts = Prompts(7, 16)
    one, again, other = prompts.first(A), prompts.first(A), prompts.first(B)
    assert (len(one), len(again), len(other)) == (40, 40, 50)
    assert one[:32] == again[:32] == other[:32]
    assert one[32:] != again[32:]
    assert set(one) <= set(TOKENS)
    assert one[:16] != one[16:32]


def test_another_run_has_other_tokens_and_the_same_salt_the_same():
    assert Prompts(7, 16).first(A) == Prompts(7, 16).first(A)
    assert Prompts(7, 16).first(A)[:16] != Prompts(8, 16).first(A)[:16]


def test_without_blocks_nothing_is_alike():
    prompts = Prompts(7, 16)
    assert prompts.first(Call(0.0, 40, 1)) != prompts.first(Call(0.0, 40, 1))


def test_the_next_turn_has_the_prompt_and_the_answer_as_they_were_and_goes_on():
    prompts = Prompts(7, 16)
    first, answer = prompts.first(A), list(range(5000, 5010))
    then = Call(1.0, 70, 10, blocks=(1, 2, 3, 4, 5))
    prompt = prompts.following(first + answer, A, then)
    assert prompt[:50] == first + answer
    assert len(prompt) == 70
    assert prompt[50:] == [token for token in prompt[50:] if token in TOKENS]
    # Another conversation's block 4 (tokens 48 to 63) begins within this answer: it has its own tokens.
    assert prompt[50:64] != Prompts(7, 16).first(then)[50:64]


def test_an_answer_that_broke_off_is_filled_up():
    prompts = Prompts(7, 16)
    first = prompts.first(A)
    prompt = prompts.following([*first, 5000], A, Call(1.0, 70, 10, blocks=(1, 2, 3, 4, 5)))
    assert prompt[:41] == [*first, 5000]
    assert (len(prompt), set(prompt[41:]) <= set(TOKENS)) == (70, True)


def test_a_turn_that_starts_over_keeps_only_what_its_blocks_say():
    prompts = Prompts(7, 16)
    first = prompts.first(A)
    prompt = prompts.following(first + list(range(5000, 5010)), A, Call(1.0, 40, 10, blocks=(1, 8, 9)))
    assert prompt[:16] == first[:16]
    assert prompt[16:32] == Prompts(7, 16).first(Call(0.0, 32, 1, blocks=(1, 8)))[16:]
    assert (len(prompt), 5000 in prompt) == (40, False)
