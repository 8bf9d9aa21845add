"""The union path as one differentiable operation, with the arguments and results of `triton_op.attend`.

Saved for the backward pass: q, k, v, out, lse and the membership words (4 bytes per 32 blocks and row). No
host synchronisation, no floating-point atomics: repeated runs give equal bits, and a CUDA graph can capture both
passes.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.moba.blocks import BlockTable
from model.moba.triton_membership import Membership
from model.moba.triton_union import forward_pass
from model.moba.triton_union_backward import backward_pass


def attend(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, block_ids: Tensor, table: BlockTable, softmax_scale: float
) -> Tensor:
    """Softmax attention over the listed past blocks and the causal part of the own block.

    Arguments and result as in `triton_op.attend`.

    Raises:
        ValueError: a shape that `triton_membership.refusal` names (more than 256 past blocks).
    """
    q_THD, k_THD, v_THD = q_THD.contiguous(), k_THD.contiguous(), v_THD.contiguous()
    return _Attend.apply(q_THD, k_THD, v_THD, block_ids.contiguous(), table, softmax_scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        block_ids: Tensor,
        table: BlockTable,
        softmax_scale: float,
    ) -> Tensor:
        out, lse, found = forward_pass(q_THD, k_THD, v_THD, block_ids, table, softmax_scale)
        ctx.save_for_backward(q_THD, k_THD, v_THD, out, lse, found.word, found.unit_word)
        ctx.unit, ctx.table, ctx.softmax_scale = found.unit, table, softmax_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, out, lse, word, unit_word = ctx.saved_tensors
        found = Membership(word, unit_word, ctx.unit)
        dq, dk, dv = backward_pass(
            q_THD, k_THD, v_THD, out, lse, dout_THD.contiguous(), ctx.table, ctx.softmax_scale, found
        )
        return dq, dk, dv, None, None, None
