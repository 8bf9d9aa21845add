"""The Triton kernels as a backend (see `model.dispatch`); which of their exact paths runs, `triton_rule` says."""

from __future__ import annotations

import torch
from torch import Tensor

from model.dispatch import Backend
from model.moba import triton_common, triton_op, triton_rule, triton_union_op
from model.moba.blocks import BlockTable
from model.moba.triton_gate import choose
from model.moba.triton_membership import refusal


def _missing() -> str | None:
    """The kernels are built for Hopper: its tensor memory copies and its matrix instructions."""
    if triton_common.INTERPRETED:
        return "runs in Triton's interpreter in this process (TRITON_INTERPRET)"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs a GPU of compute capability 9.0 (H100, H200), not {major}.{minor}"


def attend(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, block_ids: Tensor, table: BlockTable, softmax_scale: float
) -> Tensor:
    """Attention to given blocks on the path that the stored rule names; arguments as in `triton_op.attend`."""
    T, H, D = q_THD.shape
    documents = table.cu_seqlens.numel() - 1
    choice = triton_rule.choose(T, table.block_size, block_ids.shape[-1] + 1, D, documents)
    # "dense" only when every past block fits into the list: given ids may still leave some out
    if choice.path == "union" and refusal(table, H) is None:
        return triton_union_op.attend(q_THD, k_THD, v_THD, block_ids, table, softmax_scale)
    return triton_op.attend(q_THD, k_THD, v_THD, block_ids, table, softmax_scale)


BACKEND = Backend(
    name="triton",
    device_types=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    max_block_size=8192,
    choose=choose,
    attend=attend,
    missing=_missing,
    full_when_ragged=False,  # flash-attention 2 takes 1.8 times what cuDNN takes: these kernels are faster
)
