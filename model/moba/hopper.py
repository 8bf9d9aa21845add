"""The hot passes: warp-specialised kernels where they were measured to win, else their Triton twins.

The twins compute the same and are tested against each other. Gluon, in which the specialised kernels are written,
has no stable interface between versions of Triton: they are used with the version they were measured with, and
with others the twins run. `explain` says which and why.

Shape legend: triton_common.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import triton
from torch import Tensor

from model.moba import triton_combine, triton_common, triton_dkv, triton_dq, triton_merge, triton_routed
from model.moba.blocks import BlockTable
from model.moba.triton_common import Tile, Tiles
from model.moba.triton_cuts import TileTable
from model.moba.triton_lists import Lists
from model.moba.triton_reach import Reach
from model.moba.triton_sums import RowSums

MEASURED_WITH = "3.6"  # Triton
STEP, TILE_ROWS = 128, 128
# Blocks from which on each pass was measured to gain.
MIN_BLOCK = 256
MIN_COMBINE = 128
MIN_MERGE = {64: 128, 128: 256}  # by head_dim
MAX_OWN = {64: 512}  # combine, merge: by head_dim; with larger blocks they gain 1 or 2 % together
FUSED_BLOCK = 128  # dk, dv and partial dq in one kernel: a program holds a whole block
# At head_dim 64 the exponentials bound the forward pass, and dq is up to 5 % slower than its twin; dk, dv gains.
HEAD_DIMS = {
    "routed": (128,),
    "dq": (128,),
    "dkv": (64, 128),
    "fused": (64, 128),
    "combine": (64, 128),
    "merge": (64, 128),
}
# The gate gains from so many blocks on; lists of more places would not stay in registers.
GATE_BLOCKS, GATE_PAST, GATE_HEAD_DIMS = 81, 16, (64, 128)
_off = False
_log = logging.getLogger(__name__)


@contextmanager
def twins_only() -> Iterator[None]:
    """The Triton twins in every pass of this block: to compare the two."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@cache
def _unusable() -> str | None:
    if triton_common.INTERPRETED:
        return "Triton's interpreter runs (TRITON_INTERPRET)"
    if not triton.__version__.startswith(MEASURED_WITH + "."):
        return f"they were measured with Triton {MEASURED_WITH}, this is {triton.__version__}"
    return None


def refusal(head_dim: int, block_size: int, which: str) -> str | None:
    """Why the Triton twin of a pass (a key of HEAD_DIMS) runs; None: the specialised kernel does."""
    if _off:
        return "switched off"
    if head_dim not in HEAD_DIMS[which]:
        return f"head_dim {head_dim}"
    if which == "fused":
        return _unusable() if block_size == FUSED_BLOCK else f"blocks of {block_size} are not of {FUSED_BLOCK}"
    least = {"combine": MIN_COMBINE, "merge": MIN_MERGE[head_dim]}.get(which, MIN_BLOCK)
    if block_size < least or block_size % STEP:
        return f"blocks of {block_size} are below {least} or no multiple of {STEP}"
    if which in ("combine", "merge") and block_size > MAX_OWN.get(head_dim, block_size):
        return f"blocks of {block_size} are above {MAX_OWN[head_dim]} at head_dim {head_dim}"
    return _unusable()


def gate_refusal(head_dim: int, num_blocks: int, num_past: int) -> str | None:
    """As `refusal`, for the gate, whose time depends on the number of blocks and not on their size."""
    if _off or head_dim not in GATE_HEAD_DIMS:
        return "switched off" if _off else f"head_dim {head_dim}"
    few, long = num_blocks < GATE_BLOCKS, num_past > GATE_PAST
    return f"{num_blocks} blocks, {num_past} of them past ones" if few or long else _unusable()


def explain(head_dim: int, block_size: int) -> str:
    """One line: which kernels run the passes over lists of such a shape, and why."""
    passes = [which for which in HEAD_DIMS if which != "fused" or block_size <= FUSED_BLOCK]
    why = {which: refusal(head_dim, block_size, which) for which in passes}
    twins = ", ".join(f"{which}: {reason}" for which, reason in why.items() if reason is not None)
    specialised = ", ".join(which for which, reason in why.items() if reason is None)
    return f"warp-specialised: {specialised or 'none'}; Triton: {twins or 'none'}"


@cache
def _say(head_dim: int, block_size: int) -> None:
    _log.info("MoBA kernels, head_dim %d, blocks of %d: %s", head_dim, block_size, explain(head_dim, block_size))


def _specialised(head_dim: int, block_size: int, which: str) -> bool:
    """Whether the specialised kernel of a pass runs; what runs is said once in the log (level INFO)."""
    if not _off:
        _say(head_dim, block_size)
    return refusal(head_dim, block_size, which) is None


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
    if tile.rows != TILE_ROWS or not _specialised(q_THD.shape[-1], table.block_size, "routed"):
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
    if tile.rows != TILE_ROWS or not _specialised(q_THD.shape[-1], table.block_size, "dq"):
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
    if bare or not _specialised(q_THD.shape[-1], table.block_size, which):
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
    if bare or not _specialised(D, block_size, "combine"):
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
    if part is None or _long_runs(D, reach) or not _specialised(D, block_size, "merge"):
        triton_merge.merge_dq(*inputs, part, block_ids, reach, dq_THD, heads, tokens, softmax_scale, tiles)
        return
    from model.moba import gluon_merge

    gluon_merge.merge_dq(*inputs, part, block_ids, reach, dq_THD, heads, tokens, softmax_scale, block_size)
