"""Decode steps as one replayed CUDA graph: a token of a small model is a few hundred launches, which cost more
host time than the kernels take.

Only steps whose launches never depend on how far the rows have grown can be captured: every layer decodes with
full attention on our kernels, and nothing else of the cache is replaced. Other steps run one by one; both give the
same values.

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
    """Decodes one cache, step by step. A graph is captured at the second step, if `steps` makes that worthwhile.

    Args:
        cache: in its decode phase.
        plans: of decoding, one per layer.
        steps: tokens that may follow.
    """

    def __init__(self, model: CausalLM, cache: KVCache, plans: Sequence[LayerPlan], steps: int) -> None:
        cache.require("decode")
        self._model, self._cache, self._plans = model, cache, tuple(plans)
        self._wanted = steps >= MIN_STEPS and capturable(model, plans)
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token_R1 = self._logits_RV = torch.empty(0)

    @torch.no_grad()
    def __call__(self, token_R1: Tensor) -> Tensor:
        """int64 [R, 1] -> logits fp32 [R, V], valid until the next call."""
        if not (self._wanted and self._warm):
            self._warm = True  # compiles and allocates what a capture may not
            return self._model.decode(token_R1, self._cache, self._plans)
        self._cache.require_room()
        if self._graph is None:
            self._capture(token_R1)
        assert self._graph is not None
        self._token_R1.copy_(token_R1)
        self._graph.replay()
        self._cache.end_step_on_host()
        return self._logits_RV

    def _capture(self, token_R1: Tensor) -> None:
        """Nothing runs here; the cache stays as it is."""
        self._token_R1 = token_R1.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_RV = decode_on_device(self._model, self._token_R1, self._cache, self._plans)


def capturable(model: CausalLM, plans: Sequence[LayerPlan]) -> bool:
    """Whether decode steps of this model under these plans are the same launches at every step."""
    config, weight = model.config, next(model.parameters())
    query = torch.empty((1, config.num_heads, head_dim(config)), dtype=weight.dtype, device=weight.device)
    plain = all(layer_plan.kind == "full" for layer_plan in plans) and not config.key_conv
    plain = plain and model.execution.parallel is None
    return plain and runs_compiled(query, config.num_kv_heads)
