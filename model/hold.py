"""Keep tensors for a backward pass so that activation checkpointing may drop and recompute them.

A Python autograd function saves its tensors after its forward has run, so a recomputation that needs them would
run that forward again. Tensors held before it end the recomputation there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Held:
    """Tensors to come back for."""

    def __init__(self, node: Any, tensors: tuple[Tensor, ...]) -> None:
        self._node, self._tensors = node, tensors

    def take(self) -> tuple[Tensor, ...]:
        """The values. Where they were held inside `torch.utils.checkpoint` this recomputes them, and may be called
        once in a backward pass."""
        values: tuple[Tensor, ...] = self._tensors if self._node is None else self._node.saved_tensors
        return values


def hold(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Held]:
    """The same values as new nodes of the graph, and the handle that gives them back in backward."""
    passed: tuple[Tensor, ...] = _Hold.apply(*tensors)
    node = next((x.grad_fn for x in passed if x.grad_fn is not None), None)
    # Without a node nothing is recomputed; without gradients nobody will come.
    return passed, Held(node, tensors if node is None and torch.is_grad_enabled() else ())


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads
