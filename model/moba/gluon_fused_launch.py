"""Starts the warp-specialised fused backward of blocks of 128 with the arguments of `triton_dkv.dkv`.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from torch import Tensor

from model.moba import gluon_common as common
from model.moba.blocks import BlockTable
from model.moba.gluon_common import Work
from model.moba.gluon_fused import WORK, _fused_kernel, constants, rows_per_step
from model.moba.triton_common import LOG2E
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
    part: Tensor,
    table: BlockTable,
    reach: Reach,
    dk_THD: Tensor,
    dv_THD: Tensor,
    heads: range,
    softmax_scale: float,
    work: Work = WORK,
) -> None:
    """dk, dv [T, Hkv, D] of some key heads and the dq partials of all tokens; table.block_size is 128."""
    H, D = q_THD.shape[1:]
    Hkv, rows = k_THD.shape[1], rows_per_step(D, work)
    blocks = table.block_start.numel()
    spare = sums.lse_TH  # stands in for arguments that this variant never touches
    cut = lists.segments()
    pieces = Pieces.of(cut, table.block_size, D, spare)
    _fused_kernel[(blocks * len(heads) + pieces.max_extra,)](
        q_THD,
        dout_THD,
        common.token_rows(k_THD, rows),
        common.token_rows(v_THD, rows),
        sums.lse_TH,
        sums.delta_TH,
        list_lse,
        list_delta,
        lists.row,
        lists.pair,
        lists.offset,
        lists.count,
        pieces.extra,
        pieces.num_extra,
        pieces.slot,
        table.block_start,
        table.block_len,
        reach.end,
        part,
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
        lists.pairs_per_head,
        pieces.max_extra,
        pieces.length,
        **constants(D, H // Hkv, cut is not None, work),
        num_warps=4,
        maxnreg=work.max_registers,
    )
    if cut is not None:
        sum_pieces(pieces.piece, cut, lists, table, dk_THD, dv_THD, softmax_scale, SUM_KEYS)
