"""MoBA with ordinary attention calls: queries gathered by the block they read, parts merged by log-sum-exp.

The algorithm of the MoBA paper (arXiv:2502.13189, section 2.3, algorithm 1), for the CPU and for GPUs without
the Triton kernels. Past blocks: the query rows that chose a block form a list; lists of one key head share that
head's keys, so KV is never expanded to the query heads. Own blocks: causal attention inside each block. Both
run on flash-attention where `model.flash` finds one for the inputs, else on batched products
(`model.moba.tiles`). Each part's backward uses the output and log-sum-exp of the whole softmax, and the block
ids of the forward; nothing is chosen again.

Shape legend: T tokens, H query heads, Hkv key heads, D head dimension, B block size, NF full blocks,
L = Hkv * NF, K listed past blocks per query, C tokens of one chunk, R = C * H query rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import flash as flash_kernels
from model.dispatch import Backend
from model.moba import flash, tiles
from model.moba.blocks import BlockTable, full_block_rows
from model.moba.choose import accumulate_dtype, choose

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # parts of one chunk of queries before they are merged
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # scores and operands of one batched product; CPU: cache-sized


def attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    block_ids: Tensor,
    table: BlockTable,
    softmax_scale: float,
    *,
    workspace: int = 0,
    tile_bytes: int = 0,
) -> Tensor:
    """Attention [T, H, D] over the listed past blocks and the own block; differentiable in q, k, v.

    Args:
        q_THD: [T, H, D]; k_THD, v_THD: [T, Hkv, D]; fp16, bf16, fp32 or float64.
        block_ids: int32 [T, H, K] global ids, -1 = none.
        workspace: bytes for the parts of one chunk of queries; 0: WORKSPACE_BYTES of the device.
        tile_bytes: bytes for one batched product; 0: TILE_BYTES of the device.

    Waits for the device once per chunk when flash-attention runs (it needs the longest list), else never.
    """
    device = q_THD.device.type
    out: Tensor = _Varlen.apply(
        q_THD,
        k_THD,
        v_THD,
        block_ids,
        table,
        softmax_scale,
        workspace or WORKSPACE_BYTES.get(device, 1 << 30),
        tile_bytes or TILE_BYTES.get(device, 64 << 20),
    )
    return out


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_ids: Tensor,
        table: BlockTable,
        scale: float,
        workspace: int,
        tile_bytes: int,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        parts = _Parts(q, k, v, table, scale, tile_bytes)
        out, lse = parts.forward_own()
        for t0, t1 in _chunks(q, block_ids, table, workspace):
            out[t0:t1], lse[t0:t1] = _merge(*parts.forward_past(block_ids[t0:t1], t0), out[t0:t1], lse[t0:t1])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, block_ids)
        ctx.table, ctx.scale, ctx.workspace, ctx.tile_bytes = table, scale, workspace, tile_bytes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, block_ids = ctx.saved_tensors
        parts = _Parts(q, k, v, ctx.table, ctx.scale, ctx.tile_bytes)
        do = do.contiguous()
        delta = (do.to(parts.acc) * out.to(parts.acc)).sum(-1)
        dq, dk, dv = parts.backward_own(do, out, lse, delta)
        dk_LBD = dv_LBD = None
        for t0, t1 in _chunks(q, block_ids, ctx.table, ctx.workspace):
            part = parts.backward_past(do, out, lse, delta, block_ids[t0:t1], t0)
            dq[t0:t1] += part.dq.view(-1, *dq[t0:t1].shape).sum(0, dtype=parts.acc)
            dk_LBD = part.dk.to(parts.acc) if dk_LBD is None else dk_LBD.add_(part.dk)
            dv_LBD = part.dv.to(parts.acc) if dv_LBD is None else dv_LBD.add_(part.dv)
        if dk_LBD is not None and dv_LBD is not None:
            parts.add_blocks(dk, dk_LBD)
            parts.add_blocks(dv, dv_LBD)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


class _Parts:
    """The two attention calls, forward and backward, of one set of inputs on the kernels that fit them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float, tile_bytes: int) -> None:
        self.table, self.scale, self.tile_bytes = table, scale, tile_bytes
        self.acc = accumulate_dtype(q.dtype)
        self.flash = flash_kernels.find(q)
        if self.flash is None:
            q, k, v = q.to(self.acc), k.to(self.acc), v.to(self.acc)
        self.q, self.k, self.v = q, k, v
        self.k_LBD, self.v_LBD = self._blocks(k), self._blocks(v)

    def forward_own(self) -> tuple[Tensor, Tensor]:
        """out [T, H, D] and lse [T, H] of the own blocks, in the accumulation dtype."""
        if self.flash is None:
            return tiles.forward_own(self.q, self.k, self.v, self.table, self.scale, self.tile_bytes)
        out, lse = flash.forward_own(self.flash, self.q, self.k, self.v, self.table, self.scale)
        return out.to(self.acc), lse

    def forward_past(self, block_ids: Tensor, t0: int) -> tuple[Tensor, Tensor]:
        """o [K, C, H, D] and lse [K, C, H] of the past blocks of the tokens from t0 on."""
        C, H, K = block_ids.shape
        lists = tiles.build_lists(block_ids, self.k.shape[1], self.table)
        q_RD = self.q[t0 : t0 + C].view(C * H, -1)
        if self.flash is None:
            o, lse = tiles.forward_past(q_RD, self.k_LBD, self.v_LBD, lists, self.scale, self.tile_bytes)
        else:
            o, lse = flash.forward_past(self.flash, q_RD, self.k_LBD, self.v_LBD, lists, self.scale)
        return o.view(K, C, H, -1), lse.view(K, C, H)

    def backward_own(self, do: Tensor, out: Tensor, lse: Tensor, delta: Tensor) -> tiles.Grads:
        """dq [T, H, D], dk and dv [T, Hkv, D] of the own blocks, in the accumulation dtype."""
        if self.flash is None:
            return tiles.backward_own(
                do.to(self.acc), self.q, self.k, self.v, lse, delta, self.table, self.scale, self.tile_bytes
            )
        part = flash.backward_own(self.flash, do, self.q, self.k, self.v, out, lse, self.table, self.scale)
        return tiles.Grads(*(x.to(self.acc) for x in part))

    def backward_past(
        self, do: Tensor, out: Tensor, lse: Tensor, delta: Tensor, block_ids: Tensor, t0: int
    ) -> tiles.Grads:
        """dq [K * C * H, D], dk and dv [L, B, D] of the past blocks of the tokens from t0 on."""
        C, H, _ = block_ids.shape
        lists = tiles.build_lists(block_ids, self.k.shape[1], self.table)
        do_RD, q_RD, out_RD = (x[t0 : t0 + C].view(C * H, -1) for x in (do, self.q, out))
        lse_R, delta_R = lse[t0 : t0 + C].view(-1), delta[t0 : t0 + C].view(-1)
        if self.flash is None:
            return tiles.backward_past(
                do_RD.to(self.acc),
                q_RD,
                self.k_LBD,
                self.v_LBD,
                lse_R,
                delta_R,
                lists,
                self.scale,
                self.tile_bytes,
            )
        return flash.backward_past(
            self.flash, do_RD, q_RD, self.k_LBD, self.v_LBD, out_RD, lse_R, lists, self.scale
        )

    def add_blocks(self, total_THD: Tensor, part_LBD: Tensor) -> None:
        """Add what belongs to full blocks to the tokens they hold. Ranks not in use hold zeros."""
        Hkv, D = total_THD.shape[1:]
        rows = full_block_rows(self.table, 0, self.table.full_id.numel())
        part = part_LBD.view(Hkv, -1, self.table.block_size, D).permute(1, 2, 0, 3).reshape(-1, Hkv, D)
        total_THD.index_add_(0, rows.view(-1), part)  # repeated rows get zeros only: no order to depend on

    def _blocks(self, x_THD: Tensor) -> Tensor:
        """Keys or values of the full blocks, [Hkv * NF, B, D]."""
        rows = full_block_rows(self.table, 0, self.table.full_id.numel())
        return x_THD[rows].permute(2, 0, 1, 3).reshape(-1, self.table.block_size, x_THD.shape[2])


