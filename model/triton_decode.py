# mypy: disable-error-code="no-untyped-def"
"""Decode attention over a KV cache: one new token per row against all its keys, split over the keys.

A single query cannot fill a GPU, so each row and key head is cut into `splits` runs of keys (Flash-Decoding, Dao
et al. 2023). The G query heads of a group are the rows of one small matrix product, so every key and value is read
once. A second kernel merges the runs in a fixed order: equal inputs give equal bits.

The launch depends on shapes alone and the lengths are read on the device: a captured CUDA graph stays right while
the rows grow.

Shape legend: R rows, L capacity, H query heads, Hkv key heads, G = H / Hkv, D head_dim, N splits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common

_LOW = tl.constexpr(-1.0e30)  # running maximum before the first key: finite, so that nothing is inf - inf
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
ROWS = 16  # of the matrix product: the group's heads and, below them, nothing


@dataclass(frozen=True)
class Split:
    """How the work is cut: keys per step, and programs per multiprocessor in the grid."""

    keys: int
    warps: int
    stages: int
    programs: int


TILE = Split(keys=16, warps=4, stages=1, programs=3) if common.INTERPRETED else Split(64, 4, 3, 4)


@triton.jit
def load_queries(q_ptr, first, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """The G queries of group `first` as the first rows of [ROWS, D], and empty sums for them."""
    g = tl.arange(0, ROWS)[:, None]
    q = tl.load(q_ptr + (first * G + g) * D + tl.arange(0, D)[None, :], mask=g < G, other=0.0)
    return q, tl.full([ROWS], _LOW, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)


@triton.jit
def add_keys(q, k, v, seen, scale_log2, top, total, out):
    """Online softmax: adds keys and values [KEYS, D] to the sums of the queries; `seen` [ROWS or 1, KEYS]."""
    score = tl.dot(q, k.T, input_precision="ieee") * scale_log2
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new_top[:, None])
    decay = tl.exp2(top - new_top)
    out = tl.dot(p.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
    return new_top, total * decay + tl.sum(p, 1), out


@triton.jit
def store_part(part_ptr, lse_ptr, to, top, total, out, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Partial results of the G queries, as `merge` reads them; -inf: no key was seen."""
    g = tl.arange(0, ROWS)
    some = tl.where(total > 0, total, 1.0)
    at = to * G + g
    tl.store(part_ptr + at[:, None] * D + tl.arange(0, D)[None, :], out / some[:, None], mask=(g < G)[:, None])
    tl.store(lse_ptr + at, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=g < G)


