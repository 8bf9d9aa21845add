"""Attention of query tiles against key blocks with batched matrix products: the portable half of `varlen`.

A tile is up to M query rows against the keys of one block; thousands of tiles go through one `bmm`, so the
cost of Python does not depend on the number of blocks. Works on every device and for every floating dtype;
all sums are in the dtype of the inputs, which the caller raises to fp32 or float64.

Shape legend: T tokens, H query heads, Hkv key heads, G = H / Hkv, D head dimension, B block size, NF full
blocks, L = Hkv * NF lists (one per key head and full block), P pairs of (query row, past block), R query rows,
M rows per tile, n tiles at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.moba.blocks import BlockTable

MAX_TILE_ROWS = 256
_SMALLEST_OWN = 16  # own blocks shorter than this are padded to it


@dataclass(frozen=True)
class QueryLists:
    """Which query rows read which key block, sorted stably by (key head, block).

    Attributes:
        order: int64 [P], pair numbers `slot * R + row` in list order; pairs without a block come last.
        starts: int32 [L + 1], where each list starts in `order`; the last entry ends the last list.
        num_rows: R.
    """

    order: Tensor
    starts: Tensor
    num_rows: int


class Grads(NamedTuple):
    """Gradients of one attention call, in the accumulation dtype."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def build_lists(block_ids_THK: Tensor, num_kv_heads: int, table: BlockTable) -> QueryLists:
    """Sort the (query, head, slot) pairs of a run of tokens by the block they read. No host synchronisation."""
    T, H = block_ids_THK.shape[:2]
    num_full = table.full_id.numel()
    num_lists = num_kv_heads * num_full
    rank = torch.where(block_ids_THK >= 0, table.full_rank[block_ids_THK.clamp(min=0)], -1)
    head = torch.arange(H, device=rank.device, dtype=torch.int32) // (H // num_kv_heads)
    key = torch.where(rank >= 0, rank + head[:, None] * num_full, num_lists)
    key = key.to(torch.int16 if num_lists < 2**15 else torch.int32).permute(2, 0, 1).reshape(-1)
    sorted_key, order = torch.sort(key, stable=True)
    lists = torch.arange(num_lists + 1, device=key.device, dtype=key.dtype)
    starts = torch.searchsorted(sorted_key, lists, out_int32=True)
    return QueryLists(order=order, starts=starts, num_rows=T * H)


def forward_past(
    q_RD: Tensor, k_LBD: Tensor, v_LBD: Tensor, lists: QueryLists, scale: float, tile_bytes: int
) -> tuple[Tensor, Tensor]:
    """Each pair's own attention over its block: o [P, D] and lse [P]; 0 and -inf for pairs without a block."""
    num_pairs, D = lists.order.numel(), q_RD.shape[1]
    o_PD = q_RD.new_zeros((num_pairs + 1, D))  # the last row takes what padding rows produce
    lse_P = q_RD.new_full((num_pairs + 1,), -torch.inf)
    for pair, list_of in _tiles(lists, k_LBD, tile_bytes):
        q = _take(q_RD, pair % lists.num_rows)  # padding reads some real row
        o, lse = _forward(q, _take(k_LBD, list_of), _take(v_LBD, list_of), None, scale)
        o_PD.index_copy_(0, pair.view(-1), o.view(-1, D))
        lse_P.index_copy_(0, pair.view(-1), lse.view(-1))
    return o_PD[:-1], lse_P[:-1]


