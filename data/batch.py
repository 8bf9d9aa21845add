"""The contract between data and model: what one micro-batch is.

Shape legend: R rows, S seq_len, N documents (or pieces of documents) in the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch. Everything is computed on the host, so no step ever waits for the device.

    Attributes:
        input_ids: int64 [R, S].
        labels: int64 [R, S], already shifted: `labels[r, s]` is the token after `input_ids[r, s]`,
            or IGNORE_INDEX where no loss is taken (document ends, masked prompts, padding).
        positions: int64 [R, S], 0 at each document start. Every row starts with 0.
            The single truth for RoPE, document masks and MoBA's blocks.
        cu_seqlens: int32 [N + 1], document borders in the flattened [R * S] row of tokens.
        max_seqlen: longest document piece of the batch.
        weights: fp32 [R, S], at least 0: the loss of each label counts so many times, also in the mean's divisor;
            0 where there is no label. None: every label counts once.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    weights: Tensor | None = None

    @property
    def num_valid(self) -> int:
        """Tokens that carry loss. Call on the host copy only: on a GPU this would wait for it."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def weight_sum(self) -> float:
        """Sum of the weights, added up in float64; `num_valid` without weights. On the host copy only."""
        return float(self.num_valid) if self.weights is None else float(self.weights.double().sum())

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; asynchronous where the source is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A page-locked copy, from which `to` is asynchronous. Needs CUDA."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (self.input_ids, self.labels, self.positions, self.cu_seqlens)
        input_ids, labels, positions, cu_seqlens = (change(t) for t in tensors)
        weights = None if self.weights is None else change(self.weights)
        return Batch(input_ids, labels, positions, cu_seqlens, self.max_seqlen, weights)


def cu_seqlens_of(positions: np.ndarray) -> tuple[np.ndarray, int]:
    """Document borders of `positions` [R, S] after flattening, int32 [N + 1], and the longest piece."""
    flat = positions.reshape(-1)
    borders = np.append(np.flatnonzero(flat == 0), flat.size).astype(np.int32)
    return borders, int(np.diff(borders).max())
