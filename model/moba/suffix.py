"""MoBA for queries that are the last tokens of longer rows of keys: chunked prefill and decode over a KV cache.

Same values as `moba_attention` over the whole row, of which only the last queries are computed. Inference only.

Shape legend: Q query tokens and S key tokens of all rows laid end to end, R rows, H query heads, Hkv key heads,
D head dimension, B block size, K listed past blocks, NF full blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.errors import UserError
from model import flash, full_suffix
from model.dispatch import resolve_backend
from model.moba.blocks import BlockTable, build_block_table
from model.moba.choose import WORKSPACE_BYTES, accumulate_dtype, block_means
from model.moba.choosers import by_position
from model.moba.varlen import TILE_BYTES, _chunks, _merge, _Parts
from model.moba.varlen import WORKSPACE_BYTES as PART_BYTES
from model.schedule import LayerPlan

RowKernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [M, H, D], k and v [N, Hkv, D] of a row -> [M, H, D]
MASK_BYTES = 256 << 20  # scores of full attention that may exist at a time


def row_kernel(q_QHD: Tensor, num_queries: int, layer_plan: LayerPlan, backend: str = "auto") -> RowKernel | None:
    """The GPU's kernels for one row, where `suffix_attention` would be slower; None: there are none.

    Args:
        q_QHD: of which only shape, type and device count.
        num_queries: of the row that has the fewest.
        backend: of MoBA, as in `model.dispatch`; its Triton kernels are the ones taken here.

    Raises:
        UserError: a named backend that cannot do it.
    """
    scale = 1 / math.sqrt(q_QHD.shape[-1])
    if layer_plan.kind == "full":
        if num_queries < full_suffix.MIN_QUERIES or full_suffix.refusal(q_QHD) is not None:
            return None
        return lambda q, k, v: full_suffix.attend_row(q, k, v, scale)
    dim, size = q_QHD.shape[-1], layer_plan.block_size
    found = resolve_backend(backend, device=q_QHD.device, dtype=q_QHD.dtype, head_dim=dim, block_size=size)
    if found.name != "triton":
        return None
    from model.moba import triton_suffix

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer_plan.topk > (k.shape[0] - 1) // size and full_suffix.refusal(q) is None:
            return full_suffix.attend_row(q, k, v, scale)  # every block is chosen
        return triton_suffix.attend_row(q, k, v, layer_plan, scale)

    return attend


@torch.no_grad()
def suffix_attention(
    q_QHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    *,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    layer_plan: LayerPlan,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of each row's last `query_lengths[r]` tokens over its `key_lengths[r]` keys, [Q, H, D].

    Args:
        q_QHD: [Q, H, D] after RoPE; k_SHD, v_SHD: [S, Hkv, D], same dtype.
        query_lengths, key_lengths: per row, 1 <= query <= key, on the host.
        layer_plan: full, or MoBA with any chooser; blocks start at the row's first key.
        softmax_scale: None: 1 / sqrt(D).

    Raises:
        UserError: lengths that do not fit.
    """
    if any(not 1 <= m <= n for m, n in zip(query_lengths, key_lengths, strict=True)):
        raise UserError(f"query lengths {list(query_lengths)} do not fit key lengths {list(key_lengths)}")
    if (sum(query_lengths), sum(key_lengths)) != (q_QHD.shape[0], k_SHD.shape[0]):
        raise UserError(
            f"{q_QHD.shape[0]} queries, {k_SHD.shape[0]} keys: not the {sum(query_lengths)} and "
            f"{sum(key_lengths)} tokens of the rows"
        )
    scale = 1 / math.sqrt(q_QHD.shape[-1]) if softmax_scale is None else softmax_scale
    if layer_plan.kind == "full":
        kernels = flash.find(q_QHD)
        if kernels is not None:  # its causal mask is aligned to the last key, as wanted here
            cu_q, cu_k = (_borders(x, q_QHD.device) for x in (query_lengths, key_lengths))
            q, k, v = q_QHD.contiguous(), k_SHD.contiguous(), v_SHD.contiguous()
            return kernels.forward(
                q, k, v, cu_q, cu_k, max(query_lengths), max(key_lengths), causal=True, scale=scale
            )[0]
        rows = _rows(q_QHD, k_SHD, v_SHD, query_lengths, key_lengths)
        return torch.cat([_full_row(q, k, v, scale) for q, k, v in rows])
    size, device = layer_plan.block_size, q_QHD.device
    table = build_block_table(_borders(key_lengths, device), k_SHD.shape[0], size)
    ends = list(itertools.accumulate(key_lengths))
    place_Q = torch.cat(
        [torch.arange(end - m, end, device=device) for m, end in zip(query_lengths, ends, strict=True)]
    )
    num_past = min(layer_plan.topk - 1, table.max_past)
    ids_QHK = choose_suffix(layer_plan.choose, q_QHD, k_SHD, place_Q, table, num_past)
    if max(query_lengths) == 1:
        own_start = table.own_start[place_Q].tolist()
        parts = [
            _one_query(q_QHD[r], k_SHD, v_SHD, ids_QHK[r], table, own_start[r], ends[r], scale)
            for r in range(len(ends))
        ]
        return torch.stack(parts)
    own_o, own_lse = _own_blocks(q_QHD, k_SHD, v_SHD, query_lengths, key_lengths, size, scale)
    past = _Parts(q_QHD.contiguous(), k_SHD, v_SHD, table, scale, TILE_BYTES.get(device.type, 64 << 20))
    for t0, t1 in _chunks(q_QHD, ids_QHK, table, PART_BYTES.get(device.type, 1 << 30)):
        merged = _merge(*past.forward_past(ids_QHK[t0:t1], t0), own_o[t0:t1], own_lse[t0:t1])
        own_o[t0:t1], own_lse[t0:t1] = merged
    return own_o.to(q_QHD.dtype)


