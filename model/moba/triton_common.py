"""What the Triton files share: tile shapes, launch options, tensor descriptors.

Shape legend of all triton_*.py files: T tokens, H query heads, Hkv key heads, G = H / Hkv, D head dimension,
B block_size, NB bound on the number of blocks (`BlockTable.block_start.numel()`), K listed past blocks per
query and head (topk - 1). A *row* is one (token, query head): row id = t * H + h. A *pair* is one (token,
query head, slot): inside key head j its number is (t * G + g) * K + slot.

Scores live in the base-2 domain: `scale_log2 = softmax_scale * log2(e)`, lse2 = log2 of the denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
LIST_ALIGN = 4  # list starts are multiples of 16 bytes of fp32: 1-D TMA loads need it


@dataclass(frozen=True)
class Tile:
    """Shape of the work of one program, and how it is compiled.

    `rows` query rows by `keys` keys; `max_registers` caps registers per thread so that two programs share a
    multiprocessor (0: no cap).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    max_registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.max_registers} if self.max_registers else options


@dataclass(frozen=True)
class Tiles:
    """The tiles of one (head_dim, block_size). Which won, and by how much, is in LOG.md."""

    gate: Tile
    routed: Tile
    combine: Tile
    dq: Tile
    dkv: Tile
    merge: Tile
    stationary: bool  # keys of a block stay in shared memory while query rows stream (small blocks)
    stream: int = 1  # row tiles one program of the stationary kernel handles
    fused: Tile | None = None  # dk, dv and dq partials in one kernel: a tile that covers the block


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""
    return bool(triton.knobs.runtime.interpret)


def tiles_for(head_dim: int, block_size: int, num_blocks: int) -> Tiles:
    """Measured winners on one H200; in the interpreter tiny tiles, so that small inputs have many of them."""
    keys = min(64, next_power_of_two(block_size))
    whole = next_power_of_two(block_size)
    if interpreting():
        small = Tile(rows=16, keys=min(32, keys), warps=4, stages=1)
        cover = Tile(rows=16, keys=whole, warps=4, stages=1) if whole <= 32 else None
        return Tiles(
            gate=Tile(rows=32, keys=16, warps=4, stages=1),
            routed=cover or small,
            combine=small,
            dq=small,
            dkv=small,
            merge=small,
            stationary=cover is not None,
            stream=3,
            fused=cover,
        )
    covered = block_size <= 128
    two_per_sm = Tile(rows=128, keys=keys, warps=8, stages=2, max_registers=128)
    if block_size <= 1024:
        dq = Tile(rows=128, keys=min(32, keys), warps=8, stages=3, max_registers=128)
    else:
        dq = Tile(rows=128, keys=keys, warps=8, stages=3)
    return Tiles(
        gate=Tile(rows=128 if num_blocks >= 1024 else 64, keys=64, warps=4, stages=1),
        routed=Tile(rows=64, keys=whole, warps=4, stages=3) if covered else two_per_sm,
        combine=Tile(rows=64, keys=keys, warps=4, stages=1, max_registers=128),
        dq=dq,
        dkv=Tile(rows=64, keys=keys, warps=4, stages=2),
        merge=Tile(rows=64, keys=keys, warps=4, stages=2),
        stationary=covered,
        stream=16,
        fused=Tile(rows=64, keys=whole, warps=8 if whole > 64 else 4, stages=2) if covered else None,
    )


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh memory for a kernel to fill. Tests replace it by NaN-filled memory."""
    return torch.empty(shape, dtype=dtype, device=device)


def token_rows(x_THD: Tensor, rows: int) -> Any:
    """Descriptor of [rows, D] tiles of `x_THD` seen as [T, H * D]."""
    T, H, D = x_THD.shape
    return TensorDescriptor(x_THD, [T, H * D], [H * D, 1], [rows, D])


def flat_rows(x: Tensor, rows: int) -> Any:
    """Descriptor of [rows, D] tiles of a contiguous [..., D] tensor seen as [rows of all, D]."""
    D = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // D, D], [D, 1], [rows, D])


def vector(x: Tensor, size: int) -> Any:
    """Descriptor of [size] pieces of a contiguous tensor seen as one vector."""
    return TensorDescriptor(x, [x.numel()], [1], [size])


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
