"""Matrix products whose sum is kept in fp32 whatever the dtype of the factors.

A weight may carry a `GradientSum`: then backward adds its gradient there, inside the product on a GPU, and leaves
nothing in `grad`. (Megatron-LM calls this gradient accumulation fusion.) Weights that lie side by side, and their
sums, can be multiplied as one (`Joint`).

Shape legend: N tokens, M outputs, C inputs.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradientSum(Protocol):
    """Where the gradient of a weight, or of several that lie side by side, adds up over a step."""

    @property
    def total(self) -> Tensor:
        """fp32 [M, C]; what it holds is of an earlier step until `begin` was called."""

    def begin(self) -> bool:
        """Before something is added: whether it is the first of this step and has to overwrite what is there."""


def add_product(total_MC: Tensor | None, left_NM: Tensor, right_NC: Tensor) -> Tensor:
    """total + left^T right, fp32 [M, C], in place; with no total yet, the product.

    Many tiles are summed this way: in bf16 the small terms would be lost. On a GPU the sum happens inside the
    product, which is then never rounded to the factors' dtype; elsewhere the product is rounded first.
    """
    if left_NM.is_cuda and left_NM.dtype != torch.float32:
        if total_MC is None:
            return torch.mm(left_NM.t(), right_NC, out_dtype=torch.float32)
        return torch.addmm(total_MC, left_NM.t(), right_NC, out_dtype=torch.float32, out=total_MC)
    product = left_NM.t() @ right_NC
    return product.float() if total_MC is None else total_MC.add_(product)


def sum_product(into: GradientSum, left_NM: Tensor, right_NC: Tensor) -> None:
    """Add left^T right to a gradient."""
    if not into.begin():
        add_product(into.total, left_NM, right_NC)
    elif left_NM.is_cuda and left_NM.dtype != torch.float32:
        torch.mm(left_NM.t(), right_NC, out_dtype=torch.float32, out=into.total)
    else:
        into.total.copy_(left_NM.t() @ right_NC)


def gradient_sum(weight: Tensor) -> GradientSum | None:
    """Where the gradient of `weight` adds up, if it was given a place."""
    return getattr(weight, "gradient_sum", None)


def place_gradient(weight: Tensor, into: GradientSum) -> None:
    """From now on the gradient of `weight` adds up in `into`."""
    weight.gradient_sum = into  # type: ignore[attr-defined]


class Linear(nn.Linear):
    """Adds its weight's gradient to the weight's `gradient_sum`, where there is one and there is no bias."""

    def forward(self, x: Tensor) -> Tensor:
        into = gradient_sum(self.weight)
        if into is None or self.bias is not None:
            return F.linear(x, self.weight, self.bias)
        (out,) = _Products.apply(x, self.weight, [self.weight], [into])
        return cast(Tensor, out)


class Branches(nn.Module):
    """Projections of one input: on a GPU also its gradient adds up inside the products.

    It owns no parameter: the weights stay those of `parts`, by their names.
    """

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        self._parts = parts  # a tuple is no submodule

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every part's output."""
        weights = [part.weight for part in self._parts]
        sums = [gradient_sum(weight) for weight in weights]
        if any(into is None or part.bias is not None for into, part in zip(sums, self._parts, strict=True)):
            return tuple(part(x) for part in self._parts)
        outs: tuple[Tensor, ...] = _Products.apply(x, weights[0], weights, sums)
        return outs


class Joint(nn.Module):
    """Projections of one input as one product, once `join` was given their weights as one matrix."""

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        self._parts = parts
        self._joined: tuple[Tensor, GradientSum] | None = None

    @property
    def weights(self) -> list[Tensor]:
        return [part.weight for part in self._parts]

    @property
    def is_joined(self) -> bool:
        return self._joined is not None

    def join(self, weight_MC: Tensor, into: GradientSum) -> None:
        """`weight_MC`: the memory of the parts' weights, in their order; `into`: of their gradients' sums."""
        self._joined = weight_MC, into

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] to the outputs of all parts, one behind the other [..., M]."""
        if self._joined is None:
            raise RuntimeError("the projections have not been joined")
        weight_MC, into = self._joined
        (out,) = _Products.apply(x, self._parts[0].weight, [weight_MC], [into])
        return cast(Tensor, out)


class _Products(torch.autograd.Function):
    """x weight^T for each weight. `parameter` makes autograd ask for gradients, and gets none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameter: Tensor, weights: list[Tensor], sums: list[GradientSum]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.weights, ctx.sums = weights, sums  # ours for good: nothing to save, and no version to check
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x_NC, grad_x = x.reshape(-1, x.shape[-1]), None
        for grad, weight, into in zip(grads[::-1], ctx.weights[::-1], ctx.sums[::-1], strict=True):
            grad_NM = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[1]:
                sum_product(into, grad_NM, x_NC)
            if not ctx.needs_input_grad[0]:
                continue
            if grad_x is None:
                grad_x = grad_NM @ weight
            elif grad_x.is_cuda:
                grad_x.addmm_(grad_NM, weight)
            else:  # as autograd adds them up, last first
                grad_x += grad_NM @ weight
        return None if grad_x is None else grad_x.view(x.shape), None, None, None