@triton.jit(do_not_specialize=["num_kv_heads", "num_splits"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    last_ptr,
    part_ptr,
    lse_ptr,
    scale_log2,
    row_stride,
    num_kv_heads,
    num_splits,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
):
    """Program = (key head, split, row): one run of keys for the G query heads of a key head."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    length = (tl.load(last_ptr + row) + 1).to(tl.int32)
    run = tl.cdiv(tl.cdiv(length, KEYS), num_splits) * KEYS
    begin = split * run
    end = tl.minimum(begin + run, length)
    d = tl.arange(0, D)
    n = tl.arange(0, KEYS)
    first = row.to(tl.int64) * num_kv_heads + head
    q, top, total, out = load_queries(q_ptr, first, G, ROWS, D)
    base = row.to(tl.int64) * row_stride + head * D
    for j in tl.range(begin, end, KEYS):
        live = j + n < end
        at = base + (j + n).to(tl.int64)[:, None] * (num_kv_heads * D) + d[None, :]
        k = tl.load(k_ptr + at, mask=live[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=live[:, None], other=0.0)
        top, total, out = add_keys(q, k, v, live[None, :], scale_log2, top, total, out)
    store_part(part_ptr, lse_ptr, first * num_splits + split, top, total, out, G, ROWS, D)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(part_ptr, lse_ptr, out_ptr, num_splits, G: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr):
    """Program = (row, query head). Split 0 always has a key."""
    i = tl.program_id(0)
    group = (i // G).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    at = (group * num_splits + s) * G + i % G
    lse = tl.load(lse_ptr + at, mask=s < num_splits, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=(s < num_splits)[:, None], other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + i.to(tl.int64) * D + d, out.to(out_ptr.dtype.element_ty))


def refusal(q_RHD: Tensor, num_kv_heads: int) -> str | None:
    """Why the kernels cannot take these queries, or None."""
    if q_RHD.shape[1] > ROWS * num_kv_heads:
        return f"takes up to {ROWS} query heads per key head, not {q_RHD.shape[1] // num_kv_heads}"
    if q_RHD.device.type != "cuda":
        return f"runs on CUDA, not on {q_RHD.device.type}"
    if q_RHD.dtype not in _DTYPES or q_RHD.shape[-1] not in _HEAD_DIMS:
        return f"takes bfloat16 and float16 with head_dim 64 or 128, not {q_RHD.dtype} with {q_RHD.shape[-1]}"
    if common.INTERPRETED or torch.cuda.get_device_capability(q_RHD.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher, and compiled kernels"
    return None


def attend(
    q_RHD: Tensor,
    k_RLHD: Tensor,
    v_RLHD: Tensor,
    last_R: Tensor,
    *,
    softmax_scale: float | None = None,
    tile: Split = TILE,
) -> Tensor:
    """Attention of one query per row to the row's keys 0 .. last, [R, H, D] in q's dtype. Inference only.

    Args:
        q_RHD: [R, H, D]; G = H / Hkv at most 16.
        k_RLHD, v_RLHD: [R, L, Hkv, D], of which only rows may be strided (a view of some rows of a cache).
        last_R: int64 [R], on the device: the position of each row's query, 0 <= last < L.
        softmax_scale: None: 1 / sqrt(D).

    Raises:
        ValueError: more than 16 query heads per key head.
    """
    R, H, D = q_RHD.shape
    L, Hkv = k_RLHD.shape[1:3]
    G = H // Hkv
    if G > ROWS:
        raise ValueError(f"{G} query heads per key head: at most {ROWS}")
    device = q_RHD.device
    splits = num_splits(R * Hkv, L, multiprocessors(device), tile)
    part = torch.empty((R, Hkv, splits, G, D), dtype=torch.float32, device=device)
    lse = torch.empty((R, Hkv, splits, G), dtype=torch.float32, device=device)
    out = torch.empty((R, H, D), dtype=q_RHD.dtype, device=device)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    _split_kernel[(Hkv, splits, R)](
        q_RHD.contiguous(),
        k_RLHD,
        v_RLHD,
        last_R,
        part,
        lse,
        scale * common.LOG2E,
        k_RLHD.stride(0),
        Hkv,
        splits,
        G=G,
        ROWS=ROWS,
        KEYS=tile.keys,
        D=D,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return merge(part, lse, out)


def merge(part: Tensor, lse: Tensor, out_RHD: Tensor) -> Tensor:
    """Fills `out_RHD` from fp32 partial results [R, H / G, N, G, D] and their lse [R, H / G, N, G], base 2, in a
    fixed order; -inf stands for no key."""
    splits, group = part.shape[2:4]
    rows, heads, dim = out_RHD.shape
    padded = common.next_power_of_two(splits)
    _merge_kernel[(rows * heads,)](part, lse, out_RHD, splits, G=group, SPLITS=padded, D=dim, num_warps=4)
    return out_RHD


def num_splits(groups: int, capacity: int, multiprocessors: int, tile: Split) -> int:
    """Runs per row and key head: enough to fill the GPU, of at least four steps each, at most 128."""
    wanted = common.ceil_div(tile.programs * multiprocessors, groups)
    return max(1, min(wanted, common.ceil_div(capacity, 4 * tile.keys), 128))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
