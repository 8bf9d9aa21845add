"""Ways to choose the past blocks a query attends to, all with the contract of `choose_blocks`.

Choosing and attending are two functions joined by the ids of the chosen blocks, so sliding window and attention
sink, which the MoBA paper shows to be special gates (arXiv 2502.13189, section 2.2), run on the same kernels.
To add a chooser: one function of block numbers, its name in `model.schedule.CHOOSERS`, and its dense mask in
tests/model/moba/test_choosers.py.

Shape legend: T tokens, H query heads, Hkv key heads, D head dimension, K = topk - 1 listed past blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conf.errors import UserError
from model.moba.api import choose_blocks
from model.moba.blocks import build_block_table
from model.schedule import check_chooser


def choose(
    name: str,
    q_THD: Tensor,
    k_THD: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Past blocks of every query by the chooser `name`.

    Args:
        name: moba (the gate: highest q . mean(k), per query head), window (the own block and the topk - 1 blocks
            just before it) or sink_window (the own block, the first of the document, and the topk - 2 just
            before the own one).
        q_THD: [T, H, D]; k_THD: [T, Hkv, D]. Only the gate looks at their values.
        block_size, topk: tokens per block; blocks per query, the own one included.
        cu_seqlens: int32 [N + 1] document borders; None: one document.
        backend: whose gate runs, as in `moba_attention`.

    Returns:
        int32 [T, H, K], K at most topk - 1: global ids of past blocks in any order, -1 = none.

    Raises:
        UserError: unknown name, or a topk the chooser cannot serve.
    """
    check_chooser("attention.choose", name, topk)
    if name == "moba":
        return choose_blocks(
            q_THD, k_THD, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens, backend=backend
        )
    T, H, _ = q_THD.shape
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=q_THD.device)
    if topk < 1 or block_size < 1:
        raise UserError(f"topk={topk}, block_size={block_size}: both must be at least 1")
    table = build_block_table(cu_seqlens, T, block_size)
    num_past = min(topk - 1, table.max_past)
    return by_position(name, table.own_block, table.first_block, H, num_past)


def by_position(name: str, own_T: Tensor, first_T: Tensor, num_heads: int, num_past: int) -> Tensor:
    """Blocks that depend on the query's place alone.

    Args:
        name: window or sink_window.
        own_T, first_T: [T], the query's own block and the first block of its document.
        num_heads: H; all heads read the same blocks.
        num_past: K.

    Returns:
        int32 or int64 as `own_T`, [T, H, K], -1 = none.
    """
    sinks = int(name == "sink_window" and num_past > 0)
    back = torch.arange(1, num_past - sinks + 1, dtype=own_T.dtype, device=own_T.device)
    window = own_T[:, None] - back
    window = torch.where(window >= first_T[:, None] + sinks, window, -1)  # the sink is listed once
    if sinks:
        window = torch.cat([torch.where(first_T < own_T, first_T, -1)[:, None], window], dim=1)
    return window[:, None].expand(-1, num_heads, -1).contiguous()
