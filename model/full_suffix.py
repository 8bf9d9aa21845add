"""Exact causal attention of the last tokens of a row over all its keys, on cuDNN's kernels. Inference only.

They align a causal mask to the first key. The last M queries of N keys are therefore two calls: all see
the first N - M keys, and the rest is an ordinary causal square. The two parts are merged by their log-sum-exp.

Shape legend: M queries, N keys, H query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import flash

MIN_QUERIES = 1024  # below this flash-attention, which aligns its mask to the last key, is as fast in one call


def refusal(q_MHD: Tensor) -> str | None:
    """Why these queries cannot be taken, or None."""
    if flash.find(q_MHD) is None:
        return "needs half precision on a GPU"
    if not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(q_MHD.device)[0] < 9:
        return "needs cuDNN and a GPU of compute capability 9.0 or higher"
    if q_MHD.shape[-1] > 128:
        return f"takes a head_dim up to 128, not {q_MHD.shape[-1]}"
    return None


@torch.no_grad()
def attend_row(q_MHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, softmax_scale: float) -> Tensor:
    """[M, H, D] in q's dtype; query i sees the keys up to N - M + i, 1 <= M <= N.

    Args:
        q_MHD: [M, H, D]; k_NHD, v_NHD: [N, Hkv, D], same dtype.
    """
    past = k_NHD.shape[0] - q_MHD.shape[0]
    out, lse = _piece(q_MHD, k_NHD[past:], v_NHD[past:], True, softmax_scale)
    if past == 0:
        return out
    before, before_lse = _piece(q_MHD, k_NHD[:past], v_NHD[:past], False, softmax_scale)
    weight = torch.sigmoid(before_lse - lse)[..., None]  # exp(b) / (exp(a) + exp(b)), without overflow
    return torch.lerp(out.to(weight.dtype), before.to(weight.dtype), weight).to(out.dtype)


def _piece(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out [M, H, D] and fp32 lse [M, H], natural logarithm."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], -1).transpose(0, 1)
