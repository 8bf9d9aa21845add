"""How a model computes: choices that change neither a parameter's name nor, beyond rounding, a result."""

from __future__ import annotations

from dataclasses import dataclass

from model.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Execution:
    """Defaults: one process, everything kept, plain PyTorch.

    Attributes:
        parallel: the sequence-parallel group; None: whole rows.
    """

    parallel: SequenceParallel | None = None


PLAIN = Execution()
