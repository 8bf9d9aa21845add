"""`engine.deterministic`: the same run gives the same bits, on a GPU too.

MoBA's kernels, the optimizer and the collectives do so anyway; the backward of cuDNN's full attention does not.
With the switch every operation of torch has to be deterministic: full attention takes those ways of `model.full`
that are, and an operation that cannot be is torch's error.
"""

from __future__ import annotations

import os

import torch

from conf.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")  # cuBLAS: what torch takes for deterministic


def set_deterministic(wanted: bool) -> None:
    """In every worker, before its first matrix product on a GPU: cuBLAS reads its variable only then.

    Raises:
        UserError: the environment asks cuBLAS for something else.
    """
    if wanted and os.environ.setdefault(WORKSPACE, _FIXED[0]) not in _FIXED:
        raise UserError(
            f"engine.deterministic=true: {WORKSPACE}={os.environ[WORKSPACE]} in the environment lets cuBLAS vary; "
            f"unset it, or set it to {' or '.join(_FIXED)}"
        )
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        # It fills what torch.empty returns, which costs time and changes no result of ours.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
