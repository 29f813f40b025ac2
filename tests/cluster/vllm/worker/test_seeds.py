"""A token that is thrown away is drawn from nobody's seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from taichi_serve.cluster.vllm.worker.seeds import draw_nothing_to_take_back


def runner() -> Any:
    """As far as a step goes there: draw for every row that has a generator, then take back what is thrown
    away, as vLLM does."""

    class Runner:
        def __init__(self) -> None:
            self.input_batch = SimpleNamespace(generators={}, num_reqs=2)
            self.discard_request_mask = SimpleNamespace(np=np.array([False, False, True]))

        def _sample(self, logits: Any, metadata: Any) -> list[float]:
            return [float(torch.rand(1, generator=g)) for _, g in sorted(self.input_batch.generators.items())]

        def _bookkeeping_sync(self) -> None:
            for row in np.nonzero(self.discard_request_mask.np[:2])[0]:
                if (generator := self.input_batch.generators.get(int(row))) is not None:
                    generator.set_offset(generator.get_offset() - 4)

    draw_nothing_to_take_back(Runner)
    draw_nothing_to_take_back(Runner)
    return Runner()


def seeded(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def test_a_generator_of_a_cpu_has_no_offset() -> None:
    with pytest.raises(RuntimeError, match="does not use offset"):
        seeded(1).set_offset(0)


def test_a_prompt_in_chunks_draws_what_a_prompt_in_one_piece_draws() -> None:
    step = runner()
    step.input_batch.generators = {0: seeded(1), 1: seeded(2)}
    drawn = []
    for chunk_of_second in (True, True, False):
        step.discard_request_mask.np[1] = chunk_of_second
        drawn.append(step._sample(None, None))
        step._bookkeeping_sync()
        assert set(step.input_batch.generators) == {0, 1}
    assert [len(tokens) for tokens in drawn] == [1, 1, 2]
    assert drawn[2][1] == float(torch.rand(1, generator=seeded(2)))


def test_vllms_runner_has_what_is_changed() -> None:
    import inspect

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner

    source = inspect.getsource(Runner)
    assert (source.count("self._bookkeeping_sync("), source.count("self._sample(")) == (1, 1)
    assert "gen = self.input_batch.generators.get(int(i))" in inspect.getsource(Runner._bookkeeping_sync)
    assert "sampling_metadata = self.input_batch.sampling_metadata" in inspect.getsource(Runner._sample)
