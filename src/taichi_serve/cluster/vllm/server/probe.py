"""A cluster to be measured: it runs requests of our own, and nobody gets their tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator

from vllm.sampling_params import SamplingParams

from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.warm import own_request
from taichi_serve.messages import Command, Event


class ProbedCluster:
    """A cluster that can also be asked."""

    def __init__(self, cluster: VllmCluster) -> None:
        self._cluster = cluster
        self._vocabulary = cluster.engines[0].client.vllm_config.model_config.get_vocab_size()
        self._asked = 0

    def events(self) -> AsyncIterator[Event]:
        """The cluster's facts."""
        return self._cluster.events()

    def send(self, command: Command) -> None:
        """A decision for the cluster."""
        self._cluster.send(command)

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        """A request that is greedy and goes on to its last token. Its number is in the first two tokens, so
        that no block of its prompt is cached."""
        name = f"taichi-probe-{self._asked}"
        first = [self._asked // self._vocabulary % self._vocabulary, self._asked % self._vocabulary]
        rest = [(self._asked * 31 + k * 7) % self._vocabulary for k in range(prompt_tokens - 2)]
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self._cluster.accept(own_request(name, first + rest, params))
        self._asked += 1
        return name