@torch.no_grad()
def choose_suffix(
    name: str, q_QHD: Tensor, k_SHD: Tensor, place_Q: Tensor, table: BlockTable, num_past: int
) -> Tensor:
    """Past blocks of queries that stand at `place_Q` (int64 [Q]) among the keys, int32 [Q, H, K], -1 = none.

    `name` is a chooser of `model.moba.choosers`; scores, ties and dtypes of the gate as in `model.moba.choose`.
    """
    own_Q, first_Q = table.own_block[place_Q], table.first_block[place_Q]
    Q, H, D = q_QHD.shape
    if name != "moba":
        return by_position(name, own_Q, first_Q, H, num_past)
    chosen = torch.full((Q, H, num_past), -1, dtype=torch.int32, device=q_QHD.device)
    if num_past == 0:
        return chosen
    acc, num_kv_heads = accumulate_dtype(q_QHD.dtype), k_SHD.shape[1]
    mean_hDN = block_means(k_SHD, table).permute(1, 2, 0)
    ids = table.full_id
    step = max(1, WORKSPACE_BYTES // (3 * H * ids.numel() * acc.itemsize))
    for a in range(0, Q, step):
        b = min(a + step, Q)
        q_hMD = q_QHD[a:b].to(acc).view(b - a, num_kv_heads, -1, D).transpose(0, 1).reshape(num_kv_heads, -1, D)
        score = torch.bmm(q_hMD, mean_hDN).view(num_kv_heads, b - a, -1, ids.numel()).transpose(0, 1)
        past = (ids >= first_Q[a:b, None]) & (ids < own_Q[a:b, None])
        score = score.masked_fill(~past[:, None, None], -torch.inf)
        best = score.sort(dim=-1, descending=True, stable=True)  # stable: ties to the lower id
        found = torch.where(best.values > -torch.inf, ids[best.indices], -1)[..., :num_past]
        chosen[a:b, :, : found.shape[-1]] = found.reshape(b - a, H, -1)
    return chosen


def _own_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Q, H, D] and lse [Q, H] of the causal part in each query's own block.

    Rows are cut at the start of their first query's block; zeros stand in for the queries that are not asked for.
    """
    keys, queries, lengths, done, end = [], [], [], 0, 0
    for m, n in zip(query_lengths, key_lengths, strict=True):
        end += n
        cut = (n - m) // size * size
        lengths.append(n - cut)
        keys.append(torch.arange(end - n + cut, end, device=q.device))
        done += n - cut
        queries.append(torch.arange(done - m, done, device=q.device))
    rows, place = torch.cat(keys), torch.cat(queries)
    padded = q.new_zeros((done, *q.shape[1:])).index_copy_(0, place, q)
    table = build_block_table(_borders(lengths, q.device), done, size)
    part = _Parts(padded, k[rows], v[rows], table, scale, TILE_BYTES.get(q.device.type, 64 << 20))
    out, lse = part.forward_own()
    return out[place], lse[place]


def _one_query(
    q_HD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    ids_HK: Tensor,
    table: BlockTable,
    own_start: int,
    end: int,
    scale: float,
) -> Tensor:
    """A single query, [H, D]: its blocks are gathered per head, so no more keys are read than it attends to."""
    inside = torch.arange(table.block_size, device=q_HD.device)
    listed = ids_HK >= 0
    past = table.block_start[ids_HK.clamp(min=0).long()].long()[..., None] + inside
    own = torch.arange(own_start, end, device=q_HD.device).expand(q_HD.shape[0], -1)
    tokens = torch.cat([past.flatten(1).clamp(max=k_SHD.shape[0] - 1), own], dim=1)
    seen = torch.cat([listed.repeat_interleave(table.block_size, 1), torch.ones_like(own, dtype=torch.bool)], 1)
    head = torch.arange(q_HD.shape[0], device=q_HD.device)[:, None] // (q_HD.shape[0] // k_SHD.shape[1])
    k, v = k_SHD[tokens, head], v_SHD[tokens, head]
    return scaled_dot_product_attention(q_HD[:, None], k, v, attn_mask=seen[:, None], scale=scale)[:, 0]


def _full_row(q_MHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, scale: float) -> Tensor:
    """Exact causal attention of one row's last M tokens, a few queries at a time."""
    (M, H, _), N = q_MHD.shape, k_NHD.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_MHD, k_NHD, v_NHD))
    step = max(1, MASK_BYTES // (H * N * 4))
    out = []
    for a in range(0, M, step):
        b = min(a + step, M)
        last = N - M + b  # keys that the last of these queries sees
        token = torch.arange(N - M + a, last, device=q.device)
        mask = torch.arange(last, device=q.device) <= token[:, None]
        out.append(
            scaled_dot_product_attention(
                q[:, :, a:b],
                k[:, :, :last],
                v[:, :, :last],
                attn_mask=None if b - a == 1 else mask,
                scale=scale,
                enable_gqa=True,
            )[0]
        )
    return torch.cat(out, dim=1).transpose(0, 1)


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    q_rows, k_rows, v_rows = q.split(list(query_lengths)), k.split(list(key_lengths)), v.split(list(key_lengths))
    return list(zip(q_rows, k_rows, v_rows, strict=True))
