"""Output head and loss. Full logits are never materialised in training.

The head and the loss are one module that owns the head's weight: under ZeRO-3 its hooks gather the weight
for its forward and again for its backward, which recomputes the logits tile by tile.

Shape legend: R rows, S seq_len, T = R * S tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.constants import IGNORE_INDEX
from model.fused_loss import fused_cross_entropy
from model.products import add_product

# Bytes of one tile of fp32 logits. Two or three tiles are alive at the peak, whatever T and V are.
TILE_BYTES = 256 * 2**20


class LossSums(NamedTuple):
    """Sums over one micro-batch; the caller divides by global counts. Scalars on the model's device.

    Attributes:
        loss_sum: fp32, cross-entropy in nats over all tokens with a label, each times its weight if there are
            weights. The only one with a gradient.
        num_valid: int64, those tokens.
        trailing_sum: fp32, the part from the last tokens of full-length documents; 0 if none was asked for.
        trailing_valid: int64, its tokens.
        weight_sum: what the mean divides `loss_sum` by: fp32, the sum of the weights; `num_valid` without weights.
    """

    loss_sum: Tensor
    num_valid: Tensor
    trailing_sum: Tensor
    trailing_valid: Tensor
    weight_sum: Tensor


class LMHead(nn.Module):
    """Vocabulary projection without bias. With labels it returns losses and keeps no logits.

    `fused`: by `model.fused_loss`, but for the gradient of single losses.
    """

    def __init__(self, hidden_size: int, vocab_size: int, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        summed: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V] of hidden [..., C]; or, given labels [...], losses fp32 [...], 0 where ignored.

        With `summed`, the sum of the losses, each times its weight if there are weights, fp32 [], and the losses.
        A fused head gives only the sum a gradient.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        if self.fused and (summed or not torch.is_grad_enabled()):
            total, losses = fused_cross_entropy(hidden, self.weight, labels, weights)
        else:
            losses = tiled_cross_entropy(hidden, self.weight, labels)
            total = _weighted_sum(losses, weights)
        return (total, losses) if summed else losses


def tiled_cross_entropy(hidden: Tensor, weight_VC: Tensor, labels: Tensor, tile_bytes: int = TILE_BYTES) -> Tensor:
    """Cross-entropy per token, softmax in fp32, logits recomputed in backward.

    Gradients are right under any later scaling of the result, token by token.

    Args:
        hidden: [..., C] in the dtype of the weight.
        weight_VC: output head.
        labels: int64 [...], IGNORE_INDEX where no loss is taken.
        tile_bytes: budget of one fp32 tile of logits; at least one token is taken.

    Returns:
        fp32 [...], 0 where ignored.
    """
    tile = max(1, tile_bytes // (4 * weight_VC.shape[0]))
    losses_T = _TiledCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight_VC, labels.reshape(-1), tile)
    return losses_T.view(labels.shape)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, tile: int) -> Tensor:
        lse_T = torch.empty(labels_T.shape, dtype=torch.float32, device=hidden_TC.device)
        losses_T = torch.empty_like(lse_T)
        for start in range(0, labels_T.numel(), tile):
            rows = slice(start, start + tile)
            logits = F.linear(hidden_TC[rows], weight_VC).float()
            valid = labels_T[rows] != IGNORE_INDEX
            target = torch.where(valid, labels_T[rows], 0)
            lse_T[rows] = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, target[:, None])[:, 0]
            losses_T[rows] = torch.where(valid, lse_T[rows] - picked, 0.0)
        ctx.save_for_backward(hidden_TC, weight_VC, labels_T, lse_T)
        ctx.tile = tile
        return losses_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TC, weight_VC, labels_T, lse_T = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_TC) if ctx.needs_input_grad[0] else None
        grad_weight: Tensor | None = None
        for start in range(0, labels_T.numel(), ctx.tile):
            rows = slice(start, start + ctx.tile)
            hidden, valid = hidden_TC[rows], labels_T[rows] != IGNORE_INDEX
            target = torch.where(valid, labels_T[rows], 0)[:, None]
            grad = F.linear(hidden, weight_VC).float().sub_(lse_T[rows, None]).exp_()  # softmax
            grad.scatter_(1, target, grad.gather(1, target) - 1.0)
            grad.mul_(torch.where(valid, grad_T[rows], 0.0)[:, None])
            grad = grad.to(weight_VC.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight_VC
            if ctx.needs_input_grad[1]:
                grad_weight = add_product(grad_weight, grad, hidden)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VC.dtype), None, None


def _weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return (losses if weights is None else losses * weights).sum()


def sum_losses(
    losses_RS: Tensor,
    labels_RS: Tensor,
    positions_RS: Tensor,
    trailing: int,
    cu_seqlens: Tensor,
    seq_len: int,
    weights_RS: Tensor | None = None,
    loss_sum: Tensor | None = None,
) -> LossSums:
    """LossSums of per-token losses, of whole rows or of some columns of them.

    Args:
        losses_RS: fp32, 0 where ignored.
        labels_RS, positions_RS: of the same tokens.
        trailing: the last so many tokens of a row count as trailing, in rows that one document fills; 0: none.
        cu_seqlens: document borders of the flattened whole rows.
        seq_len: of whole rows.
        weights_RS: fp32, of the same tokens, 0 where ignored; None: all 1. They have no part in the trailing loss,
            which is a measure.
        loss_sum: of the losses by weight, where it is known already; the gradient is its own.
    """
    valid = labels_RS != IGNORE_INDEX
    num_valid = valid.sum()
    row_start = torch.arange(labels_RS.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device) * seq_len
    next_border = cu_seqlens[torch.searchsorted(cu_seqlens, row_start, right=True)]
    full_length = (next_border == row_start + seq_len)[:, None]
    tail = full_length & valid & (positions_RS >= seq_len - trailing)
    return LossSums(
        loss_sum=_weighted_sum(losses_RS, weights_RS) if loss_sum is None else loss_sum,
        num_valid=num_valid,
        trailing_sum=torch.where(tail, losses_RS.detach(), 0.0).sum(),
        trailing_valid=tail.sum(),
        weight_sum=num_valid if weights_RS is None else weights_RS.sum(),
    )
