"""The Triton kernels as a backend (see `model.dispatch`)."""

from __future__ import annotations

import torch

from model.dispatch import Backend
from model.moba import triton_common
from model.moba.triton_gate import choose
from model.moba.triton_op import attend


def _missing() -> str | None:
    """The kernels are built for Hopper: tensor memory copies and its matrix instructions."""
    if triton_common.interpreting():
        return None
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs a GPU of compute capability 9.0 (H100, H200), not {major}.{minor}"


_HARDWARE = (("cuda",), (torch.bfloat16, torch.float16), (64, 128))
_INTERPRETER = (("cpu",), (torch.float32,), ())  # TRITON_INTERPRET=1: for tests
_device_types, _dtypes, _head_dims = _INTERPRETER if triton_common.interpreting() else _HARDWARE

BACKEND = Backend(
    name="triton",
    device_types=_device_types,
    dtypes=_dtypes,
    head_dims=_head_dims,
    max_block_size=8192,
    choose=choose,
    attend=attend,
    missing=_missing,
)
