# mypy: disable-error-code="no-untyped-def"
"""RMSNorm of a residual stream in Triton: with the sum before it, and in backward with the sum of both gradients.

A row stays in registers between the sum and the norm, so that a pass over the stream reads and writes it once;
all arithmetic is fp32, but the sum is rounded to the stream's dtype before it is normalised, as it is kept.

Shape legend: T tokens, C hidden_size, P programs of the backward kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # of backward: four to each of an H200's processors, and as many partial sums over tokens
MAX_WIDTH = 16_384  # a row has to fit into the registers of one program


@triton.jit
def _forward_kernel(
    x_ptr, add_ptr, weight_ptr, sum_ptr, out_ptr, rstd_ptr, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    x = tl.load(x_ptr + row * C + columns, mask=mask, other=0.0)
    if ADD:
        more = tl.load(add_ptr + row * C + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + columns, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + columns, (wide * rstd * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_ptr,
    through_ptr,
    dx_ptr,
    partial_ptr,
    T,
    C,
    THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for turn in range(0, (T - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)):
        token = first + turn * tl.num_programs(0)
        row = token * C
        x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token)
        normed = x * rstd
        total += grad * normed
        scaled = grad * weight
        dx = rstd * (scaled - normed * (tl.sum(scaled * normed, 0) / C))
        if THROUGH:
            dx += tl.load(through_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * C + columns, total, mask=mask)


class AddNorm(torch.autograd.Function):
    """(x + add, norm of it) for x [..., C]; without `add`, (x, its norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        add = None if add is None else add.contiguous()
        C = x.shape[-1]
        if C > MAX_WIDTH:
            raise ValueError(f"rows of {C} do not fit into one program: {MAX_WIDTH} at most")
        total = x if add is None else torch.empty_like(x)
        out = torch.empty_like(x)
        rstd_T = torch.empty(x.numel() // C, dtype=torch.float32, device=x.device)
        with _on(x):
            _forward_kernel[(rstd_T.numel(),)](
                x, add, weight_C, total, out, rstd_T, C, eps, ADD=add is not None, **_block(C)
            )
        ctx.save_for_backward(total, weight_C, rstd_T)
        ctx.added = add is not None
        ctx.set_materialize_grads(False)
        return (x.view_as(x) if add is None else total), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, through: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return through, through if ctx.added else None, None, None
        x, weight_C, rstd_T = ctx.saved_tensors
        grad = grad.contiguous()
        through = None if through is None else through.contiguous()
        C, T = x.shape[-1], rstd_T.numel()
        dx = torch.empty_like(x)
        programs = min(PROGRAMS, T)
        partial_PC = torch.empty(programs, C, dtype=torch.float32, device=x.device)
        with _on(x):
            _backward_kernel[(programs,)](
                x, weight_C, rstd_T, grad, through, dx, partial_PC, T, C, THROUGH=through is not None, **_block(C)
            )
        return dx, dx if ctx.added else None, partial_PC.sum(0).to(weight_C.dtype), None


def _block(C: int) -> dict[str, int]:
    block = triton.next_power_of_2(C)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
