"""Output head and summed loss in one pass over tiles of tokens: no logit is computed twice.

While a tile's logits are there, they give its losses and, overwritten in place, their gradient, from which the
gradients of hidden states and head follow at once: three matrix products a token instead of four, and nothing as
wide as the vocabulary outlives a tile. Backward only multiplies by the gradient of the sum. (The idea is Liger
Kernel's, arXiv:2410.10989, section 3.2; the tiles here are larger, and the head's gradient adds up in fp32.)

Shape legend: T tokens, N tokens of a tile, C hidden_size, V vocab_size.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from model.products import add_product, gradient_sum

# Bytes of one tile of logits, in their own dtype. One is alive at a time. The products need some 4,000 tokens to
# run at full speed, and each tile reads and writes the head's whole fp32 gradient once. (8K tokens of a vocabulary
# of 128K: 21.3 ms in two tiles, 20.9 in one.)
TILE_BYTES = 2**31
LOSSES = ("auto", "fused", "tiled")


def takes_fused(name: str, device: torch.device) -> bool:
    """Whether `engine.loss=name` means this one on `device`: `auto` does on a GPU.

    Raises:
        UserError: unknown, or it needs what is missing here.
    """
    if name not in LOSSES:
        raise UserError(f"engine.loss={name} is not known: use {', '.join(LOSSES)}")
    fused = name == "fused" or (name == "auto" and device.type == "cuda")
    if fused and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("the fused loss needs the package triton on a GPU: install it, or use engine.loss=tiled")
    return fused


def tile_tokens(vocab_size: int, itemsize: int, tokens: int) -> int:
    """Tokens of a tile: as many as TILE_BYTES hold, in equal parts of whole groups of 128."""
    most = max(1, TILE_BYTES // (vocab_size * itemsize))
    if most >= tokens:
        return max(1, tokens)
    count = -(-tokens // most)
    each = -(-tokens // count)
    return min(-(-each // 128) * 128, most)


def fused_cross_entropy(
    hidden: Tensor, weight_VC: Tensor, labels: Tensor, weights: Tensor | None = None, tile: int = 0
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropy over tokens, and the losses themselves; softmax in fp32.

    Args:
        hidden: [..., C] in the dtype of the head.
        weight_VC: output head.
        labels: int64 [...], IGNORE_INDEX where no loss is taken.
        weights: fp32 [...], of each token in the sum; None: all 1.
        tile: tokens at a time; 0: `tile_tokens`.

    Returns:
        fp32 [], the only one with a gradient, which may be asked for once; and fp32 [...], 0 where ignored, not
        weighted.
    """
    tile = tile or tile_tokens(weight_VC.shape[0], weight_VC.element_size(), labels.numel())
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight_VC)]
    loss_sum, losses_T = _FusedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight_VC,
        labels.reshape(-1),
        None if weights is None else weights.reshape(-1),
        tile,
        needed,
    )
    return loss_sum, losses_T.view(labels.shape)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        labels_T: Tensor,
        weights_T: Tensor | None,
        tile: int,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor]:
        hidden_TC, labels_T = hidden_TC.contiguous(), labels_T.contiguous()
        weights_T = None if weights_T is None else weights_T.float().contiguous()
        losses_T = torch.empty(labels_T.shape, dtype=torch.float32, device=hidden_TC.device)
        logits_NV = hidden_TC.new_empty(min(tile, labels_T.numel()), weight_VC.shape[0])
        grad_hidden = torch.empty_like(hidden_TC) if needed[0] else None
        grad_weight: Tensor | None = None
        for start in range(0, labels_T.numel(), tile):
            rows = slice(start, start + tile)
            hidden = hidden_TC[rows]
            logits = torch.mm(hidden, weight_VC.t(), out=logits_NV[: hidden.shape[0]])
            scales = None if weights_T is None else weights_T[rows]
            _softmax_tile(logits, labels_T[rows], scales, losses_T[rows], any(needed))  # logits are gradients now
            if grad_hidden is not None:
                torch.mm(logits, weight_VC, out=grad_hidden[rows])
            if needed[1]:
                grad_weight = add_product(grad_weight, logits, hidden)
        # As attributes, so that backward can let go of them; `saved_tensors` would keep them for its whole call.
        ctx.grads, ctx.dtype, ctx.into = (grad_hidden, grad_weight), weight_VC.dtype, gradient_sum(weight_VC)
        ctx.mark_non_differentiable(losses_T)
        return (losses_T if weights_T is None else losses_T * weights_T).sum(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad_losses: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the fused loss gives its gradients once: use engine.loss=tiled to ask again")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        scale = grad_sum.float().reshape(1)  # with a dimension: a scalar would be rounded to bf16 first
        if grad_hidden is not None:
            torch.mul(grad_hidden, scale, out=grad_hidden)
        if grad_weight is not None and ctx.into is not None:
            if ctx.into.begin():
                _scale_into(ctx.into.total, grad_weight, scale)
            else:
                ctx.into.total.addcmul_(grad_weight, scale)
            grad_weight = None
        elif grad_weight is not None:
            out = grad_weight if ctx.dtype == grad_weight.dtype else torch.empty_like(grad_weight, dtype=ctx.dtype)
            grad_weight = torch.mul(grad_weight, scale, out=out)
        return grad_hidden, grad_weight, None, None, None, None


def _scale_into(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out = x * scale, contiguous both; for a factor on the device PyTorch reaches 2/3 of the bandwidth."""
    if x.is_cuda:
        from model.triton_loss import scale_into

        scale_into(out, x, scale)
    else:
        torch.mul(x, scale, out=out)


def _softmax_tile(logits: Tensor, labels: Tensor, weights: Tensor | None, losses: Tensor, gradient: bool) -> None:
    """Arguments as `model.triton_loss.softmax_tile`, which runs on a GPU; elsewhere the same in PyTorch."""
    if logits.is_cuda:
        from model.triton_loss import softmax_tile

        softmax_tile(logits, labels, weights, losses, gradient=gradient)
        return
    valid = labels != IGNORE_INDEX
    target = torch.where(valid, labels, 0)[:, None]
    wide = logits.float()
    lse = torch.logsumexp(wide, dim=-1)
    losses.copy_(torch.where(valid, lse - wide.gather(1, target)[:, 0], 0.0))
    if not gradient:
        return
    softmax = (wide - lse[:, None]).exp_()
    softmax.scatter_(1, target, softmax.gather(1, target) - 1.0)
    scale = valid.float() if weights is None else torch.where(valid, weights, 0.0)
    logits.copy_(softmax.mul_(scale[:, None]))
