"""How a model computes: choices that change neither a parameter's name nor, beyond rounding, a result."""

from __future__ import annotations

from dataclasses import dataclass

from model import fused
from model.fused import Pieces
from model.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Execution:
    """Defaults: one process, everything kept, plain PyTorch.

    Attributes:
        parallel: the sequence-parallel group; None: whole rows.
        checkpointing: none | full | selective, see `model.recompute`.
        offload_checkpoints: what checkpointing keeps waits in host memory, see `model.offload`.
        mlp_tile: tokens per tile of the MLP, see `model.tiled_mlp`; 0: all at once.
        pieces: norm, RoPE and SwiGLU, see `model.fused`.
        fused_loss: head and loss in one pass, see `model.fused_loss`.
    """

    parallel: SequenceParallel | None = None
    checkpointing: str = "none"
    offload_checkpoints: bool = False
    mlp_tile: int = 0
    pieces: Pieces = fused.PLAIN
    fused_loss: bool = False


PLAIN = Execution()
