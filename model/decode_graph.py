"""Decode steps as one replayed CUDA graph: a token of a small model is a few hundred launches, which cost more
host time than the kernels take.

A graph holds as long as steps are the same launches: with full attention on our kernels always, with MoBA until a
row fills a block, when there is one more to choose from. The step after that runs launch by launch, which averages
the new block's keys, and the next graph is captured. Both ways give the same values.

Shape legend: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.cache import KVCache
from model.decode import runs_compiled
from model.generation import decode_on_device
from model.schedule import LayerPlan
from model.shapes import head_dim
from model.transformer import CausalLM

MIN_STEPS = 8  # fewer tokens do not repay a capture


class Decoder:
    """Decodes one cache, step by step. Graphs are captured where at least MIN_STEPS can be expected of them.

    Args:
        cache: in its decode phase.
        plans: of decoding, one per layer.
        steps: tokens that may follow.
    """

    def __init__(self, model: CausalLM, cache: KVCache, plans: Sequence[LayerPlan], steps: int) -> None:
        cache.require("decode")
        self._model, self._cache, self._plans, self._left = model, cache, tuple(plans), steps
        self._possible = capturable(model, plans)
        self._sizes = sorted({layer_plan.block_size for layer_plan in plans if layer_plan.kind == "moba"})
        self._settled: list[int] | None = None  # complete blocks at the last step that was not captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token_R1 = self._logits_RV = torch.empty(0)

    @torch.no_grad()
    def __call__(self, token_R1: Tensor) -> Tensor:
        """int64 [R, 1] -> logits fp32 [R, V], valid until the next call."""
        self._left -= 1
        complete = [length // size for size in self._sizes for length in self._cache.lengths]
        if complete != self._settled:  # this step compiles, averages and allocates what a capture may not
            self._settled, self._graph = complete, None
            return self._model.decode(token_R1, self._cache, self._plans)
        if self._graph is None and not self._worthwhile():
            return self._model.decode(token_R1, self._cache, self._plans)
        self._cache.require_room()
        if self._graph is None:
            self._capture(token_R1)
        self._token_R1.copy_(token_R1)
        self._replay()
        self._cache.end_step_on_host()
        return self._logits_RV

    def _worthwhile(self) -> bool:
        """Whether enough steps can follow, this one among them, before the end or a filled block."""
        until = [size - length % size for size in self._sizes for length in self._cache.lengths]
        return self._possible and min([self._left + 1, *until]) >= MIN_STEPS

    def _capture(self, token_R1: Tensor) -> None:
        """Nothing runs here; the cache stays as it is."""
        self._token_R1 = token_R1.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_RV = decode_on_device(self._model, self._token_R1, self._cache, self._plans)

    def _replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()


def capturable(model: CausalLM, plans: Sequence[LayerPlan]) -> bool:
    """Whether decode steps of this model under these plans are the same launches, as long as no block fills up."""
    config, weight = model.config, next(model.parameters())
    query = torch.empty((1, config.num_heads, head_dim(config)), dtype=weight.dtype, device=weight.device)
    plain = not config.key_conv and model.execution.parallel is None
    return plain and len(plans) > 0 and runs_compiled(query, config.num_kv_heads)
