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
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
# True when the kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 at the first import).
INTERPRETED = bool(triton.knobs.runtime.interpret)
MIN_SEGMENT = 128 if INTERPRETED else 1 << 14  # list entries one program takes in the dk, dv kernel, at least
# Triton 3.6 overlaps the matrix instructions of the fused kernel only if its keys come by descriptor, which was
# measured to be faster. From 3.7 on they overlap by pointer too, with 5 spills in the loop and not 54 (not timed).
_FUSED_BY_DESCRIPTOR = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
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
    stationary: bool  # forward: keys of a block stay in shared memory while query rows stream (small blocks)
    stationary_dq: bool
    stream: int = 1  # row tiles one program of a stationary kernel handles
    reach: bool = False  # queries that choose all of their past run without lists (see triton_reach)
    fused: Tile | None = None  # dk, dv and dq partials in one kernel: a tile that covers the block
    fused_pointers: bool = True  # its keys and values come by pointer, else by descriptor
    combine_split: bool = True  # keys of the own block that all rows see have a loop of their own, without a mask
    merge_split: bool = False  # the same in the merge of dq
    ahead: int = 2  # stages of the loops over the partials of a query

    @property
    def routed_rows(self) -> int:
        """List entries per program of the forward kernel."""
        return self.routed.rows * (self.stream if self.stationary else 1)

    @property
    def dq_rows(self) -> int:
        """List entries per program of the dq kernel."""
        return self.dq.rows * (self.stream if self.stationary_dq else 1)


@cache
def tiles_for(head_dim: int, block_size: int, num_blocks: int) -> Tiles:
    """Measured winners on one H200; in the interpreter tiny tiles, so that small inputs have many of them."""
    keys = min(64, next_power_of_two(block_size))
    whole = next_power_of_two(block_size)
    if INTERPRETED:
        small = Tile(rows=16, keys=min(32, keys), warps=4, stages=1)
        cover = Tile(rows=16, keys=whole, warps=4, stages=1) if whole <= 32 else None
        return Tiles(
            gate=Tile(rows=32, keys=16, warps=4, stages=1),
            routed=cover or small,
            combine=small,
            dq=cover or small,
            dkv=small,
            merge=small,
            stationary=cover is not None,
            stationary_dq=cover is not None,
            stream=3,
            fused=cover,
            fused_pointers=whole < 32,
            combine_split=head_dim > 16,
            merge_split=head_dim > 16,
            reach=True,
        )
    gate = Tile(rows=64, keys=32 if num_blocks <= 80 else 64, warps=4, stages=1)
    return _covered(head_dim, gate, whole) if whole <= 128 else _streamed(head_dim, gate, block_size, num_blocks)


def _covered(head_dim: int, gate: Tile, whole: int) -> Tiles:
    """Blocks of at most 128 keys: one tile covers a block."""
    keys = min(64, whole)
    wide = head_dim > 64
    dkv = Tile(rows=64, keys=max(64, whole), warps=8 if whole == 128 else 4, stages=3)
    return Tiles(
        gate=gate,
        routed=Tile(rows=64, keys=whole, warps=4, stages=3, max_registers=0 if wide else 128),
        combine=Tile(64, min(32, keys), 4, 3, 168) if wide else Tile(64, keys, 4, 2, 128),
        dq=Tile(rows=64, keys=whole, warps=4, stages=1),
        dkv=dkv,
        merge=Tile(64, min(32, keys), 4, 2, 168 if wide else 128),
        stationary=True,
        stationary_dq=True,
        stream=16,
        fused=dkv,
        fused_pointers=not (wide and whole == 128 and _FUSED_BY_DESCRIPTOR),
        combine_split=False,
        reach=True,
        ahead=3 if wide else 2,
    )


def _streamed(head_dim: int, gate: Tile, block_size: int, num_blocks: int) -> Tiles:
    """Larger blocks: keys stream past a tile of rows, or rows past a tile of keys."""
    if head_dim <= 64:
        return Tiles(
            gate=gate,
            routed=Tile(64, 64, 4, 2, 128),
            combine=Tile(64, 64, 4, 2, 0 if num_blocks <= 64 else 128),  # few blocks: long runs without a list
            dq=Tile(128, 64, 8, 3, 128),
            dkv=Tile(64, 64, 4, 3, 168),
            merge=Tile(64, 64, 4, 2, 128),
            merge_split=True,
            stationary=False,
            stationary_dq=False,
            reach=True,
        )
    short = block_size <= 1024
    return Tiles(
        gate=gate,
        routed=Tile(128, 64, 8, 2, 128),
        combine=Tile(128, 64, 8, 3) if block_size >= 4096 else Tile(64, 64, 4, 1, 168 if short else 128),
        dq=Tile(128, 32, 8, 3, 128) if block_size <= 2048 else Tile(128, 64, 8, 3),
        dkv=Tile(64, 128, 8, 3),
        merge=Tile(64, 32, 4, 2, 168) if short else Tile(64, 64, 4, 2),
        stationary=False,
        stationary_dq=False,
        ahead=3 if short else 2,
    )


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


def slot_bits(slots: int) -> int:
    """Room for the slots of a query read at once, of few sizes (each is compiled); 0: too many for registers."""
    return next((room for room in (8, 16) if slots <= room), 0)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