def backward_past(
    do_RD: Tensor,
    q_RD: Tensor,
    k_LBD: Tensor,
    v_LBD: Tensor,
    lse_R: Tensor,
    delta_R: Tensor,
    lists: QueryLists,
    scale: float,
    tile_bytes: int,
) -> Grads:
    """dq per pair [P, D], dk and dv per list [L, B, D], from the log-sum-exp and delta of the whole softmax."""
    num_pairs, D = lists.order.numel(), q_RD.shape[1]
    dq_PD = q_RD.new_zeros((num_pairs + 1, D))
    dk_LBD, dv_LBD = torch.zeros_like(k_LBD), torch.zeros_like(v_LBD)
    for pair, list_of in _tiles(lists, k_LBD, tile_bytes):
        row = pair % lists.num_rows
        q, do, delta = _take(q_RD, row), _take(do_RD, row), _take(delta_R, row)
        lse = _take(lse_R, row).masked_fill_(pair == num_pairs, torch.inf)
        part = _backward(do, q, _take(k_LBD, list_of), _take(v_LBD, list_of), lse, delta, None, scale)
        dq_PD.index_copy_(0, pair.view(-1), part.dq.view(-1, D))
        _add_rows(dk_LBD, list_of, part.dk)
        _add_rows(dv_LBD, list_of, part.dv)
    return Grads(dq_PD[:-1], dk_LBD, dv_LBD)


def forward_own(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, table: BlockTable, scale: float, tile_bytes: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query within its own block: o [T, H, D] and lse [T, H]."""
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    o_THD = q_THD.new_empty((T + 1, H, D))  # every token is in one block, so each row but the last is written
    lse_TH = q_THD.new_empty((T + 1, H))
    for token, read, future in _own_blocks(table, H, Hkv, D, q_THD, tile_bytes):
        q, k, v = (_fold(_take(x, read), Hkv) for x in (q_THD, k_THD, v_THD))
        o, lse = _forward(q, k, v, future, scale)
        o_THD.index_copy_(0, token, _unfold(o, Hkv, H))
        lse_TH.index_copy_(0, token, _unfold(lse[..., None], Hkv, H)[..., 0])
    return o_THD[:-1], lse_TH[:-1]


def backward_own(
    do_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    table: BlockTable,
    scale: float,
    tile_bytes: int,
) -> Grads:
    """Gradients of the own-block part, from the log-sum-exp and delta of the whole softmax."""
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    dq, dk, dv = (x.new_empty((T + 1, *x.shape[1:])) for x in (q_THD, k_THD, v_THD))
    for token, read, future in _own_blocks(table, H, Hkv, D, q_THD, tile_bytes):
        q, do, k, v = (_fold(_take(x, read), Hkv) for x in (q_THD, do_THD, k_THD, v_THD))
        lse = _take(lse_TH, read).masked_fill_((token == T).view(*read.shape, 1), torch.inf)
        lse, delta = _fold(lse[..., None], Hkv)[..., 0], _fold(_take(delta_TH, read)[..., None], Hkv)[..., 0]
        part = _backward(do, q, k, v, lse, delta, future, scale)
        dq.index_copy_(0, token, _unfold(part.dq, Hkv, H))
        dk.index_copy_(0, token, _unfold(part.dk, Hkv, Hkv))
        dv.index_copy_(0, token, _unfold(part.dv, Hkv, Hkv))
    return Grads(dq[:-1], dk[:-1], dv[:-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [n, M, D], k and v [n, B, D], hidden bool [M, B] -> o [n, M, D], lse [n, M]."""
    s = torch.bmm(q * scale, k.transpose(1, 2))
    if hidden is not None:
        s.masked_fill_(hidden, -torch.inf)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return torch.bmm(p, v).div_(total), top.add_(total.log_())[..., 0]


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, hidden: Tensor | None, scale: float
) -> Grads:
    """Shapes as in `_forward`; rows with lse = inf give nothing."""
    p = torch.bmm(q * scale, k.transpose(1, 2)).sub_(lse[..., None])
    if hidden is not None:
        p.masked_fill_(hidden, -torch.inf)
    p.exp_()
    dv = torch.bmm(p.transpose(1, 2), do)
    ds = torch.bmm(do, v.transpose(1, 2)).sub_(delta[..., None]).mul_(p).mul_(scale)
    return Grads(torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv)


