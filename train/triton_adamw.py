# mypy: disable-error-code="no-untyped-def"
"""One pass of AdamW over a flat partition: clipping, update and the model's own copy of the weights together.

Per parameter it reads gradient, weight and both moments and writes the last three and the copy: 30 bytes in bf16.
PyTorch's fused AdamW writes the clipped gradient back and leaves the copy to a pass of its own: 38. The arithmetic
is that of PyTorch's (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in fp32.

Shape legend: N parameters of the partition.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit(do_not_specialize=["lr", "limit"])
def _adamw_kernel(
    master_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    copy_ptr,
    norm_ptr,
    correction_ptr,
    N,
    lr,
    beta1,
    beta2,
    eps,
    decay,
    limit,
    BLOCK: tl.constexpr,
):
    norm = tl.load(norm_ptr)
    if norm < float("inf"):  # false for NaN too
        factor = 1.0
        if limit > 0.0:
            factor = tl.minimum(limit / (norm + 1e-6), 1.0)
        mean_correction = tl.load(correction_ptr)
        root_correction = tl.load(correction_ptr + 1)
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < N
        weight = tl.load(master_ptr + i, mask=mask)
        grad = tl.load(grad_ptr + i, mask=mask) * factor
        mean = tl.load(mean_ptr + i, mask=mask)
        square = tl.load(square_ptr + i, mask=mask)
        weight -= lr * decay * weight
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        weight -= lr / mean_correction * mean / (tl.sqrt(square) / root_correction + eps)
        tl.store(mean_ptr + i, mean, mask=mask)
        tl.store(square_ptr + i, square, mask=mask)
        tl.store(master_ptr + i, weight, mask=mask)
        tl.store(copy_ptr + i, weight.to(copy_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
def adamw(
    master_N: Tensor,
    grad_N: Tensor,
    mean_N: Tensor,
    square_N: Tensor,
    copy_N: Tensor,
    step: Tensor,
    norm: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    limit: float,
) -> None:
    """One step in place; nothing changes, the step count neither, where `norm` is not finite.

    Args:
        master_N, grad_N, mean_N, square_N: fp32, contiguous; weights, gradient, exponential averages of it and of
            its square.
        copy_N: written: the weights rounded to its dtype.
        step: fp32 [], steps taken so far; counted up.
        norm: fp32 [], of all gradients of the model.
        limit: gradients are scaled down to this norm; 0: they are not.
    """
    step += norm.isfinite()
    wide = step.double()
    correction = torch.stack([1 - torch.pow(betas[0], wide), (1 - torch.pow(betas[1], wide)).sqrt()])
    size = master_N.numel()
    with torch.cuda.device(master_N.device) if master_N.is_cuda else nullcontext():
        _adamw_kernel[(triton.cdiv(size, BLOCK),)](
            master_N, grad_N, mean_N, square_N, copy_N, norm, correction.float(), size, lr, *betas, eps,
            weight_decay, limit, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
