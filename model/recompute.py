"""Activation checkpointing of a block, in two strengths. Neither ever chooses blocks twice.

`full` keeps the block's input and the chosen block ids; backward computes the block again, with those ids.
`selective` splits the block around attention: what leads up to it and what follows is computed again, attention is
not. What attention saved for its own backward stays (output, log-sum-exp, ids), except q, k and v, which come out
of the recomputation of the first part.

Shape legend: T tokens, H query heads, Hkv kv heads, D head_dim, K listed past blocks per query.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.hold import Held, hold
from model.offload import HostOffload

QKV = tuple[Tensor, Tensor, Tensor]


def pack_ids(block_ids: Tensor, num_blocks: int) -> Tensor:
    """int32 ids below `num_blocks`, or -1, in the narrowest type that holds them. -1 wraps round in uint8."""
    if num_blocks <= 255:
        return block_ids.to(torch.uint8)
    return block_ids.to(torch.int16) if num_blocks <= 2**15 else block_ids


def unpack_ids(packed: Tensor) -> Tensor:
    """The int32 ids `pack_ids` was given."""
    if packed.dtype == torch.uint8:
        wide = packed.int()
        return wide.masked_fill_(wide == 255, -1)
    return packed.int()


class Choices:
    """The block ids one forward pass of one layer chose, for the recomputation of that forward."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._replaying = False

    def __call__(self, choose: Callable[[], Tensor], num_blocks: int) -> Tensor:
        """`choose()`, remembered; in a recomputation what it returned then."""
        if self._replaying and self._packed is not None:
            return unpack_ids(self._packed)
        block_ids = choose()
        self._packed = pack_ids(block_ids, num_blocks)
        return block_ids

    # A context that may be entered again: a graph kept by retain_graph is recomputed in each backward pass.
    def __enter__(self) -> None:
        self._replaying = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replaying = False


def full(compute: Callable[[Tensor], Tensor], x: Tensor, choices: Choices, offload: HostOffload | None) -> Tensor:
    """`compute(x)`, of which only x (in host memory, with `offload`) and `choices` are kept.

    `compute` must ask `choices` for its blocks.
    """
    with _offloading(offload):
        return _checkpoint(compute, x, contexts=lambda: (nullcontext(), choices))


def selective(
    lead: Callable[[Tensor], QKV],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    finish: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    num_blocks: int,
    offload: HostOffload | None,
) -> Tensor:
    """`finish(x, attend(*lead(x)))`, of which x and what `attend` saves beside q, k, v are kept.

    Args:
        lead: to q [T, H, D] and k, v [T, Hkv, D], each in memory of its own.
        num_blocks: bound on block ids, for keeping them in a narrow type; 0: ids are not recognised.
        offload: host memory for what is kept; None: it stays on the device.
    """
    with _offloading(offload):
        q, k, v = _checkpoint(lambda x: hold(*lead(x))[0], x)
        keep = _Keep(Held(q.grad_fn, ()), (q, k, v), num_blocks, offload)
        with saved_tensors_hooks(keep.pack, keep.unpack):
            out = attend(q, k, v)
        del q, k, v, keep
        return _checkpoint(finish, x, out)


class _Keep:
    """What happens to the tensors attention saves: q, k, v are dropped and recomputed, the rest is kept."""

    def __init__(self, held: Held, qkv: QKV, num_blocks: int, offload: HostOffload | None) -> None:
        self._held, self._num_blocks, self._offload = held, num_blocks, offload
        self._places = {x.untyped_storage().data_ptr(): index for index, x in enumerate(qkv)}
        self._shape_TH = qkv[0].shape[:2]
        self._recomputed: tuple[Tensor, ...] | None = None

    def pack(self, x: Tensor) -> Any:
        """A view of q, k or v becomes its place and geometry; block ids are narrowed; others stay as they are."""
        index = self._places.get(x.untyped_storage().data_ptr())
        if index is not None:
            return index, x.size(), x.stride(), x.storage_offset()
        ids = self._num_blocks > 0 and x.dtype == torch.int32 and x.ndim == 3 and x.shape[:2] == self._shape_TH
        if ids:
            x = pack_ids(x, self._num_blocks)
        return ids, x if self._offload is None else self._offload.pack(x)

    def unpack(self, packed: Any) -> Tensor:
        if len(packed) == 4:
            if self._recomputed is None:
                self._recomputed = self._held.take()
            index, *geometry = packed
            return self._recomputed[index].as_strided(*geometry)
        ids, kept = packed
        x: Tensor = kept if self._offload is None else self._offload.unpack(kept)
        return unpack_ids(x) if ids else x


def _checkpoint(function: Callable[..., Any], *args: Tensor, contexts: Callable[[], Any] | None = None) -> Any:
    """torch's own, without random state: nothing in a block draws numbers."""
    more: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **more)


def _offloading(offload: HostOffload | None) -> AbstractContextManager[Any]:
    return nullcontext() if offload is None else offload.layer()
