"""MoBA with the Triton kernels for queries that are the last tokens of a longer row of keys. Inference only.

The kernels know one token index for queries and keys. Here queries count from the start of the first query's own
block: the tables of a query are those of its place in the row, past blocks are found by their place among all
keys, and the own block is read from a view of the keys that starts where the queries do.

Shape legend: M queries, N keys of the row, H query heads, Hkv key heads, D head dimension, K listed past blocks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from model.moba import triton_common as common
from model.moba import triton_gate
from model.moba.blocks import BlockTable, build_block_table
from model.moba.choosers import by_position
from model.moba.triton_combine import combine
from model.moba.triton_cuts import Cuts
from model.moba.triton_lists import build_lists
from model.moba.triton_plan import default_budget, make_plan
from model.moba.triton_reach import Reach
from model.moba.triton_routed import routed
from model.schedule import LayerPlan


@torch.no_grad()
def attend_row(
    q_MHD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    layer_plan: LayerPlan,
    softmax_scale: float,
    *,
    budget: int | None = None,
) -> Tensor:
    """Attention of the last M tokens of one row to its chosen blocks, [M, H, D] in q's dtype.

    Args:
        q_MHD: [M, H, D] after RoPE. k_NHD, v_NHD: [N, Hkv, D] of the whole row, 1 <= M <= N, same dtype.
        layer_plan: a MoBA plan with any chooser; blocks start at the row's first key.
        budget: scratch bytes, as in `triton_op.attend`. The result does not depend on it.
    """
    M, N, size = q_MHD.shape[0], k_NHD.shape[0], layer_plan.block_size
    start = (N - M) // size * size
    unasked = N - M - start  # tokens before the first query in its block: zeros stand in for them
    q_THD = q_MHD.contiguous() if unasked == 0 else torch.cat([q_MHD.new_zeros(unasked, *q_MHD.shape[1:]), q_MHD])
    k_NHD, v_NHD = k_NHD.contiguous(), v_NHD.contiguous()
    border = torch.tensor([0, N], dtype=torch.int32, device=q_MHD.device)
    table = _from(build_block_table(border, N, size), start)
    num_past = min(layer_plan.topk - 1, table.max_past)
    if layer_plan.choose == "moba":
        ids = triton_gate.choose(q_THD, k_NHD, table, num_past)
    else:
        ids = by_position(layer_plan.choose, table.own_block, table.first_block, q_MHD.shape[1], num_past)
    ids[:unasked] = -1
    out_THD = _forward(q_THD, k_NHD, v_NHD, ids, table, start, softmax_scale, budget)
    return out_THD[unasked:]


def _from(table: BlockTable, start: int) -> BlockTable:
    """The table as queries counted from `start`, the beginning of a block, see it. Blocks keep their places."""
    return dataclasses.replace(
        table,
        own_block=table.own_block[start:],
        first_block=table.first_block[start:],
        own_start=table.own_start[start:] - start,
    )


def _forward(
    q_THD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    ids: Tensor,
    table: BlockTable,
    start: int,
    softmax_scale: float,
    budget: int | None,
) -> Tensor:
    """As `triton_op.forward_pass`, with the own blocks in `k_NHD[start:]`."""
    (T, H, D), Hkv, K = q_THD.shape, k_NHD.shape[1], ids.shape[-1]
    if budget is None:
        budget = default_budget(T, H, Hkv, D, q_THD.element_size())
    plan = make_plan(T, H, Hkv, D, K, q_THD.element_size(), budget)
    num_blocks = table.block_start.numel()
    tiles = common.tiles_for(D, table.block_size, num_blocks)
    scale_log2 = softmax_scale * common.LOG2E
    out = torch.empty_like(q_THD)
    lse = torch.empty((T, H), dtype=torch.float32, device=q_THD.device)
    own = (k_NHD[start:], v_NHD[start:])
    reach = Reach(table.own_start, table.block_start)  # every query has its lists; ends are for gradients only
    for heads in plan.head_ranges(Hkv):
        if K == 0:
            combine(q_THD, *own, None, None, ids, reach, out, lse, heads, range(T), scale_log2, tiles)
            continue
        cuts = Cuts(rows=tiles.routed_rows if plan.tokens >= T else 0)
        lists = build_lists(ids, reach.start, num_blocks, H // Hkv, heads.start, len(heads), cuts)
        shape = (len(heads), min(plan.tokens, T), H // Hkv * K)
        part = torch.empty((*shape, D), dtype=q_THD.dtype, device=q_THD.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=q_THD.device)
        for tokens in plan.token_ranges(T):
            part_c, lse_c = part[:, : len(tokens)], part_lse[:, : len(tokens)]
            work = lists.tiles(tiles.routed_rows, tokens.start, tokens.stop)
            routed(
                q_THD, k_NHD, v_NHD, part_c, lse_c, lists, work, table, tokens.start, scale_log2, tiles.routed,
                tiles.stationary,
            )  # fmt: skip
            combine(q_THD, *own, part_c, lse_c, ids, reach, out, lse, heads, tokens, scale_log2, tiles)
    return out
