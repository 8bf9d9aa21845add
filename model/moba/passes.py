"""The hot passes over lists, each by what `hopper` names for its shape: a specialised kernel or its Triton twin.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from torch import Tensor

from model.moba import hopper, triton_combine, triton_dkv, triton_dq, triton_merge, triton_routed
from model.moba.blocks import BlockTable
from model.moba.hopper import specialised
from model.moba.triton_common import Tile, Tiles
from model.moba.triton_cuts import TileTable
from model.moba.triton_lists import Lists
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums


def routed(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    tile: Tile,
    stationary: bool,
) -> None:
    """Forward over the chosen past blocks; arguments of `triton_routed.routed`."""
    inputs = (q_THD, k_THD, v_THD, part, part_lse, lists, tiles, table, first_token, scale_log2)
    if tile.rows != hopper.TILE_ROWS or not specialised(q_THD.shape[-1], table.block_size, "routed"):
        triton_routed.routed(*inputs, tile, stationary)
        return
    from model.moba import gluon_routed

    gluon_routed.routed(*inputs)


def dq_partials(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor,
    list_lse: Tensor,
    list_delta: Tensor,
    lists: Lists,
    tiles: TileTable,
    table: BlockTable,
    first_token: int,
    scale_log2: float,
    tile: Tile,
    stationary: bool,
) -> None:
    """Partial dq of every pair; arguments of `triton_dq.dq_partials`."""
    inputs = (q_THD, k_THD, v_THD, dout_THD, sums, part, list_lse, list_delta, lists, tiles, table, first_token)
    if tile.rows != hopper.TILE_ROWS or not specialised(q_THD.shape[-1], table.block_size, "dq"):
        triton_dq.dq_partials(*inputs, scale_log2, tile, stationary)
        return
    from model.moba import gluon_dq

    gluon_dq.dq_partials(*inputs, scale_log2)


def dkv(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    lists: Lists | None,
    list_lse: Tensor | None,
    list_delta: Tensor | None,
    part: Tensor | None,
    table: BlockTable,
    reach: Reach,
    dk_THD: Tensor,
    dv_THD: Tensor,
    heads: range,
    softmax_scale: float,
    tile: Tile,
    pointers: bool = False,
) -> None:
    """dk, dv of some key heads, fused with partial dq where `part` is given; arguments of `triton_dkv.dkv`."""
    inputs = (q_THD, k_THD, v_THD, dout_THD, sums)
    which = "dkv" if part is None else "fused"
    bare = lists is None or list_lse is None or list_delta is None
    if bare or not specialised(q_THD.shape[-1], table.block_size, which):
        triton_dkv.dkv(*inputs, lists, list_lse, list_delta, part, table, reach, dk_THD, dv_THD, heads,
                       softmax_scale, tile, pointers)  # fmt: skip
        return
    assert lists is not None and list_lse is not None and list_delta is not None
    if part is not None:
        from model.moba import gluon_fused_launch

        gluon_fused_launch.dkv(*inputs, lists, list_lse, list_delta, part, table, reach, dk_THD, dv_THD, heads,
                               softmax_scale)  # fmt: skip
        return
    from model.moba import gluon_dkv_launch

    gluon_dkv_launch.dkv(*inputs, lists, list_lse, list_delta, table, reach, dk_THD, dv_THD, heads, softmax_scale)


def _long_runs(head_dim: int, reach: Reach) -> bool:
    """Many queries see a whole document without lists: at head_dim 64 the twins are as fast or faster, by 10 %."""
    return head_dim == 64 and reach.many


def combine(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    part: Tensor | None,
    part_lse: Tensor | None,
    block_ids: Tensor,
    reach: Reach,
    out_THD: Tensor,
    lse_TH: Tensor,
    heads: range,
    tokens: range,
    scale_log2: float,
    tiles: Tiles,
    block_size: int,
) -> None:
    """Forward of the own block plus partials; arguments of `triton_combine.combine` and block_size."""
    D = q_THD.shape[-1]
    bare = part is None or part_lse is None or _long_runs(D, reach)
    if bare or not specialised(D, block_size, "combine"):
        triton_combine.combine(q_THD, k_THD, v_THD, part, part_lse, block_ids, reach, out_THD, lse_TH, heads,
                               tokens, scale_log2, tiles)  # fmt: skip
        return
    from model.moba import gluon_combine

    assert part is not None and part_lse is not None
    gluon_combine.combine(q_THD, k_THD, v_THD, part, part_lse, block_ids, reach, out_THD, lse_TH, heads, tokens,
                          scale_log2, block_size)  # fmt: skip


def merge_dq(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    dout_THD: Tensor,
    sums: RowSums,
    part: Tensor | None,
    block_ids: Tensor,
    reach: Reach,
    dq_THD: Tensor,
    heads: range,
    tokens: range,
    softmax_scale: float,
    tiles: Tiles,
    block_size: int,
) -> None:
    """dq of the own block plus partials; arguments of `triton_merge.merge_dq` and block_size."""
    inputs = (q_THD, k_THD, v_THD, dout_THD, sums)
    D = q_THD.shape[-1]
    if part is None or _long_runs(D, reach) or not specialised(D, block_size, "merge"):
        triton_merge.merge_dq(*inputs, part, block_ids, reach, dq_THD, heads, tokens, softmax_scale, tiles)
        return
    from model.moba import gluon_merge

    gluon_merge.merge_dq(*inputs, part, block_ids, reach, dq_THD, heads, tokens, softmax_scale, block_size)
