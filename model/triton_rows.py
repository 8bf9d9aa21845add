# mypy: disable-error-code="no-untyped-def"
"""RoPE and SwiGLU in Triton. Each reads its inputs once and writes its results once; all arithmetic is fp32.

Shape legend: T tokens, H query heads, Hkv kv heads, D head_dim, N elements.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of a program of RoPE, one head wide
BLOCK, WARPS = 2048, 4  # elements of a program of SwiGLU


@triton.jit
def _turn(x_ptr, out_ptr, x_row, out_row, cos, sin, tokens, mask, HALF: tl.constexpr, PAIR: tl.constexpr):
    """Rotate one head of some tokens; cos = 1 and sin = 0 copy it."""
    columns = tl.arange(0, PAIR)[None, :]
    source = x_ptr + tokens[:, None] * x_row + columns
    target = out_ptr + tokens[:, None] * out_row + columns
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, q_out, k_out, v_out, cos_ptr, sin_ptr,
    T, q_row, k_row, v_row, q_out_row, k_out_row, v_out_row, q_head, k_head, v_head, q_out_head, k_out_head,
    v_out_head, H, Hkv, HALF: tl.constexpr, PAIR: tl.constexpr, BACK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, PAIR)[None, :]
    mask = (tokens[:, None] < T) & (columns < HALF)
    head = tl.program_id(1)
    if head < H + Hkv:
        cos = tl.load(cos_ptr + tokens[:, None] * HALF + columns, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + tokens[:, None] * HALF + columns, mask=mask, other=0.0)
        if BACK:
            sin = -sin
        if head < H:
            _turn(q_ptr + head * q_head, q_out + head * q_out_head, q_row, q_out_row, cos, sin, tokens, mask, HALF,
                  PAIR)  # fmt: skip
        else:
            own = head - H
            _turn(k_ptr + own * k_head, k_out + own * k_out_head, k_row, k_out_row, cos, sin, tokens, mask, HALF,
                  PAIR)  # fmt: skip
    else:
        own = head - H - Hkv
        _turn(v_ptr + own * v_head, v_out + own * v_out_head, v_row, v_out_row, 1.0, 0.0, tokens, mask, HALF, PAIR)


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(gate_ptr, up_ptr, grad_ptr, d_gate_ptr, d_up_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    tl.store(d_gate_ptr + i, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + i, (grad * gate * sigmoid).to(d_up_ptr.dtype.element_ty), mask=mask)


class SplitRotate(torch.autograd.Function):
    """A joint projection [..., (H + 2 Hkv) D] to q [T, H, D], rotated, and k, rotated, and v [T, Hkv, D]."""

    @staticmethod
    def forward(
        ctx: Any, joint: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.shape = (heads, kv_heads), joint.shape
        parts = _parts(joint.contiguous(), cos.shape[0], heads, kv_heads)
        outs = tuple(torch.empty(part.shape, dtype=joint.dtype, device=joint.device) for part in parts)
        _rotate(parts, outs, cos, sin, back=False)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        joint = torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device)
        _rotate(grads, _parts(joint, cos.shape[0], *ctx.heads), cos, sin, back=True)
        return joint, None, None, None, None


class Rotate(torch.autograd.Function):
    """q [T, H, D] and k [T, Hkv, D], rotated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return Rotate._both((q, k), cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *Rotate._both(grads, cos, sin, back=True), None, None

    @staticmethod
    def _both(tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, ...]:
        outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
        _rotate(tensors, outs, cos, sin, back)
        return outs


class Swiglu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        size = out.numel()
        with _on(gate):
            _swiglu_kernel[(triton.cdiv(size, BLOCK),)](gate, up, out, size, BLOCK=BLOCK, num_warps=WARPS)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_gradients(gate, up, grad, in_place=False)


def swiglu_gradients(gate: Tensor, up: Tensor, grad: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up by gate and up, contiguous both; `in_place`: written over them."""
    outs = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    size = grad.numel()
    with _on(gate):
        _swiglu_backward_kernel[(triton.cdiv(size, BLOCK),)](
            gate, up, grad.contiguous(), *outs, size, BLOCK=BLOCK, num_warps=WARPS
        )
    return outs


def _parts(joint: Tensor, tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views of q, k and v in a joint projection."""
    each = joint.view(tokens, heads + 2 * kv_heads, -1)
    return each[:, :heads], each[:, heads : heads + kv_heads], each[:, heads + kv_heads :]


def _rotate(ins: tuple[Tensor, ...], outs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, back: bool) -> None:
    """q, k and, if it is there, v, which is only copied."""
    ins = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in ins)
    if len(ins) == 2:
        ins, outs = (*ins, ins[1][:, :0]), (*outs, outs[1][:, :0])
    heads, half = [x.shape[1] for x in ins], ins[0].shape[2] // 2
    tokens = ins[0].shape[0]
    with _on(cos):
        _rope_kernel[(triton.cdiv(tokens, TOKENS), sum(heads))](
            *ins, *outs, cos, sin, tokens, *(x.stride(0) for x in (*ins, *outs)),
            *(x.stride(1) for x in (*ins, *outs)), heads[0], heads[1], HALF=half,
            PAIR=triton.next_power_of_2(half), BACK=back, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
