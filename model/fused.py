"""The small pieces around attention - norm, RoPE, SwiGLU - plain, as Liger's Triton kernels, or by torch.compile.

Each is bound by memory traffic: plain PyTorch reads and writes the activations several times, a fused kernel once.
Which set runs is chosen once, by name; a set that cannot run here is refused.

Shape legend: T tokens, H heads, D head_dim; `...` any leading dimensions.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from model.rope import apply_rope

SETS = ("none", "liger", "compile")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 inside whatever the dtype."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more (x itself without `more`), and its norm."""
    total = x if more is None else x + more
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def silu_mul_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `silu_mul` by gate and up, in fp32 inside; may overwrite gate and up."""
    wide, sigmoid = gate.float(), torch.sigmoid(gate.float())
    d_gate = grad.float() * up * (sigmoid * (1 + wide * (1 - sigmoid)))
    return d_gate.to(gate.dtype), (grad * (wide * sigmoid)).to(up.dtype)


def rope(q_THD: Tensor, k_THD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated by the tables [T, D / 2] of their tokens; may overwrite them."""
    return apply_rope(q_THD, cos, sin), apply_rope(k_THD, cos, sin)


def split_rope(
    joint: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A joint projection [..., (H + 2 Hkv) D] to q [T, H, D], k and v [T, Hkv, D], q and k rotated."""
    q, k, v = joint.view(cos.shape[0], heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    return *rope(q, k, cos, sin), v.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Pieces:
    """One implementation of each; signatures and meaning as the functions above.

    `joint`: q, k, v come as one projection where their weights lie side by side.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    silu_mul: Callable[[Tensor, Tensor], Tensor] = silu_mul
    silu_mul_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = silu_mul_gradients
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope
    split_rope: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]] = split_rope
    joint: bool = False


PLAIN = Pieces()


def pieces(name: str, device: torch.device) -> Pieces:
    """The set called `name`, for a model on `device`.

    Raises:
        UserError: unknown, or something it needs is missing here.
    """
    if name == "none":
        return PLAIN
    if name == "liger":
        return _liger(device)
    if name == "compile":
        return _compiled(device)
    raise UserError(f"engine.fused={name} is not known: use {', '.join(SETS)}")


def _liger(device: torch.device) -> Pieces:
    if device.type != "cuda":
        raise UserError(f"engine.fused=liger runs on CUDA, not on {device.type}: use engine.fused=none")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("engine.fused=liger needs the package liger-kernel: install it, or use engine.fused=none")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction, swiglu_backward

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # "gemma": all of it in fp32, as F.rms_norm; offset 0 makes it the same formula.
        out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma")
        return out

    def added(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if more is None:
            return x, norm(x, weight, eps)
        out, total = LigerFusedAddRMSNormFunction.apply(x, more, weight, eps, 0.0, "gemma", False)
        return total, out

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return out

    def swiglu_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        d_gate, d_up = swiglu_backward(gate, up, grad.contiguous())
        return d_gate, d_up

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Liger takes [1, H, T, D] views of [1, T, H, D], and tables whose left half it reads.
        tables = (torch.cat([table, table], -1)[None] for table in (cos, sin))
        q, k = LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), *tables)
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return Pieces(norm, added, swiglu, swiglu_gradients, rotate)


def _compiled(device: torch.device) -> Pieces:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("engine.fused=compile needs the package triton on a GPU: use engine.fused=none")
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("engine.fused=compile needs a C++ compiler (g++) on the CPU: use engine.fused=none")

    def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_one(q, cos, sin), rotate_one(k, cos, sin)

    def split_and_rotate(
        joint: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = joint.view(cos.shape[0], heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
        return *rotate_both(q, k, cos, sin), v.clone(memory_format=torch.contiguous_format)

    return Pieces(
        torch.compile(rms_norm),
        torch.compile(add_norm),
        torch.compile(silu_mul),
        torch.compile(silu_mul_gradients),
        torch.compile(rotate_both),
        torch.compile(split_and_rotate),
        joint=True,
    )
