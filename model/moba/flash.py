"""The two attention calls of `varlen` on flash-attention kernels (`model.flash`).

They are called below their autograd wrappers, because each part's backward must see the output and log-sum-exp
of the whole softmax.

Shape legend: T tokens, H query heads, Hkv key heads, D head dimension, B block size, L lists, P pairs, R rows.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.flash import FlashKernels
from model.moba.blocks import BlockTable
from model.moba.tiles import Grads, QueryLists

_MAX_BATCH = 65_000  # sequences of one call: the batch is a grid dimension of at most 65535


def forward_own(
    flash: FlashKernels, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, table: BlockTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each block: out [T, H, D], lse [T, H]."""
    cu, B = _block_borders(table), table.block_size
    out, lse = flash.forward(q_THD, k_THD, v_THD, cu, cu, B, B, causal=True, scale=scale)
    return out, lse.t().contiguous()


def backward_own(
    flash: FlashKernels,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    table: BlockTable,
    scale: float,
) -> Grads:
    """Gradients of the own-block part, from the output and log-sum-exp of the whole softmax."""
    cu, B = _block_borders(table), table.block_size
    return Grads(
        *flash.backward(do, q, k, v, out, lse_TH.t().contiguous(), cu, cu, B, B, causal=True, scale=scale)
    )


def forward_past(
    flash: FlashKernels, q_RD: Tensor, k_LBD: Tensor, v_LBD: Tensor, lists: QueryLists, scale: float
) -> tuple[Tensor, Tensor]:
    """Each pair's own attention over its block: o [P, D], lse fp32 [P]; 0 and -inf for pairs without one."""
    o_PD = q_RD.new_zeros((lists.order.numel(), q_RD.shape[1]))
    lse_P = q_RD.new_full((lists.order.numel(),), -torch.inf, dtype=torch.float32)
    for pair, part, cu_q, cu_k, max_q in _calls(lists, k_LBD):
        q, k, v = _one_head(q_RD[pair % lists.num_rows], k_LBD[part], v_LBD[part])
        o, lse = flash.forward(q, k, v, cu_q, cu_k, max_q, k_LBD.shape[1], causal=False, scale=scale)
        o_PD[pair], lse_P[pair] = o[:, 0], lse[0]
    return o_PD, lse_P


def backward_past(
    flash: FlashKernels,
    do_RD: Tensor,
    q_RD: Tensor,
    k_LBD: Tensor,
    v_LBD: Tensor,
    out_RD: Tensor,
    lse_R: Tensor,
    lists: QueryLists,
    scale: float,
) -> Grads:
    """dq per pair [P, D], dk and dv per list [L, B, D]."""
    dq_PD = q_RD.new_zeros((lists.order.numel(), q_RD.shape[1]))
    dk_LBD, dv_LBD = torch.zeros_like(k_LBD), torch.zeros_like(v_LBD)
    for pair, part, cu_q, cu_k, max_q in _calls(lists, k_LBD):
        row = pair % lists.num_rows
        q, do, out, k, v = _one_head(q_RD[row], do_RD[row], out_RD[row], k_LBD[part], v_LBD[part])
        dq, dk, dv = flash.backward(
            do, q, k, v, out, lse_R[row][None], cu_q, cu_k, max_q, k_LBD.shape[1], causal=False, scale=scale
        )
        dq_PD[pair] = dq[:, 0]
        # A block nobody chose has no query rows; its gradient is zero whatever the kernel left there.
        chosen = (cu_q.diff() > 0)[:, None, None]
        dk_LBD[part] = torch.where(chosen, dk.view_as(k_LBD[part]), 0)
        dv_LBD[part] = torch.where(chosen, dv.view_as(v_LBD[part]), 0)
    return Grads(dq_PD, dk_LBD, dv_LBD)


def _calls(lists: QueryLists, k_LBD: Tensor) -> list[tuple[Tensor, slice, Tensor, Tensor, int]]:
    """(pairs in list order, lists, cu_q, cu_k, longest list) of each call. Waits for the device once."""
    num_lists, B, _ = k_LBD.shape
    cuts = [*range(0, num_lists, _MAX_BATCH), num_lists]
    counts = lists.starts.diff()
    longest = torch.stack([counts[a:b].amax() for a, b in itertools.pairwise(cuts)])
    host = torch.cat([lists.starts[cuts], longest]).tolist()
    borders, longest_of = host[: len(cuts)], host[len(cuts) :]
    calls = []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        if borders[i] == borders[i + 1]:
            continue
        cu_k = torch.arange(0, (b - a + 1) * B, B, dtype=torch.int32, device=k_LBD.device)
        cu_q = (lists.starts[a : b + 1] - borders[i]).contiguous()
        calls.append((lists.order[borders[i] : borders[i + 1]], slice(a, b), cu_q, cu_k, longest_of[i]))
    return calls


def _one_head(*tensors: Tensor) -> list[Tensor]:
    """[..., D] -> [rows, 1, D]."""
    return [x.reshape(-1, 1, x.shape[-1]) for x in tensors]


def _block_borders(table: BlockTable) -> Tensor:
    """Borders of all blocks, int32 [NB + 1]; ids not in use are empty blocks at the end."""
    end = torch.full((1,), table.num_tokens, dtype=torch.int32, device=table.block_start.device)
    return torch.cat([table.block_start, end])
