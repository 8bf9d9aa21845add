"""The oracle: MoBA written out from its definition, in O(T^2) memory. Every other path is tested against it.

Nothing here is shared with the fast paths: block numbers come from a loop over documents, the choice from a
full [H, T, NB] table of scores, the gradient from autograd. Read this file to know what MoBA computes.

Shape legend: T tokens, H query heads, Hkv key heads, D head dimension, NB blocks, K listed past blocks.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from model.dispatch import Backend
from model.moba.blocks import BlockTable


def reference_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """MoBA attention [T, H, D] in the dtype of q, differentiable; computed in fp32, or float64 for float64."""
    block_ids = reference_choose(q_THD, k_THD, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens)
    return reference_attend(
        q_THD, k_THD, v_THD, block_ids, block_size=block_size, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale
    )[0]


@torch.no_grad()
def reference_choose(
    q_THD: Tensor, k_THD: Tensor, *, block_size: int, topk: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Ids of the `topk - 1` best past blocks, int32 [T, H, topk - 1], best first, -1 = none."""
    T, H, _ = q_THD.shape
    block_of, first_of, num_blocks = _number_blocks(T, block_size, cu_seqlens)
    block_of, first_of = block_of.to(q_THD.device), first_of.to(q_THD.device)
    q, k = _up(q_THD), _up(k_THD).repeat_interleave(H // k_THD.shape[1], dim=1)
    mean_NHD = torch.stack([k[block_of == b].mean(0) for b in range(num_blocks)])
    score_THN = torch.einsum("thd,nhd->thn", q, mean_NHD)
    block = torch.arange(num_blocks, device=q.device)
    past_TN = (block >= first_of[:, None]) & (block < block_of[:, None])
    score_THN = score_THN.masked_fill(~past_TN[:, None], -torch.inf)
    order = torch.argsort(score_THN, dim=-1, descending=True, stable=True)  # stable: ties to the lower id
    order = order.masked_fill(score_THN.gather(-1, order) == -torch.inf, -1)
    ids = torch.full((T, H, topk - 1), -1, dtype=torch.int32, device=q.device)
    num = min(topk - 1, num_blocks)
    ids[..., :num] = order[..., :num]
    return ids


def reference_attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over given past blocks and the own block, with its log-sum-exp.

    Args:
        block_ids: int [T, H, K], global ids of past blocks, -1 = none.

    Returns:
        out [T, H, D] in q's dtype; lse [T, H], the natural log of the softmax denominator over scaled scores,
        in fp32 (float64 for float64 inputs).
    """
    T, H, D = q_THD.shape
    block_of, _, num_blocks = _number_blocks(T, block_size, cu_seqlens)
    block_of = block_of.to(q_THD.device)
    group = H // k_THD.shape[1]
    q = _up(q_THD)
    k, v = (_up(x).repeat_interleave(group, dim=1) for x in (k_THD, v_THD))

    listed_THN = torch.zeros((T, H, num_blocks + 1), dtype=torch.bool, device=q.device)
    listed_THN.scatter_(-1, block_ids.long() % (num_blocks + 1), True)  # -1 falls into the last column
    token = torch.arange(T, device=q.device)
    own_TT = (block_of[:, None] == block_of[None, :]) & (token[None, :] <= token[:, None])
    visible_THT = listed_THN[:, :, block_of] | own_TT[:, None]

    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    score_THT = torch.einsum("thd,shd->ths", q, k) * scale
    score_THT = score_THT.masked_fill(~visible_THT, -torch.inf)
    out = torch.einsum("ths,shd->thd", torch.softmax(score_THT, -1), v)
    return out.to(q_THD.dtype), torch.logsumexp(score_THT, -1)


def _number_blocks(num_tokens: int, block_size: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Each token's block id and its document's first block id (int64 [T], CPU), and the number of blocks."""
    borders = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    block_of, first_of, num_blocks = [], [], 0
    for start, end in itertools.pairwise(borders):
        for position in range(end - start):
            block_of.append(num_blocks + position // block_size)
            first_of.append(num_blocks)
        num_blocks += math.ceil((end - start) / block_size)
    return torch.tensor(block_of), torch.tensor(first_of), num_blocks


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _choose(q: Tensor, k: Tensor, table: BlockTable, num_past: int) -> Tensor:
    return reference_choose(q, k, block_size=table.block_size, topk=num_past + 1, cu_seqlens=table.cu_seqlens)


def _attend(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, table: BlockTable, softmax_scale: float) -> Tensor:
    return reference_attend(
        q,
        k,
        v,
        block_ids,
        block_size=table.block_size,
        cu_seqlens=table.cu_seqlens,
        softmax_scale=softmax_scale,
    )[0]


BACKEND = Backend(
    name="reference",
    device_types=("cpu", "cuda"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    choose=_choose,
    attend=_attend,
    full_when_dense=False,  # an oracle takes no short cuts
)
