# mypy: disable-error-code="no-untyped-def"
"""Softmax, loss and their gradient over a tile of logits, in place: one Triton program per token.

A row of logits is read twice, from device memory or L2, and overwritten once by its gradient; all arithmetic is
fp32.

Shape legend: N tokens of a tile, V vocab_size.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from conf.constants import IGNORE_INDEX

BLOCK, WARPS = 16_384, 16  # logits of a row at a time


@triton.jit
def _softmax_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    losses_ptr,
    vocab,
    IGNORE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * vocab
    label = tl.load(labels_ptr + token)
    columns = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(losses_ptr + token, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                zeros = tl.zeros([BLOCK], tl.float32).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + columns, zeros, mask=start + columns < vocab)
        return
    picked = tl.load(row_ptr + label).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(row_ptr + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    lse = largest + tl.log(total)
    tl.store(losses_ptr + token, lse - picked)
    if GRADIENT:
        scale = 1.0
        if WEIGHTED:
            scale = tl.load(weights_ptr + token)
        tl.debug_barrier()  # every thread has read the label's logit by now
        for start in range(0, vocab, BLOCK):
            mask = start + columns < vocab
            x = tl.load(row_ptr + start + columns, mask=mask, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(x - lse) - tl.where(start + columns == label, 1.0, 0.0)) * scale
            tl.store(row_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def softmax_tile(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, losses_N: Tensor, *, gradient: bool
) -> None:
    """Write the losses, and with `gradient` the weighted gradient of their sum over the logits.

    Args:
        logits_NV: contiguous.
        labels_N: int64, contiguous, IGNORE_INDEX where no loss is taken: loss and gradient are 0 there.
        weights_N: fp32, contiguous, of each token in the sum; None: all 1. The losses are not weighted.
        losses_N: fp32, contiguous, written.
    """
    tokens, vocab = logits_NV.shape
    with torch.cuda.device(logits_NV.device) if logits_NV.is_cuda else nullcontext():
        _softmax_kernel[(tokens,)](
            logits_NV,
            labels_N,
            weights_N,
            losses_N,
            vocab,
            IGNORE=IGNORE_INDEX,
            WEIGHTED=weights_N is not None,
            GRADIENT=gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
        )


@triton.jit
def _scale_kernel(out_ptr, x_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, x * tl.load(scale_ptr), mask=i < size)


def scale_into(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out = x * scale, fp32 all, contiguous; `scale` has one element."""
    size = x.numel()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _scale_kernel[(triton.cdiv(size, 2048),)](out, x, scale, size, BLOCK=2048, num_warps=4)
