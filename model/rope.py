"""Rotary position embedding and its length extensions.

Inverse frequencies are computed with the operations, order and precision (fp32) of transformers, so that
they are equal to its tables bit by bit. Angles are not: transformers multiplies position and frequency in
fp32, which is wrong by up to 0.03 rad at a million tokens. Here the product and the cosine are taken in
float64, where it is exact, and rounded to fp32 once.

Sources: RoFormer (arXiv 2104.09864); position interpolation (2306.15595); YaRN and the NTK-aware rule
(2309.00071, sections 3.1 to 3.4); Llama 3.1 (2407.21783 and its released code).

Shape legend: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import RopeConfig

KINDS = ("default", "linear", "ntk", "llama3", "yarn")
_CHUNK = 65_536  # positions per step: bounds the float64 workspace at 32 MiB per tensor for D = 128


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """Theta after the NTK-aware rule: the longest wavelength grows by `factor`, the shortest stays."""
    return float(theta * factor ** (head_dim / (head_dim - 2)))


def rope_parameters(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies, fp32 [head_dim / 2] on the CPU, and the factor on cos and sin (1 but for yarn).

    Raises:
        UserError: unknown kind, or a field the kind needs is missing.
    """
    check_rope(rope)
    theta = ntk_theta(rope.theta, rope.factor, head_dim) if rope.kind == "ntk" else rope.theta
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (theta**exponent)
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(theta**exponent, rope, head_dim), yarn_attention_factor(rope)
    return inv_freq, 1.0


def check_rope(rope: RopeConfig) -> None:
    """Refuse an impossible RoPE config, naming the key."""
    if rope.kind not in KINDS:
        raise UserError(f"rope.kind={rope.kind} is not known: use one of {', '.join(KINDS)}")
    if rope.theta <= 1:
        raise UserError(f"rope.theta={rope.theta} must be above 1")
    if rope.factor < 1:
        raise UserError(f"rope.factor={rope.factor} must be at least 1 (new length / old length)")
    if rope.kind == "default" and rope.factor != 1:
        raise UserError(f"rope.factor={rope.factor} has no effect with rope.kind=default: use linear, ntk or yarn")
    if rope.kind in ("llama3", "yarn") and rope.original_seq_len < 1:
        raise UserError(f"rope.kind={rope.kind} needs rope.original_seq_len, the length before scaling")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise UserError("rope.low_freq_factor must be below rope.high_freq_factor")


def yarn_attention_factor(rope: RopeConfig) -> float:
    """Factor on cos and sin: the configured one, or YaRN's 0.1 ln(factor) + 1 (equation 22)."""
    if rope.attention_factor:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = rope.original_seq_len / rope.low_freq_factor, rope.original_seq_len / rope.high_freq_factor
    scaled = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    smooth = (rope.original_seq_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dim_of(rotations: float) -> float:
        # The dimension that turns `rotations` times over the original length.
        turns = math.log(rope.original_seq_len / (rotations * 2 * math.pi))
        return (head_dim * turns) / (2 * math.log(rope.theta))

    low = max(math.floor(dim_of(rope.beta_fast)), 0)
    high: float = min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
    if low == high:
        high += 0.001  # as upstream: no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep


class Rotary:
    """Cosine and sine tables of one RoPE config.

    Not a module, and no buffer: a cast of the model to bf16 (DeepSpeed does one) must not reach the
    frequencies, and a model on the meta device still has them.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        inv_freq, self.attention_scale = rope_parameters(rope, head_dim)
        self._inv_freq = {torch.device("cpu"): inv_freq.double()}

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T, D / 2], for int64 positions [T] on any device."""
        device = positions_T.device
        if device not in self._inv_freq:
            self._inv_freq[device] = self._inv_freq[torch.device("cpu")].to(device)
        inv_freq = self._inv_freq[device]
        shape = (positions_T.numel(), inv_freq.numel())
        cos = torch.empty(shape, dtype=torch.float32, device=device)
        sin = torch.empty_like(cos)
        for start in range(0, shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            angle = positions_T[rows].double()[:, None] * inv_freq
            cos[rows] = angle.cos() * self.attention_scale
            sin[rows] = angle.sin() * self.attention_scale
        return cos, sin


def apply_rope(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, H, D] by the tables of its T positions, in fp32, and return its own dtype.

    Llama's layout: component i is paired with component i + D / 2.
    """
    return _Rotate.apply(x_THD, cos, sin)


class _Rotate(torch.autograd.Function):
    """Saves nothing but the tables, which all layers share; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out
