"""Prompts and decoded tokens through the model, on one process; over several, see `model.parallel_generation`.

Shape legend: R rows, S longest prompt, T tokens of a part, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import KVCache
from model.schedule import LayerPlan

if TYPE_CHECKING:
    from model.transformer import CausalLM


@torch.no_grad()
def prefill(
    model: CausalLM, input_ids_RS: Tensor, cache: KVCache, plans: Sequence[LayerPlan], chunk: int
) -> Tensor:
    """`CausalLM.prefill` without a group: fp32 [R, V]."""
    if len(cache.lengths) != input_ids_RS.shape[0] or max(cache.lengths) > input_ids_RS.shape[1]:
        raise ValueError(f"prompts {tuple(input_ids_RS.shape)} do not hold rows of {cache.lengths} tokens")
    device = input_ids_RS.device
    last_C: list[Tensor] = [torch.empty(0)] * len(cache.lengths)
    for part in cache.parts(chunk):
        borders = [0, *accumulate(b - a for _, a, b in part)]
        hidden_TC = model.model(
            torch.cat([input_ids_RS[row, a:b] for row, a, b in part]),
            positions=torch.cat([torch.arange(a, b, device=device) for _, a, b in part]),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32, device=device),
            max_seqlen=max(b - a for _, a, b in part),
            plans=plans,
            cache=cache,
        )
        for (row, _, b), border in zip(part, borders[1:], strict=True):
            if b == cache.lengths[row]:
                last_C[row] = hidden_TC[border - 1].clone()
    cache.end_prefill()
    return model.logits(torch.stack(last_C)).float()


@torch.no_grad()
def decode_on_device(model: CausalLM, input_ids_R1: Tensor, cache: KVCache, plans: Sequence[LayerPlan]) -> Tensor:
    """A decode step but for `KVCache.end_step_on_host`, which a captured graph leaves out: fp32 [R, V]."""
    hidden_RC = model.model(
        input_ids_R1[:, 0],
        positions=cache.lengths_R,
        cu_seqlens=cache.cu_seqlens(),
        max_seqlen=1,
        plans=plans,
        cache=cache,
    )
    cache.end_step_on_device()
    return model.logits(hidden_RC).float()
