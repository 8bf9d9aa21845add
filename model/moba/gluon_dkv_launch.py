"""Starts the warp-specialised dk, dv kernel with the arguments of `triton_dkv.dkv`.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from torch import Tensor

from model.moba import gluon_common as common
from model.moba.blocks import BlockTable
from model.moba.gluon_common import HALF_ROWS, TILE_ROWS, Work
from model.moba.gluon_dkv import WORK, _dkv_kernel, constants
from model.moba.triton_common import LOG2E, ceil_div
from model.moba.triton_lists import Lists
from model.moba.triton_pieces import SUM_KEYS, Pieces, sum_pieces
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums


def dkv(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    lists: Lists,
    list_lse: Tensor,
    list_delta: Tensor,
    table: BlockTable,
    reach: Reach,
    dk_THD: Tensor,
    dv_THD: Tensor,
    heads: range,
    softmax_scale: float,
    work: Work = WORK,
) -> None:
    """dk, dv [T, Hkv, D] of some key heads, as `triton_dkv.dkv` with lists and without partial dq."""
    H, D = q_THD.shape[1:]
    Hkv = k_THD.shape[1]
    blocks = table.block_start.numel()
    num_subs = ceil_div(table.block_size, TILE_ROWS)
    spare = sums.lse_TH  # stands in for arguments that this variant never touches
    cut = lists.segments()
    pieces = Pieces.of(cut, table.block_size, D, spare)
    _dkv_kernel[((blocks * len(heads) + pieces.max_extra) * num_subs,)](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, HALF_ROWS),
        common.token_rows(v_THD, HALF_ROWS),
        sums.lse_TH,
        sums.delta_TH,
        list_lse,
        list_delta,
        lists.row,
        lists.offset,
        lists.count,
        pieces.extra,
        pieces.num_extra,
        pieces.slot,
        table.block_start,
        table.block_len,
        reach.end,
        pieces.piece,
        dk_THD,
        dv_THD,
        softmax_scale * LOG2E,
        softmax_scale,
        H,
        Hkv,
        heads.start,
        len(heads),
        blocks + 1,
        num_subs,
        table.block_size,
        pieces.max_extra,
        pieces.length,
        **constants(D, H // Hkv, cut is not None, work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
    if cut is not None:
        sum_pieces(pieces.piece, cut, lists, table, dk_THD, dv_THD, softmax_scale, SUM_KEYS)
