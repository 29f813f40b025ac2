"""The step model is found again from steps it made itself, and its error is told honestly."""

from __future__ import annotations

from itertools import product

import pytest

from taichi_serve.latency.fit import Sample, fit, held_out_error, relative_errors
from taichi_serve.latency.model import Batch, Roofline, prompt_attention

# Like a 14B model on an A100: 19 ms to read the weights, 0.1 ms a token above 192 tokens.
TRUTH = Roofline(launch=0.002, mixed=0.001, token=1e-4, attention=2e-9, decode=5e-5, kv=1.2e-7, knee=192)


def steps(noise: float = 0.0) -> list[Sample]:
    """Steps over a grid of chunks, contexts and decodes; noise alternates, so it has no mean."""
    samples = []
    for chunk, context, decodes, each in product(
        (0, 64, 128, 256, 512, 1024, 2048), (0, 4096), (0, 1, 8, 32, 64, 128), (256, 1024, 4096)
    ):
        if chunk or decodes:
            batch = Batch(chunk, chunk * context + prompt_attention(chunk), decodes, decodes * each)
            wobble = 1 + noise * (-1) ** len(samples)
            samples.append(Sample(batch, TRUTH.seconds(batch) * wobble))
    return samples


def test_step_time_of_a_small_chunk_beside_decodes_is_the_reading_of_the_weights() -> None:
    # 2 ms + 1 ms + 0.1 ms x 192 (knee above 64 + 32) + 32 x 0.05 ms + 32768 x 0.12 us = 27.73 ms, no context.
    batch = Batch(prefill_tokens=64, attention=0.0, decodes=32, kv_tokens=32_768)
    assert TRUTH.seconds(batch) == pytest.approx(0.02773, abs=1e-5)


def test_coefficients_are_found_again_from_exact_steps() -> None:
    found = fit(steps())
    assert found.knee == TRUTH.knee
    for name in ("launch", "mixed", "token", "attention", "decode", "kv"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4), name


def test_held_out_error_is_the_noise_and_not_less() -> None:
    error = held_out_error(steps(noise=0.03))
    assert 0.025 < error.median < 0.04
    assert error.p95 < 0.05


def test_steps_that_are_sometimes_late_are_fitted_by_their_mean() -> None:
    # Nine of 10 ms and one of 30 ms: 12 ms. Weighted by what was measured it would be 10.2 ms.
    batch = Batch(decodes=4)
    samples = [Sample(batch, 0.03 if n % 10 == 0 else 0.01) for n in range(100)]
    assert fit(samples).seconds(batch) == pytest.approx(0.012, rel=1e-6)


def test_coefficients_are_never_negative() -> None:
    # More work takes less time here, which only noise can say: the model must not believe it.
    samples = [Sample(Batch(decodes=n, kv_tokens=100 * n), 0.02 - 0.0001 * n) for n in range(1, 20)]
    found = fit(samples)
    assert min(found.launch, found.mixed, found.token, found.attention, found.decode, found.kv) >= 0.0
    assert max(relative_errors(found, samples)) < 0.06


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit(steps()[:5])
