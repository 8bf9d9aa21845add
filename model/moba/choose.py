"""Which past blocks a query attends to: the gate of MoBA (Lu et al. 2025, arXiv:2502.13189, section 2.2).

Shape legend: T tokens, H query heads, Hkv key heads, G = H / Hkv, D head dimension, NF full blocks,
K chosen past blocks.

The score of a block is `q . mean(k of the block)`, for each query head, with q and k after RoPE. Means and
scores are fp32 (float64 for float64 inputs). Only past blocks of the same document compete; the query's own
block is always attended and never listed. Equal scores go to the lower block id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.moba.blocks import BlockTable, full_block_rows

WORKSPACE_BYTES = 64 << 20  # scores of one chunk of queries
_SORT_ABOVE = 12  # from so many rounds on, one stable sort is cheaper than taking maxima


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def choose(
    q_THD: Tensor, k_THD: Tensor, table: BlockTable, num_past: int, *, workspace: int = WORKSPACE_BYTES
) -> Tensor:
    """The best `num_past` past blocks of every query and head, int32 [T, H, num_past], -1 = none.

    Queries are scored in chunks so that no more than `workspace` bytes of scores exist at a time
    (one query of all heads at least). Waits for the device nowhere on a GPU.

    Args:
        q_THD: [T, H, D]. k_THD: [T, Hkv, D]. Any floating dtype.
        num_past: at most `table.max_past` ever get filled.
    """
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    chosen = torch.full((T, H, num_past), -1, dtype=torch.int32, device=q_THD.device)
    if num_past == 0 or table.max_past == 0:
        return chosen
    acc = accumulate_dtype(q_THD.dtype)
    mean_HDN = block_means(k_THD, table, workspace=workspace).permute(1, 2, 0).contiguous()
    # 3 = the scores, a masked copy during the sort, and what the reductions return
    step = max(1, workspace // (3 * H * mean_HDN.shape[-1] * acc.itemsize))
    for t0 in range(0, T, step):
        t1 = min(t0 + step, T)
        first, last = _columns(table, t0, t1)
        if first >= last:
            continue
        q_HMD = q_THD[t0:t1].to(acc).view(t1 - t0, Hkv, H // Hkv, D).transpose(0, 1).reshape(Hkv, -1, D)
        score = torch.bmm(q_HMD, mean_HDN[:, :, first:last]).view(Hkv, t1 - t0, H // Hkv, last - first)
        ids = table.full_id[first:last]
        past = (ids >= table.first_block[t0:t1, None]) & (ids < table.own_block[t0:t1, None])
        score.masked_fill_(~past[None, :, None, :], -torch.inf)
        column = _best(score, min(num_past, last - first))
        found = torch.where(column >= 0, ids[column.clamp(min=0)], -1)
        chosen[t0:t1, :, : found.shape[-1]] = found.transpose(0, 1).reshape(t1 - t0, H, -1)
    return chosen


def block_means(k_THD: Tensor, table: BlockTable, *, workspace: int = WORKSPACE_BYTES) -> Tensor:
    """Mean key of each full block, [NF, Hkv, D] in the accumulation dtype, in the order of `table.full_id`."""
    Hkv, D = k_THD.shape[1:]
    acc = accumulate_dtype(k_THD.dtype)
    num_full = table.full_id.numel()
    mean = torch.empty((num_full, Hkv, D), dtype=acc, device=k_THD.device)
    step = max(1, workspace // (2 * table.block_size * Hkv * D * acc.itemsize))
    for first in range(0, num_full, step):
        rows = full_block_rows(table, first, min(first + step, num_full))
        mean[first : first + step] = k_THD[rows].to(acc).mean(1)
    return mean


def _columns(table: BlockTable, t0: int, t1: int) -> tuple[int, int]:
    """A range of ranks in `table.full_id` that holds every past block of tokens t0..t1-1.

    A full block before token t takes block_size tokens, so at most t // block_size of them exist: a bound
    from shapes alone. On the CPU, where reading a value is free, documents that ended earlier are left out.
    """
    last = (t1 - 1) // table.block_size
    if table.full_id.device.type != "cpu" or last == 0:
        return 0, last
    ids = table.full_id[:last]
    earlier = (ids >= 0) & (ids < table.first_block[t0])
    return int(earlier.sum()), last


def _best(score: Tensor, num: int) -> Tensor:
    """Columns of the `num` highest scores of each row, -1 where only -inf is left. Overwrites `score`.

    Equal scores go to the lower column: `torch.max` returns the first maximum and the sort is stable,
    while `torch.topk` promises no order.
    """
    if num > _SORT_ABOVE:
        value, column = torch.sort(score, dim=-1, descending=True, stable=True)
        return torch.where(value[..., :num] > -torch.inf, column[..., :num], -1)
    picked = []
    for _ in range(num):
        value, column = torch.max(score, dim=-1, keepdim=True)
        picked.append(torch.where(value > -torch.inf, column, -1))
        score.scatter_(-1, column, -torch.inf)
    return torch.cat(picked, dim=-1)
