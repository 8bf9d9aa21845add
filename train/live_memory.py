"""Exact count of the bytes in live tensors, for devices whose allocator keeps no statistics (the CPU)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, every tensor that any operator returns is counted until its storage is freed.

    What an operator allocates and frees inside itself is not seen. Storages made before are counted from
    `watch` on.

    Attributes:
        live: bytes alive now.
        peak: largest `live` since construction or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors`, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._seen.get(storage._cdata)
            if known is not None and known() is not None:
                continue
            size = storage.nbytes()
            gone = functools.partial(self._forget, storage._cdata, size)
            self._seen[storage._cdata] = weakref.ref(storage, gone)
            self.live += size
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        self.peak = self.live

    def _forget(self, key: int, size: int, _reference: Any) -> None:
        self._seen.pop(key, None)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.device.type != "meta")
        return out
