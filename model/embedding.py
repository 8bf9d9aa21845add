"""Token embedding.

Shape legend: T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.products import GradientSum, gradient_sum

# Up to here the gradients of single tokens are sorted and added up in fp32; for more that would need much memory,
# and passes over a gradient as large as the vocabulary matter less beside them.
MAX_TOKENS = 65_536


class Embedding(nn.Embedding):
    """Draws nothing on the meta device, where torch would first import its compiler (seconds) to draw nothing.

    With a `gradient_sum`, only the rows of the tokens at hand are touched in backward, not the whole vocabulary.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        into = gradient_sum(self.weight)
        if into is None or input.numel() > MAX_TOKENS:
            return super().forward(input)
        out: Tensor = _Lookup.apply(input, self.weight, into)
        return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VC: Tensor, into: GradientSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.into = into
        return F.embedding(ids, weight_VC)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        grad_TC = grad.reshape(-1, grad.shape[-1]).float()
        if ctx.into.begin():
            ctx.into.total.zero_()
        # Sorts the ids, so that repeated runs add up in the same order.
        ctx.into.total.index_put_((ids.reshape(-1),), grad_TC, accumulate=True)
        return None, None, None
