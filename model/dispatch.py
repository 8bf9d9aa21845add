"""Which implementation of MoBA runs: backends declare what they can do, one is chosen once and logged once.

A backend is a module with a constant `BACKEND: Backend`. To add one, write the module, list it in
`_MODULES` and, if `auto` may pick it, in `_AUTO`. Modules are imported only when somebody asks for them;
one whose import fails, or whose `missing()` gives a reason, is reported with that reason. Nothing is ever
swapped for another behind the caller's back: a named backend that cannot do the job is an error that
names one that can.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError

_log = logging.getLogger(__name__)

_MODULES = {
    "triton": "model.moba.triton_backend",
    "varlen": "model.moba.varlen",
    "reference": "model.moba.reference",
}
_AUTO = ("triton", "varlen")  # in order of preference
NAMES = ("auto", *_MODULES)


def _nothing_missing() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """What one implementation supports, and its two entry points.

    Attributes:
        name: as in `attention.backend`.
        device_types: e.g. ("cpu", "cuda").
        dtypes: of q, k and v.
        choose: `(q, k, table, num_past) -> block_ids`: the best `num_past` past blocks of each query and
            head, int32 [T, H, num_past] of global block ids, -1 = empty, any order. No gradient.
        attend: `(q, k, v, block_ids, table, softmax_scale) -> out`: [T, H, D], softmax over the listed past
            blocks and the causal part of the query's own block. Differentiable in q, k, v.
            `table` is a `model.moba.blocks.BlockTable`; inputs were validated by `model.moba.api`.
        head_dims: allowed head dimensions; empty: every one.
        max_block_size: largest block; 0: no limit.
        missing: a reason why this machine cannot run it (a package, a GPU generation), or None.
        full_when_dense: True lets `moba_attention` use `model.full` when every past block is chosen anyway.
        full_when_ragged: the same for packed documents of unequal length, where `model.full` on a GPU runs
            flash-attention 2.
    """

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    choose: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    head_dims: tuple[int, ...] = ()
    block_size_multiple: int = 16
    max_block_size: int = 0
    missing: Callable[[], str | None] = _nothing_missing
    full_when_dense: bool = True
    full_when_ragged: bool = True

    def refuse(self, *, device_type: str, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
        """Why this backend cannot do the job, or None if it can."""
        if device_type not in self.device_types:
            return f"runs on {'/'.join(self.device_types)}, not on {device_type}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}"
        if self.head_dims and head_dim not in self.head_dims:
            return f"takes head_dim {', '.join(map(str, self.head_dims))}, not {head_dim}"
        if block_size % self.block_size_multiple:
            return f"takes a block_size that is a multiple of {self.block_size_multiple}, not {block_size}"
        if self.max_block_size and block_size > self.max_block_size:
            return f"takes a block_size up to {self.max_block_size}, not {block_size}"
        return self.missing()


def resolve_backend(
    name: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int, block_size: int
) -> Backend:
    """The backend that will run, decided once per distinct request and process.

    `auto` takes the Triton kernels on CUDA where they support the shape, else the varlen path, and logs
    (level INFO, once) what it took and why the other was passed over.

    Raises:
        UserError: unknown name, or a named backend that cannot do the job; the message names one that can.
    """
    return _resolve(name, torch.device(device).type, dtype, head_dim, block_size)


@cache
def _resolve(name: str, device_type: str, dtype: torch.dtype, head_dim: int, block_size: int) -> Backend:
    ask: dict[str, Any] = {
        "device_type": device_type,
        "dtype": dtype,
        "head_dim": head_dim,
        "block_size": block_size,
    }
    what = f"{device_type}, {_short(dtype)}, head_dim {head_dim}, block_size {block_size}"
    if name not in NAMES:
        raise UserError(f"attention.backend={name}: unknown; use one of {', '.join(NAMES)}")
    if name != "auto":
        backend, reason = _try(name, ask)
        if backend is None:
            works = next((n for n in (*_AUTO, "reference") if n != name and _try(n, ask)[0]), None)
            hint = f"attention.backend={works} works here" if works else "no other backend can do it either"
            raise UserError(f"attention.backend={name} {reason}; {hint}")
        _log.info("MoBA backend %s, as asked (%s)", name, what)
        return backend
    passed: list[str] = []
    for candidate in _AUTO:
        backend, reason = _try(candidate, ask)
        if backend is not None:
            because = f"; {'; '.join(passed)}" if passed else ""
            _log.info("MoBA backend %s (%s)%s", candidate, what, because)
            return backend
        passed.append(f"{candidate} {reason}")
    raise UserError(f"attention.backend=auto: no backend for {what}: {'; '.join(passed)}")


def _try(name: str, ask: dict[str, Any]) -> tuple[Backend | None, str]:
    """The backend if it can do the job, else None and the reason."""
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        return None, f"cannot be imported here ({error})"
    backend: Backend = module.BACKEND
    reason = backend.refuse(**ask)
    return (None, reason) if reason else (backend, "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
