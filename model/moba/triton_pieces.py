# mypy: disable-error-code="no-untyped-def"
"""dk, dv of lists that were cut into segments: their pieces, added in the order of the list.

Shape legend: triton_common.py; segments: triton_cuts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.blocks import BlockTable
from model.moba.triton_cuts import Segments
from model.moba.triton_lists import Lists

SUM_KEYS = 32  # keys per program that adds up the pieces of a long list


@dataclass(frozen=True)
class Pieces:
    """What a dk, dv kernel is told of segments; where no list is cut, tensors that it never touches."""

    extra: Tensor
    num_extra: Tensor
    slot: Tensor
    piece: Tensor  # fp32 [slots, 2, B, D]: dk, dv of each segment
    max_extra: int
    length: int

    @staticmethod
    def of(cut: Segments | None, block_size: int, head_dim: int, spare: Tensor) -> Pieces:
        """`spare` stands in for tensors."""
        if cut is None:
            return Pieces(spare, spare, spare, spare, 0, 0)
        shape = (cut.max_slots, 2, block_size, head_dim)
        piece = torch.empty(shape, dtype=torch.float32, device=spare.device)
        return Pieces(cut.extra, cut.num_extra, cut.slot, piece, cut.max_extra, cut.length)


@triton.jit(do_not_specialize=["num_lists", "first_head", "num_kv_heads", "segment", "num_subs"])
def _sum_kernel(
    piece_ptr,
    slot_ptr,
    count_ptr,
    extra_ptr,
    num_extra_ptr,
    block_start_ptr,
    dk_ptr,
    dv_ptr,
    softmax_scale,
    block_size,
    num_lists,
    first_head,
    num_kv_heads,
    segment,
    num_subs,
    KEYS: tl.constexpr,
    D: tl.constexpr,
):
    """Program = (long list, KEYS of its keys): dk, dv of the list, its pieces added in the order of the list.

    A long list is found by its second segment: every one has exactly one.
    """
    extra = tl.program_id(0) // num_subs
    active = extra < tl.load(num_extra_ptr)
    lists = tl.load(extra_ptr + extra * 2, mask=active, other=0)
    if tl.load(extra_ptr + extra * 2 + 1, mask=active, other=0) == 1:
        count = tl.load(count_ptr + lists)
        local = lists // num_lists
        slot = tl.load(slot_ptr + lists).to(tl.int64)
        n = tl.program_id(0) % num_subs * KEYS + tl.arange(0, KEYS)
        d = tl.arange(0, D)
        inside = (n < block_size)[:, None]
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, D], tl.float32)
        for i in tl.range(0, (count + segment - 1) // segment):
            place = ((slot + i) * (2 * block_size) + n)[:, None] * D + d[None, :]
            dk += tl.load(piece_ptr + place, mask=inside, other=0.0)
            dv += tl.load(piece_ptr + place + block_size * D, mask=inside, other=0.0)
        key = tl.load(block_start_ptr + lists - local * num_lists).to(tl.int64) + n
        at = (key * num_kv_heads + first_head + local)[:, None] * D + d[None, :]
        tl.store(dk_ptr + at, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def sum_pieces(
    piece: Tensor,
    cut: Segments,
    lists: Lists,
    table: BlockTable,
    dk_THD: Tensor,
    dv_THD: Tensor,
    softmax_scale: float,
    keys: int,
) -> None:
    """dk, dv [T, Hkv, D] of long lists from piece fp32 [slots, 2, B, D]; `keys` at a time."""
    Hkv, D = dk_THD.shape[1:]
    num_subs = common.ceil_div(table.block_size, keys)
    _sum_kernel[(cut.max_extra * num_subs,)](
        piece,
        cut.slot,
        lists.count,
        cut.extra,
        cut.num_extra,
        table.block_start,
        dk_THD,
        dv_THD,
        softmax_scale,
        table.block_size,
        lists.num_lists,
        lists.first_head,
        Hkv,
        cut.length,
        num_subs,
        KEYS=keys,
        D=D,
        num_warps=4,
    )