def _chunks(q_THD: Tensor, block_ids: Tensor, table: BlockTable, workspace: int) -> list[tuple[int, int]]:
    """Token ranges whose parts fit the workspace; none if there is nothing to read."""
    T, H, D = q_THD.shape
    K = block_ids.shape[2]
    if K == 0 or table.max_past == 0:
        return []
    acc_size = accumulate_dtype(q_THD.dtype).itemsize
    each = H * K * (D * (q_THD.element_size() + acc_size) + 4 * 8)  # gathered and written rows, and the sort
    step = max(1, workspace // each)
    return [(t0, min(t0 + step, T)) for t0 in range(0, T, step)]


def _merge(past_o: Tensor, past_lse: Tensor, own_o: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax out of its parts: past [K, C, H, (D)] and own [C, H, (D)], slots added in order."""
    lse = torch.logaddexp(own_lse, torch.logsumexp(past_lse, 0))
    out = own_o * torch.exp(own_lse - lse)[..., None]
    for o, weight in zip(past_o, torch.exp(past_lse - lse), strict=True):
        out.addcmul_(o.to(out.dtype), weight[..., None])
    return out, lse


BACKEND = Backend(
    name="varlen",
    device_types=("cpu", "cuda"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    choose=choose,
    attend=attend,
)
