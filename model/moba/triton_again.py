# mypy: disable-error-code="no-untyped-def"
"""The gate for listed rows only: those that `gluon_gate` may have lost a block of.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.triton_gate import MASKED, NOTHING, insert, score_of

_TILE = common.Tile(rows=64, keys=64, warps=4, stages=1)
_PROGRAMS = 264  # few rows are expected


@dataclass(frozen=True)
class Listed:
    """row: int32 [Hkv, T * G], ids of rows (token * H + head) in any order. count: int32 [Hkv], how many."""

    row: Tensor
    count: Tensor

    @staticmethod
    def none(num_kv_heads: int, capacity: int, device: torch.device) -> Listed:
        row = torch.empty((num_kv_heads, capacity), dtype=torch.int32, device=device)
        return Listed(row, torch.zeros(num_kv_heads, dtype=torch.int32, device=device))


@triton.jit(do_not_specialize=["num_blocks", "num_kv_heads", "K", "capacity"])
def _again_kernel(
    q_ptr, high_desc, low_desc, own_block_ptr, first_block_ptr, ids_ptr, row_ptr, count_ptr, num_blocks,
    num_kv_heads, K, capacity, G: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Program = every n-th ROWS of the rows listed for one key head; a row's result depends on no other row."""
    head = tl.program_id(0) % num_kv_heads
    count = tl.load(count_ptr + head)
    column = tl.arange(0, COLS)
    slot = tl.arange(0, SLOTS)
    d = tl.arange(0, D)
    pieces = (count + ROWS - 1) // ROWS
    for piece in tl.range(tl.program_id(0) // num_kv_heads, pieces, tl.num_programs(0) // num_kv_heads):
        i = piece * ROWS + tl.arange(0, ROWS)
        live = i < count
        row = tl.load(row_ptr + head.to(tl.int64) * capacity + i, mask=live, other=0).to(tl.int64)
        token = row // (num_kv_heads * G)
        q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        own = tl.load(own_block_ptr + token, mask=live, other=0)
        first = tl.load(first_block_ptr + token, mask=live, other=2147483647)
        best = tl.where(slot[None, :] < K, NOTHING, float("inf")) + tl.zeros([ROWS, SLOTS], tl.float32)
        ids = (-1 - slot)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
        worst = tl.full([ROWS], NOTHING, tl.float32)
        worst_id = tl.full([ROWS], -1, tl.int32)
        for j in tl.range(tl.min(first, 0), tl.max(own, 0), COLS, num_stages=1):
            score = score_of(q, high_desc, low_desc, head * num_blocks + j, LOW)
            block = (j + column)[None, :]
            score = tl.where((block >= first[:, None]) & (block < own[:, None]), score, MASKED)
            best, ids, worst, worst_id = insert(score, j, best, ids, worst, worst_id, column, ROWS, COLS)
        out = ids_ptr + row[:, None] * K + slot[None, :]
        tl.store(out, tl.maximum(ids, -1), mask=live[:, None] & (slot < K)[None, :])


def choose(
    q_THD: Tensor, means: tuple[Tensor, Tensor | None], table: BlockTable, listed: Listed, ids: Tensor
) -> None:
    """The best past blocks of the listed rows into ids int32 [T, H, K]. means: [Hkv, NB, D], both parts."""
    high, low = means
    Hkv, NB, D = high.shape
    K = ids.shape[-1]
    _again_kernel[(Hkv * max(1, _PROGRAMS // Hkv),)](
        q_THD,
        common.flat_rows(high, _TILE.keys),
        common.flat_rows(high if low is None else low, _TILE.keys),
        table.own_block,
        table.first_block,
        ids,
        listed.row,
        listed.count,
        NB,
        Hkv,
        K,
        listed.row.shape[1],
        G=q_THD.shape[1] // Hkv,
        ROWS=_TILE.rows,
        COLS=_TILE.keys,
        SLOTS=max(4, common.next_power_of_two(K)),
        D=D,
        LOW=low is not None,
        **_TILE.options,
    )
