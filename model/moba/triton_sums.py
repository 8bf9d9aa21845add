# mypy: disable-error-code="no-untyped-def"
"""Row sums of the backward pass: lse2 and delta = do . out, by row, by run of tokens and in list order.

Every part of the softmax is differentiated with the final output and log-sum-exp (FlashAttention-2, Dao 2023,
section 3.2): p = exp2(score * scale_log2 - lse2), ds = p * (do . v - delta).

Shape legend: triton_common.py. Tp = T rounded up so that a head's row of lse_HT starts 16-byte aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common
from model.moba.triton_lists import Lists

_DELTA_ROWS = 64
_COPY_PIECE = 1024


@triton.jit(do_not_specialize=["num_tokens", "padded_tokens", "H"])
def _delta_kernel(
    out_ptr, dout_ptr, lse_ptr, delta_ptr, both_ptr, lse_t_ptr, delta_t_ptr, num_tokens, padded_tokens, H,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Program = (ROWS tokens, query head). Tokens T .. Tp - 1 of the transposed outputs get zeros."""
    head = tl.program_id(0) % H
    token = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    live = token < num_tokens
    row = token.to(tl.int64) * H + head
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    out = tl.load(out_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=live)
    tl.store(both_ptr + row[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(lse, delta), mask=live[:, None])
    turned = head.to(tl.int64) * padded_tokens + token
    tl.store(lse_t_ptr + turned, lse)
    tl.store(delta_t_ptr + turned, delta)


@triton.jit(do_not_specialize=["entries", "num_rows"])
def _list_kernel(
    row_ptr, both_ptr, list_lse_ptr, list_delta_ptr, entries, num_rows, PIECE: tl.constexpr
):  # fmt: skip
    """lse and delta in list order. Gaps between lists hold arbitrary row ids and get those of some row."""
    i = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    live = i < entries
    row = tl.load(row_ptr + i, mask=live, other=0)
    row = tl.where((row >= 0) & (row < num_rows), row, 0)
    at = row.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(both_ptr + at, mask=live[:, None], other=0.0))
    tl.store(list_lse_ptr + i, lse, mask=live)
    tl.store(list_delta_ptr + i, delta, mask=live)


class RowSums:
    """lse2 and delta = do . out of every row, fp32: [T, H] for gathers, the two side by side for gathers of both,
    [H, Tp] for runs of tokens.
    """

    def __init__(self, out_THD: Tensor, dout_THD: Tensor, lse_TH: Tensor):
        T, H, D = out_THD.shape
        padded = common.ceil_div(T, _DELTA_ROWS) * _DELTA_ROWS
        self.lse_TH = lse_TH
        self.delta_TH = torch.empty_like(lse_TH)
        self.both_TH2 = torch.empty((T, H, 2), dtype=torch.float32, device=lse_TH.device)
        self.lse_HT = torch.empty((H, padded), dtype=torch.float32, device=lse_TH.device)
        self.delta_HT = torch.empty((H, padded), dtype=torch.float32, device=lse_TH.device)
        _delta_kernel[(padded // _DELTA_ROWS * H,)](
            out_THD,
            dout_THD,
            lse_TH,
            self.delta_TH,
            self.both_TH2,
            self.lse_HT,
            self.delta_HT,
            T,
            padded,
            H,
            ROWS=_DELTA_ROWS,
            D=D,
            num_warps=4,
        )


def fill_list_sums(lists: Lists, sums: RowSums, list_lse: Tensor, list_delta: Tensor) -> None:
    """lse and delta of every list entry, where no dq kernel has written them."""
    _list_kernel[(common.ceil_div(list_lse.numel(), _COPY_PIECE),)](
        lists.row,
        sums.both_TH2,
        list_lse,
        list_delta,
        list_lse.numel(),
        sums.lse_TH.numel(),
        PIECE=_COPY_PIECE,
        num_warps=4,
    )
