"""The Triton kernels as a backend (see `model.dispatch`)."""

from __future__ import annotations

import torch

from model.dispatch import Backend
from model.moba import triton_common
from model.moba.triton_gate import choose
from model.moba.triton_op import attend


def _missing() -> str | None:
    """The kernels are built for Hopper: its tensor memory copies and its matrix instructions."""
    if triton_common.INTERPRETED:
        return "runs in Triton's interpreter in this process (TRITON_INTERPRET)"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs a GPU of compute capability 9.0 (H100, H200), not {major}.{minor}"


BACKEND = Backend(
    name="triton",
    device_types=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    max_block_size=8192,
    choose=choose,
    attend=attend,
    missing=_missing,
)
