"""Inputs of the attention benchmark: random tensors whose gate routes in a chosen way.

Random q and k spread the choices evenly, which hides what happens to long lists; real models do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.bench.shapes import Shape

ROUTINGS = ("uniform", "clustered", "sink")
_TOPICS = 16  # clustered: so many directions; a block has one, a run of queries looks for one
_RUN = 256


@dataclass(frozen=True)
class Inputs:
    """q, dout [T, H, D]; k, v [T, Hkv, D]; cu_seqlens int32 [N + 1]. q, k, v require gradients."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor


def make_inputs(shape: Shape, documents: int, routing: str, *, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs on the GPU.

    Args:
        documents: packed documents of random lengths.
        routing: uniform: independent normal values. clustered: whole runs of queries prefer the same blocks.
            sink: every query prefers the first block of its document.
    """
    g = torch.Generator("cuda").manual_seed(seed)
    T, D = shape.seq_len, shape.head_dim
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    q, k, v, dout = (torch.randn((T, h, D), device="cuda", dtype=dtype, generator=g) for h in heads)
    cu = _borders(T, documents, seed)
    token = torch.arange(T, device="cuda")
    if routing == "clustered":
        topics = torch.randn((_TOPICS, D), device="cuda", dtype=dtype, generator=g)
        of_run = torch.randint(_TOPICS, (T // _RUN + 1,), device="cuda", generator=g)
        of_block = torch.randint(_TOPICS, (T // shape.block_size + 1,), device="cuda", generator=g)
        q += topics[of_run[token // _RUN]][:, None]
        k += topics[of_block[token // shape.block_size]][:, None]
    elif routing == "sink":
        direction = torch.randn(D, device="cuda", dtype=dtype, generator=g)
        start = torch.tensor(cu[:-1], device="cuda")
        start = start[torch.searchsorted(start, token, right=True) - 1]
        q += direction
        k += direction * (token - start < shape.block_size)[:, None, None]
    return Inputs(
        shape,
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        dout,
        torch.tensor(cu, dtype=torch.int32, device="cuda"),
    )


def _borders(tokens: int, documents: int, seed: int) -> list[int]:
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[: documents - 1] + 1
    return [0, *sorted(cuts.tolist()), tokens]