def _tiles(lists: QueryLists, k_LBD: Tensor, tile_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the lists into tiles; yields (pair number [n, M], list [n]), padding rows numbered P.

    The number of tiles is read on the CPU; on a GPU it is bounded from shapes (the surplus is all padding).
    """
    num_lists, B, D = k_LBD.shape
    num_pairs, device = lists.order.numel(), lists.order.device
    M = min(B, MAX_TILE_ROWS)
    starts = lists.starts.long()
    count = (starts.diff() + (M - 1)) // M
    last_tile = torch.cumsum(count, 0)
    num_tiles = int(last_tile[-1]) if device.type == "cpu" else num_pairs // M + num_lists
    tile = torch.arange(num_tiles, device=device)
    list_of = torch.searchsorted(last_tile, tile, right=True).clamp_(max=num_lists - 1)
    # Surplus tiles land behind the end of the last list: all of their rows are padding.
    first = starts[list_of] + (tile - (last_tile - count)[list_of]) * M
    place = first[:, None] + torch.arange(M, device=device)
    pair = lists.order[place.clamp(0, num_pairs - 1)].masked_fill_(
        place >= starts[list_of + 1][:, None], num_pairs
    )
    step = max(1, tile_bytes // ((3 * M * B + 4 * M * D + 4 * B * D) * k_LBD.element_size()))
    yield from zip(pair.split(step), list_of.split(step), strict=True)


def _own_blocks(
    table: BlockTable, H: int, Hkv: int, D: int, like: Tensor, tile_bytes: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks in batches of one padded length.

    Yields (token to write [n * B'], T for padding; token to read [n, B']; future mask [B' * G, B']).
    On the CPU short blocks are padded to the next power of two, so short documents stay cheap; on a GPU, where
    lengths cannot be read without waiting, all are padded to the block size.
    """
    device, B, T = like.device, table.block_size, table.num_tokens
    lengths, ids = [B], [torch.arange(table.block_len.numel(), device=device)]
    if device.type == "cpu":
        ladder = torch.tensor([0] + [B >> i for i in range(16, -1, -1) if B >> i >= min(_SMALLEST_OWN, B)])
        lengths = ladder[1:].tolist()
        bucket = torch.bucketize(
            table.block_len, ladder, right=False
        )  # ladder[bucket - 1] < len <= ladder[bucket]
        ids = [torch.nonzero(bucket == i + 1)[:, 0] for i in range(len(lengths))]
    for length, members in zip(lengths, ids, strict=True):
        inside = torch.arange(length, device=device)
        row = inside.repeat_interleave(H // Hkv)  # rows of a folded tile: token by token, G heads each
        future = inside[None, :] > row[:, None]
        bytes_each = (3 * length * length * H + 6 * length * (H + Hkv) * D) * like.element_size()
        for some in members.split(max(1, tile_bytes // bytes_each)):
            if some.numel() == 0:
                continue
            place = table.block_start[some].long()[:, None] + inside
            used = inside < table.block_len[some][:, None]
            yield torch.where(used, place, T).view(-1), place.clamp_(max=T - 1), future


def _fold(x: Tensor, Hkv: int) -> Tensor:
    """[n, B, H, D] -> [n * Hkv, B * G, D]: the heads of one key head become rows."""
    return x.unflatten(2, (Hkv, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _unfold(x: Tensor, Hkv: int, H: int) -> Tensor:
    """[n * Hkv, B * G, D] -> [n * B, H, D]."""
    G = H // Hkv
    nH, BG, D = x.shape
    return x.view(nH // Hkv, Hkv, BG // G, G, D).transpose(1, 2).reshape(-1, H, D)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for an index of any shape; on the CPU twice as fast as indexing."""
    return x.index_select(0, index.view(-1)).view(*index.shape, *x.shape[1:])


def _add_rows(total: Tensor, index: Tensor, part: Tensor) -> None:
    """total[index] += part, in a fixed order on every device (index_add_ is atomic on CUDA)."""
    if total.device.type == "cpu":
        total.index_add_(0, index, part)
    else:
        total.index_put_((index,), part, accumulate=True)
