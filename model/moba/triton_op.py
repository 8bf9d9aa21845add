"""Attention to given blocks with the Triton kernels, as one differentiable operation.

Saved for the backward pass: q, k, v, out, lse, the block ids, and the lists unless they are large. Partial
results are never saved. No host synchronisation anywhere, no floating-point atomics: repeated runs give equal
bits, and a CUDA graph can capture both passes.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.passes import combine, dkv, dq_partials, merge_dq, routed
from model.moba.triton_cuts import Cuts, segment_length
from model.moba.triton_lists import Lists, build_lists
from model.moba.triton_plan import Plan, default_budget, make_plan
from model.moba.triton_reach import Reach, build_reach, seldom
from model.moba.triton_sums import RowSums, fill_list_sums


def attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    block_ids: Tensor,
    table: BlockTable,
    softmax_scale: float,
    *,
    budget: int | None = None,
) -> Tensor:
    """Softmax attention over the listed past blocks and the causal part of the own block.

    Args:
        q_THD: [T, H, D], k_THD, v_THD: [T, Hkv, D]; one dtype, H a multiple of Hkv.
        block_ids: int32 [T, H, K], global ids of past blocks of the same document, each at most once per row,
            -1 = none. They are taken as they are: a recomputed forward given the same ids attends to the same
            blocks.
        budget: scratch bytes; None: `triton_plan.default_budget`. The result does not depend on it.

    Returns:
        out [T, H, D] in q's dtype, differentiable in q, k and v.
    """
    q_THD, k_THD, v_THD = q_THD.contiguous(), k_THD.contiguous(), v_THD.contiguous()
    T, H, D = q_THD.shape
    if budget is None:
        budget = default_budget(T, H, k_THD.shape[1], D, q_THD.element_size())
    return _Attend.apply(q_THD, k_THD, v_THD, block_ids.contiguous(), table, softmax_scale, budget)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        block_ids: Tensor,
        table: BlockTable,
        softmax_scale: float,
        budget: int,
    ) -> Tensor:
        reach = reach_of(table, q_THD.shape[2])
        out, lse, lists = forward_pass(q_THD, k_THD, v_THD, block_ids, table, reach, softmax_scale, budget)
        tensors = [tensor for some in lists for tensor in some.tensors]
        ctx.save_for_backward(q_THD, k_THD, v_THD, block_ids, out, lse, *tensors)
        ctx.lists = [some.without_tensors() for some in lists]
        ctx.table, ctx.reach, ctx.softmax_scale, ctx.budget = table, reach, softmax_scale, budget
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, block_ids, out, lse, *tensors = ctx.saved_tensors
        lists = [some.with_tensors(*tensors[3 * i : 3 * i + 3]) for i, some in enumerate(ctx.lists)]
        dq, dk, dv = backward_pass(
            q_THD,
            k_THD,
            v_THD,
            block_ids,
            out,
            lse,
            dout_THD.contiguous(),
            ctx.table,
            ctx.reach,
            ctx.softmax_scale,
            ctx.budget,
            lists,
        )
        return dq, dk, dv, None, None, None, None


def reach_of(table: BlockTable, head_dim: int) -> Reach:
    """What runs without lists: nothing but own blocks where lists were measured to be faster."""
    tiles = common.tiles_for(head_dim, table.block_size, table.block_start.numel())
    return build_reach(table, table.complete_past if tiles.reach and not seldom(table) else 0)


def forward_pass(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    block_ids: Tensor,
    table: BlockTable,
    reach: Reach,
    softmax_scale: float,
    budget: int,
) -> tuple[Tensor, Tensor, list[Lists]]:
    """out [T, H, D], lse2 fp32 [T, H], and the lists of every pass if keeping them is cheap, else []."""
    T, H, D = q_THD.shape
    Hkv, K = k_THD.shape[1], block_ids.shape[-1]
    plan, tiles = _plan(q_THD, k_THD, K, budget), common.tiles_for(D, table.block_size, table.block_start.numel())
    out = torch.empty((T, H, D), dtype=q_THD.dtype, device=q_THD.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q_THD.device)
    scale_log2 = softmax_scale * common.LOG2E
    kept: list[Lists] = []
    for heads in plan.head_ranges(Hkv):
        if K == 0:
            combine(q_THD, k_THD, v_THD, None, None, block_ids, reach, out, lse, heads, range(T), scale_log2,
                    tiles, table.block_size)  # fmt: skip
            continue
        lists = _lists(block_ids, table, reach, H // Hkv, heads, plan, tiles)
        if plan.keep_lists:
            kept.append(lists)
        part, part_lse = _partials(q_THD, plan, heads, H // Hkv * K)
        for tokens in plan.token_ranges(T):
            work = lists.tiles(tiles.routed_rows, tokens.start, tokens.stop)
            part_c, lse_c = part[:, : len(tokens)], part_lse[:, : len(tokens)]
            routed(q_THD, k_THD, v_THD, part_c, lse_c, lists, work, table, tokens.start, scale_log2, tiles.routed,
                   tiles.stationary)  # fmt: skip
            combine(q_THD, k_THD, v_THD, part_c, lse_c, block_ids, reach, out, lse, heads, tokens, scale_log2,
                    tiles, table.block_size)  # fmt: skip
    return out, lse, kept


def backward_pass(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    block_ids: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    dout_THD: Tensor,
    table: BlockTable,
    reach: Reach,
    softmax_scale: float,
    budget: int,
    saved: list[Lists],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    T, H, D = q_THD.shape
    Hkv, K = k_THD.shape[1], block_ids.shape[-1]
    plan, tiles = _plan(q_THD, k_THD, K, budget), common.tiles_for(D, table.block_size, table.block_start.numel())
    sums = RowSums(out_THD, dout_THD, lse_TH)
    dq, dk, dv = torch.empty_like(q_THD), torch.empty_like(k_THD), torch.empty_like(v_THD)
    scale_log2 = softmax_scale * common.LOG2E
    inputs = (q_THD, k_THD, v_THD, dout_THD, sums)
    fused = _fused(plan, tiles, T)
    for number, heads in enumerate(plan.head_ranges(Hkv)):
        if K == 0:
            merge_dq(*inputs, None, block_ids, reach, dq, heads, range(T), softmax_scale, tiles, table.block_size)
            dkv(*inputs, None, None, None, None, table, reach, dk, dv, heads, softmax_scale, tiles.dkv)
            continue
        lists = saved[number] if saved else _lists(block_ids, table, reach, H // Hkv, heads, plan, tiles)
        list_lse = torch.empty((lists.row.numel(),), dtype=torch.float32, device=q_THD.device)
        list_delta = torch.empty_like(list_lse)
        part, _ = _partials(q_THD, plan, heads, H // Hkv * K)
        if fused is not None:
            fill_list_sums(lists, sums, list_lse, list_delta)
            dkv(*inputs, lists, list_lse, list_delta, part, table, reach, dk, dv, heads, softmax_scale, fused,
                tiles.fused_pointers)  # fmt: skip
            merge_dq(*inputs, part, block_ids, reach, dq, heads, range(T), softmax_scale, tiles, table.block_size)
            continue
        for tokens in plan.token_ranges(T):
            work = lists.tiles(tiles.dq_rows, tokens.start, tokens.stop)
            part_c = part[:, : len(tokens)]
            dq_partials(*inputs, part_c, list_lse, list_delta, lists, work, table, tokens.start, scale_log2,
                        tiles.dq, tiles.stationary_dq)  # fmt: skip
            merge_dq(*inputs, part_c, block_ids, reach, dq, heads, tokens, softmax_scale, tiles, table.block_size)
        dkv(*inputs, lists, list_lse, list_delta, None, table, reach, dk, dv, heads, softmax_scale, tiles.dkv)
    return dq, dk, dv


def _plan(q_THD: Tensor, k_THD: Tensor, slots: int, budget: int) -> Plan:
    T, H, D = q_THD.shape
    return make_plan(T, H, k_THD.shape[1], D, slots, q_THD.element_size(), budget)


def _fused(plan: Plan, tiles: common.Tiles, num_tokens: int) -> common.Tile | None:
    """The fused kernel's tile, if it runs: its partials need all tokens at once."""
    return tiles.fused if plan.tokens >= num_tokens else None


def _lists(
    block_ids: Tensor,
    table: BlockTable,
    reach: Reach,
    group: int,
    heads: range,
    plan: Plan,
    tiles: common.Tiles,
) -> Lists:
    """Lists of some key heads, cut for the kernels of both passes where these take all tokens at once."""
    T, _, K = block_ids.shape
    whole = plan.tokens >= T
    cuts = Cuts(
        rows=tiles.routed_rows if whole else 0,
        rows_dq=tiles.dq_rows if whole and _fused(plan, tiles, T) is None else 0,
        segment=segment_length(T, group, K, table.block_size),
    )
    return build_lists(block_ids, reach.start, table.block_start.numel(), group, heads.start, len(heads), cuts)


def _partials(q_THD: Tensor, plan: Plan, heads: range, slots: int) -> tuple[Tensor, Tensor]:
    """part [heads, tokens, G * K, D] in q's dtype and part_lse [heads, tokens, G * K] for one chunk."""
    T, _, D = q_THD.shape
    shape = (len(heads), min(plan.tokens, T), slots)
    part = torch.empty((*shape, D), dtype=q_THD.dtype, device=q_THD.device)
    return part, torch.empty(shape, dtype=torch.float32, device=q_THD.device)
